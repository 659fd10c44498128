"""How weights of built-in networks are made, and made again.

python -m coinfer.compress.recipes scene-resnet -o zoo/scene_resnet.safetensors
python -m coinfer.compress.recipes vgg16 --start WEIGHTS -o vgg16.safetensors      (any network of CIFAR-10's size)
python -m coinfer.compress.recipes vgg16 --teacher resnet56 --teacher-weights WEIGHTS -o vgg16.safetensors
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data import load_source
from ..data.digits import SCENE_SIZE, compose_scenes
from ..errors import CoinferError, JobError, ModelError
from ..model.graph import first_of
from ..model.zoo import ZOO, build_model, weights_digest
from ..plan import Preprocess
from .batches import Augment, PictureBatches, Views, as_inputs, seen_by
from .hardware import training_device
from .losses import cross_entropy, distillation
from .train import Schedule, Step, fit, load_tensors, save_tensors

CLOSE_UPS = Schedule(lr=0.1, epochs=12)
SCENES = Schedule(lr=0.05, epochs=5)
CIFAR = Schedule(lr=0.05, epochs=18)
# What a teacher is asked about, and how much of the loss stays with the labels.
TAUGHT, LABEL_SHARE = Views(mixes=1), 0.3


def train_scene_resnet(
    out: Path,
    *,
    close_ups: Schedule = CLOSE_UPS,
    scenes: Schedule = SCENES,
    seed: int = 0,
    progress: Callable[[str, Step], None] | None = None,
) -> float:
    """Train `scene-resnet` on `scene-digits`, write its weights to `out`; top-1 on the validation part, 0 to 1.

    In two phases, because from whole scenes alone nothing is learnt for a long time (the digit is a tenth of the
    picture): first on close-ups of 32 x 32, a quarter of the work, then on the scenes themselves.  Pictures
    are shifted by up to 4 pixels, never mirrored; label smoothing 0.1.  A stopped training goes on from the
    checkpoints beside `out`, which are removed at the end.  `progress` is told the phase and the step.

    Raises:
        ModelError: the loss became NaN or infinite.
        WeightsError: a checkpoint beside `out` is of another schedule.
    """
    torch.manual_seed(seed)
    entry = ZOO["scene-resnet"]
    model = entry.factory().to(training_device())
    checkpoints = []
    for phase, size, schedule in (("close-ups", 32, close_ups), ("scenes", SCENE_SIZE, scenes)):
        train = compose_scenes("train", size=size)
        augment = Augment(shift=4, views=Views(is_mirrored=False))
        batches = PictureBatches(train.pixels, train.labels, entry.preprocess, augment=augment, seed=seed)
        checkpoints.append(out.with_name(f"{out.stem}.{phase}.checkpoint.safetensors"))
        loss = cross_entropy(smoothing=0.1)
        report = None if progress is None else partial(progress, phase)
        fit(model, batches, loss, schedule=schedule, checkpoint=checkpoints[-1], progress=report, seed=seed)
    validation = compose_scenes("validation")
    accuracy = top1(model, validation.pixels, validation.labels, entry.preprocess)
    save_tensors(model.state_dict(), out, metadata={"recipe": "scene-resnet", "seed": str(seed)})
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)
    return accuracy


def train_on_cifar10(
    network: str,
    out: Path,
    *,
    start: Path | None = None,
    teacher: tuple[str, Path] | None = None,
    schedule: Schedule = CIFAR,
    seed: int = 0,
    data_dir: Path | None = None,
    progress: Callable[[str, Step], None] | None = None,
) -> float:
    """Train a network of the zoo on CIFAR-10 with its labels, write its weights to `out`; top-1 on the choice part.

    From `start` where it is given, else from nothing; pictures are mirrored and shifted by up to 4 pixels, label
    smoothing 0.1.  With a `teacher`, another network of the zoo and its weights, most of the loss is the distance to
    its answers, to mixed pictures as well (`Views`).  A stopped training goes on from what it keeps beside `out`, a
    checkpoint and the teacher's answers, which are removed at the end.

    Raises:
        ModelError: a network is not for pictures of 3 x 32 x 32, or the loss became NaN or infinite.
        DataError: CIFAR-10 is not at hand.
        WeightsError: weights do not fit, or the checkpoint beside `out` is of another training.
    """
    torch.manual_seed(seed)
    model, preprocess = _for_cifar10(network, start)
    source = load_source("cifar10", data_dir=data_dir)
    train = source.images("train")
    loss, augment, logits = cross_entropy(smoothing=0.1), Augment(), None
    checkpoint, answers = (out.with_name(f"{out.stem}.{kind}.safetensors") for kind in ("checkpoint", "answers"))
    key = "from nothing" if start is None else hashlib.sha256(start.read_bytes()).hexdigest()
    if teacher is not None:
        loss, augment = distillation(label_share=LABEL_SHARE), Augment(views=TAUGHT)
        logits, taught = _answers(teacher, train.pixels, answers)
        key = f"{key}, taught by {taught}"
    batches = PictureBatches(train.pixels, train.labels, preprocess, augment=augment, seed=seed, teacher=logits)
    fit(
        model.to(training_device()), batches, loss,
        schedule=schedule,
        checkpoint=checkpoint,
        progress=None if progress is None else partial(progress, network),
        seed=seed,
        key=key,
    )  # fmt: skip
    validation = source.images("validation")
    accuracy = top1(model, validation.pixels, validation.labels, preprocess)
    save_tensors(model.state_dict(), out, metadata={"recipe": f"cifar10 {network}", "seed": str(seed)})
    for kept in (checkpoint, answers):
        kept.unlink(missing_ok=True)
    return accuracy


def _for_cifar10(network: str, weights: Path | None) -> tuple[nn.Module, Preprocess]:
    loaded = build_model(network, weights=weights)
    if loaded.input_shape != (3, 32, 32) or loaded.preprocess is None:
        raise ModelError(f'"{network}" is not for pictures of 3 x 32 x 32: it takes {loaded.input_shape}')
    return loaded.module, loaded.preprocess


def _answers(teacher: tuple[str, Path], pixels: NDArray[np.uint8], path: Path) -> tuple[Tensor, str]:
    """A teacher's logits (V, N, K), kept in `path`; and what stands for them, its digest and the views."""
    module, preprocess = _for_cifar10(*teacher)
    key = f"{teacher[0]} {weights_digest(module)} {TAUGHT}"
    if path.is_file():
        kept, metadata = load_tensors(path, "answers of a teacher")
        if metadata.get("key") == key:
            return kept["logits"], key
    logits = seen_by(module, pixels, preprocess, TAUGHT)
    save_tensors({"logits": logits}, path, metadata={"key": key})
    return logits, key


