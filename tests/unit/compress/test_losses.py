"""Losses against their formulas."""

import pytest
import torch

from coinfer.compress.losses import Batch, cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_equals_its_definition(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float32)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    target = torch.nn.functional.one_hot(labels, 4) * (1 - smoothing) + smoothing / 4
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    loss = cross_entropy(smoothing=smoothing)(logits, Batch(torch.zeros(6), labels))
    torch.testing.assert_close(loss, expected)


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(3, 4).bfloat16()
    assert cross_entropy()(logits, Batch(torch.zeros(3), torch.tensor([0, 1, 2]))).dtype == torch.float32
