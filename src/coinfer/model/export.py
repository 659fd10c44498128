"""A captured network as one ONNX file, and heads and tails cut from that file by value name.

    export_onnx(graph, path)     seconds, once for a network: a Whole, saved beside the file as <stem>.json
    cut_onnx(whole, name)        milliseconds, as often as one likes
    middle_onnx(whole, a, b)     what lies between two cuts

Exporting every head and tail anew would take hours.  So all values that can cross are marked as outputs before
the exporter sees the network, which keeps them, in a known order; afterwards the marks are removed and the names stay.
Batch normalisation is folded first: a convolution's value before it is gone, and its cut with it.
The map from cuts to ONNX values is checked by numbers on one batch, never believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..engine.onnx import Session
from ..errors import CaptureError, CutError, EngineError
from ..plan import Precision, Preprocess, TensorSpec, Value
from .facts import values_of
from .fold import Folded, fold
from .graph import TOLERANCE, Graph
from .onnx_graph import (
    BATCH_VALUE,
    Producers,
    check_folder,
    extract,
    fixed_batch,
    load,
    save_atomically,
    value_info,
    write_file,
)
from .onnx_shapes import pool_means, remove_unused, simplify_shapes
from .trace import TRACE_ERRORS, first_line, quiet, share_call_specs

PICTURE = "input"
_CHECKED_SAMPLES = 2


class DeployedCut(Value, frozen=True, kw_only=True):
    """A cut that an exported network has.

    `specs` are the crossing values by their ONNX names, in order; dtype "uint8" at an int8 cut, where
    `scales` and `zero_points` hold one number for each of them: value = scale * (code - zero point).
    """

    name: str
    specs: tuple[TensorSpec, ...]
    compute_share: float
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()


class Whole(Value, frozen=True, kw_only=True):
    """A network as one ONNX file.

    `input` is a picture (H, W, C) of uint8 named "input" where preprocessing is part of the file, else the
    network's own input; a network with several inputs has the others in `more_inputs`.
    `cuts` are in the order in which the network runs.
    """

    path: Path
    precision: Precision
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    cuts: tuple[DeployedCut, ...]
    more_inputs: tuple[TensorSpec, ...] = ()

    def cut(self, name: str) -> DeployedCut:
        """The cut of that name.

        Raises:
            CutError: the network cannot be cut there in this precision.
        """
        for cut in self.cuts:
            if cut.name == name:
                return cut
        raise CutError(f'"{name}" is none of the {len(self.cuts)} cuts of {self.path.name} in {self.precision}')


def export_onnx(graph: Graph, path: Path, *, preprocess: Preprocess | None = None) -> Whole:
    """Export `graph` to `path`, and the record of its cuts beside it.

    Args:
        graph: a captured network.
        path: the ONNX file to write; its record gets the suffix .json.
        preprocess: make the input a picture (N, H, W, C) of uint8; for networks with one input (C, H, W).

    Raises:
        CaptureError: the network has an operation that ONNX export does not know.
        EngineError: the exported network gives other values than the captured one.
    """
    first, *more = graph.inputs
    if preprocess is not None:
        _check_preprocess(preprocess, graph)
    check_folder(path)
    crossing = {spec.name: spec for cut in graph.cuts() for spec in cut.specs}
    inputs = {spec.name for spec in graph.inputs}
    folded = fold(graph.module, [s.name for s in graph.outputs], [name for name in crossing if name not in inputs])
    model, names = _translate(graph, folded)
    pool_means(model)
    simplify_shapes(model)
    remove_unused(model)
    outputs = tuple(
        TensorSpec(name=value.name, shape=spec.shape, dtype=spec.dtype)
        for value, spec in zip(model.graph.output, graph.outputs, strict=False)
    )
    if preprocess is not None:
        names[first.name] = _rename_input(model)
        first = _prepend(model, preprocess, first)
    batch = None if graph.why_fixed_batch is None else 1
    _tidy(model, (first, *more), batch)
    cuts = _deployable(graph, names, Producers(model))
    whole = Whole(path=path, precision="fp32", input=first, outputs=outputs, cuts=cuts, more_inputs=tuple(more))
    _verify(graph, model, whole, names, preprocess)
    del model.graph.output[:]
    model.graph.output.extend(value_info(spec, batch) for spec in outputs)
    remove_unused(model)
    save_atomically(model, path)
    save_record(whole)
    return whole


def save_record(whole: Whole) -> None:
    """Write the record of a network's cuts beside its ONNX file."""
    record = msgspec.structs.replace(whole, path=Path(whole.path.name))
    content = msgspec.json.format(msgspec.json.encode(record, enc_hook=str), indent=1)
    write_file(content, whole.path.with_suffix(".json"))


