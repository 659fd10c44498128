"""The jobs of `coinfer demo`: the embedded default, and CIFAR-10 where the user has it."""

from __future__ import annotations

from pathlib import Path

from ..bundle import Bundle
from ..compress.recipes import train_scene_resnet
from ..compress.train import Step
from ..data import default_data_dir
from ..errors import WeightsError
from .job import Job
from .make import Exchange, build
from .progress import Progress, quiet
from .sections import BottleneckJob, BuildJob, DataJob, DeviceJob, ModelJob
from .workshop import safe_name

ZOO = Path(__file__).resolve().parents[3] / "zoo"
CIFAR_WEIGHTS = "weights/cifar10_resnet20.safetensors"
SLOWDOWN = 30.0
# Blocks' ends alone, and enough images to see the order of plans; a real job takes the defaults.
EFFORT = BuildJob(rounds=(100, 400), report_images=1000, cuts=("layer?.?#0",))


def demo(
    *,
    data: str,
    out: Path,
    retrain: bool = False,
    data_dir: Path | None = None,
    progress: Progress = quiet,
    exchange: Exchange | None = None,
) -> Bundle:
    """Build the demonstration's bundle at `out`.

    Args:
        data: "scene-digits" with our own scene-resnet, or "cifar10" with the given ResNet-20.
        out: where the bundle goes; the workshop lies beside it.
        retrain: train scene-resnet anew by its recipe (minutes) instead of taking zoo/'s weights.
        data_dir: where cifar10 and its weights lie.
        progress: is told how far it is.
        exchange: as in `build`.

    Raises:
        WeightsError: the network's weights are not there.
        DataError: the pictures are not there.
    """
    source, weights = (
        ("resnet20", _cifar_weights(data_dir)) if data == "cifar10" else ("scene-resnet", _scene_weights())
    )
    if retrain:
        weights = out.with_name("scene_resnet.safetensors")
        weights.parent.mkdir(parents=True, exist_ok=True)

        def tell(phase: str, step: Step) -> None:
            progress(f"training, {phase}", step.step, step.steps, f"loss {step.loss:.2f}")

        train_scene_resnet(weights, progress=tell)
    # Units fit the weights that they were trained for.
    units = () if retrain else tuple(str(file) for file in sorted((ZOO / "units").glob(f"{safe_name(source)}.*")))
    job = Job(
        model=ModelJob(source=source, weights=str(weights)),
        data=DataJob(source=data),
        device=DeviceJob(slowdown=SLOWDOWN),
        build=EFFORT,
        bottleneck=BottleneckJob(units=units),
    )
    return build(job, out, progress=progress, data_dir=data_dir, exchange=exchange)


def _scene_weights() -> Path:
    return ZOO / "scene_resnet.safetensors"


def _cifar_weights(data_dir: Path | None) -> Path:
    """The given weights: in the user's folder, else in the default one (official files come without weights)."""
    places = [place for place in (data_dir, default_data_dir()) if place is not None]
    for place in places:
        if (place / CIFAR_WEIGHTS).is_file():
            return place / CIFAR_WEIGHTS
    looked = ", ".join(str(place) for place in places) or "no folder given"
    raise WeightsError(
        f'no {CIFAR_WEIGHTS} (looked in {looked}): set DATA_DIR to a folder that has it (demo "cifar10")'
    )
