"""Butterfly's two tables, from its raw log: (a) on the paper's machines, by shares measured here, and (b) as measured.

The paper's machines (papers of 2019: butterfly and BottleNet): the whole network takes 15.7 ms and 1.3 W on the device
and a thirtieth of the time on the edge; sending takes alpha x rate + beta.  A unit's bytes are its symbols at 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coinfer.profile import RADIOS
from coinfer.protocol import HEADER_BYTES, message_wire_bytes
from coinfer.report.results import Row, read_raw
from coinfer.report.table import TextTable, markdown

LOG = "butterfly.jsonl.gz"
RATES_BPS = {"3g": 1.1e6, "4g": 5.85e6, "wifi": 18.88e6}
NAMES = {"3g": "3G", "4g": "4G", "wifi": "Wi-Fi"}
DEVICE_S, DEVICE_W, EDGE_TIMES = 15.7e-3, 1.3, 30.0
# What the paper's JPEG of a picture takes.
PAPER_JPEG_BYTES = 26_766
STAGES = ("head", "encode", "decode", "tail")


class Cost(NamedTuple):
    """Seconds and joules of one request."""

    latency_s: float
    energy_j: float


def paper_cost(radio: str, head_s: float, num_bytes: float, tail_s: float) -> Cost:
    """By the paper's formulas; `tail_s` is the edge's own time."""
    rate_bps = RATES_BPS[radio]
    sending_s = 8 * num_bytes / rate_bps
    power_w = RADIOS[radio].power_w(rate_bps)
    return Cost(head_s + sending_s + tail_s, head_s * DEVICE_W + sending_s * power_w)


def _lines() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    lines = read_raw(Path("docs/results/raw/bottleneck") / LOG)
    return [line for line in lines if line["block"]], next(line for line in lines if not line["block"])


def _paper(line: dict[str, Any], radio: str, key: str) -> Cost:
    scale_s = DEVICE_S / line["whole_s"]
    return paper_cost(radio, line["head_s"] * scale_s, line[key], line["tail_s"] * scale_s / EDGE_TIMES)


def _gains(line: dict[str, Any], raw_bytes: float, key: str) -> tuple[float, float]:
    """Raw upload's latency and energy over the unit's, means of the three radios."""
    ratios = []
    for radio in RATES_BPS:
        mine, upload = _paper(line, radio, key), paper_cost(radio, 0.0, raw_bytes, DEVICE_S / EDGE_TIMES)
        ratios.append((upload.latency_s / mine.latency_s, upload.energy_j / mine.energy_j))
    latency, energy = np.mean(ratios, axis=0)
    return float(latency), float(energy)


def _honest(line: dict[str, Any], radio: str) -> float:
    """The better of the device alone and the paper's JPEG upload over the unit."""
    others = (DEVICE_S, paper_cost(radio, 0.0, PAPER_JPEG_BYTES, DEVICE_S / EDGE_TIMES).latency_s)
    return min(others) / _paper(line, radio, "raw_bytes").latency_s


def rows() -> Iterator[Row]:
    """The paper's two figures at the best of the sixteen cuts, and the same against the better honest baseline."""
    blocks, whole = _lines()
    gains = {line["block"]: _gains(line, whole["raw_bytes"], "raw_bytes") for line in blocks}
    best = max(gains, key=lambda block: gains[block][0])
    line = next(line for line in blocks if line["block"] == best)
    against = f"raw upload, mean of 3G, 4G and Wi-Fi, after block {best} of ResNet-50; the paper's machines"
    honest = float(np.mean([_honest(line, radio) for radio in RATES_BPS]))
    for name, value, what in (
        ("butterfly_latency_x", gains[best][0], against),
        ("butterfly_energy_x", gains[best][1], against),
        ("butterfly_latency_x_honest", honest, f"the better of device alone and JPEG, as {against.split(', ', 1)[1]}"),
    ):
        yield Row(name=name, value=value, unit="ratio", how="estimated", n=line["repeats"], against=what, raw=LOG)


def text() -> list[str]:
    """Both tables as lines of markdown."""
    blocks, whole = _lines()
    return ["## Butterfly's ResNet-50", "", markdown(_paper_table(blocks, whole)), "", *_measured(blocks, whole)]


