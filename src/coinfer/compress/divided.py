"""A network with a unit at a cut: in training, and as it is exported.

Divided      head, unit, tail: what is trained; made by `insert_unit` on copies
Behind       unit and tail alone, for features that a frozen head computed once
Before       head and unit alone, for features that a light head is to imitate
Deployable   the same without the quantiser: exported as one network and cut behind the reduction
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from ..codec import Tables, available_coders, learned_tensor
from ..errors import CutError
from ..model.cut import Cut, split
from ..model.graph import Graph, first_of
from ..plan import CodecSpec, Coder, TensorSpec
from .bottleneck import Unit, UnitSpec, check_unit
from .encoder import LightHead
from .losses import Coded
from .quantiser import JpegQuantiser


class Divided(nn.Module):
    """A network with a unit at a cut: head, unit, tail.

    In training `forward` gives Coded, of a rate that is drawn for each batch; in evaluation the network's own output,
    from values quantised at `rate`.
    """

    def __init__(self, head: nn.Module, unit: Unit, tail: nn.Module) -> None:
        super().__init__()
        self.head, self.unit, self.tail = head, unit, tail
        self.rate = 0

    def forward(self, x: Tensor) -> Coded | Tensor:
        """The network's output for a batch, through the unit."""
        return self.after(first_of(self.head(x)))

    def after(self, features: Tensor) -> Coded | Tensor:
        """The same from the cut on, for features that were computed before."""
        rate = self.unit.drawn_rate() if self.training else self.rate
        restored, bits = self.unit(features, rate)
        outputs = first_of(self.tail(restored))
        return Coded(outputs, bits, rate) if self.training else outputs

    def train(self, mode: bool = True) -> Divided:
        """Only what is new follows the mode: the network's own batch norms and dropouts stay as they are evaluated."""
        super().train(mode)
        self.tail.eval()
        if not self.unit.spec.head_width:
            self.head.eval()
        return self


class Before(nn.Module):
    """A divided network's light head and unit, as a module of its own: what it gives has no logits."""

    def __init__(self, divided: Divided) -> None:
        super().__init__()
        self.head, self.unit = divided.head, divided.unit

    def forward(self, x: Tensor) -> Coded:
        """Restored features and bits of a batch of pictures, at a rate drawn for it."""
        rate = self.unit.drawn_rate()
        restored, bits = self.unit(first_of(self.head(x)), rate)
        return Coded(None, bits, rate, restored)


class Behind(nn.Module):
    """What follows a divided network's head, as a module of its own: it is trained on features computed before."""

    def __init__(self, divided: Divided) -> None:
        super().__init__()
        self.unit, self.tail = divided.unit, divided.tail
        # In a list, so that the head's weights are none of this module's.
        self._divided = [divided]

    def forward(self, features: Tensor) -> Coded | Tensor:
        """As `Divided.after`."""
        return self._divided[0].after(features)

    def train(self, mode: bool = True) -> Behind:
        """The divided network's mode is this one's."""
        self.training = mode
        self._divided[0].train(mode)
        return self


def insert_unit(graph: Graph, cut: Cut, spec: UnitSpec) -> Divided:
    """`graph` divided at `cut`, with a unit of `spec` there, in evaluation mode.

    Raises:
        CutError: several tensors cross; names them, and the nearest cut where one crosses alone.
        ModelError: the unit does not fit.
    """
    if len(cut.specs) != 1:
        raise several_cross(graph, cut)
    (crossing,) = cut.specs
    own, tail = split(graph, cut)
    # The graph's tensors are shared by all that is split from it; training must leave them alone.
    tail = copy.deepcopy(tail)
    if not spec.head_width:
        return Divided(copy.deepcopy(own), Unit(crossing, spec), tail).eval()
    check_unit(crossing, spec)
    code = (crossing.shape[1] // spec.stride, crossing.shape[2] // spec.stride)
    light = LightHead(graph.inputs[0].shape, code, spec.head_width)
    return Divided(light, Unit(crossing, spec, given=light.output), tail).eval()


def several_cross(graph: Graph, cut: Cut) -> CutError:
    """The error for a cut that several tensors cross: names them, and the nearest cut where one crosses alone."""
    cuts = graph.cuts()
    place = cuts.index(cut)
    single = [k for k, other in enumerate(cuts) if len(other.specs) == 1]
    near = f'; the nearest with one is "{cuts[min(single, key=lambda k: abs(k - place))].name}"' if single else ""
    names = ", ".join(spec.name for spec in cut.specs)
    return CutError(f'a unit needs a cut that one tensor crosses, at "{cut.name}" cross {names}{near}')


def behind_reduction(spec: UnitSpec) -> str:
    """The name of the cut where a Deployable with a unit of `spec` is cut."""
    return f"reduce.prepare.{spec.prepare - 1}#0" if spec.prepare else "reduce.reduce#0"


class Reduction(nn.Module):
    """All of a unit that the device runs, as one module with one output."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.reduce, self.prepare = unit.reduce, unit.prepare

    def forward(self, features: Tensor) -> Tensor:
        """As `Unit.code`."""
        code: Tensor = self.prepare(self.reduce(features))
        return code


class Deployable(nn.Module):
    """A divided network without its quantiser: what is exported, and cut behind `reduce` (`behind_reduction`)."""

    def __init__(self, divided: Divided) -> None:
        super().__init__()
        self.head, self.reduce = divided.head, Reduction(divided.unit)
        self.restore, self.tail = nn.Sequential(divided.unit.recover, divided.unit.restore), divided.tail

    def forward(self, x: Tensor) -> Tensor:
        """The network's output with nothing lost on the way but what the reduction drops."""
        output: Tensor = self.tail(self.restore(self.reduce(first_of(self.head(x)))))
        return output


class Rate(NamedTuple):
    """One rate of a unit as it is deployed."""

    codec: CodecSpec
    tables: Tables


def codecs_of(unit: Unit, crossing: TensorSpec, *, scale: float = 1.0, zero_point: int = 0) -> list[Rate]:
    """The codec and the static tables of each of a unit's rates, finest first.

    Args:
        unit: trained.
        crossing: what its reduction gives in the exported network: float32, or uint8 codes of an int8 one.
        scale, zero_point: of those codes: value = scale * (code - zero_point).
    """
    rates = []
    coder: Coder = "range" if "range" in available_coders() else "rans"
    for rate in range(len(unit.spec.gains)):
        low, step = (part.detach().cpu().double().numpy() for part in unit.quantiser.grid(rate))
        if isinstance(unit.quantiser, JpegQuantiser):
            spec, shares = unit.quantiser.codec_spec, None
        else:
            spec = CodecSpec(transform="uniform", coder=coder, bits=unit.spec.bits, per_channel=True, rate=rate)
            shares = unit.quantiser.shares[rate].detach().double().cpu().numpy()
            shares /= shares.sum(1, keepdims=True)
        grid = ((low / scale + zero_point).astype(np.float32), (step / scale).astype(np.float32))
        rates.append(Rate(spec, Tables((learned_tensor(spec, crossing, *grid, shares),))))
    return rates
