"""The picture of a device that adapts: the link's rate, which plan each request took, how long its answer took.

    rate     the link's own (where it is known), and what the device knew when it changed plans
    plan     a mark for each request, by who answered it; a line where the plan was changed
    latency  of each request
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..errors import DataError
from ..profile import Trace
from ..timeline import Decision, Outcome
from ..units import format_duration, format_rate
from .plots import GREY, save, unit_axis

COLOURS = {
    "edge": "#0072B2", "device": "#009E73", "exit": "#56B4E9", "fallback": "#D55E00", "late": "#CC79A7",
    "dropped": "#999999", "failed": "#000000",
}  # fmt: skip
# Where an outage is drawn on a logarithmic axis.
LEAST_BPS = 1e4


def plot_decisions(
    path: Path,
    outcomes: Sequence[Outcome],
    decisions: Sequence[Decision],
    labels: dict[int, str],
    *,
    title: str,
    trace: Trace | None = None,
) -> None:
    """Draw a run over time, seconds on the device's clock; `labels` name its plans.

    Raises:
        DataError: no outcome.
    """
    if not outcomes:
        raise DataError("a picture of decisions needs a request, got none")
    figure = Figure(figsize=(9.4, 6.4), layout="constrained")
    figure.suptitle(title)
    rate, plan, latency = figure.subplots(3, 1, sharex=True, height_ratios=(2, 2, 3))
    end_s = max(outcome.end_s for outcome in outcomes)
    if trace is not None:
        times_s = np.array([*(start_s for start_s in trace.start_s if start_s < end_s), end_s])
        rates_bps = [max(LEAST_BPS, trace.at(float(time_s))) for time_s in times_s]
        rate.step(times_s, rates_bps, where="post", color=GREY, linewidth=1.2, label="the link")
    known = [(decision.at_s, max(LEAST_BPS, decision.rate_bps)) for decision in decisions]
    if known:
        rate.plot(*np.array(known).T, "k.", label="as the device knew it when it changed plans")
    rate.set_yscale("log")
    unit_axis(rate.yaxis, format_rate, rate.get_ylim())
    rate.set_ylabel("uplink")
    if known or trace is not None:
        rate.legend(loc="lower right", fontsize=8, frameon=False)
    used = list(dict.fromkeys(outcome.plan for outcome in sorted(outcomes, key=lambda outcome: outcome.start_s)))
    for answered, colour in COLOURS.items():
        some = [outcome for outcome in outcomes if outcome.answered == answered]
        if not some:
            continue
        starts_s = [outcome.start_s for outcome in some]
        plan.scatter(starts_s, [used.index(outcome.plan) for outcome in some], s=6, color=colour)
        latency.scatter(starts_s, [outcome.latency_s for outcome in some], s=6, color=colour, label=answered)
    plan.set_yticks(range(len(used)), [labels.get(number, str(number)) for number in used], fontsize=7)
    plan.set_ylim(-0.6, len(used) - 0.4)
    for decision in decisions:
        for axes in (plan, latency):
            axes.axvline(decision.at_s, color="#e2e2e2", linewidth=0.8, zorder=0)
    latency.set_yscale("log")
    latencies_s = [max(outcome.latency_s, 1e-6) for outcome in outcomes]
    latency.set_ylim(min(latencies_s) / 1.3, max(latencies_s) * 1.3)
    unit_axis(latency.yaxis, format_duration, latency.get_ylim())
    latency.set_ylabel("latency")
    latency.set_xlabel("seconds")
    latency.legend(loc="upper right", fontsize=8, frameon=False, title="answered by")
    save(figure, path)
