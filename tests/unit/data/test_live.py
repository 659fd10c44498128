"""Pictures as they come: streams cut into pictures to the byte, frames as soon as they are whole, folders that fill."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coinfer.bundle import Bundle
from coinfer.cli.options import LIVE
from coinfer.cli.pictures import Request, requests
from coinfer.cli.stopping import stopping
from coinfer.data import live
from coinfer.data.folder import read_picture
from coinfer.data.live import Size, Stop, mjpeg_frames, path_frames, raw_frames, watched_frames
from coinfer.data.mjpeg import Broken, JpegSplitter
from coinfer.errors import DataError
from coinfer.plan import TensorSpec
from coinfer.runtime.spawn import EdgeProcess
from tiny_bundle import PICTURE, pictures

SIZE = Size(8, 8, 3)
HOUR_S = 3600.0


def jpeg(seed: int, **options: object) -> bytes:
    """A JPEG of 24 x 20 noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", **options)
    return file.getvalue()


PLAIN, OTHER = jpeg(0), jpeg(1)
# Whole pictures in the metadata, as cameras' thumbnails are; several scans; restart markers; odd comments.
PICTURES = (
    PLAIN,
    jpeg(2, exif=b"Exif\0\0" + PLAIN + OTHER),
    jpeg(3, progressive=True),
    jpeg(4, restart_marker_blocks=1),
    jpeg(5, comment=b"\xff\xd9\xff\xd8\xff\xff\xd9"),
    OTHER,
)


def split(data: bytes, sizes: list[int] | None = None, **options: int) -> list[bytes | Broken]:
    """What a stream is cut into, fed in pieces of these sizes in turn."""
    splitter = JpegSplitter(**options)
    found: list[bytes | Broken] = []
    place, turn = 0, 0
    while place < len(data):
        size = (sizes or [len(data)])[turn % len(sizes or [1])]
        found += splitter.feed(data[place : place + size])
        place, turn = place + size, turn + 1
    return [*found, *splitter.end()]


# --- cutting a stream --------------------------------------------------------------------------------


def test_a_stream_is_cut_into_its_pictures_to_the_byte():
    assert split(b"".join(PICTURES)) == list(PICTURES)
    # A search for the end mark alone would find others.
    assert sum(picture.count(b"\xff\xd9") for picture in PICTURES) > len(PICTURES)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=8))
def test_however_the_bytes_come_the_pictures_are_the_same(sizes: list[int]):
    assert split(b"".join(PICTURES), sizes) == list(PICTURES)


def test_one_byte_at_a_time_gives_each_picture_with_its_last():
    splitter = JpegSplitter()
    ends = []
    for place, byte in enumerate(PLAIN + OTHER):
        ends += [(place + 1, found) for found in splitter.feed(bytes([byte]))]
    assert ends == [(len(PLAIN), PLAIN), (len(PLAIN + OTHER), OTHER)]


def test_what_lies_between_pictures_is_passed_over():
    head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: 99\r\n\r\n"
    data = b"\xff\xff\xd8" + head.join([b"\xff\xd8", PLAIN, OTHER, b"\r\n--frame--\xff"])
    assert [found for found in split(data, [7]) if isinstance(found, bytes)] == [PLAIN, OTHER]


def test_a_picture_that_is_cut_short_costs_no_other():
    for cut in range(4, len(PLAIN)):
        found = split(OTHER + PLAIN[:cut] + OTHER + PLAIN)
        first, *middle, last = (entry for entry in found if isinstance(entry, bytes))
        assert (first, last) == (OTHER, PLAIN)
        # Cut within a segment, its length may lead to a marker of the next one by chance: then they are one picture.
        assert middle in ([OTHER], [PLAIN[:cut] + OTHER])
        assert middle == [OTHER] or cut < PLAIN.index(b"\xff\xda") + 14


