"""Every error that coinfer raises on purpose, in one tree.

    CoinferError
    ├── UsageError          a command line or a value in it is not understood (exit code 2)
    ├── JobError            a job file holds a value that is not allowed
    ├── ModelError          an unknown model, or a factory that does not give a module
    │   ├── CaptureError    a model that cannot be captured (names the node)
    │   ├── CutError        an unknown cut, or one that cannot be made
    │   └── WeightsError    weights that do not fit the network
    ├── DataError           a data source that is missing, empty, or of another shape
    ├── CodecError          an unknown codec, or arrays it cannot take
    │   └── PayloadError    bytes that are not a payload of this codec
    ├── EngineError         a segment that does not load, or inputs that do not fit it
    ├── BundleError         a bundle that is incomplete, altered, or of another version
    ├── PlanError           a plan, profile or condition that makes no sense
    │   └── Infeasible      no candidate meets the constraints (carries the nearest miss)
    └── LinkError           the other machine cannot be reached, or the link broke
        ├── ProtocolError   the other side does not speak this protocol
        └── RefusedError    the other side refused (another bundle, version, token, too many connections)
            └── BusyError   the edge has no time for this request now (carries when to ask again)

Every message says what was given, what is allowed, and which object, in one line:
`bits must be 1 to 8, got 12 (codec "uniform" at cut "layer2.1#0")`.
Foreign exceptions are translated where the foreign call is made; nothing else catches them.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "BusyError",
    "CaptureError",
    "CodecError",
    "CoinferError",
    "CutError",
    "DataError",
    "EngineError",
    "Infeasible",
    "JobError",
    "LinkError",
    "ModelError",
    "PayloadError",
    "PlanError",
    "ProtocolError",
    "RefusedError",
    "UsageError",
    "WeightsError",
]


class CoinferError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(CoinferError):
    """A command line, or a value in it, is not understood."""

    exit_code = 2


class JobError(CoinferError):
    """A job file holds a value that is not allowed."""


class ModelError(CoinferError):
    """An unknown model, or a factory that does not give a module."""


class CaptureError(ModelError):
    """A model cannot be captured; the message names the node."""


class CutError(ModelError):
    """An unknown cut, or one that cannot be made."""


class WeightsError(ModelError):
    """Weights do not fit the network."""


class DataError(CoinferError):
    """A data source is missing, empty, or of another shape."""


class CodecError(CoinferError):
    """An unknown codec, or arrays that the codec cannot take."""


class PayloadError(CodecError):
    """Bytes that are not a payload of this codec: truncated, altered, oversized, or another coder's."""


class EngineError(CoinferError):
    """A segment does not load, or inputs do not fit it."""


class BundleError(CoinferError):
    """A bundle is incomplete, altered, or of another version."""


class PlanError(CoinferError):
    """A plan, a profile or a condition makes no sense."""


class Infeasible(PlanError):
    """No candidate meets the constraints; the message names the nearest miss and what to relax."""


class LinkError(CoinferError):
    """The other machine cannot be reached, or the link broke."""


class ProtocolError(LinkError):
    """The other side does not speak this protocol."""


class RefusedError(LinkError):
    """The other side refused: another bundle, another version, or too many connections."""


class BusyError(RefusedError):
    """The edge has no time for this request now, and has not begun it; ask again after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
