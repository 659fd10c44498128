"""Candidates at the times of the machines that they shall run on, in place of the building machine's."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..plan import Candidate
from ..profile import Profile


def with_profiles(
    candidates: Sequence[Candidate], *, device: Profile | None = None, edge: Profile | None = None
) -> list[Candidate]:
    """The candidates with the times of the machines that were profiled in place of the building machine's.

    A candidate that a profile does not cover (its segments are not in the bundle) is marked dropped,
    since a time of another machine beside a time of this one would compare nothing.
    """
    return [_with_profiles(candidate, device, edge) for candidate in candidates]


def _with_profiles(candidate: Candidate, device: Profile | None, edge: Profile | None) -> Candidate:
    plan, times = candidate.plan, {}
    for side, profile, segment in (("head", device, plan.head), ("tail", edge, plan.tail)):
        if profile is None:
            continue
        codec = profile.codecs.get(str(plan.number))
        if (segment is not None and segment not in profile.segments) or (plan.codec is not None and codec is None):
            machine = "device" if side == "head" else "edge"
            return msgspec.structs.replace(
                candidate, dropped=candidate.dropped or f"not in the {machine}'s profile: not on the menu"
            )
        times[f"{side}_s"] = 0.0 if segment is None else profile.segments[segment].median_s
        if codec is not None:
            times["encode_s" if side == "head" else "decode_s"] = codec[side == "tail"].median_s
    how = "measured" if None not in (device, edge) else candidate.evidence.times_how
    evidence = msgspec.structs.replace(candidate.evidence, times_how=how, **times)
    return msgspec.structs.replace(candidate, evidence=evidence)
