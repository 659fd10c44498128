"""docs/results/pruning.{md,json}, from the raw logs alone.

python -m bench.pruning_results      (what `make results` runs)
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coinfer.build.predict import Features, errors_of, fit
from coinfer.build.timing import MEASURED_OF
from coinfer.files import write_atomically
from coinfer.lab.choose import best_split_of
from coinfer.lab.summary import CellRow, PlanRow, Summary
from coinfer.report.results import Results, Row, read_raw, results_markdown, write_results
from coinfer.report.table import TextTable, bench_table, markdown
from coinfer.search.goal import LOSS_TOLERANCE
from coinfer.units import format_rate

from .cells import job_of
from .pruning import RATES_BPS, RAW, SHAPED, SLIM, SLOWDOWNS, STUDY, WHOLE_REPEATS, WIDE
from .tables import DOCS, Measured, bench_cells, map_of, measured_commit, net_rows, points_text, section

NET = Measured(STUDY.name, "VGG-16-BN, CIFAR-10, pruned", RAW)
SHAPED_NET = Measured(SHAPED.name, "VGG-16-BN, CIFAR-10, unpruned and pruned", RAW)
NARROW, SMALL = "vgg16-narrow", "resnet20-pruned"
TITLES = {STUDY.name: "VGG-16-BN", SLIM: "ResNet-18 of half width, slimmed", SMALL: "ResNet-20"}
POSITIONS = (
    "conv1", "conv2", "pool1", "conv3", "conv4", "pool2", "conv5", "conv6", "conv7", "pool3",
    "conv8", "conv9", "conv10", "pool4", "conv11", "conv12", "conv13", "pool5",
)  # fmt: skip
# Of the full-width ResNet-18: multiply-accumulates of a picture, and parameters.
FULL_WIDTH = {"macs": 555_422_720, "parameters": 11_173_962}

Line = dict[str, Any]


class Log:
    """The lines of one job's cuts; `also` are jobs of the same network whose series count as well."""

    def __init__(self, job: str, *also: str) -> None:
        self.job, self.raw, self.max_loss = job, f"{job}.cuts.jsonl.gz", job_of(job).goal.max_loss
        self._own = read_raw(RAW / self.raw)
        self._lines = [line | {"raw": self.raw} for line in self._own]
        for raw in (f"{other}.cuts.jsonl.gz" for other in also):
            lines = read_raw(RAW / raw) if (RAW / raw).is_file() else []
            self._lines += [line | {"raw": raw} for line in lines if line["step"] == "step 2"]
        self.cuts = list(dict.fromkeys(line["cut"] for line in self._own if line["cut"] is not None))
        self.original = next(line for line in self._own if line["cut"] is None and line["step"] == "original")
        wholes = [line for line in self._own if line["cut"] is None and line["step"] == "step 1"]
        bases = {line["base"] for line in self._own if line["step"] == "step 2"}
        self.wholes = wholes
        self.step1 = next((line for line in wholes if line["network"] in bases), wholes[-1])

    def at(self, cut: str, step: str, part: str = "validation") -> list[Line]:
        """Lines of one cut and step, from few elements to many."""
        found = [x for x in self._lines if (x["cut"], x["step"], x["part"]) == (cut, step, part)]
        return sorted(found, key=lambda line: line["elements"])

    def chosen(self, cut: str) -> tuple[Line, Line] | None:
        """The narrowest network within the loss on the images of choice: its lines of these and of the test images.

        Where a series has none, that of step 1 is what is left.
        """
        for step in ("step 2", "step 1"):
            fine = [x for x in self.at(cut, step) if x["loss_points"] <= self.max_loss + LOSS_TOLERANCE]
            if fine:
                reported = {line["network"]: line for line in self.at(cut, step, "test")}
                return fine[0], reported[fine[0]["network"]]
        return None

    def segments(self) -> list[tuple[Line, Features, float]]:
        """Every segment that was timed: its line, what it is made of, its seconds."""
        timed = [line for line in self._own if line["part"] == "validation"]
        return [(line, line[side], line[f"{side}_s"]) for line in timed for side in ("head", "tail")]


