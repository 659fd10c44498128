from __future__ import annotations

import msgspec
import numpy as np
import pytest

from coinfer.bundle import Bundle
from coinfer.engine.onnx import Session
from coinfer.engine.segments import Segments
from coinfer.errors import BundleError
from tiny_bundle import DEVICE, SPLIT32, SPLIT_TWO, UPLOAD, R, S, pictures


def test_heads_give_what_crosses_in_the_plans_order(tiny_bundle: Bundle) -> None:
    segments, picture = Segments(tiny_bundle.path, tiny_bundle.manifest.outputs), pictures(1)
    s, r = Session(tiny_bundle.path("segments/late.head.onnx")).run((picture,))
    crossing = segments.head(tiny_bundle.plan(SPLIT_TWO)).run((picture,))
    np.testing.assert_array_equal(crossing[0], r)
    np.testing.assert_array_equal(crossing[1], s)
    assert not np.array_equal(r, s)


def test_tails_take_what_crosses_in_the_plans_order(tiny_bundle: Bundle) -> None:
    segments, picture = Segments(tiny_bundle.path, tiny_bundle.manifest.outputs), pictures(1)
    plan = tiny_bundle.plan(SPLIT_TWO)
    s, r = Session(tiny_bundle.path("segments/late.head.onnx")).run((picture,))
    (expected,) = Session(tiny_bundle.path("segments/late.tail.onnx")).run((s, r))
    (logits,) = segments.tail(plan).run(segments.head(plan).run((picture,)))
    np.testing.assert_array_equal(logits, expected)


def test_sessions_and_codecs_are_loaded_once(tiny_bundle: Bundle) -> None:
    segments = Segments(tiny_bundle.path, tiny_bundle.manifest.outputs)
    upload, device = tiny_bundle.plan(UPLOAD), tiny_bundle.plan(DEVICE)
    assert segments.tail(upload).session is segments.head(device).session
    assert segments.codec(upload) is segments.codec(upload)


def test_what_a_plan_does_not_have_is_named(tiny_bundle: Bundle) -> None:
    segments = Segments(tiny_bundle.path, tiny_bundle.manifest.outputs)
    with pytest.raises(BundleError, match="plan 1 computes nothing on the device"):
        segments.head(tiny_bundle.plan(UPLOAD))
    with pytest.raises(BundleError, match="plan 0 computes nothing on the edge"):
        segments.tail(tiny_bundle.plan(DEVICE))
    with pytest.raises(BundleError, match="plan 0 sends nothing"):
        segments.codec(tiny_bundle.plan(DEVICE))


@pytest.mark.parametrize("crossing", [(R, S), (S, S), (msgspec.structs.replace(R, shape=(4, 8, 7)),)])
def test_a_segment_that_does_not_fit_its_plan_is_named(tiny_bundle: Bundle, crossing: tuple[object, ...]) -> None:
    plan = msgspec.structs.replace(tiny_bundle.plan(SPLIT32), crossing=crossing)
    with pytest.raises(BundleError, match=r'head "segments/early.head.onnx" has r float32 \(4, 8, 8\), its plan'):
        Segments(tiny_bundle.path, tiny_bundle.manifest.outputs).head(plan)
    with pytest.raises(BundleError, match='tail "segments/early.tail.onnx" has'):
        Segments(tiny_bundle.path, tiny_bundle.manifest.outputs).tail(plan)
