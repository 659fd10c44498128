"""docs/results/bottleneck.{md,json} and its pictures, from the raw logs alone.

python -m bench.bottleneck_results      (what `make results` runs)
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coinfer.codec import HEADER_BYTES
from coinfer.compress.divided import Reduction
from coinfer.compress.encoder import num_macs
from coinfer.compress.unit_file import load_unit
from coinfer.files import write_atomically
from coinfer.lab.summary import Summary
from coinfer.model.zoo import weights_digest
from coinfer.plan import Candidate
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.report.rates_plot import RateCurve, plot_rates
from coinfer.report.results import Results, Row, read_raw, results_markdown, write_results
from coinfer.report.table import TextTable, markdown
from coinfer.search.estimate import Table, estimate
from coinfer.search.goal import Goal
from coinfer.search.menu import at
from coinfer.search.solve import baselines

from . import butterfly_results, grid_results
from .bottleneck import FINISHED, GRID_RATES, GRID_SLOWDOWNS, UNITS, path_of
from .tables import DOCS, Measured, cell_name, int8_ratio_of, map_of, measured_commit, net_rows, section, spread
from .trainees import network

RAW = Path("docs/results/raw/bottleneck")
NET = Measured("resnet56-units", "ResNet-56 with units, CIFAR-10", RAW)
NETWORK = "resnet56"
CURVES = f"{NETWORK}-rates.curves.jsonl.gz"
TITLES = {NETWORK: "ResNet-56", "resnet18-half": "ResNet-18 of half width, warm start"}
BBNET_RATES = (100e3, 300e3, 500e3, 700e3, 900e3, 1.1e6, 1.3e6, 1.5e6, 2.5e6, 3.5e6)
BBNET_SLOWDOWN = 100.0
# The unit at an early cut, with at most 10 % of the compute on the device.
EARLY = "early"
# Asked for, by the name of the rows: of which unit, bytes and points of loss.
ASKED = {"last": ("last", 16, 0.2), "middle": ("middle", 128, 0.5), "first": (EARLY, 300, 1.0)}


def points(unit: str, curves: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The lines of one unit that have these values, from few bytes to many."""
    prior = next(line for line in read_raw(RAW / "prior.jsonl.gz") if line["unit"] == unit)
    lines = [line for line in curves if is_of(line, prior) and all(line[key] == wanted[key] for key in wanted)]
    return sorted(lines, key=lambda line: line["payload_bytes"])


def is_of(line: dict[str, Any], prior: dict[str, Any]) -> bool:
    """Whether a line of the curves is of the unit of a line of the priors: same cut, same shape."""
    # Units of one shape at several cuts are told apart by a number.
    is_named = line["variant"] == prior["variant"] or line["variant"].startswith(f"{prior['variant']}-")
    return line["rate"] is not None and line["cut"] == prior["cut"] and is_named


def best_within(lines: Sequence[dict[str, Any]], loss: float) -> dict[str, Any]:
    """Of fewest bytes that loses at most so many points on the images of choice; else the one of the least loss."""
    fine = [line for line in lines if line["validation_loss_points"] <= loss]
    if fine:
        return min(fine, key=lambda line: line["payload_bytes"])
    return min(lines, key=lambda line: line["validation_loss_points"])


