"""docs/results/main-job.{md,json} and its pictures, from the raw logs alone.

python -m bench.results      (what `make results` runs)
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path

import msgspec

from coinfer.files import write_atomically
from coinfer.lab.record import read_log
from coinfer.lab.summary import OverheadRow, Summary, summarise
from coinfer.report.results import Results, Row, read_raw, results_markdown, write_results
from coinfer.report.table import bench_table, markdown

from .tables import (
    DOCS,
    Measured,
    bench_cells,
    bundle_estimate_row,
    map_of,
    measured_commit,
    net_rows,
    row_of,
    section,
    stage_rows,
    worst,
)

RAW = Path("docs/results/raw/main-job")
NETS = (
    Measured("resnet56", "ResNet-56, CIFAR-10", RAW),
    Measured("resnet20", "ResNet-20, CIFAR-10", RAW),
    Measured("mobilenetv2", "MobileNetV2 at 224 x 224", RAW),
    Measured("scenes", "scene-resnet, scene-digits (the embedded default)", RAW),
)


def exists(name: str) -> bool:
    """Whether a raw log of that name is there."""
    return (RAW / name).is_file()


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
    summaries = {net: net.summary() for net in NETS if net.log.is_file()}
    rows: list[Row] = []
    if exists("exactness.jsonl.gz"):
        rows += exactness_rows()
    if exists("parts.jsonl.gz"):
        rows += part_rows()
    text: list[str] = []
    exchange_s = overhead().seconds.p50 if exists("overhead.jsonl.gz") else 0.0
    for net, summary in summaries.items():
        regimes = map_of(net, summary)
        text += section(net, summary, regimes)
        rows += [*net_rows(net, summary), *stage_rows(net, summary), bundle_estimate_row(net, summary, exchange_s)]
    names = [net.name for net in summaries]
    cifar = [name for name in ("resnet56", "resnet20") if name in names]
    if exists("stream-edge.jsonl.gz"):
        rows += stream_rows()
        rows += device_rows(summarise(read_log(RAW / "stream-edge.jsonl.gz")))
    if cifar:
        rows.append(worst("regret_max", rows, [f"regret_max@{net}" for net in cifar]))
        cells = [*names, "device-bound", "link-bound", "edge-bound"]
        rows.append(worst("estimate_error_max", rows, [f"estimate_error_max@{cell}" for cell in cells]))
    if exists("overhead.jsonl.gz"):
        rows.append(overhead_row())
    if not summaries:
        raise SystemExit(f"no cells were measured: there is no log in {RAW}")
    first = next(iter(summaries.values())).header
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    results = Results(
        commit=measured_commit(commit, RAW, names),
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


def into_readme(results: Results, summaries: dict[Measured, Summary]) -> None:
    """Put the first network's cells at the middle slowdown, and its regime map, between README's two marks."""
    net, summary = next(iter(summaries.items()))
    middle = sorted({cell.slowdown for cell in summary.cells})[1]
    cells = [cell for cell in bench_cells(net, summary) if cell.slowdown == middle]
    text = f"""{net.title}, given weights, at most {summary.header.max_loss_points:g} point of loss. Machine:
{results.machine}, {results.date[:10]}.
Device: one core slowed {middle:g}x; edge: the other core; one-way delay 5 ms. Latencies are medians over a shaped link,
measured side by side; "over": that baseline's latency over the chosen plan's.

{markdown(bench_table(cells))}

![Which kind of plan wins over link rate and device slowdown](docs/results/regime-map-{net.name}.png)

{LARGER if any(net.name == "mobilenetv2" for net in summaries) else ""}
All cells, the other networks, and what falls short: [docs/results/main-job.md](docs/results/main-job.md).
"""
    readme = Path("README.md")
    begin, end = "<!-- results: written by `make results` from the raw logs -->\n", "<!-- /results -->"
    before, rest = readme.read_text().split(begin)
    write_atomically(readme, (before + begin + text + end + rest.split(end)[1]).encode())


if __name__ == "__main__":
    main()
