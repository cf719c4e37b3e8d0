"""Sliding windows over an image: which input positions each output of a pooling looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Windows"]

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class Windows:
    """Windows of a pooling over ``(n, c, *size)``.

    Args:
        size: the image, e.g. (h, w); out: the output's size.
        kernel, stride, padding, dilation: per dimension.
        ceil_mode: as in torch.
    """

    def __init__(self, size: Sequence[int], out: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool = False) -> None:
        self.size, self.out = tuple(size), tuple(out)
        self.kernel, self.stride = tuple(kernel), tuple(stride)
        self.padding, self.dilation, self.ceil_mode = tuple(padding), tuple(dilation), ceil_mode
        self.positions = math.prod(self.size)

    @cached_property
    def index(self) -> Tensor:
        """(windows, window size): flat input positions; the number of positions stands for padding."""
        axes = [torch.arange(o).view(-1, 1) * s - p + torch.arange(k) * d for o, k, s, p, d in
                zip(self.out, self.kernel, self.stride, self.padding, self.dilation, strict=True)]
        flat, outside = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool)
        for axis, size in zip(axes, self.size, strict=True):
            flat = (flat[:, None, :, None] * size + axis[None, :, None, :].clamp(0, size - 1)).flatten(2).flatten(0, 1)
            bad = (axis < 0) | (axis >= size)
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

    @cached_property
    def _tiled(self) -> tuple[int, ...] | None:
        """The repeat per dimension where the windows tile the image exactly, the common and fast case."""
        plain = self.kernel == self.stride and not any(self.padding) and set(self.dilation) == {1}
        covered = all(o * k == s for o, k, s in zip(self.out, self.kernel, self.size, strict=True))
        return self.kernel if plain and covered else None

    def argmax(self, x: Tensor) -> Tensor:
        """(n, c, *size) -> (n, c, windows): flat position of the largest entry of each window (the first of equals)."""
        if x.numel() == 0:
            return torch.zeros(*x.shape[:2], len(self.index), dtype=torch.long, device=x.device)
        _, found = _MAX_POOL[len(self.size)](x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode, True)
        return found.flatten(2)

    def spread(self, z: Tensor, fill: float) -> Tensor:
        """Copies each window's value to its positions (the mean where windows overlap); ``fill`` where no window looks."""
        if self._tiled is not None:
            for dim, times in enumerate(self._tiled):
                z = z.repeat_interleave(times, dim=2 + dim)
            return z
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
        index = self.index.to(x.device)
        lead = x.shape[:2]
        goal, flat = target.flatten(2), x.flatten(2)
        around = index.flatten().expand(*lead, -1)
        cap = flat.new_full((*lead, self.positions + 1), math.inf).scatter_reduce_(
            2, around, goal.repeat_interleave(index.shape[1], dim=2), "amin")
        cut = torch.minimum(flat, cap[..., : self.positions])
        padding = (index == self.positions).expand(*lead, -1, -1)
        values = F.pad(cut, (0, 1), value=-math.inf)[..., index]
        room = cap[..., index].masked_fill(padding, -math.inf)
        wanting = values.amax(-1) < goal if values.numel() else torch.zeros_like(goal, dtype=torch.bool)
        eligible = room >= goal.unsqueeze(-1)
        none = ~eligible.any(-1, keepdim=True)
        choice = torch.where(none, room, values.masked_fill(~eligible, -math.inf)).max(-1, keepdim=True).indices \
            if values.numel() else goal.unsqueeze(-1).long()
        at = index.expand(*lead, -1, -1).gather(-1, choice).squeeze(-1)
        level = torch.minimum(goal, room.gather(-1, choice).squeeze(-1))
        at = torch.where(wanting, at, self.positions)
        out = F.pad(cut, (0, 1), value=-math.inf).scatter_reduce_(2, at, level, "amax")[..., : self.positions]
        return (out - flat).view(x.shape)

