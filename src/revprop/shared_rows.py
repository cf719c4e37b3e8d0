"""Units whose receptive fields do not overlap go backwards together, in one row of the batch.

A Jacobian that is known to be sparse is read off few products with it: columns (here rows) that have no entry in common are summed
and taken apart again (Curtis, Powell, Reid, 1974; Coleman, More, 1983). Of a convolutional layer's units those of one channel,
``spacing`` positions apart, see disjoint windows of the values in front of them: ``prod(spacing)`` rows per channel serve all its
positions. Next to the layer windows are small and rows few; so the way back is walked in stages, from one value that everything
goes through to the next, and between them what the units see is laid into the more rows that its windows then need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from revprop.affine import Run
from revprop.graph import Graph
from revprop.heads import Head
from revprop.receptive import Field, bottlenecks, receptive_fields

__all__ = ["SharedRows", "shared_rows"]

WORTH = 0.8  # rows are shared where they take at most this part of the work: taking them apart has its price
FEW = 16  # fewer units are soon done in rows of their own
REGROUPED = 3  # what it costs to lay rows out anew between two stages, in operators


@dataclass(frozen=True)
class _Stage:
    """A part of the way back: from one value to the next that everything goes through, or to the inputs.

    Attributes:
        target: what the rows go back from. next: the value that they go back to (None: the inputs). nodes: the values between,
            the first among them. spacing: how far apart units of one row are, per dimension.
    """

    target: fx.Node
    next: fx.Node | None
    nodes: tuple[fx.Node, ...]
    spacing: tuple[int, ...]

    @property
    def rows(self) -> int:
        """For each channel."""
        return math.prod(self.spacing)

    @property
    def work(self) -> int:
        """For each row."""
        return len(self.nodes)

    def joined(self, after: _Stage) -> _Stage:
        """This stage and the one after it as one."""
        spacing = tuple(map(max, self.spacing, after.spacing))
        return _Stage(self.target, after.next, self.nodes + after.nodes, spacing)


@dataclass(frozen=True)
class SharedRows:
    """Units of a value with positions, by the rows that they share.

    Attributes:
        head, fields: whose units, and what these see of the values in front. stages: of the way back. index: (units, 1 +
            dimensions): channel and position of each, distinct and in the order of the layer. asked: which of them each unit asked
            for is. budget: bytes for what goes from one stage to the next.
    """

    head: Head
    fields: Mapping[fx.Node, Field]
    stages: tuple[_Stage, ...]
    index: Tensor
    asked: Tensor
    budget: int

    @property
    def wanted(self) -> tuple[fx.Node, ...]:
        """The values that a run has to keep."""
        return tuple(stage.target for stage in self.stages)

    @cached_property
    def counts(self) -> list[int]:
        """How many rows each stage takes, of one image."""
        return [int(self.rows(stage).max()) + 1 for stage in self.stages]

    def rows(self, stage: _Stage) -> Tensor:
        """The row of each unit."""
        return _rows_of(self.index, stage.spacing)

    def backward(self, run: Run, images: int, repeat: int) -> tuple[Tensor, dict[int, Tensor]]:
        """The units' values, (images, units), and their gradients with respect to the leaves of a run that was laid out by
        position, (images, units, *shape), by identity of the leaf; a constant that none of them reaches is left out.

        Args:
            images: of which each has ``repeat`` rows in the run.
        """
        walk = _Walk(self, run, images, repeat)
        for group in walk.groups:
            before = None
            for stage in self.stages:
                before = walk.through(stage, group, before, group is walk.groups[-1])
        place: Any = (slice(None), *walk.index.unbind(1))
        values = run.values[self.head.node].detach()[::repeat][place]
        if len(self.asked) == len(self.index) and bool((self.asked.diff() == 1).all()):
            return values, walk.found
        asked = self.asked.to(values.device)
        return values[:, asked], {key: value.index_select(1, asked) for key, value in walk.found.items()}


class _Walk:
    """One walk back over a run, in which each of the images has ``repeat`` rows.

    Attributes:
        index: the units. groups: of them, so small that what goes from one stage to the next stays within the budget. found: the
            gradients, by identity of the leaf.
    """

    def __init__(self, shared: SharedRows, run: Run, images: int, repeat: int) -> None:
        self.fields, self.run, self.images, self.repeat = shared.fields, run, images, repeat
        self.index = shared.index.to(run.values[shared.head.node].device)
        self.found = {
            id(leaf): leaf.new_zeros(images, len(self.index), *leaf.shape[1:]) for leaf in run.inputs.values()
        }
        floating = [node for node in shared.head.graph.inputs if node.meta["val"].is_floating_point()]
        self.inputs = [(x, n) for x, n in zip(run.inputs.values(), floating, strict=True) if n in shared.fields]
        most = 0  # bytes between two stages
        for count, stage in zip(shared.counts, shared.stages[1:], strict=False):
            value = run.values[stage.target]
            most = max(most, images * count * value.nbytes // max(len(value), 1))
        channels, of = self.index[:, 0].unique(return_inverse=True)
        count = min(-(-2 * most // shared.budget) or 1, len(channels))
        self.groups = [(of * count // len(channels) == i).nonzero().squeeze(1) for i in range(count)]

    def through(self, stage: _Stage, group: Tensor, before: _Rows | None, last: bool) -> _Rows | None:
        """One stage for some of the units.

        Args:
            before: the rows of the stage before, at this one's target. last: what the run has recorded of the stage is not
                needed again.

        Returns:
            the rows at the value that the stage goes back to; None where these are the inputs.
        """
        run, repeat = self.run, self.repeat
        target, behind = run.values[stage.target], None if stage.next is None else run.values[stage.next]
        row = _rows_of(self.index[group], stage.spacing)
        count = int(row.max()) + 1
        after = None if behind is None else _Rows.empty(behind, self.images, row, count)
        # what gradients are taken with respect to, whose they are, what units see of it, along what they are summed
        seen: list[tuple[Tensor, Tensor, Field, tuple[bool, ...]]] = [
            (use.value, use.leaf, self.fields[use.node], use.repeated) for use in run.uses if use.node in stage.nodes
        ]
        seen += [(leaf, leaf, self.fields[node], ()) for leaf, node in self.inputs if behind is None]
        leaves = [*(value for value, *_ in seen), *([] if behind is None else [behind])]
        for start in range(0, count, repeat):
            mine = ((row >= start) & (row < start + repeat)).nonzero().squeeze(1)
            units = group[mine]
            batch = _Batch(self.index[units], row[mine] - start, self.images, repeat, stage, target)
            cotangent = batch.ones() if before is None else batch.laid(before, mine, self.fields[stage.target])
            kept = not last or start + repeat < count
            gradients = torch.autograd.grad(target, leaves, cotangent, retain_graph=kept, allow_unused=True)
            for (_, leaf, field_, repeated), gradient in zip(seen, gradients, strict=False):
                if gradient is not None:
                    part = batch.gathered(gradient, field_, repeated).reshape(self.images, len(units), *leaf.shape[1:])
                    if id(leaf) not in self.found:
                        self.found[id(leaf)] = part.new_zeros(self.images, len(self.index), *leaf.shape[1:])
                    self.found[id(leaf)].index_add_(1, units, part)
            if after is not None and gradients[-1] is not None:
                after.keep(gradients[-1], start, repeat)
        return after


@dataclass
class _Rows:
    """Rows at a value between two stages.

    Attributes:
        row: the row of each unit. values: (images, 1 + rows, positions, channels), the first row 0.
    """

    row: Tensor
    values: Tensor

    @staticmethod
    def empty(value: Tensor, images: int, row: Tensor, count: int) -> _Rows:
        return _Rows(row, value.new_zeros(images, 1 + count, math.prod(value.shape[2:]), value.shape[1]))

    def keep(self, gradient: Tensor, start: int, repeat: int) -> None:
        """Notes the rows from ``start`` on, of a batch that has ``repeat`` of each image."""
        some = self.values[:, 1 + start : 1 + start + repeat]
        some.copy_(gradient.flatten(2).mT.unflatten(0, (len(some), repeat))[:, : some.shape[1]])


class _Batch:
    """Rows that go backwards at a time, of each image. Units of a row lie on a grid, ``spacing`` apart.

    Attributes:
        index: channel and position of each unit. row: of each. rows: of each image. cell: the units' places on their row's grid.
        target: what the rows go back from.
    """

    def __init__(self, index: Tensor, row: Tensor, images: int, rows: int, stage: _Stage, target: Tensor) -> None:
        self.index, self.row, self.images, self.rows, self.target = index, row, images, rows, target
        spacing = torch.tensor(stage.spacing, device=index.device)
        self.cell = index[:, 1:] // spacing
        first = torch.zeros((rows, len(spacing)), dtype=torch.long, device=index.device)
        first[row] = index[:, 1:] % spacing
        self.grid = [
            start.unsqueeze(1) + step * torch.arange(int(last) + 1, device=index.device)
            for start, step, last in zip(first.unbind(1), stage.spacing, self.cell.amax(0), strict=True)
        ]
        self._axes: dict[tuple[Field, torch.Size], list[Tensor]] = {}

    def ones(self) -> Tensor:
        """(images rows, *target's): one at each unit."""
        cotangent = torch.zeros_like(self.target)  # laid out as it is
        place: Any = (slice(None), self.row, *self.index.unbind(1))
        cotangent.unflatten(0, (self.images, self.rows))[place] = 1.0
        return cotangent

    def laid(self, before: _Rows, units: Tensor, seen: Field) -> Tensor:
        """(images rows, *target's): what each unit sees, out of the row that it was in before."""
        size = self.target.shape[2:]
        axes = self.axes(seen, size)
        table = torch.zeros([self.rows, *(1 + one.shape[1] for one in axes)], dtype=torch.long, device=units.device)
        table[(self.row, *(1 + self.cell).unbind(1))] = 1 + before.row[units]
        place = [torch.arange(self.rows, device=units.device).view(-1, *[1] * len(size))]
        for dim, one in enumerate(axes):  # which unit sees a position; 0: none
            number = (one * torch.arange(1, 1 + one.shape[1], device=units.device).unsqueeze(1)).sum(1)
            place.append(number.view(self.rows, *[-1 if d == dim else 1 for d in range(len(size))]))
        source = table[tuple(place)].flatten(1) * before.values.shape[2]
        source = source + torch.arange(source.shape[1], device=units.device)
        found = before.values.flatten(1, 2).index_select(1, source.flatten())
        return found.view(self.images * self.rows, *size, found.shape[-1]).movedim(-1, 1)

    def gathered(self, gradient: Tensor, seen: Field, repeated: Sequence[bool] = ()) -> Tensor:
        """(images rows, c, *size) -> (images, units, c, *size): of each unit's row what it sees, else 0; summed over the
        dimensions along which a constant is ``repeated``, which stay as ones."""
        size = gradient.shape[2:]
        if repeated and all(repeated):
            return self._sums(gradient, seen).unflatten(2, (-1, *[1] * len(size)))
        own = gradient.unflatten(0, (self.images, self.rows)).index_select(1, self.row)
        for dim, n in enumerate(size):
            mask = seen.seen(dim, self.index[:, 1 + dim], n)
            own.mul_(mask.view(len(mask), *[n if d == dim else 1 for d in range(-1, len(size))]))
        dims = [3 + d for d, same in enumerate(repeated) if same]
        return own.sum(dims, keepdim=True) if dims else own

    def _sums(self, gradient: Tensor, seen: Field) -> Tensor:
        """(images rows, c, *size) -> (images, units, c): over what each unit sees, one dimension after the other."""
        size, cells = gradient.shape[2:], 1
        value, at = gradient.movedim(1, -1), torch.zeros_like(self.row)
        for dim, one in enumerate(self.axes(seen, size)):
            rest = math.prod(size[dim + 1 :]) * gradient.shape[1]
            value = value.reshape(self.images, self.rows, cells, size[dim], rest)
            value = one.to(value.dtype).unsqueeze(1) @ value
            at, cells = at * one.shape[1] + self.cell[:, dim], cells * one.shape[1]
        return value.reshape(self.images, self.rows, cells, gradient.shape[1])[:, self.row, at]

    def axes(self, seen: Field, size: torch.Size) -> list[Tensor]:
        """Per dimension (rows, cells, size): which positions of a value the units there see."""
        if (seen, size) not in self._axes:
            self._axes[seen, size] = [
                seen.seen(d, at, n) for d, (at, n) in enumerate(zip(self.grid, size, strict=True))
            ]
        return self._axes[seen, size]


def shared_rows(graph: Graph, head: Head, units: Sequence[tuple[int, ...]], budget: int = 1 << 30) -> SharedRows | None:
    """The rows that units can share; None where that saves too little, or what they see is not known.

    Args:
        budget: bytes for what goes from one stage to the next.

    >>> import revprop
    >>> graph = revprop.trace(torch.nn.Conv1d(1, 2, 3, padding=1), torch.zeros(1, 1, 30))
    >>> head = revprop.heads.head_of(graph, "output", "unit")
    >>> shared_rows(graph, head, [(0, i) for i in range(30)]).counts
    [3]
    """
    shape = graph.shape(head.node)
    if len(units) < FEW or head.operator is not None or head.shape != shape:
        return None
    fields = receptive_fields(graph, head.node)
    if fields is None:
        return None
    stages = _stages(graph, head.node, fields)
    work = sum(stage.work for stage in stages)
    if sum(stage.rows * stage.work for stage in stages) > WORTH * math.prod(shape[1:]) * work:
        return None
    weights = torch.tensor([math.prod(shape[d + 1 :]) for d in range(len(shape))])
    flat, asked = (torch.tensor(units) * weights).sum(1).unique(return_inverse=True)
    index = torch.stack(torch.unravel_index(flat, shape), 1)
    found = SharedRows(head, fields, stages, index, asked, budget)
    taken = sum(count * stage.work for count, stage in zip(found.counts, stages, strict=True))
    return found if taken <= WORTH * len(units) * work else None


def _rows_of(index: Tensor, spacing: tuple[int, ...]) -> Tensor:
    """The row of each unit (channel, *position); rows of equal positions lie together, as they have the most in common."""
    key = torch.zeros_like(index[:, 0])
    for at, step in zip(index[:, 1:].unbind(1), spacing, strict=True):
        key = key * step + at % step
    return (key * (1 + index[:, 0].max()) + index[:, 0]).unique(return_inverse=True)[1]


def _stages(graph: Graph, head: fx.Node, fields: Mapping[fx.Node, Field]) -> tuple[_Stage, ...]:
    """The way back in the stages that take the least work, for all units of a value."""
    key = ("stages", head)
    if key not in graph.factored:
        ends = [head, *(n for n in bottlenecks(graph, head) if n is not head and n not in graph.inputs), None]
        shortest = [_stage(graph, fields, *pair) for pair in pairwise(ends)]
        best: list[tuple[int, tuple[_Stage, ...]]] = [(0, ())]
        for last in range(len(shortest)):
            ways = []
            stage = shortest[last]
            for first in range(last, -1, -1):
                stage = stage if first == last else shortest[first].joined(stage)
                ways.append((best[first][0] + stage.rows * (stage.work + REGROUPED), first, stage))
            cost, first, stage = min(ways, key=lambda way: way[0])
            best.append((cost, (*best[first][1], stage)))
        graph.factored[key] = best[-1][1]
    return graph.factored[key]


def _stage(graph: Graph, fields: Mapping[fx.Node, Field], target: fx.Node | None, end: fx.Node | None) -> _Stage:
    assert target is not None
    order, sizes = graph.order, graph.shape(next(iter(fields)))[1:]
    stop = -1 if end is None else order[end]
    nodes = [n for n in fields if stop <= order[n] <= order[target]]
    spacing = [max(each) for each in zip(*(fields[n].spacing for n in nodes), strict=True)]
    return _Stage(target, end, tuple(n for n in nodes if n is not end), tuple(map(min, spacing, sizes)))
