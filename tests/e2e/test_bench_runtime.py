"""The benches of the runtime for seconds: faults, a soak, many devices, TLS; what they must find, but no times."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coinfer.bundle import Bundle
from coinfer.report.results import read_raw
from coinfer.runtime.device import Device
from coinfer.runtime.request import Answer
from coinfer.runtime.spawn import EdgeProcess
from tiny_bundle import UPLOAD, make_tiny_bundle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def at_the_root() -> Iterator[None]:
    """`bench` is a package of the project's root, for this process and for those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("runtime") / "small", has_evidence=True)


def module(name: str) -> Any:
    return importlib.import_module(f"bench.{name}")


# --- chaos -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["split", "split, TLS", "split in batches"])
def test_under_faults_nothing_is_lost_twice_or_wrong(small: Bundle, tmp_path: Path, name: str) -> None:
    chaos = module("chaos")
    settings = tuple(setting for setting in chaos.SETTINGS if setting.name == name)
    figures = chaos.chaos(small, 150, seed=5, raw=tmp_path, settings=settings, rate_hz=60.0)
    assert figures["chaos_requests"] == 150 and figures["faults"] >= 1
    assert [figures[f"chaos_{what}"] for what in ("lost", "duplicated", "wrong")] == [0, 0, 0]
    assert figures["computed_twice"] == 0 and figures["accidents"] == []
    assert figures["answered"]["edge"] >= 1
    assert json.loads((tmp_path / "chaos.json").read_bytes())["chaos_requests"] == 150
    kinds = [line["kind"] for line in read_raw(tmp_path / "chaos.jsonl.gz")]
    assert kinds.count("request") == 150 and kinds.count("fault") == figures["faults"]


def test_every_kind_of_fault_strikes_and_passes(small: Bundle, tmp_path: Path) -> None:
    chaos, answers = module("chaos"), module("answers")
    pictures = answers.pictures_of(small)
    for secure in (False, True):
        setting = chaos.Setting("all", "split", secure, 0.5, 1)
        folder = tmp_path / str(secure)
        folder.mkdir()
        with chaos.World(setting, small, folder, 1) as world:
            names = sorted(world.faults())
            assert ("certificate expired" in names, "replies swapped" in names) == (secure, not secure)
            plan = chaos._plan_of(small, "split").number
            device = chaos.GuardedDevice(small, edge=world.url, plan=plan, keep=setting.keep, seed=1, **world.link)
            with device:
                for name in names:
                    heal = world.faults()[name]()
                    assert device.infer(pictures[0]).is_answered
                    heal()
                    # It comes back by itself, however long that takes on a busy machine.
                    while device.infer(pictures[1]).answered != "edge":
                        pass


def test_a_wrong_answer_is_found(small: Bundle) -> None:
    answers = module("answers")
    pictures = answers.pictures_of(small)
    references = answers.References(small, pictures)
    with EdgeProcess(small.folder) as edge, Device(small, edge=edge.url, plan=UPLOAD) as device:
        found: list[Answer] = [device.infer(picture) for picture in pictures[:3]]
    assert [references.judge(answer, k) for k, answer in enumerate(found)] == ["same"] * 3
    assert [references.judge(answer, k + 1) for k, answer in enumerate(found)] == ["wrong"] * 3
    shifted = Answer(found[0].request, found[0].outcome, (), (found[0].outputs[0] * np.float32(1 + 1e-6),))
    assert references.judge(shifted, 0) == "close"
    assert references.tell_apart(UPLOAD) == 0


def test_two_computations_of_one_request_are_counted(small: Bundle, tmp_path: Path) -> None:
    counted, chaos = module("counted_edge"), module("chaos")
    log = tmp_path / "edge.log"
    with EdgeProcess(small.folder, module="bench.counted_edge", options=("--log", str(log))) as edge:
        for _ in range(2):
            with Device(small, edge=edge.url, plan=UPLOAD) as device:
                for picture in module("answers").pictures_of(small)[:3]:
                    device.infer(picture)
    computed = counted.read_computed(log)
    assert computed == [(connection, request) for connection in range(2) for request in range(3)]
    # Each device counts from 0: as if of one device, these were computed twice.
    assert chaos._twice([request for _, request in computed]) == 3


# --- soak, load, TLS ---------------------------------------------------------------------------------


def test_a_soak_looks_at_all_processes_and_cuts_their_links(small: Bundle, tmp_path: Path) -> None:
    soak = module("soak")
    figures = soak.soak(small.folder, 1200, raw=tmp_path, turn=40)
    assert figures["soak_requests"] == 1200 and figures["reconnects"] >= 20
    assert set(figures["processes"]) == {"device", "edge", "edge with TLS"}
    for process in figures["processes"].values():
        assert process["threads"][0] > 0 and process["fds"][1] > 0
    # The devices that live are gone when their process is.
    assert figures["edge_connections"][1] == 0
    assert read_raw(tmp_path / "soak.jsonl.gz")[-1]["done"] == 1200


def test_growth_is_of_the_line_behind_the_first_tenth() -> None:
    growth_pct = module("soak").growth_pct
    done = list(range(0, 1001, 10))
    level = [50_000 if x < 100 else 100_000 for x in done]
    assert growth_pct(done, level, 1000) == 0.0
    rising = [y + 10 * x for x, y in zip(done, level, strict=True)]
    assert growth_pct(done, rising, 1000) == pytest.approx(100 * 9000 / 101_000)
    # A look that is far off moves nothing.
    rising[50] *= 3
    assert growth_pct(done, rising, 1000) == pytest.approx(100 * 9000 / 101_000)


def test_many_devices_are_served_and_all_are_counted(small: Bundle, tmp_path: Path) -> None:
    load = module("load")
    figures = load.load(small, devices=12, seconds=0.5, rounds=1, raw=tmp_path, raw_s=0.05)
    assert figures["load_devices"] == 12 and figures["load_efficiency"] > 0
    saturated, once, thrice = figures["steps"]
    assert [step["step"] for step in (saturated, once, thrice)] == ["saturation", "1x", "3x"]
    assert saturated["answered"] >= 12 and saturated["failed"] == once["failed"] == thrice["failed"] == 0
    lines = read_raw(tmp_path / "load.jsonl.gz")
    assert len(lines) == 36
    for place, step in enumerate(figures["steps"]):
        of_step = [line for line in lines if line["course"] == place]
        assert sum(line["answered"] for line in of_step) == step["answered"]
        assert all(len(line["latency_ms"]) == line["answered"] for line in of_step)


def test_what_tls_adds_is_counted_byte_by_byte(small: Bundle, tmp_path: Path) -> None:
    figures = module("tls_overhead").overhead(small, 20, raw=tmp_path, connections=3)
    assert figures["pairs"] == len(read_raw(tmp_path / "tls.jsonl.gz")) == 20
    # TLS 1.3 puts 22 bytes around each record: header, type, tag.
    assert figures["more_bytes"]["request"]["up_bytes"] == 22
    assert figures["more_bytes"]["request"]["down_bytes"] == 22
    assert figures["more_bytes"]["connection_and_first_request"]["down_bytes"] > 500
