"""The three parsers that meet strangers' bytes, and what each must do with any input.

    protocol    both ends of the link in every state; an input is a state and up to eight messages
    payloads    `decode` of every kind of codec on calibrated tables; an input is a codec and a payload, or a code to
                which the right header is added, so that it gets behind the checksum
    manifests   `load_bundle` of a folder whose bundle.json, or one other file, is the input

`Target.run` is true where an input was accepted and what came of it holds what the parser promises, false where it was
refused by an error that the parser documents; everything else is a fault and is raised.
"""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from coinfer.bundle import Bundle, Manifest, load_bundle
from coinfer.codec import Codec, Tables, calibrate, learned_tensor, make_codec
from coinfer.errors import BundleError, CoinferError, PayloadError, ProtocolError, RefusedError
from coinfer.plan import CodecSpec, TensorSpec
from coinfer.protocol import (
    GREETING_BYTES,
    Busy,
    DeviceConnection,
    Durations,
    EdgeConnection,
    Failure,
    Hello,
    Limits,
    Ping,
    Pong,
    Reply,
    Request,
    Terms,
    Welcome,
)

# Of an error's message: a stranger must not fill the log.
MOST_CHARACTERS = 1000


class Target(Protocol):
    """One parser: `seeds` are valid inputs, `skip` the bytes of an input before its text begins."""

    name: str
    seeds: list[bytes]
    skip: int

    def run(self, data: bytes) -> bool:
        """Whether one input is accepted; raises whatever is a fault."""
        ...


class Fault(AssertionError):
    """An input was accepted, and what came of it is not what the parser promises."""


# --- protocol --------------------------------------------------------------------------------------

# Bytes of a message of a made-up session: kind (0 text, 1 binary) and length.
_MESSAGE = struct.Struct("<BH")
DEVICE_GREETS, DEVICE_OPEN, EDGE_GREETS, EDGE_OPEN = range(4)
_FIRST = 2**32 - 3
IN_FLIGHT = 4


class ProtocolTarget:
    """Device and edge ends; an input is a state (u8) and messages, each kind (u8), length (u16) and bytes."""

    name = "protocol"
    skip = 1 + _MESSAGE.size

    def __init__(self, bundle: Bundle) -> None:
        self._terms = Terms.of(bundle)
        self.bundle = bundle.digest
        self._limits = Limits(max_message_bytes=4096, in_flight=IN_FLIGHT)
        self._outputs = [np.zeros((1, *spec.shape), spec.dtype) for spec in self._terms.outputs]
        self._plans = sorted(self._terms.plans)
        device, edge = self._device(), self._edge()
        self._hello, self._welcome = device.hello(), edge.welcome()
        self.seeds = list(self._make_seeds())

    def _device(self) -> DeviceConnection:
        return DeviceConnection(self._terms)

    def _edge(self) -> EdgeConnection:
        return EdgeConnection(self._terms, self._limits)

    def _open_device(self) -> DeviceConnection:
        """With requests of several plans in flight, whose numbers wrap around, and a heartbeat."""
        device = self._device()
        device.receive(self._welcome)
        for place, plan in enumerate(self._plans):
            device.request((_FIRST + place) % 2**32, plan, b"")
        device.ping(7)
        return device

    def _make_seeds(self) -> Iterator[bytes]:
        device, edge = self._device(), self._edge()
        refusal = edge.refusal("no")
        edge.receive(device.hello())
        edge.welcome()
        device.receive(self._welcome)
        requests = []
        for place, plan in enumerate(self._plans):
            requests.append(device.request((_FIRST + place) % 2**32, plan, b"payload"))
            edge.receive(requests[-1])
        numbers = [(_FIRST + place) % 2**32 for place in range(len(self._plans))]
        answers: list[bytes] = []
        for place, number in enumerate(numbers):
            if place % 4 == 1:
                answers.append(edge.failure(number, "no ébène"))
            elif place % 4 == 3:
                answers.append(edge.busy(number, 0.25))
            else:
                answers.append(edge.reply(number, Durations(1, 2, 3), self._outputs))
        ping, pong = device.ping(7, padding=30), edge.pong(7)
        yield joined(DEVICE_GREETS, [self._welcome])
        yield joined(DEVICE_GREETS, [refusal])
        yield joined(DEVICE_GREETS, [self._welcome, pong, *answers[:1]])
        yield joined(EDGE_GREETS, [self._hello])
        yield joined(EDGE_GREETS, [self._hello, *requests[:2], ping])
        yield joined(EDGE_OPEN, [self._hello])
        yield from (joined(DEVICE_OPEN, [answer]) for answer in answers)
        yield joined(DEVICE_OPEN, answers[:8])
        yield joined(DEVICE_OPEN, [ping, pong, answers[0], answers[0]])
        yield from (joined(EDGE_OPEN, [request]) for request in requests)
        yield joined(EDGE_OPEN, [*requests[:6], ping, device.pong(3)])
        yield joined(EDGE_OPEN, [requests[0], requests[0]])

    def run(self, data: bytes) -> bool:
        """Give the messages to the end until it objects; a closed connection takes no more."""
        state = data[0] % 4 if data else 0
        messages = parted(data[1:])
        if state in (DEVICE_GREETS, DEVICE_OPEN):
            return self._run_device(self._device() if state == DEVICE_GREETS else self._open_device(), messages)
        edge = self._edge()
        if state == EDGE_OPEN:
            edge.welcome()
        return self._run_edge(edge, messages)

    def _run_device(self, device: DeviceConnection, messages: list[str | bytes]) -> bool:
        for message in messages:
            before = dict(device.in_flight)
            device.rehearse(message)
            require(device.in_flight == before, "a rehearsal changed what is in flight")
            try:
                event = device.receive(message)
            except (ProtocolError, RefusedError) as error:
                check_line(error)
                return False
            require(isinstance(event, Welcome | Reply | Failure | Busy | Ping | Pong), f"no event: {event!r}")
            if isinstance(event, Reply | Failure | Busy):
                require(before.pop(event.request, None) is event.plan, "an answer to what was not asked")
            require(device.in_flight == before, "what is in flight changed by itself")
        return bool(messages)

    def _run_edge(self, edge: EdgeConnection, messages: list[str | bytes]) -> bool:
        for message in messages:
            before = dict(edge.in_flight)
            try:
                event = edge.receive(message)
            except ProtocolError as error:
                check_line(error)
                return False
            if isinstance(event, Hello):
                reason = edge.objection(event)
                if reason is not None:
                    require(len(edge.refusal(reason)) < GREETING_BYTES, "a refusal that is no greeting")
                    return False
                edge.welcome()
            elif isinstance(event, Request):
                require(event.request not in before, "a request was taken twice")
                require(self._terms.plans.get(event.plan.number) is event.plan, "a plan that does not cross the link")
                before[event.request] = event.plan
            else:
                require(isinstance(event, Ping | Pong), f"no event: {event!r}")
            require(edge.in_flight == before, "what is in flight changed by itself")
        return bool(messages)


