"""Windows over an image: which input positions each output of a pooling looks at, and the nearest preimage of max-pooling."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SlidingWindows", "Spans", "Windows"]

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class Windows(ABC):
    """Windows of a pooling over ``(n, c, *size)``: in each dimension a stretch of positions for each output.

    Args:
        size: the image, e.g. (h, w); out: the output's size.
    """

    def __init__(self, size: Sequence[int], out: Sequence[int]) -> None:
        self.size, self.out = tuple(size), tuple(out)
        self.positions = math.prod(self.size)

    @abstractmethod
    def _stretches(self) -> list[tuple[Tensor, Tensor]]:
        """Per dimension (out, longest window): positions, and which of them are none."""

    @abstractmethod
    def argmax(self, x: Tensor) -> Tensor:
        """(n, c, *size) -> (n, c, windows): flat position of the largest entry of each window (the first of equals)."""

    @abstractmethod
    def _cut_and_raised(self, x: Tensor, target: Tensor) -> Tensor:
        """The input that :meth:`nearest` is about, for overlapping windows."""

    @cached_property
    def index(self) -> Tensor:
        """(windows, window size): flat input positions; the number of positions stands for padding."""
        flat, outside = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool)
        for (axis, bad), size in zip(self._stretches(), self.size, strict=True):
            flat = (flat[:, None, :, None] * size + axis[None, :, None, :].clamp(0, size - 1)).flatten(2).flatten(0, 1)
            outside = (outside[:, None, :, None] | bad[None, :, None, :]).flatten(2).flatten(0, 1)
        return flat.masked_fill(outside, self.positions)

    @cached_property
    def counts(self) -> Tensor:
        """(positions,): in how many windows each position lies."""
        return torch.bincount(self.index.flatten(), minlength=self.positions + 1)[: self.positions]

    @cached_property
    def disjoint(self) -> bool:
        """Whether no position lies in two windows."""
        return bool((self.counts <= 1).all())

    @cached_property
    def owner(self) -> Tensor:
        """(positions,): the window of each position, for disjoint windows; the number of windows where there is none."""
        owner = torch.full((self.positions + 1,), len(self.index))
        owner[self.index.flatten()] = torch.arange(len(self.index)).repeat_interleave(self.index.shape[1])
        return owner[: self.positions]

    @property
    def tiled(self) -> tuple[int, ...] | None:
        """The repeat per dimension where the windows tile the image exactly, the common and fast case."""
        return None

    def spread(self, z: Tensor, fill: float) -> Tensor:
        """Copies each window's value to its positions (the mean where windows overlap); ``fill`` where no window looks."""
        if self.tiled is not None:
            apart, times = z, [*z.shape[:2]]
            for dim, (size, copies) in enumerate(zip(z.shape[2:], self.tiled, strict=True)):
                apart = apart.unsqueeze(3 + 2 * dim)
                times += [size, copies]
            return apart.expand(times).reshape(*z.shape[:2], *self.size)
        shape = (*z.shape[:2], *self.size)
        if self.disjoint:
            values = F.pad(z.flatten(2), (0, 1), value=fill)
            return values.index_select(2, self.owner.to(z.device)).view(shape)
        index = self.index.to(z.device)
        total = z.new_zeros(*z.shape[:2], self.positions + 1)
        total.index_add_(2, index.flatten(), z.flatten(2).repeat_interleave(index.shape[1], dim=2))
        counts = self.counts.to(z.device)
        mean = total[..., : self.positions] / counts.clamp_min(1)
        return torch.where(counts > 0, mean, fill).view(shape)

    def nearest(self, x: Tensor, target: Tensor) -> Tensor:
        """The correction of smallest norm that makes each window's largest entry its target.

        Disjoint windows: entries above the target are cut to it, or the largest is raised to it; exact. Overlapping windows:
        entries are cut to the smallest target around them, then each window still below its target raises the largest of the
        entries that may reach it. Exact where targets of overlapping windows differ and a solution exists; where none
        exists the entry with the most room is raised as far as its neighbours allow, and the certificate shows the rest.

        Args:
            x: recorded input (n, c, *size); target: wanted output (n, c, *out).
        """
        if self.disjoint:
            cut = (self.spread(target, math.inf) - x).clamp_max_(0.0)
            at = self.argmax(x)
            raised = (target.flatten(2) - x.flatten(2).gather(2, at)).clamp_min_(0.0)
            return cut.flatten(2).scatter_add_(2, at, raised).view(x.shape)
        if x.numel() == 0 or target.numel() == 0:
            return torch.zeros_like(x)
        return self._cut_and_raised(x, target) - x


