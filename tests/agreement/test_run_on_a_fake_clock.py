"""The device's and the edge's own code in made-up time: what they record is what the simulation says.

Heads, exits, codecs, messages and tails really run and take no time; what they would take is told to the device by a
pace and to the edge by a clock, and SimPy keeps the queues.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy

from coinfer.bundle import Bundle
from coinfer.engine.segments import Segment, Segments
from coinfer.plan import Candidate, Evidence
from coinfer.profile import Conditions, Link, Slowdown, Trace
from coinfer.protocol import Reply, Request, Terms, message_wire_bytes
from coinfer.runtime.batch import Job, Workers
from coinfer.runtime.device import Device
from coinfer.runtime.request import Ended, Found
from coinfer.simulate.arrivals import poisson
from coinfer.simulate.events import Stream, simulate
from coinfer.simulate.transfer import Transfer
from coinfer.stages import courses_of
from coinfer.timeline import Timeline
from tiny_bundle import DEVICE, DEVICE_EXIT, SPLIT32, SPLIT_AT_EXIT, SPLIT_EXIT, UPLOAD, UPLOAD_EXITS, pictures

sys.path.append(str(Path(__file__).parents[1] / "unit" / "runtime"))
from memory_channel import MemoryChannel  # noqa: E402

COUNT = 40
SEGMENT_S, CLASSIFIER_S, ENCODE_S, DECODE_S = 0.004, 0.001, 0.002, 0.003
TRACE = Trace(name="t", start_s=(0.0, 0.2, 0.3), rate_bps=(4e5, 0.0, 9e5), duration_s=0.7)


class FakePace:
    """Runs calls at once and says how far behind a machine would be that takes so long for each."""

    def __init__(self, *, outer_s: float) -> None:
        self.lag_s, self._outer_s, self._depth = 0.0, outer_s, 0

    def run(self, work: str, call: Callable[[], Any], rehearsal: Any = None, *, is_urgent: bool = False) -> Any:
        self._depth += 1
        try:
            result = call()
        finally:
            self._depth -= 1
        owner = getattr(getattr(call, "func", None), "__self__", None)
        if isinstance(owner, Segment):
            self.lag_s += CLASSIFIER_S if ".exit." in owner.session.path.name else SEGMENT_S
        elif self._depth == 0 and not isinstance(result, Found):
            # An answer of the device itself is neither encoded nor sent.
            self.lag_s += self._outer_s
        return result


class EdgePace(FakePace):
    """The edge decodes, then runs segments, each on its own."""

    def __init__(self) -> None:
        super().__init__(outer_s=DECODE_S)


def candidate_of(bundle: Bundle, number: int, sizes: dict[str, float]) -> Candidate:
    plan = bundle.plan(number)
    is_remote = plan.kind != "device"
    evidence = Evidence(
        split="validation", num_images=1, accuracy=1.0, accuracy_ci=0.0, loss_points=0.0, loss_ci_points=0.0,
        payload_bytes=sizes["payload"], payload_bytes_p95=0.0, reply_bytes=sizes["reply"],
        head_s=SEGMENT_S if plan.head else 0.0, encode_s=ENCODE_S if is_remote else 0.0,
        decode_s=DECODE_S if is_remote else 0.0, tail_s=SEGMENT_S if plan.tail else 0.0,
        exit_shares=(0.0,) * len(plan.exits),
    )  # fmt: skip
    return Candidate(plan=plan, evidence=evidence)


class Run:
    """All requests of one device through its own code, the link and the edge in SimPy's time."""

    def __init__(self, bundle: Bundle, number: int, arrivals: np.ndarray, conditions: Conditions) -> None:
        self.env = simpy.Environment()
        self.plan, self.conditions = bundle.plan(number), conditions
        self.core, self.up, self.edge, self.down = (simpy.Resource(self.env) for _ in range(4))
        self.pace, self.edge_pace = FakePace(outer_s=ENCODE_S), EdgePace()
        self.timeline = Timeline()
        self.frames: list[bytes] = []
        self.channel: MemoryChannel | None = None

        def connect(url: str, terms: Terms, *, timeout_s: float) -> MemoryChannel:
            self.channel = MemoryChannel(terms, lambda channel, request: self.requests.append(request))
            return self.channel

        self.requests: list[Request] = []
        self.device = Device(
            bundle, edge="ws://memory", plan=number, pace=self.pace, timeline=self.timeline,
            clock=lambda: self.env.now, connect=connect,
        )  # type: ignore[arg-type]  # fmt: skip
        self.workers = Workers(
            Segments(bundle.path, bundle.manifest.outputs), self.edge_pace,
            clock=lambda: self.env.now + self.edge_pace.lag_s,
        )  # fmt: skip
        self.uplink = Transfer(conditions.link, is_uplink=True)
        self.downlink = Transfer(conditions.link, is_uplink=False)
        for at_s, picture in zip(arrivals, pictures(len(arrivals)), strict=True):
            self.env.process(self._request(float(at_s), picture))
        self.env.run()
        self.workers.close()

    def _request(self, at_s: float, picture: np.ndarray):
        env, device, link = self.env, self.device, self.conditions.link
        yield env.timeout(at_s)
        handed = device.hand(picture)
        with self.core.request() as turn:
            yield turn
            self.pace.lag_s = 0.0
            if self.plan.kind == "device":
                made = device.alone(handed, self.plan)
            else:
                made = device.ask(handed, self.plan, device.channel())
            is_over = isinstance(made, Ended)
            yield env.timeout(made.answer.outcome.end_s - env.now if is_over else self.pace.lag_s)
        if is_over:
            device.record(made)
            return
        with self.up.request() as turn:
            yield turn
            device.send(made, self.channel)
            request = self.requests.pop()
            yield env.timeout(float(self.uplink.end_s(env.now, made.wire_bytes)) - env.now)
        yield env.timeout(link.delay_s)
        arrived_s = env.now
        with self.edge.request() as turn:
            yield turn
            self.edge_pace.lag_s = 0.0
            (computed,) = self.workers.compute([Job(self.channel._edge, request, arrived_s, Future())])
            yield env.timeout(self.edge_pace.lag_s)
        with self.down.request() as turn:
            yield turn
            num_bytes = message_wire_bytes(len(computed.message), masked=False)
            yield env.timeout(float(self.downlink.end_s(env.now, num_bytes)) - env.now)
        yield env.timeout(link.delay_s)
        yield env.timeout(self.conditions.exchange_s)
        event = self.channel.parse(computed.message)
        assert isinstance(event, Reply)
        device.record(device.answer(made, event, env.now))