def load_whole(path: Path) -> Whole:
    """The record beside the ONNX file `path`.

    Raises:
        EngineError: file or record are not there, or the record is not one.
    """
    record = path.with_suffix(".json")
    for file in (path, record):
        if not file.is_file():
            raise EngineError(f"no file {file}: give an ONNX file that coinfer exported, with its record beside it")
    try:
        whole = msgspec.json.decode(record.read_bytes(), type=Whole, dec_hook=_path_hook)
    except msgspec.MsgspecError as error:
        raise EngineError(f"{record} is not the record of an exported network: {error}") from error
    return msgspec.structs.replace(whole, path=path)


def _path_hook(kind: type, text: Any) -> Any:
    return kind(text)


def cut_onnx(whole: Whole, cut_name: str, *, head: Path, tail: Path) -> None:
    """Write head and tail of an exported network; both keep the network's batch and take what they need alone.

    Raises:
        CutError: the network cannot be cut there.
        EngineError: the network's file is gone.
    """
    cut = whole.cut(cut_name)
    model = load(whole.path)
    producers = Producers(model)
    save_atomically(extract(model, producers, (whole.input, *whole.more_inputs), cut.specs), head)
    save_atomically(extract(model, producers, cut.specs, whole.outputs), tail)


def middle_onnx(whole: Whole, first: str, second: str, path: Path) -> None:
    """Write the part of an exported network that leads from one cut to a later one.

    Raises:
        CutError: the network cannot be cut there, or not in this order.
        EngineError: the network's file is gone.
    """
    order = [cut.name for cut in whole.cuts]
    before, after = whole.cut(first), whole.cut(second)
    if order.index(first) >= order.index(second):
        raise CutError(f'"{first}" does not come before "{second}" in {whole.path.name}')
    model = load(whole.path)
    save_atomically(extract(model, Producers(model), before.specs, after.specs), path)


def _translate(graph: Graph, folded: Folded) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The ONNX model with every surviving value as an output, and the ONNX name of each captured value."""
    dynamic = None if graph.why_fixed_batch else {0: torch.export.Dim.DYNAMIC}
    shapes = tuple(dynamic for _ in graph.example)
    try:
        with quiet():
            program = torch.export.export(folded.module, graph.example, dynamic_shapes=shapes)
            share_call_specs(program)
            exported = torch.onnx.export(program, (), dynamo=True, external_data=False, verbose=False)
    except TRACE_ERRORS as error:
        raise CaptureError(f"cannot export this network, captured by {graph.how}, to ONNX: {_cause(error)}") from error
    assert exported is not None
    model: onnx.ModelProto = exported.model_proto
    if len(model.graph.output) != len(folded.values):
        raise CaptureError(f"ONNX export gives {len(model.graph.output)} values, expected {len(folded.values)}")
    names = {name: value.name for name, value in zip(folded.values, model.graph.output, strict=True)}
    names |= {spec.name: value.name for spec, value in zip(graph.inputs, model.graph.input, strict=True)}
    return model, names


def _cause(error: BaseException) -> str:
    """The first line of the error that started it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _rename_input(model: onnx.ModelProto) -> str:
    """Make room for a picture named "input"; gives the name of the network's own input."""
    name: str = model.graph.input[0].name
    if name == PICTURE:
        name = f"{PICTURE}_float"
        for node in model.graph.node:
            node.input[:] = [name if value == PICTURE else value for value in node.input]
        model.graph.input[0].name = name
    return name


def _check_preprocess(preprocess: Preprocess, graph: Graph) -> None:
    channels, spec = len(preprocess.mean), graph.inputs[0]
    if len(graph.inputs) != 1 or len(spec.shape) != 3 or not spec.shape[0] == channels == len(preprocess.std):
        raise CaptureError(
            f"preprocessing of {channels} channels needs one input ({channels}, H, W), "
            f'got {len(graph.inputs)} with "{spec.name}" of {spec.shape}'
        )


