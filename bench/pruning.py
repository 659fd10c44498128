"""Pruning on CIFAR-10: networks trained, pruned in two steps, and measured cut by cut.

    python -m bench.pruning train NAME...    vgg16, resnet18-half as kept in zoo/trained, or trained on; resnet18
    python -m bench.pruning build JOB...     a job of bench/jobs: prune, series, search
    python -m bench.pruning cuts JOB         every network that was made, cut by cut: bytes, times, accuracy
    python -m bench.pruning cells [shaped]   chosen plans over the shaped link: device alone, upload, divided
    python -m bench.pruning keep JOB NETWORK    one of a job's pruned networks into zoo/pruned, 16 bits a weight

Raw logs go to docs/results/raw/pruning; `python -m bench.pruning_results` makes the page of them.
"""

from __future__ import annotations

import fnmatch
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from coinfer.build.evaluate import loss_of, proportion_ci, spare_threads, top1
from coinfer.build.job import Job
from coinfer.build.make import build
from coinfer.build.predict import features_of
from coinfer.bundle import Ancestry
from coinfer.codec import available_coders, calibrate, make_codec
from coinfer.compress.batches import as_inputs
from coinfer.compress.pruned_file import load_pruned
from coinfer.compress.recipes import CIFAR, train_on_cifar10
from coinfer.compress.recipes import top1 as share_right
from coinfer.compress.train import Schedule, load_tensors, save_tensors
from coinfer.data import Images, Source, load_source
from coinfer.engine.measure import allowed_cores, measure_interleaved, pinned
from coinfer.engine.onnx import Session
from coinfer.model.export import Whole, cut_onnx, load_whole
from coinfer.model.zoo import build_model, weights_digest
from coinfer.plan import CodecSpec
from coinfer.report.results import write_raw
from coinfer.search.goal import LOSS_TOLERANCE

from .cells import OUT, Study, job_of, measure, note_commit, note_machine, show
from .epochs import Epochs, say
from .packed import pack, unpack

RAW = Path("docs/results/raw/pruning")
WEIGHTS = Path("out/pruning")
KEPT = Path("zoo/trained")
PRUNED = Path("zoo/pruned")
GIVEN = Path("../shared/data/weights")
# What a network learns from as well as the labels: another one's answers.
GIVEN_TEACHER = ("resnet56", GIVEN / "cifar10_resnet56.safetensors")
WIDE = "resnet18"


class Phase(NamedTuple):
    """One schedule of a training, and whose answers it learns from."""

    schedule: Schedule
    teacher: tuple[str, Path] = GIVEN_TEACHER


class Training(NamedTuple):
    """Where a network begins (None: from nothing), and the phases by which it is trained on, one after the other.

    One that is not kept in KEPT is too large for zoo/.
    """

    start: Path | None
    phases: tuple[Phase, ...]
    is_kept: bool = True


TRAININGS = {
    "vgg16": Training(
        GIVEN / "cifar10_vgg16_warm_fp16.safetensors", (Phase(CIFAR), Phase(CIFAR._replace(epochs=12, lr=0.03)))
    ),
    WIDE: Training(None, (Phase(CIFAR._replace(epochs=40, lr=0.1)),), is_kept=False),
    "resnet18-half": Training(
        GIVEN / "cifar10_resnet18_half_warm_fp16.safetensors",
        (
            Phase(CIFAR._replace(epochs=16)),
            Phase(CIFAR._replace(epochs=32), teacher=(WIDE, WEIGHTS / f"{WIDE}.safetensors")),
        ),
    ),
}
SLIM = "resnet18-slim"
JOBS = ("vgg16-pruned", "vgg16-narrow", "vgg16-shaped", SLIM, "resnet20-pruned")
# The rates of the paper's links in bits a second (137.5, 200 and 731 kB/s), and how much slower its devices are.
RATES_BPS = (1.1e6, 1.6e6, 5.848e6)
SLOWDOWNS = (5.0, 10.0)
# Slower ones on both sides, where a split of the pruned network could still win.
SLOWER = ((1e5, 100.0), (3e5, 100.0), (1e5, 300.0), (3e5, 300.0))
STUDY = Study("vgg16-pruned", (*((rate, slow) for slow in SLOWDOWNS for rate in RATES_BPS), *SLOWER), RAW)
# The paper's six alone, with the unpruned network's splits beside the networks in zoo/pruned.
SHAPED = Study("vgg16-shaped", STUDY.cells[: len(RATES_BPS) * len(SLOWDOWNS)], RAW)
REPEATS, WHOLE_REPEATS = 21, 105
BATCH = 250
CALIBRATION = 512


