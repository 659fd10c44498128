"""The training loop: against torch's own steps, the same when stopped, careful when the loss breaks."""

import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

from coinfer.compress.losses import Batch, cross_entropy
from coinfer.compress.train import Schedule, fit, one_cycle, save_tensors
from coinfer.errors import ModelError, WeightsError

SCHEDULE = Schedule(lr=0.1, epochs=4)


class Clusters:
    """Two linearly separable clusters, in four batches whose order depends on the epoch."""

    def __init__(self, break_at=None):
        self.break_at = break_at

    def __len__(self):
        return 4

    def epoch(self, number):
        generator = torch.Generator().manual_seed(number)
        for index in range(4):
            labels = torch.randint(0, 2, (16,), generator=generator)
            inputs = torch.randn(16, 3, 4, 4, generator=generator) + (2.0 * labels[:, None, None, None] - 1)
            if (number, index) == self.break_at:
                inputs[0, 0, 0, 0] = math.nan
            yield Batch(inputs, labels)


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.25), nn.Flatten(), nn.Linear(16, 2)
    )


def run(net, batches=None, schedule=SCHEDULE, **options):
    return fit(net, batches or Clusters(), cross_entropy(), schedule=schedule, is_bfloat16=False, **options)


def equal(one, two):
    ours, theirs = one.state_dict(), two.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_training_separates_what_can_be_separated():
    net = small_net()
    fitted = run(net)
    assert not net.training
    batch = next(Clusters().epoch(99))
    with torch.inference_mode():
        assert (net(batch.inputs).argmax(1) == batch.labels).float().mean() >= 0.95
    assert fitted.losses[-1] < fitted.losses[0] / 2
    assert fitted.first_epoch == 0


@pytest.mark.parametrize("stop", [1, 3])
def test_adam_is_stopped_and_resumed_like_any_other(tmp_path, stop):
    schedule = Schedule(lr=0.01, epochs=4, optimizer="adam")
    whole, parts, path = small_net(), small_net(), tmp_path / "c.safetensors"
    fitted = run(whole, schedule=schedule)
    assert fitted.losses[-1] < fitted.losses[0]

    class Stopped(Exception):
        pass

    def progress(step):
        if step.epoch == stop:
            raise Stopped

    with pytest.raises(Stopped):
        run(parts, schedule=schedule, checkpoint=path, progress=progress)
    other = small_net(seed=5)
    assert run(other, schedule=schedule, checkpoint=path).first_epoch == stop
    assert equal(other, whole)