def _paper_table(blocks: list[dict[str, Any]], whole: dict[str, Any]) -> TextTable:
    columns = ["after block", "c'", "share of the network", "raw B", "coded B"]
    columns += [f"{name} {unit}" for name in NAMES.values() for unit in ("ms", "mJ")]
    columns += ["latency x", "energy x", "latency x, coded", "energy x, coded", "accuracy"]
    table = []
    for line in blocks:
        costs = [_paper(line, radio, "raw_bytes") for radio in RATES_BPS]
        cells = [str(line["block"]), str(line["width"]), f"{line['share']:.3f}"]
        cells += [str(line["raw_bytes"]), f"{line['coded_bytes']:.0f}"]
        cells += [f"{value:.1f}" for cost in costs for value in (1e3 * cost.latency_s, 1e3 * cost.energy_j)]
        gains = (*_gains(line, whole["raw_bytes"], "raw_bytes"), *_gains(line, whole["raw_bytes"], "coded_bytes"))
        table.append((*cells, *(f"{gain:.1f}" for gain in gains), "not measured"))
    edge_s = DEVICE_S / EDGE_TIMES
    for name, num_bytes in (("raw upload", whole["raw_bytes"]), ("JPEG upload (paper)", PAPER_JPEG_BYTES)):
        costs = [paper_cost(radio, 0.0, num_bytes, edge_s) for radio in RATES_BPS]
        table.append(_baseline(name, num_bytes, costs))
    table.append(_baseline("device alone", 0, [Cost(DEVICE_S, DEVICE_S * DEVICE_W)] * len(RATES_BPS)))
    return TextTable(
        columns=tuple(columns),
        rows=tuple(table),
        title=(
            "(a) The paper's machines, estimated: shares of the network measured here, scaled to 15.7 ms and 1.3 W on "
            "the device and a thirtieth on the edge; x: the raw upload over it, mean of the three radios; raw B "
            "without a header, coded B with 6 B of it, of a network whose weights are drawn at random"
        ),
    )


def _baseline(name: str, num_bytes: int, costs: list[Cost]) -> tuple[str, ...]:
    values = (f"{value:.1f}" for cost in costs for value in (1e3 * cost.latency_s, 1e3 * cost.energy_j))
    return (name, "", "", str(num_bytes), "", *values, "", "", "", "", "")


def _measured(blocks: list[dict[str, Any]], whole: dict[str, Any]) -> list[str]:
    columns = ("after block", "coded B", "wire B", *(f"{stage} ms" for stage in STAGES), "3G ms", "4G ms", "Wi-Fi ms")
    stages_s = {
        str(line["block"]): [
            line["head_s"] * EDGE_TIMES, line["encode_s"] * EDGE_TIMES, line["decode_s"], line["tail_s"],
        ]
        for line in blocks
    }  # fmt: skip
    sizes = {str(line["block"]): line["coded_bytes"] for line in blocks}
    stages_s["raw upload"], sizes["raw upload"] = [0.0, 0.0, 0.0, whole["whole_s"]], whole["raw_bytes"]
    jpeg_s = [0.0, whole["jpeg_encode_s"] * EDGE_TIMES, whole["jpeg_decode_s"], whole["whole_s"]]
    stages_s["JPEG, quality 90"], sizes["JPEG, quality 90"] = jpeg_s, whole["jpeg_bytes"]
    wire = {name: message_wire_bytes(round(size) + HEADER_BYTES, masked=True) for name, size in sizes.items()}
    totals_s = {
        name: [sum(stages_s[name]) + 8 * wire[name] / rate_bps for rate_bps in RATES_BPS.values()] for name in sizes
    }
    alone_s = whole["whole_s"] * EDGE_TIMES
    raw_s = sum(totals_s["raw upload"])
    table = [
        (
            name,
            f"{sizes[name]:.0f}",
            str(wire[name]),
            *(f"{1e3 * value:.2f}" for value in stages_s[name]),
            *(f"{1e3 * total:.0f}" for total in totals_s[name]),
            f"{raw_s / sum(totals_s[name]):.1f}",
        )
        for name in sizes
    ]
    alone = [f"{1e3 * alone_s:.0f}"] * 3
    table.append(("device alone", "0", "0", f"{1e3 * alone_s:.0f}", "", "", "", *alone, f"{raw_s / 3 / alone_s:.1f}"))
    title = (
        f"(b) The same with times measured here: fp32 segments and codecs on one core, the device {EDGE_TIMES:g} times "
        "slower, the link by its bytes at the radio's rate (1.1, 5.85, 18.88 Mbit/s), totals added up; x: the raw "
        "upload over it, mean of the three; energy is not measured: this machine has no sensor of power"
    )
    return [markdown(TextTable(columns=(*columns, "latency x"), rows=tuple(table), title=title)), ""]
