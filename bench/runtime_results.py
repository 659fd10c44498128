"""docs/results/runtime.{md,json} and its pictures, from the raw logs alone; what has not been measured is left out.

python -m bench.runtime_results      (what `make results` runs)
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coinfer.files import write_atomically
from coinfer.lab.trace import load_trace
from coinfer.profile import Trace
from coinfer.report.decisions_plot import plot_decisions
from coinfer.report.results import Results, Row, read_raw, results_markdown, write_results
from coinfer.report.table import TextTable, markdown
from coinfer.timeline import Decision, Outcome
from coinfer.units import format_rate

from .figures import RAW
from .tables import DOCS, measured_commit
from .traces import DEADLINE_S, named, summed, trace_files

LIVE, SIMULATED = "traces_live.jsonl.gz", "traces_simulated.jsonl.gz"


def live_logs() -> list[dict[str, Any]]:
    """The live runs, in order."""
    return read_raw(RAW / LIVE) if (RAW / LIVE).is_file() else []


def simulated_rows() -> list[dict[str, Any]]:
    """The simulated traces."""
    return read_raw(RAW / SIMULATED) if (RAW / SIMULATED).is_file() else []


def best_fixed(row: dict[str, Any]) -> str:
    """The fixed plan with the least mean latency on a trace."""
    return min(row["fixed"], key=lambda number: row["fixed"][number]["mean_s"])


def trace_rows() -> Iterator[Row]:
    """The simulated ratios of every trace, and the live ones where a trace was replayed."""
    simulated = {row["trace"]: row for row in simulated_rows()}
    count = 0
    for name, row in simulated.items():
        count = sum(row["adaptive"]["plans"].values())
        for key, against, least in (
            ("oracle_ratio", "the oracle's mean latency", row["oracle"]["mean_s"]),
            (
                "best_fixed_ratio", f"plan {best_fixed(row)} for all, guarded as well",
                row["fixed"][best_fixed(row)]["mean_s"],
            ),
        ):
            yield Row(
                name=f"{key}@{name}", value=row["adaptive"]["mean_s"] / least, unit="x", how="simulated", n=count,
                against=against, raw=SIMULATED,
            )  # fmt: skip
    for log in live_logs():
        run = summed(log["requests"])
        if log["plan"] is None:
            yield Row(
                name=f"oracle_ratio_live@{log['trace']}", value=run.mean_s / log["oracle_mean_s"], unit="x",
                how="measured", n=len(log["requests"]), raw=LIVE,
                against="the oracle's mean latency, simulated with the same times",
            )  # fmt: skip
    for name, key, what in (
        ("live_simulated_error", "simulated_mean_s", "with the run's own times"),
        ("live_before_error", "before_mean_s", "with times taken right before it"),
    ):
        errors = [abs(off(log, key)) for log in live_logs()]
        if errors:
            yield Row(
                name=f"{name}_max", value=max(errors), unit="share", how="measured", n=len(errors), raw=LIVE,
                against=f"mean latency of a live run, simulated {what}; median {np.median(errors):.2g}",
            )


def off(log: dict[str, Any], key: str) -> float:
    """How far a simulated mean latency is from the live run's, as a share of it."""
    return float(log[key] / summed(log["requests"]).mean_s - 1)