def top1(
    model: nn.Module,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    preprocess: Preprocess,
    *,
    batch_size: int = 250,
) -> float:
    """Share of pictures (N, H, W, C) whose largest logit is their label, 0 to 1; NaN without labels.

    Of several outputs the first is what is classified.
    """
    if labels is None:
        return float("nan")
    device = next(model.parameters()).device
    model.eval()
    hits = 0
    with torch.inference_mode():
        for first in range(0, len(pixels), batch_size):
            part = slice(first, first + batch_size)
            logits = first_of(model(as_inputs(pixels[part], preprocess).to(device)))
            hits += int((logits.argmax(1).cpu().numpy() == labels[part]).sum())
    return hits / len(pixels)


def _log(phase: str, step: Step) -> None:
    if step.step % 50 == 0 or step.step == step.steps:
        right = "" if step.accuracy is None else f", {100 * step.accuracy:.1f} % right"
        seen = f"loss {step.loss:.3f}{right}, rate {step.lr:.4f}"
        sys.stderr.write(f"{phase}: step {step.step} of {step.steps}, {seen}\n")


def main(
    network: str,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the weights go (safetensors).")],
    start: Annotated[Path | None, typer.Option(help="Weights to begin with, on CIFAR-10.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A network to learn from as well, on CIFAR-10.")] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Its weights.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs, on CIFAR-10.")] = CIFAR.epochs,
    lr: Annotated[float, typer.Option(help="Highest learning rate, on CIFAR-10.")] = CIFAR.lr,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Another seed gives another network.")] = 0,
) -> None:
    """Train a network of the zoo by the project's own recipe."""
    torch.set_num_threads(threads)
    try:
        if network == "scene-resnet":
            accuracy = train_scene_resnet(out, seed=seed, progress=_log)
        else:
            if (teacher is None) != (teacher_weights is None):
                raise JobError("a teacher needs its weights: give --teacher and --teacher-weights, or neither")
            learnt = None if teacher is None or teacher_weights is None else (teacher, teacher_weights)
            accuracy = train_on_cifar10(
                network, out, start=start, teacher=learnt, schedule=CIFAR._replace(epochs=epochs, lr=lr), seed=seed,
                progress=_log,
            )  # fmt: skip
    except CoinferError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(error.exit_code) from error
    sys.stdout.write(f"{out}: top-1 {100 * accuracy:.2f} % on the validation part\n")


if __name__ == "__main__":
    typer.run(main)
