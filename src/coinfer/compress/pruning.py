"""Iterative structural pruning: score the channels, remove the least needed, fine-tune, and again.

    step 1 (Shi et al., 2019, arXiv:1903.03472)    the whole network, for less compute: budget "macs", "parameters", or
                                                   "latency", measured
    step 2 (the same)                              from there, the channels crossing a cut: `region`, budget "channels"
    BBNet's order (Zhou et al., 2021)              score "slimming" with `sparse_epochs` of training before, one round,
                                                   then `final_epochs` of the whole network

Fine-tuning is distillation from the unmodified network, with a share of labels.  After every step the state is kept: a
pruning that was stopped goes on there and ends with the same network.
"""

from __future__ import annotations

import copy
import hashlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError
from ..model.zoo import weights_digest
from ..plan import Value
from .batches import Augment, PictureBatches
from .budget import Budget, Cost, Costs, Unreachable, choose
from .channels import Channels, Removal, replay
from .hardware import training_device
from .losses import Loss, cross_entropy, distillation
from .scores import Score, check_scales, scores_of, slimmed
from .train import Schedule, Step, fit, load_tensors, save_tensors
from .unit_training import Teacher

VERSIONS = ("pruning-3", f"torch {torch.__version__}")
LEAST_BATCH = 8
# What a budget counts, for people.
UNITS = {"macs": "multiply-accumulates", "parameters": "parameters", "channels": "channels", "latency": "seconds"}
_STATE = "state.safetensors"
# Of the latency asked for: how near a measured one must come, and how often that is tried.
_NEAR, _TRIES = 0.03, 5
Progress = Callable[[str, Step], None]


class PruneRecipe(Value, frozen=True, kw_only=True):
    """How a network is pruned: to `keep` of the `budget`, in `rounds` of equal shares.

    `budget` "channels" counts those of the region; "latency" is measured, of the whole network or of its head up to
    the cut `latency_at`.  `epochs` of fine-tuning follow each round, `final_epochs` the last one; `sparse_epochs` with
    an L1 penalty of `strength` on batch norm scales come first.
    `region`: shell patterns of layers whose channels may go, `ignore`: of such that may not; `least` stay in each
    group, and a `multiple` where some go (runtimes compute 8 or 16 at once).  A budget that cannot be met so is
    `unreachable`: "refuse" it, or take the "nearest".  `scored`: pictures that "taylor" scores are computed on.
    `label_share` of the loss is cross-entropy with labels, where there are any.

    Raises:
        ModelError: a number is out of range.
    """

    keep: float
    budget: Budget = "macs"
    latency_at: str | None = None
    score: Score = "taylor"
    rounds: int = 4
    epochs: int = 1
    final_epochs: int = 4
    sparse_epochs: int = 0
    strength: float = 1e-4
    region: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    least: int = 1
    multiple: int = 1
    unreachable: Literal["refuse", "nearest"] = "refuse"
    scored: int = 5000
    lr: float = 0.02
    final_lr: float = 0.02
    label_share: float = 0.3
    temperature: float = 4.0
    weight_decay: float = 5e-4
    batch_size: int = 128
    shift: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ModelError(f"pruning keeps a share above 0 and below 1, got {self.keep}")
        if min(self.rounds, self.batch_size, self.least, self.multiple, self.scored) < 1:
            given = f"{self.rounds}, {self.batch_size}, {self.least}, {self.multiple}, {self.scored}"
            raise ModelError(
                f"rounds, batch_size, least, multiple and scored of a pruning must be at least 1, got {given}"
            )
        if min(self.epochs, self.final_epochs, self.sparse_epochs) < 0 or not 0 <= self.strength < math.inf:
            given = f"{self.epochs}, {self.final_epochs}, {self.sparse_epochs}, {self.strength:g}"
            raise ModelError(f"epochs and strength of a pruning must be numbers of 0 or more, got {given}")
        if not (0 < self.lr < math.inf and 0 < self.final_lr < math.inf and 0 <= self.label_share <= 1):
            given = f"{self.lr:g}, {self.final_lr:g}, {self.label_share:g}"
            raise ModelError(f"a pruning's learning rates must be above 0, its label share 0 to 1, got {given}")


