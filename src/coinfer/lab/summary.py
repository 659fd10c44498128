"""From the raw lines of a benchmark to its rows: a pure function, so that every figure can be computed again.

A plan's row has the median and spread of its measured latency in one cell beside its estimate.  A cell's row
has the chosen plan beside every baseline, and the regret: the chosen plan's median over that of the best plan measured
in the cell that keeps the accuracy limit.  Where the two finalists were measured once more, the regret is that
of the second measurement, since the best of many medians is flattered by chance in the first.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..errors import DataError
from ..plan import Kind, Value, Way
from ..search.goal import LOSS_TOLERANCE
from .record import CalibrationLine, CellLine, EstimateLine, Header, Line, MemoryLine, MenuPlan, RequestLine
from .worker import Request


class Spread(Value, frozen=True, kw_only=True):
    """Median, 5th and 95th percentile, and of how many; infinite where nothing was measured."""

    p50: float
    p5: float
    p95: float
    n: int


class PlanRow(Value, frozen=True, kw_only=True):
    """One plan in one cell.  `typical_s` is the latency that it is compared by (`typical`).

    `accuracy` is the deployed form's, of `num_images` of part `split`, from the evidence; `accuracy_seen` that of the
    requests measured here.  Stage times are medians as measured, slowed and all.
    """

    cell: str
    plan: int
    kind: Kind
    label: str
    roles: tuple[str, ...]
    latency_s: Spread
    typical_s: float
    estimated_s: float
    failed: int
    stages_s: dict[str, float]
    estimated_stages_s: dict[str, float]
    payload_bytes: float
    wire_bytes: float
    reply_wire_bytes: float
    accuracy: float | None
    num_images: int
    split: str
    loss_points: float | None
    accuracy_seen: float | None

    @property
    def estimate_error(self) -> float:
        """Measured over the estimate, minus 1."""
        return self.typical_s / self.estimated_s - 1


class StreamRow(Value, frozen=True, kw_only=True):
    """A stream of `n` requests by one plan: answers a second over the whole of it, filling and draining included.

    `bottleneck_hz` is what the critical resource alone could do, were it never idle: by the times and bytes of this
    stream, by expected times where nothing was measured (a device that is not slowed).
    """

    cell: str
    plan: int
    n: int
    failed: int
    throughput_hz: float
    bottleneck_hz: float
    critical: str

    @property
    def efficiency(self) -> float:
        """Throughput over the critical resource's rate."""
        return self.throughput_hz / self.bottleneck_hz


class CellRow(Value, frozen=True, kw_only=True):
    """One cell: the chosen plan and how it compares.

    `baselines` maps a way to its baseline's plan, `ratios` to that baseline's median over the chosen plan's.
    `best` is the plan with the least median that keeps the accuracy limit, `regret` the chosen plan over it.
    `speedup` is the least ratio of the other ways' baselines: what choosing this way brings.
    `device_rss_bytes` is the device process's resident memory after the cell, None where the log has it not.
    """

    cell: str
    rate_bps: float
    delay_s: float
    slowdown: float
    load: float
    device: str
    chosen: PlanRow
    baselines: dict[Way, int]
    ratios: dict[Way, float]
    best: int
    regret: float
    was_measured_again: bool
    speedup: float | None
    stream: StreamRow | None
    device_rss_bytes: int | None


class OverheadRow(Value, frozen=True, kw_only=True):
    """What a request takes beyond its stages over a link without limits: latency - head - encode - decode - tail."""

    cell: str
    is_direct: bool
    seconds: Spread
    worst_plan_p50_s: float


class Summary(Value, frozen=True, kw_only=True):
    """All rows of one log."""

    header: Header
    plans: tuple[PlanRow, ...]
    cells: tuple[CellRow, ...]
    streams: tuple[StreamRow, ...]
    overheads: tuple[OverheadRow, ...]

    @property
    def regret_max(self) -> float:
        """The worst regret of all cells."""
        return max(cell.regret for cell in self.cells)

    @property
    def estimate_error_max(self) -> float:
        """The estimate of a chosen plan that is furthest off, as measured / estimated - 1, by size."""
        return max((cell.chosen.estimate_error for cell in self.cells), key=abs)


