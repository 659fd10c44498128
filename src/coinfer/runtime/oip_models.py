"""Which models an edge offers to clients of the Open Inference Protocol, and what each of them takes and gives.

    MODEL               pictures as tensors -> the network of the menu's most accurate upload plan
    MODEL.plan7         the same for each other network that an upload plan serves
    MODEL.plan7.jpeg    picture files as elements of a BYTES tensor -> the network of upload plan 7

A picture file is of the format that its plan's codec has, and decoded by that codec.  Where no plan uploads anything,
the networks of the device plans stand in.  A plan's `top` shortens what crosses a link; here whole outputs are
answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from ..bundle import Bundle
from ..codec.image import ImageCodec
from ..engine.segments import Segments
from ..errors import BundleError
from ..plan import CodecSpec, Exit, Plan, TensorSpec
from .oip_wire import BYTES, DATATYPES, Port

VERSION = "1"
PLATFORM = "onnxruntime_onnx"
_FILES = {"png": "png", "webp": "webp", "webp-lossless": "webp", "jpeg": "jpeg", "jpeg-bare": "jpeg"}


class Model(NamedTuple):
    """One model: its requests are computed as those of `plan`.

    `codec` is what reads its picture files; None: it takes tensors.  `accuracy` in percent, where it was measured.
    """

    name: str
    plan: Plan
    input: Port
    outputs: tuple[Port, ...]
    codec: ImageCodec | None
    accuracy: float | None
    is_best: bool

    def metadata(self) -> dict[str, Any]:
        """As the protocol has it; `parameters` is our own."""
        plan = self.plan
        served = "tensors" if self.codec is None or plan.codec is None else f"{plan.codec.name} files"
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": PLATFORM,
            "inputs": [_metadata(self.input)],
            "outputs": [_metadata(port) for port in self.outputs],
            "parameters": {
                "plan": plan.number,
                "variant": plan.variant,
                "precision": plan.precision,
                "takes": served,
                "accuracy_percent": None if self.accuracy is None else round(self.accuracy, 4),
                "is_most_accurate": self.is_best,
            },
        }

    def config(self, max_samples: int) -> dict[str, Any]:
        """What Triton's clients ask for as a model's configuration; dimensions are one sample's."""
        return {
            "name": self.name,
            "platform": PLATFORM,
            "backend": "onnxruntime",
            "max_batch_size": max_samples,
            "input": [_config(self.input)],
            "output": [_config(port) for port in self.outputs],
        }


def _metadata(port: Port) -> dict[str, Any]:
    return {"name": port.name, "datatype": port.datatype, "shape": port.full_shape}


def _config(port: Port) -> dict[str, Any]:
    kind = "TYPE_STRING" if port.datatype == BYTES else f"TYPE_{port.datatype}"
    return {"name": port.name, "data_type": kind, "dims": list(port.shape) or [1]}


def offered(bundle: Bundle, segments: Segments) -> dict[str, Model]:
    """The models of a bundle by name; their segments are loaded.

    Raises:
        BundleError, EngineError, CodecError: as `Segments`.
    """
    manifest = bundle.manifest
    outputs = tuple(_port(spec) for spec in manifest.outputs)
    tensor = _port(manifest.input)
    accuracies = _accuracies(bundle)

    def accuracy(plan: Plan) -> float:
        return accuracies.get(plan.number, -1.0)

    plans = [plan for plan in manifest.menu if plan.kind == "upload" and _is_whole(plan, outputs)]
    stand_ins = [_on_the_edge(plan, manifest.input) for plan in manifest.menu if plan.kind == "device"]
    ranked = sorted(
        plans or [plan for plan in stand_ins if _is_whole(plan, outputs)],
        key=lambda plan: (-accuracy(plan), len(plan.exits), plan.number),
    )
    found: dict[str, Model] = {}
    networks: set[tuple[Any, ...]] = set()
    for plan in ranked:
        network = (plan.tail, *((exit.classifier, exit.rest, exit.rule) for exit in plan.exits))
        if network not in networks:
            segments.parts(plan, "edge")
            name = f"{manifest.model}.plan{plan.number}" if networks else manifest.model
            found[name] = Model(name, plan, tensor, outputs, None, accuracies.get(plan.number), not networks)
            networks.add(network)
    best = ranked[0] if ranked else None
    for plan in sorted(plans, key=lambda plan: plan.number):
        if plan.codec is None or plan.codec.coder not in _FILES:
            continue
        codec = segments.codec(plan)
        assert isinstance(codec, ImageCodec)
        name = f"{manifest.model}.plan{plan.number}.{_FILES[plan.codec.coder]}"
        files = Port(name=manifest.input.name, datatype=BYTES, shape=())
        found[name] = Model(name, plan, files, outputs, codec, accuracies.get(plan.number), plan is best)
    return found


def _port(spec: TensorSpec) -> Port:
    return Port(name=spec.name, datatype=DATATYPES[spec.dtype], shape=spec.shape)


def _is_whole(plan: Plan, outputs: Sequence[Port]) -> bool:
    """Whether every answer has all outputs: an exit's has the first alone."""
    return not plan.exits or len(outputs) == 1


def _on_the_edge(plan: Plan, given: TensorSpec) -> Plan:
    """A device plan as if its input were uploaded."""
    return msgspec.structs.replace(
        plan,
        kind="upload",
        head=None,
        tail=plan.head,
        codec=CodecSpec(transform="float32"),
        crossing=(given,),
        exits=tuple(_moved(plan.exits)),
        top=None,
    )


def _moved(exits: Sequence[Exit]) -> Iterator[Exit]:
    for exit in exits:
        yield msgspec.structs.replace(exit, side="edge")


def _accuracies(bundle: Bundle) -> dict[int, float]:
    """Percent that each plan of the menu got right of the images that choices are made on, where that is known."""
    try:
        candidates = bundle.candidates()
    except BundleError:
        return {}
    known = {candidate.plan.number: candidate.evidence.accuracy for candidate in candidates}
    return {number: accuracy for number, accuracy in known.items() if accuracy is not None}