def joined(state: int, messages: Sequence[str | bytes]) -> bytes:
    """An input of `ProtocolTarget`."""
    parts = [bytes([state])]
    for message in messages:
        body = message.encode(errors="surrogatepass") if isinstance(message, str) else message
        parts.append(_MESSAGE.pack(isinstance(message, bytes), len(body)) + body)
    return b"".join(parts)


def parted(data: bytes) -> list[str | bytes]:
    """Up to eight messages; a length beyond the end takes all that is left."""
    messages: list[str | bytes] = []
    start = 0
    while start + _MESSAGE.size <= len(data) and len(messages) < 8:
        kind, size = _MESSAGE.unpack_from(data, start)
        body = data[start + _MESSAGE.size : start + _MESSAGE.size + size]
        start += _MESSAGE.size + size
        # A text that is not UTF-8 does not get through the WebSocket layer; lone surrogates stand for whatever might.
        messages.append(body if kind % 2 else body.decode(errors="surrogateescape"))
    return messages


# --- payloads --------------------------------------------------------------------------------------

MAP = TensorSpec(name="map", shape=(5, 4, 6))
TOKENS = TensorSpec(name="tokens", shape=(7, 6))
CODES = TensorSpec(name="codes", shape=(3, 5, 5), dtype="uint8")
LARGE = TensorSpec(name="large", shape=(16, 24, 24))
COLOUR = TensorSpec(name="input", shape=(16, 24, 3), dtype="uint8")
GREY = TensorSpec(name="input", shape=(9, 8, 1), dtype="uint8")
_SAMPLES = 12
# A code of the coder "jpeg", whatever the codec's own: see `PayloadTarget.run`.
_JPEG_MODE = 8 << 2 | 3
_FORMATS = (("png", None), ("webp-lossless", None), ("webp", 80), ("jpeg", 80), ("jpeg-bare", 80))