def train(name: str) -> None:
    """The network in WEIGHTS, from its file in KEPT; where there is none, trained on from the weights given and kept.

    The last lines say how good the network is, and how good it is as it is kept.
    """
    file = f"{name}.safetensors"
    final, kept = WEIGHTS / file, (KEPT if TRAININGS[name].is_kept else WEIGHTS / "packed") / file
    if not kept.is_file():
        told = {"recipe": f"python -m bench.pruning train {name}", "seed": "0"}
        save_tensors(pack(load_tensors(_trained(name), "trained network")[0]), kept, metadata=told)
    save_tensors(unpack(load_tensors(kept, "trained network")[0]), final)
    model, images = build_model(name, weights=final), load_source("cifar10").images("validation")
    assert model.preprocess is not None
    accuracy = share_right(model.module, images.pixels, images.labels, model.preprocess)
    say(f"{final}, of {kept}: {100 * accuracy:.2f} % of the pictures that choices are made on")


def _trained(name: str) -> Path:
    """Train a network on, schedule after schedule; goes on where it was stopped."""
    start, phases, _ = TRAININGS[name]
    for place, phase in enumerate(phases, 1):
        trained = WEIGHTS / f"{name}.trained{place}.safetensors"
        if not trained.is_file():
            accuracy = train_on_cifar10(
                name, trained, start=start, teacher=phase.teacher, schedule=phase.schedule, progress=Epochs()
            )
            say(f"{trained}: {100 * accuracy:.2f} % of the pictures that choices are made on")
        start = trained
    return trained


class Made(NamedTuple):
    """A network of a finished build: its name, how it was made, its whole fp32 segment."""

    name: str
    ancestry: Ancestry
    whole: Whole

    @property
    def step(self) -> str:
        """`original`, `step 1`, or `step 2`."""
        if self.ancestry.base is None:
            return "original"
        return "step 2" if self.ancestry.pruned[-1]["recipe"]["budget"] == "channels" else "step 1"


def made_by(job: str) -> list[Made]:
    """The networks of a job's workshop, the unmodified one first; those with units are left out."""
    folder = OUT / f"{job}.work"
    known = msgspec.json.decode((folder / "networks.json").read_bytes(), type=dict[str, Ancestry])
    return [
        Made(name, ancestry, load_whole(folder / "segments" / f"{name}.fp32.onnx"))
        for name, ancestry in known.items()
        if ancestry.unit is None
    ]


def measure_cuts(job: str) -> None:
    """Cut by cut: what crosses, how long both sides take, how good it is; of the networks of each step.

    Every network on the images that choices are made on; of each cut the original, the last of step 1 and the narrowest
    of step 2 within the goal's loss there on the test images as well.
    """
    wanted = job_of(job)
    source = load_source(wanted.data.source)
    networks = made_by(job)
    original, *rest = networks
    series = [network for network in rest if network.step == "step 2"]
    bases = {network.ancestry.base for network in series}
    # Of several networks of step 1 the one that step 2 begins with.
    *_, last = sorted((n for n in rest if n.step == "step 1"), key=lambda network: network.name in bases)
    lines: list[dict[str, Any]] = []
    reference = _right(original.whole, source.images("validation"))
    with tempfile.TemporaryDirectory() as scratch:
        bench = _CutBench(source, Path(scratch), wanted.prune.cuts)
        for network in (original, last, *series):
            for line in bench.lines(network, "validation", reference):
                lines.append(line)
                show("cuts", len(lines), 0, f"{network.name} {line['cut']}")
        test = _right(original.whole, source.images("test"))
        for network, cut in _reported(lines, networks, wanted.goal.max_loss):
            lines += bench.lines(network, "test", test, only=cut)
            show("cuts on test images", len(lines), 0, f"{network.name} {cut}")
    wide = _wide_right(source) if job == SLIM else None
    lines += _wholes([original, *(n for n in rest if n.step == "step 1")], source, wanted, wide)
    log = f"{job}.cuts"
    note_commit(RAW, log)
    note_machine(RAW, log)
    write_raw(RAW / f"{log}.jsonl.gz", lines)


def _reported(lines: Sequence[dict[str, Any]], networks: Sequence[Made], max_loss: float) -> Iterator[tuple[Made, str]]:
    by_name = {network.name: network for network in networks}
    for cut in dict.fromkeys(line["cut"] for line in lines):
        here = [line for line in lines if line["cut"] == cut]
        for step in ("original", "step 1"):
            yield from ((by_name[line["network"]], cut) for line in here if line["step"] == step)
        fine = [x for x in here if x["step"] == "step 2" and x["loss_points"] <= max_loss + LOSS_TOLERANCE]
        if fine:
            yield by_name[min(fine, key=lambda line: line["elements"])["network"]], cut


