"""Training: one loop, `fit`.  What is minimised is a loss, what is shown are batches; neither is known here.

After every epoch the whole state (weights, the optimiser's own tensors, epoch) may be written to a checkpoint; a `fit`
that finds one goes on from there and ends with the same weights as one that was never stopped (on the same machine with
the same number of threads).  Nothing random is carried over: every epoch draws from (seed, epoch).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import ModelError, WeightsError
from ..files import write_atomically
from .batches import Batches
from .hardware import has_bfloat16, keep_freed_memory, layout_of
from .losses import Batch, Coded, Loss, logits_of

_MODEL, _OPTIMIZER = "model.", "optimizer."
# What a checkpoint of this version looks like.
FORMAT = "coinfer-checkpoint-2"


class Schedule(NamedTuple):
    """How the optimiser moves; the rate climbs to `lr`, then falls to a thousandth.

    `optimizer`: "sgd" has Nesterov momentum; "adam" is AdamW (Loshchilov and Hutter, 2019), whose first moment decays
    by `momentum`: for weights beside parameters of other scales, such as a unit's steps.  `weight_decay` acts on
    weights of two and more dimensions only (no biases, no batch norms); `warmup` is the share of all steps spent
    climbing, from a tenth of `lr`.
    """

    lr: float
    epochs: int
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.25
    optimizer: Literal["sgd", "adam"] = "sgd"


class Step(NamedTuple):
    """What `progress` is told after each step; `step` and `steps` count over the whole training.

    `accuracy` is the batch's share of right answers, 0 to 1, by its labels, else by its teacher; `num_bytes` is what
    the unit in the network, if there is one, sends of a sample by its own estimate.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    lr: float
    accuracy: float | None = None
    num_bytes: float | None = None


class Fitted(NamedTuple):
    """Mean loss of each epoch of this run (those before a resumed one are not repeated)."""

    losses: tuple[float, ...]
    first_epoch: int