class PayloadTarget:
    """Every kind of codec; an input is a codec (u8), a mode (u8: even payload, odd code) and bytes."""

    name = "payloads"
    skip = 2

    def __init__(self, bundle: Bundle) -> None:
        self.codecs: list[Codec] = []
        self.seeds = []
        self._heads: list[bytes] = []
        plans = [plan for plan in bundle.manifest.menu if plan.codec is not None]
        made = {(plan.codec, plan.crossing): make_codec(plan.codec, plan.crossing) for plan in plans if plan.codec}
        for codec in (*made.values(), *calibrated_codecs(), *unit_codecs()):
            place = len(self.codecs)
            self.codecs.append(codec)
            for sample in range(2):
                payload = codec.encode(samples(codec.crossing, seed=sample))
                self.seeds += [bytes([place, 0]) + payload, bytes([place, 1]) + payload[6:]]
            # Where a codec has several coders, codes of each are let in.
            self._heads.append(payload[:2])
            if codec.spec.transform == "image" and codec.spec.coder != "none":
                self.seeds += [bytes([place, _JPEG_MODE]) + file for file in foreign_files(codec.crossing[0])]

    def run(self, data: bytes) -> bool:
        """Decode; what is accepted has the crossing's shapes and types."""
        if len(data) < 2:
            return False
        place = data[0] % len(self.codecs)
        codec, body = self.codecs[place], data[2:]
        if data[1] % 2:
            head = self._heads[place]
            # Modes 3, 7 and 11 name another coder.
            if data[1] % 4 == 3:
                head = bytes([1 << 4 | (data[1] >> 2) % 10, head[1]])
            body = head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body
        try:
            arrays = codec.decode(body)
        except PayloadError as error:
            check_line(error)
            return False
        require(len(arrays) == len(codec.crossing), "another number of arrays than cross")
        for spec, array in zip(codec.crossing, arrays, strict=True):
            require(array.shape == (1, *spec.shape) and array.dtype == spec.dtype, f"{array.dtype} {array.shape}")
        return True


def foreign_files(tensor: TensorSpec) -> Iterator[bytes]:
    """Whole picture files as other programs write them: with metadata, interlaced or in many scans."""
    pixels = np.zeros(tensor.shape if tensor.shape[2] == 3 else tensor.shape[:2], np.uint8)
    text = PngInfo()
    text.add_text("comment", "a" * 3000, zip=True)
    options: tuple[dict[str, Any], ...] = (
        {"format": "JPEG", "progressive": True, "comment": b"x" * 20, "exif": b"Exif\0\0" + bytes(30)},
        {"format": "JPEG", "restart_marker_blocks": 2, "icc_profile": bytes(100)},
        {"format": "PNG", "pnginfo": text, "dpi": (1, 1)},
    )
    for chosen in options:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, **chosen)
        yield file.getvalue()


def samples(crossing: Sequence[TensorSpec], *, seed: int, count: int = 1) -> list[Any]:
    """What a cut gives: zeros and a tail, another scale in each channel; noise for pictures."""
    rng = np.random.default_rng(seed)
    arrays = []
    for spec in crossing:
        if spec.dtype == "uint8":
            arrays.append(rng.integers(0, 256, (count, *spec.shape), dtype=np.uint8))
        else:
            scale = rng.uniform(0.2, 3, (spec.shape[0], *([1] * (len(spec.shape) - 1))))
            arrays.append((np.maximum(rng.normal(-0.3, 1, (count, *spec.shape)), 0) * scale).astype(spec.dtype))
    return arrays


def calibrated_codecs() -> Iterator[Codec]:
    """Floats, uniform by every coder, features as pictures, pictures: for one tensor, for two, for codes."""
    floats = [CodecSpec(transform=t, coder=c) for t in ("float32", "float16") for c in ("none", "zstd")]
    uniform = [
        CodecSpec(transform="uniform", bits=bits, per_channel=is_each, coder=coder)
        for coder in ("none", "zstd", "range", "rans")
        for bits, is_each in ((1, True), (3, True), (4, False), (8, True))
    ]
    tiled = [CodecSpec(transform="picture", coder=c, quality=q, per_channel=True) for c, q in _FORMATS]
    pictures = [CodecSpec(transform="image", coder=c, quality=q) for c, q in (("none", None), *_FORMATS)]
    large = [CodecSpec(transform="uniform", bits=4, per_channel=True, coder=c) for c in ("zstd", "rans")]
    cases: list[tuple[CodecSpec, tuple[TensorSpec, ...]]] = [
        *((spec, crossing) for crossing in ((MAP,), (MAP, TOKENS)) for spec in (*floats, *uniform, *tiled)),
        *((spec, (CODES,)) for spec in uniform if spec.bits == 8),
        *((spec, (picture,)) for picture in (COLOUR, GREY) for spec in pictures),
        *((spec, (LARGE,)) for spec in large),
    ]
    for spec, crossing in cases:
        features = samples(crossing, seed=100, count=_SAMPLES)
        yield make_codec(spec, crossing, calibrate(spec, crossing, features))


