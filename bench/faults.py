"""Faults for the runtime's benches: a link that does what networks and enemies do, and an edge that is hard to keep.

    device --> Meddler (a port of its own) --> edge process

`Meddler` carries TCP connections and breaks, blackens, silences, slows, cuts or tampers with them.  It knows the frames
of a WebSocket in the clear and so can choose its bytes; TLS it can only damage blindly.  What TLS is for, it does not
do in the clear: change the body of a reply so that it is another answer of the same form.

`Names` is the resolver of this process, which may fail for one host.  `expired` makes a certificate that was valid,
`renumbered` a bundle that is another one to both ends.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from coinfer.bundle import Bundle, load_bundle, new_folder, write_manifest
from coinfer.protocol import HEADER_BYTES, MessageType

Way = Literal["up", "down"]
Mode = Literal["open", "black", "silent"]
How = Literal["garbage", "flip", "double", "swap", "swallow", "cut"]
T = TypeVar("T")
_CHUNK_BYTES = 65536
# A slow link carries that much at a time, so that it can become fast again soon.
_SLICE_BYTES = 64
_LINGER_RESET = struct.pack("ii", 1, 0)
_SWAP_S = 0.05
_REQUEST_TOP_BYTE = 7
_KINDS = (MessageType.REQUEST, MessageType.REPLY, MessageType.FAILURE, MessageType.BUSY)


class _Pair:
    """One connection through the link: the device's side and the edge's."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter | None) -> None:
        self.near, self.far = near, far
        # Lost without a word; or about to be reset.
        self.is_dead = self.is_cut = False
        # A reply that waits until another has overtaken it.
        self.held: bytes | None = None

    def reset(self) -> None:
        """Both ends see a reset."""
        for writer in (self.near, self.far):
            if writer is not None:
                reset(writer)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a reset."""
    end: socket.socket | None = writer.get_extra_info("socket")
    if end is not None:
        with suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    writer.transport.abort()


class Meddler:
    """A link from a port of its own to `target`, in a thread; the methods may be called from any other.

    Args:
        target: host and port of the edge.
        seed: of what is damaged, and how.
        is_framed: connections are WebSocket in the clear; otherwise their bytes mean nothing to it.
    """

    def __init__(self, target: tuple[str, int], *, seed: int = 0, is_framed: bool = True) -> None:
        self.target, self.port = target, 0
        self._is_framed = is_framed
        self._chance = random.Random(seed)
        self._mode: Mode = "open"
        self._rate_bps: float | None = None
        self._tamper: tuple[Way, How] | None = None
        self._left = 0
        self._pairs: set[_Pair] = set()
        # Those of a time without a link: nobody will carry them on, nobody closes them.
        self._dead: list[_Pair] = []
        self.num_tampered = self.num_connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="meddler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server: asyncio.Server = self._call(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def break_all(self) -> None:
        """Reset every connection; new ones are taken as before."""
        self._call(self._break_all())

    def blacken(self) -> None:
        """Swallow all bytes both ways, of connections that stand and of new ones, and close none."""
        self._call(self._lose("black"))

    def silence(self) -> None:
        """The edge's machine vanishes: its connections end there, the device is told nothing, new ones get no word."""
        self._call(self._lose("silent"))

    def slow(self, rate_bps: float) -> None:
        """Carry no more than so many bits a second, each way and connection."""
        self._rate_bps = rate_bps

    def tamper(self, way: Way, how: How, messages: int) -> None:
        """Do that to the next messages of a direction."""
        self._left = 0
        self._tamper, self._left = (way, how), messages

    def heal(self) -> None:
        """Carry new connections, and those that were not lost, as they are."""
        self._mode, self._rate_bps, self._tamper, self._left = "open", None, None, 0

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _break_all(self) -> None:
        for pair in [*self._pairs]:
            pair.reset()

    async def _lose(self, mode: Mode) -> None:
        self._mode = mode
        for pair in [*self._pairs]:
            self._kill(pair)

    def _kill(self, pair: _Pair) -> None:
        pair.is_dead = True
        self._pairs.discard(pair)
        self._dead.append(pair)
        if self._mode == "silent" and pair.far is not None:
            reset(pair.far)

    async def _end(self) -> None:
        self._server.close()
        for pair in [*self._pairs, *self._dead]:
            pair.reset()
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        pair = _Pair(writer, None)
        if self._mode != "open":
            self._kill(pair)
            if self._mode == "black":
                self._start(self._pump(pair, reader, "up"))
            return
        try:
            far_reader, pair.far = await asyncio.open_connection(*self.target)
        except OSError:
            # Nobody is there: the device sees what it would see without this link.
            reset(writer)
            return
        for end in (writer, pair.far):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._mode == "open":
            self._pairs.add(pair)
        else:
            self._kill(pair)
        self._start(self._pump(pair, reader, "up"))
        self._start(self._pump(pair, far_reader, "down"))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(self, pair: _Pair, reader: asyncio.StreamReader, way: Way) -> None:
        """Carry one direction of a connection until its end."""
        units = Units() if self._is_framed else None
        try:
            while data := await reader.read(_CHUNK_BYTES):
                for unit in [data] if units is None else units.feed(data):
                    if not (pair.is_dead or pair.is_cut):
                        await self._carry(pair, way, unit)
            sink = pair.far if way == "up" else pair.near
            if not pair.is_dead and sink is not None:
                sink.write_eof()
        except OSError:
            # One end is gone; the other learns it, if there is a link.
            if not pair.is_dead:
                pair.reset()
        finally:
            if way == "down" and not pair.is_dead:
                self._pairs.discard(pair)
                pair.near.close()
                if pair.far is not None:
                    pair.far.close()

    async def _carry(self, pair: _Pair, way: Way, unit: bytes) -> None:
        """Pass on one message, or what becomes of it."""
        sink = pair.near if way == "down" else pair.far
        assert sink is not None
        parts = [unit]
        if self._left > 0 and self._tamper is not None and self._tamper[0] == way and self._is_worth_it(unit):
            self._left -= 1
            self.num_tampered += 1
            parts = self._tampered(pair, unit, self._tamper[1])
        if way == "down" and parts and pair.held is not None:
            parts, pair.held = [*parts, pair.held], None
        for part in parts:
            await self._write(pair, sink, part)

    def _is_worth_it(self, unit: bytes) -> bool:
        return not self._is_framed or is_message(unit)

    async def _write(self, pair: _Pair, sink: asyncio.StreamWriter, data: bytes) -> None:
        while data and not pair.is_dead:
            rate_bps = self._rate_bps
            if rate_bps is None:
                part, data = data, b""
            else:
                part, data = data[:_SLICE_BYTES], data[_SLICE_BYTES:]
                await asyncio.sleep(8 * len(part) / rate_bps)
            sink.write(part)
            await sink.drain()

    def _tampered(self, pair: _Pair, unit: bytes, how: How) -> list[bytes]:
        """What is sent in the place of a message."""
        chance = self._chance
        if how == "garbage":
            return [chance.randbytes(chance.randint(1, 2000)), unit]
        if how == "flip":
            return [flipped(unit, chance) if self._is_framed else flipped_anywhere(unit, chance)]
        if how == "double":
            return [unit, unit]
        if how == "swallow":
            return []
        if how == "swap" and pair.held is None:
            pair.held = unit
            self._loop.call_later(_SWAP_S, self._let_go, pair)
            return []
        if how == "cut":
            # What is written before goes out first, and nothing behind it.
            pair.is_cut = True
            self._loop.call_later(0.01, pair.reset)
            return [unit[: chance.randrange(1, max(2, len(unit)))]]
        return [unit]

    def _let_go(self, pair: _Pair) -> None:
        """Nothing has come that could overtake it."""
        if pair.held is not None and not (pair.near.is_closing() or pair.is_dead or pair.is_cut):
            held, pair.held = pair.held, None
            pair.near.write(held)


