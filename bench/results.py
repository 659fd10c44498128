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

from coinfer.files import write_atomically
from coinfer.lab.record import CellLine, read_log
from coinfer.lab.summary import CellRow, OverheadRow, Summary, summarise
from coinfer.plan import Candidate, Kind
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.report.plots import Curve, plot_accuracy, plot_latency, plot_regimes
from coinfer.report.results import Results, Row, read_raw, results_markdown, write_results
from coinfer.report.table import BenchCell, TextTable, bench_table, markdown, regime_table
from coinfer.search.estimate import estimate
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


def row_of(name: str, value: float, unit: str, values: Sequence[float], *, raw: str, against: str | None = None) -> Row:
    """A row whose value stands for several that were measured, with their number and spread."""
    return Row(
        name=name,
        value=value,
        unit=unit,
        how="measured",
        n=len(values),
        against=against,
        spread=spread(values),
        raw=raw,
    )


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
    yield row_of(
        "codec_over_entropy",
        max(long),
        "ratio",
        long,
        raw=raw,
        against="cost under the static tables, worst payload of 1,000 symbols and more",
    )
    yield row_of(
        "codec_excess_bytes",
        max(excess),
        "B",
        excess,
        raw=raw,
        against="1.01 x cost under the static tables, worst payload of 16 symbols and more",
    )
    large = max(line["symbols"] for line in lines if line["kind"] == "speed")
    for name, coder in (("encode_MBps", "range"), ("encode_MBps_rans", "rans")):
        by_codec: dict[str, list[float]] = {}
        for line in lines:
            if line["kind"] == "speed" and line["codec"].endswith(f"-{coder}") and line["symbols"] == large:
                by_codec.setdefault(line["codec"], []).append(line["symbols"] / line["encode_s"] / 1e6)
        slowest = min(by_codec, key=lambda codec: statistics.median(by_codec[codec]))
        took = by_codec[slowest]
        yield row_of(
            name,
            statistics.median(took),
            "MB/s of symbols",
            took,
            raw=raw,
            against=f"{large} symbols; the slowest of 2, 4 and 8 bits ({slowest})",
        )
    for name, key in (("search_10k_ms", "from_list_s"), ("search_10k_again_ms", "from_table_s")):
        took = [1e3 * line[key] for line in lines if line["kind"] == "search"]
        yield row_of(
            name,
            statistics.median(took),
            "ms",
            took,
            raw=raw,
        )


def cell_name(net: str, cell: CellRow) -> str:
    """`NET/SLOWDOWN/RATE` of a row's name."""
    return f"{net}/{cell.slowdown:g}/{format_rate(cell.rate_bps).replace(' ', '')}"


def net_rows(net: str, summary: Summary) -> Iterable[Row]:
    """Regret, agreement and the speed-up of every cell of one network."""
    raw = f"{net}.cells.jsonl.gz"
    for cell in (cell for cell in summary.cells if cell.speedup is not None):
        yield Row(
            name=f"speedup_best_baseline@{cell_name(net, cell)}",
            value=cell.speedup,
            unit="ratio",
            how="measured",
            n=cell.chosen.latency_s.n,
            against=f"the best plan of another kind than the chosen one ({cell.chosen.kind})",
            raw=raw,
        )
    regrets = [cell.regret for cell in summary.cells]
    yield row_of(
        f"regret_max@{net}",
        max(regrets),
        "ratio",
        regrets,
        raw=raw,
        against="the best plan measured in the cell",
    )
    chosen = [abs(cell.chosen.estimate_error) for cell in summary.cells]
    every = [abs(plan.estimate_error) for plan in summary.plans if plan.latency_s.n]
    for name, errors in ((f"estimate_error_max@{net}", chosen), (f"estimate_error_max_any_plan@{net}", every)):
        yield row_of(
            name,
            max(errors),
            "ratio - 1",
            errors,
            raw=raw,
            against="the estimate, from times between the requests",
        )


def device_rows(summary: Summary) -> Iterable[Row]:
    """What the device process weighs when it is ready, and when it has run one plan for a whole stream."""
    ready, raw = summary.header.ready, "stream-edge.jsonl.gz"
    rss = summary.cells[0].device_rss_bytes or ready.rss_bytes
    for name, value, unit in (
        ("device_rss_MB", rss / 1e6, "MB"),
        ("device_rss_import_MB", ready.rss_import_bytes / 1e6, "MB"),
        ("device_import_s", ready.import_s, "s"),
        ("device_start_s", summary.header.start_s, "s"),
        ("device_has_torch", float(ready.has_torch), "yes or no"),
    ):
        yield Row(name=name, value=value, unit=unit, how="measured", n=1, raw=raw)


