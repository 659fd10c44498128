"""Units in training and out of it: what learns, what stays, what is resumed, what crosses the link."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from coinfer.codec import make_codec
from coinfer.compress.batches import Views, as_inputs, seen_by
from coinfer.compress.bottleneck import UnitSpec
from coinfer.compress.divided import Deployable, codecs_of
from coinfer.compress.encoder import LightHead, num_macs, width_for
from coinfer.compress.train import Step, load_tensors
from coinfer.compress.unit_file import load_unit, save_unit
from coinfer.compress.unit_training import UnitRecipe, UnitTraining, rates_of, teacher_of
from coinfer.data import Images
from coinfer.errors import DataError, ModelError, WeightsError
from coinfer.model.cut import split
from coinfer.model.graph import Graph, capture
from coinfer.plan import Preprocess, TensorSpec

PREPROCESS = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
RECIPE = UnitRecipe(alone=2, together=2, prices=(0.01, 0.1), batch_size=32, lr=5e-3)
VIEWS = Views(is_mirrored=True, mixes=1)
SHORT = {"together": 0, "prices": (0.01, 0.1), "batch_size": 32}
SPEC = UnitSpec(width=4, stride=2, bits=5, gains=(1.0, 2.0), refine=1, is_rectified=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.second(y)).mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return capture(Net(), torch.zeros(2, 3, 8, 8))


@pytest.fixture(scope="module")
def images() -> Images:
    """Pictures of four colours with noise, and their colour as the class."""
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 4, 160)
    pixels = chance.integers(0, 120, (160, 8, 8, 3)) + 30 * labels[:, None, None, None] * np.array([1, 0.5, 0])
    return Images(pixels.astype(np.uint8), labels)


def train(graph: Graph, images: Images, spec: UnitSpec = SPEC, recipe: UnitRecipe = RECIPE, **options):
    teacher = teacher_of(graph, images, PREPROCESS, VIEWS)
    training = UnitTraining(graph, graph.cut("/relu#0"), spec, teacher, recipe, **options)
    training.alone()
    training.together()
    training.whole()
    training.anew()
    return training.divided


def test_answers_anew_bring_the_whole_network_near(graph: Graph, images: Images) -> None:
    spec = UnitSpec(width=1, stride=2, bits=3, gains=(1.0, 2.0))
    short = {"alone": 0, "together": 0, "prices": (0.0, 0.01), "batch_size": 32}
    unlabelled = Images(images.pixels, None)
    before = train(graph, unlabelled, spec, UnitRecipe(**short))
    after = train(graph, unlabelled, spec, UnitRecipe(**short, anew=8, anew_lr=2e-3))
    assert loss_after(graph, after, images) < 0.5 * loss_after(graph, before, images)


def loss_after(graph: Graph, divided: nn.Module, images: Images) -> float:
    """Mean divergence from the network's own answers."""
    want, got = (seen_by(m, images.pixels, PREPROCESS, Views(False))[0].float() for m in (graph.module, divided))
    return float(nn.functional.kl_div(got.log_softmax(1), want.log_softmax(1), reduction="batchmean", log_target=True))


def test_training_brings_the_answers_near_and_leaves_the_network_alone(graph: Graph, images: Images) -> None:
    before = {name: tensor.clone() for name, tensor in graph.module.state_dict().items()}
    untrained = train(graph, images, recipe=UnitRecipe(alone=0, together=0, prices=(0.01, 0.1), batch_size=32))
    recipe = UnitRecipe(alone=8, together=8, prices=(0.0, 0.01), batch_size=32, lr=5e-3)
    trained = train(graph, Images(images.pixels, None), recipe=recipe)
    assert loss_after(graph, trained, images) < 0.5 * loss_after(graph, untrained, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.module.state_dict().items())


def test_the_first_phase_leaves_head_and_tail_the_second_the_head(graph: Graph, images: Images) -> None:
    fresh = train(graph, images, recipe=UnitRecipe(alone=0, together=0, prices=(0.01, 0.1), batch_size=32))
    alone = train(graph, images, recipe=UnitRecipe(alone=1, together=0, prices=(0.01, 0.1), batch_size=32))
    both = train(graph, images)
    states = [divided.state_dict() for divided in (fresh, alone, both)]
    for name in states[0]:
        first_moves = not torch.equal(states[0][name], states[1][name])
        second_moves = not torch.equal(states[0][name], states[2][name])
        assert first_moves <= name.startswith("unit."), name
        assert second_moves <= name.startswith(("unit.", "tail.")), name
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0] if name.startswith("tail."))


