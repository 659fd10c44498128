"""docs/results/main-job.{md,json} and its pictures, from the raw logs alone.

python -m bench.results      (what `make results` runs)
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coinfer.lab.record import read_log
from coinfer.lab.summary import CellRow, Summary, summarise
from coinfer.plan import Candidate, Kind
from coinfer.profile import Conditions, Link
from coinfer.report.plots import Curve, plot_accuracy, plot_latency, plot_regimes
from coinfer.report.results import Results, Row, read_raw, results_table, write_atomically, write_results
from coinfer.report.table import BenchCell, TextTable, bench_table, markdown, regime_table
from coinfer.search.goal import Goal
from coinfer.search.menu import RegimeMap, regime_map
from coinfer.units import format_rate

RAW = Path("docs/results/raw/main-job")
DOCS = Path("docs/results")
NETS = ("resnet56", "resnet20", "mobilenetv2", "scenes")
TITLES = {
    "resnet56": "ResNet-56, CIFAR-10",
    "resnet20": "ResNet-20, CIFAR-10",
    "mobilenetv2": "MobileNetV2 at 224 x 224",
    "scenes": "scene-resnet, scene-digits (the embedded default)",
}
MAP_RATES = tuple(float(f"{r:.3g}") for r in np.geomspace(1e4, 1e9, 26))
MAP_SLOWDOWNS = tuple(float(f"{s:.3g}") for s in np.geomspace(1, 300, 14))
KINDS: tuple[Kind, ...] = ("device", "upload", "split")


def exists(name: str) -> bool:
    """Whether a raw log of that name is there."""
    return (RAW / name).is_file()


def spread(values: Sequence[float]) -> tuple[float, float]:
    """5th and 95th percentile."""
    return float(np.percentile(values, 5)), float(np.percentile(values, 95))


def exactness_rows() -> Iterable[Row]:
    """How many cuts were tried and how many were not exact."""
    lines = read_raw(RAW / "exactness.jsonl.gz")
    for engine, suffix in (("torch", ""), ("onnx", "_onnx")):
        mine = [line for line in lines if line["engine"] == engine]
        raw = "exactness.jsonl.gz"
        wrong = float(sum(line["wrong"] for line in mine))
        yield Row(name=f"cuts_wrong{suffix}", value=wrong, unit="cuts", how="measured", n=len(mine), raw=raw)
        yield Row(name=f"cuts_tried{suffix}", value=len(mine), unit="cuts", how="measured", n=len(mine), raw=raw)
    worst = max(line["error"] for line in lines if line["engine"] == "onnx")
    yield Row(name="onnx_error_max", value=worst, unit="relative", how="measured", n=len(lines), raw=raw)


def part_rows() -> Iterable[Row]:
    """Codec against its cost, speed, search."""
    lines = read_raw(RAW / "parts.jsonl.gz")
    raw = "parts.jsonl.gz"
    codec = [line for line in lines if line["kind"] == "codec"]
    long = [line["code_bytes"] / line["cost_bytes"] for line in codec if line["symbols"] >= 1000]
    excess = [line["code_bytes"] - 1.01 * line["cost_bytes"] for line in codec]
    yield Row(
        name="codec_over_entropy",
        value=max(long),
        unit="ratio",
        how="measured",
        n=len(long),
        against="cost under the static tables, worst payload of 1,000 symbols and more",
        spread=spread(long),
        raw=raw,
    )
    yield Row(
        name="codec_excess_bytes",
        value=max(excess),
        unit="B",
        how="measured",
        n=len(excess),
        against="1.01 x cost under the static tables, worst payload of 16 symbols and more",
        spread=spread(excess),
        raw=raw,
    )
    large = max(line["symbols"] for line in lines if line["kind"] == "speed")
    for name, coder in (("encode_MBps", "range"), ("encode_MBps_rans", "rans")):
        by_codec: dict[str, list[float]] = {}
        for line in lines:
            if line["kind"] == "speed" and line["codec"].endswith(f"-{coder}") and line["symbols"] == large:
                by_codec.setdefault(line["codec"], []).append(line["symbols"] / line["encode_s"] / 1e6)
        slowest = min(by_codec, key=lambda codec: statistics.median(by_codec[codec]))
        took = by_codec[slowest]
        yield Row(
            name=name,
            value=statistics.median(took),
            unit="MB/s of symbols",
            how="measured",
            n=len(took),
            against=f"{large} symbols; the slowest of 2, 4 and 8 bits ({slowest})",
            spread=spread(took),
            raw=raw,
        )
    for name, key in (("search_10k_ms", "from_list_s"), ("search_10k_again_ms", "from_table_s")):
        took = [1e3 * line[key] for line in lines if line["kind"] == "search"]
        yield Row(
            name=name,
            value=statistics.median(took),
            unit="ms",
            how="measured",
            n=len(took),
            spread=spread(took),
            raw=raw,
        )


def cell_name(net: str, cell: CellRow) -> str:
    """`NET/SLOWDOWN/RATE` of a row's name."""
    return f"{net}/{cell.slowdown:g}/{format_rate(cell.rate_bps).replace(' ', '')}"


