"""Networks by name, or by a user's own `package.module:factory`, with weights from safetensors.

`ZOO` is the registry: adding a network is adding a line.  Nothing is downloaded, ever.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ModelError, WeightsError
from ..factory import call_factory, import_object, is_factory
from ..plan import Preprocess
from .nets_branch import CifarGoogLeNet, SqueezeNet, VisionTransformer
from .nets_chain import CifarVGG16, MobileNetV2
from .nets_resnet import (
    BottleneckBlock,
    CifarResNet,
    CifarResNet18,
    ImageResNet,
    SceneResNet,
    TorchvisionBasicBlock,
)

IMAGENET = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SYMMETRIC = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""TensorFlow's pixels / 127.5 - 1."""


class ZooEntry(NamedTuple):
    """How to make a network, the (C, H, W) it takes, and how pictures become its input."""

    factory: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]
    num_classes: int
    preprocess: Preprocess


class LoadedModel(NamedTuple):
    """A network in evaluation mode; shape (C, H, W) and preprocess are None for a user's own factory."""

    name: str
    module: nn.Module
    input_shape: tuple[int, int, int] | None
    preprocess: Preprocess | None


_SMALL, _SCENE, _LARGE = (3, 32, 32), (3, 64, 64), (3, 224, 224)

ZOO: dict[str, ZooEntry] = {
    "resnet20": ZooEntry(partial(CifarResNet, 20), _SMALL, 10, IMAGENET),
    "resnet32": ZooEntry(partial(CifarResNet, 32), _SMALL, 10, IMAGENET),
    "resnet56": ZooEntry(partial(CifarResNet, 56), _SMALL, 10, IMAGENET),
    "resnet18": ZooEntry(CifarResNet18, _SMALL, 10, IMAGENET),
    "resnet18-half": ZooEntry(partial(CifarResNet18, width=32), _SMALL, 10, IMAGENET),
    "resnet18-224": ZooEntry(partial(ImageResNet, TorchvisionBasicBlock, (2, 2, 2, 2)), _LARGE, 1000, IMAGENET),
    "resnet50": ZooEntry(partial(ImageResNet, BottleneckBlock, (3, 4, 6, 3)), _LARGE, 1000, IMAGENET),
    "vgg16": ZooEntry(CifarVGG16, _SMALL, 10, IMAGENET),
    "mobilenetv2": ZooEntry(MobileNetV2, _LARGE, 1000, IMAGENET),
    "mobilenetv2-tf": ZooEntry(partial(MobileNetV2, is_tensorflow=True), _LARGE, 1000, SYMMETRIC),
    "squeezenet1_1": ZooEntry(SqueezeNet, _LARGE, 1000, IMAGENET),
    "googlenet": ZooEntry(CifarGoogLeNet, _SMALL, 10, IMAGENET),
    "vit-tiny": ZooEntry(VisionTransformer, _SMALL, 10, IMAGENET),
    "scene-resnet": ZooEntry(SceneResNet, _SCENE, 10, SYMMETRIC),
}


def build_model(source: str, *, weights: Path | None = None) -> LoadedModel:
    """The network that `source` names, in evaluation mode, with `weights` where given (else freshly drawn).

    Args:
        source: a name of `ZOO`, or `package.module:factory`: a function (or class) without arguments that
            returns an nn.Module, looked for in the current folder and the environment.
        weights: a safetensors file of the network's state; half-precision values become float32.

    Raises:
        ModelError: an unknown name, a module that cannot be imported, or a factory that gives something else.
        WeightsError: the file is missing, is not safetensors, or does not fit the network.
    """
    if source in ZOO:
        entry = ZOO[source]
        loaded = LoadedModel(source, entry.factory(), entry.input_shape, entry.preprocess)
    elif is_factory(source):
        loaded = LoadedModel(source, _own_module(source), None, None)
    else:
        raise ModelError(_unknown(source))
    if weights is not None:
        load_weights(loaded.module, weights, name=source)
    loaded.module.eval()
    return loaded


def _own_module(source: str) -> nn.Module:
    made = import_object(source, error=ModelError)
    if not isinstance(made, nn.Module):
        made = call_factory(source, error=ModelError)
    if not isinstance(made, nn.Module):
        raise ModelError(f'"{source}" must give a torch.nn.Module, it gave a {type(made).__name__}')
    return made


def _unknown(source: str) -> str:
    near = difflib.get_close_matches(source, ZOO, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the zoo has {', '.join(ZOO)};"
    return f'unknown model "{source}": {hint} (an own one is given as package.module:factory)'


def load_weights(module: nn.Module, path: Path, *, name: str) -> None:
    """Fill `module` with the tensors of a safetensors file, all of them, cast to the module's types.

    The counters of batch norms (`num_batches_tracked`) may be absent: nothing of inference reads them.

    Raises:
        WeightsError: the file is missing, is not safetensors, or lacks, exceeds or misshapes a tensor.
    """
    if not path.is_file():
        raise WeightsError(f'no weights at {path} (model "{name}")')
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise WeightsError(f'{path} is not a safetensors file: {error} (model "{name}")') from error
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {_shape(state[key])}, must be {_shape(value)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    for what, keys in (
        ("are missing", missing),
        ("are not the network's", unexpected),
        ("have another shape", shapes),
    ):
        if keys:
            listed = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            raise WeightsError(f'{len(keys)} of {len(own)} tensors {what}: {listed} (weights {path}, model "{name}")')
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def weights_digest(module: nn.Module) -> str:
    """Hex sha256 over the names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()
