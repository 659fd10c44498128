"""Every network of the zoo: shapes, sizes, names; weights that fit and weights that do not."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coinfer.errors import ModelError, WeightsError
from coinfer.model.zoo import ZOO, build_model

# Parameters as published (torchvision for the 224 networks, the weights' own notes for the given ones).
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "resnet18": 11_173_962,
    "resnet18-half": 2_797_610,
    "resnet18-224": 11_689_512,
    "resnet50": 25_557_032,
    "vgg16": 14_724_042,
    "mobilenetv2": 3_504_872,
    "mobilenetv2-tf": 3_487_816,
    "squeezenet1_1": 1_235_496,
    "googlenet": 525_282,
    "vit-tiny": 811_146,
    "scene-resnet": 175_258,
}


def test_every_network_has_its_number_of_parameters_pinned():
    assert set(PARAMETERS) == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_shapes_and_number_of_parameters(name):
    torch.manual_seed(0)
    loaded = build_model(name)
    entry = ZOO[name]
    assert (loaded.name, loaded.input_shape, loaded.preprocess) == (name, entry.input_shape, entry.preprocess)
    assert not any(module.training for module in loaded.module.modules())
    assert sum(parameter.numel() for parameter in loaded.module.parameters()) == PARAMETERS[name]
    with torch.inference_mode():
        logits = loaded.module(torch.randn(2, *entry.input_shape))
    assert logits.shape == (2, entry.num_classes)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_mobilenet_of_tensorflow_pads_right_and_below_only():
    conv = build_model("mobilenetv2-tf").module.stem
    x = torch.zeros(1, 3, 8, 8)
    x[0, :, 7, 7] = 1.0
    with torch.inference_mode():
        y = conv(x) - conv.bias[None, :, None, None]
    # Output (3, 3) sees inputs 6 to 8 each way: the last pixel sits at the kernel's middle.
    torch.testing.assert_close(y[0, :, 3, 3], conv.weight[:, :, 1, 1].sum(1))
    assert y.shape == (1, 32, 4, 4)
    assert y[0, :, :3, :].abs().max() == 0


def test_attention_equals_its_definition():
    attention = build_model("vit-tiny").module.blocks[0].attention
    x = torch.randn(2, 5, 128)
    with torch.inference_mode():
        query, key, value = (part.reshape(2, 5, 4, 32).transpose(1, 2) for part in attention.qkv(x).chunk(3, 2))
        weights = (query @ key.transpose(2, 3) / 32**0.5).softmax(3)
        expected = attention.out((weights @ value).transpose(1, 2).reshape(2, 5, 128))
        torch.testing.assert_close(attention(x), expected)


def test_option_a_shortcut_is_every_second_pixel_between_zero_channels():
    shortcut = build_model("resnet20").module.layer2[0].shortcut
    x = torch.randn(1, 16, 4, 4)
    y = shortcut(x)
    assert y.shape == (1, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().sum() + y[:, 24:].abs().sum() == 0


def state_of(name):
    return dict(build_model(name).module.state_dict())


def test_weights_are_loaded_and_half_precision_becomes_float32(tmp_path):
    state = {key: value.half() if value.is_floating_point() else value for key, value in state_of("resnet20").items()}
    save_file(state, tmp_path / "w.safetensors")
    module = build_model("resnet20", weights=tmp_path / "w.safetensors").module
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype)), key
    assert {value.dtype for value in module.parameters()} == {torch.float32}


def test_counters_of_batch_norms_may_be_absent(tmp_path):
    state = {key: value for key, value in state_of("resnet20").items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    module = build_model("resnet20", weights=tmp_path / "w.safetensors").module
    assert torch.equal(module.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv1.weight"), r"1 of \d+ tensors are missing: conv1.weight"),
        (lambda state: state.update(fc=torch.zeros(1)), r"tensors are not the network's: fc"),
        (
            lambda state: state.update({"linear.weight": torch.zeros(5, 64)}),
            r"another shape: linear.weight is 5x64, must be 10x64",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    state = state_of("resnet20")
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=message) as raised:
        build_model("resnet20", weights=tmp_path / "w.safetensors")
    assert str(tmp_path) in str(raised.value)


def test_many_missing_tensors_make_one_short_line(tmp_path):
    save_file({"linear.bias": torch.zeros(10)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="and 92 more") as raised:
        build_model("resnet20", weights=tmp_path / "w.safetensors")
    assert len(str(raised.value)) < 400


def test_weights_that_are_missing_or_something_else(tmp_path):
    with pytest.raises(WeightsError, match="no weights at .*absent"):
        build_model("resnet20", weights=tmp_path / "absent.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        build_model("resnet20", weights=tmp_path / "w.safetensors")


def test_unknown_name_names_the_near_ones():
    with pytest.raises(ModelError, match='unknown model "resnet2O": did you mean resnet'):
        build_model("resnet2O")
    with pytest.raises(ModelError, match='unknown model "zzz": the zoo has resnet20, '):
        build_model("zzz")


def test_own_factory_class_and_module_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets_one.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(2, 3)\n"
        "def make():\n    return nn.Dropout()\n"
        "ready = Net()\n"
        "def wrong():\n    return 'net'\n"
    )
    for name, kind in (("Net", nn.Linear), ("make", nn.Dropout), ("ready", nn.Linear)):
        loaded = build_model(f"own_nets_one:{name}")
        assert isinstance(loaded.module, kind)
        assert not loaded.module.training
        assert loaded.input_shape is None
        assert loaded.preprocess is None
    with pytest.raises(ModelError, match='"own_nets_one:wrong" must give a torch.nn.Module, it gave a str'):
        build_model("own_nets_one:wrong")
