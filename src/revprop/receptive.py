"""Receptive fields: which positions of the values in front of a unit it can depend on, from what the operators on the way are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from revprop.affine import given, plan
from revprop.convolution import Convolution
from revprop.families import CONSTANT_PADDINGS, ENTRY_BY_ENTRY
from revprop.graph import Graph
from revprop.held import held_operands
from revprop.linear_map import Diagonal
from revprop.rules import Linear, Pointwise, Refusal, Selection, bind, closed
from revprop.structural_map import Concatenate
from revprop.windows import SlidingWindows

__all__ = ["Field", "bottlenecks", "receptive_fields"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Field:
    """A unit at position p sees of a value, per dimension, at most the positions ``stride p + low ... stride p + high``.

    >>> pooled = Field((2,), (0,), (1,))                                   # by windows of two
    >>> pooled.through(Field((1,), (-1,), (1,)))                           # of a convolution by three, padded by one
    Field(stride=(2,), low=(-1,), high=(2,))
    >>> pooled.spacing
    (1,)
    """

    stride: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]

    def through(self, step: Field) -> Field:
        """The same units on the input of an operator, ``step`` being what its outputs see of its input."""
        each = list(zip(self.stride, self.low, self.high, step.stride, step.low, step.high, strict=True))
        return Field(
            tuple(stride * s for stride, _, _, s, _, _ in each),
            tuple(low * s + first for _, low, _, s, first, _ in each),
            tuple(high * s + last for _, _, high, s, _, last in each),
        )

    def joined(self, other: Field) -> Field | None:
        """What is seen on two ways; None where their strides differ."""
        if self.stride != other.stride:
            return None
        return Field(self.stride, tuple(map(min, self.low, other.low)), tuple(map(max, self.high, other.high)))

    @property
    def spacing(self) -> tuple[int, ...]:
        """How far apart two units must be at least, in one dimension, so that what they see is disjoint."""
        return tuple((h - low) // s + 1 for s, low, h in zip(self.stride, self.low, self.high, strict=True))

    def seen(self, dim: int, positions: Tensor, size: int) -> Tensor:
        """(*positions, size): which of a value's positions in one dimension units at these positions see."""
        apart = torch.arange(size, device=positions.device) - self.stride[dim] * positions.unsqueeze(-1)
        return (apart >= self.low[dim]) & (apart <= self.high[dim])


def receptive_fields(graph: Graph, head: fx.Node) -> dict[fx.Node, Field] | None:
    """What the units of a value (n, channels, *positions) see of every value in front of it that moves them.

    Returns:
        the fields, by node; None where a value on the way has no such positions (it is flattened, pooled as a whole, attended
        to), or its operator is not known to look at neighbours only.
    """
    key = ("receptive fields", head)
    if key not in graph.factored:
        graph.factored[key] = _find(graph, head)
    return graph.factored[key]


def bottlenecks(graph: Graph, head: fx.Node) -> tuple[fx.Node, ...]:
    """The values that everything in front of a head goes through on its way there, from the head itself on."""
    waiting, found = {head}, []
    for node, sources in _backwards(graph, head):
        if waiting == {node}:
            found.append(node)
        waiting = (waiting - {node}) | set(sources)
    return tuple(found)


def _backwards(graph: Graph, head: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """The values in front of a head that move it, the head first, the inputs last; each with those that move it."""
    order, _, live = plan(graph, (head,), held_operands)
    for node in reversed([*graph.inputs, *order]):
        if node in live:
            held = held_operands(graph, node)
            yield node, [a for a in dict.fromkeys(node.all_input_nodes) if a in live and a not in held]


def _find(graph: Graph, head: fx.Node) -> dict[fx.Node, Field] | None:
    dims = len(graph.shape(head)) - 1
    if head not in graph.movable or dims not in (1, 2, 3):
        return None
    fields = {head: Field((1,) * dims, (0,) * dims, (0,) * dims)}
    for node, sources in _backwards(graph, head):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != dims + 2 or not graph.per_sample(node):
            return None
        if node in graph.inputs:
            continue
        step = _step(graph, node, sources, dims) if sources else None
        if step is None:
            return None
        for a in sources:
            field = fields[node].through(step)
            found = field.joined(fields[a]) if a in fields else field
            if found is None:
                return None
            fields[a] = found
    return fields


def _step(graph: Graph, node: fx.Node, sources: list[fx.Node], dims: int) -> Field | None:
    """What the outputs of one operator see of each of its inputs that move."""
    same = Field((1,) * dims, (0,) * dims, (0,) * dims)
    alike = all(graph.shape(a)[1:] == graph.shape(node)[1:] for a in sources)
    if node.target in ENTRY_BY_ENTRY:
        return same if alike else None
    if len(graph.shape(sources[0])) != dims + 1:
        return None
    if node.target in CONSTANT_PADDINGS:
        return _padded(node, dims)
    if node.target is aten.slice.Tensor:
        return _sliced(node, dims)
    try:
        fact = closed(bind(graph, node))
    except Refusal:
        return None
    if isinstance(fact, Pointwise):
        return same if alike else None
    windows = fact.windows if isinstance(fact, Linear | Selection) else None
    if isinstance(windows, SlidingWindows):
        reach = tuple(d * (k - 1) for d, k in zip(windows.dilation, windows.kernel, strict=True))
        return _sliding(windows.stride, windows.padding, reach)
    if not isinstance(fact, Linear) or windows is not None:
        return None
    if isinstance(fact.map, Convolution) and not fact.map.transposed:
        convolution = fact.map
        reach = tuple(d * (k - 1) for d, k in zip(convolution.dilation, convolution.weight.shape[2:], strict=True))
        return _sliding(convolution.stride, tuple(before for before, _ in convolution.padding), reach)
    if isinstance(fact.map, Concatenate):
        return same if fact.map.dim == -dims - 1 and not fact.map.new else None
    return same if isinstance(fact.map, Diagonal) and alike else None


def _sliding(stride: tuple[int, ...], padding: tuple[int, ...], reach: tuple[int, ...]) -> Field:
    return Field(tuple(stride), tuple(-p for p in padding), tuple(r - p for r, p in zip(reach, padding, strict=True)))


def _padded(node: fx.Node, dims: int) -> Field | None:
    """Padding by a constant: pairs (before, after), the last dimension first."""
    arguments: Any = given(node)
    if arguments.get("mode", "constant") != "constant" or not all(isinstance(p, int) for p in arguments["pad"]):
        return None
    before = [*arguments["pad"][::2], *[0] * dims][:dims]
    low = tuple(-p for p in reversed(before))
    return Field((1,) * dims, low, low)


def _sliced(node: fx.Node, dims: int) -> Field | None:
    """Every entry of one dimension from a start on, or every other one, and so on."""
    arguments: Any = given(node)
    dim, start, step = arguments.get("dim", 0) % (dims + 2), arguments.get("start") or 0, arguments.get("step", 1)
    if not isinstance(start, int) or start < 0 or not isinstance(step, int) or (dim == 0 and (start, step) != (0, 1)):
        return None
    stride, low = [1] * dims, [0] * dims
    if dim > 1:
        stride[dim - 2], low[dim - 2] = step, start
    return Field(tuple(stride), tuple(low), tuple(low))
