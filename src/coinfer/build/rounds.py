"""Successive halving: which drafts are worth more images.

Round 0 classifies nothing: bytes and times of every draft are known from a few calibration pictures, and
a lossless upload or the device alone already beats most early cuts.  Device and upload drafts are few: they are
classified on all images at once; where latency is the goal, mixtures of two of them that keep the loss limit beat the
splits that are no better in bytes and in both times (`drop_outdone`).
Then 250 images for all that is left, 1,000 for the survivors, all images for the last.  After each round a
draft B is dropped where some draft A is no worse in bytes, in device time and in the sum of both machines' time (for
a stream, also in the edge's time alone), and at the confidence bound no worse in accuracy; where B keeps the loss
limit on these images, A must keep it too:

    mean(right_A - right_B) - standard error  >=  -MARGIN        (paired, the same images)

A draft that is exact by construction (fp32, nothing lost on the way) is beaten by exact ones alone.

Within one cut, codecs of one kind are tried from the middle of their rates outwards.  Once one gives the whole
network's own answer on every image, what sends and takes no less, at this cut or a later one, is dropped
unclassified; once one is hopeless, so are those of its kind that send less.
Times carry noise, so equal within TIME_SLACK counts as no worse.  Every drop is logged with its reason.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, combinations_with_replacement, product
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..data import Images
from ..engine.onnx import Session
from ..search.goal import LOSS_TOLERANCE
from ..search.menu import BASE, RIVAL_RATES_BPS, RIVAL_SLOWDOWNS, at
from ..stages import Work, price
from .drafts import LOSSLESS_CODERS, Draft
from .evaluate import BATCH, spare_threads, top1
from .measured import Tables, codec_of
from .progress import Progress
from .workshop import Workshop

T = TypeVar("T", bound=np.generic)
MARGIN = 0.002
TIME_SLACK = 1.05
HOPELESS_POINTS = 5.0


class Answers(NamedTuple):
    """What whole networks say to the images: the truth, where the unmodified one is right, each one's own classes."""

    truth: NDArray[np.int64]
    is_right: NDArray[np.bool_]
    own: dict[str, NDArray[np.int64]]


def device_s(draft: Draft, int8_ratio: float) -> float:
    """Head and encode at the fp32 machine's pace: int8 work counts `int8_ratio` times."""
    return draft.head_s * (int8_ratio if draft.plan.precision == "int8" else 1.0) + draft.encode_s


def drop_dominated(
    drafts: list[Draft],
    images: int,
    int8_ratio: float,
    *,
    reference: NDArray[np.bool_] | None = None,
    max_loss_points: float = math.inf,
    max_device_bytes: float = math.inf,
    max_device_memory_bytes: float = math.inf,
    is_stream: bool = False,
) -> int:
    """Mark every draft that another beats (see above); `images` 0: only exact ones can beat.  How many.

    `reference` says which of the images the unmodified network gets right; `max_device_bytes` and
    `max_device_memory_bytes` are other limits that A must keep where B does; `is_stream`: throughput is the goal.
    """
    alive = [d for d in drafts if d.dropped is None]
    num_bytes = np.array([d.payload_bytes for d in alive])
    device = np.array([device_s(d, int8_ratio) for d in alive])
    edge = np.array([d.decode_s + d.tail_s for d in alive])
    total = device + edge
    right = np.array([d.correct[:images] for d in alive], dtype=np.float32) if images else None
    is_exact = np.array([d.is_exact for d in alive])
    keeps_limit = np.ones(len(alive), dtype=bool)
    if right is not None and reference is not None:
        keeps_limit = 100 * (reference[:images].mean() - right.mean(axis=1)) <= max_loss_points + LOSS_TOLERANCE
    keeps_limit &= np.array([d.device_bytes <= max_device_bytes for d in alive])
    keeps_limit &= np.array([d.device_memory_bytes <= max_device_memory_bytes for d in alive])
    dropped = np.zeros(len(alive), dtype=bool)
    count = 0
    for b in np.lexsort((-device, -num_bytes)):
        if alive[b].plan.kind == "device" or alive[b].is_rival:
            continue
        beats = (num_bytes <= num_bytes[b]) & (device <= device[b] * TIME_SLACK)
        beats &= (total <= total[b] * TIME_SLACK) & ~dropped
        beats &= (num_bytes < num_bytes[b]) | (device < device[b] / TIME_SLACK)
        beats[b] = False
        if is_stream:
            beats &= edge <= edge[b] * TIME_SLACK
        if keeps_limit[b]:
            beats &= keeps_limit
        if right is None or is_exact[b]:
            beats &= is_exact
        rivals = np.flatnonzero(beats)
        if right is not None and len(rivals):
            difference = right[rivals] - right[b]
            error = difference.std(axis=1) / np.sqrt(images)
            rivals = rivals[difference.mean(axis=1) - error >= -MARGIN]
        if len(rivals):
            best = alive[rivals[np.argmin(num_bytes[rivals])]].plan
            dropped[b] = True
            alive[b].dropped = f"after {images} images: no better than {best.label} (plan {best.number}) in any way"
            count += 1
    return count


