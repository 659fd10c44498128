"""Capture and cuts: names, crossing sets and shares against what one counts by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coinfer.errors import CaptureError, CutError
from coinfer.model.graph import Graph, capture, tensors_in
from coinfer.plan import TensorSpec
from tiny_nets import (
    TINY,
    Branches,
    Branching,
    ByNumpy,
    Chain,
    HoldsBranching,
    Noisy,
    OneAtATime,
    Residual,
    TwoInputs,
    make,
    pictures,
)


def names(graph: Graph) -> list[str]:
    return [cut.name for cut in graph.cuts()]


def shapes(graph: Graph, name: str) -> list[tuple[int, ...]]:
    return [spec.shape for spec in graph.cut(name).specs]


def test_inputs_and_outputs_have_no_batch(graphs: dict[str, Graph]) -> None:
    graph = graphs["chain"]
    assert graph.inputs == (TensorSpec(name="x", shape=(3, 16, 16)),)
    assert [spec.shape for spec in graph.outputs] == [(5,)]
    assert (graph.how, graph.why_fixed_batch) == ("export", None)


@pytest.mark.parametrize("name", TINY)
def test_the_captured_module_is_the_model(name: str, graphs: dict[str, Graph]) -> None:
    x = pictures(3)
    wanted, got = make(TINY[name])(x), graphs[name].module(x)
    assert type(wanted) is type(got)
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(wanted), tensors_in(got), strict=True))


def test_cuts_of_a_chain(graphs: dict[str, Graph]) -> None:
    assert names(graphs["chain"]) == ["features.0#0", "features.1#0", "features.3#0", "/mean#0"]


def test_cuts_of_residual_blocks(graphs: dict[str, Graph]) -> None:
    assert names(graphs["residual"]) == [
        "conv1#0",
        "bn1#0",
        "/relu#0",
        "layer1.0.conv1#0",
        "layer1.0.bn1#0",
        "layer1.0.act#0",
        "layer1.0.conv2#0",
        "layer1.0.bn2#0",
        "layer1.0/add#0",
        "layer1.0#0",
        "layer2.0.conv1#0",
        "layer2.0.bn1#0",
        "layer2.0.act#0",
        "layer2.0.conv2#0",
        "layer2.0.bn2#0",
        "layer2.0/slice#0",
        "layer2.0/slice#1",
        "layer2.0/pad#0",
        "layer2.0/add#0",
        "layer2.0#0",
        "/adaptive_avg_pool2d#0",
        "/flatten#0",
    ]


def test_what_crosses_inside_a_block_is_both_paths(graphs: dict[str, Graph]) -> None:
    graph = graphs["residual"]
    assert shapes(graph, "layer1.0.conv2#0") == [(4, 16, 16), (4, 16, 16)]
    assert shapes(graph, "layer2.0.bn2#0") == [(4, 16, 16), (8, 8, 8)]
    assert shapes(graph, "layer2.0/slice#1") == [(8, 8, 8), (4, 8, 8)]
    assert shapes(graph, "layer2.0#0") == [(8, 8, 8)]
    assert graph.cut("layer2.0.bn2#0").num_bytes == 4 * (4 * 256 + 8 * 64)


def test_a_skip_from_the_input_crosses(graphs: dict[str, Graph]) -> None:
    graph = graphs["branches"]
    assert names(graph) == [
        "left.0#0",
        "left.1#0",
        "left.2#0",
        "right.0#0",
        "right.1#0",
        "right.2#0",
        "/cat#0",
        "last#0",
    ]
    cut = graph.cut("right.2#0")
    assert [spec.name for spec in cut.specs][0] == "x"
    assert [spec.shape for spec in cut.specs] == [(3, 16, 16), (4, 16, 16), (4, 16, 16)]


def test_calls_of_one_module_are_told_apart(graphs: dict[str, Graph]) -> None:
    graph = graphs["twice"]
    assert names(graph) == [
        "conv#0",
        "block.0#0",
        "block.1#0",
        "conv#1",
        "block.0#1",
        "block.1#1",
        "/add#0",
        "/relu#0",
        "/mean#0",
    ]
    assert graph.cut("block.1#1").aliases == ("block#1",)


def test_outer_modules_are_aliases(graphs: dict[str, Graph]) -> None:
    graph = graphs["residual"]
    cut = graph.cut("layer2.0#0")
    assert cut.aliases == ("layer2#0", "layer2.0", "layer2")
    assert all(graph.cut(alias) == cut for alias in cut.aliases)


def test_a_dropout_is_an_alias_of_what_it_passes_on(graphs: dict[str, Graph]) -> None:
    graph = graphs["chain"]
    assert graph.cut("features.2") == graph.cut("features.1#0")
    assert graph.cut("features") == graph.cut("features.3#0")


def test_an_unknown_cut_names_the_nearest(graphs: dict[str, Graph]) -> None:
    with pytest.raises(CutError, match=r'no cut "layer2.9#0" among 22 cuts; the nearest: layer2.0#0'):
        graphs["residual"].cut("layer2.9#0")


@pytest.mark.parametrize(("name", "net"), [("residual", Residual), ("branches", Branches)])
def test_names_belong_to_the_network_not_to_its_width(
    name: str, net: Callable[[int], nn.Module], graphs: dict[str, Graph]
) -> None:
    wide = capture(make(lambda: net(6)), pictures(1))
    assert names(wide) == names(graphs[name])
    assert [cut.aliases for cut in wide.cuts()] == [cut.aliases for cut in graphs[name].cuts()]
    assert [cut.specs for cut in wide.cuts()] != [cut.specs for cut in graphs[name].cuts()]


@pytest.mark.parametrize("name", TINY)
def test_names_are_unique_and_crossing_sets_too(name: str, graphs: dict[str, Graph]) -> None:
    cuts = graphs[name].cuts()
    every = [text for cut in cuts for text in (cut.name, *cut.aliases)]
    assert len(set(every)) == len(every)
    assert len({cut.specs for cut in cuts}) == len(cuts)


@pytest.mark.parametrize("name", TINY)
def test_only_floats_with_a_batch_cross(name: str, graphs: dict[str, Graph]) -> None:
    graph = graphs[name]
    constants = {n.name for n in graph.module.graph.nodes if n.op == "get_attr"}
    for cut in graph.cuts():
        for spec in cut.specs:
            assert spec.dtype == "float32" and graph.facts[spec.name].has_batch and spec.name not in constants


def test_a_repeated_class_token_and_the_batch_size_never_cross(graphs: dict[str, Graph]) -> None:
    graph = graphs["transformer"]
    assert names(graph)[:5] == ["patch#0", "/flatten#0", "/transpose#0", "/cat#0", "/add#0"]
    assert shapes(graph, "/transpose#0") == [(4, 8)]
    assert shapes(graph, "block.attn/unbind#2") == [(5, 8), (2, 5, 4), (2, 5, 4), (2, 5, 4)]


def test_values_whose_batch_is_elsewhere_are_no_cuts(graphs: dict[str, Graph]) -> None:
    # nn.MultiheadAttention works on (tokens, batch, width) inside.
    inside = [name for name in names(graphs["multihead"]) if name.startswith("block.attn/")]
    assert inside == ["block.attn/view#5", "block.attn/scaled_dot_product_attention#0"]
    assert shapes(graphs["multihead"], "block.attn#0") == [(5, 8), (5, 8)]


@pytest.mark.parametrize("name", ["chain", "residual", "branches", "shuffle", "transformer"])
def test_macs_are_torchs_own_count(name: str, graphs: dict[str, Graph]) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        make(TINY[name])(pictures(1))
    # Fused attention on a CPU is not in torch's count: 2 heads, 5 queries by 5 keys, 4 numbers, twice.
    attention = 2 * 5 * 5 * 4 * 2 if name == "transformer" else 0
    assert (graphs[name].num_macs - attention) * 2 == counter.get_total_flops()


def test_compute_share_is_what_lies_before(graphs: dict[str, Graph]) -> None:
    graph = graphs["chain"]
    convolution, linear = 4 * 16 * 16 * 3 * 9, 4 * 5
    assert graph.num_macs == convolution + linear
    assert graph.cut("features.0#0").compute_share == convolution / (convolution + linear)
    shares = [cut.compute_share for cut in graphs["residual"].cuts()]
    assert shares == sorted(shares) and 0 < shares[0] and shares[-1] < 1


def test_the_model_stays_as_it_was() -> None:
    net = make(Residual).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    capture(net, pictures(2))
    assert net.training and net.layer1[0].act.inplace
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_several_inputs() -> None:
    graph = capture(make(TwoInputs), (torch.zeros(1, 4), torch.zeros(1, 4)))
    assert [spec.name for spec in graph.inputs] == ["x", "y"]
    assert [spec.name for spec in graph.cut("a#0").specs] == ["y", "linear"]
    assert [spec.shape for spec in graph.outputs] == [(4,)]


def test_fx_captures_what_export_cannot() -> None:
    net = make(ByNumpy)
    graph = capture(net, torch.zeros(1, 4))
    x = torch.randn(3, 4)
    assert (graph.how, graph.why_fixed_batch) == ("fx", None)
    assert names(graph)[:2] == ["a#0", "/sorted_by_numpy#0"]
    assert torch.equal(graph.module(x)["o"], net(x)["o"])


def test_a_network_for_one_sample_says_why_its_batch_is_fixed() -> None:
    graph = capture(make(OneAtATime), torch.zeros(1, 3, 8, 8))
    assert graph.why_fixed_batch == "the model takes one batch size alone"
    assert names(graph) == ["conv#0", "/relu#0", "/view#0"]


def test_control_flow_on_data_is_refused_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(make(HoldsBranching), torch.zeros(1, 4))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("cannot capture HoldsBranching: line ")
    assert 'of tiny_nets.py, "if y.sum() > 0:", in module "inner"' in message
    assert capfd.readouterr() == ("", "")


def test_the_network_itself_may_be_the_culprit() -> None:
    with pytest.raises(CaptureError, match=r'"if y.sum\(\) > 0:", in module ""'):
        capture(make(Branching), torch.zeros(1, 4))


def test_what_cannot_be_copied_is_refused_in_one_line() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = self.linear(x)
            return self.last

    model = Keeps()
    model(torch.ones(1, 4))
    with pytest.raises(CaptureError, match="^Keeps cannot be copied: Only Tensors created explicitly"):
        capture(model, torch.ones(1, 4))


def test_random_outputs_are_refused() -> None:
    with pytest.raises(CaptureError, match='the captured Noisy gives another output "add" than the model'):
        capture(make(Noisy), torch.zeros(1, 4))


def test_an_input_that_does_not_fit_is_named() -> None:
    with pytest.raises(CaptureError, match=r"Chain does not run on an input of \(1, 4, 16, 16\): "):
        capture(make(Chain), torch.zeros(1, 4, 16, 16))


@pytest.mark.parametrize("shape", [(), (0, 3, 16, 16)])
def test_an_example_needs_a_batch(shape: tuple[int, ...]) -> None:
    with pytest.raises(CaptureError, match="input 0 must have a leading batch of at least 1, got shape"):
        capture(make(Chain), torch.zeros(shape))


def test_an_output_without_a_batch_is_refused() -> None:
    class Total(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).sum()

    with pytest.raises(CaptureError, match='"sum_1" of Total has no leading batch dimension'):
        capture(Total(), torch.zeros(1, 4))


def test_an_example_of_several_samples_gives_the_same_graph(graphs: dict[str, Graph]) -> None:
    many = capture(make(Chain), pictures(5))
    assert many.cuts() == graphs["chain"].cuts()
    assert many.num_macs == graphs["chain"].num_macs
