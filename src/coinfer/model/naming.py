"""Names of a graph's values, taken from the network and not from the graph.

    layer2.1#0         the output of the first call of module layer2.1
    blk.0#1            the output of the second call of blk.0
    layer2.1/add#0     the first sum inside layer2.1 that is not what layer2.1 returns
    /relu#0            the first relu that no module but the network itself calls

A value that leaves a module is what the module returned: where several leave it, the last one has the
module's name.  A block's last activation is the block's output and that of the stage around it; the
innermost module names it, and the outer ones' names are its aliases.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import fx
from torch._ops import OpOverload

from .trace import STACK

Call = tuple[str, int]


def calls_of(node: fx.Node) -> tuple[Call, ...]:
    """The module calls that the node lies in, outermost first, without the network's own."""
    calls = []
    for key, (path, _) in node.meta.get(STACK, {}).items():
        if path:
            count = re.search(r"@(\d+)$", key)
            calls.append((str(path), int(count[1]) if count else 0))
    return tuple(calls)


def op_of(node: fx.Node) -> str:
    """The operation's plain name: `add` for aten.add.Tensor, operator.add and the method alike."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    source = node.args[0] if node.args else None
    if name == "getitem" and isinstance(source, fx.Node) and isinstance(source.target, OpOverload):
        return op_of(source)  # one of the results of an operation that has several
    return name.rpartition(".")[2] if node.op == "call_module" else name.split(".")[0].strip("_")


def name_values(
    values: Sequence[fx.Node], same: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, tuple[str, tuple[str, ...]]]:
    """Name and aliases of every value.

    Args:
        values: the nodes that compute something, in the graph's order.
        same: nodes that only pass a value on, with the value they pass on.
    """
    holders: dict[fx.Node, list[fx.Node]] = {value: [value] for value in values}
    for node, value in same.items():
        if value in holders:
            holders[value].append(node)
    returned: defaultdict[Call, list[fx.Node]] = defaultdict(list)
    for value in values:
        found = {call for node in holders[value] for call in calls_of(node) if _leaves(node, call, same)}
        for call in found:
            returned[call].append(value)
    owner: defaultdict[fx.Node, list[Call]] = defaultdict(list)
    for call, results in returned.items():
        owner[results[-1]].append(call)
    counts: Counter[tuple[str, str]] = Counter()
    names: dict[fx.Node, tuple[str, tuple[str, ...]]] = {}
    for value in values:
        path = calls_of(value)[-1][0] if calls_of(value) else ""
        op = op_of(value)
        functional = f"{path}/{op}#{counts[path, op]}"
        counts[path, op] += 1
        own = {call for call in owner[value]}
        inner = [call for call in reversed(calls_of(value)) if call in own]
        outer = sorted(own - set(inner), key=lambda call: (-len(call[0]), call))
        calls = inner + outer
        names[value] = _spell(calls) if calls else (functional, ())
    return names


def _spell(calls: Sequence[Call]) -> tuple[str, tuple[str, ...]]:
    texts = [f"{path}#{count}" for path, count in calls]
    short = [path for path, count in calls if count == 0]
    return texts[0], tuple(texts[1:] + short)


def _leaves(node: fx.Node, call: Call, same: Mapping[fx.Node, fx.Node]) -> bool:
    """Is the node's value used outside the call, be it through nodes that only pass it on?"""
    users: Iterable[fx.Node] = node.users
    return any(call not in calls_of(user) or (user in same and _leaves(user, call, same)) for user in users)
