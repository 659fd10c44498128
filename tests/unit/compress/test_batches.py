"""Batches: every picture at most once an epoch, the same for the same seed, shifted and mirrored as said."""

import numpy as np
import pytest
import torch

from coinfer.compress.batches import (
    AnsweredBatches,
    Augment,
    FeatureBatches,
    PictureBatches,
    Views,
    as_inputs,
    augmented,
    seen_by,
)
from coinfer.errors import DataError
from coinfer.plan import Preprocess

PLAIN = Preprocess(mean=(0.0,), std=(1 / 255,))


def numbered(count=10):
    pixels = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    return pixels, np.arange(count) * 10


def epoch(batches, number):
    return [(batch.inputs.round().int().flatten().tolist(), batch.labels.tolist()) for batch in batches.epoch(number)]


def test_an_epoch_has_each_picture_at_most_once_with_its_label():
    batches = PictureBatches(*numbered(), PLAIN, batch_size=3)
    seen = epoch(batches, 0)
    assert len(batches) == len(seen) == 3
    numbers = [number for pictures, _ in seen for number in pictures]
    assert len(set(numbers)) == 9
    assert [label for _, labels in seen for label in labels] == [10 * number for number in numbers]


def test_order_follows_from_seed_and_epoch():
    one, two = (PictureBatches(*numbered(), PLAIN, batch_size=5, seed=7) for _ in range(2))
    assert epoch(one, 1) == epoch(two, 1)
    assert epoch(one, 1) != epoch(one, 2)
    assert epoch(one, 1) != epoch(PictureBatches(*numbered(), PLAIN, batch_size=5, seed=8), 1)