def macs_of(line: Line) -> float:
    """Multiply-accumulates of a whole network."""
    return float(sum(value for name, value in line["whole"].items() if name.endswith(" macs")))


def step1_rows(log: Log, prefix: str = "") -> Iterator[Row]:
    """What step 1 saved and lost."""
    before, after = log.original, log.step1
    against = f"the unpruned network ({before['accuracy']:.2f} %)"
    n = after["n"]
    yield Row(
        name=f"{prefix}flops_x", value=macs_of(before) / macs_of(after), unit="ratio", how="measured", n=1,
        against=against, raw=log.raw,
    )  # fmt: skip
    yield Row(
        name=f"{prefix}latency_x", value=before["whole_s"] / after["whole_s"], unit="ratio of medians", how="measured",
        n=WHOLE_REPEATS, against=f"{against}, fp32 on one thread, interleaved", raw=log.raw,
        spread=(before["whole_p5_s"] / after["whole_p95_s"], before["whole_p95_s"] / after["whole_p5_s"]),
    )  # fmt: skip
    yield Row(
        name=f"{prefix}prune_loss", value=after["loss_points"], unit="points of top-1", how="measured", n=n,
        against=against, raw=log.raw,
        spread=(after["loss_points"] - after["loss_ci_points"], after["loss_points"] + after["loss_ci_points"]),
    )  # fmt: skip


def transmission_rows(log: Log, names: Mapping[str, str], prefix: str = "") -> Iterator[Row]:
    """What crosses at each cut, of the unpruned network over the pruned one."""
    for cut in log.cuts:
        found = log.chosen(cut)
        if found is None:
            continue
        mine, reported = found
        (original,) = log.at(cut, "original")
        name = names.get(cut, cut)
        of = mine["base"] if mine["step"] == "step 2" else f"{mine['network']} itself"
        for key, value, unit in (
            ("transmission_x", original["elements"] / mine["elements"], "ratio at one byte an element"),
            ("transmission_coded_x", original["coded_bytes"] / mine["coded_bytes"], "ratio, 8 bits, range-coded"),
        ):
            yield Row(
                name=f"{prefix}{key}@{name}", value=value, unit=unit, how="measured", n=mine["n"],
                against=f"the unpruned network's features at this cut, coded alike; of {of}", raw=mine["raw"],
            )  # fmt: skip
        loss, ci = reported["loss_points"], reported["loss_ci_points"]
        yield Row(
            name=f"{prefix}transmission_loss@{name}", value=loss, unit="points of top-1", how="measured",
            n=reported["n"], against="the unpruned network", spread=(loss - ci, loss + ci), raw=mine["raw"],
        )  # fmt: skip


def end_to_end_rows(log: Log) -> Iterator[Row]:
    """The paper's formula: slowdown x head + bytes / rate + tail, both sides at their best of the cuts."""
    ratios, losses = [], []
    for rate_bps, slowdown in product(RATES_BPS, SLOWDOWNS):
        before = min(_paper_s(log.at(cut, "original")[0], rate_bps, slowdown) for cut in log.cuts)
        after = [
            (_paper_s(found[0], rate_bps, slowdown), found[1]["loss_points"])
            for cut in log.cuts
            if (found := log.chosen(cut)) is not None
        ]
        best = min(after)
        ratios.append(before / best[0])
        losses.append(best[1])
    yield Row(
        name="end_to_end_x", value=float(np.exp(np.mean(np.log(ratios)))), unit="ratio, geometric mean",
        how="estimated", n=len(ratios), spread=(min(ratios), max(ratios)), raw=log.raw,
        against="partitioning the unpruned network, one byte an element, by the paper's formula",
    )  # fmt: skip
    yield Row(
        name="end_to_end_loss", value=max(losses), unit="points of top-1", how="measured",
        n=log.step1["n"], against="the unpruned network", raw=log.raw,
    )  # fmt: skip