def simulated_table() -> TextTable:
    """All traces: oracle, adaptive, best fixed plan, device alone."""

    def cells(run: dict[str, Any]) -> tuple[str, ...]:
        return (f"{1e3 * run['mean_s']:.1f}", f"{1e3 * run['p95_s']:.0f}", f"{1e3 * run['p99_s']:.0f}")

    rows = []
    for row in simulated_rows():
        least = best_fixed(row)
        adaptive, fixed = row["adaptive"], row["fixed"][least]
        accuracy = np.average(
            [row["accuracies"][str(number)] for number in adaptive["plans"]], weights=list(adaptive["plans"].values())
        )
        rows.append(
            (
                row["trace"],
                format_rate(row["mean_rate_bps"]),
                *cells(row["oracle"])[:1],
                *cells(adaptive),
                f"{adaptive['mean_s'] / row['oracle']['mean_s']:.2f}",
                *cells(fixed)[:2],
                least,
                f"{adaptive['mean_s'] / fixed['mean_s']:.2f}",
                f"{100 * adaptive['late_share']:.1f}",
                f"{100 * fixed['late_share']:.1f}",
                f"{accuracy:.2f}",
                str(row["switches"]),
            )
        )
    return TextTable(
        title=(
            "Every trace, simulated (two minutes): latency in ms; misses of a deadline of "
            f"{1e3 * DEADLINE_S:.0f} ms in %; accuracy in % by the choice images"
        ),
        columns=(
            "trace", "mean rate", "oracle mean", "adaptive mean", "p95", "p99", "over oracle", "best fixed mean",
            "p95", "its plan", "over best fixed", "misses", "misses of best fixed", "accuracy", "changes",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def fixed_table() -> TextTable:
    """The mean latency of every fixed plan on every trace."""
    rows = simulated_rows()
    numbers = list(rows[0]["fixed"])
    return TextTable(
        title="Every fixed plan on every trace, simulated: mean latency in ms; each is guarded as the adaptive one is",
        columns=("trace", "oracle", "adaptive", *(f"plan {number}" for number in numbers)),
        rows=tuple(
            (
                row["trace"],
                *(f"{1e3 * row[way]['mean_s']:.1f}" for way in ("oracle", "adaptive")),
                *(f"{1e3 * row['fixed'][number]['mean_s']:.1f}" for number in numbers),
            )
            for row in rows
        ),
    )


def plans_table() -> TextTable:
    """What the plans' numbers stand for."""
    first = simulated_rows()[0]
    return TextTable(
        title="The plans",
        columns=("number", "plan", "accuracy %", "loss"),
        rows=tuple(
            (number, label, f"{first['accuracies'][number]:.2f}", f"{first['losses'][number]:.2f}")
            for number, label in first["labels"].items()
        ),
    )


def live_table() -> TextTable:
    """The live runs beside what the simulator says of them."""
    rows = []
    for log in live_logs():
        run = summed(log["requests"])
        oracle_s = log["oracle_mean_s"]
        right = [request["right"] for request in log["requests"] if request["label"] is not None]
        rows.append(
            (
                log["trace"],
                "adaptive" if log["plan"] is None else f"plan {log['plan']}",
                f"{1e3 * run.mean_s:.1f}",
                f"{1e3 * run.p95_s:.0f}",
                f"{1e3 * run.p99_s:.0f}",
                f"{1e3 * log['simulated_mean_s']:.1f}",
                f"{100 * off(log, 'simulated_mean_s'):+.0f}",
                f"{100 * off(log, 'before_mean_s'):+.0f}",
                f"{run.mean_s / oracle_s:.2f}",
                f"{100 * run.late_share:.1f}",
                f"{100 * float(np.mean(right)):.1f}",
                f"{100 * run.answered.get('fallback', 0) / len(log['requests']):.1f}",
                str(log["losses"]),
                str(len(log["decisions"])),
                str(log["pauses"]),
                str(len(log["requests"])),
            )
        )
    return TextTable(
        title="Live, replayed in user space for two minutes each: latency in ms",
        columns=(
            "trace", "plans", "mean", "p95", "p99", "simulated mean", "off by %", "by times before, %", "over oracle",
            "misses %", "right %", "by fallback %", "links lost", "changes", "pauses", "n",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def trace_pictures() -> Iterator[tuple[str, str]]:
    """A picture of each live adaptive run: its file's name and its title."""
    paths = {named(path): path for path in trace_files()}
    for log in live_logs():
        if log["plan"] is not None:
            continue
        labels = {int(number): label for number, label in log["labels"].items()}
        trace: Trace = load_trace(paths[log["trace"]])
        outcomes = [
            Outcome(
                request=request["request"], plan=request["plan"], answered=request["answered"],
                start_s=request["start_s"], end_s=request["end_s"],
            )
            for request in log["requests"]
        ]  # fmt: skip
        decisions = [msgspec.convert(decision, Decision) for decision in log["decisions"]]
        file = f"runtime-{log['trace'].replace('/', '-').replace('.', '-').lower()}.png"
        title = f"{log['trace']}: every request of a live run"
        plot_decisions(DOCS / file, outcomes, decisions, labels, title=title, trace=trace)
        yield file, title


def figures_of(name: str) -> dict[str, Any] | None:
    """What another bench of the runtime left, or nothing."""
    path = RAW / f"{name}.json"
    return msgspec.json.decode(path.read_bytes()) if path.is_file() else None


def chaos_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Requests under faults."""
    count = found["chaos_requests"]
    for key in ("chaos_requests", "chaos_lost", "chaos_duplicated", "chaos_wrong"):
        yield Row(name=key, value=found[key], unit="requests", how="measured", n=count, raw="chaos.jsonl.gz")
    for key, what in (("notice_s", "from a fault to its notice"), ("return_s", "from its end to the edge's answers")):
        times = found[key]
        if times["median"] is not None:
            yield Row(
                name=key, value=times["median"], unit="s", how="measured", n=times["n"],
                against=f"{what}; {found['faults']} faults; p95 {times['p95']:.3g}, at most {times['max']:.3g} s",
                raw="chaos.jsonl.gz",
            )  # fmt: skip
    yield Row(name="chaos_local_share", value=found["local_share"], unit="share", how="measured", n=count,
              against=f"by the device; {found['fallback_share']:.3f} in the edge's place",
              raw="chaos.jsonl.gz")  # fmt: skip
    yield Row(name="chaos_computed_twice", value=found["computed_twice"], unit="requests", how="measured",
              n=max(1, found["computed_at_edge"]), against="by the edge", raw="chaos.jsonl.gz")  # fmt: skip


def fuzz_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Inputs of the parsers, and of the HTTP front."""
    parsers = found["parsers"]
    least = min(parser["inputs"] for parser in parsers)
    bad = sum(parser["crashes"] + parser["hangs"] + parser["allocations"] for parser in parsers)
    what = ", ".join(f"{parser['parser']} {parser['inputs']}" for parser in parsers)
    yield Row(name="fuzz_inputs", value=least, unit="inputs", how="measured", n=least, against=what, raw="fuzz.json")
    yield Row(name="fuzz_crashes", value=bad, unit="inputs", how="measured", n=sum(p["inputs"] for p in parsers),
              against="crashes, calls over 1 s, allocations beyond their bound", raw="fuzz.json")  # fmt: skip
    slowest = max(parser["slowest_call_s"] for parser in parsers)
    yield Row(name="fuzz_slowest_call_s", value=slowest, unit="s", how="measured", n=least, raw="fuzz.json")


def http_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Requests of the fuzz of the HTTP front."""
    count = sum(found["requests"].values())
    yield Row(name="fuzz_http_requests", value=count, unit="requests", how="measured", n=count, raw="fuzz_http.json")
    yield Row(name="fuzz_http_faults", value=found["num_faults"], unit="requests", how="measured", n=count,
              raw="fuzz_http.json")  # fmt: skip


def soak_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Half a million requests."""
    count = found["soak_requests"]
    yield Row(name="soak_requests", value=count, unit="requests", how="measured", n=count, raw="soak.json")
    yield Row(name="soak_rss_growth_pct", value=found["soak_rss_growth_pct"], unit="%", how="measured", n=count,
              against="after warm-up, the larger of device and edge", raw="soak.json")  # fmt: skip
    for key in ("fds", "threads", "tasks"):
        more = [one[key][1] - one[key][0] for one in found["processes"].values() if key in one]
        if not more:
            continue
        yield Row(name=f"soak_{key}_growth", value=max(more), unit=key, how="measured", n=count,
                  against="after warm-up, the larger of device and edge", raw="soak.json")  # fmt: skip


def load_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Two hundred devices."""
    devices = found["load_devices"]
    for key, unit, against in (
        ("load_devices", "devices", None),
        ("load_efficiency", "share", "the tail's raw batched throughput in ONNX Runtime on the edge's core"),
        ("load_fairness", "x", "most served over least served device"),
    ):
        yield Row(name=key, value=found[key], unit=unit, how="measured", n=devices, against=against, raw="load.json")
    for course, value in found["load_p95_s"].items():
        against = f"of accepted requests; the bound is {found['load_bound_s']:g} s"
        yield Row(name=f"load_p95_s@{course}", value=value, unit="s", how="measured", n=devices, against=against,
                  raw="load.json")  # fmt: skip


def tls_rows(found: dict[str, Any]) -> Iterator[Row]:
    """What TLS and a token cost."""
    yield Row(name="tls_overhead_ms", value=found["tls_overhead_ms"], unit="ms", how="measured",
              n=found["pairs"], against="wss:// with a token over ws://, a request", raw="tls.json")  # fmt: skip
    for what, name in (("request", "tls_request_bytes"), ("connection_and_first_request", "tls_connection_bytes")):
        more = found["more_bytes"][what]
        yield Row(name=name, value=more["up_wire_bytes"] + more["down_wire_bytes"], unit="B", how="measured",
                  n=found["pairs"], against="both ways, on the wire, over ws://", raw="tls.json")  # fmt: skip


OTHERS = {
    "chaos": chaos_rows, "fuzz": fuzz_rows, "fuzz_http": http_rows, "soak": soak_rows, "load": load_rows,
    "tls": tls_rows,
}  # fmt: skip


def chaos_table(found: dict[str, Any]) -> TextTable:
    """What each kind of fault did."""

    def shown(times: dict[str, float | None]) -> tuple[str, str]:
        median_s, most_s = times["median"], times["max"]
        return ("", "") if median_s is None or most_s is None else (f"{median_s:.2f}", f"{most_s:.2f}")

    bounds = sorted({setting["notice_bound_s"] for setting in found["by_setting"].values()})
    return TextTable(
        title=(
            "Faults: seconds until noticed, and until the edge answered again after the fault's end; bounds of "
            f"{' and '.join(f'{bound:g}' for bound in bounds)} s"
        ),
        columns=("fault", "times", "noticed", "median", "most", "return, median", "most"),
        rows=tuple(
            (
                name, str(one["struck"]), str(one["noticed"]), *shown(one["notice_s"]), *shown(one["return_s"]),
            )
            for name, one in found["by_fault"]["all"].items()
        ),
    )  # fmt: skip


def soak_table(found: dict[str, Any]) -> TextTable:
    """Memory, descriptors, threads and tasks of the processes, after warm-up and at the end."""
    return TextTable(
        title=f"Soak: {found['soak_requests']} requests, {found['reconnects']} connections, {found['seconds']:.0f} s",
        columns=(
            "process", "growth %, by the line", "MB, single looks", "descriptors", "most", "threads", "most",
            "tasks", "most",
        ),
        rows=tuple(
            (
                name, f"{one['rss_growth_pct']:.2f}", _to([f"{size / 1e6:.1f}" for size in one["rss_bytes"]]),
                _to(one["fds"]), str(one["most_fds"]), _to(one["threads"]), str(one["most_threads"]),
                *((_to(one["tasks"]), str(one["most_tasks"])) if "tasks" in one else ("-", "-")),
            )
            for name, one in found["processes"].items()
        ),
    )  # fmt: skip


def _to(pair: list[Any]) -> str:
    return f"{pair[0]} to {pair[1]}"


def load_table(found: dict[str, Any]) -> TextTable:
    """Two hundred devices at one edge, step by step."""
    columns = ("step", "offered_hz", "served_hz", "answered", "refused_share", "fairness", "batch")
    return TextTable(
        title=f"{found['load_devices']} devices at one edge, batches of up to {found['max_batch']}",
        columns=columns,
        rows=tuple(tuple(_short(step.get(name)) for name in columns) for step in found["steps"]),
    )


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


TABLES = {"chaos": chaos_table, "soak": soak_table, "load": load_table}


def main() -> None:
    """The page, of what has been measured."""
    rows: list[Row] = [*trace_rows()]
    page = [(Path(__file__).parent / "runtime.head.md").read_text()]
    body: list[str] = []
    if live_logs():
        body += [markdown(live_table()), ""]
        for file, title in trace_pictures():
            body += [f"![{title}]({file})", ""]
    if simulated_rows():
        body += [markdown(simulated_table()), "", markdown(fixed_table()), "", markdown(plans_table()), ""]
    for name, make_rows in OTHERS.items():
        found = figures_of(name)
        if found is not None:
            rows += make_rows(found)
            if name in TABLES:
                body += [markdown(TABLES[name](found)), ""]
    if not rows:
        print(f"the runtime is not measured yet: there is no log in {RAW}")
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    found_by = {name: found for name in OTHERS if (found := figures_of(name)) is not None}
    dated = list(found_by.values())
    noted = {name: found.get("commit", "not noted") for name, found in found_by.items()}
    traces = ("traces_live", "traces_simulated") if (RAW / "commits.json").is_file() else ()
    machine = next((found["machine"] for found in dated if "machine" in found), "unknown")
    results = Results(
        commit=measured_commit(commit, RAW, traces, noted),
        date=max(found["date"] for found in dated) if dated else read_raw(RAW / "machine.jsonl.gz")[0]["date"],
        machine=machine,
        command="make bench-runtime chaos fuzz soak",
        rows=tuple(
            msgspec.structs.replace(row, raw=None if row.raw is None else f"{RAW.name}/{row.raw}") for row in rows
        ),
    )
    write_results(DOCS / "runtime.json", results)
    page += ["## Rows", "", results_markdown(results), "", *body]
    write_atomically(DOCS / "runtime.md", ("\n".join(page).rstrip() + "\n").encode())
    print(f"{len(rows)} rows written to {DOCS / 'runtime.json'}")


if __name__ == "__main__":
    main()
