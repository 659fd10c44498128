"""What `pip install .` gives a device.  Needs the package registry."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from coinfer.bundle import Bundle
from tiny_bundle import DEVICE, pictures

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MANYLINUX = ("manylinux_2_17_aarch64", "manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")


def test_a_light_installation_runs_a_bundle_without_torch(tiny_bundle: Bundle, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    programs = tmp_path / "venv" / "bin"
    subprocess.run([programs / "pip", "install", "--quiet", source], check=True, timeout=280)
    listed = subprocess.run([programs / "pip", "list", "--format=json"], capture_output=True, check=True, text=True)
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert {"coinfer", "onnxruntime", "numpy"} <= names
    assert names & {"torch", "onnx", "scipy", "scikit-learn", "matplotlib", "uvicorn"} == set()
    np.save(tmp_path / "x.npy", pictures(2))
    command = [programs / "coinfer", "run", tiny_bundle.folder, "--data", tmp_path / "x.npy", "--plan", str(DEVICE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("\n") == 2, done.stderr
    refused = subprocess.run([programs / "coinfer", "inspect", "resnet20"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and 'pip install "coinfer[build]"' in refused.stderr


def test_an_arm_board_needs_no_compiler(tmp_path: Path):
    """Every dependency of the device has a wheel for 64-bit ARM, or a marker that leaves it out there."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    board = {"platform_machine": "aarch64", "sys_platform": "linux", "python_version": "3.11", "extra": ""}
    needed = [r for r in map(Requirement, wanted) if r.marker is None or r.marker.evaluate(board)]
    assert {"numpy", "onnxruntime"} <= {r.name for r in needed} and "constriction" not in {r.name for r in needed}
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    command += ["--target", str(tmp_path), "--only-binary=:all:", "--python-version", "3.11"]
    command += [f"--platform={platform}" for platform in MANYLINUX]
    command += [f"{r.name}{r.specifier}" for r in needed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