def _paper_s(line: Line, rate_bps: float, slowdown: float) -> float:
    return float(slowdown * line["head_s"] + 8 * line["elements"] / rate_bps + line["tail_s"])


def slim_rows(log: Log) -> Iterator[Row]:
    """BBNet's figures: parameters, multiply-accumulates and accuracy against the full width, and against the half."""
    after = log.step1
    full = "the full-width network, counted"
    for name, value in (
        ("slim_params_x", FULL_WIDTH["parameters"] / after["parameters"]),
        ("slim_flops_x", FULL_WIDTH["macs"] / macs_of(after)),
    ):
        yield Row(name=name, value=value, unit="ratio", how="measured", n=1, against=full, raw=log.raw)
    half = f"the half-width network ({log.original['accuracy']:.2f} %)"
    if "wide_loss_points" in after:
        wide = f"the full-width network ({after['wide_accuracy']:.2f} %), trained on an H200"
        losses = [("slim_loss", "wide_", wide), ("slim_loss_half", "", half)]
    else:
        losses = [("slim_loss", "", f"{half}; the full-width one was not trained")]
    for name, key, against in losses:
        loss, ci = after[f"{key}loss_points"], after[f"{key}loss_ci_points"]
        yield Row(
            name=name, value=loss, unit="points of top-1", how="measured", n=after["n"], raw=log.raw, against=against,
            spread=(loss - ci, loss + ci),
        )  # fmt: skip


def predictor_rows(log: Log) -> Iterator[Row]:
    """Errors as a build has them, fitted to the unmodified network's segments, whole ones and every few of the rest."""
    known = [(line["whole"], line["whole_s"]) for line in (log.original, *log.wholes)]
    known += [(made_of, took_s) for line, made_of, took_s in log.segments() if line["step"] == "original"]
    pruned = [(made_of, took_s) for line, made_of, took_s in log.segments() if line["step"] != "original"]
    known += pruned[::MEASURED_OF]
    left = [segment for place, segment in enumerate(pruned) if place % MEASURED_OF]
    if not left:
        return
    predictor = fit(known)
    errors = errors_of([(predictor.seconds(made_of), seconds) for made_of, seconds in left])
    for key, value in (("median", errors.median), ("p95", errors.p95)):
        yield Row(
            name=f"predictor_error_{key}", value=value, unit="ratio - 1", how="measured", n=errors.num_segments,
            against=f"measured segments; fitted to {len(known)} others", raw=log.raw,
        )  # fmt: skip


def shaped_rows(summary: Summary, main: str) -> Iterator[Row]:
    """What the chosen plan saves of the best split of the unpruned network, over the shaped link."""
    role, ratios = best_split_of(main), []
    for cell in summary.cells:
        split = next(plan for plan in summary.plans if plan.cell == cell.cell and role in plan.roles)
        ratios.append(split.typical_s / cell.chosen.typical_s)
    yield Row(
        name="end_to_end_shaped_x", value=float(np.exp(np.mean(np.log(ratios)))), unit="ratio, geometric mean",
        how="measured", n=len(ratios), spread=(min(ratios), max(ratios)), raw=SHAPED_NET.log.name,
        against="the best split of the unpruned network, with every code that is a candidate",
    )  # fmt: skip
    known = {line["plan"]: line for line in SHAPED_NET.lines("accuracy")}
    worst = max((known[cell.chosen.plan] for cell in summary.cells), key=lambda line: line["loss_points"])
    yield Row(
        name="end_to_end_shaped_loss", value=worst["loss_points"], unit="points of top-1", how="measured",
        n=worst["n"], against="the unpruned network", raw=SHAPED_NET.log.name,
    )  # fmt: skip


