"""One segment as deployed: an ONNX file, loaded and run by ONNX Runtime on the CPU.

A segment is checked before ONNX Runtime sees it: it must carry its weights itself, since a file that points to other
files could read anything on this machine, and use no operators but ONNX Runtime's own.  Arrays are checked before they
go in, so that a wrong shape is one clear line and not a C++ message.  Nothing here knows about cuts, plans or codecs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ..errors import EngineError
from ..plan import TensorSpec
from .wire import objection

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
)
_ERRORS_ONLY = 3
# ONNX Runtime 1.31 lets this fusion remove a convolution whose value is an output as well, where another convolution
# without a bias is added to it.
_FRAGILE_FUSION = "ConvAddActivationFusion"


class Session:
    """A loaded segment; `run` may be called from several threads at once.

    Args:
        path: an ONNX file that holds all of its weights.
        threads: how many threads one `run` uses, at least 1.

    Raises:
        EngineError: the file is missing, is not ONNX, refers to data outside itself, uses custom operators or one that
            ONNX Runtime does not have, or has an input or output whose shape is not known.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        if threads < 1:
            raise EngineError(f"threads must be at least 1, got {threads} (segment {path})")
        self.path = path
        self.threads = threads
        self._session = _load(path, threads)
        self.inputs: tuple[TensorSpec, ...] = tuple(_spec(node, path) for node in self._session.get_inputs())
        # Of a network that takes one sample at a time, the samples of a batch are run one after another.
        first = self._session.get_inputs()[0].shape[0] if self.inputs else None
        self._takes_one = first == 1
        self._output_names = [node.name for node in self._session.get_outputs()]
        self.outputs: tuple[TensorSpec, ...] = self._output_specs()

    def run(self, arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        """The outputs for `arrays`, one (N, *shape) array for each of `inputs`, in their order.

        Raises:
            EngineError: another number of arrays, another shape or dtype, or the segment fails on them.
        """
        if len(arrays) != len(self.inputs):
            raise EngineError(
                f"{len(self.inputs)} arrays are needed, got {len(arrays)} (segment {self.path.name})"
            )
        feed: dict[str, NDArray[Any]] = {}
        for spec, array in zip(self.inputs, arrays, strict=True):
            if array.shape[1:] != spec.shape or array.ndim == 0 or array.dtype.name != spec.dtype:
                raise EngineError(
                    f'input "{spec.name}" must be {spec.dtype} (N, {_listed(spec.shape)}), '
                    f"got {array.dtype.name} ({_listed(array.shape)}) (segment {self.path.name})"
                )
            feed[spec.name] = array
        count = len(arrays[0]) if arrays else 1
        if not self._takes_one or count <= 1:
            return self._run(feed)
        parts = [self._run({name: array[i : i + 1] for name, array in feed.items()}) for i in range(count)]
        return tuple(np.concatenate(values) for values in zip(*parts, strict=True))

    def _run(self, feed: dict[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        try:
            return tuple(self._session.run(self._output_names, feed))
        except ORT_ERRORS as error:
            raise EngineError(f"{_one_line(error)} (segment {self.path.name})") from error

    def _output_specs(self) -> tuple[TensorSpec, ...]:
        nodes = self._session.get_outputs()
        if all(_is_static(node.shape) for node in nodes):
            return tuple(_spec(node, self.path) for node in nodes)
        # Shape inference does not see through every operator; one run on zeros always does.
        zeros = {spec.name: np.zeros((1, *spec.shape), spec.dtype) for spec in self.inputs}
        return tuple(
            TensorSpec(name=name, shape=array.shape[1:], dtype=array.dtype.name)
            for name, array in zip(self._output_names, self._run(zeros), strict=True)
        )


def _load(path: Path, threads: int) -> Any:
    """An ONNX Runtime session from the bytes of `path`, checked first."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise EngineError(f"the file cannot be read: {error.strerror} (segment {path})") from error
    if (why := objection(raw)) is not None:
        raise EngineError(f"the file {why} (segment {path})")
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Waiting threads that spin take the core from the codec, the link and other sessions.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # What was checked is what is parsed: never by the first bytes as another format.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        try:
            return _started(raw, options)
        except RuntimeError:
            return _started(raw, options, without=(_FRAGILE_FUSION,))
    except ORT_ERRORS as error:
        raise EngineError(f"the file does not load: {_one_line(error)} (segment {path})") from error


def _started(raw: bytes, options: ort.SessionOptions, without: Sequence[str] = ()) -> Any:
    # Its own second try would be the same one again, and prints.
    return ort.InferenceSession(
        raw, options, providers=["CPUExecutionProvider"], enable_fallback=0, disabled_optimizers=without
    )


def _is_static(shape: Sequence[object]) -> bool:
    return len(shape) > 0 and all(isinstance(size, int) for size in shape[1:])


def _spec(node: Any, path: Path) -> TensorSpec:
    if node.type not in _DTYPES:
        allowed = ", ".join(_DTYPES)
        raise EngineError(f'value "{node.name}" has type {node.type}, allowed: {allowed} (segment {path})')
    if not _is_static(node.shape):
        raise EngineError(
            f'value "{node.name}" must have a batch dimension and a fixed shape behind it, got {node.shape} '
            f"(segment {path})"
        )
    return TensorSpec(name=node.name, shape=tuple(node.shape[1:]), dtype=_DTYPES[node.type])


def _listed(shape: Sequence[int]) -> str:
    return ", ".join(str(size) for size in shape)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
