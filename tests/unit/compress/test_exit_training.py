"""Training of exits: they learn the network's classes, leave it alone unless asked, and go on where they stopped."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coinfer.compress.batches import Views
from coinfer.compress.exit_file import TrainedExits, export_exit, load_exits, save_exits
from coinfer.compress.exits import (
    ExitHead,
    ExitRecipe,
    ExitSpec,
    WithExits,
    check_cuts,
    temperature_of,
    train_exits,
    train_jointly,
)
from coinfer.compress.unit_training import Teacher, teacher_of
from coinfer.data import Images
from coinfer.engine.onnx import Session
from coinfer.errors import CutError, ModelError, WeightsError
from coinfer.model.cut import parts_of, split
from coinfer.model.graph import Graph, capture, first_of
from coinfer.model.zoo import build_model
from coinfer.plan import TensorSpec
from tiny_nets import PREPROCESS, Branches

VIEWS = Views(is_mirrored=False)
RECIPE = ExitRecipe(epochs=6, batch_size=32, shift=0, lr=1e-2)


class Net(nn.Module):
    """Classes are brightness: the mean of any layer tells them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return capture(Net().eval(), torch.zeros(2, 3, 8, 8))


@pytest.fixture(scope="module")
def teacher(graph: Graph) -> Teacher:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 256)
    pixels = rng.integers(0, 60, (256, 8, 8, 3)) + 60 * labels[:, None, None, None]
    made = teacher_of(graph, Images(pixels.astype(np.uint8), labels), PREPROCESS, VIEWS)
    # The network itself is untrained: the labels alone teach here, through a share of 1.
    return made


def right(module: nn.Module, graph: Graph, cut: str, teacher: Teacher) -> float:
    head, _ = split(graph, graph.cut(cut))
    x = (torch.from_numpy(teacher.images.pixels).float() / 255).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PREPROCESS.mean, PREPROCESS.std))
    with torch.no_grad():
        logits = module(first_of(head((x - mean) / std)))
    return float((logits.argmax(1).numpy() == teacher.images.labels).mean())


