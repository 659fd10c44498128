"""One machine's share of a plan with exits, against its segments run by hand."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from coinfer.bundle import Bundle
from coinfer.engine.onnx import Session
from coinfer.engine.segments import Segments
from coinfer.engine.sides import SideResult, run_side
from coinfer.errors import BundleError
from coinfer.exits import certainty
from tiny_bundle import (
    DEVICE,
    DEVICE_EXIT,
    SPLIT_AT_EXIT,
    SPLIT_EXIT,
    SPLIT_EXITS,
    SURE_R,
    SURE_SUM,
    UPLOAD,
    UPLOAD_EXITS,
    pictures,
)


def by_hand(bundle: Bundle, name: str, *values: np.ndarray) -> list[np.ndarray]:
    return list(Session(bundle.path(f"segments/{name}.onnx")).run(values))


def side_of(bundle: Bundle, number: int, side: str, values: tuple[np.ndarray, ...], **options) -> SideResult:
    segments = Segments(bundle.path, bundle.manifest.outputs)
    return run_side(bundle.plan(number), side, segments, values, **options)


def test_a_side_without_exits_is_its_segment(exit_bundle: Bundle) -> None:
    picture = pictures(1)
    (want,) = by_hand(exit_bundle, "whole", picture)
    for number, side in ((DEVICE, "device"), (UPLOAD, "edge")):
        found = side_of(exit_bundle, number, side, (picture,))
        np.testing.assert_array_equal(found.values[0], want)
        assert found.exit is None


def test_an_exit_answers_where_it_is_sure_and_the_rest_goes_on(exit_bundle: Bundle) -> None:
    places = set()
    for picture in np.split(pictures(12), 12):
        (r,) = by_hand(exit_bundle, "early.head", picture)
        (logits,) = by_hand(exit_bundle, "early.exit", r)
        marks: list[str] = []
        found = side_of(exit_bundle, DEVICE_EXIT, "device", (picture,), mark=marks.append)
        places.add(found.exit)
        if certainty(logits)[0] >= SURE_R:
            assert found.exit == 0 and marks == ["head", "exit"]
            np.testing.assert_array_equal(found.values[0], logits)
        else:
            assert found.exit is None and marks == ["head", "exit", "head"]
            np.testing.assert_allclose(found.values[0], by_hand(exit_bundle, "whole", picture)[0], rtol=1e-5)
    assert places == {None, 0}


def test_what_crosses_behind_an_exit_is_in_the_plans_order(exit_bundle: Bundle) -> None:
    for number in (SPLIT_EXIT, SPLIT_AT_EXIT):
        crossed = 0
        for picture in np.split(pictures(12), 12):
            found = side_of(exit_bundle, number, "device", (picture,))
            if found.exit is None:
                (r,) = by_hand(exit_bundle, "early.head", picture)
                crossed += 1
                np.testing.assert_array_equal(found.values[0], r)
                assert len(found.values) == len(exit_bundle.plan(number).crossing)
        assert 0 < crossed < 12


def test_two_exits_in_a_row_and_one_on_each_side(exit_bundle: Bundle) -> None:
    places = []
    for picture in np.split(pictures(24), 24):
        (r,) = by_hand(exit_bundle, "early.head", picture)
        sure_r = certainty(by_hand(exit_bundle, "early.exit", r)[0])[0] >= SURE_R
        (total,) = by_hand(exit_bundle, "early.sum", r)
        sure_sum = certainty(by_hand(exit_bundle, "sum.exit", total)[0])[0] >= SURE_SUM
        want = 0 if sure_r else 1 if sure_sum else None
        assert side_of(exit_bundle, UPLOAD_EXITS, "edge", (picture,)).exit == want
        here = side_of(exit_bundle, SPLIT_EXITS, "device", (picture,))
        there = None if here.exit is not None else side_of(exit_bundle, SPLIT_EXITS, "edge", tuple(here.values)).exit
        assert (here.exit if here.exit is not None else there) == want
        places.append(want)
    assert set(places) == {None, 0, 1}


def test_a_classifier_that_does_not_fit_is_named(exit_bundle: Bundle) -> None:
    plan = exit_bundle.plan(DEVICE_EXIT)
    wrong = msgspec.structs.replace(plan.exits[0], classifier="segments/late.tail.onnx")
    with pytest.raises(BundleError, match='classifier "segments/late.tail.onnx" has'):
        Segments(exit_bundle.path, exit_bundle.manifest.outputs).parts(
            msgspec.structs.replace(plan, exits=(wrong,)), "device"
        )
