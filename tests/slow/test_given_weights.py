"""Published weights in our own definitions reach the top-1 that is stated for them, on whole test sets.

Sums in float32 differ in the last bits between machines, so a count may be off by one picture.
"""

import os
from hashlib import sha256
from pathlib import Path

import pytest

from coinfer.compress.recipes import top1
from coinfer.data import load_source
from coinfer.model.zoo import build_model

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared" / "data"))

CIFAR = {
    "resnet20": ("cifar10_resnet20", 9173),
    "resnet32": ("cifar10_resnet32", 9263),
    "resnet56": ("cifar10_resnet56", 9339),
    "vgg16": ("cifar10_vgg16_warm_fp16", 9019),
    "resnet18-half": ("cifar10_resnet18_half_warm_fp16", 9158),
}
IMAGENET = {
    "mobilenetv2-tf": ("mobilenet_v2_100_224_imagenet_dequant", 340),
    "squeezenet1_1": ("squeezenet1_1_imagenet_fp16", 295),
}


def hits(name, file, pixels, labels):
    weights = DATA / "weights" / f"{file}.safetensors"
    if not weights.is_file():
        pytest.skip(f"no weights at {weights}: set DATA_DIR")
    loaded = build_model(name, weights=weights)
    return round(top1(loaded.module, pixels, labels, loaded.preprocess, batch_size=100) * len(labels))


@pytest.fixture(scope="module")
def cifar_test():
    if not (DATA / "cifar10").is_dir():
        pytest.skip(f"no data folder at {DATA}: set DATA_DIR")
    return load_source("cifar10", data_dir=DATA, holdout="train").images("test")


@pytest.fixture(scope="module")
def photographs():
    if not (DATA / "imagenet").is_dir():
        pytest.skip(f"no data folder at {DATA}: set DATA_DIR")
    source = load_source("imagenette", data_dir=DATA)
    images = source.images("test")
    return images.pixels, images.labels


def test_first_pictures_are_classified_as_pinned(cifar_test):
    file, _ = CIFAR["resnet20"]
    assert abs(hits("resnet20", file, cifar_test.pixels[:300], cifar_test.labels[:300]) - 274) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CIFAR)
def test_cifar_networks_reach_their_stated_top1(name, cifar_test):
    file, expected = CIFAR[name]
    assert abs(hits(name, file, cifar_test.pixels, cifar_test.labels) - expected) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_networks_reach_their_stated_top1(name, photographs):
    file, expected = IMAGENET[name]
    assert abs(hits(name, file, *photographs) - expected) <= 1


def test_scene_resnet_of_the_zoo_is_the_stated_file():
    readme = (ROOT / "zoo" / "README.md").read_text()
    assert sha256((ROOT / "zoo" / "scene_resnet.safetensors").read_bytes()).hexdigest() in readme


def test_scene_resnet_of_the_zoo_classifies_the_first_scenes():
    images = load_source("scene-digits").images("validation")
    loaded = build_model("scene-resnet", weights=ROOT / "zoo" / "scene_resnet.safetensors")
    share = top1(loaded.module, images.pixels[:500], images.labels[:500], loaded.preprocess)
    assert abs(round(share * 500) - 490) <= 1


@pytest.mark.slow
def test_scene_resnet_of_the_zoo_reaches_its_stated_top1():
    images = load_source("scene-digits").images("test")
    loaded = build_model("scene-resnet", weights=ROOT / "zoo" / "scene_resnet.safetensors")
    share = top1(loaded.module, images.pixels, images.labels, loaded.preprocess)
    assert abs(round(share * 4000) - 3947) <= 1
