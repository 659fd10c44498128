"""A device that never loses a request, over links in memory that do everything a link can do."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_channel import Behaviour, MemoryChannel, answer, logits_of

from coinfer.bundle import Bundle
from coinfer.errors import DataError, LinkError, PlanError, RefusedError, UsageError
from coinfer.lab.slow import SlowedDevice
from coinfer.profile import Slowdown
from coinfer.protocol import Request, Terms
from coinfer.runtime.guarded import GuardedDevice
from coinfer.runtime.keeper import KeepTerms
from coinfer.runtime.request import Answer
from tiny_bundle import DEVICE, SPLIT32, UPLOAD, make_tiny_bundle, pictures

# So that losses are noticed within a tenth of a second, and connections are tried at once.
SOON = KeepTerms(notice_s=0.1, heartbeat_s=0.05, backoff_s=0.001, most_backoff_s=0.005)
Open = Callable[..., tuple[GuardedDevice, list[MemoryChannel]]]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("guarded") / "bundle", has_evidence=True)


@pytest.fixture
def guard(known: Bundle) -> Iterator[Open]:
    """A device whose k-th connection behaves as the k-th of the behaviours says, later ones as the last."""
    made: list[GuardedDevice] = []

    def guard(
        *behaviours: Behaviour | LinkError | UsageError, **options: Any
    ) -> tuple[GuardedDevice, list[MemoryChannel]]:
        channels: list[MemoryChannel] = []
        tries: list[int] = []

        def connect(url: str, terms: Terms, *, timeout_s: float, **link: object) -> MemoryChannel:
            behaviour = behaviours[min(len(tries), len(behaviours) - 1)]
            tries.append(len(tries))
            if isinstance(behaviour, LinkError | UsageError):
                raise behaviour
            channels.append(MemoryChannel(terms, behaviour))
            return channels[-1]

        given = {"plan": UPLOAD, "keep": SOON, "seed": 0, "hedge": inf, **options}
        made.append(GuardedDevice(known, edge="ws://memory", connect=connect, **given))
        return made[-1], channels

    yield guard
    for device in made:
        device.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("coinfer-")] == []


def silent(channel: MemoryChannel, request: Request) -> None:
    """Takes a request and says nothing, not even to heartbeats."""
    channel.is_deaf = True


def breaks(channel: MemoryChannel, request: Request) -> None:
    channel.break_down()


def fails(channel: MemoryChannel, request: Request) -> None:
    channel.fail(request, "no")


def busy(channel: MemoryChannel, request: Request) -> None:
    channel.refuse(request, 0.2)


def want(device: GuardedDevice, xs: np.ndarray) -> list[np.ndarray]:
    """What the network on the device gives."""
    return [device.device.infer(x, plan=DEVICE).outputs[0] for x in xs]


def check_own(answers: list[Answer], wanted: list[np.ndarray]) -> None:
    for got, outputs in zip(answers, wanted, strict=True):
        np.testing.assert_array_equal(got.outputs[0], outputs)


def test_a_link_that_works_answers_everything(guard: Open) -> None:
    device, (channel,) = guard(answer)
    answers = list(device.stream(pictures(30), window=4))
    assert [a.answered for a in answers] == ["edge"] * 30
    assert [a.request for a in answers] == list(range(30))
    for a, request in zip(answers, channel.requests, strict=True):
        np.testing.assert_array_equal(a.outputs[0], logits_of(request.payload))
    assert device.infer(pictures(1)[0]).answered == "edge"
    assert [d.reason for d in device.timeline.decisions] == ["the plan that was asked for"]


@pytest.mark.parametrize("fault", [silent, breaks, fails, busy])
@pytest.mark.parametrize("plan", [UPLOAD, SPLIT32])
def test_what_the_edge_does_not_answer_the_device_does(guard: Open, fault: Behaviour, plan: int) -> None:
    xs = pictures(12)
    device, _ = guard(fault, plan=plan)
    wanted = want(device, xs)
    answers = list(device.stream(xs, window=3))
    assert {a.answered for a in answers} == {"fallback"}
    assert [a.outcome.plan for a in answers] == [DEVICE] * 12
    check_own(answers, wanted)
    numbers = [a.request for a in answers]
    assert numbers == sorted(set(numbers)) and len(numbers) == 12


@pytest.mark.parametrize("fault", [silent, breaks, fails, busy])
def test_a_single_request_falls_back_too(guard: Open, fault: Behaviour) -> None:
    device, _ = guard(fault)
    (wanted,) = want(device, pictures(1))
    got = device.infer(pictures(1)[0])
    assert got.answered == "fallback"
    np.testing.assert_array_equal(got.outputs[0], wanted)
    assert len([o for o in device.timeline.outcomes if o.request == got.request]) == 1


def test_a_rehearsal_teaches_the_devices_own_times_and_asks_the_edge_nothing(guard: Open) -> None:
    device, channels = guard(answer, plan=None, pace=SlowedDevice(Slowdown(fp32=20.0, int8=20.0)))
    plans = {plan.number for plan in device.pilot.plans()}
    tries: list[int] = []
    taught: list[Mapping[int, float]] = []
    took_s = iter([*[0.5] * len(plans), *[0.2] * len(plans)])
    device.device.own_s = lambda x, plan: (tries.append(plan.number), next(took_s))[1]  # type: ignore[method-assign]
    device.pilot.rehearsed = taught.append  # type: ignore[method-assign]
    device.rehearse()
    # A pause in one of two rounds is not taken for the plan's time.
    assert taught == [dict.fromkeys(plans, 0.2)] and sorted(tries) == sorted([*plans, *plans])
    assert channels[0].requests == []
    device.rehearse(most_s=0.0)
    assert len(taught) == 1
    with pytest.raises(DataError, match="uint8"):
        GuardedDevice.rehearse(guard(answer, plan=None)[0], np.zeros((2, 2), np.float32))


def test_a_rehearsal_is_not_for_the_middle_of_a_stream(guard: Open) -> None:
    device, _ = guard(answer, plan=None)
    stream = device.stream(pictures(3))
    next(stream)
    with pytest.raises(PlanError, match="in the middle of a stream"):
        device.rehearse()
    stream.close()


def test_the_map_after_a_rehearsal_has_the_times_of_all_plans(guard: Open) -> None:
    device, _ = guard(answer, plan=None, pace=SlowedDevice(Slowdown(fp32=20.0, int8=20.0)))
    book = device.pilot._book
    device.rehearse()
    said_s = {plan.number: device.pilot._book.line(plan.number).device_s for plan in device.pilot.plans()}
    assert device.pilot._book is not book
    # What was measured stands for what the evidence said.
    assert all(0 < seconds != book.line(number).device_s for number, seconds in said_s.items())


def test_the_link_comes_back_by_itself(guard: Open) -> None:
    device, channels = guard(breaks, LinkError("nobody there"), RefusedError("another bundle"), answer)
    assert device.infer(pictures(1)[0]).answered == "fallback"
    assert device.keeper.wait_up(10)
    deadline = time.monotonic() + 10
    while device.infer(pictures(1)[0]).answered != "edge":
        assert time.monotonic() < deadline
    assert len(channels) == 2 and channels[0].is_aborted and not channels[1].is_aborted
    assert device.keeper.num_lost == 1


def test_without_anybody_there_every_request_is_answered(guard: Open) -> None:
    device, channels = guard(LinkError("no edge at ws://memory: connection refused"))
    answers = list(device.stream(pictures(10)))
    assert {a.answered for a in answers} == {"fallback"} and not channels
    assert "connection refused" in device.decisions[-1].reason


def test_a_link_that_died_while_idle_is_noticed_by_its_heartbeat(guard: Open) -> None:
    device, channels = guard(answer)
    device.infer(pictures(1)[0])
    channels[0].is_deaf = True
    deadline = time.monotonic() + 10
    while not channels[0].is_aborted:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_that_never_come_back_are_not_waited_for_although_others_do(guard: Open) -> None:
    def every_third_is_lost(channel: MemoryChannel, request: Request) -> None:
        if request.request % 3:
            channel.reply(request)

    device, _ = guard(every_third_is_lost)
    answers = list(device.stream(pictures(12), window=4))
    assert [a.request for a in answers] == list(range(12))
    assert all(answers[k].answered == "fallback" for k in range(0, 12, 3))


def test_a_message_too_large_for_the_edge_is_the_devices(guard: Open) -> None:
    device, channels = guard(answer)

    def too_large(*given: Any) -> Any:
        raise LinkError("the edge takes messages up to 10 B, got 20 B")

    channels[0].frame = too_large  # type: ignore[method-assign]
    assert device.infer(pictures(1)[0]).answered == "fallback"


@pytest.mark.parametrize("policy", ["block", "drop-newest"])
def test_what_the_link_is_slow_with_the_device_computes_as_well(guard: Open, policy: str) -> None:
    held: list[tuple[MemoryChannel, Request]] = []

    def slow(channel: MemoryChannel, request: Request) -> None:
        held.append((channel, request))

    device, channels = guard(slow, hedge=0.0, keep=KeepTerms(notice_s=30.0))
    xs = pictures(6)
    wanted = want(device, xs)
    answers = list(device.stream(xs, window=8, policy=policy, queue=10))  # type: ignore[arg-type]
    assert [a.answered for a in answers] == ["fallback"] * 6 and not channels[0].is_aborted
    check_own(answers, wanted)
    # Too late: each has its answer already.
    for channel, request in held:
        channel.reply(request)
    outcomes = Counter(outcome.request for outcome in device.timeline.outcomes)
    assert all(outcomes[a.request] == 1 for a in answers) and device.keeper.num_lost == 0
    (alone,) = want(device, pictures(1))
    np.testing.assert_array_equal(device.infer(pictures(1)[0]).outputs[0], alone)


@pytest.mark.parametrize("fate", ["answered", "lost", "refused"])
def test_whichever_answer_is_first_is_the_one(known: Bundle, fate: str) -> None:
    """The order of both sides' ends, one by one, without threads."""
    from coinfer.runtime.guarded_stream import GuardedIntake
    from coinfer.runtime.request import Handed
    from coinfer.runtime.stream import StreamTerms

    now_s = [0.0]
    intake = GuardedIntake(StreamTerms(window=2), lambda: now_s[0])
    handed = Handed(7, pictures(1)[0], 0.0)
    assert intake.take_slot()
    intake.put_held(handed)
    assert intake.take() is handed and not intake.is_own(7)
    intake.put_out(handed, 1.0)
    now_s[0] = 1.5
    # It is slow: the device has it as well.
    assert intake.take() is handed and intake.is_own(7)
    if fate == "answered":
        first, second = intake.ended(handed, None), intake.ended(handed, None)
        # The first gives the slot back, the second is told to nobody.
        assert (first.held_slot, first.is_last) == (True, False)
        assert (second.held_slot, second.is_last) == (False, True)
    else:
        # The link will not answer: the device's answer is the only one, and is not computed twice.
        assert intake.again(handed) is None and not intake.is_own(7)
        only = intake.ended(handed, None)
        assert (only.held_slot, only.is_last) == (True, True)
    # The other way round: the device was first, then the link was lost.
    intake.put_out(handed, 2.0)
    now_s[0] = 2.5
    assert intake.take() is handed
    assert not intake.ended(handed, None).is_last
    rid = intake.again(handed)
    assert rid is not None and rid.is_last and not rid.held_slot and rid.ended is None