def test_exits_learn_and_the_network_stays(graph: Graph, teacher: Teacher) -> None:
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    recipe = ExitRecipe(epochs=60, batch_size=32, lr=3e-2, label_share=1.0)
    cuts = [graph.cut("/relu#0"), graph.cut("/relu#1")]
    for spec in (ExitSpec(), ExitSpec(width=6), ExitSpec(width=6, depth=2)):
        heads = train_exits(graph, cuts, spec, teacher, recipe)
        assert all(right(head, graph, cut.name, teacher) > 0.7 for head, cut in zip(heads, cuts, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in graph.module.state_dict().items())


def test_without_labels_exits_learn_the_networks_own_answers(graph: Graph, teacher: Teacher) -> None:
    unlabelled = teacher._replace(images=Images(teacher.images.pixels, None))
    cut = graph.cut("/relu#1")
    (head,) = train_exits(graph, [cut], ExitSpec(), unlabelled, ExitRecipe(epochs=30, batch_size=32, lr=3e-2))
    own = teacher.logits[0].argmax(1).numpy()
    agreeing = teacher._replace(images=Images(teacher.images.pixels, own))
    assert right(head, graph, cut.name, agreeing) > 0.95


def test_a_stopped_training_ends_as_one_that_was_not(graph: Graph, teacher: Teacher, tmp_path: Path) -> None:
    cut = graph.cut("/relu#0")
    (whole,) = train_exits(graph, [cut], ExitSpec(width=4), teacher, RECIPE)

    def stop(name: str, step: object) -> None:
        if step.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_exits(graph, [cut], ExitSpec(width=4), teacher, RECIPE, checkpoints=tmp_path, progress=stop)
    seen: list[int] = []
    (resumed,) = train_exits(
        graph, [cut], ExitSpec(width=4), teacher, RECIPE,
        checkpoints=tmp_path, progress=lambda name, step: seen.append(step.epoch),
    )  # fmt: skip
    assert min(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_joint_training_moves_the_network_as_well(graph: Graph, teacher: Teacher) -> None:
    cuts = [graph.cut("/relu#0")]
    heads = train_exits(graph, cuts, ExitSpec(), teacher, ExitRecipe(epochs=1, batch_size=32))
    recipe = ExitRecipe(joint_epochs=12, batch_size=32, shift=0, joint_lr=1e-2, label_share=1.0, weights=(0.5, 1.0))
    module = train_jointly(graph, cuts, heads, teacher, recipe)
    x = torch.randn(5, 3, 8, 8)
    early, end = module(x)
    assert early.shape == end.shape == (5, 4)
    assert not torch.allclose(end, graph.module(x))
    with pytest.raises(ModelError, match="2 outputs need as many weights, got 1"):
        train_jointly(graph, cuts, heads, teacher, ExitRecipe(joint_epochs=1, batch_size=32, weights=(1.0,)))


@pytest.mark.parametrize("name", ["resnet20", "vit-tiny", "googlenet"])
def test_parts_in_a_row_are_the_network(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name)
    graph = capture(model.module, torch.zeros(2, 3, 32, 32))
    single = [cut for cut in graph.cuts() if len(cut.specs) == 1]
    cuts = [single[len(single) // 4], single[len(single) // 2]]
    x = torch.randn(2, 3, 32, 32)
    parts = parts_of(graph, cuts)
    heads = [ExitHead(cut.specs[0], 10, ExitSpec(width=4)) for cut in cuts]
    with torch.no_grad():
        given: tuple[torch.Tensor, ...] = (x,)
        for part in parts[:-1]:
            given = part(*given)
        assert torch.equal(first_of(parts[-1](*given)), first_of(graph.module(x)))
        outputs = WithExits(parts, heads)(x)
    assert [tuple(out.shape) for out in outputs] == [(2, 10)] * 3
    with pytest.raises(CutError, match="in the order in which the network runs"):
        parts_of(graph, cuts[::-1])


def test_what_has_no_classes_or_crosses_in_several_tensors_is_refused(graph: Graph) -> None:
    torch.manual_seed(0)
    branches = capture(Branches().eval(), torch.zeros(2, 3, 16, 16))
    several = next(cut for cut in branches.cuts() if len(cut.specs) > 1)
    with pytest.raises(CutError, match=f'an exit needs a cut that one tensor crosses, at "{several.name}" cross'):
        check_cuts(branches, [several])
    flat = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ModelError, match="learns classes from the network's first output, which is of shape"):
        check_cuts(flat, flat.cuts()[:1])
    with pytest.raises(CutError, match='"x" is int64'):
        ExitHead(TensorSpec(name="x", shape=(4, 4), dtype="int64"), 3, ExitSpec())
    with pytest.raises(ModelError, match="width must be 0 or more, its depth 1 or more, got width -1"):
        ExitSpec(width=-1)
    with pytest.raises(ModelError, match="depth 1 or more, got width 4, depth 0"):
        ExitSpec(width=4, depth=0)
    with pytest.raises(ModelError, match="weights of exits must be above 0"):
        ExitRecipe(weights=(0.0,))


def test_the_temperature_undoes_what_logits_were_scaled_by() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (shares.cumsum(1) > rng.uniform(0, 1, (len(shares), 1))).argmax(1)
    for scale in (0.5, 1.0, 3.0):
        assert temperature_of(scale * logits, labels) == pytest.approx(scale, rel=0.05)


# --- files and segments ----------------------------------------------------------------------------


def trained_of(graph: Graph, teacher: Teacher, *, width: int = 3) -> TrainedExits:
    cuts = (graph.cut("one#0"), graph.cut("two#0"))
    spec, recipe = ExitSpec(width=width), msgspec.structs.replace(RECIPE, epochs=1)
    return TrainedExits(cuts, train_exits(graph, cuts, spec, teacher, recipe), spec, recipe, {})


def test_exits_are_one_file(graph: Graph, teacher: Teacher, tmp_path: Path) -> None:
    trained = trained_of(graph, teacher)._replace(network={"linear.bias": torch.arange(4.0)})
    path = tmp_path / "exits.safetensors"
    save_exits(trained, path, network="ab" * 32)
    again = load_exits(path, graph, network="ab" * 32)
    assert (again.cuts, again.spec, again.recipe) == (trained.cuts, trained.spec, trained.recipe)
    assert torch.equal(again.network["linear.bias"], torch.arange(4.0)) and len(again.network) == 1
    for mine, theirs in zip(trained.heads, again.heads, strict=True):
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items())
    with pytest.raises(WeightsError, match="trained for another network: weights abababababab, these are cdcdcdcdcdcd"):
        load_exits(path, graph, network="cd" * 32)
    save_file({"exits.0.classify.bias": torch.full((4,), torch.nan)}, path, metadata={"format": "coinfer-exits-2"})
    with pytest.raises(WeightsError, match="another network: weights None"):
        load_exits(path, graph, network="ab" * 32)
    path.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_exits(path, graph, network="ab" * 32)


@pytest.mark.parametrize("shape", [(8, 5, 7), (6, 8), (8,)], ids=str)
@pytest.mark.parametrize("spec", [ExitSpec(), ExitSpec(width=4), ExitSpec(width=4, depth=2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_an_exported_exit_gives_the_same_logits(
    shape: tuple[int, ...], spec: ExitSpec, dtype: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    head = ExitHead(TensorSpec(name="x", shape=shape), 5, spec).eval()
    for layer in head.features:
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    value = TensorSpec(name="relu_3", shape=shape, dtype=dtype)
    given = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(dtype)
    scale, zero_point = (0.05, 17) if dtype == "uint8" else (1.0, 0)
    export_exit(head, value, tmp_path / "exit.onnx", scales=(scale,), zero_points=(zero_point,))
    session = Session(tmp_path / "exit.onnx")
    assert [spec.name for spec in session.inputs] == ["relu_3"]
    (logits,) = session.run([given])
    with torch.no_grad():
        want = head(torch.from_numpy(scale * (given.astype(np.float32) - zero_point)))
    np.testing.assert_allclose(logits, want.numpy(), rtol=1e-4, atol=1e-4)
