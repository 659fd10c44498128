"""The networks of a job, exported and ready to be cut: what every later step of a build stands on.

A workshop is a folder that a build keeps beside its bundle.  It holds each network once, in fp32 and
int8, as a whole ONNX file; heads, tails and static tables are cut and calibrated from there on demand, so that
any candidate can be assembled later.  Exports are keyed by the weights, so a second build finds them done.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from .. import __version__
from ..bundle import Ancestry
from ..compress.batches import as_planes
from ..compress.bottleneck import Unit
from ..compress.divided import Deployable, Rate, behind_reduction, codecs_of
from ..compress.exit_file import export_exit
from ..compress.exits import ExitHead
from ..compress.int8 import quantize_onnx
from ..compress.pruned_file import Stage
from ..compress.unit_file import Trained
from ..data import Images, Source, load_source
from ..engine.onnx import Session
from ..errors import DataError, JobError
from ..model.export import DeployedCut, Whole, cut_onnx, export_onnx, load_whole, middle_onnx
from ..model.graph import TOLERANCE, Graph, capture, first_of
from ..model.tap import tap_onnx
from ..model.zoo import IMAGENET, build_model, weights_digest
from ..plan import Preprocess, TensorSpec
from .divisions import other_cuts
from .evaluate import BATCH, spare_threads
from .job import Job, weights_of_smaller
from .progress import Progress, quiet

FEATURE_BYTES = 500_000_000
INT8_PICTURES = 128


@dataclass(frozen=True)
class Network:
    """One network of the job: its whole segments by precision, and how it was made.

    `cuts` are the names of those where it may be divided (None: all that the job admits; none of a smaller rival).  One
    with a unit in it is cut behind the unit's reduction and nowhere else.  `classifiers` are exits by their cuts.
    """

    ancestry: Ancestry
    wholes: dict[str, Whole]
    cuts: tuple[str, ...] | None = None
    unit: Unit | None = None
    classifiers: dict[str, ExitHead] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As plans name it."""
        return self.ancestry.name

    @property
    def runs_whole(self) -> bool:
        """Whether it is for one machine alone as well, not for a cut of its own."""
        return not self.cuts

    @property
    def is_divided(self) -> bool:
        """Whether it is for two machines."""
        return self.cuts is None or len(self.cuts) > 0

    def rates(self, precision: str) -> list[Rate]:
        """The codec and tables of each rate of the unit, finest first; none without one."""
        if self.unit is None:
            return []
        (cut,) = self.wholes[precision].cuts
        if not cut.scales:
            return codecs_of(self.unit, cut.specs[0])
        return codecs_of(self.unit, cut.specs[0], scale=cut.scales[0], zero_point=cut.zero_points[0])


