"""What training minimises.  Distillation, rate-distortion and joint exits are losses, never trainers.

A loss sees what the model returned and the batch it was given:

    loss(outputs, batch) -> scalar tensor, the mean over the batch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError
from ..model.graph import first_of


class Batch(NamedTuple):
    """What a step is made of.

    `inputs` are what the model takes: pictures (N, C, H, W), or features at a cut.  `labels` are classes (N,)
    int64, `teacher` the logits (N, K) of the unmodified network, `features` what crosses a cut of it; each is None
    where nobody gives it.
    """

    inputs: Tensor
    labels: Tensor | None
    teacher: Tensor | None = None
    features: Tensor | None = None


class Coded(NamedTuple):
    """What a network with a unit gives in training: logits (N, K), bits of each sample (N,), the rate they are of.

    Where the tail was left out there are no logits, but the restored features.
    """

    logits: Tensor | None
    bits: Tensor
    rate: int
    restored: Tensor | None = None


Loss = Callable[[Any, Batch], Tensor]


def logits_of(outputs: Any) -> Tensor:
    """The logits (N, K) float32 of what a model returned, a unit in it or not; of several outputs the first."""
    given = outputs.logits if isinstance(outputs, Coded) else first_of(outputs)
    if given is None:
        raise ModelError("this loss needs the network's answers, and its tail was left out")
    return given.float()


def cross_entropy(*, smoothing: float = 0.0) -> Loss:
    """Cross-entropy of logits (N, K); `smoothing` in [0, 1) moves that share of each target to all classes alike.

    Label smoothing as in Szegedy et al., 2016 (arXiv:1512.00567, section 7).
    """

    def loss(outputs: Any, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise ModelError("cross-entropy needs labels, the batches have none: train by distillation")
        return F.cross_entropy(logits_of(outputs), batch.labels, label_smoothing=smoothing)

    return loss


def distillation(*, temperature: float = 2.0, label_share: float = 0.0) -> Loss:
    """T^2 KL(teacher || student) of logits over T, in nats; `label_share` of the loss is cross-entropy with labels.

    Hinton et al., 2015 (arXiv:1503.02531).  Without a share no labels are needed.
    """
    labelled = cross_entropy()

    def loss(outputs: Any, batch: Batch) -> Tensor:
        if batch.teacher is None:
            raise ModelError("distillation needs the unmodified network's logits, the batches have none")
        student = F.log_softmax(logits_of(outputs) / temperature, dim=1)
        teacher = F.log_softmax(batch.teacher.float() / temperature, dim=1)
        error = temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return error if label_share == 0 else (1 - label_share) * error + label_share * labelled(outputs, batch)

    return loss


def imitation(scale: float = 10.0) -> Loss:
    """The squared error of restored features, as a share of their variance, times `scale` (nats).

    The first stage of Matsubara et al., 2022 (arXiv:2108.11898, section 4.2): a light head learns to give what the
    network's own layers give, before anything behind it is run.
    """

    def loss(outputs: Any, batch: Batch) -> Tensor:
        if not isinstance(outputs, Coded) or outputs.restored is None or batch.features is None:
            raise ModelError("imitation needs restored features, and the network's own beside them")
        wanted = batch.features.float()
        return scale * F.mse_loss(outputs.restored.float(), wanted) / wanted.var().clamp_min(1e-12)

    return loss


def rate_distortion(distortion: Loss, prices: Sequence[float]) -> Loss:
    """`distortion` + prices[rate] x bits / 1000: what a thousand bits a sample may cost at each rate.

    Balle et al., 2017 (arXiv:1611.01704): the Lagrangian of accuracy under a budget of bits.
    """

    def loss(outputs: Any, batch: Batch) -> Tensor:
        if not isinstance(outputs, Coded):
            raise ModelError("a rate-distortion loss needs a network with a unit in it")
        return distortion(outputs, batch) + prices[outputs.rate] * outputs.bits.mean() / 1000

    return loss
