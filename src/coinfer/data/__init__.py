"""Images and labels as arrays, by the name of a source.  numpy and Pillow only; nothing is downloaded."""

from __future__ import annotations

from .images import HOLDOUTS, PARTS, Images, Part, Source, hold_out
from .source import default_data_dir, load_source

__all__ = ["HOLDOUTS", "PARTS", "Images", "Part", "Source", "default_data_dir", "hold_out", "load_source"]