@dataclass
class Workshop:
    """Networks, pictures and a folder; `main` is the unmodified network that losses are counted against.

    `notes` are lines for the build's log.
    """

    job: Job
    folder: Path
    source: Source
    preprocess: Preprocess
    networks: dict[str, Network]
    main: str
    calibration: NDArray[np.uint8]
    validation: Images
    module: torch.nn.Module
    notes: list[str] = field(default_factory=list)

    @cached_property
    def graph(self) -> Graph:
        """The unmodified network, captured.

        Raises:
            CaptureError: it cannot be.
        """
        height, width, channels = self.source.shape
        return capture(self.module, torch.zeros((2, channels, height, width)))

    @property
    def main_sha256(self) -> str:
        """Of the unmodified network's weights."""
        return self.networks[self.main].ancestry.weights_sha256

    def add(
        self,
        name: str,
        module: torch.nn.Module,
        *,
        base: str | None = None,
        stages: Sequence[Stage] = (),
        cuts: tuple[str, ...] | None = None,
    ) -> Network:
        """Export a network in the job's precisions, or find it exported; it is one of `networks` from now on.

        Args:
            name: of which no other network of the workshop may be.
            module: in evaluation mode.
            base: the network that it was made of, by these `stages` of pruning.
            cuts: where it may be divided, see `Network`.

        Raises:
            JobError: there is one of this name.
            ExportError: it cannot be exported.
        """
        name = safe_name(name)
        if name in self.networks:
            raise JobError(f'two networks of the job are named "{name}"')
        pruned = tuple(msgspec.to_builtins(stage) for stage in stages)
        ancestry = Ancestry(name=name, weights_sha256=weights_digest(module), base=base, pruned=pruned)
        wholes = _exported(self, name, module, ancestry.weights_sha256, is_divided=cuts is None)
        self.networks[name] = Network(ancestry, wholes, cuts)
        return self.networks[name]

    def add_unit(self, base: str, trained: Trained) -> Network:
        """The network `base` with a unit in it; its one cut has the name of the cut where the unit is."""
        spec = trained.divided.unit.spec
        same = sum(network.name.split("-")[0] == f"{base}.{spec.name}" for network in self.networks.values())
        name = f"{base}.{spec.name}" + (f"-{same + 1}" if same else "")
        module = Deployable(trained.divided)
        found = _exported(self, name, module, weights_digest(module))
        wholes = {}
        for precision, whole in found.items():
            # A precision in which nothing can be cut there, as where int8 fused the reduction away, has no such plan.
            for cut in (cut for cut in whole.cuts if cut.name == behind_reduction(spec)):
                named = msgspec.structs.replace(cut, name=trained.cut.name)
                wholes[precision] = msgspec.structs.replace(whole, cuts=(named,))
        *before, recipe = (msgspec.to_builtins(recipe) for recipe in trained.recipes)
        unit = {"cut": trained.cut.name, "spec": msgspec.to_builtins(spec), "recipe": recipe, "before": before}
        of = self.networks[base].ancestry.pruned
        ancestry = Ancestry(name=name, weights_sha256=weights_digest(module), base=base, pruned=of, unit=unit)
        self.networks[name] = Network(ancestry, wholes, (trained.cut.name,), trained.divided.unit)
        return self.networks[name]

    @property
    def input(self) -> TensorSpec:
        """The picture that a request brings."""
        return self.networks[self.main].wholes["fp32"].input

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The network's output tensors."""
        return self.networks[self.main].wholes["fp32"].outputs

    def whole(self, network: str, precision: str) -> Whole:
        """One network as one segment."""
        return self.networks[network].wholes[precision]

    def cuts(self, network: str, precision: str) -> list[DeployedCut]:
        """The deployable cuts that the job's patterns admit, in order."""
        cuts, own = self.whole(network, precision).cuts, self.networks[network].cuts
        if own is not None:
            return [cut for cut in cuts if cut.name in own]
        return [cut for cut in cuts if any(fnmatch.fnmatchcase(cut.name, p) for p in self.job.build.cuts)]

    def segments(self, network: str, precision: str, cut: str) -> tuple[str, str]:
        """File names of a cut's head and tail below the folder; cut on first use."""
        stem = f"segments/{network}.{precision}.{cut_file_name(cut)}"
        head, tail = f"{stem}.head.onnx", f"{stem}.tail.onnx"
        if not ((self.folder / head).is_file() and (self.folder / tail).is_file()):
            (self.folder / "segments").mkdir(exist_ok=True)
            whole = self.whole(network, precision)
            cut_onnx(whole, cut, head=self.folder / head, tail=self.folder / tail)
        return head, tail

    def between(self, network: str, precision: str, before: str | None, after: str | None) -> str:
        """File name of the segment between two cuts (None: the input, the outputs); cut on first use."""
        if before is None or after is None:
            if before is None and after is None:
                return self.whole_name(network, precision)
            return self.segments(network, precision, str(after or before))[before is not None]
        parts = f"{network}.{precision}.{cut_file_name(before)}.{cut_file_name(after)}"
        name = f"segments/{parts}.middle.onnx"
        if not (self.folder / name).is_file():
            (self.folder / "segments").mkdir(exist_ok=True)
            middle_onnx(self.whole(network, precision), before, after, self.folder / name)
        return name

    def classifier(self, network: str, precision: str, cut: str) -> str:
        """File name of an exit's classifier, written on first use: it takes what crosses the cut in this precision."""
        head, place = self.networks[network].classifiers[cut], self.whole(network, precision).cut(cut)
        digest = weights_digest(head)[:8]
        name = f"segments/{network}.{precision}.{cut_file_name(cut)}.{digest}.exit.onnx"
        if not (self.folder / name).is_file():
            (self.folder / "segments").mkdir(exist_ok=True)
            path, (value,) = self.folder / name, place.specs
            export_exit(head, value, path, scales=place.scales, zero_points=place.zero_points)
        return name

    def whole_name(self, network: str, precision: str) -> str:
        """File name of a whole network below the folder."""
        return f"segments/{network}.{precision}.onnx"

    def keep_segments(self, names: set[str]) -> None:
        """Remove parts of networks that are none of these; they are cut again where they are asked for."""
        for pattern in ("*.head.onnx", "*.tail.onnx", "*.middle.onnx", "*.exit.onnx"):
            for path in (self.folder / "segments").glob(pattern):
                if f"segments/{path.name}" not in names:
                    path.unlink()

    def features(
        self, network: str, precision: str, cuts: list[DeployedCut], pixels: NDArray[np.uint8]
    ) -> Iterator[tuple[DeployedCut, list[NDArray[np.generic]]]]:
        """What crosses at each of `cuts` for all pictures: arrays (N, *shape), one list a cut.

        The network runs once for as many cuts as fit into memory together; what is larger alone lies in files.
        """
        whole = self.whole(network, precision)
        groups: list[list[DeployedCut]] = [[]]
        budget = 0
        for cut in cuts:
            size = _num_bytes(cut, len(pixels))
            if groups[-1] and budget + size > FEATURE_BYTES:
                groups.append([])
                budget = 0
            groups[-1].append(cut)
            budget += size
        for group in filter(None, groups):
            specs = {spec.name: spec for cut in group for spec in cut.specs}
            tapped = self.folder / f"tapped.{network}.{precision}.onnx"
            tap_onnx(whole, list(specs.values()), tapped)
            session = Session(tapped, threads=spare_threads())
            is_in_files = len(group) == 1 and _num_bytes(group[0], len(pixels)) > FEATURE_BYTES
            values = {name: self._room(spec, len(pixels), is_in_files) for name, spec in specs.items()}
            for i in range(0, len(pixels), BATCH):
                for name, part in zip(specs, session.run([pixels[i : i + BATCH]]), strict=True):
                    values[name][i : i + len(part)] = part
            del session
            tapped.unlink()
            for cut in group:
                yield cut, [values[spec.name] for spec in cut.specs]

    def _room(self, spec: TensorSpec, count: int, is_in_file: bool) -> NDArray[np.generic]:
        shape, dtype = (count, *spec.shape), np.dtype(spec.dtype)
        if not is_in_file:
            return np.empty(shape, dtype)
        # The file has no name: it goes when the array goes, however the build ends.
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


