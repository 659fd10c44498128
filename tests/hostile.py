"""A peer that speaks whatever it likes: raw sockets, raw HTTP, raw WebSocket frames."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import time
from urllib.parse import urlsplit

PATIENCE_S = 30.0
TEXT, BINARY, CLOSE, PING, CONT = 1, 2, 8, 9, 0


def dial(url: str, *, context: ssl.SSLContext | None = None, receive_bytes: int | None = None) -> socket.socket:
    """A connected socket to the host and port of a url."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    peer = socket.socket()
    if receive_bytes is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    peer.settimeout(PATIENCE_S)
    peer.connect((parts.hostname, parts.port))
    return peer if context is None else context.wrap_socket(peer, server_hostname=parts.hostname)


def read_all(peer: socket.socket) -> bytes:
    """All that comes until the other side ends, by whatever way."""
    parts = []
    try:
        while part := peer.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def read_head(peer: socket.socket) -> bytes:
    """An HTTP response's head, byte by byte so that nothing behind it is read."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and (part := peer.recv(1)):
        head += part
    return head


def upgrade(peer: socket.socket, *lines: str) -> bytes:
    """Ask for a WebSocket; the response's head."""
    head = [
        "GET /link HTTP/1.1", "Host: edge", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *lines, "", "",
    ]  # fmt: skip
    peer.sendall("\r\n".join(head).encode("latin-1"))
    return read_head(peer)


def frame(opcode: int, data: bytes = b"", *, fin: bool = True, rsv: int = 0, size: int | None = None) -> bytes:
    """A masked WebSocket frame (RFC 6455, section 5.2); `size` is what it says of its length."""
    stated = len(data) if size is None else size
    head = bytes([fin << 7 | rsv << 4 | opcode])
    if stated < 126:
        head += bytes([0x80 | stated])
    elif stated < 65536:
        head += bytes([0x80 | 126]) + struct.pack(">H", stated)
    else:
        head += bytes([0x80 | 127]) + struct.pack(">Q", stated)
    mask = os.urandom(4)
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
    return head + mask + masked


def read_frame(peer: socket.socket) -> tuple[int, bytes]:
    """Opcode and data of the next frame of an edge; (-1, b"") where the connection ends."""
    try:
        head = _exactly(peer, 2)
        size = head[1] & 0x7F
        if size == 126:
            (size,) = struct.unpack(">H", _exactly(peer, 2))
        elif size == 127:
            (size,) = struct.unpack(">Q", _exactly(peer, 8))
        return head[0] & 0x0F, _exactly(peer, size)
    except ConnectionError:
        return -1, b""


def _exactly(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = peer.recv(count - len(data))
        if not part:
            raise ConnectionResetError
        data += part
    return data


def close_code(peer: socket.socket) -> tuple[int, str]:
    """Code and reason with which an edge closes; (-1, "") where it just hangs up."""
    while True:
        opcode, data = read_frame(peer)
        if opcode == CLOSE:
            return struct.unpack(">H", data[:2])[0], data[2:].decode()
        if opcode == -1:
            return -1, ""


def is_cut_off(peer: socket.socket, drip: bytes, every_s: float) -> bool:
    """Whether the other side ends the connection although it is sent a byte now and then."""
    deadline_s = time.monotonic() + PATIENCE_S
    peer.settimeout(every_s)
    while time.monotonic() < deadline_s:
        try:
            peer.sendall(drip)
            if not peer.recv(65536):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False