def best_split_rows(summary: Summary) -> Iterator[Row]:
    """How much better the best split is than the device alone and than an upload: in the cell where it is most so."""
    for name, rival in (("best_split_over_device_only", "device"), ("best_split_over_upload", "upload")):
        found = []
        for cell in summary.cells:
            splits = [cell.ratios[way] for way in ("split", "unit") if way in cell.ratios]
            mine = 1.0 if cell.chosen.kind == "split" else min(splits, default=None)
            other = 1.0 if cell.chosen.kind == rival else cell.ratios.get(rival)
            if mine is not None and other is not None:
                found.append(other / mine)
        if found:
            yield Row(
                name=name, value=max(found), unit="ratio of medians, best cell", how="measured", n=len(found),
                against=f"the best {rival} plan of the cell", spread=(min(found), max(found)), raw=NET.log.name,
            )  # fmt: skip


def cut_table(log: Log, names: Mapping[str, str]) -> TextTable:
    """The paper's layout: filters, bytes, accuracy and cumulative times of the three steps, cut by cut."""

    def three(values: Sequence[float | None], digits: int = 0) -> str:
        return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values)

    def of_another(line: Line) -> str:
        return "" if line["base"] == log.step1["network"] else f" (of {line['base']})"

    rows = []
    for cut in log.cuts:
        original, step1 = log.at(cut, "original")[0], log.at(cut, "step 1")[0]
        found = log.chosen(cut)
        mine, reported = found if found is not None and found[0]["step"] == "step 2" else (None, None)
        lines = (original, step1, mine)

        def of(key: str, scale: float = 1.0, lines: Sequence[Line | None] = lines) -> list[float | None]:
            return [None if line is None else scale * line[key] for line in lines]

        test = [log.at(cut, step, "test")[0]["accuracy"] for step in ("original", "step 1")]
        rows.append(
            (
                names.get(cut, cut),
                three(of("filters")),
                three(of("elements")),
                "-" if mine is None else f"{original['elements'] / mine['elements']:.1f}{of_another(mine)}",
                three(of("coded_bytes")),
                three([*test, None if reported is None else reported["accuracy"]], 2),
                three(of("head_s", 1e3), 2),
                three(of("tail_s", 1e3), 2),
            )
        )
    limit = points_text(log.max_loss)
    return TextTable(
        title=f"{TITLES[log.job]}: original / step 1 / narrowest of step 2 within {limit} of choice",
        columns=("cut after", "filters", "bytes at 1 B", "ratio", "bytes coded", "top-1 %", "head ms", "tail ms"),
        rows=tuple(rows),
    )


def whole_table(log: Log) -> TextTable:
    """Whole networks of step 1; of a slimmed one that of full width as well."""
    wide = log.step1.get("wide_accuracy")
    macs, parameters = f"{FULL_WIDTH['macs'] / 1e6:.1f}", f"{FULL_WIDTH['parameters']:,}"
    return TextTable(
        title=f"{TITLES[log.job]}: whole networks, fp32, one thread",
        columns=("network", "M MACs", "parameters", "file", "ms", "top-1 %", "loss, points"),
        rows=tuple(
            (
                line["network"],
                f"{macs_of(line) / 1e6:.1f}",
                f"{line['parameters']:,}",
                f"{line['file_bytes'] / 1e6:.2f} MB",
                f"{1e3 * line['whole_s']:.2f}",
                f"{line['accuracy']:.2f} ± {line['accuracy_ci']:.2f}",
                f"{line['loss_points']:.2f} ± {line['loss_ci_points']:.2f}",
            )
            for line in (log.original, *log.wholes)
        )
        + (() if wide is None else ((WIDE, macs, parameters, "-", "-", f"{wide:.2f}", "-"),)),
    )


