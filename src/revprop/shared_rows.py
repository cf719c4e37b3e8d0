"""Units whose receptive fields do not overlap go backwards together, in one row of the batch.

A Jacobian that is known to be sparse is read off few products with it: columns (here rows) that have no entry in common are summed
and taken apart again (Curtis, Powell, Reid, 1974; Coleman, More, 1983). Of a convolutional layer's units those of one channel,
``spacing`` positions apart, see disjoint windows of every value in front of them: ``prod(spacing)`` rows per channel serve all its
positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from revprop.affine import Run
from revprop.graph import Graph
from revprop.heads import Head
from revprop.receptive import Field, receptive_fields

__all__ = ["SharedRows", "shared_rows"]

SAVED = 2  # rows are shared where there are so many units to a row at least: taking them apart has its price


@dataclass(frozen=True)
class SharedRows:
    """Units of a value with positions, by the rows that they share.

    Attributes:
        head, fields: whose units, and what these see of the values in front. index: (units, 1 + dimensions): channel and position
            of each, distinct and in the order of the layer. asked: which of them each unit asked for is.
        row: (units,): the row that each goes in. slot: its number among those of the row. count: of rows.
    """

    head: Head
    fields: Mapping[fx.Node, Field]
    index: Tensor
    asked: Tensor
    row: Tensor
    slot: Tensor
    count: int

    def backward(self, run: Run, images: int, repeat: int) -> tuple[Tensor, dict[int, Tensor]]:
        """The units' values, (images, units), and their gradients with respect to the leaves of a run that was laid out by
        position, (images, units, *shape), by identity of the leaf; a constant that none of them reaches is left out.

        Args:
            images: of which each has ``repeat`` rows in the run.
        """
        target = run.values[self.head.node]
        inputs, uses = list(run.inputs.values()), run.uses
        found = {id(leaf): leaf.new_zeros(images, len(self.index), *leaf.shape[1:]) for leaf in inputs}
        fields = [self.fields.get(node) for node in self.head.graph.inputs if node.meta["val"].is_floating_point()]
        leaves = [*inputs, *(use.value for use in uses)]
        for start in range(0, self.count, repeat):
            batch = self._batch(start, repeat, target)
            cotangent = torch.zeros_like(target)  # laid out as it is
            cotangent.unflatten(0, (images, repeat))[(slice(None), batch.row, *batch.index.unbind(1))] = 1.0
            last = start + repeat >= self.count
            gradients = torch.autograd.grad(target, leaves, cotangent, retain_graph=not last, allow_unused=True)
            parts: dict[int, Tensor] = {}
            for leaf, field_, gradient in zip(inputs, fields, gradients, strict=False):
                if gradient is not None and field_ is not None:
                    parts[id(leaf)] = batch.cut(gradient, field_, images)
            for use, gradient in zip(uses, gradients[len(inputs) :], strict=True):
                if gradient is not None:
                    part = batch.gathered(gradient, self.fields[use.node], use.repeated, images)
                    part = part.reshape(*part.shape[:2], *use.leaf.shape[1:])
                    parts[id(use.leaf)] = parts[id(use.leaf)] + part if id(use.leaf) in parts else part
            for key, part in parts.items():
                if key not in found:
                    found[key] = part.new_zeros(images, len(self.index), *part.shape[2:])
                found[key].index_copy_(1, batch.members, part)
        place: Any = (slice(None), *self.index.unbind(1))
        values = target.detach()[::repeat][place]
        if len(self.asked) == len(self.index) and bool((self.asked.diff() == 1).all()):
            return values, found
        return values[:, self.asked], {key: value.index_select(1, self.asked) for key, value in found.items()}

    def _batch(self, start: int, repeat: int, like: Tensor) -> _Batch:
        members = ((self.row >= start) & (self.row < start + repeat)).nonzero().squeeze(1)
        return _Batch(members, self.index[members], self.row[members] - start, self.slot[members], repeat, like)


@dataclass
class _Batch:
    """Rows that go backwards at a time: their units, each with its row and its slot in it."""

    members: Tensor
    index: Tensor
    row: Tensor
    slot: Tensor
    rows: int
    like: Tensor
    _masks: dict[tuple[Field, tuple[int, ...]], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def masks(self, seen: Field, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What each unit sees of a value, (units, *size), and the same by row and slot, (rows, slots, positions)."""
        if (seen, size) not in self._masks:
            mask = self.like.new_ones((len(self.index), *[1] * len(size)))
            for dim, one in enumerate(seen.seen(self.index[:, 1:], size)):
                mask = mask * one.view(len(one), *[-1 if d == dim else 1 for d in range(len(size))])
            most = int(self.slot.max()) + 1
            slots = mask.new_zeros(self.rows * most, math.prod(size))
            slots.index_copy_(0, self.row * most + self.slot, mask.flatten(1))
            self._masks[seen, size] = mask, slots.view(self.rows, most, -1)
        return self._masks[seen, size]

    def cut(self, gradient: Tensor, seen: Field, images: int) -> Tensor:
        """(images rows, c, *size) -> (images, units, c, *size): of each unit's row what it sees, else 0."""
        mask, _ = self.masks(seen, tuple(gradient.shape[2:]))
        return gradient.unflatten(0, (images, self.rows)).index_select(1, self.row).mul_(mask.unsqueeze(1))

    def gathered(self, gradient: Tensor, seen: Field, repeated: Sequence[bool], images: int) -> Tensor:
        """As :meth:`cut`, summed over the dimensions along which a constant is repeated (``repeated``), which stay as ones."""
        size = tuple(gradient.shape[2:])
        if not all(repeated):
            part = self.cut(gradient, seen, images)
            dims = [3 + d for d, same in enumerate(repeated) if same]
            return part.sum(dims, keepdim=True) if dims else part
        _, slots = self.masks(seen, size)
        sums = slots @ gradient.flatten(2).mT.unflatten(0, (images, self.rows))
        return sums[:, self.row, self.slot].unflatten(2, (-1, *[1] * len(size)))