def one_cycle(step: int, steps: int, *, peak: float, warmup: float) -> float:
    """The learning rate at `step` of `steps`: linear from peak / 10 to peak, then a cosine down to peak / 1000.

    After Smith and Topin, 2018 (arXiv:1708.07120), with a cosine for the way down.

    >>> [round(one_cycle(step, 9, peak=1.0, warmup=0.25), 3) for step in (0, 2, 8)]
    [0.1, 1.0, 0.001]
    """
    turn = warmup * (steps - 1)
    if step < turn:
        return peak * (0.1 + 0.9 * step / turn)
    share = (step - turn) / max(steps - 1 - turn, 1e-9)
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * share)) / 2)


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    schedule: Schedule,
    checkpoint: Path | None = None,
    progress: Callable[[Step], None] | None = None,
    seed: int = 0,
    is_bfloat16: bool | None = None,
    key: str = "",
    slower: Mapping[str, float] | None = None,
) -> Fitted:
    """Train `model` in place; it ends in evaluation mode, on the device where it was.

    Forward passes run in channels_last memory (where the model takes it) and, with `is_bfloat16`, under bfloat16
    autocast (None: where the machine computes in it, see `has_bfloat16`); weights, momentum and batch norm statistics
    stay float32.  `key` stands for all else that the training depends on: a checkpoint of another key is refused.
    `slower` are names of submodules, each with the share of the learning rate that its parameters get.

    Raises:
        ModelError: the loss or its gradient became NaN or infinite; the checkpoint still has the last whole epoch.
        WeightsError: the checkpoint is not one of this model, schedule and key.
    """
    keep_freed_memory()
    device = next(model.parameters()).device
    is_autocast = has_bfloat16(device) if is_bfloat16 is None else is_bfloat16
    optimizer = _optimizer(model, schedule, slower or {})
    first = 0
    if checkpoint is not None and checkpoint.is_file():
        first = _resume(checkpoint, model, optimizer, schedule, key)
    layout = layout_of(model, next(batches.epoch(first)).inputs[:2].to(device))
    model.to(memory_format=layout)  # type: ignore[call-overload]
    steps, losses = schedule.epochs * len(batches), []
    model.train()
    for epoch in range(first, schedule.epochs):
        torch.manual_seed(seed * 1_000_003 + epoch)
        total = 0.0
        for index, batch in enumerate(batches.epoch(epoch)):
            step = epoch * len(batches) + index
            rate = one_cycle(step, steps, peak=schedule.lr, warmup=schedule.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            batch = _moved(batch, device, layout)
            value, slope, outputs = _step(model, batch, loss, optimizer, is_bfloat16=is_autocast)
            if not (math.isfinite(value) and math.isfinite(slope)):
                what = f"loss became {value}" if not math.isfinite(value) else f"the loss's gradient became {slope}"
                kept = f"; {checkpoint} has the {epoch} epochs before" if checkpoint is not None and epoch else ""
                raise ModelError(f"{what} in epoch {epoch}, batch {index}, rate {rate:.3g}{kept}")
            total += value
            if progress is not None:
                progress(Step(step + 1, steps, epoch, value, rate, *_seen(outputs, batch)))
        losses.append(total / len(batches))
        if checkpoint is not None:
            _save(checkpoint, model, optimizer, schedule, epoch + 1, key)
    model.eval()
    return Fitted(tuple(losses), first)


def _moved(batch: Batch, device: torch.device, layout: torch.memory_format) -> Batch:
    inputs = batch.inputs
    layout = layout if inputs.ndim == 4 else torch.preserve_format
    rest = (None if t is None else t.to(device, non_blocking=True) for t in batch[1:])
    return Batch(inputs.to(device, memory_format=layout, non_blocking=True), *rest)


def _step(
    model: nn.Module, batch: Batch, loss: Loss, optimizer: torch.optim.Optimizer, *, is_bfloat16: bool
) -> tuple[float, float, Any]:
    """One step's loss, its gradient's norm, what the model gave; weights stay where one of them is not finite."""
    with torch.autocast(batch.inputs.device.type, dtype=torch.bfloat16, enabled=is_bfloat16):
        outputs = model(batch.inputs)
    error = loss(outputs, batch)
    value, slope = float(error.detach()), 0.0
    if math.isfinite(value):
        optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        slope = float(nn.utils.clip_grad_norm_(model.parameters(), math.inf))
        if math.isfinite(slope):
            optimizer.step()
    return value, slope, outputs


@torch.no_grad()
def _seen(outputs: Any, batch: Batch) -> tuple[float | None, float | None]:
    """A batch's share of right answers, and the bytes that its samples cost."""
    truth = batch.teacher.argmax(1) if batch.labels is None and batch.teacher is not None else batch.labels
    is_answered = not isinstance(outputs, Coded) or outputs.logits is not None
    accuracy = (
        None if truth is None or not is_answered else float((logits_of(outputs).argmax(1) == truth).float().mean())
    )
    return accuracy, float(outputs.bits.mean()) / 8 if isinstance(outputs, Coded) else None


def _optimizer(model: nn.Module, schedule: Schedule, slower: Mapping[str, float]) -> torch.optim.Optimizer:
    parts: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = next((share for part, share in slower.items() if name.startswith(f"{part}.")), 1.0)
            decay = schedule.weight_decay if parameter.ndim >= 2 else 0.0
            parts.setdefault((share, decay), []).append(parameter)
    if not parts:
        network = type(model).__name__
        raise ModelError(f"all weights of {network} are frozen: those that may change must require gradients")
    groups = [{"params": part, "share": share, "weight_decay": decay} for (share, decay), part in parts.items()]
    if schedule.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=schedule.lr, betas=(schedule.momentum, 0.999))
    return torch.optim.SGD(groups, lr=schedule.lr, momentum=schedule.momentum, nesterov=True)


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, epochs_done: int, key: str
) -> None:
    """Write the whole state under a temporary name, sync it, then rename it."""
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for state, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{state}.{name}"] = value
    metadata = {
        "format": FORMAT,
        "epochs_done": str(epochs_done),
        "schedule": json.dumps(schedule._asdict()),
        "key": key,
    }
    save_tensors(tensors, path, metadata=metadata)


def save_tensors(tensors: dict[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all; what several names share is written for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    as_is = torch.contiguous_format
    plain = {name: tensor.detach().cpu().clone(memory_format=as_is) for name, tensor in tensors.items()}
    write_atomically(path, _in_order(save(plain, metadata)))


def _in_order(content: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: the library writes it in another order in every process.

    The file is the header's length (u64), the header (JSON, padded with spaces to 8 bytes), the tensors.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def load_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; `what` it should be, for the message.

    Raises:
        WeightsError: no such file, or none of that form.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{what} {path} cannot be read: {error}") from error


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, key: str) -> int:
    """Fill model and optimiser from a checkpoint; how many epochs it has behind it."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise WeightsError(f"checkpoint {path} is not a safetensors file: {error}") from error
    own = model.state_dict()
    state = {name.removeprefix(_MODEL): tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    is_same = state.keys() == own.keys() and all(state[name].shape == own[name].shape for name in own)
    wanted = {"format": FORMAT, "schedule": json.dumps(schedule._asdict()), "key": key}
    other = [name for name, value in wanted.items() if metadata.get(name) != value]
    if not is_same or other:
        of = "model" if not is_same else "training" if other == ["key"] else other[0]
        raise WeightsError(f"checkpoint {path} is of another {of}: remove it to begin anew")
    model.load_state_dict(state)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            part, _, parameter = name.removeprefix(_OPTIMIZER).partition(".")
            # Adam keeps its count of steps on the CPU, wherever the parameter is.
            place = tensor if part == "step" else tensor.to(parameters[parameter].device)
            optimizer.state[parameters[parameter]][part] = place
    return int(metadata["epochs_done"])
