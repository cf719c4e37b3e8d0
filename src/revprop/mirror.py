"""The reverse pass of a network, by its own weights: what racecar training compares with the pass forward.

From the output of one layer back to the inputs, on the reverse pass's own values:

- **Learned linear operators**: ``A^T (z - b)`` with the live weights, the bias first (racecar-training, section 3).
- What they give is put through the normalisation and the activation that made the value it stands for ("the BN parameters
  and the activation function of layer m - 1"); the way back through these is then the identity.
- **Linear operators without weights**: the pseudo-inverse. Pooling copies, up-sampling pools (by the largest where it copied),
  reshaping reshapes back, a constant is subtracted.
- **Sums** hand their value on to each summand, and what several operators read gets the sum of what they give: the transpose of
  the whole. What a concatenation hands on is a copy of a value and no part of a sum: the mean is taken with it.
- **What depends on the input twice** (attention, gates): linear in one operand, by the recorded values of the others; where no
  operand is singled out, the transposed tangent at the recorded values. These are named: :attr:`MirrorPass.held`.

Unlike the modes of :mod:`revprop.modes` it runs on values and not on corrections, and is differentiable in the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from revprop.affine import given, title
from revprop.graph import Graph
from revprop.held import held_operands
from revprop.live_run import BATCH_NORMS, operation
from revprop.mirror_steps import (
    ACTIVATIONS,
    NORMS,
    Back,
    Values,
    is_learned,
    is_pointwise,
    precise,
    reverse,
    several,
    solution,
    takes_copies,
    tiles,
    transposed_tangent,
    weight_of,
)
from revprop.rules import Linear, Refusal, Selection, bind, closed
from revprop.structural_map import Concatenate

__all__ = ["MirrorPass"]

aten = torch.ops.aten
Finish = Callable[[Tensor, Values], Tensor]
JOINS = frozenset({aten.cat.default, aten.stack.default})
PARTIAL = frozenset(
    {
        *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.log.default, aten.log2.default),
        *(aten.log10.default, aten.log1p.default, aten.logit.default, aten.acos.default, aten.asin.default),
        *(aten.acosh.default, aten.atanh.default),
    }
)


@dataclass(frozen=True)
class _Step:
    """The way back through one operator.

    Attributes:
        source: the value it starts from: its own, or that of the pooling behind it. inputs: the values that get something.
        back: (reverse value, recorded values) -> for each of them what it gets. learned: whether what it gives lacks the
            activation. copies: whether it is a concatenation.
    """

    source: str
    inputs: tuple[str, ...]
    back: Back
    learned: bool
    copies: bool


class MirrorPass:
    """The reverse pass from one value of a graph, built once; the weights are read at every call.

    Args:
        start: where it begins. last: the activation behind what comes back for an input; the identity where not given.

    Attributes:
        recorded: the names of the values whose recorded ones it reads.
        held: operators taken by the recorded values of what they depend on.
    """

    def __init__(self, graph: Graph, start: fx.Node, last: Callable[[Tensor], Tensor] | None = None) -> None:
        needed = graph.ancestors([start])
        on_way = [
            n for n in graph.nodes if n in needed and n in graph.movable and isinstance(n.meta.get("val"), Tensor)
        ]
        pooled = {node: found for node in on_way if (found := _pooled(graph, node, start, needed)) is not None}
        skipped = {n for found in pooled.values() for n in found}
        self.start = start.name
        self.held: list[str] = []
        recorded: set[str] = set()
        reached = {start}
        steps: list[_Step] = []
        for node in reversed(on_way):
            if node in skipped and node in reached:
                reached.update(bind(graph, node).inputs)
            elif node in reached:
                step, read, free = self._step(graph, node, pooled.get(node, ()))
                steps.append(step)
                recorded |= {n.name for n in read}
                reached |= free
        finishing = [n for n in (*on_way, *graph.inputs) if n in reached]
        self._finish = {n.name: _finish(graph, n, last, recorded) for n in finishing}
        self._steps = tuple(steps)
        self._inputs = tuple(n.name for n in graph.inputs)
        self.recorded = frozenset(recorded)

    def _step(
        self, graph: Graph, node: fx.Node, behind: tuple[fx.Node, ...]
    ) -> tuple[_Step, tuple[fx.Node, ...], set[fx.Node]]:
        """The way back, whose recorded values it reads, and which values get something."""
        call = bind(graph, node)
        inputs = tuple(call.inputs)
        free = set(inputs)
        found = reverse(call, behind[-1] if behind else None)
        if found is None:
            free -= held_operands(graph, node)
            found = transposed_tangent(call, free)
            self.held.extend([title(graph, _whole(node))] if free else [])
        back, read = found
        source = behind[-1] if behind else node
        step = _Step(source.name, tuple(n.name for n in inputs), back, is_learned(graph, node), node.target in JOINS)
        return step, read, free

    def __call__(self, start: Tensor, recorded: Values) -> dict[str, Tensor]:
        """The value that comes back for everything that one does, by name.

        Args:
            start: the value to begin with. recorded: the values named by :attr:`recorded`.
        """
        sums: dict[str, Tensor] = {}  # of what is one map: its transpose
        raw: dict[str, bool] = {}  # whether an activation is still to come
        copies: dict[str, list[Tensor]] = {}
        back: dict[str, Tensor] = {}
        sums[self.start] = start
        for step in self._steps:
            value = self._joined(step.source, sums, copies, raw, recorded, back)
            if value is None:
                continue
            for name, part in zip(step.inputs, step.back(value, recorded), strict=True):
                if part is None:
                    continue
                if step.copies:
                    copies.setdefault(name, []).append(part)
                else:
                    sums[name] = sums[name] + part if name in sums else part
                    raw[name] = raw.get(name, False) or step.learned
        for name in self._inputs:
            self._joined(name, sums, copies, raw, recorded, back)
        return back

    def _joined(
        self,
        name: str,
        sums: dict[str, Tensor],
        copies: dict[str, list[Tensor]],
        raw: dict[str, bool],
        recorded: Values,
        back: dict[str, Tensor],
    ) -> Tensor | None:
        parts = copies.pop(name, [])
        if name in sums:
            total = sums.pop(name)
            parts.append(self._finish[name](total, recorded) if raw.get(name) else total)
        if parts:
            back[name] = parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)
        return back.get(name)


def _pooled(graph: Graph, node: fx.Node, start: fx.Node, needed: set[fx.Node]) -> tuple[fx.Node, ...] | None:
    """What lies between a convolution and the pooling that alone reads it, the pooling included: copying for the pooling and the
    transposed convolution are one transposed convolution of a longer stride."""
    if not takes_copies(graph, node):
        return None
    kernel = weight_of(graph, node).meta["val"].shape[2:]  # type: ignore[union-attr]
    found: list[fx.Node] = []
    while node is not start and node is not graph.output:
        users = [user for user in node.users if user in graph.active]
        if len(users) != 1 or users[0] not in needed or users[0] not in graph.movable:
            return None
        (node,) = users
        found.append(node)
        times = tiles(graph, node)
        if times is not None:  # by long windows the kernel would grow beyond what the copies cost
            return tuple(found) if all(t <= max(2, k) for t, k in zip(times, kernel, strict=True)) else None
        if node.target not in NORMS and not is_pointwise(graph, node):
            return None
    return None


def _whole(node: fx.Node) -> fx.Node:
    """The operator that a value is a result of."""
    return node.all_input_nodes[0] if isinstance(node.all_input_nodes[0].meta.get("val"), tuple | list) else node


# -- the normalisation and activation of a value -------------------------------------------------------------------------


def _finish(graph: Graph, node: fx.Node, last: Callable[[Tensor], Tensor] | None, recorded: set[str]) -> Finish:
    """What makes of a learned operator's raw value one of the kind that ``node`` has: its own normalisation and activation."""
    if node in graph.inputs:
        return (lambda value, values: value) if last is None else (lambda value, values: last(value))
    call = bind(graph, node, graph.active)
    inputs = tuple(dict.fromkeys(call.inputs))
    if is_learned(graph, node) or not inputs:
        return _as_it_is
    if node.target in NORMS or node.target in ACTIVATIONS or is_pointwise(graph, node):
        if len(inputs) > 1:
            return _as_it_is
        before = _chain(graph, inputs[0], recorded)
        if before is _as_it_is and _is_partial(node):
            return before
        own = operation(graph, node)
        others = own.sources[1:]
        recorded.update(others)
        return lambda value, values: own.run(False, before(value, values), *[values[name] for name in others])
    return _through_structure(graph, node, recorded)