class SlidingWindows(Windows):
    """Windows of one size that slide over the image.

    Args:
        size, out: as for all windows. kernel, stride, padding, dilation: per dimension. ceil_mode: as in torch.

    >>> SlidingWindows((4,), (2,), (2,), (2,), (0,), (1,)).index
    tensor([[0, 1],
            [2, 3]])
    """

    def __init__(
        self,
        size: Sequence[int],
        out: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(size, out)
        self.kernel, self.stride = tuple(kernel), tuple(stride)
        self.padding, self.dilation, self.ceil_mode = tuple(padding), tuple(dilation), ceil_mode

    def _stretches(self) -> list[tuple[Tensor, Tensor]]:
        axes = [
            torch.arange(o).view(-1, 1) * s - p + torch.arange(k) * d
            for o, k, s, p, d in zip(self.out, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        ]
        return [(axis, (axis < 0) | (axis >= size)) for axis, size in zip(axes, self.size, strict=True)]

    @cached_property
    def tiled(self) -> tuple[int, ...] | None:
        plain = self.kernel == self.stride and not any(self.padding) and set(self.dilation) == {1}
        covered = all(o * k == s for o, k, s in zip(self.out, self.kernel, self.size, strict=True))
        return self.kernel if plain and covered else None

    def argmax(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return torch.zeros(*x.shape[:2], len(self.index), dtype=torch.long, device=x.device)
        _, found = _MAX_POOL[len(self.size)](
            x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode, True
        )
        return found.flatten(2)

    def _cut_and_raised(self, x: Tensor, target: Tensor) -> Tensor:
        inside: tuple[Any, ...] = (..., *(slice(p, p + size) for p, size in zip(self.padding, self.size, strict=True)))
        # what padding may rise to: nothing
        cap, values = (self._padded(target) for _ in range(2))
        cap[inside] = math.inf
        views: list[tuple[Any, ...]] = [(..., *place) for place in self._offsets()]
        for view in views:  # the smallest target among the windows around each position
            cap[view].clamp_(max=target)
        values[inside] = torch.minimum(x, cap[inside])
        pooled = _MAX_POOL[len(self.size)](
            values[inside], self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        wanting = pooled < target
        best, choice = torch.full_like(target, -math.inf), torch.full_like(target, -1, dtype=torch.int16)
        for j, view in enumerate(views):
            value = torch.where(cap[view] >= target, values[view], -math.inf)
            choice.masked_fill_(value > best, j)
            torch.maximum(best, value, out=best)
        choice.masked_fill_(~wanting, -1)
        for j, view in enumerate(views):
            values[view].copy_(torch.where(choice == j, target, values[view]))
        stuck = (wanting & (choice < 0)).nonzero()
        if len(stuck):
            self._raise_as_far(values, cap, views, stuck)
        return values[inside]

    @staticmethod
    def _raise_as_far(values: Tensor, cap: Tensor, views: Sequence[tuple[Any, ...]], stuck: Tensor) -> None:
        """Windows whose target no entry may reach: the entry with the most room takes it."""
        at = tuple(stuck.unbind(1))
        room = torch.stack([cap[view][at] for view in views])
        level, choice = room.max(0)
        for j in range(len(views)):
            mine = tuple(index[choice == j] for index in at)
            view = values[views[j]]
            view[mine] = torch.maximum(view[mine], level[choice == j])

    def _offsets(self) -> Iterator[tuple[slice, ...]]:
        """For each entry of a window, where it lies in the padded image for all windows at once."""
        for offset in itertools.product(*(range(k) for k in self.kernel)):
            yield tuple(
                slice(i * d, i * d + (o - 1) * s + 1, s)
                for i, o, s, d in zip(offset, self.out, self.stride, self.dilation, strict=True)
            )

    def _padded(self, like: Tensor) -> Tensor:
        reach = [
            (o - 1) * s + d * (k - 1) + 1
            for o, k, s, d in zip(self.out, self.kernel, self.stride, self.dilation, strict=True)
        ]
        room = [max(r, size + p) for r, size, p in zip(reach, self.size, self.padding, strict=True)]
        return like.new_full((*like.shape[:2], *room), -math.inf)


class Spans(Windows):
    """Windows from a start up to a stop, of any lengths: adaptive pooling where its size does not divide the image's.

    Args:
        spans: per dimension the (start, stop) of each output, inside the image and not empty.

    >>> Spans((5,), [[(0, 2), (1, 4), (3, 5)]]).index            # 5 stands for no position
    tensor([[0, 1, 5],
            [1, 2, 3],
            [3, 4, 5]])
    """

    def __init__(self, size: Sequence[int], spans: Sequence[Sequence[tuple[int, int]]]) -> None:
        super().__init__(size, [len(one) for one in spans])
        self.spans = tuple(tuple(one) for one in spans)

    @staticmethod
    def adaptive(size: Sequence[int], out: Sequence[int]) -> Spans:
        """Window o runs from floor(o h / out) to ceil((o + 1) h / out)."""
        return Spans(
            size, [[(i * h // o, -(-(i + 1) * h // o)) for i in range(o)] for h, o in zip(size, out, strict=True)]
        )

    def _stretches(self) -> list[tuple[Tensor, Tensor]]:
        found = []
        for one in self.spans:
            bounds = torch.tensor(one, dtype=torch.long).view(-1, 2, 1)
            longest = max((stop - start for start, stop in one), default=0)
            axis = bounds[:, 0] + torch.arange(longest)
            found.append((axis, axis >= bounds[:, 1]))
        return found

    def argmax(self, x: Tensor) -> Tensor:
        index = self.index.to(x.device)
        seen = F.pad(x.flatten(2), (0, 1), value=-math.inf)[..., index]
        return _pick(index, seen.argmax(-1)) if seen.numel() else seen.new_zeros(seen.shape[:-1], dtype=torch.long)

    def _cut_and_raised(self, x: Tensor, target: Tensor) -> Tensor:
        index, goal = self.index.to(x.device), target.flatten(2)
        cap = x.new_full((*x.shape[:2], self.positions + 1), math.inf)
        spread = goal.repeat_interleave(index.shape[1], dim=2)
        cap.scatter_reduce_(2, index.flatten().expand(spread.shape), spread, "amin")
        cap[..., -1] = -math.inf  # what is no position may rise to nothing
        values = torch.minimum(F.pad(x.flatten(2), (0, 1)), cap)
        seen, room = values[..., index], cap[..., index]
        best, choice = torch.where(room >= goal.unsqueeze(-1), seen, -math.inf).max(-1)
        most, widest = room.max(-1)
        reached = best > -math.inf
        level = torch.where(seen.amax(-1) < goal, torch.where(reached, goal, most), -math.inf)
        values.scatter_reduce_(2, _pick(index, torch.where(reached, choice, widest)), level, "amax")
        return values[..., :-1].view(x.shape)


def _pick(index: Tensor, choice: Tensor) -> Tensor:
    """The chosen entry of each window: (windows, window size), (n, c, windows) -> (n, c, windows)."""
    return index.expand(*choice.shape, -1).gather(-1, choice.unsqueeze(-1)).squeeze(-1)