def test_a_wrong_length_costs_no_other_picture():
    wrong = bytearray(PLAIN)
    # The first segment's length, far beyond the next pictures.
    wrong[4:6] = b"\xff\xff"
    found = split(bytes(wrong) + OTHER * 200)
    assert [entry for entry in found if isinstance(entry, bytes)] == [OTHER] * 200
    wrong[4:6] = b"\0\1"
    broken, *whole = split(bytes(wrong) + OTHER)
    assert isinstance(broken, Broken) and "a length of 1 B" in broken.why
    assert whole == [OTHER]


def test_the_end_of_a_stream_in_a_picture_is_said():
    assert split(PLAIN + OTHER[:-1]) == [PLAIN, Broken("the stream ended in the middle of a picture", len(OTHER) - 1)]
    assert split(PLAIN + b"\xff\xd8") == [PLAIN]


def test_no_picture_grows_beyond_its_cap():
    most = len(PLAIN) + 10
    endless = PLAIN[:-2] + bytes(50_000)
    splitter = JpegSplitter(most_bytes=most)
    for start in range(0, len(endless), 100):
        list(splitter.feed(endless[start : start + 100]))
        assert len(splitter._data) <= most + 100
    assert [entry for entry in splitter.feed(PLAIN) if isinstance(entry, bytes)] == [PLAIN]
    (broken, *_) = split(jpeg(6, quality=100) + PLAIN, most_bytes=most)
    assert isinstance(broken, Broken) and f"at most {most} B" in broken.why


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([b"\xff", b"\xd8", b"\xd9", b"\xda", b"\0", b"\0\4", PLAIN, PLAIN[:99]]), max_size=40))
def test_any_bytes_are_cut_without_an_error_and_the_next_picture_is_found(parts: list[bytes]):
    found = split(b"".join(parts) + bytes(70_000) + PLAIN, [1000], most_bytes=65536)
    assert found[-1] == PLAIN


# --- frames ----------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def piped(data: bytes) -> int:
    """A descriptor to read these bytes from."""
    reading, writing = os.pipe()
    assert len(data) <= 65536
    os.write(writing, data)
    os.close(writing)
    return reading


def as_read(data: bytes, folder: Path) -> np.ndarray:
    """A picture as a folder of pictures gives it."""
    path = folder / "picture.jpg"
    path.write_bytes(data)
    return read_picture(path, size=(SIZE.height, SIZE.width), channels=SIZE.channels)


def test_a_frame_is_there_before_the_next_one_begins(pipe: tuple[int, int], tmp_path: Path):
    reading, writing = pipe
    frames = mjpeg_frames(reading, "camera", SIZE)
    for number, data in enumerate((PLAIN, OTHER, PLAIN)):
        os.write(writing, data)
        # Nothing more is written until it has come: a source that reads ahead would wait for ever.
        name, pixels = next(frames)
        assert name == f"camera#{number}"
        np.testing.assert_array_equal(pixels, as_read(data, tmp_path), strict=True)
    os.close(writing)
    assert list(frames) == []


def test_broken_pictures_are_lines_in_the_log_and_counted(caplog: pytest.LogCaptureFixture):
    no_picture, place = b"\xff\xd8\xff\xd9", len(PLAIN) - 20 + 1
    frames = list(mjpeg_frames(piped(PLAIN + no_picture + PLAIN[:-20] + OTHER + PLAIN[:100]), "camera", SIZE))
    assert [frame.name for frame in frames] == ["camera#0", "camera#3"]
    assert [record.getMessage() for record in caplog.records] == [
        "camera: picture 1 is passed over: 4 B that are no JPEG picture",
        f"camera: picture 2 is passed over: another picture begins at byte {place}, before its end ({place} B)",
        "camera: picture 4 is passed over: the stream ended in the middle of a picture (100 B)",
        "camera: 3 of 5 pictures were passed over",
    ]
    assert all(record.name == "coinfer.live" and record.levelno == logging.WARNING for record in caplog.records)


def test_a_picture_of_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(live, "MOST_PIXELS", 479)
    assert list(mjpeg_frames(piped(PLAIN), "camera", SIZE)) == []
    assert "at most 479 pixels, got 24 x 20" in caplog.text


