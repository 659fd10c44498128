"""TLS on both sides: what is trusted, in files, and a blocking socket that two threads may use at once.

OpenSSL does not allow one connection to be read by a thread while another writes to it.  Here it never touches the
network: it only turns text into records and back, in memory and under a lock, and what waits for the network waits
outside of it.

    write --> [lock: encrypt] --> send (waits)          recv (waits) --> [lock: decrypt] --> read

TLS 1.2 at least on both sides, no compression, no renegotiation.  A device checks the edge's certificate and its name;
there is no way to switch that off.
"""

from __future__ import annotations

import hashlib
import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path

from ..errors import LinkError, UsageError
from ..plan import Value

RECEIVE_BYTES = 65536
# As much is encrypted at once: whoever takes nothing stops the writer that soon.
_SEND_BYTES = 65536
_UNTRUSTED = (18, 19, 20, 21)
_OTHER_HOST = (62, 64)
_EXPIRED, _NOT_YET = 10, 9


class EdgeTls(Value, frozen=True, kw_only=True):
    """An edge's files, in PEM: its certificate (with those between it and the CA) and key.

    With `client_ca` only devices with a certificate of that CA are let in, and with `crl` none that it revokes.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    crl: Path | None = None

    def context(self) -> ssl.SSLContext:
        """What new connections are made with, read from the files now.

        Raises:
            UsageError: a file cannot be read, is none of its kind, or does not belong to the others.
        """
        if self.crl is not None and self.client_ca is None:
            raise UsageError("a CRL revokes certificates of a client CA, and none was given")
        context = _context(ssl.PROTOCOL_TLS_SERVER, self.certificate, self.key)
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            _trust(context, self.client_ca, "client CA")
        if self.crl is not None:
            _trust(context, self.crl, "CRL")
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        return context

    def admission(self) -> str:
        """Stands for who is let in by certificate: another value after a change of client CA or CRL."""
        digest = hashlib.sha256()
        for path in (self.client_ca, self.crl):
            digest.update(b"-" if path is None else hashlib.sha256(_content(path)).digest())
        return digest.hexdigest()


class DeviceTls(Value, frozen=True, kw_only=True):
    """A device's files, in PEM: the CA that it trusts (the system's where None), and its own certificate, if any."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """What a connection is made with.

        Raises:
            UsageError: as `EdgeTls.context`.
        """
        if (self.certificate is None) != (self.key is None):
            raise UsageError("a device's certificate needs its key, and its key the certificate: give both or none")
        context = _context(ssl.PROTOCOL_TLS_CLIENT, self.certificate, self.key)
        if self.ca is None:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        else:
            _trust(context, self.ca, "CA")
        return context


def _context(protocol: int, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    if certificate is not None and key is not None:
        for path in (certificate, key):
            _content(path)
        try:
            # Without a password given here, OpenSSL would ask the terminal for one.
            context.load_cert_chain(certificate, key, password="")
        except (OSError, ValueError) as error:
            raise UsageError(f"certificate and key cannot be used: {_reason(error)} ({certificate}, {key})") from error
    return context


def _trust(context: ssl.SSLContext, path: Path, what: str) -> None:
    _content(path)
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise UsageError(f"the {what} cannot be used: {_reason(error)} ({path})") from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error


def _reason(error: Exception) -> str:
    """What OpenSSL says, in words: "key values mismatch"."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return str(reason).replace("_", " ").lower()


