"""What all trainings of a job share: the unmodified network's answers, and how good a network made of it is."""

from __future__ import annotations

import copy
import time
from functools import cached_property

import torch
from torch import nn

from ..compress.batches import Views, as_inputs, seen_by
from ..compress.hardware import training_device
from ..compress.recipes import top1
from ..compress.unit_training import Teacher, teacher_of
from ..data import Images, Source
from ..model.graph import Graph, first_of
from ..model.zoo import weights_digest
from ..plan import Preprocess
from .progress import Progress

# Pictures that a first guess of the pace of trainings is made on.
_PACED = 32


class Teachers:
    """The unmodified network as a teacher, and as what others are measured against.

    Args:
        module: the unmodified network.
        graph: its capture.
        source: its pictures.
        preprocess: how they become inputs.
        validation: those that choices are made on; without labels its own answers stand for them.
        progress: is told when its answers are computed.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: Graph,
        source: Source,
        preprocess: Preprocess,
        validation: Images,
        *,
        progress: Progress,
    ) -> None:
        self.module, self.graph, self.source, self.preprocess = module, graph, source, preprocess
        self.weights_sha256 = weights_digest(module)
        self._given, self._progress = validation, progress
        self._known: dict[tuple[int, Views], Teacher] = {}

    def of(self, images: int, views: Views) -> Teacher:
        """Its answers to all views of at most so many training pictures, computed once."""
        key = (images, views)
        if key not in self._known:
            drawn = self.source.drawn("train", images)
            self._progress("the network's own answers", 0, 1, f"{len(drawn)} pictures")
            self._known[key] = teacher_of(self.graph, drawn, self.preprocess, views)
            self._progress("the network's own answers", 1, 1, "")
        return self._known[key]

    @cached_property
    def validation(self) -> Images:
        """The pictures that choices are made on, with labels, or the unmodified network's answers for them."""
        if self._given.labels is not None:
            return self._given
        logits = seen_by(self.graph.module, self._given.pixels, self.preprocess, Views(is_mirrored=False))[0]
        return Images(self._given.pixels, logits.argmax(1).numpy())

    def accuracy(self, module: nn.Module) -> float:
        """Top-1 of a network on these, in percent."""
        moved = copy.deepcopy(module).to(training_device())
        return 100 * top1(moved, self.validation.pixels, self.validation.labels, self.preprocess)

    @cached_property
    def own_accuracy(self) -> float:
        """The unmodified network's."""
        return self.accuracy(self.graph.module)

    def seconds(self, passes: float, images: int) -> float:
        """What so many passes of the whole network over at most so many training pictures are expected to take."""
        return passes * len(self.source.drawn("train", images)) * self.picture_s

    @cached_property
    def picture_s(self) -> float:
        """Seconds that a training of the whole network takes for a picture: a first guess, from two steps."""
        device = training_device()
        module = copy.deepcopy(self.graph.module).to(device)
        inputs = as_inputs(self._given.pixels[:_PACED], self.preprocess).to(device)
        for _ in range(2):
            since_s = time.monotonic()
            first_of(module(inputs)).square().mean().backward()  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                torch.cuda.synchronize()
        return (time.monotonic() - since_s) / len(inputs)