def _is_partial(node: fx.Node) -> bool:
    """Whether a function is none of all numbers: by itself no activation for what a layer's transpose gives."""
    exponent = given(node).get("exponent")
    return node.target in PARTIAL or (isinstance(exponent, int | float) and (exponent < 0 or exponent % 1 != 0))


def _chain(graph: Graph, node: fx.Node, recorded: set[str]) -> Finish:
    """The same for a value further in front; the input's own activation is no part of it."""
    return _as_it_is if node in graph.inputs else _finish(graph, node, None, recorded)


def _as_it_is(value: Tensor, values: Values) -> Tensor:
    return value


def _through_structure(graph: Graph, node: fx.Node, recorded: set[str]) -> Finish:
    """Pooling and padding leave channels where they are, so that activations commute with them; what is reshaped is shaped
    back for them; of what is concatenated each part has its own."""
    try:
        call = precise(bind(graph, node))
        fact = closed(call)
    except Refusal:
        return _as_it_is
    if isinstance(fact, Linear) and isinstance(fact.map, Concatenate):
        chains = [_chain(graph, n, recorded) for n in call.inputs]
        if all(chain is _as_it_is for chain in chains):
            return _as_it_is

        def joined(value: Tensor, values: Values) -> Tensor:
            parts = several(fact.map.adjoint(value))
            return fact.map.apply(*[chain(part, values) for chain, part in zip(chains, parts, strict=True)])

        return joined
    if len(call.inputs) != 1 or not isinstance(fact, Linear | Selection) or graph.parameters_of([node]):
        return _as_it_is
    (source,) = call.inputs
    chain = _chain(graph, source, recorded)
    if chain is _as_it_is:
        return _as_it_is
    before, after = graph.shape(source), graph.shape(node)
    kept = len(before) == len(after) > 1 and before[0] == after[0]
    if kept and not _over_the_last(graph, source) and not _moves_channels(graph, source):
        return chain
    windows = fact.windows
    if windows is not None:  # on the image that was pooled, then pooled again
        pool = operation(graph, node)
        return lambda value, values: pool.run(False, chain(windows.spread(value, 0.0), values))
    assert isinstance(fact, Linear)
    solve = solution(call, fact)

    def shaped(value: Tensor, values: Values) -> Tensor:
        inside = solve(value)
        assert isinstance(inside, Tensor)
        return fact.map.apply(chain(inside, values))

    return shaped


def _moves_channels(graph: Graph, node: fx.Node) -> bool:
    """Whether channels are moved between the layer in front and a value, so that what is done to them needs its very shape."""
    while not is_learned(graph, node):
        inputs = bind(graph, node).inputs
        if len(inputs) != 1 or inputs[0] in graph.inputs:
            return False
        if graph.shape(inputs[0])[:1] != graph.shape(node)[:1]:
            return True
        (node,) = inputs
    return False


def _over_the_last(graph: Graph, node: fx.Node) -> bool:
    """Whether a value comes from a normalisation over the last dimensions, in front of nothing but activations."""
    while node.target not in NORMS:
        inputs = bind(graph, node).inputs
        if len(inputs) != 1 or is_learned(graph, node):
            return False
        (node,) = inputs
        if node in graph.inputs:
            return False
    return node.target not in BATCH_NORMS