def test_a_light_head_begins_by_imitating_and_the_third_phase_moves_all(graph: Graph, images: Images) -> None:
    light = UnitSpec(width=4, stride=2, bits=5, gains=(1.0, 2.0), head_width=8)
    with torch.no_grad():
        (features,) = split(graph, graph.cut("/relu#0"))[0](as_inputs(images.pixels, PREPROCESS))
    states, errors = [], []
    for recipe in (UnitRecipe(alone=0, **SHORT), UnitRecipe(alone=12, lr=5e-3, **SHORT)):
        divided = train(graph, images, light, recipe)
        states.append(divided.state_dict())
        with torch.no_grad():
            restored, _ = divided.unit(divided.head(as_inputs(images.pixels, PREPROCESS)))
        errors.append(float((restored - features).square().mean() / features.var()))
    assert errors[1] < 0.8 * errors[0]
    moved = {name.split(".")[0] for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert moved == {"head", "unit"}
    own = [train(graph, images, recipe=UnitRecipe(alone=0, whole=whole, **SHORT)).state_dict() for whole in (0, 1)]
    moved = {name.split(".")[0] for name in own[0] if not torch.equal(own[0][name], own[1][name])}
    assert moved == {"head", "unit", "tail"}


def test_a_dearer_rate_sends_less(graph: Graph, images: Images) -> None:
    points = rates_of(train(graph, images), images, PREPROCESS)
    assert [point.rate for point in points] == [0, 1] and points[1].num_bytes < points[0].num_bytes
    with pytest.raises(DataError, match="labels"):
        rates_of(train(graph, images), Images(images.pixels, None), PREPROCESS)


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("phase", "step"), [("alone", 3), ("alone", 8), ("together", 7)])
@pytest.mark.parametrize("head_width", [0, 4])
def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(
    graph: Graph, images: Images, tmp_path: Path, phase: str, step: int, head_width: int
) -> None:
    spec = UnitSpec(width=4, stride=2, bits=5, gains=(1.0, 2.0), head_width=head_width)
    whole = train(graph, images, spec)

    def stop(at: str, now: Step) -> None:
        if (at, now.step) == (phase, step):
            raise Stopped

    with pytest.raises(Stopped):
        train(graph, images, spec, checkpoints=tmp_path, progress=stop)
    torch.manual_seed(99)
    resumed = train(graph, images, spec, checkpoints=tmp_path)
    other = whole.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in resumed.state_dict().items())


def test_what_crosses_is_what_training_saw(graph: Graph, images: Images) -> None:
    divided = train(graph, images)
    unit = divided.unit
    crossing = TensorSpec(name="code", shape=(4, 4, 4))
    with torch.no_grad():
        (features,) = divided.head(torch.from_numpy(images.pixels).permute(0, 3, 1, 2).float() / 64 - 2)
        code = unit.reduce(features)
    sizes = []
    for rate, (spec, tables) in enumerate(codecs_of(unit, crossing)):
        codec = make_codec(spec, (crossing,), tables)
        restored, num_bytes = codec.roundtrip([code.numpy()])
        want, bits = unit.quantiser(code, rate)
        assert np.allclose(restored[0], want.detach().numpy(), atol=1e-5)
        payloads = [codec.encode([code[n : n + 1].numpy()]) for n in range(len(code))]
        assert all(np.array_equal(codec.decode(p)[0], restored[0][n : n + 1]) for n, p in enumerate(payloads))
        sent = sum(len(payload) - 6 for payload in payloads)
        assert sent == pytest.approx(float(bits.detach().sum()) / 8, rel=0.02, abs=len(payloads))
        sizes.append(sent)
    assert sizes[1] < sizes[0]


def test_a_unit_through_jpeg_sends_what_training_saw(graph: Graph, images: Images) -> None:
    spec = UnitSpec(width=4, stride=1, bits=8, jpeg=50, is_rectified=True)
    recipe = UnitRecipe(alone=2, together=1, prices=(0.0,), batch_size=32, lr=5e-3)
    divided = train(graph, images, spec, recipe)
    crossing = TensorSpec(name="code", shape=(4, 8, 8))
    with torch.no_grad():
        (features,) = divided.head(torch.from_numpy(images.pixels[:20]).permute(0, 3, 1, 2).float() / 64 - 2)
        code = divided.unit.reduce(features)
        want, bits = divided.unit.quantiser(code)
    ((codec_spec, tables),) = codecs_of(divided.unit, crossing)
    codec = make_codec(codec_spec, (crossing,), tables)
    payloads = [codec.encode([code[n : n + 1].numpy()]) for n in range(20)]
    assert [8 * (len(payload) - 6) for payload in payloads] == bits.tolist()
    restored = np.concatenate([codec.decode(payload)[0] for payload in payloads])
    assert np.allclose(restored, want.numpy(), atol=1e-4)
    with pytest.raises(ModelError, match="through JPEG has a quality"):
        UnitSpec(width=4, bits=6, jpeg=50)


