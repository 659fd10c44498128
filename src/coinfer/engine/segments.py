"""What a machine computes with: the sessions and codecs of plans, each loaded once.

Heads and tails are matched to what crosses by value name, so that the order of a segment's inputs and
outputs never matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..codec import Codec, load_tables, make_codec
from ..errors import BundleError
from ..plan import Plan, TensorSpec
from .onnx import Session

Array = NDArray[Any]


@dataclass(frozen=True)
class Segment:
    """A session with its inputs and outputs in the order of the plan.

    `run` takes and gives arrays with a leading 1, inputs and outputs as the plan orders them.
    """

    session: Session
    takes: tuple[int, ...] | None
    gives: tuple[int, ...] | None

    def run(self, arrays: Sequence[Array]) -> Sequence[Array]:
        """The outputs of the segment, in the plan's order."""
        if self.takes is not None:
            arrays = [arrays[index] for index in self.takes]
        outputs = self.session.run(arrays)
        return outputs if self.gives is None else [outputs[index] for index in self.gives]


class Segments:
    """Loads the segments and codecs of plans on first use and keeps them.

    Args:
        path: where a file named in a plan lies, such as `bundle.path`.
        outputs: the network's output tensors.
        threads: of each session.
    """

    def __init__(self, path: Callable[[str], Path], outputs: tuple[TensorSpec, ...], *, threads: int = 1) -> None:
        self._path = path
        self._outputs = outputs
        self._threads = threads
        self._sessions: dict[str, Session] = {}
        self._segments: dict[tuple[str, int], Segment] = {}
        self._codecs: dict[int, Codec] = {}

    def head(self, plan: Plan) -> Segment:
        """What the device runs of a device or split plan: the bundle's input -> what crosses, or the outputs.

        Raises:
            BundleError: the segment does not fit the plan.
            EngineError: it does not load.
        """
        if plan.head is None:
            raise BundleError(f"plan {plan.number} computes nothing on the device ({plan.label})")
        key = ("head", plan.number)
        if key not in self._segments:
            session = self._session(plan.head)
            want = plan.crossing if plan.kind == "split" else self._outputs
            self._segments[key] = Segment(session, None, _order(session.outputs, want, f'head "{plan.head}"'))
        return self._segments[key]

    def tail(self, plan: Plan) -> Segment:
        """What the edge runs of an upload or split plan: what crosses -> the outputs.

        Raises:
            BundleError: the segment does not fit the plan.
            EngineError: it does not load.
        """
        if plan.tail is None:
            raise BundleError(f"plan {plan.number} computes nothing on the edge ({plan.label})")
        key = ("tail", plan.number)
        if key not in self._segments:
            session = self._session(plan.tail)
            takes = _order(plan.crossing, session.inputs, f'tail "{plan.tail}"')
            gives = _order(session.outputs, self._outputs, f'tail "{plan.tail}"')
            self._segments[key] = Segment(session, takes, gives)
        return self._segments[key]

    def codec(self, plan: Plan) -> Codec:
        """The codec of an upload or split plan.

        Raises:
            BundleError: the plan has none, or its tables are missing.
            CodecError: its spec is unknown or does not fit what crosses.
        """
        if plan.codec is None:
            raise BundleError(f"plan {plan.number} sends nothing, so it has no codec ({plan.label})")
        if plan.number not in self._codecs:
            tables = None if plan.tables is None else load_tables(self._path(plan.tables))
            self._codecs[plan.number] = make_codec(plan.codec, plan.crossing, tables)
        return self._codecs[plan.number]

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            self._sessions[name] = Session(self._path(name), threads=self._threads)
        return self._sessions[name]


def _order(have: Sequence[TensorSpec], want: Sequence[TensorSpec], where: str) -> tuple[int, ...] | None:
    """Indices into `have` that give `want`; None where the order is right already."""
    names = [spec.name for spec in have]
    by_name = sorted(names) == sorted(spec.name for spec in want)
    order = tuple(names.index(spec.name) for spec in want) if by_name else tuple(range(len(want)))
    shapes = [(have[index].shape, have[index].dtype) for index in order if index < len(have)]
    if len(have) != len(want) or shapes != [(spec.shape, spec.dtype) for spec in want]:
        raise BundleError(f"{where} has {_shown(have)}, its plan needs {_shown(want)}")
    return None if order == tuple(range(len(want))) else order


def _shown(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in specs)