def unit_rows(curves: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Bytes and loss of the three units that figures are asked of, and the light head's share of the compute.

    Rate and precision are chosen on the images that choices are made on; the figures are of the others.
    """
    for name, (unit, num_bytes, loss) in ASKED.items():
        line = best_within(points(unit, curves), loss)
        how = f"{line['label']}; asked: at most {num_bytes} B at {loss:g} points"
        for key, value, unit_of_value in (
            ("bytes", line["payload_bytes"], "B, whole payload"),
            ("wire_bytes", line["wire_bytes"], "B"),
            ("loss", line["loss_points"], "points of top-1"),
        ):
            yield Row(
                name=f"{name}_{key}", value=value, unit=unit_of_value, how="measured", n=line["n"],
                against=how, raw=CURVES,
            )  # fmt: skip


def macs_row() -> Row:
    """What the early unit's device computes of the network's multiply-accumulates, its reduction counted."""
    model, graph = network()
    unit = load_unit(path_of(EARLY), graph, network=weights_digest(model.module))
    spec, device = unit.divided.unit.spec, Reduction(unit.divided.unit)
    _, height, width = unit.cut.specs[0].shape
    code = (height // spec.stride, width // spec.stride)
    own = unit.cut.compute_share * graph.num_macs
    head = num_macs(graph.inputs[0].shape, code, spec.head_width) if spec.head_width else own
    weights = sum(weight.numel() for weight in device.parameters() if weight.ndim == 4)
    share = (head + weights * code[0] * code[1]) / graph.num_macs
    return Row(
        name="first_macs_share", value=share, unit="share", how="measured", n=1,
        against=f"the network's {graph.num_macs} multiply-accumulates", raw=path_of(EARLY).name,
    )  # fmt: skip


def webp_row(curves: Sequence[dict[str, Any]]) -> Row:
    """WebP's bytes over the early unit's, where both are equally accurate."""
    line = best_within(points(EARLY, curves), ASKED["first"][2])
    webp = [w for w in curves if w["kind"] == "upload" and str(w["coder"]).startswith("webp")]
    needed = bytes_at([(w["accuracy"], w["payload_bytes"]) for w in webp], line["accuracy"])
    return Row(
        name="bytes_x_webp",
        value=needed / line["payload_bytes"],
        unit="ratio",
        how="measured",
        n=line["n"],
        against=f"WebP at {line['accuracy']:.2f} % ({needed:.0f} B, between measured qualities) over {line['label']}",
        raw=CURVES,
    )


def bytes_at(known: Sequence[tuple[float, float]], accuracy: float) -> float:
    """Bytes that a codec needs for an accuracy, between its measured qualities (logarithm of bytes, straight)."""
    frontier: list[tuple[float, float]] = []
    for right, num_bytes in sorted(known, key=lambda point: point[1]):
        if not frontier or right > frontier[-1][0]:
            frontier.append((right, num_bytes))
    rights, sizes = zip(*frontier, strict=True)
    return float(np.exp(np.interp(accuracy, rights, np.log(sizes))))


def prior_rows(known: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[Row]:
    """Bytes on the wire's end against what training expected of the same test images, at each rate in fp32."""
    errors = []
    sent_lines = [line for lines in known.values() for line in lines]
    for line in read_raw(RAW / "prior.jsonl.gz"):
        wanted = (line["rate"], "fp32")
        for sent in (c for c in sent_lines if is_of(c, line) and (c["rate"], c["precision"]) == wanted):
            expected = line["num_bytes"] + HEADER_BYTES
            errors.append((abs(sent["payload_bytes"] / expected - 1), sent["label"], line["num_bytes"]))
    # A code has whole bytes, half a byte more than its bits on average: much of a code of 5 B, little of one of 25 B.
    long = [error for error in errors if error[2] >= 25]
    for name, mine in (("trained_bytes_error", errors), ("trained_bytes_error@25B", long)):
        if mine:
            worst = max(mine)
            yield Row(
                name=name,
                value=worst[0],
                unit="ratio - 1",
                how="measured",
                n=len(mine),
                against=f"the prior's bytes and {HEADER_BYTES} B; worst: {worst[1]}, {worst[2]:.1f} B",
                spread=spread([error[0] for error in mine]),
                raw="*-rates.curves.jsonl.gz",
            )


def gap_rows() -> Iterator[Row]:
    """The unit of four rates against units trained for one rate each, at its own bytes, rate by rate and at worst.

    Between the bytes of two units of one rate their accuracy is interpolated along the logarithm of bytes.
    """
    lines = read_raw(RAW / "prior.jsonl.gz")
    known = sorted((line["num_bytes"], line["accuracy"]) for line in lines if line["unit"].startswith("late-only"))
    mine = [line for line in lines if line["unit"] == "late"]
    if len(known) < 2 or not mine:
        return
    sizes, rights = zip(*known, strict=True)
    gaps = [float(np.interp(np.log(line["num_bytes"]), np.log(sizes), rights)) - line["accuracy"] for line in mine]
    worst = max(range(len(gaps)), key=lambda place: gaps[place])
    for name, place in (
        ("variable_rate_gap", worst),
        *((f"variable_rate_gap@rate{mine[k]['rate']}", k) for k in range(len(gaps))),
    ):
        yield Row(
            name=name,
            value=gaps[place],
            unit="points of top-1",
            how="measured",
            n=len(gaps) if name == "variable_rate_gap" else 1,
            against=f"units at late, each of one rate, at {mine[place]['num_bytes']:.0f} B; by the prior, in torch",
            spread=spread(gaps) if name == "variable_rate_gap" else None,
            raw="prior.jsonl.gz",
        )


def gap_section() -> list[str]:
    """Both kinds of unit side by side."""
    lines = [line for line in read_raw(RAW / "prior.jsonl.gz") if line["unit"].startswith(("late", "middle"))]
    rows = [
        (c["unit"], str(c["rate"]), f"{c['num_bytes']:.1f}", f"{c['accuracy']:.2f}", str(c["num_images"]))
        for c in lines
    ]
    columns = ("unit", "rate", "B by the prior", "top-1 %", "images")
    title = "One unit of four rates (`late`), of one rate each (`late-only`), through JPEG (`middle-jpeg`); in torch"
    return [markdown(TextTable(columns=columns, rows=tuple(rows), title=title)), ""]


def exactness_rows() -> Iterator[Row]:
    """What a unit of full width and 8 bits changes of the top-1."""
    for line in read_raw(RAW / "exactness.jsonl.gz"):
        yield Row(
            name=f"identity_change@{line['trainee']}/{line['cut']}",
            value=line["network"] - line["unit"],
            unit="points of top-1",
            how="measured",
            n=line["n"],
            against="the unmodified network; a unit of full width and 8 bits, not trained",
            raw="exactness.jsonl.gz",
        )


def split_rows(summary: Summary) -> Iterator[Row]:
    """Where a split is best on the grid, and by how much over the best of the other ways.

    Those are the device alone, an upload, and the best plain split where a split with a unit is best; of a plain split
    the two first ones.
    """
    candidates = candidates_of_net()
    table, goal = Table(candidates), Goal(max_loss_points=summary.header.max_loss_points)
    won: dict[str, list[float]] = {"split": [], "unit": []}
    for rate_bps, slowdown in product(GRID_RATES, GRID_SLOWDOWNS):
        conditions = at(base_of(summary), rate_bps, slowdown, 1.0, int8_ratio=int8_ratio_of(NET))
        best = baselines(table, conditions, goal)
        took_s = {way: estimate(candidates[index], conditions).latency_s for way, index in best.items()}
        winner = min(took_s, key=lambda way: took_s[way])
        if winner in won:
            others = [took_s[way] for way in ("device", "upload", "split") if way in took_s and way != winner]
            won[winner].append(min(others) / took_s[winner])
    count = len(GRID_RATES) * len(GRID_SLOWDOWNS)
    grid = "30 kbit/s to 30 Mbit/s x slowdown 3 to 300, one-way delay 5 ms"
    every = [*won["split"], *won["unit"]]
    rows = [
        ("split_share", len(every) / count, "share of the cells"),
        ("split_share_unit", len(won["unit"]) / count, "share of the cells, with a unit"),
    ]
    if every:
        rows += [
            ("split_speedup_geomean", math.exp(float(np.mean(np.log(every)))), "ratio"),
            ("split_speedup_max", max(every), "ratio"),
        ]
    for name, value, unit in rows:
        yield Row(
            name=name,
            value=value,
            unit=unit,
            how="estimated",
            n=count,
            against=f"the best of device, upload and, where a unit wins, plain split; {grid}",
            raw=f"{NET.name}.candidates.jsonl.gz",
        )
    for cell in (c for c in summary.cells if c.chosen.kind == "split" and c.speedup is not None):
        yield Row(
            name=f"split_speedup_measured@{cell_name(NET.name, cell)}",
            value=cell.speedup or 0.0,
            unit="ratio",
            how="measured",
            n=cell.chosen.latency_s.n,
            against=f"the best of the other ways; chosen: {cell.chosen.label}",
            raw=NET.log.name,
        )


def base_of(summary: Summary) -> Conditions:
    """The link's delay and an exchange's fixed cost, as measured; rate and slowdown are set by who uses it."""
    exchange_s = min(row.seconds.p50 for row in summary.overheads)
    return Conditions(link=Link(rate_bps=1e6, delay_s=0.005), device=Slowdown(), exchange_s=exchange_s)


def candidates_of_net() -> list[Candidate]:
    """All that survived the build, with their times."""
    return [msgspec.convert(line, Candidate) for line in NET.lines("candidates")]


def bbnet_section(summary: Summary) -> list[str]:
    """BBNet's table of ten rates: everything on the server, everything on the device, and the best unit."""
    candidates = candidates_of_net()
    table = Table(candidates)
    goal = Goal(max_loss_points=summary.header.max_loss_points)
    raw = next(
        c
        for c in candidates
        if c.plan.kind == "upload" and c.plan.precision == "fp32" and c.plan.codec and c.plan.codec.name == "raw"
    )
    rows = []
    for rate_bps in BBNET_RATES:
        conditions = at(base_of(summary), rate_bps, BBNET_SLOWDOWN, 1.0, int8_ratio=int8_ratio_of(NET))
        best = {way: candidates[index] for way, index in baselines(table, conditions, goal).items()}
        took_s = {way: estimate(candidate, conditions).latency_s for way, candidate in best.items()}
        cloud_s = estimate(raw, conditions).latency_s
        others_s = min(seconds for way, seconds in took_s.items() if way in ("device", "upload"))
        ours: tuple[str, ...] = ("none", "", "", "", "", "")
        if "unit" in best:
            mine, mine_s = best["unit"], took_s["unit"]
            ours = (
                mine.plan.label,
                f"{mine.evidence.payload_bytes:.0f}",
                f"{mine.evidence.accuracy or 0:.2f}",
                f"{1e3 * mine_s:.1f}",
                f"{cloud_s / mine_s:.1f}x",
                f"{others_s / mine_s:.2f}x",
            )
        rows.append(
            (
                f"{rate_bps / 1e3:.0f}",
                *(f"{1e3 * seconds:.1f}" for seconds in (cloud_s, took_s["upload"], took_s["device"])),
                *ours,
                min(took_s, key=lambda way: took_s[way]),
            )
        )
    columns = ("kbit/s", "cloud-only, raw ms", "best upload ms", "device-only ms", "best unit", "payload B")
    columns += ("top-1 %", "ms", "over cloud-only", "over the better of upload and device", "chosen")
    device = best["device"]
    title = (
        f"BBNet's ten rates, estimated: device slowed {BBNET_SLOWDOWN:g}x, one-way delay 5 ms; cloud-only: "
        f"{raw.evidence.accuracy or 0:.2f} %, {raw.evidence.payload_bytes:.0f} B; device-only: {device.plan.label}, "
        f"{device.evidence.accuracy or 0:.2f} %; accuracy on the images that choices are made on; no pruned network "
        "of ResNet-56 has been made"
    )
    return ["## BBNet's table", "", markdown(TextTable(columns=columns, rows=tuple(rows), title=title)), ""]


def curve_section(name: str, curves: Sequence[dict[str, Any]]) -> list[str]:
    """The picture of all curves of one network, and a table for each cut."""
    drawn = [
        RateCurve(name="WebP", points=_xy([c for c in curves if c["kind"] == "upload" and c["coder"][:4] == "webp"])),
        RateCurve(name="JPEG", points=_xy([c for c in curves if c["coder"] == "jpeg-bare" and c["kind"] == "upload"])),
    ]
    text: list[str] = []
    cuts = dict.fromkeys(UNITS[unit].cut for unit in FINISHED[name])
    for unit in FINISHED[name]:
        cut = UNITS[unit].cut
        mine = points(unit, curves, precision="fp32")
        plain = [c for c in curves if c["cut"] == cut and c["rate"] is None]
        drawn.append(RateCurve(name=f"unit at {cut}", points=_xy(mine), group=cut))
        drawn.append(RateCurve(name=f"plain at {cut}", points=_xy(plain), group=cut, is_plain=True))
    reference = next(c["accuracy"] for c in curves if c["kind"] == "device")
    count = curves[0]["n"]
    title = f"{TITLES[name]}, CIFAR-10: bytes and accuracy over the link"
    picture = f"bottleneck-rates-{name}.png"
    plot_rates(DOCS / picture, drawn, title=title, reference=reference, note=f"{count} test images")
    text += [f"![{title}]({picture})", ""]
    whole = [c for c in curves if c["kind"] != "split"]
    text += [markdown(_curve_table("Device alone, and picture codecs", whole)), ""]
    for cut in [*cuts, *sorted({c["cut"] for c in curves if c["cut"]} - set(cuts))]:
        here = [c for c in curves if c["cut"] == cut]
        text += [markdown(_curve_table(f"At {cut}: a unit if there is one, then plain quantised features", here)), ""]
    return [f"## Bytes and accuracy, {TITLES[name]}", "", *text]


def _xy(lines: Iterable[dict[str, Any]]) -> tuple[tuple[float, float], ...]:
    return tuple(sorted((line["payload_bytes"], line["accuracy"]) for line in lines))


def _curve_table(title: str, lines: Sequence[dict[str, Any]]) -> TextTable:
    ordered = sorted(lines, key=lambda c: (c["rate"] is None, c["variant"], c["precision"], c["payload_bytes"]))
    return TextTable(
        columns=("plan", "payload B", "p95", "wire B", "top-1 %", "loss, points"),
        rows=tuple(
            (
                line["label"],
                f"{line['payload_bytes']:.1f}",
                f"{line['payload_bytes_p95']:.0f}",
                f"{line['wire_bytes']:.0f}",
                f"{line['accuracy']:.2f} ± {line['accuracy_ci']:.2f}",
                f"{line['loss_points']:.2f} ± {line['loss_ci_points']:.2f}",
            )
            for line in ordered
        ),
        title=title,
    )


def main() -> None:
    """The page, once there are the logs of cells, curves and priors."""
    missing = [path for path in (NET.log, RAW / CURVES, RAW / "prior.jsonl.gz") if not path.is_file()]
    if missing:
        print(f"bottlenecks are not measured yet: there is no {', '.join(map(str, missing))}")
        return
    summary = NET.summary()
    paths = {name: RAW / f"{name}-rates.curves.jsonl.gz" for name in TITLES}
    known = {name: read_raw(path) for name, path in paths.items() if path.is_file()}
    logs = [*(f"{name}-rates" for name in known), "prior", "butterfly", NET.name]
    logs += ["grid"] if grid_results.LOG.is_file() else []
    curves = known[NETWORK]
    regimes = map_of(NET, summary)
    rows = [*unit_rows(curves), macs_row(), webp_row(curves), *prior_rows(known), *gap_rows(), *exactness_rows()]
    rows += [*butterfly_results.rows(), *grid_results.rows(), *split_rows(summary), *net_rows(NET, summary)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    machine = summary.header.machine
    results = Results(
        commit=measured_commit(commit, RAW, logs),
        date=summary.header.date,
        machine=f"{machine.processor}, {machine.cores} cores, {machine.system}",
        command="make bench-bottleneck",
        rows=tuple(msgspec.structs.replace(row, raw=f"{RAW.name}/{row.raw}") for row in rows),
    )
    write_results(DOCS / "bottleneck.json", results)
    head = (Path(__file__).parent / "bottleneck.head.md").read_text()
    page = [head, "## Rows", "", results_markdown(results), ""]
    for name, lines in known.items():
        page += curve_section(name, lines)
    page += [*gap_section(), *grid_results.text()]
    page += [*section(NET, summary, regimes), *bbnet_section(summary), *butterfly_results.text()]
    write_atomically(DOCS / "bottleneck.md", ("\n".join(page).rstrip() + "\n").encode())
    print(f"{len(rows)} rows written to {DOCS / 'bottleneck.json'}")


if __name__ == "__main__":
    main()