def test_codes_of_an_int8_network_have_the_same_grid(graph: Graph, images: Images) -> None:
    unit = train(graph, images).unit
    scale, zero_point = 0.05, 128
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(4, axis=1)
    crossing = TensorSpec(name="code", shape=(4, 16, 16), dtype="uint8")
    (spec, tables), *_ = codecs_of(unit, crossing, scale=scale, zero_point=zero_point)
    (restored,), _ = make_codec(spec, (crossing,), tables).roundtrip([codes])
    values = torch.from_numpy(scale * (codes.astype(np.float32) - zero_point))
    want = unit.quantiser(values, 0)[0].detach().numpy()
    inside = np.abs(want - values.numpy()) < 0.4 * float(unit.quantiser.grid(0)[1].detach().min())
    assert inside.mean() > 0.1
    assert np.abs(scale * (restored.astype(np.float32) - zero_point) - want)[inside].max() <= scale / 2 + 1e-4


def test_a_unit_is_one_file(graph: Graph, images: Images, tmp_path: Path) -> None:
    divided, cut, path = train(graph, images), graph.cut("/relu#0"), tmp_path / "unit.safetensors"
    save_unit(divided, graph, cut, path, network="ab" * 32, recipes=[RECIPE])
    again = load_unit(path, graph, network="ab" * 32)
    assert (again.cut, again.divided.unit.spec, again.recipes) == (cut, SPEC, (RECIPE,))
    state = divided.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.divided.state_dict().items())
    with pytest.raises(WeightsError, match="trained for another network: weights abababababab, these are cdcdcdcdcdcd"):
        load_unit(path, graph, network="cd" * 32)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_unit(tmp_path / "none.safetensors", graph, network="ab" * 32)
    whole, metadata = load_file(path), {"format": "coinfer-unit-2", **again.metadata}
    broken = {"unit.quantiser.shares": torch.zeros(2, 4, 32), "unit.quantiser.log_step": torch.full((2, 4), torch.nan)}
    for name, tensor in broken.items():
        save_file(whole | {name: tensor}, path, metadata=metadata)
        with pytest.raises(WeightsError, match=f'"{name}" holds values that no training leaves'):
            load_unit(path, graph, network="ab" * 32)
    path.write_bytes(b"no unit at all")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_unit(path, graph, network="ab" * 32)


def test_a_finished_unit_is_trained_on(graph: Graph, images: Images, tmp_path: Path) -> None:
    spec = UnitSpec(width=1, stride=2, bits=3, gains=(1.0, 2.0))
    first, more = (UnitRecipe(alone=0, anew=epochs, anew_lr=2e-3, **SHORT) for epochs in (2, 1))
    cut, path = graph.cut("/relu#0"), tmp_path / "unit.safetensors"
    divided = train(graph, images, spec, first)
    as_it_was = train(graph, images, spec, UnitRecipe(alone=0, **SHORT), trained=divided)
    state = divided.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in as_it_was.state_dict().items())
    after = train(graph, images, spec, more, trained=divided)
    fresh = train(graph, images, spec, more)
    for other in (divided, fresh):
        pairs = zip(after.parameters(), other.parameters(), strict=True)
        assert any(not torch.equal(mine, theirs) for mine, theirs in pairs)
    save_unit(after, graph, cut, path, network="ab" * 32, recipes=[first, more])
    assert load_unit(path, graph, network="ab" * 32).recipes == (first, more)


def test_a_light_head_is_as_large_as_it_may_be(graph: Graph, images: Images) -> None:
    sizes = (((3, 32, 32), (8, 8), 32), ((3, 64, 64), (4, 4), 8), ((3, 64, 64), (4, 4), 48), ((3, 8, 8), (8, 8), 4))
    for picture, code, width in sizes:
        head = LightHead(picture, code, width)
        counted = capture(head, torch.zeros(2, *picture))
        assert counted.num_macs == num_macs(picture, code, width)
        assert counted.outputs[0].shape == head.output.shape and head.output.shape[1:] == code
    assert width_for((3, 32, 32), (8, 8), 12.5e6) == 64
    with pytest.raises(ModelError, match="smallest light head"):
        width_for((3, 32, 32), (8, 8), 1000)
    with pytest.raises(ModelError, match="one power of two|halves both sides"):
        LightHead((3, 32, 32), (5, 5), 8)
    spec = UnitSpec(width=4, stride=2, bits=5, gains=(1.0, 2.0), head_width=8)
    divided = train(graph, images, spec)
    x = torch.zeros(2, 3, 8, 8)
    assert Deployable(divided)(x).shape == graph.module(x).shape