def test_the_newest_frame_wins_while_the_link_is_down(guard: Open) -> None:
    device, _ = guard(LinkError("nobody"))
    gate = threading.Event()
    alone = device.device.alone

    def held(*given: Any, **more: Any) -> Any:
        gate.wait()
        return alone(*given, **more)

    device.device.alone = held  # type: ignore[method-assign]
    reached = threading.Event()

    def camera() -> Iterator[np.ndarray]:
        yield from pictures(20)
        reached.set()
        gate.set()

    answers = list(device.stream(camera(), policy="drop-oldest", window=2))
    assert len(answers) == 20 and reached.is_set()
    found = Counter(a.answered for a in answers)
    assert set(found) == {"dropped", "fallback"} and answers[-1].answered == "fallback"


def test_a_deadline_holds_whatever_the_link_does(guard: Open) -> None:
    slow = KeepTerms(notice_s=5.0)
    device, channels = guard(silent, keep=slow)
    answers = list(device.stream(pictures(4), deadline_s=0.05, window=5))
    # Once the link is known to be slow, the device answers what it would not.
    assert {a.answered for a in answers} <= {"late", "fallback"}
    answers.append(device.infer(pictures(1)[0], deadline_s=0.05))
    assert all((a.outcome.latency_s >= 0.05) == (a.answered == "late") for a in answers)