class Units:
    """Cuts one direction of a WebSocket connection into its HTTP head and its frames."""

    def __init__(self) -> None:
        self._data = b""
        self._is_head = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What has become whole by these bytes."""
        self._data += data
        while (size := self._size()) is not None and size <= len(self._data):
            unit, self._data = self._data[:size], self._data[size:]
            self._is_head = False
            yield unit

    def _size(self) -> int | None:
        data = self._data
        if self._is_head:
            end = data.find(b"\r\n\r\n")
            return None if end < 0 else end + 4
        if len(data) < 2 or len(data) < (begin := payload_begin(data)):
            return None
        short = data[1] & 0x7F
        extended = {126: data[2:4], 127: data[2:10]}.get(short)
        return begin + (short if extended is None else int.from_bytes(extended, "big"))


def payload_begin(frame: bytes) -> int:
    """Where a frame's payload begins."""
    return {126: 4, 127: 10}.get(frame[1] & 0x7F, 2) + (4 if frame[1] & 0x80 else 0)


def is_message(unit: bytes) -> bool:
    """Whether it is a frame with a request, or with an answer to one."""
    if len(unit) < 2 or unit[0] != 0x82 or len(unit) < (begin := payload_begin(unit)) + HEADER_BYTES:
        return False
    kind = unit[begin] ^ (unit[begin - 4] if unit[1] & 0x80 else 0)
    return kind in _KINDS