def _wide_right(source: Source) -> NDArray[np.bool_] | None:
    """Which test images the network of full width gets right, where it was trained."""
    weights = WEIGHTS / f"{WIDE}.safetensors"
    if not weights.is_file():
        say(f"{weights} was not trained: losses are counted against the half width alone")
        return None
    model, images = build_model(WIDE, weights=weights), source.images("test")
    assert model.preprocess is not None
    parts = (as_inputs(images.pixels[i : i + BATCH], model.preprocess) for i in range(0, len(images), BATCH))
    with torch.inference_mode():
        found = [model.module(part).argmax(1).numpy() for part in parts]
    right: NDArray[np.bool_] = np.concatenate(found) == images.labels
    return right


def _wholes(
    networks: Sequence[Made], source: Source, job: Job, wide: NDArray[np.bool_] | None = None
) -> Iterator[dict[str, Any]]:
    """Whole networks on the test images, and their times side by side on one thread.

    `wide`: which of these a wider network gets right, that they are measured against as well.
    """
    images = source.images("test")
    pixels = images.pixels[:1]
    sessions = {network.name: Session(network.whole.path) for network in networks}
    with pinned(next(iter(allowed_cores()), None)):
        times = measure_interleaved(
            {name: (lambda session=session: session.run([pixels])) for name, session in sessions.items()},
            warmup=10, repeats=WHOLE_REPEATS,
        )  # fmt: skip
    reference = _right(networks[0].whole, images)
    for network in networks:
        right = reference if network is networks[0] else _right(network.whole, images)
        yield {
            "network": network.name, "base": network.ancestry.base, "step": network.step, "cut": None, "part": "test",
            "whole_s": times[network.name].median_s, "whole_p5_s": times[network.name].p5_s,
            "whole_p95_s": times[network.name].p95_s, "file_bytes": network.whole.path.stat().st_size,
            "whole": features_of(network.whole.path), "parameters": _parameters(network, job, source),
            **_scored(reference, right), **({} if wide is None else _against_wide(wide, right)),
        }  # fmt: skip


def _against_wide(wide: NDArray[np.bool_], right: NDArray[np.bool_]) -> dict[str, float]:
    loss, loss_ci = loss_of(wide, right)
    return {
        "wide_accuracy": 100 * float(np.mean(wide)), "wide_loss_points": loss, "wide_loss_ci_points": loss_ci,
    }  # fmt: skip


def _parameters(network: Made, job: Job, source: Source) -> int:
    """Of the network in torch, its batch norms not folded."""
    module = build_model(job.model.source, weights=Path(job.model.weights) if job.model.weights else None).module
    if network.ancestry.base is not None:
        path = network.whole.path.parent.parent / "pruned" / f"{network.name}.safetensors"
        height, width, channels = source.shape
        example = (torch.zeros(1, channels, height, width),)
        module = load_pruned(path, module, example, network=weights_digest(module)).module
    return sum(weight.numel() for weight in module.parameters())