def _num_bytes(cut: DeployedCut, pictures: int) -> int:
    return pictures * sum(spec.num_bytes for spec in cut.specs)


def cut_file_name(cut: str) -> str:
    """A cut's name as part of a file name; cuts that differ only in other signs differ in their digest."""
    is_plain = re.fullmatch(r"[A-Za-z0-9.]+(#\d+)?", cut) is not None
    return safe_name(cut) if is_plain else f"{safe_name(cut)}.{hashlib.sha256(cut.encode()).hexdigest()[:6]}"


def safe_name(name: str) -> str:
    """A network's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")


def prepare(job: Job, folder: Path, *, progress: Progress = quiet, data_dir: Path | None = None) -> Workshop:
    """Load the pictures, capture and export every network of the job in fp32 and int8.

    Raises:
        CoinferError: a model, its weights or the data are missing or do not fit each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "segments").mkdir(exist_ok=True)
    names = [job.model.source, *job.model.smaller]
    progress("networks", 0, len(names), job.model.source)
    weights = Path(job.model.weights) if job.model.weights else None
    loaded = {job.model.source: build_model(job.model.source, weights=weights)}
    for name in job.model.smaller:
        loaded[name] = build_model(name, weights=weights_of_smaller(job, name))
    main = loaded[job.model.source]
    size = job.data.size or (None if main.input_shape is None else main.input_shape[1:])
    data = job.data
    preprocess = main.preprocess or IMAGENET
    if job.model.mean is not None and job.model.std is not None:
        preprocess = Preprocess(mean=job.model.mean, std=job.model.std)
    channels = len(preprocess.mean)
    source = load_source(
        data.source, data_dir=data_dir, size=size, channels=channels, holdout=data.holdout, labels=data.labels
    )
    _check_channels(job, source, preprocess)
    calibration = source.drawn("train", job.build.calibration_images).pixels
    main_name = safe_name(job.model.source)
    validation = source.drawn("validation", job.build.rounds[-1])
    if len(validation) == 0:
        raise DataError(f'no validation images to choose on (data "{source.name}")')
    workshop = Workshop(job, folder, source, preprocess, {}, main_name, calibration, validation, main.module)
    for done, (name, model) in enumerate(loaded.items()):
        progress("networks", done, len(names), name)
        workshop.add(name, model.module, cuts=None if name == job.model.source else ())
    progress("networks", len(names), len(names), "")
    _check_cuts(job, workshop.networks[main_name])
    return workshop


