"""A user's own function by name: `package.module:factory`, as jobs and the command line write it.

The current folder counts as importable for that one import, so that a file beside the job is
enough.  Only finding and importing live here; what the function must return is the caller's concern.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from .errors import CoinferError

# What may come out of a user's module or function.
USER_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)
_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_factory(source: str) -> bool:
    """Whether the text has the form `package.module:factory`.

    >>> is_factory("my_models.small:make"), is_factory("folder:photos/"), is_factory("resnet20")
    (True, False, False)
    """
    return _PATTERN.fullmatch(source) is not None and not source.startswith("folder:")


def import_object(source: str, *, error: type[CoinferError]) -> Any:
    """The object that `package.module:name` names.

    Raises:
        error: the module cannot be found or imported, or has no such name.
    """
    module_name, _, name = source.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        where = "" if missing.name == module_name else f' (needed by "{module_name}")'
        raise error(
            f'no module "{missing.name}"{where}: looked in {here} and the environment ("{source}")'
        ) from missing
    except USER_ERRORS as broken:
        raise error(f'module "{module_name}" cannot be imported: {_where(broken)} ("{source}")') from broken
    finally:
        sys.path.remove(here)
    if not hasattr(module, name):
        raise error(f'module "{module_name}" ({module.__file__}) has no "{name}" ("{source}")')
    return getattr(module, name)


def call_factory(source: str, *, error: type[CoinferError]) -> Any:
    """What the function that `package.module:name` names returns when called without arguments.

    Raises:
        error: it cannot be imported, cannot be called without arguments, or raises an error of its own.
    """
    made = import_object(source, error=error)
    if not callable(made):
        raise error(f'"{source}" must be a function without arguments, got a {type(made).__name__}')
    try:
        inspect.signature(made).bind()
    except TypeError as wrong:
        raise error(f'"{source}" must be callable without arguments: {wrong}') from wrong
    except ValueError:  # a builtin without a readable signature: calling it is the only test
        pass
    try:
        return made()
    except CoinferError:
        raise
    except USER_ERRORS as broken:
        raise error(f'"{source}" failed: {_where(broken)}') from broken


def _where(error: Exception) -> str:
    """What went wrong in the user's code, on one line, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{'' if isinstance(error, SyntaxError) else place}"
