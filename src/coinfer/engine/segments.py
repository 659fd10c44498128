"""What a machine computes with: the sessions and codecs of plans, each loaded once.

Heads and tails are matched to what crosses by value name, so that the order of a segment's inputs and
outputs never matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ..codec import Codec, load_tables, make_codec
from ..errors import BundleError
from ..plan import Plan, Side, TensorSpec
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


class Part(NamedTuple):
    """One segment of a plan's side, by its file name; `exit` is the place in the plan of whose exit it classifies."""

    name: str
    segment: Segment
    exit: int | None = None


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
        self._parts: dict[tuple[int, Side], tuple[Part, ...]] = {}
        self._codecs: dict[int, Codec] = {}

    def parts(self, plan: Plan, side: Side) -> tuple[Part, ...]:
        """What one machine runs of a plan, in order: segments and, between them, classifiers; empty where nothing.

        Raises:
            BundleError: a segment does not fit the plan.
            EngineError: it does not load.
        """
        key = (plan.number, side)
        if key not in self._parts:
            self._parts[key] = tuple(self._loaded(plan, side))
        return self._parts[key]

    def head(self, plan: Plan) -> Segment:
        """What the device runs first of a device or split plan: the bundle's input -> its first exit, or the end.

        Raises:
            BundleError: the segment does not fit the plan, or it has none.
            EngineError: it does not load.
        """
        if plan.head is None:
            raise BundleError(f"plan {plan.number} computes nothing on the device ({plan.label})")
        return self.parts(plan, "device")[0].segment

    def tail(self, plan: Plan) -> Segment:
        """What the edge runs first of an upload or split plan: what crosses -> its first exit, or the outputs.

        Raises:
            BundleError: the segment does not fit the plan, or it has none.
            EngineError: it does not load.
        """
        if plan.tail is None:
            raise BundleError(f"plan {plan.number} computes nothing on the edge ({plan.label})")
        return self.parts(plan, "edge")[0].segment

    def _loaded(self, plan: Plan, side: Side) -> Iterator[Part]:
        first, what = (plan.head, "head") if side == "device" else (plan.tail, "tail")
        if first is None:
            return
        exits = [(place, exit) for place, exit in enumerate(plan.exits) if exit.side == side]
        end = plan.crossing if side == "device" and plan.kind == "split" else self._outputs
        # Behind each segment lies the next exit's value, or the end of the side.
        behind = [*((exit.value,) for _, exit in exits), end]
        # Whatever the picture is called, the device's first segment takes it.
        yield Part(first, self._between(first, plan.crossing if side == "edge" else None, behind[0], what))
        logits = TensorSpec(name="logits", shape=self._outputs[0].shape)
        for (place, exit), after in zip(exits, behind[1:], strict=True):
            classifier = self._between(exit.classifier, (exit.value,), (logits,), "classifier")
            yield Part(exit.classifier, classifier, place)
            if exit.rest is not None:
                yield Part(exit.rest, self._between(exit.rest, (exit.value,), after, what))

    def _between(
        self, name: str, given: tuple[TensorSpec, ...] | None, wanted: tuple[TensorSpec, ...], what: str
    ) -> Segment:
        session, where = self._session(name), f'{what} "{name}"'
        takes = None if given is None else _order(given, session.inputs, where)
        return Segment(session, takes, _order(session.outputs, wanted, where))

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