def net_rows(net: str, summary: Summary) -> Iterable[Row]:
    """Regret, agreement and the speed-up of every cell of one network."""
    raw = f"{net}.cells.jsonl.gz"
    for cell in summary.cells:
        yield Row(
            name=f"speedup_best_baseline@{cell_name(net, cell)}",
            value=min(cell.ratios.values()),
            unit="ratio",
            how="measured",
            n=cell.chosen.latency_s.n,
            against="the best of device-only, upload and plain split",
            raw=raw,
        )
    regrets = [cell.regret for cell in summary.cells]
    yield Row(
        name=f"regret_max@{net}",
        value=max(regrets),
        unit="ratio",
        how="measured",
        n=len(regrets),
        against="the best plan measured in the cell",
        spread=spread(regrets),
        raw=raw,
    )
    chosen = [abs(cell.chosen.estimate_error) for cell in summary.cells]
    every = [abs(plan.estimate_error) for plan in summary.plans if plan.latency_s.n]
    for name, errors in ((f"estimate_error_max@{net}", chosen), (f"estimate_error_max_any_plan@{net}", every)):
        yield Row(
            name=name,
            value=max(errors),
            unit="ratio - 1",
            how="measured",
            n=len(errors),
            against="the estimate made before measuring",
            spread=spread(errors),
            raw=raw,
        )


def device_rows(summary: Summary) -> Iterable[Row]:
    """What the device process weighs."""
    ready, raw = summary.header.ready, "resnet56.cells.jsonl.gz"
    rss = ready.rss_bytes / 1e6
    yield Row(name="device_rss_MB", value=rss, unit="MB", how="measured", n=1, raw=raw)
    imported = ready.rss_import_bytes / 1e6
    yield Row(name="device_rss_import_MB", value=imported, unit="MB", how="measured", n=1, raw=raw)
    yield Row(name="device_import_s", value=ready.import_s, unit="s", how="measured", n=1, raw=raw)
    yield Row(name="device_has_torch", value=float(ready.has_torch), unit="yes or no", how="measured", n=1, raw=raw)


def worst(name: str, rows: Sequence[Row], prefix: str, nets: Sequence[str]) -> Row:
    """The largest of the rows `prefix@NET` over these networks, under a name of its own."""
    mine = [row for row in rows if row.name in {f"{prefix}@{net}" for net in nets}]
    largest = max(mine, key=lambda row: row.value)
    return msgspec.structs.replace(largest, name=name, n=sum(row.n for row in mine))


def bench_cells(net: str, summary: Summary) -> list[BenchCell]:
    """The table's cells, with accuracy on the test part."""
    accuracy = {line["plan"]: line for line in read_raw(RAW / f"{net}.accuracy.jsonl.gz")}
    result = []
    for cell in summary.cells:
        plan = cell.chosen
        known = accuracy.get(plan.plan)
        result.append(
            BenchCell(
                rate_bps=cell.rate_bps,
                slowdown=cell.slowdown,
                kind=plan.kind,
                label=plan.label,
                latency_p50_s=plan.latency_s.p50,
                latency_p95_s=plan.latency_s.p95,
                estimated_s=plan.estimated_s,
                payload_bytes=plan.payload_bytes,
                wire_bytes=plan.wire_bytes,
                num_requests=plan.latency_s.n,
                accuracy=None if known is None else known["accuracy"],
                throughput_hz=None if cell.stream is None else cell.stream.throughput_hz,
                ratios=cell.ratios,
            )
        )
    return result