def stage_rows(net: str, summary: Summary) -> Iterable[Row]:
    """Which stages an estimate is off by: the link, or what one of the machines computed."""
    parts = {
        "link": ("exchange", ("send", "reply", "exchange")),
        "device": ("head encode", ("head", "encode")),
        "edge": ("decode tail", ("decode", "tail")),
    }
    for place, (measured, estimated) in parts.items():
        errors = []
        for plan in (p for p in summary.plans if p.latency_s.n and (place == "device" or p.kind != "device")):
            took_s = sum(plan.stages_s[name] for name in measured.split())
            expected_s = sum(plan.estimated_stages_s.get(name, 0.0) for name in estimated)
            if expected_s > 0:
                errors.append(abs(took_s / expected_s - 1))
        yield row_of(
            f"stage_error@{net}/{place}",
            statistics.median(errors),
            "ratio - 1, median",
            errors,
            raw=f"{net}.cells.jsonl.gz",
            against="the estimate of these stages, over all plans and cells",
        )


def bundle_estimate_row(net: str, summary: Summary) -> Row:
    """How far the estimates from the bundle's own times are off, as `coinfer plan` makes them, chosen plans only."""
    lines = read_raw(RAW / f"{net}.candidates.jsonl.gz")
    known = {c.plan.number: c for c in (msgspec.convert(line, Candidate) for line in lines)}
    exchange_s = overhead().seconds.p50 if exists("overhead.jsonl.gz") else 0.0
    errors, ratio = [], _int8_ratio(net)
    for cell in summary.cells:
        link = Link(rate_bps=cell.rate_bps, delay_s=cell.delay_s)
        device = Slowdown(fp32=cell.slowdown, int8=cell.slowdown * ratio)
        conditions = Conditions(link=link, device=device, edge_load=cell.load, exchange_s=exchange_s)
        expected_s = estimate(known[cell.chosen.plan], conditions).latency_s
        errors.append(abs(cell.chosen.latency_s.p50 / expected_s - 1))
    return row_of(
        f"estimate_error_max_uncalibrated@{net}",
        max(errors),
        "ratio - 1",
        errors,
        raw=f"{net}.candidates.jsonl.gz",
        against="the estimate from single stages' times, without the calibration over the link",
    )


def worst(name: str, rows: Sequence[Row], names: Sequence[str]) -> Row:
    """The largest of the rows of these names, under a name of its own."""
    mine = [row for row in rows if row.name in names]
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


def is_agreement(net: str) -> bool:
    """Whether a network's accuracy is agreement with the unmodified network's own answers."""
    return bool(read_raw(RAW / f"{net}.accuracy.jsonl.gz")[0]["is_agreement"])


def accuracy_table(net: str) -> TextTable:
    """Accuracy of every plan that a cell chose or held as a baseline, on images that no choice has seen."""
    lines = read_raw(RAW / f"{net}.accuracy.jsonl.gz")
    word = "agreement" if is_agreement(net) else "top-1"
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
        DOCS / f"rate-accuracy-{net}.png",
        candidates,
        title=f"{TITLES[net]}: bytes and accuracy (images that choices are made on)",
        is_agreement=is_agreement(net),
    )
    exchange_s = min(row.seconds.p50 for row in summary.overheads)
    base = Conditions(link=Link(rate_bps=1e6, delay_s=0.005), exchange_s=exchange_s)
    goal = Goal(max_loss_points=summary.header.max_loss_points)
    return regime_map(candidates, MAP_RATES, MAP_SLOWDOWNS, goal, int8_ratio=_int8_ratio(net), base=base)


def _int8_ratio(net: str) -> float:
    """How much more int8 was slowed than fp32 in the measured cells."""
    lines = [line for line in read_log(RAW / f"{net}.cells.jsonl.gz") if isinstance(line, CellLine)]
    return lines[0].slowdown.int8 / lines[0].slowdown.fp32


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
    shown = [f"![{title}](regime-map-{net}.png)", f"![bytes and accuracy](rate-accuracy-{net}.png)"]
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
    efficiencies: dict[str, float] = {}
    for bound in ("device", "link", "edge"):
        summary = summarise(read_log(RAW / f"stream-{bound}.jsonl.gz"))
        row = summary.streams[0]
        critical = {"device": "device", "link": "uplink", "edge": "edge"}[bound]
        if row.critical != critical:
            raise SystemExit(f"stream-{bound}.jsonl.gz is bound by {row.critical}: choose another cell")
        efficiencies[bound] = row.efficiency
        yield Row(
            name=f"estimate_error_max@{bound}-bound",
            value=abs(summary.cells[0].chosen.estimate_error),
            unit="ratio - 1",
            how="measured",
            n=summary.cells[0].chosen.latency_s.n,
            against="the estimate, from times between the requests",
            raw=f"stream-{bound}.jsonl.gz",
        )
        yield Row(
            name=f"pipeline_efficiency@{bound}-bound",
            value=row.efficiency,
            unit="ratio",
            how="measured",
            n=row.n,
            against=f"the rate of the critical resource ({row.critical}), {row.bottleneck_hz:.1f} Hz",
            raw=f"stream-{bound}.jsonl.gz",
        )
    worst = min(efficiencies, key=lambda bound: efficiencies[bound])
    yield Row(
        name="pipeline_efficiency",
        value=efficiencies[worst],
        unit="ratio",
        how="measured",
        n=3,
        against=f"the rate of the critical resource, worst of three cells ({worst}-bound)",
        raw=f"stream-{worst}.jsonl.gz",
    )


