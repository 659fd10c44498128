"""Early exits: when an answer that comes early is sure enough, and what any thresholds would have done.

    certainty(logits, rule, temperature)    how sure an exit is, 0 to 1, of each sample
    is_sure(logits, rule)                   the decision of one exit
    ExitEvidence                            per image: how sure and right each exit is, how right the end, bytes sent
    choose(evidence, costs, ...)            the thresholds of least cost that keep the accuracy
    save_evidence, load_evidence            what is known of every image, as a file of a bundle

What thresholds would do (accuracy, shares, bytes) is looked up in the evidence, image by image; nothing is run again.
Light enough for the device: numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from .errors import BundleError, Infeasible, PlanError
from .files import write_atomically
from .plan import RULES, ExitRule, Rule

# A threshold that no certainty reaches.
NEVER = 2.0
# Thresholds tried of one exit, by quantiles of its certainty, where several exits are chosen together; and in all.
_LEVELS = 48
_TRIES = 2500
_FINE = 1e-12


def certainty(logits: NDArray[np.floating], rule: Rule = "confidence", temperature: float = 1.0) -> NDArray[np.float64]:
    """How sure an answer is, 0 to 1, for logits (..., K).

    confidence: the largest probability; margin: the largest less the second; entropy: 1 - H / log K (BranchyNet's
    rule, Teerapittayanon et al., 2016, turned so that more is surer).  Probabilities are softmax(logits / temperature).

    Raises:
        PlanError: an unknown rule, a temperature of 0 or below, or fewer than two classes.
    """
    if rule not in RULES:
        raise PlanError(f'a rule of exits must be one of {", ".join(RULES)}, got "{rule}"')
    if not 0 < temperature < np.inf:
        raise PlanError(f"the temperature of an exit must be above 0, got {temperature}")
    if logits.shape[-1] < 2:
        raise PlanError(f"an exit needs at least two classes, got {logits.shape[-1]}")
    scaled = np.asarray(logits, np.float64) / temperature
    shifted = np.exp(scaled - scaled.max(-1, keepdims=True))
    shares = shifted / shifted.sum(-1, keepdims=True)
    if rule == "entropy":
        entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(-1)
        return np.asarray(np.clip(1 - entropy / np.log(shares.shape[-1]), 0.0, 1.0))
    top = np.partition(shares, -2, axis=-1)
    return np.asarray(top[..., -1] if rule == "confidence" else top[..., -1] - top[..., -2])


def is_sure(logits: NDArray[np.floating], rule: ExitRule) -> NDArray[np.bool_]:
    """Which samples of logits (N, K) an exit answers."""
    return certainty(logits, rule.rule, rule.temperature) >= rule.threshold


class ExitOutcome(NamedTuple):
    """What thresholds do: top-1 in percent; the share that each exit answers, the end's last; mean payload bytes."""

    accuracy: float
    shares: tuple[float, ...]
    mean_bytes: float


class ExitEvidence(NamedTuple):
    """What is known of each of N images, at E exits in the order in which they come.

    `certainty` (E, N) 0 to 1; `is_right` (E, N) each exit's answer; `is_right_at_end` (N,) the network's through the
    plan's codec; `payload_bytes` (N,) what is sent of an image that no exit on the device answers; `is_on_device` (E,)
    whether an exit spares the link.
    """

    certainty: NDArray[np.float64]
    is_right: NDArray[np.bool_]
    is_right_at_end: NDArray[np.bool_]
    payload_bytes: NDArray[np.float64]
    is_on_device: tuple[bool, ...]

    @property
    def num_exits(self) -> int:
        """E."""
        return len(self.is_on_device)

    def answered_by(self, thresholds: Sequence[float]) -> NDArray[np.int64]:
        """(N,) which exit answers each image, `num_exits` where none does.

        Raises:
            PlanError: not as many thresholds as exits, or one that is not 0 to 1 (or `NEVER`).
        """
        if len(thresholds) != self.num_exits:
            raise PlanError(f"{self.num_exits} exits need as many thresholds, got {len(thresholds)}")
        if not all(0 <= threshold <= 1 or threshold == NEVER for threshold in thresholds):
            raise PlanError(f"thresholds must be 0 to 1, or {NEVER:g} for never, got {list(thresholds)}")
        found = np.full(len(self.is_right_at_end), self.num_exits)
        for place in reversed(range(self.num_exits)):
            found[self.certainty[place] >= thresholds[place]] = place
        return found

    def right_at(self, thresholds: Sequence[float]) -> NDArray[np.bool_]:
        """(N,) which images get the right answer."""
        by = self.answered_by(thresholds)
        found: NDArray[np.bool_] = np.vstack([self.is_right, self.is_right_at_end])[by, np.arange(len(by))]
        return found

    def of(self, places: Sequence[int]) -> ExitEvidence:
        """The same with these exits alone."""
        rows = list(places)
        return self._replace(
            certainty=self.certainty[rows],
            is_right=self.is_right[rows],
            is_on_device=tuple(self.is_on_device[row] for row in rows),
        )

    def at(self, thresholds: Sequence[float]) -> ExitOutcome:
        """What these thresholds do to these images, exactly."""
        by, right = self.answered_by(thresholds), self.right_at(thresholds)
        shares = np.bincount(by, minlength=self.num_exits + 1) / len(by)
        is_sent = ~np.isin(by, np.flatnonzero(self.is_on_device))
        return ExitOutcome(
            accuracy=100 * float(right.mean()),
            shares=tuple(float(share) for share in shares),
            mean_bytes=float((self.payload_bytes * is_sent).mean()),
        )

    @property
    def accuracy_at_end(self) -> float:
        """Top-1 in percent without any exit."""
        return 100 * float(self.is_right_at_end.mean())