class _CutBench:
    """Measures networks at cuts that fit one of some patterns."""

    def __init__(self, source: Source, scratch: Path, patterns: Sequence[str]) -> None:
        self._source, self._scratch, self._patterns = source, scratch, patterns
        self._calibration = source.drawn("train", CALIBRATION).pixels

    def lines(
        self, network: Made, part: str, reference: NDArray[np.bool_], *, only: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """One line for each cut of this network; of a member of a series at its own cuts."""
        for name in (cut.name for cut in network.whole.cuts):
            is_wanted = any(fnmatch.fnmatchcase(name, p) for p in self._patterns) if only is None else name == only
            if is_wanted and self._is_for(network, name):
                yield self._line(network, name, part, reference)

    def _is_for(self, network: Made, cut: str) -> bool:
        if network.step != "step 2":
            return True
        mine, before = (self._channels(n, cut) for n in (network, self._base(network)))
        return mine < before

    def _base(self, network: Made) -> Made:
        folder = network.whole.path.parent
        base = str(network.ancestry.base)
        return network._replace(name=base, whole=load_whole(folder / f"{base}.fp32.onnx"))

    @staticmethod
    def _channels(network: Made, cut: str) -> int:
        return network.whole.cut(cut).specs[0].shape[0]

    def _line(self, network: Made, name: str, part: str, reference: NDArray[np.bool_]) -> dict[str, Any]:
        images = self._source.images(part)
        cut = network.whole.cut(name)
        head, tail = (self._scratch / f"{side}.onnx" for side in ("head", "tail"))
        cut_onnx(network.whole, name, head=head, tail=tail)
        quick = [Session(path, threads=spare_threads()) for path in (head, tail)]
        coder = "range" if "range" in available_coders() else "rans"
        spec = CodecSpec(transform="uniform", coder=coder, bits=8, per_channel=True)
        known = [quick[0].run([self._calibration[i : i + BATCH]])[0] for i in range(0, CALIBRATION, BATCH)]
        codec = make_codec(spec, cut.specs, calibrate(spec, cut.specs, [np.concatenate(known)]))
        right: list[NDArray[np.bool_]] = []
        sizes: list[NDArray[np.float64]] = []
        assert images.labels is not None
        for i in range(0, len(images), BATCH):
            restored, num_bytes = codec.roundtrip(quick[0].run([images.pixels[i : i + BATCH]]))
            right.append(top1(quick[1].run(restored)) == images.labels[i : i + BATCH])
            sizes.append(num_bytes)
        line = {
            "network": network.name, "base": network.ancestry.base, "step": network.step, "cut": name, "part": part,
            "filters": cut.specs[0].shape[0], "elements": cut.specs[0].num_elements,
            "coded_bytes": float(np.mean(np.concatenate(sizes))),
            **_scored(reference, np.concatenate(right)),
        }  # fmt: skip
        if part == "validation":
            line |= {"head": features_of(head), "tail": features_of(tail), **self._times(head, tail)}
        return line

    def _times(self, head: Path, tail: Path) -> dict[str, float]:
        sessions = {"head_s": Session(head), "tail_s": Session(tail)}
        picture = self._calibration[:1]
        given = {"head_s": [picture], "tail_s": list(sessions["head_s"].run([picture]))}
        calls = {name: (lambda name=name: sessions[name].run(given[name])) for name in sessions}
        with pinned(next(iter(allowed_cores()), None)):
            return {name: timing.median_s for name, timing in measure_interleaved(calls, repeats=REPEATS).items()}


def _right(whole: Whole, images: Images) -> NDArray[np.bool_]:
    """Which pictures a whole network gets right."""
    session = Session(whole.path, threads=spare_threads())
    found = [top1(session.run([images.pixels[i : i + BATCH]])) for i in range(0, len(images), BATCH)]
    return np.concatenate(found) == images.labels


def _scored(reference: NDArray[np.bool_], right: NDArray[np.bool_]) -> dict[str, Any]:
    loss, loss_ci = loss_of(reference, right)
    return {
        "n": len(right), "accuracy": 100 * float(np.mean(right)), "accuracy_ci": proportion_ci(right),
        "loss_points": loss, "loss_ci_points": loss_ci,
    }  # fmt: skip


def cells(study: Study) -> None:
    """The cells of the paper's links and devices, measured."""
    measure(study)
    note_machine(RAW, study.name)


def keep(job: str, network: str) -> None:
    """One of a job's pruned networks, kept: weights of two and more dimensions in 16 bits."""
    state, told = load_tensors(OUT / f"{job}.work" / "pruned" / f"{network}.safetensors", "pruned network")
    half = {name: value.half() if value.ndim > 1 else value for name, value in state.items()}
    save_tensors(half, PRUNED / f"{network}.safetensors", metadata=told)


def _build(job: str) -> None:
    build(job_of(job), OUT / job, progress=show)


def main(words: list[str]) -> None:
    """Run one step."""
    named: dict[str, tuple[Callable[[str], None], Sequence[str]]] = {
        "train": (train, tuple(TRAININGS)),
        "build": (_build, JOBS),
        "cuts": (measure_cuts, JOBS),
    }
    if words in (["cells"], ["cells", "shaped"]):
        cells(STUDY if len(words) == 1 else SHAPED)
        return
    if words[:1] == ["keep"] and len(words) == 3 and words[1] in JOBS:
        keep(*words[1:])
        return
    if len(words) < 2 or words[0] not in named or not set(words[1:]) <= set(named[words[0]][1]):
        known = "; ".join(f"{word} {'|'.join(names)}" for word, (_, names) in named.items())
        raise SystemExit(f"usage: python -m bench.pruning cells [shaped], keep JOB NETWORK, or {known}")
    for name in words[1:]:
        named[words[0]][0](name)


if __name__ == "__main__":
    main(sys.argv[1:])
