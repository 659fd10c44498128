"""The device alone, and with an edge that answers in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from memory_channel import Behaviour, MemoryChannel, answer, logits_of

from coinfer.bundle import Bundle
from coinfer.engine.onnx import Session
from coinfer.errors import BundleError, DataError, LinkError, PlanError, RefusedError
from coinfer.protocol import Terms
from coinfer.runtime import device as device_module
from coinfer.runtime.device import Device
from coinfer.timeline import Timeline
from tiny_bundle import (
    DEVICE,
    DEVICE_TOP,
    SPLIT16,
    SPLIT32,
    SPLIT_TWO,
    UPLOAD,
    UPLOAD_TOP,
    make_tiny_bundle,
    pictures,
)

Connect = Callable[..., tuple[Device, MemoryChannel]]


class RecordingPace:
    lag_s = 0.0

    def __init__(self) -> None:
        self.works: list[str] = []

    def run(self, work: str, call: Callable[[], Any], rehearsal: Any = None, *, is_urgent: bool = False) -> Any:
        self.works.append(work)
        if rehearsal is not None:
            rehearsal()
        return call()


@pytest.fixture
def connect(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Connect:
    def connect(behaviour: Behaviour = answer, **options: Any) -> tuple[Device, MemoryChannel]:
        made: list[MemoryChannel] = []

        def channel(url: str, terms: Terms, *, timeout_s: float, **link: object) -> MemoryChannel:
            made.append(MemoryChannel(terms, behaviour))
            return made[-1]

        monkeypatch.setattr(device_module, "Channel", channel)
        device = Device(tiny_bundle, edge="ws://memory", **options)
        return device, made[0]

    return connect


def test_a_device_plan_gives_the_networks_outputs(tiny_bundle: Bundle) -> None:
    picture = pictures(1)[0]
    (expected,) = Session(tiny_bundle.path("segments/whole.onnx")).run((picture[None],))
    with Device(tiny_bundle, plan=DEVICE) as device:
        for x in (picture, picture[None], picture.copy(order="F")):
            answered = device.infer(x)
            np.testing.assert_array_equal(answered.outputs[0], expected)
            assert answered.answered == "device" and answered.label == expected.argmax()
    outcome = answered.outcome
    assert (outcome.payload_bytes, outcome.wire_bytes, outcome.reply_wire_bytes, outcome.plan) == (0, 0, 0, DEVICE)
    assert [span.stage for span in answered.spans] == ["head"]
    assert [o.request for o in device.timeline.outcomes] == [0, 1, 2]


def test_top_on_the_device_is_what_the_edge_would_send(tiny_bundle: Bundle) -> None:
    device = Device(tiny_bundle)
    whole, best = device.infer(pictures(1)[0], plan=DEVICE), device.infer(pictures(1)[0], plan=DEVICE_TOP)
    assert best.classes is not None and best.scores is not None and best.outputs == ()
    assert best.classes.tolist() == np.argsort(-whole.outputs[0][0])[:3].tolist()
    assert best.label == whole.label
    assert best.scores.dtype == np.float32 and best.scores[0] > best.scores[1] > best.scores[2]


def test_a_stream_of_a_device_plan_is_its_requests_in_order(tiny_bundle: Bundle) -> None:
    device, xs = Device(tiny_bundle, plan=DEVICE), pictures(5)
    alone = [device.infer(x).outputs[0] for x in xs]
    streamed = [answered.outputs[0] for answered in device.stream(xs)]
    np.testing.assert_array_equal(streamed, alone)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 9, 3), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        [[1, 2], [3, 4]],
    ],
)
def test_a_picture_of_another_size_or_dtype_is_named(tiny_bundle: Bundle, x: Any) -> None:
    array = np.asarray(x)
    with pytest.raises(DataError) as caught:
        Device(tiny_bundle, plan=DEVICE).infer(x)
    assert f"must be uint8 (8, 8, 3), got {array.dtype} {array.shape} (model tiny)" in str(caught.value)


def test_which_plan_is_asked_for(tiny_bundle: Bundle) -> None:
    device = Device(tiny_bundle)
    with pytest.raises(PlanError, match="name a plan: the menu has 0, 1, 2"):
        device.infer(pictures(1)[0])
    with pytest.raises(BundleError, match="plan 99 is not on the menu"):
        device.infer(pictures(1)[0], plan=99)
    with pytest.raises(BundleError, match="plan 99 is not on the menu"):
        Device(tiny_bundle, plan=99)
    with pytest.raises(PlanError, match="needs an edge"):
        device.infer(pictures(1)[0], plan=UPLOAD)
    with pytest.raises(PlanError, match="must be at least 1, .* got window 0"):
        device.stream(pictures(1), plan=DEVICE, window=0)


def test_a_plan_that_does_not_fit_its_segments_is_named_at_once(tiny_bundle: Bundle, tmp_path: Any) -> None:
    menu = tuple(plan for plan in tiny_bundle.manifest.menu if plan.number == SPLIT32)
    bundle = make_tiny_bundle(tmp_path / "b", menu=menu)
    (bundle.folder / "segments/early.head.onnx").unlink()
    with pytest.raises(Exception, match="early.head.onnx"):
        Device(bundle, plan=SPLIT32)


def test_everything_the_device_computes_goes_through_its_pace(connect: Connect) -> None:
    pace = RecordingPace()
    device, _ = connect(pace=pace)
    for plan, works in ((DEVICE, ["fp32"] * 2), (UPLOAD, ["fp32"] * 2), (SPLIT32, ["fp32"] * 3)):
        pace.works.clear()
        device.infer(pictures(1)[0], plan=plan)
        assert pace.works == works


def test_a_request_over_the_link_is_recorded_stage_by_stage(connect: Connect) -> None:
    timeline = Timeline()
    device, channel = connect(plan=SPLIT32, timeline=timeline)
    answered = device.infer(pictures(1)[0])
    (request,) = channel.requests
    np.testing.assert_array_equal(answered.outputs[0], logits_of(request.payload))
    assert answered.answered == "edge"
    stages = {span.stage: span for span in answered.spans}
    assert list(stages) == ["head", "encode", "exchange", "wait", "decode", "tail"]
    outcome = answered.outcome
    device_stages = [stages[name] for name in ("head", "encode", "exchange")]
    moments = [outcome.start_s, *(m for s in device_stages for m in (s.start_s, s.end_s)), outcome.end_s]
    assert moments == sorted(moments)
    edge_times = [(s.start_s, s.end_s) for s in answered.spans if s.clock == "edge"]
    np.testing.assert_allclose(edge_times, [(0, 0.001), (0.001, 0.003), (0.003, 0.006)], rtol=1e-12)
    assert outcome.payload_bytes == len(request.payload) == 4 * 256 + 6
    assert outcome.wire_bytes == 8 + 1030 + 4 + 4 + 40 == stages["exchange"].num_bytes
    assert outcome.reply_wire_bytes == 8 + 12 + 20 + 2 + 40
    assert timeline.outcomes == [outcome] and timeline.spans == list(answered.spans)


def test_a_refused_request_is_an_error_and_the_next_one_is_not(connect: Connect) -> None:
    def fail_first(channel: MemoryChannel, request: Any) -> None:
        channel.fail(request, "no such payload") if request.request == 0 else channel.reply(request)

    device, channel = connect(fail_first, plan=UPLOAD)
    with pytest.raises(RefusedError, match="could not answer request 0: no such payload .upload tiny raw"):
        device.infer(pictures(1)[0])
    assert device.infer(pictures(1)[0]).answered == "edge"
    assert len(channel.requests) == 2
    assert [outcome.answered for outcome in device.timeline.outcomes] == ["failed", "edge"]


def test_a_broken_link_is_an_error_and_the_next_request_connects_anew(connect: Connect) -> None:
    device, channel = connect(lambda channel, request: channel.break_down(), plan=UPLOAD)
    with pytest.raises(LinkError, match="cut by the test"):
        device.infer(pictures(1)[0])
    assert channel.is_aborted
    with pytest.raises(LinkError, match="cut by the test"):
        device.infer(pictures(1)[0])


def test_a_link_closed_between_requests_is_opened_anew(connect: Connect) -> None:
    device, channel = connect(plan=UPLOAD)
    device.infer(pictures(1)[0])
    channel.close()
    assert device.infer(pictures(1)[0]).answered == "edge"
    assert len(channel.requests) == 1


def test_heartbeats_of_the_edge_are_answered_in_passing(connect: Connect) -> None:
    def beat_and_answer(channel: MemoryChannel, request: Any) -> None:
        channel.beat()
        channel.reply(request)

    device, _ = connect(beat_and_answer, plan=UPLOAD)
    assert device.infer(pictures(1)[0]).answered == "edge"
    assert device.ping() >= 0


@pytest.mark.parametrize("plan", [UPLOAD, SPLIT32, SPLIT16, SPLIT_TWO, UPLOAD_TOP])
def test_a_request_that_is_not_a_picture_leaves_the_link_as_it_was(connect: Connect, plan: int) -> None:
    device, channel = connect(plan=plan)
    with pytest.raises(DataError):
        device.infer(np.zeros(3))
    assert channel.requests == [] and not channel.is_aborted
    assert device.infer(pictures(1)[0]).answered == "edge"


def test_the_device_imports_neither_torch_nor_a_server() -> None:
    heavy = ["torch", "starlette", "uvicorn", "matplotlib", "onnx", "scipy", "sklearn", "asyncio"]
    code = f"import sys, coinfer.runtime.device; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
