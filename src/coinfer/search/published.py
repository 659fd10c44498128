"""What published systems would have chosen: each is this search with less to choose from.

    Neurosurgeon   where to cut a chain, features sent as they are (Kang et al., ASPLOS 2017)
    Edgent         the same with early exits (Li et al., 2019, arXiv:1910.05316)
    DADS           where to cut a graph, whatever crosses sent as it is (Hu et al., INFOCOM 2019)
    codes          all cuts and codecs, nothing trained
    coinfer        everything: int8, codecs, trained units, pruned networks, exits

What a restriction leaves out is not priced otherwise: the same evidence, the same conditions, the same goal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ..errors import Infeasible, PlanError
from ..plan import Candidate
from ..profile import Conditions
from .goal import Goal
from .solve import search

_AS_THEY_ARE = {("none", "float32"), ("none", "image")}


def _is_plain(candidate: Candidate) -> bool:
    """Nothing quantised, coded or trained: fp32, features or the picture as they are."""
    plan = candidate.plan
    return plan.precision == "fp32" and (plan.codec is None or (plan.codec.coder, plan.codec.transform) in _AS_THEY_ARE)


def _is_chain(candidate: Candidate) -> bool:
    """Device alone, upload, or a cut that one tensor crosses."""
    return candidate.plan.kind != "split" or len(candidate.plan.crossing) == 1


Admits = Callable[[Candidate, str], bool]
# By name: whether a system can choose a candidate, given the name of the unmodified network.
SYSTEMS: dict[str, Admits] = {
    "Neurosurgeon": lambda c, main: c.plan.variant == main and _is_plain(c) and _is_chain(c) and not c.plan.exits,
    "Edgent": lambda c, main: c.plan.variant.removesuffix(".joint") == main and _is_plain(c) and _is_chain(c),
    "DADS": lambda c, main: c.plan.variant == main and _is_plain(c) and not c.plan.exits,
    "codes": lambda c, main: c.plan.variant == main and not c.plan.exits,
    "coinfer": lambda c, main: True,
}


def choices(candidates: Sequence[Candidate], main: str, conditions: Conditions, goal: Goal) -> dict[str, Candidate]:
    """What each system chooses; one that has nothing that meets the goal is left out.

    Args:
        candidates: of a build, those included that it dropped before classifying them: what is sent as it is loses
            nothing, so their loss is known.
        main: name of the unmodified network.
        conditions, goal: the same for all.
    """
    found = {}
    known = [_exact(candidate, main) for candidate in candidates]
    for name, admits in SYSTEMS.items():
        mine = [candidate for candidate in known if admits(candidate, main)]
        try:
            found[name] = mine[search(mine, conditions, goal).best]
        except (Infeasible, PlanError):
            continue
    return found


def _exact(candidate: Candidate, main: str) -> Candidate:
    """A candidate that loses nothing by construction, as if the build had kept it; others as they are."""
    is_exact = candidate.plan.variant == main and _is_plain(candidate) and not candidate.plan.exits
    if not is_exact or candidate.evidence.loss_points is not None:
        return candidate
    evidence = msgspec.structs.replace(candidate.evidence, loss_points=0.0)
    return msgspec.structs.replace(candidate, evidence=evidence, dropped=None)