def flipped(frame: bytes, chance: random.Random) -> bytes:
    """One bit is another, somewhere that a device or an edge can notice: not in the body of a reply.

    Of the number of a request the highest byte is taken, so that it is not the number of another one.
    """
    begin = payload_begin(frame)
    places = [0, 1, *range(begin, begin + 4), begin + _REQUEST_TOP_BYTE]
    if frame[1] & 0x80:
        places += range(begin + HEADER_BYTES, len(frame))
    return _flip(frame, chance.choice(places), chance)


def flipped_anywhere(data: bytes, chance: random.Random) -> bytes:
    """One bit is another."""
    return _flip(data, chance.randrange(len(data)), chance)


def _flip(data: bytes, place: int, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


class Names:
    """This process's resolver, as long as it is entered: it knows `host` as this machine, and may forget it."""

    def __init__(self, host: str) -> None:
        self.host, self.is_gone = host, False
        self._real: Callable[..., Any] = socket.getaddrinfo

    def __enter__(self) -> Self:
        socket.getaddrinfo = self._look_up
        return self

    def __exit__(self, *_: object) -> None:
        socket.getaddrinfo = self._real

    def _look_up(self, host: Any, *args: Any, **kwargs: Any) -> Any:
        if host != self.host:
            return self._real(host, *args, **kwargs)
        if self.is_gone:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return self._real("127.0.0.1", *args, **kwargs)


def expired(folder: Path, stem: str) -> bytes:
    """The certificate STEM.pem of a test CA in `folder` once more, valid until yesterday, in PEM."""
    made = x509.load_pem_x509_certificate((folder / f"{stem}.pem").read_bytes())
    key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(made.subject).issuer_name(made.issuer)
    builder = builder.public_key(made.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=30)).not_valid_after(now - timedelta(days=1))
    for extension in made.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def renumbered(bundle: Bundle, target: Path) -> Bundle:
    """The same plans under each other's numbers: whoever took it for `bundle` would answer by other plans."""
    before = [plan.number for plan in bundle.manifest.menu]
    after = dict(zip(before, [*before[1:], before[0]], strict=True))
    menu = tuple(msgspec.structs.replace(plan, number=after[plan.number]) for plan in bundle.manifest.menu)
    menu = tuple(sorted(menu, key=lambda plan: plan.number))
    reference = after[bundle.manifest.reference_plan]
    with new_folder(target) as folder:
        shutil.copytree(bundle.folder, folder, dirs_exist_ok=True)
        write_manifest(folder, msgspec.structs.replace(bundle.manifest, menu=menu, reference_plan=reference))
    return load_bundle(target)


def exchange(one: Path, other: Path) -> None:
    """Let two folders change their names."""
    aside = one.with_name(f".{one.name}.aside")
    os.rename(one, aside)
    os.rename(other, one)
    os.rename(aside, other)


def replace(path: Path, content: bytes) -> None:
    """Give a file other content, all at once."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content)
    fresh.replace(path)


class Accidents:
    """What ends a thread of this process that nobody expects to end, as long as it is entered."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __enter__(self) -> Self:
        self._before, threading.excepthook = threading.excepthook, self._note
        return self

    def __exit__(self, *_: object) -> None:
        threading.excepthook = self._before

    def _note(self, given: threading.ExceptHookArgs) -> None:
        name = given.thread.name if given.thread is not None else "a thread"
        self.lines.append(f"{name}: {given.exc_type.__name__}: {given.exc_value}")
