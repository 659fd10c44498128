"""What training minimises.  Distillation, rate-distortion and joint exits are losses, never trainers.

A loss sees what the model returned and the batch it was given:

    loss(outputs, batch) -> scalar tensor, the mean over the batch
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Batch(NamedTuple):
    """Inputs (N, C, H, W) as the network takes them, and classes (N,) int64."""

    inputs: Tensor
    labels: Tensor


Loss = Callable[[Any, Batch], Tensor]


def cross_entropy(*, smoothing: float = 0.0) -> Loss:
    """Cross-entropy of logits (N, K); `smoothing` in [0, 1) moves that share of each target to all classes alike.

    Label smoothing as in Szegedy et al., 2016 (arXiv:1512.00567, section 7).
    """

    def loss(outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.float(), batch.labels, label_smoothing=smoothing)

    return loss
