"""Job files: values only, paths beside the file, one line for anything that is not allowed."""

from pathlib import Path

import pytest

from coinfer.build.job import conditions_of, load_job, weights_of_smaller
from coinfer.errors import JobError

FULL = """
[model]
source = "resnet56"
weights = "weights/cifar10_resnet56.safetensors"
smaller = ["resnet32"]
[data]
source = "cifar10"
[device]
slowdown = 30.0
[link]
rate = "300 kbit/s"
delay = "5 ms"
[goal]
minimise = "latency"
max_loss = 1.0
"""


def job_file(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text)
    return path


def test_paths_are_beside_the_job_file(tmp_path: Path) -> None:
    job = load_job(job_file(tmp_path, FULL))
    assert job.model.weights == str(tmp_path / "weights/cifar10_resnet56.safetensors")


def test_conditions_use_the_ratio_unless_int8_is_given(tmp_path: Path) -> None:
    job = load_job(job_file(tmp_path, FULL))
    conditions = conditions_of(job, int8_ratio=1.5)
    assert (conditions.link.rate_bps, conditions.link.delay_s) == (300_000.0, 0.005)
    assert (conditions.device.fp32, conditions.device.int8) == (30.0, 45.0)
    given = load_job(job_file(tmp_path, FULL.replace("slowdown = 30.0", "slowdown = 30.0\nint8_slowdown = 60.0")))
    assert conditions_of(given, int8_ratio=1.5).device.int8 == 60.0


def test_energies_take_the_radio_and_the_devices_power(tmp_path: Path) -> None:
    text = FULL.replace("slowdown = 30.0", "slowdown = 30.0\npower = 2.5").replace(
        'delay = "5 ms"', 'delay = "5 ms"\nradio = "4g"\nradio_tail = 0.5'
    )
    conditions = conditions_of(load_job(job_file(tmp_path, text)), int8_ratio=1.0)
    assert conditions.device_power_w == 2.5 and conditions.radio is not None
    assert (conditions.radio.name, conditions.radio.tail_j) == ("4g", 0.5)
    assert conditions.radio.power_w(5.85e6) == pytest.approx(3.8526, abs=1e-3)
    load_job(job_file(tmp_path, text.replace('"latency"', '"energy"')))
    for goal in ('minimise = "energy"', 'minimise = "latency"\nmax_energy = 0.1'):
        with pytest.raises(JobError, match=r"an energy needs \[device\] power and \[link\] radio"):
            load_job(job_file(tmp_path, FULL.replace('minimise = "latency"', goal)))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("widths = [0]", "widths and strides at least 1"),
        ("strides = [0]", "widths and strides at least 1"),
        ("widths = []", "at least one of widths and one of strides"),
        ("widths = [8, 8]", r"widths must not name a value twice, got \[8, 8\]"),
        ("light = [0.1, 0.1]", "light must not name a value twice"),
        ("light = [1.5]", "light must be shares above 0 and up to 1"),
        ("seed = -1", "seed must be 0 to 4294967295, got -1"),
        ("images = 0", "images must be at least 1"),
        ("refine = -1", "prepare and refine 0 or more"),
        ("prepare = -1", "prepare and refine 0 or more"),
        ("mixes = -1", "mixes must be 0 or more, got -1"),
        ("labels = 1.5", "labels must be a share of 0 to 1"),
        ("labels = 0.5", "above 0 only with mixes = 0"),
        ("epochs = [1, -1, 0]", "up to four epochs of 0 or more"),
        ("epochs = [1, 1, 1, 1, 1]", "up to four epochs of 0 or more"),
        ("epochs = []", "up to four epochs of 0 or more"),
        ("bits = 9", "bits 1 to 8"),
        ('bits = "few"', "bits"),
        ("bits_loss = -0.5", "bits_loss must be at least 0 points, got -0.5"),
        ("prices = [0.2, 0.1]", "prices must be 0 or more and rise"),
        ("prices = [nan]", "prices must be 0 or more and rise"),
        ("prices = [0.1, inf]", "prices must be 0 or more and rise"),
        ("width = [8]", "width"),
    ],
)
def test_a_bottleneck_that_makes_no_sense_names_itself(tmp_path: Path, section: str, words: str) -> None:
    with pytest.raises(JobError, match=words):
        load_job(job_file(tmp_path, f'{FULL}[bottleneck]\ncuts = ["layer1*"]\n{section}\n'))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("keep = [0.2, 0.5]", r"keep must be shares that fall, got \[0.2, 0.5\]"),
        ("final_lr = 0.0", "learning rates must be above 0"),
        ("cut_lr = -0.1", "learning rates must be above 0"),
        ("counts = 0", "counts must be how many, or counts of 1 and more that fall, got 0"),
        ("counts = [10, 20]", r"counts of 1 and more that fall, got \(10, 20\)"),
        ("counts = []", "counts of 1 and more that fall"),
        ("counts = [5, 0]", "counts of 1 and more that fall"),
        ("cut_epochs = -1", "cut_epochs, mixes and shift 0 or more"),
    ],
)
def test_a_pruning_that_makes_no_sense_names_itself(tmp_path: Path, section: str, words: str) -> None:
    with pytest.raises(JobError, match=words):
        load_job(job_file(tmp_path, f"{FULL}[prune]\n{section}\n"))


def test_smaller_weights_are_found_beside(tmp_path: Path) -> None:
    job = load_job(job_file(tmp_path, FULL))
    with pytest.raises(JobError, match=r'"resnet32".*cifar10_resnet32'):
        weights_of_smaller(job, "resnet32")
    (tmp_path / "weights").mkdir()
    beside = tmp_path / "weights/cifar10_resnet32.safetensors"
    beside.write_bytes(b"")
    assert weights_of_smaller(job, "resnet32") == beside


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("max_loss = 1.0", "max_loss = -1.0"), "max_loss must be at least 0"),
        (("max_loss = 1.0", "max_los = 1.0"), "max_los"),
        (('minimise = "latency"', 'minimise = "speed"'), "speed"),
        (("slowdown = 30.0", "slowdown = 0.0"), "slowdown"),
        (('smaller = ["resnet32"]', "mean = [0.5]"), "mean and std"),
        (("[goal]", "[build]\nrounds = [1000, 250]\n[goal]"), "rounds must be increasing"),
        (("[goal]", "[goal"), "not TOML"),
    ],
)
def test_bad_values_name_themselves(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    with pytest.raises(JobError, match="job.toml") as caught:
        load_job(job_file(tmp_path, FULL.replace(*change)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_job_file_and_a_bad_rate(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be read"):
        load_job(tmp_path / "none.toml")
    with pytest.raises(JobError, match="300 parsec"):
        load_job(job_file(tmp_path, FULL.replace("300 kbit/s", "300 parsec")))


def test_folders_are_relative_to_the_job_file(tmp_path: Path) -> None:
    job = load_job(job_file(tmp_path, FULL.replace('source = "cifar10"', 'source = "folder:images"')))
    assert job.data.source == f"folder:{tmp_path.resolve() / 'images'}"