def accuracy_table(net: str) -> TextTable:
    """Accuracy of every plan that a cell chose or held as a baseline, on images that no choice has seen."""
    lines = read_raw(RAW / f"{net}.accuracy.jsonl.gz")
    word = "agreement" if lines[0]["is_agreement"] else "top-1"
    return TextTable(
        columns=("plan", f"{word} %", "loss, points", "payload B (mean)", "p95", "images"),
        rows=tuple(
            (
                line["label"],
                f"{line['accuracy']:.2f} ± {line['accuracy_ci']:.2f}",
                f"{line['loss_points']:.2f} ± {line['loss_ci_points']:.2f}",
                f"{line['payload_bytes']:.0f}",
                f"{line['payload_bytes_p95']:.0f}",
                str(line["n"]),
            )
            for line in lines
        ),
        title=f"{TITLES[net]}: {word} on images that no choice has seen",
    )


def map_of(net: str, summary: Summary) -> RegimeMap:
    """The regime map of one network from its survivors' evidence."""
    candidates = [msgspec.convert(line, Candidate) for line in read_raw(RAW / f"{net}.candidates.jsonl.gz")]
    plot_accuracy(
        DOCS / f"rate-accuracy-{net}.png", candidates, title=f"{TITLES[net]}: bytes and accuracy (validation)"
    )
    exchange_s = min(row.seconds.p50 for row in summary.overheads)
    base = Conditions(link=Link(rate_bps=1e6, delay_s=0.005), exchange_s=exchange_s)
    fp32 = next(c for c in candidates if c.plan.kind == "device" and c.plan.precision == "fp32")
    int8 = [c for c in candidates if c.plan.kind == "device" and c.plan.precision == "int8"]
    same = [c for c in int8 if c.plan.variant == fp32.plan.variant]
    ratio = max(1.0, fp32.evidence.head_s / same[0].evidence.head_s / 2) if same else 1.0
    goal = Goal(max_loss_points=summary.header.max_loss_points)
    return regime_map(candidates, MAP_RATES, MAP_SLOWDOWNS, goal, int8_ratio=ratio, base=base)


def pictures(net: str, summary: Summary, regimes: RegimeMap) -> list[str]:
    """Draw the regime map and latency over rate; the markdown that shows them."""
    machine = summary.header.machine.processor
    note = (
        f"device: one core of {machine}, slowed; edge: the other core; one-way delay 5 ms; {summary.header.date[:10]}"
    )
    measured = [(cell.rate_bps, cell.slowdown) for cell in summary.cells]
    title = f"{TITLES[net]}: which kind of plan wins, at most 1 point of loss"
    plot_regimes(
        DOCS / f"regime-map-{net}.png",
        regimes,
        title=title,
        note=f"estimated; dots measured; {note}",
        measured=measured,
    )
    shown = [f"![{title}](regime-map-{net}.png)"]
    for slowdown in sorted({cell.slowdown for cell in summary.cells}):
        cells = sorted((c for c in summary.cells if c.slowdown == slowdown), key=lambda c: c.rate_bps)
        if len(cells) < 3:
            continue
        curves = []
        for role in (*KINDS, "chosen"):
            points = [(c.rate_bps, _latency_of(c, role)) for c in cells if role == "chosen" or role in c.ratios]
            rates, latencies = zip(*points, strict=True)
            curves.append(Curve(role=role, rates_bps=rates, latencies_s=latencies))
        title = f"{TITLES[net]}: latency over rate, device slowed {slowdown:g}x"
        path = DOCS / f"latency-{net}-{slowdown:g}x.png"
        plot_latency(path, curves, title=title, note=f"measured medians; {note}")
        shown.append(f"![{title}]({path.name})")
    return shown


