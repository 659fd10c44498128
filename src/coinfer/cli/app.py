"""The commands by name, and the one place where an error becomes a line and an exit code.

    0    done
    1    coinfer could not do it (a CoinferError, an unreadable file, Ctrl-C)
    2    the command line was not understood

`coinfer --debug COMMAND ...` shows the traceback as well.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated

import typer
from typer.exceptions import TyperException

from .. import __version__
from ..errors import CoinferError
from .bench import bench
from .build import build
from .cert import cert
from .demo import demo
from .doctor import doctor
from .evaluate import evaluate
from .inspect import inspect
from .plan import plan
from .profile import profile
from .run import run
from .serve import serve
from .sign import sign
from .simulate import simulate
from .token import token

# In the order of use: what a network allows, a bundle from it, its evidence, the two machines.
COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "build": build,
    "profile": profile,
    "plan": plan,
    "evaluate": evaluate,
    "serve": serve,
    "run": run,
    "bench": bench,
    "simulate": simulate,
    "demo": demo,
    "doctor": doctor,
    "token": token,
    "cert": cert,
    "sign": sign,
}

# Which extra of the package brings a module that a light installation does not have.
EXTRAS = {
    "torch": "build",
    "onnx": "build",
    "onnxscript": "build",
    "scipy": "build",
    "simpy": "build",
    "sklearn": "build",
    "matplotlib": "build",
    "cryptography": "edge",
    "prometheus_client": "edge",
    "starlette": "edge",
    "uvicorn": "edge",
}

app = typer.Typer(
    name="coinfer",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"coinfer {__version__}")
        raise typer.Exit


@app.callback()
def coinfer(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error as well.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Find, build and run the best division of a network between device and edge.

    A usual session: inspect a model's cuts, build a bundle from a job file, copy the bundle to both
    machines, look at the plan for your link, serve on the edge, run on the device.
    """


for _name, _command in COMMANDS.items():
    app.command(_name, no_args_is_help=False)(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; never raises for an error that coinfer expects."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    show_traceback = "--debug" in arguments[:1]
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(arguments, show_traceback)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: list[str], show_traceback: bool) -> int:
    try:
        code = app(arguments, prog_name="coinfer", standalone_mode=False)
        sys.stdout.flush()
        # Typer gives 128 + SIGINT for Ctrl-C, in silence.
        return _fail("interrupted", 1, False) if code == 130 else code if isinstance(code, int) else 0
    except BrokenPipeError:
        # Whoever read our output has enough (`coinfer ... | head`): what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 1, show_traceback)
    except CoinferError as error:
        return _fail(f"error: {error}", error.exit_code, show_traceback)
    except TyperException as error:
        return _fail(f"error: {error.format_message()} (see coinfer --help)", 2, show_traceback)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(
            f'error: this command needs {error.name}: pip install "coinfer[{extra}]"', 1, show_traceback
        )
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"error: {where}{error.strerror or error}", 1, show_traceback)


def _stop(number: int, frame: FrameType | None) -> None:
    # A polite kill ends a command as Ctrl-C does, so that nothing is left half written.
    raise KeyboardInterrupt


def _fail(message: str, code: int, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exc()
    print(f"coinfer: {' '.join(message.split())}", file=sys.stderr)
    return code