def save_evidence(evidence: ExitEvidence, path: Path) -> None:
    """Write what is known of every image to a safetensors file."""
    on_device = np.array(evidence.is_on_device, np.bool_)
    tensors = {**evidence._asdict(), "is_on_device": on_device}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({name: np.ascontiguousarray(array) for name, array in tensors.items()}))


def load_evidence(path: Path) -> ExitEvidence:
    """What `save_evidence` wrote.

    Raises:
        BundleError: no such file, or one that holds something else.
    """
    try:
        tensors = load_file(path)
        found = ExitEvidence(
            tensors["certainty"],
            tensors["is_right"],
            tensors["is_right_at_end"],
            tensors["payload_bytes"],
            tuple(bool(is_here) for is_here in tensors["is_on_device"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise BundleError(f"{path} holds no evidence of exits: {error}") from error
    exits, count = found.certainty.shape if found.certainty.ndim == 2 else (-1, -1)
    shapes = (found.is_right.shape, found.is_right_at_end.shape, found.payload_bytes.shape, len(found.is_on_device))
    if shapes != ((exits, count), (count,), (count,), exits):
        raise BundleError(f"{path} holds no evidence of exits: shapes {found.certainty.shape}, {shapes}")
    return found


class Chosen(NamedTuple):
    """Thresholds, what they do, and the mean cost of a request."""

    thresholds: tuple[float, ...]
    outcome: ExitOutcome
    cost: float


def choose(
    evidence: ExitEvidence,
    costs: Sequence[float] | Sequence[Sequence[float]] | None,
    *,
    max_loss: float,
    reference: float | None = None,
) -> Chosen:
    """The thresholds of least mean cost that lose at most so many points.

    One exit is chosen exactly, two over 48 quantiles of each one's certainty; more over fewer, and then each in turn
    over its 48 until nothing is gained.  A threshold lies in the middle between the images that it tells apart.

    Args:
        evidence: of images that no training has seen.
        costs: of an image that exit k answers, last of one that none does: (E + 1,), of whatever is to be least; rows
            of several, (R, E + 1): the largest mean of a row is; None: the mean bytes are, of each image its own.
        max_loss: points of top-1 that may be lost.
        reference: against this accuracy in percent (None: the evidence's own without exits).

    Raises:
        PlanError: not one cost more than there are exits; a cost or loss that is no number.
        Infeasible: no thresholds keep it, not even without any exit; says what is lost then.
    """
    rows = None if costs is None else np.atleast_2d(np.asarray(costs, np.float64))
    if rows is not None and rows.shape[1] != evidence.num_exits + 1:
        raise PlanError(f"{evidence.num_exits} exits need {evidence.num_exits + 1} costs, got {rows.shape[1]}")
    if not max_loss < math.inf or (rows is not None and np.isnan(rows).any()):
        raise PlanError(f"thresholds need a number of points that may be lost, and costs, got {max_loss} and {costs}")
    least = (evidence.accuracy_at_end if reference is None else reference) - max_loss

    def better(best: Chosen | None, tried: Iterable[tuple[float, ...]]) -> Chosen | None:
        for thresholds in tried:
            outcome = evidence.at(thresholds)
            if outcome.accuracy < least - _FINE:
                continue
            cost = outcome.mean_bytes if rows is None else float((rows @ outcome.shares).max())
            if best is None or cost < best.cost - _FINE:
                best = Chosen(thresholds, outcome, cost)
        return best

    few = min(_LEVELS, int(_TRIES ** (1 / evidence.num_exits))) if evidence.num_exits > 1 else None
    coarse = [_levels(row, few) for row in evidence.certainty]
    best = better(None, product(*coarse))
    if best is None:
        lost = least + max_loss - evidence.accuracy_at_end
        raise Infeasible(
            f"no thresholds lose at most {max_loss:g} points: without any exit {lost:.2f} are lost; relax the loss"
        )
    if evidence.num_exits > 2:
        fine = [_levels(row, _LEVELS) for row in evidence.certainty]
        before = None
        while best is not before:
            before = best
            for place, levels in enumerate(fine):
                known = best.thresholds
                best = better(best, ((*known[:place], level, *known[place + 1 :]) for level in levels)) or best
    return best


def _levels(values: NDArray[np.float64], count: int | None) -> list[float]:
    """Thresholds worth trying: `NEVER`, then from the surest image to the least sure; `count` of them, or all."""
    known = np.unique(values)[::-1]
    chosen = known
    if count is not None and len(known) > count:
        chosen = np.unique(np.quantile(values, np.linspace(0, 1, count), method="lower"))[::-1]
    # In the middle between an image and the next one that is less sure.
    lower = np.append(known[1:], 0.0)[np.searchsorted(-known, -chosen)]
    return [NEVER, *(float(value) for value in (chosen + lower) / 2)]
