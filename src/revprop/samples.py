"""Where the samples of a traced value lie: the one dimension that is the batch, or a multiple of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layout", "Samples"]


@dataclass(frozen=True)
class Samples:
    """Samples lie along dimension ``axis``, ``times`` neighbouring entries of it belong to each.

    >>> heads = Samples(0, 4)                                # (n * 4, 5): four rows to a sample
    >>> heads.rows(torch.zeros(8, 5)).shape, heads.values(torch.zeros(2, 20), (8, 5)).shape
    (torch.Size([2, 20]), torch.Size([8, 5]))
    """

    axis: int
    times: int = 1

    @staticmethod
    def of(value: Any) -> Samples | None:
        """Of a traced value; None where none of its dimensions is the batch, or more than one, or the value is no tensor."""
        if not isinstance(value, Tensor):
            return None
        sizes: list[Any] = list(value.shape)
        found = [(i, size.node.expr) for i, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
        if len(found) != 1:
            return None
        axis, expression = found[0]
        symbols = expression.free_symbols
        if len(symbols) != 1:
            return None
        times = expression.coeff(next(iter(symbols)))
        return Samples(axis, int(times)) if times.is_Integer and expression == times * next(iter(symbols)) else None

    def count(self, value: Tensor) -> int:
        """The number of samples."""
        return value.shape[self.axis] // self.times

    def shape(self, value: Any, n: int) -> tuple[int, ...]:
        """The shape of a traced value for n samples."""
        return tuple(n * self.times if i == self.axis else int(size) for i, size in enumerate(value.shape))

    def rows(self, value: Tensor) -> Tensor:
        """(n, everything else)."""
        return (
            value.movedim(self.axis, 0).reshape(self.count(value), -1)
            if value.numel()
            else value.new_zeros(self.count(value), value.numel() // max(self.count(value), 1))
        )

    def apart(self, value: Tensor) -> Tensor:
        """(n, times, ...): the samples first."""
        return value.movedim(self.axis, 0).unflatten(0, (self.count(value), self.times))

    def together(self, apart: Tensor) -> Tensor:
        """What :meth:`apart` took apart."""
        return apart.flatten(0, 1).movedim(0, self.axis)

    def take(self, value: Tensor, index: Tensor) -> Tensor:
        """Some of the samples."""
        return self.together(self.apart(value)[index])

    def values(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A value of the given shape (its samples as many as there are rows) from its rows."""
        moved = [shape[self.axis], *shape[: self.axis], *shape[self.axis + 1 :]]
        return rows.reshape(moved).movedim(0, self.axis)


@dataclass(frozen=True)
class Layout:
    """Where the samples of the values of one call lie; None: the value is the same for all samples.

    Attributes:
        moving: of each input that moves. held: of each other value. output: of the output.
    """

    moving: tuple[Samples | None, ...] = ()
    held: tuple[Samples | None, ...] = ()
    output: Samples | None = None
