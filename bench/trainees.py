"""Networks that the benches train something for, and what those trainings learn from: the networks' own answers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from coinfer.compress.batches import Views
from coinfer.compress.train import save_tensors
from coinfer.compress.unit_training import Teacher, teacher_of
from coinfer.data import Source
from coinfer.model.graph import Graph, capture
from coinfer.model.zoo import LoadedModel, build_model, weights_digest

from .epochs import say

CHECKPOINTS = Path("out/units")


class Trainee(NamedTuple):
    """A network that something is trained for: its weights, its data, and the views of them that suit it."""

    name: str
    weights: Path
    source: str
    views: Views


RESNET56 = Trainee("resnet56", Path("../shared/data/weights/cifar10_resnet56.safetensors"), "cifar10", Views(mixes=1))
RESNET20 = Trainee("resnet20", Path("../shared/data/weights/cifar10_resnet20.safetensors"), "cifar10", Views(mixes=1))
RESNET18 = Trainee(
    "resnet18-half",
    Path("../shared/data/weights/cifar10_resnet18_half_warm_fp16.safetensors"),
    "cifar10",
    Views(mixes=1),
)
SCENES = Trainee(
    "scene-resnet", Path("zoo/scene_resnet.safetensors"), "scene-digits", Views(is_mirrored=False, mixes=1)
)


def network(trainee: Trainee = RESNET56) -> tuple[LoadedModel, Graph]:
    """The network with its weights, captured."""
    model = build_model(trainee.name, weights=trainee.weights)
    assert model.input_shape is not None
    return model, capture(model.module, torch.zeros(2, *model.input_shape))


def taught(trainee: Trainee, graph: Graph, source: Source, model: LoadedModel) -> Teacher:
    """The network's own answers to all views of the training pictures: minutes, so they are kept."""
    images, views = source.images("train"), trainee.views
    given = hashlib.sha256(repr((weights_digest(model.module), views)).encode()).hexdigest()
    kept = CHECKPOINTS / f"{trainee.name}.answers.{given[:12]}.safetensors"
    if not kept.is_file():
        say(f"the network's own answers to {views.num_views} views of {len(images)} pictures")
        teacher = teacher_of(graph, images, model.preprocess, views)
        save_tensors({"logits": teacher.logits}, kept)
    return Teacher(images, model.preprocess, views, load_file(kept)["logits"], graph.module)
