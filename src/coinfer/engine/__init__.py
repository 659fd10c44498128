"""Running a segment with ONNX Runtime, and timing anything on this machine.  No torch in here."""

from __future__ import annotations

from .measure import describe_machine, measure, measure_interleaved, pin
from .onnx import Session

__all__ = ["Session", "describe_machine", "measure", "measure_interleaved", "pin"]
