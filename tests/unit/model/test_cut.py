"""tail(*head(x)) is the model, bit for bit, at every cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coinfer.errors import CutError
from coinfer.model.cut import split
from coinfer.model.graph import Graph, capture, tensors_in
from tiny_nets import TINY, ByNumpy, OneAtATime, TwoInputs, make, pictures


def wrong_cuts(net: nn.Module, graph: Graph, batches: list[tuple[torch.Tensor, ...]]) -> list[str]:
    """The cuts at which an output differs in any bit, or the crossing values are not as stated."""
    wrong = []
    for cut in graph.cuts():
        head, tail = split(graph, cut)
        for inputs in batches:
            crossing = head(*inputs)
            stated = [(len(inputs[0]), *spec.shape) for spec in cut.specs]
            wanted, got = tensors_in(net(*inputs)), tensors_in(tail(*crossing))
            same = [torch.equal(a, b) for a, b in zip(wanted, got, strict=True)]
            if not all(same) or [tuple(value.shape) for value in crossing] != stated:
                wrong.append(cut.name)
    return wrong


@pytest.mark.parametrize("name", TINY)
def test_every_cut_is_exact(name: str, graphs: dict[str, Graph]) -> None:
    assert len(graphs[name].cuts()) > 3
    assert wrong_cuts(make(TINY[name]), graphs[name], [(pictures(1),), (pictures(3),)]) == []


def test_every_cut_of_two_inputs_is_exact() -> None:
    net = make(TwoInputs)
    graph = capture(net, (torch.zeros(1, 4), torch.zeros(1, 4)))
    assert wrong_cuts(net, graph, [(torch.randn(3, 4), torch.randn(3, 4))]) == []


def test_every_cut_of_an_fx_graph_is_exact() -> None:
    net = make(ByNumpy)
    graph = capture(net, torch.zeros(1, 4))
    assert wrong_cuts(net, graph, [(torch.randn(1, 4),), (torch.randn(3, 4),)]) == []


def test_every_cut_of_a_fixed_batch_is_exact() -> None:
    net = make(OneAtATime)
    graph = capture(net, torch.zeros(1, 3, 8, 8))
    assert wrong_cuts(net, graph, [(torch.randn(1, 3, 8, 8),)]) == []


def test_the_head_gives_a_tuple_and_the_tail_the_models_own_structure(graphs: dict[str, Graph]) -> None:
    graph = graphs["twice"]
    head, tail = split(graph, graph.cut("block.1#0"))
    crossing = head(pictures(2))
    assert type(crossing) is tuple and len(crossing) == 2
    assert torch.equal(crossing[0], pictures(2))
    answer = tail(*crossing)
    assert list(answer) == ["logits", "inner"]
    assert type(answer["inner"]) is tuple and type(answer["inner"][1]) is list


def test_what_is_no_tensor_comes_back_too() -> None:
    graph = capture(make(TwoInputs), (torch.zeros(1, 4), torch.zeros(1, 4)))
    head, tail = split(graph, graph.cut("b#0"))
    assert tail(*head(torch.ones(1, 4), torch.ones(1, 4)))[1:] == (None, 3)


def test_the_tail_depends_on_all_that_crosses(graphs: dict[str, Graph]) -> None:
    graph = graphs["residual"]
    for cut in graph.cuts()[::3]:
        head, tail = split(graph, cut)
        crossing = head(pictures(1))
        for k in range(len(crossing)):
            changed = [value + 1 if j == k else value for j, value in enumerate(crossing)]
            assert not torch.equal(tail(*changed), tail(*crossing))


def test_parameters_are_divided_and_shared(graphs: dict[str, Graph]) -> None:
    graph = graphs["residual"]
    head, tail = split(graph, graph.cut("layer1"))
    ours, theirs = dict(head.named_parameters()), dict(tail.named_parameters())
    whole = dict(graph.module.named_parameters())
    assert not ours.keys() & theirs.keys()
    assert ours.keys() | theirs.keys() == whole.keys()
    assert all(whole[key] is value for key, value in {**ours, **theirs}.items())


def test_a_cut_of_another_graph_is_refused(graphs: dict[str, Graph]) -> None:
    with pytest.raises(CutError, match=r'"layer1.0#0" is none of the 4 cuts of this graph'):
        split(graphs["chain"], graphs["residual"].cut("layer1"))
