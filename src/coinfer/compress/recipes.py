"""How the weights in zoo/ were made, and how to make them again.

python -m coinfer.compress.recipes scene-resnet -o zoo/scene_resnet.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import nn

from ..data import load_source
from ..errors import CoinferError
from ..model.zoo import ZOO
from ..plan import Preprocess
from .batches import Augment, PictureBatches, as_inputs
from .losses import cross_entropy
from .train import Schedule, Step, fit, save_tensors

SCENE_SCHEDULE = Schedule(lr=0.2, epochs=12)


def train_scene_resnet(
    out: Path,
    *,
    schedule: Schedule = SCENE_SCHEDULE,
    seed: int = 0,
    progress: Callable[[Step], None] | None = None,
) -> float:
    """Train `scene-resnet` on `scene-digits`, write its weights to `out`; top-1 on the validation part, 0 to 1.

    12,000 scenes, shifted by up to 4 pixels, never mirrored; label smoothing 0.1.  A stopped training goes on
    from the checkpoint beside `out`, which is removed at the end.

    Raises:
        ModelError: the loss became NaN or infinite.
        WeightsError: the checkpoint beside `out` is of another schedule.
    """
    torch.manual_seed(seed)
    entry = ZOO["scene-resnet"]
    source = load_source("scene-digits")
    train, validation = source.images("train"), source.images("validation")
    augment = Augment(shift=4, is_mirrored=False)
    batches = PictureBatches(train.pixels, train.labels, entry.preprocess, augment=augment, seed=seed)
    model = entry.factory().to("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = out.with_name(f"{out.stem}.checkpoint.safetensors")
    loss = cross_entropy(smoothing=0.1)
    fit(model, batches, loss, schedule=schedule, checkpoint=checkpoint, progress=progress, seed=seed)
    accuracy = top1(model, validation.pixels, validation.labels, entry.preprocess)
    save_tensors(model.state_dict(), out, metadata={"recipe": "scene-resnet", "seed": str(seed)})
    checkpoint.unlink(missing_ok=True)
    return accuracy


def top1(
    model: nn.Module,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    preprocess: Preprocess,
    *,
    batch_size: int = 250,
) -> float:
    """Share of pictures (N, H, W, C) whose largest logit is their label, 0 to 1; NaN without labels."""
    if labels is None:
        return float("nan")
    device = next(model.parameters()).device
    model.eval()
    hits = 0
    with torch.inference_mode():
        for first in range(0, len(pixels), batch_size):
            part = slice(first, first + batch_size)
            logits = model(as_inputs(pixels[part], preprocess).to(device))
            hits += int((logits.argmax(1).cpu().numpy() == labels[part]).sum())
    return hits / len(pixels)


RECIPES: dict[str, Callable[..., float]] = {"scene-resnet": train_scene_resnet}


def _log(step: Step) -> None:
    if step.step % 93 == 0:
        sys.stderr.write(f"step {step.step}/{step.steps} loss {step.loss:.3f} rate {step.lr:.3f}\n")


def main(
    network: str,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the weights go (safetensors).")],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Another seed gives another network.")] = 0,
) -> None:
    """Train a network of the zoo by the project's own recipe."""
    if network not in RECIPES:
        sys.stderr.write(f'no recipe for "{network}": there is one for {", ".join(RECIPES)}\n')
        raise typer.Exit(2)
    torch.set_num_threads(threads)
    try:
        accuracy = RECIPES[network](out, seed=seed, progress=_log)
    except CoinferError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(error.exit_code) from error
    sys.stdout.write(f"{out}: top-1 {100 * accuracy:.2f} % on the validation part\n")


if __name__ == "__main__":
    typer.run(main)
