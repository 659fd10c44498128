"""What `coinfer run` prints of each answer, and what it says of all of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..bundle import Bundle
from ..units import format_bytes, format_duration

if TYPE_CHECKING:
    from ..runtime.request import Answer
    from .pictures import Request

# A process that never ends keeps so many latencies for its percentiles.
KEPT = 100_000
_PERCENTILES = ("latency_p50_s", "latency_p95_s")


def entry_of(bundle: Bundle, request: Request, answer: Answer) -> dict[str, Any]:
    """One answer as it is printed."""
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


@dataclass
class Tally:
    """What has been answered so far, in memory that does not grow."""

    count: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    payload_bytes: int = 0
    wire_bytes: int = 0
    num_right: int = 0
    num_labelled: int = 0
    unanswered: dict[str, int] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    plans: dict[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.count or self.unanswered)

    def add(self, entry: dict[str, Any]) -> None:
        """Count what came of one request."""
        how = entry["answered"]
        if entry["label"] is None:
            self.unanswered[how] = self.unanswered.get(how, 0) + 1
            return
        self.count += 1
        self.answered[how] = self.answered.get(how, 0) + 1
        self.plans[entry["plan"]] = self.plans.get(entry["plan"], 0) + 1
        self.latencies_s.append(entry["latency_s"])
        self.payload_bytes += entry["payload_bytes"]
        self.wire_bytes += entry["wire_bytes"]
        self.num_labelled += "right" in entry
        self.num_right += entry.get("right", False)

    def summary(self, bundle: Bundle, device: str, elapsed_s: float) -> dict[str, Any]:
        """Medians of the latest, means, the share of right answers (None where no picture had a class), counts.

        `plan` is the one that answered most.
        """
        import numpy as np

        count = self.count
        p50_s, p95_s = map(float, np.percentile(self.latencies_s, [50, 95])) if count else (None, None)
        plan = max(self.plans, key=self.plans.__getitem__) if self.plans else None
        return {
            "plan": plan,
            "label": None if plan is None else bundle.plan(plan).label,
            "plans": self.plans,
            "device": device,
            "requests": count,
            "answered": self.answered,
            "latency_p50_s": p50_s,
            "latency_p95_s": p95_s,
            "throughput_hz": count / elapsed_s if elapsed_s > 0 else None,
            "payload_bytes": self.payload_bytes / max(1, count),
            "wire_bytes": self.wire_bytes / max(1, count),
            "accuracy": 100 * self.num_right / self.num_labelled if self.num_labelled else None,
            "unanswered": self.unanswered,
        }


def summary_text(summary: dict[str, Any]) -> str:
    """The summary in one line."""
    others = len(summary["plans"]) - 1
    more = f" and {others} more" if others > 0 else ""
    plan = "no plan" if summary["plan"] is None else f"plan {summary['plan']}{more} ({summary['label']})"
    extra = "" if summary["accuracy"] is None else f", {summary['accuracy']:.2f} % right"
    fallbacks = summary["answered"].get("fallback", 0)
    extra += f", {fallbacks} by the device in the edge's place" if fallbacks else ""
    extra += "".join(f", {count} {why}" for why, count in summary["unanswered"].items())
    p50, p95 = ("none" if it is None else format_duration(it) for it in map(summary.get, _PERCENTILES))
    return (
        f"{summary['requests']} requests by {plan}, {summary['device']}: latency p50 {p50}, p95 {p95}, "
        f"{summary['throughput_hz'] or 0:.3g} a second, {format_bytes(summary['payload_bytes'])} payload, "
        f"{format_bytes(summary['wire_bytes'])} on the wire{extra}"
    )