def overhead() -> OverheadRow:
    """What was measured on plain loopback."""
    return next(o for o in summarise(read_log(RAW / "overhead.jsonl.gz")).overheads if o.is_direct)


def overhead_row() -> Row:
    """Latency beyond the sum of the stages on plain loopback, the worst plan's median."""
    row = overhead()
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
        text += [markdown(bench_table(bench_cells(net, summary), is_agreement=is_agreement(net))), ""]
        text += [markdown(accuracy_table(net)), "", markdown(regime_table(regimes)), ""]
        rows += [*stage_rows(net, summary), bundle_estimate_row(net, summary)]
    cifar = [net for net in ("resnet56", "resnet20") if net in summaries]
    if exists("stream-edge.jsonl.gz"):
        rows += stream_rows()
        rows += device_rows(summarise(read_log(RAW / "stream-edge.jsonl.gz")))
    if cifar:
        rows.append(worst("regret_max", rows, [f"regret_max@{net}" for net in cifar]))
        cells = [*summaries, "device-bound", "link-bound", "edge-bound"]
        rows.append(worst("estimate_error_max", rows, [f"estimate_error_max@{cell}" for cell in cells]))
    if exists("overhead.jsonl.gz"):
        rows.append(overhead_row())
    if not summaries:
        raise SystemExit(f"no cells were measured: there is no log in {RAW}")
    first = next(iter(summaries.values())).header
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    results = Results(
        commit=_measured_commit(commit, [*summaries]),
        date=first.date,
        machine=f"{first.machine.processor}, {first.machine.cores} cores, {first.machine.system}",
        command="make bench-main",
        rows=tuple(msgspec.structs.replace(row, raw=f"{RAW.name}/{row.raw}") for row in rows),
    )
    write_results(DOCS / "main-job.json", results)
    head = (Path(__file__).parent / "main-job.head.md").read_text()
    page = [head, "## Rows", "", results_markdown(results), "", *text]
    write_atomically(DOCS / "main-job.md", ("\n".join(page).rstrip() + "\n").encode())
    into_readme(results, summaries)
    print(f"{len(rows)} rows written to {DOCS / 'main-job.json'}")


LARGER = """The same for MobileNetV2 at 224 x 224, at most 1 point of disagreement with the unmodified network:

![Which kind of plan wins for MobileNetV2](docs/results/regime-map-mobilenetv2.png)
"""


def into_readme(results: Results, summaries: dict[str, Summary]) -> None:
    """Put the first network's cells at the middle slowdown, and its regime map, between README's two marks."""
    net, summary = next(iter(summaries.items()))
    middle = sorted({cell.slowdown for cell in summary.cells})[1]
    cells = [cell for cell in bench_cells(net, summary) if cell.slowdown == middle]
    text = f"""{TITLES[net]}, given weights, at most {summary.header.max_loss_points:g} point of loss. Machine:
{results.machine}, {results.date[:10]}.
Device: one core slowed {middle:g}x; edge: the other core; one-way delay 5 ms. Latencies are medians over a shaped link,
measured side by side; "over": that baseline's latency over the chosen plan's.

{markdown(bench_table(cells))}

![Which kind of plan wins over link rate and device slowdown](docs/results/regime-map-{net}.png)

{LARGER if "mobilenetv2" in summaries else ""}
All cells, the other networks, and what falls short: [docs/results/main-job.md](docs/results/main-job.md).
"""
    readme = Path("README.md")
    begin, end = "<!-- results: written by `make results` from the raw logs -->\n", "<!-- /results -->"
    before, rest = readme.read_text().split(begin)
    write_atomically(readme, (before + begin + text + end + rest.split(end)[1]).encode())


def _measured_commit(now: str, nets: Sequence[str]) -> str:
    """The commit that measured, as the benchmark noted it for each network; `now` where it did not."""
    path = RAW / "commits.json"
    known = dict(json.loads(path.read_text())) if path.is_file() else {}
    commits = {net: str(known.get(net, now)) for net in nets}
    if len(set(commits.values())) == 1:
        return next(iter(commits.values()))
    return ", ".join(f"{net} {commit}" for net, commit in commits.items())


if __name__ == "__main__":
    main()