def keep_rivals(drafts: list[Draft], int8_ratio: float, main: str) -> None:
    """Mark, for a few conditions, the fastest split of each loss: at so many bits, at such a quality or rate.

    Whatever wins, the best split is then still there to stand beside it, and that of `main`, the unmodified network.
    """
    levels: dict[tuple[object, ...], list[Draft]] = defaultdict(list)
    for draft in (d for d in drafts if d.dropped is None and d.plan.kind == "split"):
        assert draft.plan.codec is not None
        codec = draft.plan.codec
        levels[draft.plan.variant == main, codec.transform, codec.bits, codec.quality, codec.rate].append(draft)
    for splits in levels.values():
        columns = np.array([(d.head_s, d.encode_s, d.decode_s, d.tail_s, d.payload_bytes) for d in splits]).T
        head_s, encode_s, decode_s, tail_s, payload_bytes = columns
        is_int8 = np.array([d.plan.precision == "int8" for d in splits])
        work = Work(head_s, encode_s, decode_s, tail_s, payload_bytes, 0.0, is_int8, 1.0)
        for rate_bps, slowdown in product(RIVAL_RATES_BPS, RIVAL_SLOWDOWNS):
            conditions = at(BASE, rate_bps, slowdown, 1.0, int8_ratio=int8_ratio)
            splits[int(np.argmin(price(work, conditions).latency_s))].is_rival = True


def drop_hopeless(drafts: list[Draft], reference: NDArray[np.bool_], max_loss_points: float) -> int:
    """Mark drafts whose loss is beyond any use even at the confidence bound.  How many."""
    count = 0
    for draft in (d for d in drafts if d.dropped is None and d.plan.kind != "device"):
        if _is_hopeless(draft.correct[: len(reference)], reference, max_loss_points):
            limit = _hopeless_points(max_loss_points)
            draft.dropped = f"after {len(reference)} images: loses more than {limit:g} points at the 95 % bound"
            count += 1
    return count


def _hopeless_points(max_loss_points: float) -> float:
    return max(HOPELESS_POINTS, 3 * max_loss_points)


def _is_hopeless(correct: NDArray[np.bool_], reference: NDArray[np.bool_], max_loss_points: float) -> bool:
    difference = reference.astype(np.float64) - correct
    lost = 100 * (difference.mean() - 2 * difference.std() / np.sqrt(len(difference)))
    return bool(lost > _hopeless_points(max_loss_points))


def classify_wholes(
    workshop: Workshop, drafts: list[Draft], tables: Tables, images: Images, *, progress: Progress
) -> Answers:
    """Set `correct` and the bytes of every living device and upload draft on these images.

    Without labels the unmodified network's own answers are the truth.
    """
    stage = f"device and upload on {len(images)}"
    devices = [d for d in drafts if d.dropped is None and d.plan.kind == "device"]
    uploads = _by_group([d for d in drafts if d.dropped is None and d.plan.kind == "upload"])
    total = len(devices) + len(uploads)
    own: dict[str, NDArray[np.int64]] = {}
    for done, draft in enumerate(devices):
        progress(stage, done, total, draft.plan.label)
        name = str(draft.plan.head)
        session = Session(workshop.folder / name, threads=spare_threads())
        own[name] = _answers(session, ([batch] for batch in _batches(images.pixels)))
    reference = own[workshop.whole_name(workshop.main, "fp32")]
    truth = reference if images.labels is None else images.labels
    for draft in devices:
        draft.correct = own[str(draft.plan.head)] == truth
    for done, (group, members) in enumerate(uploads.items(), len(devices)):
        progress(stage, done, total, members[0].plan.label)
        restored = _weighed(members, tables, [images.pixels])
        tail = str(members[0].plan.tail)
        if group[-1] == "exact" and tail in own:
            given = own[tail]
            deque(restored, maxlen=0)
        else:
            given = _answers(Session(workshop.folder / tail, threads=spare_threads()), restored)
        for draft in members:
            draft.correct = given == truth
    progress(stage, total, total, "")
    return Answers(truth, reference == truth, own)