def _check_cuts(job: Job, main: Network) -> None:
    names = [cut.name for whole in main.wholes.values() for cut in whole.cuts]
    for pattern in job.build.cuts:
        # A network that can be cut nowhere may still run on either machine.
        if pattern != "*" and not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise JobError(
                f'[build] cuts "{pattern}" is no deployable cut of "{main.name}"; near are {", ".join(near)}'
            )


def _check_channels(job: Job, source: Source, preprocess: Preprocess) -> None:
    channels = source.shape[-1]
    if len(preprocess.mean) != channels or len(preprocess.std) != channels:
        raise JobError(
            f'[model] mean and std have {len(preprocess.mean)} values, pictures of "{job.data.source}" '
            f"have {channels} channels"
        )


def _exported(
    workshop: Workshop, name: str, module: torch.nn.Module, weights_sha256: str, *, is_divided: bool = False
) -> dict[str, Whole]:
    """A network as whole segments by precision, from the files of an earlier build where they are the same.

    `is_divided`: it is to be cut anywhere, and where no prefix of its layers ends.
    """
    is_divided = is_divided and workshop.job.build.divisions
    folder, source, preprocess = workshop.folder, workshop.source, workshop.preprocess
    calibration, precisions = workshop.calibration, workshop.job.build.precisions
    pictures = hashlib.sha256(np.ascontiguousarray(calibration).tobytes()).hexdigest()
    versions = [__version__, *(f"{name} {metadata.version(name)}" for name in ("torch", "onnx", "onnxruntime"))]
    recipe = f"{weights_sha256} {source.name} {source.shape} {preprocess} {pictures} {type(module)} {versions}"
    key = hashlib.sha256((recipe + " divided" * is_divided).encode()).hexdigest()
    wholes: dict[str, Whole] = {}
    key_file = folder / f"{name}.key"
    fp32, int8 = folder / f"segments/{name}.fp32.onnx", folder / f"segments/{name}.int8.onnx"
    is_known = key_file.is_file() and key_file.read_text() == key and fp32.is_file()
    if is_known and _is_same(module, fp32, preprocess, calibration):
        wholes["fp32"] = load_whole(fp32)
        if "int8" in precisions and int8.is_file():
            wholes["int8"] = load_whole(int8)
            return wholes
    else:
        example = torch.zeros((2, source.shape[-1], *source.shape[:2]))
        for precision in ("fp32", "int8"):
            for stale in (folder / "segments").glob(f"{name}.{precision}.*"):
                stale.unlink()
        graph = capture(module, example)
        if is_divided:
            graph = graph.with_cuts(other_cuts(graph))
        wholes["fp32"] = export_onnx(graph, fp32, preprocess=preprocess)
    if "int8" in precisions:
        wholes["int8"] = quantize_onnx(wholes["fp32"], calibration[:INT8_PICTURES], int8)
    key_file.write_text(key)
    return wholes


def _is_same(module: torch.nn.Module, exported: Path, preprocess: Preprocess, pictures: NDArray[np.uint8]) -> bool:
    """Whether the exported network still answers as the module does: its code may have changed, not its weights."""
    with torch.no_grad():
        given = module(as_planes(pictures[:1], preprocess))
    wanted = first_of(given).numpy()
    got = Session(exported).run([pictures[:1]])[0]
    return wanted.shape == got.shape and bool(np.abs(wanted - got).max() <= TOLERANCE * np.abs(wanted).max())
