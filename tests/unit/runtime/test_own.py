"""How long a device takes itself, plan by plan; and requests that nobody asked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from coinfer.plan import TensorSpec
from coinfer.runtime.own import OwnLoads, made_up


def test_a_plan_that_was_not_taken_is_judged_by_the_others_by_what_takes_long() -> None:
    own = OwnLoads()
    assert own.of(7) == 1.0 and own.known() == {}
    own.took(1, 0.2, 0.1)
    assert own.of(1) == own.of(7) == 2.0
    own.took(2, 0.5, 1.0)
    # 0.2 + 0.5 s for what was said to take 1.1 s.
    assert own.of(7) == pytest.approx(0.7 / 1.1) and own.known() == {1: 2.0, 2: 0.5}


def test_one_long_pause_does_not_count_for_ever() -> None:
    own = OwnLoads()
    own.took(1, 1.0, 1.0)
    own.took(1, 100.0, 1.0)
    assert own.of(1) == pytest.approx(100**0.3)
    for _ in range(20):
        own.took(1, 1.0, 1.0)
    assert own.of(1) == pytest.approx(1.0, rel=1e-2)


def test_what_is_known_of_a_plan_fades_while_others_are_taken() -> None:
    own = OwnLoads()
    own.took(1, 100.0, 1.0)
    for _ in range(2000):
        own.took(2, 50.0, 50.0)
    assert own.of(1) == pytest.approx(1.0, rel=0.05) and own.of(2) == 1.0


@pytest.mark.parametrize(
    ("took_s", "said_s"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 5e-324)]
)
def test_what_is_no_time_says_nothing(took_s: float, said_s: float) -> None:
    own = OwnLoads()
    own.took(1, took_s, said_s)
    assert own.known() == {} and own.other == 1.0


@pytest.mark.parametrize(("shape", "channels"), [((32, 40, 3), 3), ((5, 1, 1), 1)])
def test_a_made_up_picture_has_slopes_and_noise(shape: tuple[int, int, int], channels: int) -> None:
    spec = TensorSpec(name="input", dtype="uint8", shape=shape)
    found = made_up(spec)
    assert found.shape == shape and found.dtype == np.uint8 and found.shape[2] == channels
    assert np.array_equal(found, made_up(spec)) and found.std() > 4


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int8", "uint8", "bool"])
def test_other_inputs_are_noise(dtype: str) -> None:
    found = made_up(TensorSpec(name="input", dtype=dtype, shape=(70, 3)))
    assert found.shape == (70, 3) and found.dtype.name == dtype and np.isfinite(found.astype(float)).all()
    assert 2 <= len(np.unique(found)) and (dtype == "bool" or found.astype(float).std() > 0.5)