class TlsSocket:
    """TLS over a connected blocking socket; one thread may `recv` while another sends.

    It has what `runtime.link` needs of a socket, with a socket's errors: OSError, and TimeoutError where nothing goes
    on for as long as `settimeout` says.  The end of the connection is b"", with or without TLS's own goodbye: the
    protocol above has one of its own.

    Args:
        link: connected; it belongs to this object from here on.
        context: a client's.
        host: whom the other side's certificate must name.
        timeout_s: how long the handshake may take.
        url: for messages.

    Raises:
        LinkError: no TLS came of it, or the other side is not who it must be.
    """

    def __init__(
        self, link: socket.socket, context: ssl.SSLContext, host: str, *, timeout_s: float, url: str
    ) -> None:
        self._link = link
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._using = threading.Lock()
        self._sending = threading.Lock()
        self._text = b""
        self._is_over = False
        try:
            self._shake_hands(timeout_s)
        except ssl.SSLCertVerificationError as error:
            raise LinkError(f"no trust in the edge at {url}: {_distrust(error, host)}") from error
        except TimeoutError as error:
            raise LinkError(f"no TLS at {url} within {timeout_s:g} s") from error
        except OSError as error:
            raise LinkError(f"no TLS came of {url}: {_reason(error)}") from error

    def _shake_hands(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                self._tls.do_handshake()
                is_done = True
            except ssl.SSLWantReadError:
                is_done = False
            except ssl.SSLError:
                # The other side is told why, if it still listens.
                with suppress(OSError):
                    self._send_records()
                raise
            self._send_records()
            if is_done:
                return
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._link.settimeout(left_s)
            data = self._link.recv(RECEIVE_BYTES)
            if not data:
                raise ConnectionResetError(0, "the edge hung up")
            self._incoming.write(data)

    def recv(self, most: int) -> bytes:
        """The next bytes, as many as came together, `most` or fewer; b"" at the end."""
        while not self._text and not self._is_over:
            self._receive()
        data, self._text = self._text[:most], self._text[most:]
        return data

    def is_readable(self) -> bool:
        """Whether `recv` would not wait; records that hold no bytes are taken in for it."""
        while not self._text and not self._is_over and is_readable(self._link):
            self._receive()
        return bool(self._text) or self._is_over

    def _receive(self) -> None:
        """Read once from the network and decrypt what came."""
        data = self._link.recv(RECEIVE_BYTES)
        parts = []
        with self._using:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()
            try:
                while part := self._tls.read(RECEIVE_BYTES):
                    parts.append(part)
                self._is_over = True
            except ssl.SSLWantReadError:
                pass
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                self._is_over = True
            except ssl.SSLError as error:
                raise ConnectionAbortedError(0, f"TLS: {_reason(error)}") from error
        self._text = b"".join(parts)
        # What TLS itself answers goes with whatever is sent next, or now where nobody sends.
        if self._outgoing.pending and self._sending.acquire(blocking=False):
            try:
                self._send_records()
            finally:
                self._sending.release()

    def send(self, data: bytes | memoryview) -> int:
        """Send the first bytes; how many."""
        piece = data[:_SEND_BYTES]
        with self._sending:
            with self._using:
                try:
                    count = self._tls.write(piece)
                except ssl.SSLError as error:
                    raise ConnectionAbortedError(0, f"TLS: {_reason(error)}") from error
            self._send_records()
        return count

    def _send_records(self) -> None:
        """Send what has been encrypted, in its order: one thread at a time."""
        with self._using:
            records = memoryview(self._outgoing.read())
        while records:
            records = records[self._link.send(records) :]

    def settimeout(self, timeout_s: float | None) -> None:
        """How long a call may wait; None: without end."""
        self._link.settimeout(timeout_s)

    def fileno(self) -> int:
        """The socket's number, -1 once it is closed."""
        return self._link.fileno()

    def shutdown(self, how: int) -> None:
        """Cut the connection; whoever waits is woken."""
        self._link.shutdown(how)

    def close(self) -> None:
        """Give the socket back."""
        self._link.close()


def is_readable(link: socket.socket) -> bool:
    """Whether a socket has bytes, or its end, to be read."""
    if link.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(link, select.POLLIN)
    return bool(poll.poll(0))


def _distrust(error: ssl.SSLCertVerificationError, host: str) -> str:
    """Why a certificate is not trusted, and what would help."""
    code = error.verify_code
    if code == _EXPIRED:
        return "its certificate has expired"
    if code == _NOT_YET:
        return "its certificate is not valid yet: is this machine's clock right?"
    if code in _OTHER_HOST:
        return f'its certificate is of another host than "{host}"'
    if code in _UNTRUSTED:
        return "its certificate is of no CA that this device trusts: give it the edge's CA"
    return f"its certificate is not accepted: {error.verify_message}"
