"""Candidates at the times of the machines that they shall run on, in place of the building machine's."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..plan import Candidate, Plan, Side
from ..profile import Profile
from ..stages import segment_times


def with_profiles(
    candidates: Sequence[Candidate], *, device: Profile | None = None, edge: Profile | None = None
) -> list[Candidate]:
    """The candidates with the times of the machines that were profiled in place of the building machine's.

    A candidate that a profile does not cover (its segments are not in the bundle) is marked dropped,
    since a time of another machine beside a time of this one would compare nothing.
    """
    return [_with_profiles(candidate, device, edge) for candidate in candidates]


def _with_profiles(candidate: Candidate, device: Profile | None, edge: Profile | None) -> Candidate:
    plan, shares, times = candidate.plan, candidate.evidence.exit_shares, dict[str, float]()
    batches = [candidate.evidence.tail_batch_s]
    sides: tuple[tuple[Side, Profile | None], ...] = (("device", device), ("edge", edge))
    for side, profile in sides:
        if profile is None:
            continue
        codec = profile.codecs.get(str(plan.number))
        is_known = all(name in profile.segments for name in plan.segments_on(side))
        if not is_known or (plan.codec is not None and codec is None):
            why = f"not in the {side}'s profile: not on the menu"
            return msgspec.structs.replace(candidate, dropped=candidate.dropped or why)
        seconds = {name: timing.median_s for name, timing in profile.segments.items()}
        taken = segment_times(plan, side, shares, seconds)
        if side == "device":
            times |= {"head_s": taken.segments_s, "exit_s": taken.classifiers_s}
        else:
            times["tail_s"] = taken.segments_s + taken.classifiers_s
            batches[:] = [_batch_times(plan, shares, profile)]
        if codec is not None:
            times["encode_s" if side == "device" else "decode_s"] = codec[side == "edge"].median_s
    how = "measured" if None not in (device, edge) else candidate.evidence.times_how
    evidence = msgspec.structs.replace(candidate.evidence, times_how=how, tail_batch_s=batches[0], **times)
    return msgspec.structs.replace(candidate, evidence=evidence)


def _batch_times(plan: Plan, shares: Sequence[float], profile: Profile) -> dict[int, float]:
    """What the tails of a batch take, by its size; of a plan with exits, as if the shares left each segment alike."""
    names = plan.segments_on("edge")
    if not names or any(name not in profile.batches for name in names):
        return {}
    sizes = set.intersection(*(set(profile.batches[name]) for name in names))
    found = {}
    for size in sorted(sizes):
        taken = segment_times(plan, "edge", shares, {name: profile.batches[name][size] for name in names})
        found[size] = taken.segments_s + taken.classifiers_s
    return found