@pytest.mark.parametrize("number", [DEVICE, UPLOAD, SPLIT32, DEVICE_EXIT, SPLIT_EXIT, SPLIT_AT_EXIT, UPLOAD_EXITS])
@pytest.mark.parametrize("trace", [None, TRACE], ids=["constant", "trace"])
def test_a_run_on_a_fake_clock_is_the_simulation(exit_bundle: Bundle, number: int, trace: Trace | None) -> None:
    conditions = Conditions(
        link=Link(rate_bps=5e5, delay_s=0.004, trace=trace), device=Slowdown(), exchange_s=0.001
    )
    arrivals = poisson(25.0, COUNT, seed=number)
    run = Run(exit_bundle, number, arrivals, conditions)
    outcomes = sorted(run.timeline.outcomes, key=lambda outcome: outcome.request)
    plan = exit_bundle.plan(number)
    sent = [o for o in outcomes if o.wire_bytes]
    payload = float(sent[0].payload_bytes) if sent else 0.0
    reply = 4.0 * exit_bundle.manifest.outputs[0].num_elements if sent else 0.0
    candidate = candidate_of(exit_bundle, number, {"payload": payload, "reply": reply})
    seconds = dict.fromkeys(plan.segments, SEGMENT_S)
    seconds |= {exit.classifier: CLASSIFIER_S for exit in plan.exits}
    courses = {course.exit: course._replace(share=1.0) for course in courses_of(candidate, seconds)}
    # Each request takes the course that its picture took.
    streams = [
        Stream(plan, (courses[o.exit],), arrivals[k : k + 1], conditions, window=10**6)
        for k, o in enumerate(outcomes)
    ]  # fmt: skip
    simulated = simulate(streams)
    assert [(o.answered, o.exit) for o in outcomes] == [(o.answered, o.exit) for o in simulated.outcomes]
    assert [o.latency_s for o in outcomes] == pytest.approx([o.latency_s for o in simulated.outcomes], abs=1e-6)
    assert [o.wire_bytes for o in outcomes] == [o.wire_bytes for o in simulated.outcomes]
    assert [o.reply_wire_bytes for o in outcomes] == [o.reply_wire_bytes for o in simulated.outcomes]
    for stage in ("head", "exit", "encode", "decode"):
        assert run.timeline.busy_s(stage) == pytest.approx(simulated.busy_s(stage), abs=1e-4), stage
    if plan.exits:
        assert len({o.exit for o in outcomes}) > 1