def rivals_table(summary: Summary) -> TextTable:
    """Cell by cell the fastest measured plan of each kind that a split must better."""

    def fastest(cell: CellRow, fits: Callable[[PlanRow], bool]) -> str:
        mine = [plan for plan in summary.plans if plan.cell == cell.cell and plan.latency_s.n and fits(plan)]
        best = min(mine, key=lambda plan: plan.typical_s, default=None)
        return "-" if best is None else f"{best.label}: {1e3 * best.typical_s:.1f} ms"

    return TextTable(
        title=f"{NET.title}: what stands beside a split",
        columns=("slowdown", "rate", "pruned, int8, device alone", "WebP upload", "split"),
        rows=tuple(
            (
                f"{cell.slowdown:g}x",
                format_rate(cell.rate_bps),
                fastest(cell, lambda p: p.kind == "device" and ".k" in p.label and p.label.endswith("int8")),
                fastest(cell, lambda p: p.kind == "upload" and "webp" in p.label),
                fastest(cell, lambda p: p.kind == "split"),
            )
            for cell in summary.cells
        ),
    )


def _machines(known: Sequence[Line]) -> str:
    """The machine; where there were several, which measured what."""
    kinds = {line["machine"] for line in known}
    return kinds.pop() if len(kinds) == 1 else "; ".join(f"{line['of']}: {line['machine']}" for line in known)


def main() -> None:
    """The page, of what has been measured."""
    logs = {
        job: Log(job, *((NARROW,) if job == STUDY.name else ()))
        for job in TITLES
        if (RAW / f"{job}.cuts.jsonl.gz").is_file()
    }
    if not logs:
        print(f"pruning is not measured yet: there is no log in {RAW}")
        return
    rows: list[Row] = []
    body: list[str] = []
    if STUDY.name in logs:
        vgg = logs[STUDY.name]
        names = dict(zip(vgg.cuts, POSITIONS, strict=True))
        rows += [*step1_rows(vgg), *transmission_rows(vgg, names), *end_to_end_rows(vgg), *predictor_rows(vgg)]
        body += [markdown(whole_table(vgg)), "", markdown(cut_table(vgg, names)), ""]
    if SLIM in logs:
        rows += slim_rows(logs[SLIM])
        body += [markdown(whole_table(logs[SLIM])), ""]
    if SMALL in logs:
        small = logs[SMALL]
        rows += [*step1_rows(small, "resnet20_"), *transmission_rows(small, {}, "resnet20_")]
        body += [markdown(whole_table(small)), "", markdown(cut_table(small, {})), ""]
    summary = NET.summary() if NET.log.is_file() else None
    if summary is not None:
        rows += [*best_split_rows(summary), *net_rows(NET, summary)]
        body += [*section(NET, summary, map_of(NET, summary)), markdown(rivals_table(summary)), ""]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    if SHAPED_NET.log.is_file():
        shaped = SHAPED_NET.summary()
        rows += shaped_rows(shaped, job_of(SHAPED.name).model.source)
        body += [f"## {SHAPED_NET.title}", "", markdown(bench_table(bench_cells(SHAPED_NET, shaped))), ""]
    measured = [f"{job}.cuts" for job in (*logs, NARROW) if (RAW / f"{job}.cuts.jsonl.gz").is_file()]
    measured += [net.name for net in (NET, SHAPED_NET) if net.log.is_file()]
    known = [line for line in read_raw(RAW / "machine.jsonl.gz") if line["of"] in measured]
    results = Results(
        commit=measured_commit(commit, RAW, measured),
        date=max(line["date"] for line in known),
        machine=_machines(known),
        command="make bench-pruning",
        rows=tuple(msgspec.structs.replace(row, raw=f"{RAW.name}/{row.raw}") for row in rows),
    )
    write_results(DOCS / "pruning.json", results)
    head = (Path(__file__).parent / "pruning.head.md").read_text()
    page = [head, "## Rows", "", results_markdown(results), "", *body]
    write_atomically(DOCS / "pruning.md", ("\n".join(page).rstrip() + "\n").encode())
    print(f"{len(rows)} rows written to {DOCS / 'pruning.json'}")


if __name__ == "__main__":
    main()