def test_inputs_are_normalised_channels_first():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    preprocess = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    x = as_inputs(pixels, preprocess)
    assert x.shape == (2, 3, 3, 4)
    assert x.dtype == torch.float32
    expected = (pixels[1, 2, 3, 1] / 255 - 0.4) / 0.3
    assert float(x[1, 1, 2, 3]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_augmented_pictures_are_windows_of_the_reflected_picture(is_mirrored):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
    moved, views = augmented(pixels, np.arange(40), Augment(shift=2, views=Views(is_mirrored=is_mirrored)), rng)
    mirrored = 0
    for picture, result, view in zip(pixels, moved, views, strict=True):
        padded = np.pad(picture, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        windows = [padded[top : top + 6, left : left + 5] for top in range(5) for left in range(5)]
        is_window = any(np.array_equal(result, window) for window in windows)
        is_mirror = any(np.array_equal(result, window[:, ::-1]) for window in windows)
        assert is_mirror if view else is_window
        mirrored += not is_window
    assert (mirrored > 5) is is_mirrored
    assert len({result.tobytes() for result in moved}) == 40


@pytest.mark.parametrize("labels", [None, np.arange(10)])
def test_pictures_that_cannot_be_trained_on_are_refused(labels):
    with pytest.raises(DataError, match="training needs at least one batch of pictures, got 10 for a batch of 11"):
        PictureBatches(numbered()[0], labels, PLAIN, batch_size=11)


def test_features_come_with_the_answers_of_the_same_side():
    features = torch.stack([torch.arange(10.0), -torch.arange(10.0)]).half()[:, :, None]
    batches = FeatureBatches(features, np.arange(10), batch_size=3, seed=1, teacher=100 * features)
    for batch in batches.epoch(0):
        assert torch.equal(batch.teacher, 100 * batch.inputs)
        assert batch.inputs.abs().flatten().tolist() == batch.labels.tolist()
    seen = torch.cat([batch.inputs for number in range(4) for batch in batches.epoch(number)]).flatten()
    assert (seen < 0).any() and (seen > 0).any() and len(seen) == 36
    again = [batch.inputs.tolist() for batch in FeatureBatches(features, np.arange(10), batch_size=3, seed=1).epoch(2)]
    assert again == [batch.inputs.tolist() for batch in batches.epoch(2)]


def test_a_mirrored_picture_has_the_answers_of_its_mirror():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    first = torch.nn.Flatten()
    first.register_parameter("where", torch.nn.Parameter(torch.zeros(1)))
    teacher = seen_by(first, pixels, PLAIN3, Views())
    assert torch.equal(teacher[1], teacher[0].view(12, 3, 4, 4).flip(3).flatten(1))
    batches = PictureBatches(pixels, None, PLAIN3, batch_size=4, augment=Augment(shift=0), teacher=teacher)
    for batch in batches.epoch(0):
        assert batch.labels is None
        assert torch.allclose(batch.inputs.flatten(1), batch.teacher, atol=0.1)


def test_a_mix_is_of_two_pictures_and_has_the_answers_of_the_mix():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    views = Views(is_mirrored=True, mixes=2)
    everything = np.arange(30)
    plain, mirrored, first, first_mirrored, second, _ = (
        views.of(pixels, everything, np.full(30, view)) for view in range(views.num_views)
    )
    assert np.array_equal(plain, pixels) and np.array_equal(mirrored, pixels[:, :, ::-1])
    assert np.array_equal(first_mirrored, first[:, :, ::-1]) and not np.array_equal(first, second)
    for own, mix in zip(pixels.astype(float), first, strict=True):
        # Some other picture and some share from half to all explain every pixel.
        error = [
            min(np.abs(share * own + (1 - share) * other - mix).max() for share in np.linspace(0.5, 1, 501))
            for other in pixels.astype(float)
        ]
        assert min(error) < 1
    assert np.array_equal(first[[3, 7]], views.of(pixels, np.array([3, 7]), np.array([2, 2])))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    answers = seen_by(net, pixels, PLAIN3, views)
    assert answers.shape == (6, 30, 5)
    batches = PictureBatches(
        pixels, None, PLAIN3, batch_size=10, augment=Augment(shift=0, views=views), teacher=answers
    )
    with torch.no_grad():
        for batch in batches.epoch(0):
            assert torch.allclose(net(batch.inputs), batch.teacher, rtol=0.02, atol=2.0)


PLAIN3 = Preprocess(mean=(0.0,) * 3, std=(1 / 255,) * 3)


@pytest.mark.parametrize("shape", [(1, 10, 2), (2, 9, 2)])
def test_a_teacher_of_other_pictures_is_refused(shape):
    with pytest.raises(DataError, match="must be of 2 x 10 pictures"):
        FeatureBatches(torch.zeros(2, 10, 3), None, batch_size=5, teacher=torch.zeros(shape))
    with pytest.raises(DataError, match="got neither"):
        FeatureBatches(torch.zeros(2, 10, 3), None, batch_size=5)


def test_pictures_are_mixed_anew_and_answered_as_they_are_shown():
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)).eval()
    plain = PictureBatches(pixels, np.zeros(64, np.int64), Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3), batch_size=32)
    batches = AnsweredBatches(plain, network, seed=3)
    seen = [list(batches.epoch(number)) for number in (0, 0, 1)]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(seen[0], seen[1], strict=True))
    assert len(seen[2]) == len(batches) == 2
    for shown, batch in zip(seen[2], plain.epoch(1), strict=True):
        assert shown.labels is None
        assert torch.allclose(shown.teacher, network(shown.inputs), rtol=0.02, atol=0.02)
        same = [torch.equal(a, b) for a, b in zip(shown.inputs, batch.inputs, strict=True)]
        assert 6 < sum(same) < 26
        for mixed, own in zip(shown.inputs, batch.inputs, strict=True):
            # What is left of a mix without some share of its own picture is some other picture of the batch.
            rest = [mixed - other for other in batch.inputs]
            assert any(
                np.linalg.matrix_rank(torch.stack([r.flatten(), (own - other).flatten()]).numpy(), tol=1e-3) < 2
                for r, other in zip(rest, batch.inputs, strict=True)
            )
