"""Sources by name: `digits`, `scene-digits`, `cifar10`, `imagenette`, `folder:PATH`, `package.module:factory`."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ..errors import DataError
from ..factory import call_factory, is_factory
from .cifar10 import cifar10
from .digits import digits, scene_digits
from .folder import folder
from .imagenet import imagenette
from .images import Images, Source, hold_out

_NAMES = ("digits", "scene-digits", "cifar10", "imagenette")


def default_data_dir() -> Path | None:
    """$DATA_DIR, else `../shared/data` beside the current folder or the repository; None where there is none."""
    if named := os.environ.get("DATA_DIR"):
        return Path(named)
    repository = Path(__file__).resolve().parents[3]
    for base in (Path.cwd(), repository):
        candidate = base.parent / "shared" / "data"
        if candidate.is_dir():
            return candidate
    return None


def load_source(
    source: str,
    *,
    data_dir: Path | None = None,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    holdout: str | None = None,
    labels: bool = True,
) -> Source:
    """The source that `source` names; its parts are read when they are first asked for.

    Args:
        source: digits, scene-digits, cifar10, imagenette, `folder:PATH`, or `package.module:factory`, a function
            without arguments that returns a `Source`.
        data_dir: where files of cifar10 and imagenette lie (default: `default_data_dir()`).
        size: (height, width); folders and imagenette scale and crop to it, the others must have it.
        channels: 3, or 1 for grey pictures; folders alone have either.
        holdout: where the validation part comes from, see `hold_out`; None: the source's own, which for
            cifar10 is "test-fifth".
        labels: False: the pictures alone, as if nobody knew their classes.

    Raises:
        DataError: an unknown source or holdout, files that are missing or unreadable, or another size.
    """
    found = _named(source, data_dir or default_data_dir(), size, channels)
    if size is not None and found.shape[:2] != size:
        have, want = (f"{height}x{width}" for height, width in (found.shape[:2], size))
        raise DataError(f'pictures must be {want}, data "{source}" has {have}')
    if holdout is not None or source == "cifar10":
        found = hold_out(found, holdout or "test-fifth")
    return found if labels else _without_labels(found)


def _without_labels(source: Source) -> Source:
    return Source(
        source.name,
        source.classes,
        source.shape,
        lambda part: Images(source.images(part).pixels, None),
        lambda part, count: Images(source.drawn(part, count).pixels, None),
    )


def _named(source: str, data_dir: Path | None, size: tuple[int, int] | None, channels: int) -> Source:
    if source == "digits":
        return digits()
    if source == "scene-digits":
        return scene_digits()
    if source.startswith("folder:"):
        return folder(Path(source.removeprefix("folder:")).expanduser(), size=size, channels=channels)
    if source in ("cifar10", "imagenette"):
        if data_dir is None:
            raise DataError(f'data "{source}" needs a folder that holds it: set DATA_DIR, or give its path')
        return cifar10(data_dir) if source == "cifar10" else imagenette(data_dir, size=size)
    if is_factory(source):
        made = call_factory(source, error=DataError)
        if not isinstance(made, Source):
            raise DataError(f'"{source}" must give a coinfer.data.Source, it gave a {type(made).__name__}')
        return made
    near = difflib.get_close_matches(source, _NAMES, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(_NAMES)},"
    raise DataError(f'unknown data "{source}": {hint} folder:PATH or package.module:factory')
