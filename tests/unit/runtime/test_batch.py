"""Batches at the edge: which requests are computed together, and that each gets its own answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from coinfer.bundle import Bundle
from coinfer.engine.segments import Segments
from coinfer.engine.sides import run_batch, run_side
from coinfer.errors import PlanError
from coinfer.protocol import DeviceConnection, EdgeConnection, Failure, Limits, Reply, Request, Terms
from coinfer.runtime.batch import Computed, Workers
from coinfer.runtime.pace import AsFastAsItGoes
from tiny_bundle import SPLIT32, SPLIT_EXITS, UPLOAD, UPLOAD_EXITS, UPLOAD_TOP, pictures


class Gate:
    """A pace that lets computations pass once it is open, and counts them."""

    lag_s = 0.0

    def __init__(self) -> None:
        self.open, self.at_gate = threading.Event(), threading.Semaphore(0)
        self.works: list[str] = []

    def run(self, work: str, call: Callable[[], Any], rehearsal: Any = None, *, is_urgent: bool = False) -> Any:
        self.at_gate.release()
        self.open.wait()
        self.works.append(work)
        return call()


class Desk:
    """Requests of one device, put to workers and their answers read."""

    def __init__(self, bundle: Bundle, **options: Any) -> None:
        self.bundle, terms = bundle, Terms.of(bundle)
        self.segments = Segments(bundle.path, bundle.manifest.outputs)
        self.device = DeviceConnection(terms)
        self.edge = EdgeConnection(terms, Limits(max_message_bytes=100_000, in_flight=100))
        self.edge.receive(self.device.hello())
        self.device.receive(self.edge.welcome())
        self.gate = Gate()
        pace: Any = options.pop("pace", self.gate)
        self.workers = Workers(Segments(bundle.path, bundle.manifest.outputs), pace, **options)
        self.count = 0

    def payload(self, picture: np.ndarray, plan: int) -> bytes:
        chosen = self.bundle.plan(plan)
        found = run_side(chosen, "device", self.segments, (picture[None],)) if chosen.head else None
        return self.segments.codec(chosen).encode((picture[None],) if found is None else found.values)

    def ask(self, plan: int, payload: bytes, arrived_s: float = 0.0):
        event = self.edge.receive(self.device.request(self.count, plan, payload))
        assert isinstance(event, Request)
        self.count += 1
        return self.workers.submit(self.edge, event, arrived_s)

    def read(self, computed: Computed) -> Reply | Failure:
        event = self.device.receive(computed.message)
        assert isinstance(event, Reply | Failure)
        return event


@pytest.fixture
def desk(exit_bundle: Bundle) -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def make(**options: Any) -> Desk:
        made.append(Desk(exit_bundle, **options))
        return made[-1]

    yield make
    for one in made:
        one.gate.open.set()
        one.workers.close()


@pytest.mark.parametrize("plan", [UPLOAD, SPLIT32, UPLOAD_TOP, UPLOAD_EXITS])
@pytest.mark.parametrize("max_batch", [1, 4, 100])
def test_each_request_of_a_batch_has_its_own_answer(desk, plan: int, max_batch: int) -> None:
    one = desk(max_batch=max_batch)
    shown = pictures(10)
    futures = [one.ask(plan, one.payload(picture, plan)) for picture in shown]
    one.gate.open.set()
    for picture, future in zip(shown, futures, strict=True):
        computed = future.result(timeout=20)
        reply = one.read(computed)
        chosen = one.bundle.plan(plan)
        values = one.segments.codec(chosen).decode(one.payload(picture, plan))
        want = run_side(chosen, "edge", one.segments, values)
        assert isinstance(reply, Reply) and reply.exit == want.exit
        if chosen.top is None:
            np.testing.assert_allclose(reply.result.outputs[0], want.values[0], rtol=1e-5)
        else:
            assert reply.result.classes is not None and reply.result.classes[0] == want.values[0].argmax()
        assert len(computed.durations_s) == 3 and min(computed.durations_s) >= 0
        assert [span.stage for span in computed.spans()] == ["wait", "decode", "tail"]


def test_what_waits_of_one_plan_is_taken_together_and_nobody_overtakes(desk) -> None:
    one = desk(max_batch=3)
    picture = pictures(1)[0]
    plans = [UPLOAD, UPLOAD, UPLOAD_TOP, UPLOAD, UPLOAD, UPLOAD, UPLOAD_TOP]
    futures = [one.ask(plans[0], one.payload(picture, plans[0]))]
    one.gate.at_gate.acquire()
    futures += [one.ask(plan, one.payload(picture, plan)) for plan in plans[1:]]
    one.gate.open.set()
    batches = [future.result(timeout=20).batch for future in futures]
    # The first was alone; then three of the next one's plan, then the two of the other plan, then the rest.
    assert batches == [1, 3, 2, 3, 3, 1, 2]


def test_a_lone_request_waits_for_nobody_unless_told_to(desk) -> None:
    one = desk(max_batch=8)
    one.gate.open.set()
    assert one.ask(UPLOAD, one.payload(pictures(1)[0], UPLOAD)).result(timeout=20).batch == 1


def test_a_worker_may_wait_for_more(desk) -> None:
    import time

    patient = desk(max_batch=2, batch_wait_s=9.0)
    patient.gate.open.set()
    payload = patient.payload(pictures(1)[0], UPLOAD)
    first = patient.ask(UPLOAD, payload, time.perf_counter())
    second = patient.ask(UPLOAD, payload, time.perf_counter())
    # The batch is full long before the wait is over.
    assert [future.result(timeout=5).batch for future in (first, second)] == [2, 2]


def test_one_unreadable_payload_fails_alone(desk) -> None:
    one = desk(max_batch=5)
    good = one.payload(pictures(1)[0], UPLOAD)
    futures = [one.ask(UPLOAD, payload) for payload in (good, b"rubbish", good)]
    one.gate.open.set()
    events = [one.read(future.result(timeout=20)) for future in futures]
    assert [type(event) for event in events] == [Reply, Failure, Reply]
    assert futures[1].result().durations_s == ()


def test_a_cancelled_request_is_not_computed(desk) -> None:
    one = desk()
    payload = one.payload(pictures(1)[0], UPLOAD)
    first = one.ask(UPLOAD, payload)
    one.gate.at_gate.acquire()
    second = one.ask(UPLOAD, payload)
    assert second.cancel()
    third = one.ask(UPLOAD, payload)
    one.gate.open.set()
    assert first.result(timeout=20).durations_s and third.result(timeout=20).durations_s
    # Decoding and tail of two.
    assert len(one.gate.works) == 4


def test_closing_ends_the_threads_and_cancels_what_waits(desk) -> None:
    one = desk(workers=2)
    payload = one.payload(pictures(1)[0], UPLOAD)
    begun = [one.ask(UPLOAD, payload) for _ in range(2)]
    for _ in begun:
        one.gate.at_gate.acquire()
    waiting = one.ask(UPLOAD, payload)
    closer = threading.Thread(target=one.workers.close)
    closer.start()
    while not waiting.cancelled():
        pass
    one.gate.open.set()
    closer.join(20)
    assert not closer.is_alive() and all(future.result().durations_s for future in begun)


@pytest.mark.parametrize("options", [{"workers": 0}, {"max_batch": 0}, {"batch_wait_s": -1.0}, {"batch_wait_s": 11.0}])
def test_numbers_that_make_no_sense_are_refused(exit_bundle: Bundle, options: dict[str, Any]) -> None:
    segments = Segments(exit_bundle.path, exit_bundle.manifest.outputs)
    with pytest.raises(PlanError, match="a worker, batches of 1 or more and waits of 0 to 10 s"):
        Workers(segments, AsFastAsItGoes(), **options)


@pytest.mark.parametrize("plan", [UPLOAD_EXITS, SPLIT_EXITS])
def test_a_batch_with_exits_is_its_requests_one_by_one(exit_bundle: Bundle, plan: int) -> None:
    segments, chosen = Segments(exit_bundle.path, exit_bundle.manifest.outputs), exit_bundle.plan(plan)
    shown = pictures(30)
    for side, values in (("device", (shown,)), ("edge", (shown,))):
        if (side == "device") != (chosen.head is not None):
            continue
        together = run_batch(chosen, side, segments, values)
        alone = [run_side(chosen, side, segments, (picture[None],)) for picture in shown]
        assert [found.exit for found in together] == [found.exit for found in alone]
        for found, want in zip(together, alone, strict=True):
            np.testing.assert_allclose(found.values[0], want.values[0], rtol=1e-5, atol=1e-6)