def spread(values: Sequence[float]) -> Spread:
    """Median and spread."""
    if not len(values):
        return Spread(p50=math.inf, p5=math.inf, p95=math.inf, n=0)
    p5, p50, p95 = (float(x) for x in np.percentile(values, (5, 50, 95)))
    return Spread(p50=p50, p5=p5, p95=p95, n=len(values))


def typical(latencies_s: Sequence[float], has_exits: bool) -> float:
    """The median; of a plan with exits the mean, since its requests are of several kinds."""
    return statistics.fmean(latencies_s) if has_exits else statistics.median(latencies_s)


def summarise(lines: Iterable[Line]) -> Summary:
    """Every row, from the log alone.

    Raises:
        DataError: the log has no header.
    """
    header: Header | None = None
    cells: list[CellLine] = []
    calibrations: list[CalibrationLine] = []
    memory: dict[str, MemoryLine] = {}
    requests: dict[tuple[str, str, int], list[RequestLine]] = defaultdict(list)
    for line in lines:
        if isinstance(line, Header):
            header = line
        elif isinstance(line, CellLine):
            cells.append(line)
        elif isinstance(line, CalibrationLine):
            calibrations.append(line)
        elif isinstance(line, MemoryLine):
            memory[line.cell] = line
        else:
            requests[line.cell, line.phase, line.request.plan].append(line)
    if header is None:
        raise DataError("a benchmark's log has a header, got none")
    menu = {plan.number: plan for plan in header.menu}
    plans, rows, streams = [], [], []
    for cell in cells:
        in_cell = [_plan_row(cell, menu[e.plan], e, requests[cell.cell, "main", e.plan]) for e in cell.estimates]
        in_streams = [
            _stream_row(cell, estimate, seen, memory.get(cell.cell))
            for estimate in cell.estimates
            if (seen := requests.get((cell.cell, "stream", estimate.plan)))
        ]
        finals = {
            estimate.plan: typical(_latencies(seen), menu[estimate.plan].has_exits)
            for estimate in cell.estimates
            if (seen := requests.get((cell.cell, "final", estimate.plan))) and _latencies(seen)
        }
        plans += in_cell
        streams += in_streams
        rows.append(_cell_row(cell, in_cell, finals, in_streams, header.max_loss_points, memory.get(cell.cell)))
    return Summary(
        header=header,
        plans=tuple(plans),
        cells=tuple(rows),
        streams=tuple(streams),
        overheads=tuple(_overhead_row(line, requests, menu) for line in calibrations),
    )


def _latencies(lines: Sequence[RequestLine]) -> list[float]:
    return [line.request.latency_s for line in lines if line.request.error is None]


def _plan_row(cell: CellLine, plan: MenuPlan, estimate: EstimateLine, lines: Sequence[RequestLine]) -> PlanRow:
    good = [line for line in lines if line.request.error is None]
    done = [line.request for line in good]
    known = [line.request.predicted == line.label for line in good if line.label is not None]

    def median(read: Callable[[Request], float]) -> float:
        return statistics.median(read(request) for request in done) if done else math.inf

    def mean(read: Callable[[Request], float]) -> float:
        return statistics.fmean(read(request) for request in done) if done else math.inf

    return PlanRow(
        cell=cell.cell,
        plan=plan.number,
        kind=plan.kind,
        label=plan.label,
        roles=estimate.roles,
        latency_s=spread([request.latency_s for request in done]),
        typical_s=typical([request.latency_s for request in done], plan.has_exits) if done else math.inf,
        estimated_s=estimate.latency_s,
        failed=len(lines) - len(good),
        stages_s={
            "head": median(lambda r: r.head_s),
            "encode": median(lambda r: r.encode_s + r.finish_s),
            "exchange": median(lambda r: r.exchange_s - r.decode_s - r.tail_s),
            "decode": median(lambda r: r.decode_s),
            "tail": median(lambda r: r.tail_s),
        },
        estimated_stages_s=estimate.stages_s,
        payload_bytes=mean(lambda r: r.payload_bytes),
        wire_bytes=mean(lambda r: r.wire_bytes),
        reply_wire_bytes=mean(lambda r: r.reply_wire_bytes),
        accuracy=plan.accuracy,
        num_images=plan.num_images,
        split=plan.split,
        loss_points=plan.loss_points,
        accuracy_seen=statistics.fmean(known) if known else None,
    )