class Taught(Value, frozen=True, kw_only=True):
    """What a pruning was trained on, beside its recipe.

    So many pictures and the hex sha256 of them and their classes, their views, and the batch size at the end, which is
    less than the recipe's where memory was too small for that.
    """

    images: int
    images_sha256: str
    mirror: bool
    mixes: int
    batch_size: int


class Pruned(NamedTuple):
    """A pruned network, what was removed round by round, what it was trained on, and its cost now."""

    module: nn.Module
    rounds: tuple[tuple[Removal, ...], ...]
    taught: Taught
    cost: Cost


class Pruning:
    """The pruning of one network, step by step.

    Args:
        module: in evaluation mode; a copy of it is pruned.
        example: what it is called with, a batch of 1.
        teacher: pictures with the unmodified network's logits of their views.
        recipe: how far, by what.
        latency_of: seconds that a network takes as it is deployed, for the budget "latency".
        folder: where the state is kept; a pruning that finds its own goes on.
        progress: is told the step's name and each training step.

    Raises:
        ModelError: nothing in the region can be removed, the budget is a latency and nobody measures it, or there are
            no batch norms for a sparse phase.
        DataError: fewer pictures than a batch.
    """

    def __init__(
        self,
        module: nn.Module,
        example: Sequence[Tensor],
        teacher: Teacher,
        recipe: PruneRecipe,
        *,
        latency_of: Callable[[nn.Module], float] | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        if (recipe.budget == "latency") != (latency_of is not None):
            raise ModelError('latency_of is for the budget "latency", which needs it')
        device = training_device()
        self._example = tuple(value.to(device) for value in example)
        self.module = copy.deepcopy(module).to(device)
        self._teacher, self._recipe, self._latency_of, self._progress = teacher, recipe, latency_of, progress
        if len(teacher.images) < recipe.batch_size:
            count = len(teacher.images)
            raise DataError(f"a pruning in batches of {recipe.batch_size} needs as many pictures, got {count}")
        if recipe.sparse_epochs:
            check_scales(module)
        given = (
            *(VERSIONS, weights_digest(module), weights_digest(teacher.network), recipe),
            *(teacher.images.digest, teacher.preprocess, teacher.views, [list(value.shape) for value in example]),
        )
        self._key = hashlib.sha256(msgspec.json.encode(given)).hexdigest()
        self.folder = None if folder is None else folder / f"{self._key[:12]}.pruning"
        self.rounds: list[list[Removal]] = []
        self._channels = Channels(self.module, self._example, region=recipe.region, ignore=recipe.ignore)
        # Groups of channels that stay, by the name of a layer, with the reason; budgets that were not met.
        self.refused, self.unmet = self._channels.refused, list[str]()
        self._sound = {group.name for group in self._channels.groups}
        self._batch_size, self._done = recipe.batch_size, 0
        self._resume()
        # What the budget is a share of: with a latency, what was measured when the pruning began.
        if self._done == 0:
            self._start = latency_of(self.module) if latency_of is not None else self._cost()({})

    def run(self) -> Pruned:
        """All steps, those that were done before left out.

        Raises:
            Unreachable: the budget cannot be met (where the recipe refuses that).
            ModelError: a score needs labels, the loss became NaN, or memory is too small.
        """
        recipe = self._recipe
        steps: list[tuple[str, Callable[[], None]]] = []
        if recipe.sparse_epochs:
            steps.append(("sparse", partial(self._fit, "sparse", recipe.sparse_epochs, recipe.final_lr)))
        for number in range(1, recipe.rounds + 1):
            steps.append((f"remove {number}", partial(self._remove, number)))
            steps.append((f"round {number}", partial(self._fit, f"round {number}", recipe.epochs, recipe.lr)))
        steps.append(("final", partial(self._fit, "final", recipe.final_epochs, recipe.final_lr)))
        for name, step in steps[self._done :]:
            self._within_memory(name, step)
            self._done += 1
            self._keep()
        self.module.eval()
        cost = Costs(self._channels, self._example).of({})
        images, views = self._teacher.images, self._teacher.views
        taught = Taught(
            images=len(images), images_sha256=images.digest, mirror=views.is_mirrored, mixes=views.mixes,
            batch_size=self._batch_size,
        )  # fmt: skip
        return Pruned(self.module, tuple(tuple(some) for some in self.rounds), taught, cost)

    def _remove(self, number: int) -> None:
        recipe, images = self._recipe, self._teacher.images
        self.module.eval()
        pictures = images.pick(slice(recipe.scored))
        batches = PictureBatches(
            pictures.pixels, pictures.labels, self._teacher.preprocess,
            batch_size=min(self._batch_size, len(pictures)), seed=recipe.seed,
            teacher=None if pictures.labels is not None else self._teacher.logits[:1, : len(pictures)],
        )  # fmt: skip
        scores = scores_of(recipe.score, self._channels, lambda: batches.epoch(0), cross_entropy())
        target = self._start * recipe.keep ** (number / recipe.rounds)
        if recipe.budget == "channels":
            target = round(target)
        removals = self._chosen(scores, target)
        while self._channels.refuse(removals):
            removals = self._chosen(scores, target)
        self._sound = {group.name for group in self._channels.groups}
        self._channels.remove(removals)
        self.rounds.append(removals)

    def _chosen(self, scores: Mapping[str, Tensor], target: float) -> list[Removal]:
        """The channels that go for the budget, or for the nearest there is."""
        recipe = self._recipe
        try:
            if recipe.budget == "latency":
                return self._within_latency(scores, target)
            unit = UNITS[recipe.budget]
            return choose(
                self._channels, scores, self._cost(), target,
                least=recipe.least, multiple=recipe.multiple, unit=unit,
            )  # fmt: skip
        except Unreachable as error:
            if recipe.unreachable == "refuse":
                raise
            self.unmet.append(error.why)
            return error.removals

    def _cost(self) -> Callable[[Mapping[str, int]], float]:
        """What the budget counts of the network without so many channels of each group."""
        if self._recipe.budget == "channels":
            total = sum(group.size for group in self._channels.groups)
            return lambda gone: total - sum(gone.values())
        costs = Costs(self._channels, self._example)
        if self._recipe.budget == "parameters":
            return lambda gone: costs.of(gone).parameters
        return lambda gone: costs.of(gone).macs

    def _within_latency(self, scores: Mapping[str, Tensor], target_s: float) -> list[Removal]:
        """The channels whose removal brings the measured latency to `target_s`: tried by multiply-accumulates."""
        assert self._latency_of is not None
        macs = self._cost()
        share = min(0.95, target_s / self._latency_of(self.module))
        best: tuple[float, list[Removal]] | None = None
        tries = 0
        while tries < _TRIES:
            tries, layer = tries + 1, ""
            try:
                removals = choose(
                    self._channels, scores, macs, share * macs({}),
                    least=self._recipe.least, multiple=self._recipe.multiple,
                )  # fmt: skip
            except Unreachable as error:
                # A smaller share than the least there is: that is tried.
                removals, layer = error.removals, error.layer
            smaller = copy.deepcopy(self.module)
            Channels(smaller, self._example, ignore=self._recipe.ignore, sound=self._sound).remove(removals)
            took_s = self._latency_of(smaller)
            is_within = took_s <= target_s * (1 + _NEAR)
            if is_within and (best is None or took_s > best[0]):
                best = took_s, removals
                if took_s >= target_s * (1 - _NEAR):
                    break
            if layer and not is_within:
                break
            share *= max(0.5, min(1.5, target_s / took_s))
        if best is None:
            emptied = f', less would empty "{layer}"' if layer else ""
            tried = f"no network within {1e3 * target_s:.3g} ms was found in {tries} tries{emptied}"
            raise Unreachable(tried, layer, removals)
        return best[1]

    def _within_memory(self, name: str, step: Callable[[], None]) -> None:
        """One step, in smaller batches where memory is too small for these; each try begins with the same weights."""
        before = {key: value.detach().cpu().clone() for key, value in self.module.state_dict().items()}
        while True:
            try:
                step()
                return
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                size = self._batch_size
                if size // 2 < LEAST_BATCH:
                    module = type(self.module).__name__
                    raise ModelError(
                        f"memory is too small for batches of {size} pictures ({name} of {module}), and fewer than "
                        f"{LEAST_BATCH} are not tried: free some memory, or take smaller pictures"
                    ) from error
            self._batch_size = size // 2
            self.module.load_state_dict(before)
            # What was trained in larger batches goes; a run that is stopped goes on with these.
            self._keep()

    def _fit(self, name: str, epochs: int, lr: float) -> None:
        """Fine-tuning; each has its own order of pictures, the same in every run."""
        if not epochs:
            return
        recipe, teacher, progress = self._recipe, self._teacher, self._progress
        seed = zlib.crc32(f"{recipe.seed} {name} {recipe.keep}".encode())
        labels = None if teacher.views.mixes else teacher.images.labels
        share = recipe.label_share if labels is not None else 0.0
        loss: Loss = distillation(temperature=recipe.temperature, label_share=share)
        if name == "sparse":
            loss = slimmed(loss, self.module, recipe.strength)
        batches = PictureBatches(
            teacher.images.pixels, labels, teacher.preprocess,
            batch_size=self._batch_size, augment=Augment(recipe.shift, teacher.views), seed=seed,
            teacher=teacher.logits,
        )  # fmt: skip
        fit(
            self.module,
            batches,
            loss,
            schedule=Schedule(lr=lr, epochs=epochs, weight_decay=recipe.weight_decay),
            checkpoint=self._checkpoint(name),
            progress=None if progress is None else partial(progress, name),
            seed=seed,
            key=f"{self._key} {self._batch_size}",
        )

    def _checkpoint(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name.replace(' ', '-')}.safetensors"

    def _keep(self) -> None:
        if self.folder is None:
            return
        metadata = {
            "key": self._key,
            "done": str(self._done),
            "batch_size": str(self._batch_size),
            "start": repr(self._start),
            "rounds": msgspec.json.encode(self.rounds).decode(),
            "told": msgspec.json.encode((self.refused, self.unmet)).decode(),
        }
        save_tensors(self.module.state_dict(), self.folder / _STATE, metadata=metadata)
        for checkpoint in self.folder.glob("*.safetensors"):
            if checkpoint.name != _STATE:
                checkpoint.unlink()

    def _resume(self) -> None:
        """Take over what an earlier run has behind it."""
        path = None if self.folder is None else self.folder / _STATE
        if path is None or not path.is_file():
            return
        state, metadata = load_tensors(path, "pruning")
        self.rounds = msgspec.json.decode(metadata["rounds"], type=list[list[Removal]])
        replay(self.module, self._example, self.rounds, ignore=self._recipe.ignore)
        self.module.load_state_dict(state)
        refused, self.unmet = msgspec.json.decode(metadata["told"], type=tuple[dict[str, str], list[str]])
        self._sound -= refused.keys()
        self._channels = Channels(self.module, self._example, ignore=self._recipe.ignore, sound=self._sound)
        self._done, self._batch_size = int(metadata["done"]), int(metadata["batch_size"])
        self.refused = self._channels.refused
        self.refused |= refused
        self._start = float(metadata["start"])


def _is_out_of_memory(error: BaseException) -> bool:
    words = str(error)
    is_said = any(text in words for text in ("can't allocate memory", "not enough memory", "out of memory"))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or is_said
