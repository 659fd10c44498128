"""Exits at run time: who answers, what crosses, and that an exit waits for nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from memory_channel import Behaviour, MemoryChannel, answer

from coinfer.bundle import Bundle
from coinfer.engine.segments import Segments
from coinfer.engine.sides import run_side
from coinfer.protocol import Durations, EdgeConnection, Limits, Reply, Request, Terms
from coinfer.protocol.ends import DeviceConnection
from coinfer.runtime import device as device_module
from coinfer.runtime.device import Device
from tiny_bundle import (
    DEVICE_EXIT,
    DEVICE_EXIT_TOP,
    SPLIT_AT_EXIT,
    SPLIT_EXIT,
    UPLOAD_EXIT_TOP,
    UPLOAD_EXITS,
    pictures,
)

Connect = Callable[..., tuple[Device, MemoryChannel]]
COUNT = 24


@pytest.fixture
def connect(exit_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Connect:
    def connect(behaviour: Behaviour = answer, **options: object) -> tuple[Device, MemoryChannel]:
        made: list[MemoryChannel] = []

        def channel(url: str, terms: Terms, *, timeout_s: float, **link: object) -> MemoryChannel:
            made.append(MemoryChannel(terms, behaviour))
            return made[-1]

        monkeypatch.setattr(device_module, "Channel", channel)
        return Device(exit_bundle, edge="ws://memory", **options), made[0]

    return connect


def exits_here(bundle: Bundle, number: int) -> list[int | None]:
    """Which exit of the device answers each of the pictures, by hand."""
    segments = Segments(bundle.path, bundle.manifest.outputs)
    return [run_side(bundle.plan(number), "device", segments, (x[None],)).exit for x in pictures(COUNT)]


def test_a_device_plan_answers_at_its_exit_or_its_end(exit_bundle: Bundle) -> None:
    segments, plan = Segments(exit_bundle.path, exit_bundle.manifest.outputs), exit_bundle.plan(DEVICE_EXIT)
    with Device(exit_bundle, plan=DEVICE_EXIT) as device:
        for picture in pictures(COUNT):
            want = run_side(plan, "device", segments, (picture[None],))
            got = device.infer(picture)
            np.testing.assert_array_equal(got.outputs[0], want.values[0])
            assert (got.outcome.exit, got.answered) == (want.exit, "device" if want.exit is None else "exit")
            stages = ["head", "exit"] if want.exit == 0 else ["head", "exit", "head"]
            assert [span.stage for span in got.spans] == stages
    assert {o.answered for o in device.timeline.outcomes} == {"device", "exit"}


def test_the_best_classes_of_an_exit_are_what_the_edge_would_send(exit_bundle: Bundle) -> None:
    device = Device(exit_bundle, plan=DEVICE_EXIT_TOP)
    for picture in pictures(COUNT):
        whole, best = device.infer(picture, plan=DEVICE_EXIT), device.infer(picture)
        logits = whole.outputs[0][0].astype(np.float64)
        assert best.classes is not None and best.classes.tolist() == np.argsort(-logits, kind="stable")[:2].tolist()


@pytest.mark.parametrize("plan", [SPLIT_EXIT, SPLIT_AT_EXIT])
def test_what_an_exit_answers_does_not_cross(exit_bundle: Bundle, connect: Connect, plan: int) -> None:
    device, channel = connect(plan=plan)
    places = exits_here(exit_bundle, plan)
    assert set(places) == {0, None}
    answers = [device.infer(x) for x in pictures(COUNT)]
    assert [a.answered for a in answers] == ["exit" if place == 0 else "edge" for place in places]
    assert len(channel.requests) == places.count(None)
    assert all(a.outcome.payload_bytes == a.outcome.wire_bytes == 0 for a in answers if a.answered == "exit")
    assert all("encode" not in [s.stage for s in a.spans] for a in answers if a.answered == "exit")
    # The same as a stream, in order.
    streamed = list(device.stream(pictures(COUNT)))
    assert [a.answered for a in streamed] == [a.answered for a in answers]
    assert [a.request for a in streamed] == list(range(COUNT, 2 * COUNT))


def test_exits_overtake_what_waits_for_the_edge(exit_bundle: Bundle, connect: Connect) -> None:
    places, held = exits_here(exit_bundle, SPLIT_EXIT), []

    def hold(channel: MemoryChannel, request: Request) -> None:
        held.append(request)
        if len(held) == places.count(None):
            for waiting in held:
                channel.reply(waiting)

    device, _ = connect(hold, plan=SPLIT_EXIT)
    got = [(a.request, a.answered) for a in device.stream(pictures(COUNT), window=COUNT, is_ordered=False)]
    assert sorted(request for request, _ in got) == list(range(COUNT))
    # The edge answers nothing before it has everything, so all exits before its last request come first.
    last = max(k for k, place in enumerate(places) if place is None)
    early = [k for k, place in enumerate(places) if place == 0 and k < last]
    assert [request for request, _ in got[: len(early)]] == early
    assert {answered for _, answered in got[: len(early)]} == {"exit"}


def test_an_edge_says_which_of_its_exits_answered(exit_bundle: Bundle) -> None:
    terms = Terms.of(exit_bundle)
    device, edge = DeviceConnection(terms), EdgeConnection(terms, Limits(max_message_bytes=100_000, in_flight=9))
    edge.receive(device.hello())
    device.receive(edge.welcome())
    segments = Segments(exit_bundle.path, exit_bundle.manifest.outputs)
    seen = set()
    for number, picture in enumerate(pictures(COUNT)):
        for plan in (exit_bundle.plan(UPLOAD_EXITS), exit_bundle.plan(UPLOAD_EXIT_TOP)):
            request = 2 * number + (plan.top is not None)
            payload = segments.codec(plan).encode((picture[None],))
            assert isinstance(edge.receive(device.request(request, plan.number, payload)), Request)
            found = run_side(plan, "edge", segments, (picture[None],))
            event = device.receive(edge.reply(request, Durations(1, 2, 3), found.values, exit=found.exit))
            assert isinstance(event, Reply) and event.exit == found.exit
            seen.add((plan.number, event.exit))
            if plan.top is None:
                np.testing.assert_array_equal(event.result.outputs[0], found.values[0])
            else:
                assert event.result.classes is not None and event.result.classes[0] == found.values[0].argmax()
    assert seen == {(UPLOAD_EXITS, k) for k in (None, 0, 1)} | {(UPLOAD_EXIT_TOP, k) for k in (None, 0)}


# --- streams that drop, and deadlines --------------------------------------------------------------


class Camera:
    """A live source that gives a picture whenever the test says so, and says when it has been read so far."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.read = threading.Semaphore(0)
        self.is_over = False

    def __iter__(self) -> Iterator[np.ndarray]:
        for picture in pictures(100):
            self.read.release()
            self.go.acquire()
            if self.is_over:
                return
            yield picture

    def give(self, count: int) -> None:
        """Give so many pictures; returns when they have been taken."""
        for _ in range(count):
            self.read.acquire()
            self.go.release()
        self.read.acquire()
        self.read.release()

    def end(self) -> None:
        self.is_over = True
        self.go.release()


