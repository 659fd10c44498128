"""Streams over a link in memory: order, bounds, and every way to end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from memory_channel import Behaviour, MemoryChannel, answer, logits_of

from coinfer.bundle import Bundle
from coinfer.errors import DataError, LinkError, PlanError, RefusedError
from coinfer.protocol import Request, Terms
from coinfer.runtime import device as device_module
from coinfer.runtime.device import Device
from tiny_bundle import SPLIT32, UPLOAD, pictures

Open = Callable[..., tuple[Device, list[MemoryChannel]]]


@pytest.fixture
def connect(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Open:
    def connect(behaviour: Behaviour = answer, plan: int = UPLOAD) -> tuple[Device, list[MemoryChannel]]:
        made: list[MemoryChannel] = []

        def channel(url: str, terms: Terms, *, timeout_s: float, **link: object) -> MemoryChannel:
            made.append(MemoryChannel(terms, behaviour))
            return made[-1]

        monkeypatch.setattr(device_module, "Channel", channel)
        return Device(tiny_bundle, edge="ws://memory", plan=plan), made

    return connect


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("coinfer-")] == []


@pytest.mark.parametrize("plan", [UPLOAD, SPLIT32])
@pytest.mark.parametrize("window", [1, 2, 8, 100])
def test_every_answer_comes_once_and_in_order(connect: Open, plan: int, window: int) -> None:
    device, (channel,) = connect(plan=plan)
    answers = list(device.stream(pictures(30), window=window))
    assert [a.request for a in answers] == list(range(30))
    for a, request in zip(answers, channel.requests, strict=True):
        np.testing.assert_array_equal(a.outputs[0], logits_of(request.payload))
    assert len(device.timeline.outcomes) == 30
    assert not channel.is_aborted


def test_answers_in_another_order_are_put_in_order(connect: Open) -> None:
    held: list[Request] = []

    def backwards_in_fours(channel: MemoryChannel, request: Request) -> None:
        held.append(request)
        if len(held) == 4:
            while held:
                channel.reply(held.pop())

    device, (channel,) = connect(backwards_in_fours)
    answers = list(device.stream(pictures(20), window=4))
    assert [a.request for a in answers] == list(range(20))
    for a, request in zip(answers, channel.requests, strict=True):
        np.testing.assert_array_equal(a.outputs[0], logits_of(request.payload))


@pytest.mark.parametrize("window", [1, 3])
def test_no_more_than_a_window_is_under_way(connect: Open, window: int) -> None:
    device, (channel,) = connect()
    taken, most = 0, 0
    for _ in device.stream(pictures(20), window=window):
        taken += 1
        most = max(most, len(channel.requests) - (taken - 1))
        # One slot is free from the moment an answer is handed over.
        assert len(channel.requests) <= taken + window
    assert taken == 20 and most >= 1


def test_an_empty_stream_ends(connect: Open) -> None:
    device, _ = connect()
    assert list(device.stream([])) == []
    assert device.infer(pictures(1)[0]).answered == "edge"


def test_streams_and_single_requests_take_turns_on_one_link(connect: Open) -> None:
    device, made = connect()
    for _ in range(3):
        assert len(list(device.stream(pictures(3)))) == 3
        device.infer(pictures(1)[0])
    assert len(made) == 1 and [r.request for r in made[0].requests] == list(range(12))


def test_a_request_in_the_middle_of_a_stream_is_refused(connect: Open) -> None:
    device, _ = connect()
    stream = device.stream(pictures(3))
    next(stream)
    with pytest.raises(PlanError, match="in the middle of a stream"):
        device.infer(pictures(1)[0])
    assert len(list(stream)) == 2


def test_an_error_in_the_pictures_comes_behind_all_earlier_answers(connect: Open) -> None:
    def broken_camera() -> Iterator[np.ndarray]:
        yield from pictures(3)
        raise OSError("no camera")

    device, (channel,) = connect()
    got = []
    with pytest.raises(OSError, match="no camera"):
        for a in device.stream(broken_camera()):
            got.append(a.request)
    assert got == [0, 1, 2]
    assert device.infer(pictures(1)[0]).answered == "edge" and not channel.is_aborted


def test_a_picture_of_another_size_comes_behind_all_earlier_answers(connect: Open) -> None:
    device, _ = connect()
    got = []
    with pytest.raises(DataError, match="got uint8"):
        for a in device.stream([*pictures(2), np.zeros((1, 1, 3), np.uint8), *pictures(2)]):
            got.append(a.request)
    assert got == [0, 1]


def test_a_refused_request_is_raised_in_its_place(connect: Open) -> None:
    def fail_third(channel: MemoryChannel, request: Request) -> None:
        channel.fail(request, "unreadable") if request.request == 2 else channel.reply(request)

    device, made = connect(fail_third)
    got = []
    with pytest.raises(RefusedError, match="request 2: unreadable"):
        for a in device.stream(pictures(10)):
            got.append(a.request)
    assert got == [0, 1]
    assert device.infer(pictures(1)[0]).answered == "edge" and len(made) == 2


def test_a_broken_link_ends_the_stream(connect: Open) -> None:
    def break_after_two(channel: MemoryChannel, request: Request) -> None:
        channel.reply(request) if request.request < 2 else channel.break_down()

    device, made = connect(break_after_two)
    got = []
    with pytest.raises(LinkError, match="cut by the test|aborted"):
        for a in device.stream(pictures(10)):
            got.append(a.request)
    assert got == [0, 1] and made[0].is_aborted


def test_closing_a_stream_early_ends_its_threads(connect: Open) -> None:
    device, made = connect()

    def forever() -> Iterator[np.ndarray]:
        while True:
            yield pictures(1)[0]

    stream: Any = device.stream(forever())
    assert next(stream).request == 0
    stream.close()
    assert made[0].is_aborted
    assert device.infer(pictures(1)[0]).answered == "edge" and len(made) == 2


def test_a_stream_that_waits_for_a_silent_edge_can_be_cut(connect: Open) -> None:
    device, made = connect(lambda channel, request: None)
    asked = threading.Event()

    def cut() -> None:
        asked.wait()
        made[0].abort()

    def xs() -> Iterator[np.ndarray]:
        yield from pictures(2)
        asked.set()

    cutter = threading.Thread(target=cut)
    cutter.start()
    with pytest.raises(LinkError, match="aborted"):
        list(device.stream(xs()))
    cutter.join()


def test_a_stream_never_begun_leaves_nothing(connect: Open) -> None:
    device, (channel,) = connect()
    device.stream(pictures(3))
    assert channel.requests == [] and device.infer(pictures(1)[0]).answered == "edge"
