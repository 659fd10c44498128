"""The shape of the package: public names, layers, what is free of torch, house rules."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import coinfer
from coinfer import errors
from coinfer.plan import Value

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "coinfer"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. Within a level, a part may import those to the left of it; SIBLINGS may not even that.
LEVELS = (
    ("errors", "units", "factory", "files"),
    ("plan", "profile", "timeline", "exits", "bundle", "signature", "protocol", "stages"),
    ("data", "codec", "engine", "model", "compress"),
    ("search", "build"),
    ("runtime", "simulate"),
    ("report", "lab"),
    ("cli",),
)
SIBLINGS = {("simulate", "runtime")}
TORCH_PARTS = {"model", "compress", "build"}
# Their modules are imported inside the command that needs them.
LATE_PARTS = {"cli"}
ORDER = [part for level in LEVELS for part in level]


def name_of(path: Path) -> str:
    """Dotted name of a module below src/."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(path: Path) -> str:
    """The layer a module belongs to; "" for coinfer/__init__.py itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path, *, at_run_time: bool) -> Iterator[tuple[str, int]]:
    """Absolute names that a module imports, with the line; at_run_time leaves out `if TYPE_CHECKING`."""
    tree = tree_of(path)
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if at_run_time and id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)


def is_late(path: Path, line: int) -> bool:
    """Whether a line lies inside a function."""
    tree = tree_of(path)
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return any(node.lineno <= line <= (node.end_lineno or 0) for node in functions)


def test_every_part_has_a_level():
    assert {part_of(path) for path in MODULES} - {""} <= set(ORDER)


def test_imports_point_down_only():
    wrong = []
    for path in MODULES:
        part = part_of(path)
        for name, line in imports_of(path, at_run_time=False):
            words = name.split(".")
            target = words[1] if words[0] == "coinfer" and len(words) > 1 else ""
            if part in ("", target) or target not in ORDER:
                continue
            if ORDER.index(target) > ORDER.index(part) or (part, target) in SIBLINGS:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert wrong == []


def test_only_the_building_layers_mention_torch():
    wrong = []
    for path in MODULES:
        part = part_of(path)
        if part in TORCH_PARTS:
            continue
        for name, line in imports_of(path, at_run_time=True):
            words = name.split(".")
            is_torch = words[0] in ("torch", "torchvision") or (words[0] == "coinfer" and words[1] in TORCH_PARTS)
            if is_torch and not (part in LATE_PARTS and is_late(path, line)):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    program = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_device_loads_what_it_runs_and_no_more():
    loaded = loaded_after("import coinfer.runtime.device")
    assert {"numpy", "onnxruntime"} <= loaded
    heavy = {"torch", "torchvision", "onnx", "onnxscript", "scipy", "sklearn", "networkx", "matplotlib"}
    assert loaded & (heavy | {"starlette", "uvicorn"}) == set()


def test_torch_free_modules_load_without_torch():
    free = [
        name_of(path)
        for path in MODULES
        if part_of(path) not in TORCH_PARTS and path.stem != "__main__" and name_of(path) != "coinfer.lab.worker"
    ]
    assert "torch" not in loaded_after("\n".join(f"import {name}" for name in free))


def test_public_names():
    assert coinfer.__all__ == sorted(coinfer.__all__)
    assert {"capture", "split", "Graph", "load_bundle", "Plan", "CoinferError"} <= set(coinfer.__all__)
    for name in coinfer.__all__:
        assert getattr(coinfer, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'partition'"):
        _ = coinfer.partition


def test_the_version_is_stated_once_more_in_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == coinfer.__version__


def drawn_tree() -> dict[str, str]:
    """Error class -> parent, as drawn in the docstring of errors.py."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^( {4}[ │├└─]*)([A-Z]\w+)( {2,}\S|$)", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        above = [entry for entry in above if entry[0] < depth]
        parents[name] = above[-1][1] if above else "Exception"
        above.append((depth, name))
    return parents


def test_every_error_stands_in_the_drawn_tree():
    classes = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert drawn_tree() == {name: kind.__base__.__name__ for name, kind in classes.items()}
    assert errors.__all__ == sorted(classes)
    assert all(kind.__doc__ for kind in classes.values())


def test_usage_errors_alone_end_with_2():
    codes = {name: getattr(errors, name).exit_code for name in errors.__all__}
    assert {name for name, code in codes.items() if code == 2} == {"UsageError"}
    assert set(codes.values()) == {1, 2}


def test_nouns_take_keywords_only_and_never_change():
    for path in MODULES:
        if part_of(path) not in TORCH_PARTS | LATE_PARTS and path.stem != "__main__":
            __import__(name_of(path))
    nouns = list(Value.__subclasses__())
    assert len(nouns) > 20
    for noun in nouns:
        kinds = {parameter.kind for parameter in inspect.signature(noun).parameters.values()}
        assert kinds <= {inspect.Parameter.KEYWORD_ONLY}, noun
        assert noun.__struct_config__.frozen and noun.__struct_config__.forbid_unknown_fields, noun


def calls_in(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_house_rules(path: Path):
    text = path.read_text(encoding="utf-8")
    tree = tree_of(path)
    assert ast.get_docstring(tree), "a module says what it is responsible for"
    assert text.count("\n") <= 400, "a file has at most 400 lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            assert caught not in ("", "Exception"), f"line {node.lineno} catches everything"
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            raised = ast.unparse(node.exc.func)
            assert raised not in ("Exception", "BaseException", "RuntimeError"), f"line {node.lineno} raises {raised}"
    for name, line in calls_in(tree):
        assert name != "print" or part_of(path) in ("cli", "report"), f"line {line} prints"
        assert name not in ("eval", "exec", "os.system"), f"line {line} calls {name}"
        assert not name.startswith("warnings.filter"), f"line {line} filters warnings"
        assert name != "warnings.simplefilter", f"line {line} filters warnings"
    for name, line in imports_of(path, at_run_time=False):
        assert name.split(".")[0] not in ("pickle", "dill", "joblib"), f"line {line} imports {name}"