def drop_outdone(drafts: list[Draft], answers: Answers, max_loss_points: float, int8_ratio: float) -> int:
    """Mark splits that could have the least latency nowhere even if they lost nothing.  How many.

    A split is outdone where some mixture of two keepers is no worse in bytes, device time and total time: whatever
    the rate and the slowdown, one of the two is then no slower than the mixture, and so no slower than the
    split.  Keepers are device and upload drafts that keep the loss limit at one standard error.

        bytes
          | upload
          |   .  x   x: outdone, though neither keeper alone is better in both
          |      .
          +-----------device-- device time
    """
    keepers = []
    for draft in (d for d in drafts if d.dropped is None and d.plan.kind != "split"):
        lost = answers.is_right.astype(np.float64) - draft.correct
        if 100 * (lost.mean() + lost.std() / np.sqrt(len(lost))) <= max_loss_points + LOSS_TOLERANCE:
            keepers.append(draft)
    splits = [d for d in drafts if d.dropped is None and d.plan.kind == "split" and not d.is_rival]
    costs, limits = _costs(keepers, int8_ratio), _costs(splits, int8_ratio)
    limits[:, 2] *= TIME_SLACK
    count = 0
    for first, second in combinations_with_replacement(range(len(keepers)), 2):
        # Shares of `first` in the mixture that keep each limit: an interval for each split and cost.
        base, slope = costs[second], costs[first] - costs[second]
        with np.errstate(divide="ignore", invalid="ignore"):
            border = (limits - base) / slope
        low = np.where(slope < 0, border, 0.0).max(axis=1)
        high = np.where(slope > 0, border, 1.0).min(axis=1)
        fits = ((slope != 0) | (limits >= base)).all(axis=1)
        for index in np.flatnonzero(fits & (np.maximum(low, 0.0) <= np.minimum(high, 1.0))):
            if splits[index].dropped is None:
                names = " or ".join(dict.fromkeys(keepers[k].plan.label for k in (first, second)))
                splits[index].dropped = f"before any image: {names} sends less or takes less time everywhere"
                count += 1
    return count