def test_a_stream_that_is_left_early_leaves_the_link(guard: Open) -> None:
    device, channels = guard(answer)
    stream = device.stream(pictures(50), window=4)
    assert next(stream).answered == "edge"
    stream.close()
    assert device.infer(pictures(1)[0]).answered == "edge" and len(channels) == 1


def test_one_thing_at_a_time(guard: Open) -> None:
    device, _ = guard(answer)
    stream = device.stream(pictures(5))
    next(stream)
    with pytest.raises(PlanError, match="in the middle of a stream"):
        device.infer(pictures(1)[0])
    with pytest.raises(PlanError, match="in the middle of a stream"):
        next(device.stream(pictures(1)))
    list(stream)
    with pytest.raises(PlanError, match="window and queue must be at least 1"):
        device.stream(pictures(1), window=0)
    with pytest.raises(PlanError, match="must be one of block, drop-oldest, drop-newest"):
        device.stream(pictures(1), policy="newest")  # type: ignore[arg-type]


def test_an_error_in_a_request_comes_behind_the_answers_before_it(guard: Open) -> None:
    device, _ = guard(answer)
    given = iter([*pictures(3), np.zeros((2, 2, 3), np.uint8), *pictures(1)])
    got: list[Answer] = []
    with pytest.raises(DataError, match="a request must be uint8"):
        for one in device.stream(given, window=2):
            got.append(one)
    assert len(got) == 3
    assert device.infer(pictures(1)[0]).answered == "edge"