def shared_rows(graph: Graph, head: Head, units: Sequence[tuple[int, ...]]) -> SharedRows | None:
    """The rows that units can share; None where that saves too little, or what they see is not known.

    >>> import revprop
    >>> graph = revprop.trace(torch.nn.Conv1d(1, 2, 3, padding=1), torch.zeros(1, 1, 9))
    >>> head = revprop.heads.head_of(graph, "output", "unit")
    >>> shared = shared_rows(graph, head, [(0, 0), (0, 3), (0, 4), (0, 6)])
    >>> shared.count, shared.row.tolist()
    (2, [0, 0, 1, 0])
    """
    shape = graph.shape(head.node)
    if len(units) < SAVED or head.operator is not None or head.shape != shape:
        return None
    fields = receptive_fields(graph, head.node)
    if fields is None:
        return None
    sizes = shape[1:]
    spacing = [
        min(max(s), size)
        for s, size in zip(zip(*(f.spacing for f in fields.values()), strict=True), sizes, strict=True)
    ]
    if SAVED * math.prod(spacing) > math.prod(sizes):
        return None
    weights = torch.tensor([math.prod(shape[d + 1 :]) for d in range(len(shape))])
    flat, asked = (torch.tensor(units) * weights).sum(1).unique(return_inverse=True)
    index = torch.stack(torch.unravel_index(flat, shape), 1)
    # rows of the same positions lie together: they have the most in common
    key = torch.zeros_like(flat)
    for at, step in zip(index[:, 1:].unbind(1), spacing, strict=True):
        key = key * step + at % step
    _, row, units_of = (key * shape[0] + index[:, 0]).unique(return_inverse=True, return_counts=True)
    count = len(units_of)
    if SAVED * count > len(units):
        return None
    order = row.argsort(stable=True)
    slot = torch.empty_like(row)
    slot[order] = torch.arange(len(row)) - (units_of.cumsum(0) - units_of)[row[order]]
    return SharedRows(head, fields, index, asked, row, slot, count)