def _prepend(model: onnx.ModelProto, preprocess: Preprocess, spec: TensorSpec) -> TensorSpec:
    """Put `(pixels / 255 - mean) / std` before the model's input; gives the picture's spec.

    NOTE A row of the picture is scaled as one vector: broadcasting over the three values of a pixel takes 22 us of a
    picture of 32 x 32 in ONNX Runtime 1.31, over its rows 6 us and the two reshapes 4 us.
    """
    channels, height, width = spec.shape
    std = np.array(preprocess.std, np.float64)
    scale = (1.0 / (255.0 * std)).astype(np.float32)
    offset = (-np.array(preprocess.mean, np.float64) / std).astype(np.float32)
    graph = model.graph
    name = graph.input[0].name
    p = "preprocess"
    constants: dict[str, NDArray[Any]] = {
        "rows_shape": np.array([0, height, width * channels], np.int64),
        "scale": np.tile(scale, width),
        "offset": np.tile(offset, width),
        "picture_shape": np.array([0, height, width, channels], np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, f"{p}_{key}") for key, value in constants.items())
    nodes = [
        helper.make_node("Reshape", [PICTURE, f"{p}_rows_shape"], [f"{p}_rows"], name=f"{p}_rows"),
        helper.make_node("Cast", [f"{p}_rows"], [f"{p}_float"], name=f"{p}_cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [f"{p}_float", f"{p}_scale"], [f"{p}_scaled"], name=f"{p}_scaling"),
        helper.make_node("Add", [f"{p}_scaled", f"{p}_offset"], [f"{p}_shifted"], name=f"{p}_shift"),
        helper.make_node("Reshape", [f"{p}_shifted", f"{p}_picture_shape"], [f"{p}_pixels"], name=f"{p}_picture"),
        helper.make_node("Transpose", [f"{p}_pixels"], [name], name=f"{p}_transpose", perm=[0, 3, 1, 2]),
    ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    return TensorSpec(name=PICTURE, shape=(height, width, channels), dtype="uint8")


def _tidy(model: onnx.ModelProto, inputs: Sequence[TensorSpec], batch: int | None) -> None:
    """State the inputs, ask the first for the batch size, and drop what tells of the machine that exported."""
    graph = model.graph
    del graph.input[:]
    del graph.value_info[:]
    del model.metadata_props[:]
    del graph.metadata_props[:]
    graph.input.extend(value_info(spec, batch) for spec in inputs)
    graph.name, graph.doc_string, model.doc_string, model.producer_name = "network", "", "", "coinfer"
    for k, node in enumerate(graph.node):
        node.doc_string = ""
        del node.metadata_props[:]
        node.name = node.name or f"{node.op_type}_{k}"
        if node.output[0] == BATCH_VALUE:
            node.input[0] = inputs[0].name


def _deployable(graph: Graph, names: dict[str, str], producers: Producers) -> tuple[DeployedCut, ...]:
    """The cuts whose values all survive, and from which alone the outputs can be made."""
    outputs = [names[spec.name] for spec in graph.outputs]
    places, leaves = producers.needed(outputs, [])
    # A value of which only the shape was used is not there any more.
    alive = leaves.union(*(producers.nodes[place].output for place in places))
    cuts = []
    for cut in graph.cuts():
        if not all(names.get(spec.name) in alive for spec in cut.specs):
            continue
        specs = tuple(msgspec.structs.replace(spec, name=names[spec.name]) for spec in cut.specs)
        values = [spec.name for spec in specs]
        if len(set(values)) == len(values) and producers.closes(outputs, values):
            cuts.append(DeployedCut(name=cut.name, specs=specs, compute_share=cut.compute_share))
    return tuple(cuts)


def _verify(
    graph: Graph, model: onnx.ModelProto, whole: Whole, names: dict[str, str], preprocess: Preprocess | None
) -> None:
    """Compare every output and crossing value of the exported network with the captured one's.

    Raises:
        EngineError: one differs by more than 1e-4 of its largest magnitude, or the file does not run.
    """
    fed, inputs = _sample(graph, whole, preprocess)
    specs = {spec.name: spec for spec in (*graph.outputs, *(s for cut in graph.cuts() for s in cut.specs))}
    tapped = {name: names[name] for name in specs if name in names}
    tap = onnx.ModelProto()
    tap.CopyFrom(model)
    del tap.graph.output[:]
    tap.graph.output.extend(
        value_info(msgspec.structs.replace(specs[name], name=value), fixed_batch(model))
        for name, value in tapped.items()
    )
    file = whole.path.with_name(f".{whole.path.name}.check")
    save_atomically(tap, file)
    try:
        got = dict(zip(tapped, Session(file).run(fed), strict=True))
    finally:
        file.unlink()
    for name, want in values_of(graph.module, inputs, set(tapped)).items():
        value, reference = got.pop(name), want.numpy()
        limit = TOLERANCE * float(np.abs(reference).max(initial=0.0))
        worst = float(np.abs(value - reference).max(initial=0.0)) if value.shape == reference.shape else np.inf
        if not worst <= limit:
            raise EngineError(
                f'the exported network gives another value "{tapped[name]}" than the captured one: off by {worst:.3g}, '
                f"allowed is {limit:.3g} ({whole.path.name})"
            )


def _sample(
    graph: Graph, whole: Whole, preprocess: Preprocess | None
) -> tuple[list[NDArray[np.generic]], list[torch.Tensor]]:
    """One batch for the exported network, and the same for the captured one."""
    inputs = [x[:_CHECKED_SAMPLES] for x in graph.example]
    if preprocess is None:
        return [x.numpy() for x in inputs], inputs
    pixels = np.random.default_rng(0).integers(0, 256, (len(inputs[0]), *whole.input.shape), dtype=np.uint8)
    scaled = (pixels / 255.0 - np.array(preprocess.mean)) / np.array(preprocess.std)
    # Contiguous: a network that views what a convolution made of it takes no other layout.
    planes = torch.from_numpy(scaled.transpose(0, 3, 1, 2).astype(np.float32))
    return [pixels], [planes.clone(memory_format=torch.contiguous_format)]