def _stream_row(
    cell: CellLine, estimate: EstimateLine, lines: Sequence[RequestLine], memory: MemoryLine | None
) -> StreamRow:
    """Throughput beside the critical resource's rate, by what each resource did for a request of this very stream."""
    done = [line.request for line in lines if line.request.error is None]
    busy_s = dict(estimate.busy_s)
    if done:
        busy_s["edge"] = statistics.fmean(request.decode_s + request.tail_s for request in done)
    if done and memory is not None and memory.stream_busy_s:
        busy_s["device"] = memory.stream_busy_s / len(done)
    if done and cell.link.trace is None:
        down_bps = cell.link.rate_bps if cell.link.down_rate_bps is None else cell.link.down_rate_bps
        busy_s["uplink"] = statistics.fmean(request.wire_bytes for request in done) * 8 / cell.link.rate_bps
        busy_s["downlink"] = statistics.fmean(request.reply_wire_bytes for request in done) * 8 / down_bps
    critical = max(busy_s, key=lambda name: busy_s[name])
    # A stream that broke off counts as if it had taken for ever.
    makespan_s = math.inf
    if len(done) == len(lines):
        makespan_s = max(request.end_s for request in done) - min(request.start_s for request in done)
    return StreamRow(
        cell=cell.cell,
        plan=estimate.plan,
        n=len(done),
        failed=len(lines) - len(done),
        throughput_hz=len(done) / makespan_s,
        bottleneck_hz=1 / busy_s[critical],
        critical=critical,
    )


def _cell_row(
    cell: CellLine,
    plans: Sequence[PlanRow],
    finals: dict[int, float],
    streams: Sequence[StreamRow],
    max_loss_points: float,
    memory: MemoryLine | None,
) -> CellRow:
    by_number = {row.plan: row for row in plans}
    chosen = by_number[cell.chosen]
    ratios = {
        way: by_number[number].typical_s / chosen.typical_s
        for way, number in cell.baselines.items()
        if number in by_number
    }
    allowed = [row for row in plans if row.plan == cell.chosen or _keeps(row.loss_points, max_loss_points)]
    best = min(allowed, key=lambda row: row.typical_s)
    regret = chosen.typical_s / best.typical_s
    was_measured_again = cell.chosen in finals and len(finals) > 1
    if was_measured_again:
        # The finalists are the chosen plan and its best rival, whichever of the two won the first time.
        winner = min(finals, key=lambda number: finals[number])
        best, regret = by_number[winner], finals[cell.chosen] / finals[winner]
    # A plain split is a rival of a split with a unit, as device and upload are; not so two of one way.
    own = [way for way, number in cell.baselines.items() if number == cell.chosen] or [chosen.kind]
    rivals = [ratio for way, ratio in ratios.items() if way not in own]
    return CellRow(
        cell=cell.cell,
        rate_bps=cell.link.rate_bps,
        delay_s=cell.link.delay_s,
        slowdown=cell.slowdown.fp32,
        load=cell.load,
        device=cell.device,
        chosen=chosen,
        baselines=cell.baselines,
        ratios=ratios,
        best=best.plan,
        regret=regret,
        was_measured_again=was_measured_again,
        speedup=min(rivals) if rivals else None,
        stream=next((row for row in streams if row.plan == cell.chosen), None),
        device_rss_bytes=None if memory is None else memory.rss_bytes,
    )


def _keeps(loss_points: float | None, max_loss_points: float) -> bool:
    return loss_points is not None and loss_points <= max_loss_points + LOSS_TOLERANCE


def _overhead_row(
    line: CalibrationLine, requests: dict[tuple[str, str, int], list[RequestLine]], menu: dict[int, MenuPlan]
) -> OverheadRow:
    beyond_s = {
        number: [
            r.latency_s - r.head_s - r.exit_s - r.encode_s - r.decode_s - r.tail_s - 2 * line.delay_s
            for r in (seen.request for seen in requests[line.cell, "calibrate", number])
            if r.error is None and r.answered == "edge"
        ]
        for number, plan in menu.items()
        if plan.kind != "device" and (line.cell, "calibrate", number) in requests
    }
    everything = [seconds for several in beyond_s.values() for seconds in several]
    return OverheadRow(
        cell=line.cell,
        is_direct=line.is_direct,
        seconds=spread(everything),
        worst_plan_p50_s=max((spread(several).p50 for several in beyond_s.values()), default=math.inf),
    )