def _costs(drafts: list[Draft], int8_ratio: float) -> NDArray[np.float64]:
    """(N, 3) bytes, device seconds, seconds on both machines."""
    own_s = [device_s(d, int8_ratio) for d in drafts]
    rows = [(d.payload_bytes, s, s + d.decode_s + d.tail_s) for d, s in zip(drafts, own_s, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def classify_splits(
    workshop: Workshop,
    drafts: list[Draft],
    tables: Tables,
    images: Images,
    answers: Answers,
    *,
    progress: Progress,
) -> None:
    """Set `correct` and the bytes of every living split on these images, the first of those of `answers`."""
    stage = f"accuracy on {len(images)}"
    alive = [d for d in drafts if d.dropped is None and d.plan.kind == "split"]
    total = len({d.group for d in alive})
    for done, label in enumerate(_classified(workshop, alive, tables, images.pixels, answers)):
        progress(stage, done, total, label)
    progress(stage, total, total, "")


def _classified(
    workshop: Workshop, alive: list[Draft], tables: Tables, pixels: NDArray[np.uint8], answers: Answers
) -> Iterator[str]:
    """Classify group by group, each announced by its label."""
    count, limit = len(pixels), math.inf if workshop.job.build.keep_all else workshop.job.goal.max_loss
    is_stream = workshop.job.goal.minimise == "throughput"
    truth, reference = answers.truth[:count], answers.is_right[:count]
    by_cut: dict[tuple[str, str], dict[str, list[Draft]]] = defaultdict(lambda: defaultdict(list))
    for draft in alive:
        by_cut[draft.plan.variant, draft.plan.precision][str(draft.plan.cut)].append(draft)
    for (network, precision), cuts in by_cut.items():
        perfect: list[Draft] = []
        own = answers.own.get(workshop.whole_name(network, precision))
        wanted = [cut for cut in workshop.cuts(network, precision) if cut.name in cuts]
        for cut, features in workshop.features(network, precision, wanted, pixels):
            members = cuts[cut.name]
            tail = Session(workshop.folder / str(members[0].plan.tail), threads=spare_threads())
            for groups in _kinds(members):
                pending = set(range(len(groups)))
                for place in middle_first(len(groups)):
                    pending.remove(place)
                    drafts = groups[place]
                    yield drafts[0].plan.label
                    for draft in drafts:
                        is_beaten = any(_is_no_better(draft, other, is_stream=is_stream) for other in perfect)
                        if is_beaten and not draft.is_rival:
                            _drop(draft, f"after {count} images: fewer bytes and less time already give every answer")
                    drafts = [draft for draft in drafts if draft.dropped is None]
                    if not drafts:
                        continue
                    right = _answers(tail, _weighed(drafts, tables, features))
                    for draft in drafts:
                        draft.correct = right == truth
                    if own is not None and np.array_equal(right, own[:count]):
                        perfect += drafts
                    if _is_hopeless(right == truth, reference, limit):
                        label = drafts[0].plan.label
                        for draft in chain.from_iterable(groups[k] for k in pending if k < place):
                            _drop(draft, f"after {count} images: {label} sends more of the same kind and is hopeless")


def _kinds(members: list[Draft]) -> list[list[list[Draft]]]:
    """A cut's groups, those of one kind (transform, ranges, lossy coder) together, from few bytes to many."""
    kinds: dict[tuple[str, bool, str], list[list[Draft]]] = defaultdict(list)
    for drafts in sorted(_by_group(members).values(), key=lambda drafts: min(d.payload_bytes for d in drafts)):
        codec = drafts[0].plan.codec
        assert codec is not None
        lossy = "" if codec.coder in LOSSLESS_CODERS else codec.coder
        kinds[codec.transform, codec.per_channel, lossy].append(drafts)
    return list(kinds.values())


def middle_first(count: int) -> list[int]:
    """0 to `count` - 1, the middle first, then the middles of what is left on both sides, and so on.

    >>> middle_first(7)
    [3, 1, 5, 0, 2, 4, 6]
    """
    order, spans = [], deque([(0, count)])
    while spans:
        low, high = spans.popleft()
        if low < high:
            middle = (low + high) // 2
            order.append(middle)
            spans += [(low, middle), (middle + 1, high)]
    return order


def _drop(draft: Draft, reason: str) -> None:
    draft.dropped = draft.dropped or reason


def _weighed(
    drafts: list[Draft], tables: Tables, values: Sequence[NDArray[np.generic]]
) -> Iterator[Sequence[NDArray[np.generic]]]:
    """What the tail gets of these values, batch by batch; then the drafts' bytes are those of these pictures.

    The drafts are of one group: what they restore is the same, what they send is not.
    """
    codecs = [codec_of(draft.plan, tables) for draft in drafts]
    num_bytes: list[list[NDArray[np.float64]]] = [[] for _ in drafts]
    for batch in zip(*map(_batches, values), strict=True):
        results = [codec.roundtrip(batch) for codec in codecs]
        for parts, (_, sent) in zip(num_bytes, results, strict=True):
            parts.append(sent)
        yield results[0][0]
    for draft, parts in zip(drafts, num_bytes, strict=True):
        sizes = np.concatenate(parts)
        draft.payload_bytes = float(np.mean(sizes))
        draft.payload_bytes_p50, draft.payload_bytes_p95 = (float(b) for b in np.percentile(sizes, (50, 95)))


def _is_no_better(draft: Draft, other: Draft, *, is_stream: bool) -> bool:
    """Whether `draft` sends no less and takes no less time than `other`, of the same network and precision."""
    before_s, after_s = draft.head_s + draft.encode_s, draft.decode_s + draft.tail_s
    other_before_s, other_after_s = other.head_s + other.encode_s, other.decode_s + other.tail_s
    return (
        draft.payload_bytes >= other.payload_bytes
        and before_s * TIME_SLACK >= other_before_s
        and (before_s + after_s) * TIME_SLACK >= other_before_s + other_after_s
        and (not is_stream or after_s * TIME_SLACK >= other_after_s)
    )


def _answers(session: Session, batches: Iterable[Sequence[NDArray[np.generic]]]) -> NDArray[np.int64]:
    return np.concatenate([top1(session.run(batch)) for batch in batches])


def _batches(values: NDArray[T]) -> Iterator[NDArray[T]]:
    return (values[i : i + BATCH] for i in range(0, len(values), BATCH))


def _by_group(drafts: list[Draft]) -> dict[tuple[str, ...], list[Draft]]:
    groups: dict[tuple[str, ...], list[Draft]] = {}
    for draft in drafts:
        groups.setdefault(draft.group, []).append(draft)
    return groups