@pytest.mark.parametrize(
    ("policy", "queue", "kept"),
    [("drop-oldest", 1, [0, 9]), ("drop-newest", 1, [0, 1]), ("drop-oldest", 3, [0, 7, 8, 9])],
)
def test_a_stream_drops_by_its_policy(connect: Connect, policy: str, queue: int, kept: list[int]) -> None:
    camera, first_is_there, is_full = Camera(), threading.Event(), threading.Event()

    def slow_edge(channel: MemoryChannel, request: Request) -> None:
        first_is_there.set()
        is_full.wait()
        channel.reply(request)

    def source() -> None:
        camera.give(1)
        first_is_there.wait()
        camera.give(9)
        is_full.set()
        camera.end()

    device, channel = connect(slow_edge, plan=1)
    thread = threading.Thread(target=source)
    thread.start()
    got = list(device.stream(camera, window=1, policy=policy, queue=queue))
    thread.join()
    assert [a.request for a in got] == list(range(10))
    assert [a.request for a in got if a.answered == "edge"] == kept == [r.request for r in channel.requests]
    assert {a.answered for a in got if a.request not in kept} == {"dropped"}
    assert len(device.timeline.outcomes) == 10
    assert not any(a.is_answered for a in got if a.answered == "dropped")


def test_a_late_request_is_told_once_and_its_answer_is_not(connect: Connect) -> None:
    held: list[Request] = []

    def late_second(channel: MemoryChannel, request: Request) -> None:
        if request.request == 1:
            held.append(request)
            return
        channel.reply(request)
        if held:
            # The others have gone; now what was late comes after all.
            channel.reply(held.pop())

    gate = threading.Event()

    def xs() -> Iterator[np.ndarray]:
        yield from pictures(2)
        gate.wait()
        yield from pictures(3)

    device, channel = connect(late_second, plan=1)
    got = []
    for a in device.stream(xs(), window=8, deadline_s=0.05):
        got.append((a.request, a.answered))
        if a.answered == "late":
            gate.set()
    assert got == [(0, "edge"), (1, "late"), (2, "edge"), (3, "edge"), (4, "edge")]
    assert [o.request for o in device.timeline.outcomes] == [0, 1, 2, 3, 4]
    assert device.infer(pictures(1)[0]).answered == "edge"


def test_requests_behind_a_silent_edge_are_late_one_by_one(connect: Connect) -> None:
    device, channel = connect(lambda channel, request: None, plan=1)
    got = [(a.request, a.answered) for a in device.stream(pictures(3), window=3, deadline_s=0.02)]
    assert got == [(0, "late"), (1, "late"), (2, "late")]
    # What is left on the link would answer the next request: the link is cut.
    assert channel.is_aborted


def test_a_device_plan_can_drop_and_be_late(exit_bundle: Bundle) -> None:
    device = Device(exit_bundle, plan=DEVICE_EXIT)
    got = list(device.stream(pictures(30), policy="drop-newest", deadline_s=1e-9))
    assert [a.request for a in got] == list(range(30))
    assert {a.answered for a in got} <= {"late", "dropped"} and "late" in {a.answered for a in got}
    unhurried = list(device.stream(pictures(5), deadline_s=60.0))
    assert {a.answered for a in unhurried} <= {"device", "exit"} and len(unhurried) == 5