def test_raw_frames_are_the_bytes_that_came(pipe: tuple[int, int], caplog: pytest.LogCaptureFixture):
    reading, writing = pipe
    frames = raw_frames(reading, "stdin:raw", TensorSpec(name="input", shape=PICTURE, dtype="uint8"))
    wanted = pictures(3)
    for number, pixels in enumerate(wanted):
        # In pieces, as a pipe may give them.
        os.write(writing, pixels.tobytes()[:50])
        os.write(writing, pixels.tobytes()[50:])
        name, got = next(frames)
        assert name == f"stdin:raw#{number}"
        np.testing.assert_array_equal(got, pixels, strict=True)
    os.write(writing, bytes(7))
    os.close(writing)
    assert list(frames) == []
    assert caplog.messages == ["stdin:raw: frames have 192 B, the last one has 7 B"]


def test_raw_frames_of_floats_are_little_endian():
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    (frame,) = raw_frames(piped(values.tobytes()), "raw", TensorSpec(name="x", shape=(2, 3)))
    np.testing.assert_array_equal(frame.pixels, values.astype(np.float32), strict=True)


def test_paths_are_read_line_by_line(pipe: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    reading, writing = pipe
    first, second = tmp_path / "é 1.jpg", tmp_path / "2.jpg"
    first.write_bytes(PLAIN)
    second.write_bytes(OTHER)
    frames = path_frames(reading, "stdin:paths", SIZE)
    for path, data in ((first, PLAIN), (second, OTHER)):
        os.write(writing, f"{path}\r\n\n".encode())
        name, pixels = next(frames)
        assert name == str(path)
        np.testing.assert_array_equal(pixels, as_read(data, tmp_path))
    gone = tmp_path / "gone.jpg"
    os.write(writing, f"{gone}\n{'x' * 10_000}\n{first}".encode())
    os.close(writing)
    assert [frame.name for frame in frames] == [str(first)]
    missing, long = caplog.messages
    assert str(gone) in missing and missing.startswith("stdin:paths: passed over: ")
    assert long == "stdin:paths: passed over: a path has at most 4096 B"


# --- a folder that fills -----------------------------------------------------------------------------


class Watched:
    """A watched folder in which something happens each time that its watcher sleeps."""

    def __init__(self, folder: Path, *, poll_s: float = HOUR_S) -> None:
        self.folder = folder
        self._events: list[Callable[[], object]] = []
        self.frames = watched_frames(folder, SIZE, poll_s=poll_s, wait=self._sleep)

    def _sleep(self, seconds: float) -> None:
        if not self._events:
            raise KeyboardInterrupt
        self._events.pop(0)()

    def names(self, *events: Callable[[], object]) -> list[str]:
        """What is given until all of these have happened, one a look."""
        self._events = list(events)
        found = []
        with pytest.raises(KeyboardInterrupt):
            for frame in self.frames:
                assert frame.pixels.shape == (8, 8, 3)
                found.append(Path(frame.name).relative_to(self.folder).as_posix())
        return found

    def put(self, name: str, data: bytes = PLAIN, *, is_old: bool = False) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        if is_old:
            os.utime(path, (1, 1))


def nothing() -> None:
    """Nobody does anything."""


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_what_is_there_comes_first_in_the_order_of_its_paths(watched: Watched):
    for name in ("b/2.jpg", "c.jpg", "b/1.png", "a.jpg"):
        watched.put(name, is_old=True)
    watched.put("text.txt")
    watched.put(".hidden.jpg", is_old=True)
    watched.put(".cache/x.jpg", is_old=True)
    assert watched.names(nothing, nothing) == ["a.jpg", "b/1.png", "b/2.jpg", "c.jpg"]


def test_a_new_picture_comes_once_it_stays_as_it_is(watched: Watched):
    half, whole = (lambda: watched.put("x.jpg", PLAIN[:100])), (lambda: watched.put("x.jpg"))
    assert watched.names(half, whole) == []


def test_a_new_picture_comes_with_the_look_after_its_last_change(watched: Watched, caplog: pytest.LogCaptureFixture):
    half, whole = (lambda: watched.put("x.jpg", PLAIN[:100])), (lambda: watched.put("x.jpg"))
    assert watched.names(half, whole, nothing, nothing, nothing) == ["x.jpg"]
    assert caplog.messages == []


def test_a_picture_that_is_renamed_when_it_is_whole_comes(watched: Watched):
    def rename() -> None:
        (watched.folder / "x.part").rename(watched.folder / "x.jpg")

    assert watched.names(lambda: watched.put("x.part", is_old=True), nothing, rename, nothing) == ["x.jpg"]


def test_new_pictures_come_in_the_order_of_their_times(watched: Watched):
    def put_all() -> None:
        for time_s, name in enumerate(("c.jpg", "a.jpg", "b.jpg")):
            watched.put(name)
            os.utime(watched.folder / name, (time_s + 1, time_s + 1))

    assert watched.names(put_all, nothing) == ["c.jpg", "a.jpg", "b.jpg"]


def test_a_file_that_is_written_anew_is_a_new_picture(watched: Watched):
    watched.put("still.jpg", is_old=True)
    names = watched.names(nothing, lambda: watched.put("still.jpg", OTHER), nothing, nothing)
    assert names == ["still.jpg", "still.jpg"]


def test_what_is_no_picture_is_a_line_in_the_log(watched: Watched, caplog: pytest.LogCaptureFixture):
    watched.put("a.jpg", b"no picture", is_old=True)
    watched.put("b.jpg", is_old=True)
    assert watched.names(nothing, nothing) == ["b.jpg"]
    (line,) = caplog.messages
    assert line == f"watch:{watched.folder}: passed over: {watched.folder}/a.jpg is not a picture of a known format"


def test_files_that_are_gone_are_forgotten(watched: Watched):
    watched.put("a.jpg", is_old=True)
    again = lambda: watched.put("a.jpg", is_old=True)  # noqa: E731
    assert watched.names(lambda: (watched.folder / "a.jpg").unlink(), nothing, again, nothing) == ["a.jpg", "a.jpg"]


def test_a_folder_that_is_not_there_is_said_at_once(tmp_path: Path):
    with pytest.raises(DataError, match="there is no folder .*/none"):
        watched_frames(tmp_path / "none", SIZE)


# --- by name ---------------------------------------------------------------------------------------


def test_sources_by_name_give_requests_with_classes_where_folders_have_their_names(tiny_bundle: Bundle, tmp_path: Path):
    (tmp_path / "b").mkdir()
    path = tmp_path / "b" / "1.jpg"
    path.write_bytes(PLAIN)
    os.utime(path, (1, 1))
    (request,) = requests(f"watch:{tmp_path}", tiny_bundle, limit=1, data_dir=None)
    assert isinstance(request, Request) and (request.name, request.label) == (str(path), 1)
    np.testing.assert_array_equal(request.pixels, as_read(PLAIN, tmp_path))
    stream = tmp_path / "camera.mjpeg"
    stream.write_bytes(PLAIN + OTHER)
    found = list(requests(f"mjpeg:{stream}", tiny_bundle, limit=None, data_dir=None))
    assert [(request.name, request.label) for request in found] == [(f"mjpeg:{stream}#{n}", None) for n in (0, 1)]


def test_a_limit_takes_no_frame_too_many(tiny_bundle: Bundle, tmp_path: Path):
    fifo = tmp_path / "camera"
    os.mkfifo(fifo)
    # Neither end waits for the other one to open it.
    held = os.open(fifo, os.O_RDWR)
    try:
        os.write(held, PLAIN)
        assert len(list(requests(f"mjpeg:{fifo}", tiny_bundle, limit=1, data_dir=None))) == 1
    finally:
        os.close(held)


@pytest.mark.parametrize("source", ["stdin:jpeg", "mjpeg:", "watch:", "stdin:"])
def test_an_unknown_live_source_names_those_that_are_known(tiny_bundle: Bundle, source: str):
    with pytest.raises(DataError, match=f'{", ".join(LIVE)}, got "{source}"'):
        requests(source, tiny_bundle, limit=None, data_dir=None)


def test_a_stream_that_is_no_file_is_said_at_once(tiny_bundle: Bundle, tmp_path: Path):
    with pytest.raises(DataError, match="there is no file .*/none"):
        requests(f"mjpeg:{tmp_path}/none", tiny_bundle, limit=None, data_dir=None)
    with pytest.raises(DataError, match="this is a folder: "):
        requests(f"mjpeg:{tmp_path}", tiny_bundle, limit=None, data_dir=None)


# --- a process -------------------------------------------------------------------------------------


def interruptible() -> None:
    """What a shell starts in the background inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def running(tiny_bundle: Bundle) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts `coinfer run` on plan 0 with a pipe as its input."""
    started = []

    def start(data: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "coinfer.cli", "run", str(tiny_bundle.folder), "--plan", "0", "--data", data]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(  # type: ignore[call-overload]
            [*command, *options], **pipes, bufsize=0, preexec_fn=interruptible
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


STREAMING = ["--stream", "--policy", "drop-oldest"]
both_ways = pytest.mark.parametrize("options", [[], STREAMING], ids=["one by one", "a stream"])


@both_ways
@pytest.mark.parametrize("source", ["stdin:mjpeg", "stdin:raw"])
def test_an_answer_is_written_while_the_stream_goes_on(
    running: Callable[..., subprocess.Popen[bytes]], source: str, options: list[str]
):
    process = running(source, *options)
    assert process.stdin is not None and process.stdout is not None
    for number in range(2):
        process.stdin.write(PLAIN if source == "stdin:mjpeg" else bytes(192))
        # The process still has its input open: only a frame that is handled at once is answered now.
        assert json.loads(process.stdout.readline())["input"] == f"{source}#{number}"
    process.stdin.close()
    assert process.wait(30) == 0


@both_ways
def test_a_polite_kill_ends_a_process_that_waits_for_a_frame(
    running: Callable[..., subprocess.Popen[bytes]], options: list[str]
):
    process = running("stdin:mjpeg", *options)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(PLAIN + OTHER[:100])
    assert json.loads(process.stdout.readline())["input"] == "stdin:mjpeg#0"
    assert_ends_politely(process)


def test_a_rest_that_is_there_when_a_process_is_told_to_end_is_no_picture(
    running: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
):
    (tmp_path / "1").write_bytes(PLAIN)
    (tmp_path / "10").write_bytes(PLAIN)
    process = running("stdin:paths")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{tmp_path}/10\n{tmp_path}/1".encode())
    assert json.loads(process.stdout.readline())["input"] == f"{tmp_path}/10"
    # What would have been another "10" is not taken for "1".
    assert_ends_politely(process)
    assert process.stdout.read() == b""


def test_no_answer_is_an_object_too(running: Callable[..., subprocess.Popen[bytes]]):
    process = running("stdin:mjpeg", "--json")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    found = json.loads(process.stdout.read())
    assert process.wait(30) == 0 and found["answers"] == []
    assert found["summary"]["requests"] == 0 and found["summary"]["latency_p50_s"] is None


def test_a_stop_ends_what_waits_and_lets_time_pass_otherwise():
    with Stop() as stop:
        assert not stop.wait(0.0) and not stop.wait(-1.0) and not stop.wait(0.0025)
        stop.set()
        stop.set()
        assert stop.is_set and stop.wait(1e9)


def assert_ends_politely(process: subprocess.Popen[bytes]) -> None:
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    said = process.stderr.read().decode()
    assert "told to end" in said and "Traceback" not in said and "Fatal" not in said


@both_ways
def test_a_device_with_an_edge_ends_as_politely(
    running: Callable[..., subprocess.Popen[bytes]], tiny_bundle: Bundle, options: list[str]
):
    with EdgeProcess(tiny_bundle.folder) as edge:
        process = running("stdin:mjpeg", "--plan", "auto", "--edge", edge.url, *options)
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(PLAIN + OTHER[:100])
        assert json.loads(process.stdout.readline())["input"] == "stdin:mjpeg#0"
        assert_ends_politely(process)


def test_what_is_under_way_is_answered_before_a_process_ends(running: Callable[..., subprocess.Popen[bytes]]):
    # A request takes a second or more: the second one waits for its turn long before the first has its answer.
    process = running("stdin:mjpeg", *STREAMING, "--slowdown", "50000")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(PLAIN + OTHER)
    assert json.loads(process.stdout.readline())["input"] == "stdin:mjpeg#0"
    assert_ends_politely(process)
    assert [json.loads(line)["input"] for line in process.stdout] == ["stdin:mjpeg#1"]


def test_a_second_signal_ends_what_is_under_way(running: Callable[..., subprocess.Popen[bytes]], tmp_path: Path):
    os.mkfifo(tmp_path / "camera")
    process = running(f"mjpeg:{tmp_path}/camera", "--slowdown", "5000000")
    assert process.stdout is not None and process.stderr is not None
    with (tmp_path / "camera").open("wb", buffering=0) as camera:
        camera.write(PLAIN)
        while fcntl.ioctl(camera, termios.FIONREAD, bytes(4)) != bytes(4):
            time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    # By the signal, where it comes while the interpreter leaves.
    assert process.wait(30) in (1, -signal.SIGINT)
    assert process.stdout.read() == b"" and b"coinfer: interrupted" in process.stderr.read()


def test_a_signal_that_another_thread_was_given_ends_the_waiting():
    hears, says = os.pipe()
    is_through = threading.Event()
    other = threading.Thread(target=is_through.wait)
    # Nobody said a word: the bytes come instead.
    late = threading.Timer(30, os.write, (says, b"late"))
    other.start()
    late.start()
    with Stop() as stop, stopping(stop):
        killer = threading.Timer(0.05, signal.pthread_kill, (other.ident, signal.SIGTERM))
        killer.start()
        assert not stop.allows(hears)
        assert stop.is_set
    late.cancel()
    is_through.set()
    for thread in (killer, late, other):
        thread.join()
    os.close(hears)
    os.close(says)


def test_a_pipe_that_nobody_writes_to_is_waited_for_and_let_go(
    running: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
):
    os.mkfifo(tmp_path / "camera")
    process = running(f"mjpeg:{tmp_path}/camera")
    wait_until_open(process, tmp_path / "camera")
    assert_ends_politely(process)


def wait_until_open(process: subprocess.Popen[bytes], path: Path) -> None:
    """Until a process has opened a file."""
    while process.poll() is None:
        opened = Path(f"/proc/{process.pid}/fd")
        if any(os.path.realpath(entry) == str(path) for entry in opened.iterdir()):
            return
        time.sleep(0.01)
    raise AssertionError("it ended before it opened the file")


def test_a_reader_that_has_enough_ends_the_process(running: Callable[..., subprocess.Popen[bytes]]):
    process = running("stdin:mjpeg")
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(PLAIN)
    assert process.stdout.readline()
    process.stdout.close()
    process.stdin.write(PLAIN)
    assert process.wait(30) == 1
    assert b"Traceback" not in process.stderr.read()


def test_a_broken_picture_of_a_camera_is_a_line_on_stderr(running: Callable[..., subprocess.Popen[bytes]]):
    process = running("stdin:mjpeg")
    out, err = process.communicate(PLAIN + b"\xff\xd8\xff\xd9" + OTHER, timeout=60)
    assert [json.loads(line)["input"] for line in out.splitlines()] == ["stdin:mjpeg#0", "stdin:mjpeg#2"]
    assert b"stdin:mjpeg: picture 1 is passed over: 4 B that are no JPEG picture" in err
    assert process.returncode == 0
