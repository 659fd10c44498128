"""Losses against their formulas."""

import pytest
import torch

from coinfer.compress.losses import Batch, Coded, cross_entropy, distillation, rate_distortion
from coinfer.errors import ModelError


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


def test_distillation_is_the_divergence_at_a_temperature():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    p, q = ((x / 3.0).softmax(1) for x in (teacher, student))
    by_hand = 9 * (p * (p / q).log()).sum(1).mean()
    batch = Batch(torch.zeros(6), labels, teacher)
    assert torch.allclose(distillation(temperature=3.0)(student, batch), by_hand, atol=1e-6)
    mixed = 0.75 * by_hand + 0.25 * torch.nn.functional.cross_entropy(student, labels)
    assert torch.allclose(distillation(temperature=3.0, label_share=0.25)(student, batch), mixed, atol=1e-6)
    assert float(distillation()(teacher, Batch(torch.zeros(6), None, teacher))) == pytest.approx(0, abs=1e-6)


def test_bits_are_paid_at_the_price_of_their_rate():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    batch, bits = Batch(torch.zeros(6), labels), torch.arange(6.0) * 1000
    loss = rate_distortion(cross_entropy(), (0.1, 0.4))
    plain = cross_entropy()(logits, batch)
    for rate, price in enumerate((0.1, 0.4)):
        assert torch.allclose(loss(Coded(logits, bits, rate), batch), plain + price * 2.5)


def test_a_loss_without_what_it_needs_says_so():
    logits = torch.zeros(2, 3)
    with pytest.raises(ModelError, match="train by distillation"):
        cross_entropy()(logits, Batch(torch.zeros(2), None))
    with pytest.raises(ModelError, match="unmodified network's logits"):
        distillation()(logits, Batch(torch.zeros(2), torch.zeros(2, dtype=torch.long)))
    with pytest.raises(ModelError, match="a network with a unit"):
        rate_distortion(cross_entropy(), (0.1,))(logits, Batch(torch.zeros(2), torch.zeros(2, dtype=torch.long)))
