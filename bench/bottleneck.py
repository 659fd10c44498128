"""Learned bottlenecks of networks on CIFAR-10: units trained and kept in zoo/units, and what they do.

    python -m bench.bottleneck train NAME...    units of UNITS, in the background: each goes on where it was stopped
    python -m bench.bottleneck show NAME...     what finished ones send and keep at each rate, on validation images
    python -m bench.bottleneck prior [NAME...]  the same on the test images; of all of them, and exactness at full width
    python -m bench.bottleneck curves           every picture over the link by every unit, picture codec, plain split
    python -m bench.bottleneck cells            the main job's cells with units among the candidates

Training takes minutes (`last`) to an hour (`light`) on two cores; CUDA is used where there is one.  Raw logs go to
docs/results/raw/bottleneck; `python -m bench.bottleneck_results` makes the page of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from coinfer.build.make import build
from coinfer.build.wanted import light_width
from coinfer.build.workshop import safe_name
from coinfer.compress.batches import as_inputs
from coinfer.compress.bottleneck import UnitSpec
from coinfer.compress.divided import Divided, insert_unit
from coinfer.compress.unit_file import load_unit, save_unit
from coinfer.compress.unit_training import UnitRecipe, UnitTraining, rates_of
from coinfer.data import Images, Source, load_source
from coinfer.model.graph import Graph, first_of
from coinfer.model.zoo import LoadedModel, weights_digest
from coinfer.report.results import read_raw, write_raw

from .cells import OUT, Study, job_of, measure, note_commit, show
from .curves import measure_curves
from .epochs import Epochs, say
from .trainees import CHECKPOINTS, RESNET18, RESNET56, SCENES, Trainee, network, taught

UNITS_FOLDER = Path("zoo/units")
LIGHT_SHARE = 0.1


class Order(NamedTuple):
    """A unit to train: where, of what shape (a light head's width is found from its share), how.

    `more`: how the finished unit is trained on; `is_kept`: in zoo/, not for a comparison alone.
    """

    cut: str
    spec: UnitSpec
    recipe: UnitRecipe
    light_share: float = 0.0
    trainee: Trainee = RESNET56
    more: UnitRecipe | None = None
    is_kept: bool = True


GAINS = (1.0, 1.6, 2.6, 4.2)
UNITS = {
    "last": Order(
        "layer3.8#0",
        UnitSpec(width=16, stride=8, bits=5, gains=(1.0, 1.5, 2.2, 3.3), is_rectified=True),
        UnitRecipe(alone=8, together=4, prices=(0.05, 0.15, 0.5, 1.5)),
    ),
    "late": Order(
        "layer3.3#0",
        UnitSpec(width=32, stride=2, bits=5, gains=GAINS, prepare=1, refine=1, is_rectified=True),
        UnitRecipe(alone=4, together=8, prices=(0.05, 0.15, 0.5, 1.5)),
    ),
    "middle": Order(
        "layer2.8#0",
        UnitSpec(width=48, stride=4, bits=5, gains=GAINS, prepare=1, refine=1, is_rectified=True),
        UnitRecipe(
            alone=3, together=4, whole=6, anew=7, prices=(0.1, 0.25, 0.5, 1.2), whole_lr=8e-4, anew_lr=4e-4,
            network_share=0.25,
        ),
        more=UnitRecipe(
            alone=0, together=0, anew=12, prices=(0.1, 0.3, 0.55, 1.2), anew_lr=4e-4, network_share=0.25, seed=1
        ),
    ),
    "early": Order(
        "layer1.0#0",
        UnitSpec(width=32, stride=4, bits=5, gains=GAINS, prepare=2, refine=1, is_rectified=True),
        UnitRecipe(
            alone=0, together=0, whole=24, anew=13, prices=(0.05, 0.15, 0.3, 0.7), whole_lr=8e-4, anew_lr=4e-4,
            network_share=0.25,
        ),
        more=UnitRecipe(
            alone=0, together=0, anew=12, prices=(0.05, 0.2, 0.35, 0.7), anew_lr=4e-4, network_share=0.25, seed=1
        ),
    ),
    "light": Order(
        "layer2.8#0",
        UnitSpec(width=16, stride=2, bits=5, gains=GAINS, refine=2, is_rectified=True),
        UnitRecipe(
            alone=4, together=50, prices=(0.05, 0.2, 0.6, 1.8), together_lr=2e-3,
            temperature=4.0, weight_decay=0.05,
        ),
        light_share=LIGHT_SHARE,
    ),
    "scenes-early": Order(
        "layer1.1#0",
        UnitSpec(width=24, stride=4, bits=5, gains=GAINS, refine=1, is_rectified=True),
        UnitRecipe(alone=6, together=30, prices=(0.03, 0.1, 0.3, 1.0), together_lr=1e-3),
        trainee=SCENES,
    ),
    "scenes-middle": Order(
        "layer2.1#0",
        UnitSpec(width=24, stride=4, bits=5, gains=GAINS, refine=1, is_rectified=True),
        UnitRecipe(alone=6, together=30, prices=(0.03, 0.1, 0.3, 1.0), together_lr=1e-3),
        trainee=SCENES,
    ),
    "scenes-late": Order(
        "layer3.1#0",
        UnitSpec(width=16, stride=8, bits=5, gains=GAINS, is_rectified=True),
        UnitRecipe(alone=6, together=30, prices=(0.05, 0.15, 0.5, 1.5), together_lr=1e-3),
        trainee=SCENES,
    ),
    "half-last": Order(
        "layer4.1#0",
        UnitSpec(width=16, stride=4, bits=5, gains=(1.0, 1.5, 2.2, 3.3), is_rectified=True),
        UnitRecipe(alone=8, together=0, prices=(0.05, 0.15, 0.5, 1.5)),
        trainee=RESNET18,
    ),
    "half-late": Order(
        "layer3.1#0",
        UnitSpec(width=32, stride=2, bits=5, gains=GAINS, prepare=1, refine=1, is_rectified=True),
        UnitRecipe(alone=4, together=0, prices=(0.05, 0.15, 0.5, 1.5)),
        trainee=RESNET18,
    ),
    "half-middle": Order(
        "layer2.1#0",
        UnitSpec(width=48, stride=4, bits=5, gains=GAINS, prepare=1, refine=1, is_rectified=True),
        UnitRecipe(alone=4, together=0, prices=(0.1, 0.25, 0.5, 1.2)),
        trainee=RESNET18,
    ),
    "half-early": Order(
        "layer1.0#0",
        UnitSpec(width=32, stride=4, bits=5, gains=GAINS, prepare=2, refine=1, is_rectified=True),
        UnitRecipe(alone=3, together=0, prices=(0.05, 0.15, 0.3, 0.7)),
        trainee=RESNET18,
    ),
}  # fmt: skip
# `late` at one rate alone, each price with its own training: what a unit of four rates is compared with.
LATE = UNITS["late"]
UNITS |= {
    f"late-only{rate}": LATE._replace(
        spec=msgspec.structs.replace(LATE.spec, gains=(gain,)),
        recipe=msgspec.structs.replace(LATE.recipe, prices=(price,)),
        is_kept=False,
    )
    for rate, (gain, price) in enumerate(zip(LATE.spec.gains, LATE.recipe.prices, strict=True))
}
# BottleNet's training through JPEG, for comparison; its bytes are not part of the loss.
UNITS |= {
    f"middle-jpeg{quality}": Order(
        "layer2.8#0",
        UnitSpec(width=8, stride=2, bits=8, refine=1, is_rectified=True, jpeg=quality),
        UnitRecipe(alone=4, together=6, prices=(0.0,), together_lr=1e-3),
        is_kept=False,
    )
    for quality in (20, 80)
}


# The units that the page of results is made with, by network; each has a job "NETWORK-rates".
FINISHED = {
    RESNET56.name: ("last", "late", "middle", "early"),
    RESNET18.name: ("half-last", "half-late", "half-middle", "half-early"),
}
TRAINEES = {trainee.name: trainee for trainee in (RESNET56, RESNET18)}
# The grid that a split's share is counted on: 30 kbit/s to 30 Mbit/s, slowdown 3 to 300.
GRID_RATES = tuple(float(f"{rate:.3g}") for rate in np.geomspace(30e3, 30e6, 13))
GRID_SLOWDOWNS = tuple(float(f"{slow:.3g}") for slow in np.geomspace(3, 300, 9))
# Measured of it: the band where the estimated map has a split in front, and on both sides of it.
BAND = {53.3: GRID_RATES[6:8], 94.9: GRID_RATES[4:7], 169.0: GRID_RATES[3:6], 300.0: GRID_RATES[2:5]}
BESIDE = {
    53.3: GRID_RATES[3:4],
    94.9: GRID_RATES[2:3] + GRID_RATES[7:8],
    169.0: GRID_RATES[7:8],
    300.0: GRID_RATES[6:7],
}
STUDY = Study(
    "resnet56-units",
    tuple((rate, slowdown) for slowdown, rates in BAND.items() for rate in sorted((*rates, *BESIDE[slowdown]))),
    Path("docs/results/raw/bottleneck"),
)
RAW = STUDY.raw


def path_of(name: str) -> Path:
    """Where a finished unit lies."""
    network = UNITS[name].trainee.name.replace("-", "_")
    folder = UNITS_FOLDER if UNITS[name].is_kept else CHECKPOINTS / "compared"
    return folder / f"{network}.{name.removeprefix('scenes-').removeprefix('half-')}.safetensors"


def train(name: str) -> None:
    """Train one unit and keep it; one that is there already is only trained on."""
    order = UNITS[name]
    model, graph = network(order.trainee)
    source = load_source(order.trainee.source)
    cut, spec = graph.cut(order.cut), order.spec
    if order.light_share:
        width = light_width(cut, graph, spec, order.light_share)
        print(f"light head of width {width}", flush=True)
        spec = msgspec.structs.replace(spec, head_width=width)
    teacher = taught(order.trainee, graph, source, model)
    path, sha = path_of(name), weights_digest(model.module)
    recipes = [order.recipe] if order.more is None else [order.recipe, order.more]
    trained = load_unit(path, graph, network=sha) if path.is_file() else None
    if trained is not None and list(trained.recipes) != recipes[: len(trained.recipes)]:
        raise SystemExit(f"{path} was trained by another recipe: remove it to train it anew")
    for place in range(0 if trained is None else len(trained.recipes), len(recipes)):
        training = UnitTraining(
            graph, cut, spec, teacher, recipes[place],
            trained=None if trained is None else trained.divided,
            checkpoints=CHECKPOINTS / name,
            progress=Epochs(),
        )  # fmt: skip
        for phase in (training.alone, training.together, training.whole, training.anew):
            phase()
        save_unit(training.divided, graph, cut, path, network=sha, recipes=recipes[: place + 1])
        trained = load_unit(path, graph, network=sha)
        _show(trained.divided, source, model)


def show_rates(name: str) -> None:
    """What a finished unit sends and keeps."""
    trainee = UNITS[name].trainee
    model, graph = network(trainee)
    unit = load_unit(path_of(name), graph, network=weights_digest(model.module))
    _show(unit.divided, load_source(trainee.source), model)


def prior() -> None:
    """Bytes by the prior of each unit that was trained, and top-1, in torch, on the test images; and exactness.

    Units for comparison are not kept in zoo/: the lines of one that is not at hand stay as they were measured.
    """
    for name in UNITS:
        if UNITS[name].trainee.name in TRAINEES and path_of(name).is_file():
            prior_of(name)
    exactness: list[dict[str, object]] = []
    for trainee in TRAINEES.values():
        model, graph = network(trainee)
        exactness += _exactness(trainee, graph, load_source(trainee.source).images("test"), model)
    write_raw(RAW / "exactness.jsonl.gz", exactness)


def prior_of(name: str) -> None:
    """The lines of one unit, in place of those that were there."""
    path, trainee = RAW / "prior.jsonl.gz", UNITS[name].trainee
    say(f"prior of {name}")
    model, graph = network(trainee)
    unit = load_unit(path_of(name), graph, network=weights_digest(model.module))
    variant = f"{safe_name(trainee.name)}.{unit.divided.unit.spec.name}"
    named = {"unit": name, "variant": variant, "cut": unit.cut.name}
    points = rates_of(unit.divided, load_source(trainee.source).images("test"), model.preprocess)
    before = read_raw(path) if path.is_file() else []
    kept = [line for line in before if line["unit"] in UNITS and line["unit"] != name]
    note_commit(RAW, "prior")
    write_raw(path, [*kept, *({**named, **point._asdict()} for point in points)])


def _exactness(trainee: Trainee, graph: Graph, images: Images, model: LoadedModel) -> Iterator[dict[str, object]]:
    """A unit of full width and 8 bits, begun and not trained, at each cut that has a trained one."""
    begun = as_inputs(load_source(trainee.source).images("validation").pixels[:250], model.preprocess)
    for cut_name in dict.fromkeys(UNITS[name].cut for name in FINISHED[trainee.name]):
        cut = graph.cut(cut_name)
        divided = insert_unit(graph, cut, UnitSpec(width=cut.specs[0].shape[0], bits=8))
        with torch.no_grad():
            divided.unit.start_from(first_of(divided.head(begun)))
        right = {"network": 0, "unit": 0}
        for first in range(0, len(images), 250):
            inputs = as_inputs(images.pixels[first : first + 250], model.preprocess)
            with torch.no_grad():
                features = first_of(divided.head(inputs))
                restored, _ = divided.unit(features)
                for key, given in (("network", features), ("unit", restored)):
                    answers = divided.tail(given).argmax(1).numpy()
                    right[key] += int((answers == images.labels[first : first + 250]).sum())
        say(f"exactness {trainee.name} {cut_name}: {right}")
        shares = {key: 100 * value / len(images) for key, value in right.items()}
        yield {"trainee": trainee.name, "cut": cut_name, "n": len(images), **shares}


def curves() -> None:
    """Every test picture over the link, network by network, where its units are trained."""
    for name, units in FINISHED.items():
        missing = [unit for unit in units if not path_of(unit).is_file()]
        if missing:
            say(f"{name}: no curves without {', '.join(missing)}")
        else:
            measure_curves(f"{name}-rates", RAW)


def cells() -> None:
    """Build with units among the candidates, then measure the cells."""
    build(job_of(STUDY.name), OUT / STUDY.name, progress=show)
    measure(STUDY)


def _show(divided: Divided, source: Source, model: LoadedModel) -> None:
    images = source.images("validation")
    for point in rates_of(divided, images, model.preprocess):
        say(f"rate {point.rate}: {point.num_bytes:.1f} B, {point.accuracy:.2f} % of {point.num_images}")


def main(words: list[str]) -> None:
    """Run one step."""
    named: dict[str, Callable[[str], None]] = {"train": train, "show": show_rates, "prior": prior_of}
    plain: dict[str, Callable[[], None]] = {
        "prior": prior,
        "curves": curves,
        "cells": cells,
    }
    if len(words) == 1 and words[0] in plain:
        plain[words[0]]()
        return
    if len(words) < 2 or words[0] not in named or not set(words[1:]) <= set(UNITS):
        usage = f"{'|'.join(plain)}, or {'|'.join(named)} {'|'.join(UNITS)}..."
        raise SystemExit(f"usage: python -m bench.bottleneck {usage}")
    for name in words[1:]:
        named[words[0]](name)


if __name__ == "__main__":
    main(sys.argv[1:])
