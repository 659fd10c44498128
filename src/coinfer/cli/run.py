"""`coinfer run`: the device."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..bundle import Bundle, load_bundle
from ..errors import UsageError
from ..files import write_atomically
from ..units import parse_duration_s
from .conditions import Options, conditions_of, slowdown_of
from .options import (
    TOKEN,
    BundleFolder,
    DataFolder,
    DataSource,
    DeviceCert,
    DeviceKey,
    EdgeCa,
    Int8Slowdown,
    Json,
    Slowdown,
    TokenFile,
)
from .output import note, print_json
from .tally import Tally, entry_of, summary_text

if TYPE_CHECKING:
    from ..data.live import Stop
    from ..runtime.device import Device
    from ..runtime.guarded import GuardedDevice
    from ..runtime.request import Answer
    from .pictures import Request


def run(
    bundle: BundleFolder,
    data: DataSource,
    edge: Annotated[
        str | None,
        typer.Option("--edge", metavar="URL", help="The edge: ws://HOST:PORT, or wss:// for TLS.", show_default=False),
    ] = None,
    plan: Annotated[
        str,
        typer.Option(
            "--plan", metavar="N|auto", help="One plan of the menu; auto chooses for each request, as the link is."
        ),
    ] = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="End with an error where the link or the edge fails; one plan for all.")
    ] = False,
    fallback: Annotated[
        int | None,
        typer.Option("--fallback", help="Plan of the device alone, for where the edge fails.", show_default=False),
    ] = None,
    notice: Annotated[
        str, typer.Option("--notice", help="How soon a lost link must be noticed, or 3 times a request if longer.")
    ] = "2s",
    hedge: Annotated[
        float,
        typer.Option(
            "--hedge",
            help="An answer late by so many times what the device would take alone is computed there too; inf: never.",
        ),
    ] = 0.3,
    rate: Annotated[
        str | None,
        typer.Option("--rate", help="Rate of the uplink; without --strict, until it is measured.", show_default=False),
    ] = None,
    rtt: Annotated[
        str | None, typer.Option("--rtt", help="Round trip of the link, such as 20ms; likewise.", show_default=False)
    ] = None,
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
    token_file: TokenFile = None,
    ca: EdgeCa = None,
    cert: DeviceCert = None,
    key: DeviceKey = None,
    verify_key: Annotated[
        Path | None,
        typer.Option("--verify-key", help="Refuse a bundle that this public key has not signed.", show_default=False),
    ] = None,
    slowdown: Slowdown = None,
    int8_slowdown: Int8Slowdown = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of one segment.")] = 1,
    timeout: Annotated[
        str, typer.Option("--timeout", help="With --strict: the longest silence of the edge; sending counts.")
    ] = "30s",
    metrics: Annotated[
        int | None,
        typer.Option(
            "--metrics", min=1, max=65535, help="Serve Prometheus metrics on this port of loopback.",
            show_default=False,
        ),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            "--timeline", metavar="FILE",
            help="Keep outcomes, changes of plan with their reasons, and spans as JSON lines; the latest 50,000.",
            show_default=False,
        ),
    ] = None,
    log: Annotated[str, typer.Option("--log", help="Log lines on stderr as text or json.")] = "text",
    data_dir: DataFolder = None,
    json: Json = False,
) -> None:
    """Run a bundle: the device.

    Answers pictures, alone or with an edge; it needs no torch. Each answer is one JSON line on stdout as it comes; a
    summary follows on stderr. With an edge every request is answered, whatever the link does: the plan of each is
    chosen by what the link and the edge are like just then, and what the edge does not answer in time the device
    does itself ("answered": "fallback"). With --json, one object with all answers and the summary is printed at the
    end. A folder's pictures are taken in the order of their paths and scaled to the bundle's size; their classes are
    the names of their folders. SIGTERM or Ctrl-C ends what comes in; what is under way is answered, and the process
    ends with 0.
    """
    if not stream and (policy != "block" or deadline is not None or period is not None or unordered):
        raise UsageError("--policy, --deadline, --period and --unordered are for a --stream")
    if edge is None and (strict or fallback is not None or token_file or ca or cert or key):
        raise UsageError("--strict, --fallback, --token-file, --ca, --cert and --key are for an --edge")
    if metrics is not None and (edge is None or strict):
        raise UsageError("--metrics are of a device with an --edge, and without --strict")
    if not hedge >= 0:
        raise UsageError(f"--hedge must be 0 or more, got {hedge:g}")
    if timeline is not None and not os.access(timeline.parent, os.W_OK):
        raise UsageError(f"--timeline {timeline}: there is no folder that can be written to")
    if not (notice_s := parse_duration_s(notice)) > 0:
        raise UsageError(f"--notice must be above 0 s, got {notice}")
    loaded = _loaded(bundle, verify_key)
    period_s = 0.0 if period is None else parse_duration_s(period)
    options = Options(rate or "1 Mbit/s", rtt or "10 ms", slowdown, int8_slowdown)
    number = _plan_number(loaded, plan, options, has_edge=edge is not None, has_rate=rate is not None, strict=strict)
    from ..data.live import Stop
    from ..lab.slow import SlowedDevice
    from ..runtime.device import Device
    from ..runtime.memory import keep_heap_whole
    from .pictures import requests
    from .stopping import stopping

    keep_heap_whole()
    with Stop() as stop, stopping(stop):
        _log_to_stderr(log)
        pending = requests(data, loaded, limit=limit, data_dir=data_dir, stop=stop)
        factors = slowdown_of(loaded, slowdown, int8_slowdown)
        # One thread computes in its caller: then nothing else that this process does is stretched.
        counts: Literal["cpu", "wall"] = "cpu" if threads == 1 else "wall"
        pace = None if factors is None else SlowedDevice(factors, counts=counts)
        secrets = secrets_of(edge, token_file, ca, cert, key)
        device: Device | GuardedDevice
        if edge is None or strict:
            timeout_s = parse_duration_s(timeout)
            device = Device(
                loaded, edge=edge, plan=number, pace=pace, threads=threads, timeout_s=timeout_s, **secrets
            )
        else:
            assumed = conditions_of(loaded, options) if rate or rtt or factors else None
            device = _guarded(
                loaded, edge, plan=number, fallback=fallback, hedge=hedge, conditions=assumed, notice_s=notice_s,
                pace=pace, threads=threads, **secrets,
            )  # fmt: skip
        tally = Tally()
        answers: list[dict[str, Any]] = []
        observe = _observer(device, metrics)
        # What was loaded stays: on a slow core a look at all of it takes as long as a request.
        gc.collect()
        gc.freeze()
        # Threads that watch and receive give way to the one that computes within so many seconds.
        sys.setswitchinterval(0.0005)
        start_s, is_through = perf_counter(), False
        try:
            with device:
                if not isinstance(device, Device) and not stop.is_set:
                    device.rehearse()
                start_s = perf_counter()
                if stream:
                    answered = _streamed(device, pending, policy, deadline, period_s, stop, is_ordered=not unordered)
                else:
                    answered = ((request, device.infer(request.pixels)) for request in pending)
                for request, answer in answered:
                    entry = entry_of(loaded, request, answer)
                    tally.add(entry)
                    observe(answer)
                    if json:
                        answers.append(entry)
                    else:
                        _print_line(entry)
                is_through = True
                if stop.is_set:
                    note("told to end; what was under way is answered")
        finally:
            # Also where the link broke: what was answered until then was answered.
            if tally or (json and is_through):
                name = "this machine, not slowed" if pace is None else pace.label
                summary = tally.summary(loaded, name, perf_counter() - start_s)
                if json:
                    print_json({"answers": answers, "summary": summary})
                else:
                    note(summary_text(summary))
            if timeline is not None:
                write_atomically(timeline, device.timeline.to_json_lines())


def _loaded(folder: Path, verify_key: Path | None) -> Bundle:
    if verify_key is None:
        return load_bundle(folder)
    from ..signature import load_signed_bundle

    return load_signed_bundle(folder, verify_key)


def _guarded(bundle: Bundle, edge: str, *, notice_s: float, **options: Any) -> GuardedDevice:
    from ..runtime.guarded import GuardedDevice
    from ..runtime.keeper import KeepTerms

    return GuardedDevice(bundle, edge=edge, keep=KeepTerms(notice_s=notice_s), **options)


def secrets_of(
    edge: str | None, token_file: Path | None, ca: Path | None, cert: Path | None, key: Path | None
) -> dict[str, Any]:
    """What a device shows its edge, and whom it trusts."""
    if edge is None:
        return {}
    from ..runtime.tls import DeviceTls
    from ..runtime.tokens import checked_token, read_token

    token = os.environ.get(TOKEN)
    if token_file is not None:
        token = read_token(token_file)
    elif token:
        token = checked_token(token, TOKEN)
    tls = DeviceTls(ca=ca, certificate=cert, key=key) if ca or cert or key else None
    return {"token": token or None, "tls": tls}


def _plan_number(
    bundle: Bundle, plan: str, options: Options, *, has_edge: bool, has_rate: bool, strict: bool
) -> int | None:
    """The plan for all requests; None where each has its own."""
    if plan != "auto":
        if not (plan.isascii() and plan.isdigit()):
            raise UsageError(f'--plan must be a number of the menu or auto, got "{plan}"')
        chosen = bundle.plan(int(plan))
        if chosen.kind != "device" and not has_edge:
            raise UsageError(f"plan {plan} ({chosen.label}) needs an edge: give --edge ws://HOST:PORT")
        return chosen.number
    if has_edge and not strict:
        return None
    if has_edge and not has_rate:
        raise UsageError("--strict --plan auto needs the link's rate: give --rate, such as --rate 1Mbit/s, or --plan N")
    from ..search.solve import search
    from .plan import goal_of

    on_menu = {entry.number for entry in bundle.manifest.menu if has_edge or entry.kind == "device"}
    candidates = [candidate for candidate in bundle.candidates() if candidate.plan.number in on_menu]
    return candidates[search(candidates, conditions_of(bundle, options), goal_of(bundle, None, None)).best].plan.number


def _streamed(
    device: Device | GuardedDevice,
    pending: Iterator[Request],
    policy: str,
    deadline: str | None,
    period_s: float,
    stop: Stop,
    *,
    is_ordered: bool,
) -> Iterator[tuple[Request, Answer]]:
    asked: dict[int, Request] = {}

    def pixels() -> Iterator[Any]:
        begin_s = perf_counter()
        # The device numbers its requests from 0 on.
        for number, request in enumerate(pending):
            if stop.wait(begin_s + number * period_s - perf_counter()):
                return
            asked[number % 2**32] = request
            yield request.pixels

    for answer in device.stream(
        pixels(),
        policy=policy,  # type: ignore[arg-type]
        deadline_s=None if deadline is None else parse_duration_s(deadline),
        is_ordered=is_ordered,
    ):
        yield asked.pop(answer.request), answer


def _observer(device: Any, port: int | None) -> Callable[[Answer], None]:
    """What counts answers for Prometheus; nothing without a port."""
    if port is None:
        return lambda answer: None
    from ..runtime.device_metrics import DeviceMetrics

    counts = DeviceMetrics(device)
    counts.serve(port)
    return counts.answered


def _log_to_stderr(form: str) -> None:
    """Let the device's log lines appear on stderr."""
    from .logs import log_to_stderr

    log_to_stderr("coinfer.device", form)


def _print_line(entry: dict[str, Any]) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(entry).decode() + "\n")
    sys.stdout.flush()