@pytest.mark.parametrize("fate", ["lost", "busy", "answered"])
@pytest.mark.parametrize("policy", ["block", "drop-newest"])
def test_a_request_that_fails_does_not_keep_those_on_the_link_from_their_answers(
    guard: Open, fate: str, policy: str
) -> None:
    held: list[Request] = []

    def hold(channel: MemoryChannel, request: Request) -> None:
        held.append(request)

    device, (channel,) = guard(hold, keep=KeepTerms(notice_s=30.0))
    sent = threading.Event()

    def source() -> Iterator[np.ndarray]:
        yield pictures(1)[0]
        yield np.zeros((2, 2, 3), np.uint8)
        # The one that fails has been computed, or soon will be.
        sent.set()
        yield pictures(1)[0]

    def decide() -> None:
        sent.wait()
        while not held:
            time.sleep(0.001)
        if fate == "lost":
            channel.break_down()
        elif fate == "busy":
            channel.refuse(held[0], 0.1)
        else:
            channel.reply(held[0])

    teller = threading.Thread(target=decide)
    teller.start()
    got = []
    with pytest.raises(DataError, match="a request must be uint8"):
        for one in device.stream(source(), window=4, policy=policy, queue=4):  # type: ignore[arg-type]
            got.append(one.answered)
    teller.join()
    assert got == ["edge" if fate == "answered" else "fallback"]


