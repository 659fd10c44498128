"""`coinfer run`: the device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bundle import Bundle, load_bundle
from ..errors import UsageError
from ..units import format_bytes, format_duration, parse_duration_s
from .conditions import Options, conditions_of, slowdown_of
from .options import BundleFolder, DataFolder, DataSource, Int8Slowdown, Json, RoundTrip, Slowdown
from .output import note, print_json

if TYPE_CHECKING:
    from ..runtime.device import Device
    from ..runtime.request import Answer
    from .pictures import Request


def run(
    bundle: BundleFolder,
    data: DataSource,
    edge: Annotated[
        str | None,
        typer.Option("--edge", metavar="URL", help="The edge, such as ws://127.0.0.1:8300.", show_default=False),
    ] = None,
    plan: Annotated[
        str, typer.Option("--plan", metavar="N|auto", help="Number of a plan of the menu, or the best for --rate.")
    ] = "auto",
    rate: Annotated[
        str | None, typer.Option("--rate", help="Rate of the uplink, for --plan auto.", show_default=False)
    ] = None,
    rtt: RoundTrip = "10ms",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most this many pictures.", show_default=False)
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Let computing, sending and receiving of several pictures overlap.")
    ] = False,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            help="Where the device cannot keep up with a stream: block, drop-oldest (the newest wins) or drop-newest.",
        ),
    ] = "block",
    deadline: Annotated[
        str | None,
        typer.Option(
            "--deadline", help="Of each request of a stream, such as 100ms; without an answer it is late.",
            show_default=False,
        ),
    ] = None,
    period: Annotated[
        str | None,
        typer.Option(
            "--period", help="A picture of a stream so often, as a camera gives them; else as fast as they are taken.",
            show_default=False,
        ),
    ] = None,
    unordered: Annotated[
        bool, typer.Option("--unordered", help="A stream's answers as they are completed: exits overtake.")
    ] = False,
    slowdown: Slowdown = None,
    int8_slowdown: Int8Slowdown = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of one segment.")] = 1,
    timeout: Annotated[
        str, typer.Option("--timeout", help="Longest silence of the edge before a request fails; sending counts.")
    ] = "30s",
    data_dir: DataFolder = None,
    json: Json = False,
) -> None:
    """Run a bundle: the device.

    Answers pictures by one plan, alone or with an edge; it needs no torch. Each answer is one JSON line on
    stdout as it comes; a summary follows on stderr, also where the link broke in between. With --json, one object
    with all answers and the summary is printed at the end. A folder's pictures are taken in the order of their
    paths and scaled to the bundle's size; their classes are the names of their folders.
    """
    loaded = load_bundle(bundle)
    conditions = Options(rate or "1 Mbit/s", rtt, slowdown, int8_slowdown)
    if not stream and (policy != "block" or deadline is not None or period is not None or unordered):
        raise UsageError("--policy, --deadline, --period and --unordered are for a --stream")
    period_s = 0.0 if period is None else parse_duration_s(period)
    number = _plan_number(loaded, plan, has_edge=edge is not None, has_rate=rate is not None, options=conditions)
    from ..lab.slow import SlowedDevice
    from ..runtime.device import Device
    from .pictures import requests

    pending = requests(data, loaded, limit=limit, data_dir=data_dir)
    factors = slowdown_of(loaded, slowdown, int8_slowdown)
    pace = None if factors is None else SlowedDevice(factors)
    tally = Tally()
    answers: list[dict[str, Any]] = []
    start_s = perf_counter()
    try:
        with Device(
            loaded, edge=edge, plan=number, pace=pace, threads=threads, timeout_s=parse_duration_s(timeout)
        ) as device:
            start_s = perf_counter()
            if stream:
                answered = _streamed(device, pending, policy, deadline, period_s, is_ordered=not unordered)
            else:
                answered = ((request, device.infer(request.pixels)) for request in pending)
            for request, answer in answered:
                entry = _entry(loaded, request, answer)
                tally.add(entry)
                if json:
                    answers.append(entry)
                else:
                    _print_line(entry)
    finally:
        # Also where the link broke: what was answered until then was answered.
        if tally.latencies_s or tally.unanswered:
            name = "this machine, not slowed" if pace is None else pace.label
            summary = tally.summary(loaded, number, name, perf_counter() - start_s)
            if json:
                print_json({"answers": answers, "summary": summary})
            else:
                note(_summary_text(summary))


def _plan_number(bundle: Bundle, plan: str, *, has_edge: bool, has_rate: bool, options: Options) -> int:
    if plan != "auto":
        if not plan.isdigit():
            raise UsageError(f'--plan must be a number of the menu or auto, got "{plan}"')
        chosen = bundle.plan(int(plan))
        if chosen.kind != "device" and not has_edge:
            raise UsageError(f"plan {plan} ({chosen.label}) needs an edge: give --edge ws://HOST:PORT")
        return chosen.number
    if has_edge and not has_rate:
        raise UsageError("--plan auto needs the link's rate: give --rate, such as --rate 1Mbit/s, or --plan N")
    from ..search.solve import search
    from .plan import goal_of

    on_menu = {entry.number for entry in bundle.manifest.menu if has_edge or entry.kind == "device"}
    candidates = [candidate for candidate in bundle.candidates() if candidate.plan.number in on_menu]
    return candidates[search(candidates, conditions_of(bundle, options), goal_of(bundle, None, None)).best].plan.number


def _streamed(
    device: Device,
    pending: Iterator[Request],
    policy: str,
    deadline: str | None,
    period_s: float,
    *,
    is_ordered: bool,
) -> Iterator[tuple[Request, Answer]]:
    asked: dict[int, Request] = {}

    def pixels() -> Iterator[Any]:
        begin_s = perf_counter()
        # The device numbers its requests from 0 on.
        for number, request in enumerate(pending):
            sleep(max(0.0, begin_s + number * period_s - perf_counter()))
            asked[number] = request
            yield request.pixels

    for answer in device.stream(
        pixels(),
        policy=policy,  # type: ignore[arg-type]
        deadline_s=None if deadline is None else parse_duration_s(deadline),
        is_ordered=is_ordered,
    ):
        yield asked.pop(answer.request), answer


def _entry(bundle: Bundle, request: Request, answer: Answer) -> dict[str, Any]:
    classes, outcome = bundle.manifest.classes, answer.outcome
    label = answer.label if answer.is_answered else None
    entry: dict[str, Any] = {
        "request": answer.request,
        "input": request.name,
        "label": label,
        "class": classes[label] if label is not None and label < len(classes) else None,
        "plan": outcome.plan,
        "answered": answer.answered,
        "latency_s": round(outcome.latency_s, 6),
        "payload_bytes": outcome.payload_bytes,
        "wire_bytes": outcome.wire_bytes,
    }
    if outcome.exit is not None:
        entry["exit"] = bundle.plan(outcome.plan).exits[outcome.exit].cut
    if request.label is not None and label is not None:
        entry["right"] = label == request.label
    return entry


def _print_line(entry: dict[str, Any]) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(entry).decode() + "\n")
    sys.stdout.flush()


@dataclass
class Tally:
    """What has been answered so far."""

    latencies_s: list[float] = field(default_factory=list)
    payload_bytes: int = 0
    wire_bytes: int = 0
    num_right: int = 0
    num_labelled: int = 0
    unanswered: dict[str, int] = field(default_factory=dict)

    def add(self, entry: dict[str, Any]) -> None:
        """Count what came of one request."""
        if entry["label"] is None:
            self.unanswered[entry["answered"]] = self.unanswered.get(entry["answered"], 0) + 1
            return
        self.latencies_s.append(entry["latency_s"])
        self.payload_bytes += entry["payload_bytes"]
        self.wire_bytes += entry["wire_bytes"]
        self.num_labelled += "right" in entry
        self.num_right += entry.get("right", False)

    def summary(self, bundle: Bundle, number: int, device: str, elapsed_s: float) -> dict[str, Any]:
        """Medians, means and the share of right answers (None where no picture had a class)."""
        import numpy as np

        count = len(self.latencies_s)
        p50_s, p95_s = np.percentile(self.latencies_s, [50, 95]) if count else (float("nan"), float("nan"))
        return {
            "plan": number,
            "label": bundle.plan(number).label,
            "device": device,
            "requests": count,
            "latency_p50_s": float(p50_s),
            "latency_p95_s": float(p95_s),
            "throughput_hz": count / elapsed_s if elapsed_s > 0 else None,
            "payload_bytes": self.payload_bytes / max(1, count),
            "wire_bytes": self.wire_bytes / max(1, count),
            "accuracy": 100 * self.num_right / self.num_labelled if self.num_labelled else None,
            "unanswered": self.unanswered,
        }


def _summary_text(summary: dict[str, Any]) -> str:
    accuracy = "" if summary["accuracy"] is None else f", {summary['accuracy']:.2f} % right"
    accuracy += "".join(f", {count} {why}" for why, count in summary["unanswered"].items())
    return (
        f"{summary['requests']} requests by plan {summary['plan']} ({summary['label']}), {summary['device']}: "
        f"latency p50 {format_duration(summary['latency_p50_s'])}, p95 {format_duration(summary['latency_p95_s'])}, "
        f"{summary['throughput_hz'] or 0:.3g} a second, {format_bytes(summary['payload_bytes'])} payload, "
        f"{format_bytes(summary['wire_bytes'])} on the wire{accuracy}"
    )