def _latency_of(cell: CellRow, role: Any) -> float:
    return cell.chosen.latency_s.p50 * (1.0 if role == "chosen" else cell.ratios[role])


def stream_rows() -> Iterable[Row]:
    """Throughput over the critical resource's rate in three cells, and the worst of them."""
    efficiencies = []
    for bound in ("device", "link", "edge"):
        row = summarise(read_log(RAW / f"stream-{bound}.jsonl.gz")).streams[0]
        efficiencies.append(row.efficiency)
        yield Row(
            name=f"pipeline_efficiency@{bound}-bound",
            value=row.efficiency,
            unit="ratio",
            how="measured",
            n=row.n,
            against=f"the rate of the critical resource ({row.critical}), {row.bottleneck_hz:.1f} Hz",
            raw=f"stream-{bound}.jsonl.gz",
        )
    yield Row(
        name="pipeline_efficiency",
        value=min(efficiencies),
        unit="ratio",
        how="measured",
        n=3,
        against="the rate of the critical resource, worst of three cells",
        raw="stream-device.jsonl.gz",
    )


def overhead_row() -> Row:
    """Latency beyond the sum of the stages on plain loopback, the worst plan's median."""
    row = next(o for o in summarise(read_log(RAW / "overhead.jsonl.gz")).overheads if o.is_direct)
    return Row(
        name="overhead_ms",
        value=1e3 * row.worst_plan_p50_s,
        unit="ms",
        how="measured",
        n=row.seconds.n,
        against="head + encode + decode + tail on an unshaped loopback link, worst plan's median",
        spread=(1e3 * row.seconds.p5, 1e3 * row.seconds.p95),
        raw="overhead.jsonl.gz",
    )


def main() -> None:
    """Everything that the raw logs allow."""
    summaries = {
        net: summarise(read_log(RAW / f"{net}.cells.jsonl.gz")) for net in NETS if exists(f"{net}.cells.jsonl.gz")
    }
    rows: list[Row] = []
    if exists("exactness.jsonl.gz"):
        rows += exactness_rows()
    if exists("parts.jsonl.gz"):
        rows += part_rows()
    text: list[str] = []
    for net, summary in summaries.items():
        rows += net_rows(net, summary)
        regimes = map_of(net, summary)
        text += [f"## {TITLES[net]}", "", *(line for p in pictures(net, summary, regimes) for line in (p, ""))]
        text += [markdown(bench_table(bench_cells(net, summary))), ""]
        text += [markdown(accuracy_table(net)), "", markdown(regime_table(regimes)), ""]
    cifar = [net for net in ("resnet56", "resnet20") if net in summaries]
    if cifar:
        rows.append(worst("regret_max", rows, "regret_max", cifar))
        rows.append(worst("estimate_error_max", rows, "estimate_error_max", cifar))
    if "resnet56" in summaries:
        rows += device_rows(summaries["resnet56"])
    if exists("stream-edge.jsonl.gz"):
        rows += stream_rows()
    if exists("overhead.jsonl.gz"):
        rows.append(overhead_row())
    first = next(iter(summaries.values())).header
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    results = Results(
        commit=_measured_commit(commit),
        date=first.date,
        machine=f"{first.machine.processor}, {first.machine.cores} cores, {first.machine.system}",
        command="make bench-main",
        rows=tuple(row for row in rows),
    )
    write_results(DOCS / "main-job.json", results)
    head = (Path(__file__).parent / "main-job.head.md").read_text()
    page = [head, "## Rows", "", markdown(results_table(results.rows)), "", *text]
    write_atomically(DOCS / "main-job.md", ("\n".join(page).rstrip() + "\n").encode())
    print(f"{len(rows)} rows written to {DOCS / 'main-job.json'}")


def _measured_commit(now: str) -> str:
    """The commit that was measured, as the benchmark noted it; `now` where it did not."""
    path = RAW / "commit.json"
    return str(json.loads(path.read_text())["commit"]) if path.is_file() else now


if __name__ == "__main__":
    main()