def test_a_model_that_views_what_a_convolution_made_is_trained_like_any_other():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(16, 2)

        def forward(self, x):
            return self.last(self.conv(x).view(x.size(0), -1))

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="view size"):
        Viewing()(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    fitted = run(Viewing())
    assert fitted.losses[-1] < fitted.losses[0]


def test_a_step_tells_how_many_answers_are_right():
    steps = []
    run(small_net(), progress=steps.append)
    assert all(step.num_bytes is None and 0 <= step.accuracy <= 1 for step in steps)
    assert steps[-1].accuracy > 0.9


def test_steps_are_those_of_nesterov_momentum_written_out():
    net, twin = nn.Linear(48, 2), nn.Linear(48, 2)
    twin.load_state_dict(net.state_dict())
    module = nn.Sequential(nn.Flatten(), net)
    schedule = Schedule(lr=0.1, epochs=1, momentum=0.9, weight_decay=0.01)
    run(module, schedule=schedule)
    moving = {name: torch.zeros_like(value) for name, value in twin.named_parameters()}
    for step, batch in enumerate(Clusters().epoch(0)):
        loss = nn.functional.cross_entropy(twin(batch.inputs.flatten(1)), batch.labels)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        rate = one_cycle(step, 4, peak=0.1, warmup=0.25)
        with torch.no_grad():
            for (name, value), gradient in zip(twin.named_parameters(), gradients, strict=True):
                pull = gradient + (0.01 * value if value.ndim >= 2 else 0.0)  # biases do not decay
                moving[name] = pull if step == 0 else 0.9 * moving[name] + pull
                value -= rate * (pull + 0.9 * moving[name])
    torch.testing.assert_close(net.weight, twin.weight)
    torch.testing.assert_close(net.bias, twin.bias)


def test_same_seed_same_weights_and_another_seed_others():
    one, two, three = small_net(), small_net(), small_net()
    for net, seed in ((one, 5), (two, 5), (three, 6)):
        run(net, seed=seed)
    assert equal(one, two)
    assert not equal(one, three)  # the dropout masks differ


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_training_ends_with_the_same_weights(tmp_path, stop_after):
    class Stopped(Exception):
        pass

    def stop(step):
        if step.step > 4 * stop_after + 1:  # in the middle of an epoch
            raise Stopped

    checkpoint = tmp_path / "state.safetensors"
    whole, stopped = small_net(), small_net()
    run(whole)
    with pytest.raises(Stopped):
        run(stopped, checkpoint=checkpoint, progress=stop)
    resumed = small_net(seed=3)
    fitted = run(resumed, checkpoint=checkpoint)
    assert (fitted.first_epoch, len(fitted.losses)) == (stop_after, 4 - stop_after)
    assert equal(resumed, whole)


def test_finished_checkpoint_is_taken_as_it_is(tmp_path):
    checkpoint = tmp_path / "state.safetensors"
    one, two = small_net(), small_net(seed=3)
    run(one, checkpoint=checkpoint)
    assert run(two, checkpoint=checkpoint).losses == ()
    assert equal(one, two)
    assert not two.training


@pytest.mark.parametrize(
    ("net", "schedule"),
    [(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), SCHEDULE), (small_net(), Schedule(lr=0.2, epochs=4))],
)
def test_checkpoint_of_another_training_is_refused(tmp_path, net, schedule):
    checkpoint = tmp_path / "state.safetensors"
    run(small_net(), checkpoint=checkpoint)
    with pytest.raises(WeightsError, match="state.safetensors is of another (model|schedule)"):
        run(net, schedule=schedule, checkpoint=checkpoint)


def test_checkpoint_that_is_none_is_refused(tmp_path):
    (tmp_path / "state.safetensors").write_bytes(b"something else")
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        run(small_net(), checkpoint=tmp_path / "state.safetensors")


def test_broken_loss_stops_and_keeps_the_last_whole_epoch(tmp_path):
    checkpoint = tmp_path / "state.safetensors"
    net, good = small_net(), small_net()
    with pytest.raises(ModelError, match="loss became nan in epoch 2, batch 1, .*has the 2 epochs before"):
        run(net, Clusters(break_at=(2, 1)), checkpoint=checkpoint)
    assert all(torch.isfinite(value).all() for value in net.parameters())
    with safe_open(checkpoint, "pt") as file:
        assert file.metadata()["epochs_done"] == "2"
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())
    # What was kept is of use: with the data mended, training ends as if nothing had happened.
    mended = small_net(seed=3)
    run(mended, checkpoint=checkpoint)
    run(good)
    assert equal(mended, good)


def test_progress_is_told_of_every_step():
    steps = []
    run(small_net(), progress=steps.append)
    assert [step.step for step in steps] == list(range(1, 17))
    assert [step.epoch for step in steps] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert {step.steps for step in steps} == {16}
    assert [step.lr for step in steps] == [one_cycle(index, 16, peak=0.1, warmup=0.25) for index in range(16)]


def test_rate_climbs_from_a_tenth_and_falls_to_a_thousandth():
    rates = [one_cycle(step, 101, peak=2.0, warmup=0.25) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[25] == pytest.approx(2.0)
    assert rates[100] == pytest.approx(0.002)
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert one_cycle(0, 1, peak=2.0, warmup=0.25) == pytest.approx(2.0)


def test_half_precision_forward_leaves_float32_weights():
    net = small_net()
    fit(net, Clusters(), cross_entropy(), schedule=SCHEDULE, is_bfloat16=True)
    assert {value.dtype for value in net.parameters()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in net.parameters())


def test_tensors_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "w.safetensors"
    save_tensors({"a": torch.ones(3)}, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_tensors({"a": torch.zeros(3)}, path, metadata={"key": 5})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]