def unit_codecs() -> Iterator[Codec]:
    """Grids and shares as a trained unit has them, at two rates."""
    code = TensorSpec(name="code", shape=(3, 4, 4))
    for rate, coder in enumerate(("range", "rans")):
        spec = CodecSpec(transform="uniform", bits=4, per_channel=True, coder=coder, rate=rate)
        low, step = np.full(3, -2, np.float32), np.full(3, 0.25 * (rate + 1), np.float32)
        shares = 0.5 ** np.abs(np.arange(16) - 7.5) * np.ones((3, 1))
        tables = learned_tensor(spec, code, low, step, shares / shares.sum(axis=1, keepdims=True))
        yield make_codec(spec, (code,), Tables((tables,)))


# --- manifests -------------------------------------------------------------------------------------


class ManifestTarget:
    """`load_bundle` on a copy of a bundle, best in memory.

    An input is a place (u8) and bytes: place 0 is bundle.json's, the others replace one listed file each; with no bytes
    behind it, the file is gone.
    """

    name = "manifests"
    skip = 1

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self._folder = folder / "bundle"
        shutil.copytree(bundle.folder, self._folder)
        self._raw = (self._folder / "bundle.json").read_bytes()
        self._files = {name: (self._folder / name).read_bytes() for name in sorted(bundle.manifest.files)}
        compact = msgspec.json.encode(bundle.manifest)
        one = msgspec.structs.replace(bundle.manifest, menu=bundle.manifest.menu[:1], files={})
        whole = msgspec.structs.replace(bundle.manifest, files=dict(list(bundle.manifest.files.items())[:1]))
        exits = [plan for plan in bundle.manifest.menu if plan.exits][:2]
        some = msgspec.structs.replace(whole, menu=(bundle.manifest.menu[0], *exits))
        lean = msgspec.structs.replace(whole, menu=one.menu, cuts=(), classes=())
        texts = [self._raw, compact, *(msgspec.json.encode(made) for made in (one, whole, some, some, *[lean] * 6))]
        files = [bytes([1 + place]) + raw for place, raw in enumerate(self._files.values())]
        self.seeds = [*(b"\0" + text for text in texts), *(raw for raw in files[:2]), b"\1"]

    def run(self, data: bytes) -> bool:
        """Load; a bundle that loads holds exactly the bytes that its manifest names."""
        place = data[0] % (1 + len(self._files)) if data else 0
        return self._load_manifest(data[1:]) if place == 0 else self._load_altered(place, data[1:])

    def _load_manifest(self, raw: bytes) -> bool:
        path = self._folder / "bundle.json"
        path.write_bytes(raw)
        try:
            bundle = load_bundle(self._folder)
        except BundleError:
            return False
        require(isinstance(bundle.manifest, Manifest), "no manifest")
        for name, entry in bundle.manifest.files.items():
            require(name in self._files and entry.num_bytes == len(self._files[name]), f'a file "{name:.80}"')
        use(bundle)
        return True

    def _load_altered(self, place: int, raw: bytes) -> bool:
        name = list(self._files)[place - 1]
        path = self._folder / name
        (self._folder / "bundle.json").write_bytes(self._raw)
        try:
            if raw:
                path.write_bytes(raw)
            else:
                path.unlink()
            load_bundle(self._folder)
        except BundleError:
            return False
        finally:
            path.write_bytes(self._files[name])
        require(raw == self._files[name], f"an altered {name} was not noticed")
        return True


def use(bundle: Bundle) -> None:
    """What both machines compute of a loaded manifest before they agree on it; any of coinfer's errors may say no."""
    try:
        terms = Terms.of(bundle)
        terms.crossings()
        terms.max_request_bytes()
        terms.max_reply_bytes()
        for plan in terms.plans.values():
            if plan.codec is not None and sum(spec.num_bytes for spec in plan.crossing) < 1 << 20:
                make_codec(plan.codec, plan.crossing)
    except CoinferError:
        return


def check_line(error: CoinferError) -> None:
    """What a stranger's bytes bring into the log is one short line."""
    text = str(error)
    is_line = 0 < len(text) < MOST_CHARACTERS and text.isprintable()
    require(is_line, f"an error of {len(text)} characters is not one short line: {text[:200]!r}")


def require(is_true: bool, what: str) -> None:
    """Raise a Fault where something is not so."""
    if not is_true:
        raise Fault(what)


TARGETS = ("protocol", "payloads", "manifests")


def make_target(name: str, bundle: Bundle, scratch: Path) -> Target:
    """The target of that name; `scratch` is an empty folder, best in memory."""
    if name == "protocol":
        return ProtocolTarget(bundle)
    return PayloadTarget(bundle) if name == "payloads" else ManifestTarget(bundle, scratch)
