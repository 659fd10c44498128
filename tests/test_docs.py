"""What the documents claim: examples in docstrings run, commands and targets exist, links lead somewhere."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import coinfer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "coinfer"
TORCH_PARTS = {"model", "compress", "build"}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in TORCH_PARTS and ">>> " in path.read_text(encoding="utf-8")
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def test_there_are_examples_to_run():
    assert len(MODULES) > 5


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_in_docstrings(path: Path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0


def blocks(*languages: str) -> list[tuple[str, str]]:
    """(document, text) of every fenced block in one of these languages."""
    return [
        (document.name, text)
        for document in DOCUMENTS
        for language, text in BLOCK.findall(document.read_text(encoding="utf-8"))
        if language in languages
    ]


def test_python_blocks_use_names_that_exist():
    for name, text in blocks("python"):
        for node in ast.walk(ast.parse(text, filename=name)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "coinfer":
                assert hasattr(coinfer, node.attr) or importlib.import_module(f"coinfer.{node.attr}"), name
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "coinfer":
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{name}: {node.module} has no {alias.name}"


def test_toml_blocks_are_toml():
    for _, text in blocks("toml"):
        assert tomllib.loads(text)


def command_lines() -> list[tuple[str, list[str]]]:
    """(document, words) of each command line, continued lines joined, prompts and comments left out."""
    found = []
    for name, text in blocks("sh", "bash", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                found.append((name, words))
    return found


def test_commands_and_make_targets_exist():
    typer = pytest.importorskip("typer")
    from coinfer.cli.app import app

    commands = typer.main.get_command(app).commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name, words in command_lines():
        program = words[0].rsplit("/", 1)[-1]
        if program == "make":
            asked = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            assert set(asked) <= targets, f"{name}: {' '.join(words)}"
        if program == "coinfer" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in commands, f"{name}: {' '.join(words)}"
            known = {option for item in commands[words[1]].params for option in (*item.opts, *item.secondary_opts)}
            used = {word.split("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
            assert used <= known | {"--help", "-h"}, f"{name}: {' '.join(words)}"


def test_links_lead_to_files():
    missing = [
        f"{document.name}: {target}"
        for document in DOCUMENTS
        for target in LINK.findall(document.read_text(encoding="utf-8"))
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert missing == []


def test_the_command_page_is_what_help_prints():
    page = ROOT / "docs" / "cli.md"
    if not page.is_file():
        pytest.skip("docs/cli.md is not there yet: `make docs` writes it")
    done = subprocess.run([sys.executable, "-m", "coinfer.cli.reference"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert page.read_text(encoding="utf-8") == done.stdout, "run `make docs`"
