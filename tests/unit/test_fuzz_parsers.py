"""The fuzz of the parsers for seconds, and every fault that it or a reading for it has found."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from bench import fuzz
from bench.fuzz import Fault, Tally, Trial, blame, engines_here, read_tally, summary, watch
from bench.fuzz_inputs import Mutator
from bench.fuzz_strategies import inputs_of
from bench.fuzz_targets import TARGETS, Target, make_target
from hypothesis import HealthCheck, given, settings
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from coinfer.bundle import Bundle, FileEntry, load_bundle
from coinfer.codec import Codec, make_codec
from coinfer.codec.packing import zstd_compress, zstd_decompress
from coinfer.errors import BundleError, PayloadError, ProtocolError
from coinfer.plan import CodecSpec, TensorSpec
from coinfer.protocol import PROTOCOL_VERSION, DeviceConnection, EdgeConnection, Limits, Terms
from tiny_bundle import make_tiny_bundle

INPUTS = 3000
PICTURE = TensorSpec(name="input", shape=(64, 64, 3), dtype="uint8")
FEATURE = TensorSpec(name="map", shape=(5, 4, 6))


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest, exit_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return make_target(request.param, exit_bundle, tmp_path_factory.mktemp("scratch"))


# --- the engines -----------------------------------------------------------------------------------


def test_thousands_of_damaged_inputs_are_refused_or_hold_what_is_promised(target: Target):
    trial = Trial(target, Tally(target.name, "mutator", 7))
    mutator, random = Mutator(target.seeds, skip=target.skip), Random(7)
    for _ in range(INPUTS):
        trial(mutator.make(random))
    assert [fault.what for fault in trial.tally.faults if fault.kind != "hang"] == []
    # Not all of them are turned away at the door.
    assert 0 < trial.tally.accepted < trial.tally.inputs == INPUTS


def test_inputs_from_strategies_are_refused_or_hold_what_is_promised(target: Target):
    seen = []

    @settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs_of(target))
    def every(data: bytes) -> None:
        seen.append(target.run(data))

    every()
    assert len(seen) >= 200


def test_valid_inputs_are_accepted(target: Target):
    accepted = [target.run(seed) for seed in target.seeds]
    assert sum(accepted) > len(accepted) / 3


def test_the_same_seed_makes_the_same_inputs(target: Target):
    mutator = Mutator(target.seeds, skip=target.skip)
    one, again, other = ([mutator.make(random) for _ in range(50)] for random in (Random(1), Random(1), Random(2)))
    assert one == again != other


class Faulty:
    """A parser with one fault of each kind."""

    name, skip = "faulty", 0
    seeds = [b"ok"]

    def __init__(self) -> None:
        self.kept: list[bytearray] = []

    def run(self, data: bytes) -> bool:
        if data == b"crash":
            raise KeyError(data)
        if data == b"allocate":
            self.kept.append(bytearray(64 << 20))
        return data == b"ok"


def test_a_fault_is_found_counted_and_its_input_kept():
    # In a process of its own: what another test has held would hide what this one allocates.
    program = f"import sys; sys.path[:0] = {sys.path!r}; import test_fuzz_parsers as here; here.find_faults()"
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def find_faults():
    trial = Trial(Faulty(), Tally("faulty", "mutator", 1))
    for data in (b"ok", b"crash", b"no", b"crash", b"allocate"):
        trial(data)
    crash, allocation = trial.tally.faults
    assert isinstance(crash, Fault) and crash.what.startswith("KeyError at test_fuzz_parsers.py:")
    assert (crash.kind, crash.count, bytes.fromhex(crash.input)) == ("crash", 2, b"crash")
    assert (allocation.kind, allocation.count, bytes.fromhex(allocation.input)) == ("allocation", 1, b"allocate")
    counted = summary("faulty", [trial.tally])
    assert (counted["inputs"], counted["accepted"]) == (5, 1)
    assert (counted["crashes"], counted["hangs"], counted["allocations"]) == (2, 0, 1)


# --- processes of their own --------------------------------------------------------------------------


@pytest.mark.parametrize("engine", sorted(engines_here()))
def test_every_engine_gives_its_inputs_in_a_process_of_its_own(tmp_path: Path, engine: str):
    tally = watch(tmp_path, "protocol", engine, 1, 150)
    assert (tally.inputs, tally.faults) == (150, [])
    assert read_tally(tmp_path, "protocol", engine, 1) == tally


def test_a_run_that_was_stopped_goes_on_with_the_inputs_that_are_left(tmp_path: Path):
    watch(tmp_path / "in two", "payloads", "mutator", 3, 200)
    in_two = watch(tmp_path / "in two", "payloads", "mutator", 3, 500)
    at_once = watch(tmp_path / "at once", "payloads", "mutator", 3, 500)
    assert (in_two.inputs, in_two.accepted) == (at_once.inputs, at_once.accepted)
    assert 0 < in_two.accepted < in_two.inputs == 500


def test_a_process_that_is_stuck_is_ended_and_its_input_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzz, "STUCK_S", 0.05)
    current = tmp_path / "current"
    current.write_bytes(fuzz._CURRENT.pack(41, 4) + b"evil" + bytes(100))
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], stderr=subprocess.DEVNULL)
    assert fuzz._wait(process, current) and process.returncode == -signal.SIGABRT
    tally = Tally("protocol", "mutator", 1, inputs=30)
    blame(tally, current, "", is_stuck=True)
    assert (tally.inputs, tally.faults) == (42, [Fault("hang", "does not end", 1, b"evil".hex())])
    blame(tally, current, "ended the process (-11), see x.log", is_stuck=False)
    assert (tally.count("hang"), tally.count("crash")) == (1, 1)


# --- what was found: payloads ------------------------------------------------------------------------


def codec_of(transform: str, coder: str, *, quality: int | None = None) -> tuple[Codec, bytes]:
    """A codec, and a payload of it."""
    tensor = PICTURE if transform == "image" else FEATURE
    codec = make_codec(CodecSpec(transform=transform, coder=coder, quality=quality), (tensor,))  # type: ignore[arg-type]
    return codec, codec.encode([np.zeros((1, *tensor.shape), tensor.dtype)])


def forged(payload: bytes, code: bytes) -> bytes:
    """A payload with another code behind a right header."""
    return payload[:2] + struct.pack("<I", zlib.crc32(code, zlib.crc32(payload[:2]))) + code


def saved(**options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros(PICTURE.shape, np.uint8)).save(file, **options)
    return file.getvalue()


@pytest.mark.parametrize("window", [0x50, 0x88, 0xA8], ids=["1 MiB", "128 MiB", "2 GiB"])
def test_fourteen_bytes_do_not_ask_for_a_window_of_megabytes(window: int):
    codec, payload = codec_of("float32", "zstd")
    code = bytearray(payload[6:])
    # Frame descriptor, window descriptor (RFC 8878, 3.1.1.1), blocks.
    code[1] = window
    with pytest.raises(PayloadError, match="480 B are expected, the frame has a window of"):
        codec.decode(forged(payload, bytes(code)))


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 4097, 300_000, 3_000_000])
def test_our_own_frames_have_windows_that_are_allowed(size: int):
    for raw in (bytes(size), Random(size).randbytes(size)):
        assert zstd_decompress(zstd_compress(raw), size) == raw


def test_text_in_a_png_is_not_unpacked():
    codec, payload = codec_of("image", "png")
    text = PngInfo()
    for number in range(5):
        text.add_text(f"comment{number}", "a" * 900_000, zip=True)
    bomb = forged(payload, saved(format="PNG", pnginfo=text))
    assert len(bomb) < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match="chunks IHDR, IDAT, IEND, got b'zTXt'"):
            codec.decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    assert codec.decode(payload)[0].shape == (1, 64, 64, 3)


def test_a_jpeg_of_a_thousand_scans_is_refused():
    codec, payload = codec_of("image", "jpeg", quality=80)
    progressive = saved(format="JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    for file in (progressive, progressive[:-2] + 1000 * scan + progressive[-2:]):
        with pytest.raises(PayloadError, match="a JPEG picture is baseline, got marker ffc2"):
            codec.decode(forged(payload, file))


def test_a_jpeg_whose_components_come_in_scans_of_their_own_is_refused():
    codec, payload = codec_of("image", "jpeg", quality=80)
    file = bytearray(payload[6:])
    file[file.index(b"\xff\xda") + 4] = 1
    with pytest.raises(PayloadError, match="no JPEG picture of one scan"):
        codec.decode(forged(payload, bytes(file)))


def test_a_jpeg_with_an_applications_data_and_a_comment_is_a_picture():
    codec, payload = codec_of("image", "jpeg", quality=80)
    file = saved(format="JPEG", comment=b"hello", exif=b"Exif\0\0" + bytes(8), icc_profile=bytes(100))
    assert codec.decode(forged(payload, file))[0].max() == 0


# --- what was found: protocol ------------------------------------------------------------------------


def terms_of(bundle: Bundle) -> Terms:
    return Terms.of(bundle)


GREETINGS = {
    "a field of 60,000 characters": f'{{"type":"hello","protocol":{PROTOCOL_VERSION},"{"b/" * 30_000}":1}}',
    "a type of 60,000 characters": f'{{"type":"{"x" * 60_000}","protocol":{PROTOCOL_VERSION}}}',
    "control characters": f'{{"type":"\\u0007\\n","protocol":{PROTOCOL_VERSION}}}',
}


@pytest.mark.parametrize("text", GREETINGS.values(), ids=GREETINGS)
def test_what_a_greeting_says_is_one_short_line_of_the_log(tiny_bundle: Bundle, text: str):
    terms = terms_of(tiny_bundle)
    ends: list[Callable[[], object]] = [
        partial(EdgeConnection(terms, Limits(max_message_bytes=4096, in_flight=4)).receive, text),
        partial(DeviceConnection(terms).receive, text),
    ]
    for receive in ends:
        with pytest.raises(ProtocolError) as caught:
            receive()
        assert len(str(caught.value)) < 700 and str(caught.value).isprintable()


def test_another_bundles_name_is_shown_without_control_characters(tiny_bundle: Bundle):
    limits = {"max_message_bytes": 1, "in_flight": 1}
    welcome = {"type": "welcome", "protocol": PROTOCOL_VERSION, "bundle": "a\0b\x1b[31m", "limits": limits}
    with pytest.raises(ProtocolError, match=r"welcomed to bundle a b \[31m, not"):
        DeviceConnection(terms_of(tiny_bundle)).receive(msgspec.json.encode(welcome).decode())


# --- what was found: manifests -----------------------------------------------------------------------


@pytest.fixture
def listing(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a bundle that lists one file of that name."""

    def make(name: str) -> Path:
        bundle = make_tiny_bundle(tmp_path / "bundle")
        files = {name: FileEntry(num_bytes=1, sha256="0" * 64)}
        manifest = msgspec.structs.replace(bundle.manifest, files=files)
        (bundle.folder / "bundle.json").write_bytes(msgspec.json.encode(manifest))
        return bundle.folder

    return make


@pytest.mark.parametrize("name", ["a" * 300, "a" * 300 + "/b", "b/" * 3000 + "b"], ids=["file", "folder", "path"])
def test_a_listed_name_that_no_file_system_has_is_a_missing_file(listing: Callable[[str], Path], name: str):
    with pytest.raises(BundleError, match="is missing"):
        load_bundle(listing(name))


def test_a_listed_folder_is_a_missing_file_and_is_not_left_open(listing: Callable[[str], Path]):
    folder = listing("segments")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(BundleError, match='file "segments" is missing'):
            load_bundle(folder)
    assert len(os.listdir("/proc/self/fd")) == before