def test_a_file_that_is_being_changed_does_not_end_the_tries(guard: Open) -> None:
    device, channels = guard(breaks, UsageError("the key does not belong to the certificate"), answer)
    assert device.infer(pictures(1)[0]).answered == "fallback"
    deadline = time.monotonic() + 10
    while device.infer(pictures(1)[0]).answered != "edge":
        assert time.monotonic() < deadline
    assert len(channels) == 2


def test_what_no_try_can_mend_is_said_at_once(guard: Open) -> None:
    with pytest.raises(UsageError, match="an edge is ws://"):
        guard(UsageError("an edge is ws://HOST:PORT"))


def test_a_heartbeat_for_a_lost_connection_is_not_waited_for(guard: Open) -> None:
    device, channels = guard(breaks, answer)
    old = channels[0]
    assert device.infer(pictures(1)[0]).answered == "fallback"
    assert device.keeper.wait_up(10)
    while device.keeper.channel is old or device.keeper.channel is None:
        time.sleep(0.001)
    device.keeper._beat(old, 0)  # type: ignore[arg-type]
    assert not any(beat.channel is old for beat in device.keeper._beats.values())
    assert device.infer(pictures(1)[0]).answered == "edge"


def test_a_plan_that_the_edge_does_not_take_is_left_out_until_the_link_is_another(guard: Open) -> None:
    device, channels = guard(answer)
    frames: list[int] = []

    def too_large(*given: Any) -> Any:
        frames.append(1)
        raise LinkError("the edge takes messages up to 10 B, got 20 B")

    channels[0].frame = too_large  # type: ignore[method-assign]
    assert [a.answered for a in device.stream(pictures(5))] == ["fallback"] * 5
    assert len(frames) == 1
    channels[0].break_down()
    deadline = time.monotonic() + 10
    while device.infer(pictures(1)[0]).answered != "edge":
        assert time.monotonic() < deadline


def test_decisions_are_kept_once_each(guard: Open) -> None:
    device, _ = guard(breaks, answer, LinkError("nobody"))
    for k in range(6):
        device.infer(pictures(1)[0])
        if k % 2:
            list(device.stream(pictures(3)))
    assert device.timeline.decisions == list(device.decisions)


def test_a_source_that_fails_ends_the_stream(guard: Open) -> None:
    def source() -> Iterator[np.ndarray]:
        yield from pictures(2)
        raise OSError("the camera is gone")

    device, _ = guard(answer)
    got = []
    with pytest.raises(OSError, match="the camera is gone"):
        for one in device.stream(source()):
            got.append(one.answered)
    assert got == ["edge", "edge"]


def test_bounds_must_be_above_zero(known: Bundle) -> None:
    with pytest.raises(PlanError, match="a link's bounds must be above 0 s"):
        GuardedDevice(known, edge="ws://memory", plan=UPLOAD, keep=KeepTerms(notice_s=0.0))
    with pytest.raises(PlanError, match="a link is measured every so many seconds above 0"):
        GuardedDevice(known, edge="ws://memory", probe_s=-1.0)
    with pytest.raises(PlanError, match="hedge must be 0 or more, got -1"):
        GuardedDevice(known, edge="ws://memory", hedge=-1.0)


