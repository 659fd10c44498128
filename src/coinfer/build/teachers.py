"""What all trainings of a job share: the unmodified network's answers, and how good a network made of it is."""

from __future__ import annotations

import copy
import hashlib
import time
from functools import cached_property
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from ..compress.batches import Views, as_inputs, seen_by
from ..compress.hardware import training_device
from ..compress.recipes import top1
from ..compress.train import load_tensors, save_tensors
from ..compress.unit_training import Teacher
from ..data import Images, Source
from ..model.graph import TOLERANCE, Graph, first_of
from ..model.zoo import weights_digest
from ..plan import Preprocess
from .progress import Progress

# Pictures that a first guess of the pace of trainings is made on, and that answers of an earlier build are checked on.
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
        folder: where its answers are kept for a build that goes on.
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
        folder: Path | None = None,
    ) -> None:
        self.module, self.graph, self.source, self.preprocess = module, graph, source, preprocess
        self.weights_sha256 = weights_digest(module)
        self._given, self._progress, self._folder = validation, progress, folder
        self._known: dict[tuple[int, Views], Teacher] = {}

    def of(self, images: int, views: Views) -> Teacher:
        """Its answers to all views of at most so many training pictures, computed once."""
        key = (images, views)
        if key not in self._known:
            drawn = self.source.drawn("train", images)
            logits = self._answers(drawn, views)
            self._known[key] = Teacher(drawn, self.preprocess, views, logits, self.graph.module)
        return self._known[key]

    def _answers(self, images: Images, views: Views) -> Tensor:
        """(V, N, K) logits, from the folder where they are this network's."""
        given = (self.weights_sha256, images.digest, self.preprocess, views)
        key = hashlib.sha256(msgspec.json.encode(given)).hexdigest()
        path = None if self._folder is None else self._folder / f"answers.{key[:12]}.safetensors"
        if path is not None and path.is_file():
            logits = load_tensors(path, "answers of the network")[0]["logits"]
            few = seen_by(self.graph.module, images.pixels[:_PACED], self.preprocess, views)
            # The network's code may have changed, not its weights.
            if torch.allclose(few, logits[:, :_PACED], rtol=TOLERANCE, atol=TOLERANCE * float(few.abs().max())):
                return logits
        self._progress("the network's own answers", 0, 1, f"{len(images)} pictures")
        logits = seen_by(self.graph.module, images.pixels, self.preprocess, views)
        if path is not None:
            save_tensors({"logits": logits}, path)
        self._progress("the network's own answers", 1, 1, "")
        return logits

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