def test_what_cannot_be_trained_is_refused(graph: Graph, images: Images) -> None:
    with pytest.raises(DataError, match="at least 32 pictures, got 5"):
        train(graph, images.pick(slice(5)))
    with pytest.raises(ModelError, match="2 rates need as many prices, got 1"):
        train(graph, images, recipe=UnitRecipe(prices=(0.1,)))
    with pytest.raises(ModelError, match="prices must be 0 or more and rise"):
        UnitRecipe(prices=(0.1, 0.01))
    for price in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ModelError, match="prices must be 0 or more and rise"):
            UnitRecipe(prices=(price,))


def test_a_loss_that_breaks_through_jpeg_names_the_batch(graph: Graph, images: Images) -> None:
    spec = UnitSpec(width=4, stride=1, bits=8, jpeg=50)
    recipe = UnitRecipe(alone=3, together=0, prices=(0.0,), batch_size=32, lr=1e30)
    with pytest.raises(ModelError, match=r"became (nan|inf) in epoch \d+, batch \d+"):
        train(graph, images, spec, recipe)


def test_a_loss_that_breaks_keeps_the_last_epoch(graph: Graph, images: Images, tmp_path: Path) -> None:
    recipe = UnitRecipe(alone=3, together=0, prices=(0.01, 0.1), batch_size=32, lr=1e30)
    with pytest.raises(ModelError, match=r"loss became (nan|inf) in epoch \d+, batch \d+"):
        train(graph, images, recipe=recipe, checkpoints=tmp_path)


def test_a_light_heads_steps_are_set_anew_once_it_has_learned(graph: Graph, images: Images) -> None:
    light = UnitSpec(width=4, stride=2, bits=4, gains=(1.0, 2.0), head_width=8)
    short = {"prices": (0.0, 0.01), "batch_size": 32, "lr": 2e-2, "together_lr": 1e-6}
    divided = train(graph, images, light, UnitRecipe(alone=25, together=1, **short))
    with torch.no_grad():
        code = divided.unit.code(divided.head(as_inputs(images.pixels, PREPROCESS)))
        symbols = divided.unit.quantiser.symbols(code, 0)
    at_the_ends = ((symbols == 0) | (symbols == 15)).float().mean()
    assert float(at_the_ends) < 0.1


def test_a_units_file_has_its_metadata_in_order(graph: Graph, images: Images, tmp_path: Path) -> None:
    """The library writes it in another order in every process, and so another hash of the same unit."""
    divided, cut = train(graph, images), graph.cut("/relu#0")
    for name in ("one", "two"):
        save_unit(divided, graph, cut, tmp_path / name, network="ab" * 32, recipes=[RECIPE, RECIPE])
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert load_unit(tmp_path / "one", graph, network="ab" * 32).recipes == (RECIPE, RECIPE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metadata": {"recipe": None}}, "does not say how it was trained"),
        ({"metadata": {"recipe": "{}x"}}, "does not say how it was trained"),
        ({"unit.reduce.weight": torch.zeros((4, 8, 2, 2), dtype=torch.int32)}, "is torch.int32, not floating"),
        ({"unit.quantiser.log_step": torch.full((2, 4), 1000.0)}, "the steps of rate 0 are no numbers above 0"),
    ],
)
def test_a_unit_file_that_was_tampered_with_is_refused(
    graph: Graph, images: Images, tmp_path: Path, change: dict, words: str
) -> None:
    path = tmp_path / "unit.safetensors"
    divided = train(graph, images, recipe=UnitRecipe(alone=0, **SHORT))
    save_unit(divided, graph, graph.cut("/relu#0"), path, network="ab" * 32, recipes=[RECIPE])
    tensors, metadata = load_tensors(path, "unit")
    metadata |= change.pop("metadata", {})
    save_file(tensors | change, path, metadata={key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(WeightsError, match=words):
        load_unit(path, graph, network="ab" * 32)


def test_a_network_that_gives_no_numbers_is_named(images: Images) -> None:
    class Broken(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.norm(self.first(x)).sub(50.0).log())
            return self.last(torch.relu(self.second(y)).mean((2, 3)))

    broken = capture(Broken(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ModelError, match='values at "/.*" that are no numbers'):
        train(broken, images)