@pytest.mark.parametrize("hedge", [0.0, 1.0, inf])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", ["block", "drop-oldest"])
def test_nothing_is_lost_answered_twice_or_wrong_whatever_happens(
    guard: Open, seed: int, policy: str, hedge: float
) -> None:
    chance = random.Random(seed)
    held: list[tuple[MemoryChannel, Request]] = []

    def anything(channel: MemoryChannel, request: Request) -> None:
        # The network's own answer, so that who gave it makes no difference.
        what = chance.choices(["reply", "hold", "fail", "busy", "break", "deaf"], [60, 20, 5, 5, 2, 1])[0]
        if what == "reply":
            channel.reply(request)
        elif what == "hold":
            held.append((channel, request))
        elif what == "fail":
            channel.fail(request, "cannot")
        elif what == "busy":
            channel.refuse(request, 0.001)
        elif what == "break":
            channel.break_down()
        else:
            channel.is_deaf = True
        while held and chance.random() < 0.4:
            where, which = held.pop(chance.randrange(len(held)))
            where.reply(which)

    device, channels = guard(anything, keep=SOON._replace(notice_s=0.06), hedge=hedge)
    xs = pictures(200, seed=seed)
    answers = list(device.stream(xs, window=6, policy=policy))  # type: ignore[arg-type]
    assert [a.request for a in answers] == list(range(200))
    wanted = want(device, xs)
    sent = Counter(request.request for channel in channels for request in channel.requests)
    assert max(sent.values(), default=1) == 1
    for a, own in zip(answers, wanted, strict=True):
        if a.answered == "fallback":
            np.testing.assert_array_equal(a.outputs[0], own)
        elif a.answered == "edge":
            (request,) = [r for channel in channels for r in channel.requests if r.request == a.request]
            np.testing.assert_array_equal(a.outputs[0], logits_of(request.payload))
        else:
            assert policy != "block" and a.answered == "dropped"
    outcomes = Counter(outcome.request for outcome in device.timeline.outcomes)
    assert all(outcomes[request] == 1 for request in range(200))


def test_a_bundle_without_a_plan_of_the_device_is_refused(tmp_path: Path) -> None:
    from tiny_bundle import MENU

    remote = make_tiny_bundle(
        tmp_path / "remote", menu=tuple(plan for plan in MENU if plan.kind != "device"), has_evidence=True
    )
    with pytest.raises(PlanError, match="no plan of the menu runs on the device alone"):
        GuardedDevice(remote, edge="ws://memory", plan=UPLOAD)


class SlowLink(MemoryChannel):
    """Takes a frame only when it is told to."""

    gate = threading.Event()

    def write(self, frame: bytes) -> None:
        self.gate.wait()
        super().write(frame)


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_nobody_waits_for_is_not_sent(known: Bundle, is_stream: bool) -> None:
    made: list[SlowLink] = []

    def connect(url: str, terms: Terms, **more: Any) -> SlowLink:
        made.append(SlowLink(terms, answer))
        return made[-1]

    SlowLink.gate.clear()
    with GuardedDevice(
        known, edge="ws://memory", plan=SPLIT32, connect=connect, keep=KeepTerms(notice_s=30.0), hedge=inf
    ) as device:
        # As if the link were fast: every request is sent, and is late.
        xs = pictures(20)
        if is_stream:
            answers = list(device.stream(xs, deadline_s=0.1, window=30))
        else:
            answers = [device.infer(x, deadline_s=0.1) for x in xs]
        assert {a.answered for a in answers} <= {"late", "fallback"}
        SlowLink.gate.set()
        deadline = time.monotonic() + 10
        while device.keeper._pending:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        # The one that was being written when it became late, and no other.
        assert len(made[0].requests) <= 1
        assert device.infer(xs[0]).answered == "edge"
        assert not made[0]._device.in_flight


def test_an_edge_that_does_not_greet_delays_neither_beginning_nor_end(known: Bundle) -> None:
    gate = threading.Event()

    def connect(url: str, terms: Terms, **more: Any) -> MemoryChannel:
        gate.wait()
        raise LinkError("nobody")

    device = GuardedDevice(known, edge="ws://memory", plan=UPLOAD, connect=connect, keep=KeepTerms(notice_s=0.2))
    assert device.infer(pictures(1)[0]).answered == "fallback"
    device.close()
    gate.set()
    deadline = time.monotonic() + 10
    while any(thread.name == "coinfer-link" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_fault_of_our_own_does_not_cost_the_link(guard: Open) -> None:
    device, channels = guard(answer)

    def faulty(message: bytes) -> Any:
        raise ZeroDivisionError("a bug")

    channels[0].parse = faulty  # type: ignore[method-assign]
    assert device.infer(pictures(1)[0]).answered == "fallback"
    deadline = time.monotonic() + 10
    while device.infer(pictures(1)[0]).answered != "edge":
        assert time.monotonic() < deadline
    assert len(channels) == 2
