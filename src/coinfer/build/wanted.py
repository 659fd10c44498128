"""What a job's patterns ask for.

Units: cut by cut, share by share of a light head, stride by stride, width by width.  Series of ever fewer channels:
cut by cut.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterator
from itertools import product
from typing import NamedTuple

import msgspec
import torch

from ..compress.bottleneck import UnitSpec, check_unit
from ..compress.channels import Channels
from ..compress.divided import several_cross
from ..compress.encoder import width_for
from ..compress.series import crossing_groups
from ..compress.unit_training import UnitRecipe
from ..errors import CutError, JobError, ModelError
from ..model.cut import Cut, split
from ..model.graph import Graph
from .sections import BottleneckJob, usual_shift

# Steps of neighbouring rates differ by this factor at first: a price four times as high.
GAIN = 2.0


class Wanted(NamedTuple):
    """One unit that the job asks for; `bits_loss`: it takes the fewest bits that lose no more points against 8."""

    cut: Cut
    spec: UnitSpec
    recipe: UnitRecipe
    bits_loss: float | None = None


def wanted_units(job: BottleneckJob, graph: Graph) -> Iterator[Wanted]:
    """Cut by cut, width by width: what the job's section asks for.

    Raises:
        CutError: no such cut, one that several tensors cross, or one that the unit does not fit.
        JobError: a pattern that fits no cut where one tensor crosses and units of all widths and strides fit.
    """
    gains = tuple(GAIN**k for k in range(len(job.prices)))
    if job.cuts and graph.why_fixed_batch is not None:
        raise ModelError(f"training needs batches, but this network takes one at a time: {graph.why_fixed_batch}")
    for cut in _cuts(job, graph):
        (crossing,) = cut.specs
        is_rectified = _is_rectified(graph, cut)
        for share in job.light or (0.0,):
            for stride, width in product(job.strides, job.widths):
                spec = UnitSpec(
                    width=width,
                    stride=stride,
                    bits=8 if job.bits == "search" else job.bits,
                    gains=gains,
                    prepare=job.prepare,
                    refine=job.refine,
                    is_rectified=is_rectified,
                )
                check_unit(crossing, spec)
                if share:
                    spec = msgspec.structs.replace(spec, head_width=light_width(cut, graph, spec, share))
                alone, together, whole, anew = (*job.epochs, 0, 0, 0, 0)[:4]
                recipe = UnitRecipe(
                    alone=alone, together=together, whole=whole, anew=anew,
                    prices=job.prices, label_share=job.labels,
                    shift=usual_shift(min(graph.inputs[0].shape[1:])), seed=job.seed,
                )  # fmt: skip
                yield Wanted(cut, spec, recipe, job.bits_loss if job.bits == "search" else None)


def light_width(cut: Cut, graph: Graph, spec: UnitSpec, share: float) -> int:
    """Channels of the widest light head that takes, with the unit, at most `share` of the network's compute.

    Raises:
        CutError: what crosses is no map.
        ModelError: not even the smallest head is so light, or none ends at the code's size.
    """
    if len(cut.specs[0].shape) != 3:
        raise CutError(f'a light head ends in a map (C, H, W), at "{cut.name}" crosses {cut.specs[0].shape}')
    _, height, wide = cut.specs[0].shape
    picture, code = graph.inputs[0].shape, (height // spec.stride, wide // spec.stride)
    # Each of the blocks behind the reduction has two convolutions of 3 x 3.
    prepare = spec.prepare * 2 * 9 * spec.width**2 * code[0] * code[1]
    try:
        return width_for(picture, code, share * graph.num_macs - prepare, sent=spec.width)
    except ModelError as error:
        raise ModelError(f'{error} (cut "{cut.name}", {100 * share:g} % of {graph.num_macs})') from error


def _is_rectified(graph: Graph, cut: Cut) -> bool:
    """Whether nothing below 0 crosses, even of noise."""
    head, _ = split(graph, cut)
    with torch.no_grad():
        (features,) = head(*graph.example)
    return bool((features >= 0).all())


def _cuts(job: BottleneckJob, graph: Graph) -> list[Cut]:
    single = {cut.name: cut for cut in graph.cuts() if len(cut.specs) == 1}
    found: dict[str, Cut] = {}
    for pattern in job.cuts:
        names = fnmatch.filter(single, pattern)
        if is_pattern(pattern):
            fitting = {name: single[name] for name in names if _is_fit(single[name], job)}
            if not fitting:
                where = f"{len(single)} cuts that one tensor crosses where widths and strides fit"
                raise JobError(f'[bottleneck] cuts "{pattern}" fits none of the {where}')
            found |= fitting
        elif names:
            found |= {name: single[name] for name in names}
        else:
            # The name of a cut by another name, or of one that several tensors cross: that is refused with the nearest.
            cut = graph.cut(pattern)
            if len(cut.specs) != 1:
                raise several_cross(graph, cut)
            found[cut.name] = cut
    return list(found.values())


def is_pattern(text: str) -> bool:
    """Whether it is a shell pattern of cuts, and not the name of one."""
    return "*" in text or "?" in text


def series_cuts(
    pattern: str, graph: Graph, channels: Channels, deployable: Collection[str]
) -> tuple[list[Cut], list[str]]:
    """The cuts of a pattern that channels can be removed of, and why of others none can.

    A pattern passes over those that are not `deployable`; one cut may be named by an alias.

    Raises:
        CutError: the one cut that is named is none, or of none of its channels any can go.
        JobError: it is not deployable, or a pattern fits no cut of which channels can go.
    """
    if not is_pattern(pattern):
        cut = graph.cut(pattern)
        if cut.name not in deployable:
            near = ", ".join(difflib.get_close_matches(cut.name, deployable, n=3, cutoff=0.0))
            raise JobError(f'[prune] cuts "{pattern}" is no deployable cut; near are {near}')
        crossing_groups(channels, graph, cut)
        return [cut], []
    cuts = {cut.name: cut for cut in graph.cuts() if cut.name in deployable}
    found, reasons = [], list[str]()
    for name in fnmatch.filter(cuts, pattern):
        try:
            crossing_groups(channels, graph, cuts[name])
        except CutError as error:
            reasons.append(str(error))
        else:
            found.append(cuts[name])
    if not found:
        near = ", ".join(difflib.get_close_matches(pattern, cuts, n=3, cutoff=0.0))
        why = reasons[0] if reasons else f"the nearest are {near}"
        raise JobError(f'[prune] cuts "{pattern}" fits no cut of which channels can be removed: {why}')
    return found, reasons


def _is_fit(cut: Cut, job: BottleneckJob) -> bool:
    """Whether a unit of every width and stride fits there: a pattern passes over the cuts where one does not."""
    try:
        for width, stride in product(job.widths, job.strides):
            check_unit(cut.specs[0], UnitSpec(width=width, stride=stride, head_width=1 if job.light else 0))
    except (CutError, ModelError):
        return False
    return True
