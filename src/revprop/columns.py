"""An affine operator as a linear function of its own weight: what its columns are.

For every position of the output, ``z = W u + b`` with ``u`` a column: the input of a linear layer, a patch of a convolution's
input. Refitting a weight to wanted outputs is a least-squares problem in these columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from revprop.convolution import Convolution
from revprop.linear_map import Dense, LinearMap

__all__ = ["Columns", "columns_of"]


@dataclass(frozen=True)
class Columns:
    """The columns of a dense map or a convolution, and the way back to its weight.

    Attributes:
        map: the operator's linear map.
        groups: so many independent problems (a grouped convolution's).
        outputs, features: sizes of one problem's ``W``.
    """

    map: Dense | Convolution
    groups: int
    outputs: int
    features: int

    @property
    def positions(self) -> int:
        """How many columns one sample of a convolution gives; 1 for a dense map, whose leading dimensions all count as samples."""
        if isinstance(self.map, Dense):
            return 1
        return math.prod((self.map.wide if self.map.transposed else self.map.narrow)[1:])

    def of(self, a: Tensor) -> Tensor:
        """The columns of an input (n, ...), as (groups, n * positions, features)."""
        if isinstance(self.map, Dense):
            return a.flatten(0, -2)[None]
        dims, dilation = self.map.dims, self.map.dilation
        kernel = self.map.weight.shape[2:]
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if self.map.transposed:
            # the narrow side spread out on the wide one, zeros between; the window looks backwards from each position
            spread = a.new_zeros(*a.shape[:2], *self.map.padded)
            steps = [slice(0, (o - 1) * s + 1, s) for o, s in zip(self.map.narrow[1:], self.map.stride, strict=True)]
            spread[(slice(None), slice(None), *steps)] = a
            a, before = spread, [(r, 0) for r in reach]
            stride = (1,) * dims
        else:
            before, stride = list(self.map.padding), self.map.stride
        if any(p for pair in before for p in pair):
            a = F.pad(a, [p for pair in reversed(before) for p in pair])
        for i in range(dims):
            a = a.unfold(2 + i, reach[i] + 1, stride[i])
        window = [slice(None, None, d) for d in dilation]
        a = a[(..., *window)]  # type: ignore[index]  # the stubs know no mixed tuples
        if self.map.transposed:
            a = a.flip(tuple(range(-dims, 0)))
            a = a[(slice(None), slice(None), *self._inside())]
        n, channels = a.shape[:2]
        a = a.reshape(n, self.groups, channels // self.groups, self.positions, math.prod(kernel))
        return a.permute(1, 0, 3, 2, 4).reshape(self.groups, n * self.positions, self.features)

    def rows(self, z: Tensor) -> Tensor:
        """Outputs (n, ...) in the order of the columns, as (groups, n * positions, outputs)."""
        if isinstance(self.map, Dense):
            return z.flatten(0, -2)[None]
        split = z.reshape(len(z), self.groups, self.outputs, self.positions)
        return split.permute(1, 0, 3, 2).reshape(self.groups, len(z) * self.positions, self.outputs)

    def weight(self, matrix: Tensor) -> Tensor:
        """A matrix (groups, outputs, features) in the layout of the operator's weight."""
        if isinstance(self.map, Dense):
            return matrix[0]
        kernel = self.map.weight.shape[2:]
        split = matrix.view(self.groups, self.outputs, self.features // math.prod(kernel), *kernel)
        if self.map.transposed:
            split = split.transpose(1, 2)
        return split.reshape(self.map.weight.shape)

    def _inside(self) -> list[slice]:
        assert isinstance(self.map, Convolution)
        return [slice(lo, lo + n) for (lo, _), n in zip(self.map.padding, self.map.wide[1:], strict=True)]


def columns_of(map: LinearMap) -> Columns | None:
    """The columns of a map, or None where it is no dense map or convolution.

    >>> import torch
    >>> columns = columns_of(Dense(torch.ones(2, 3)))
    >>> columns.of(torch.zeros(5, 3)).shape, columns.outputs
    (torch.Size([1, 5, 3]), 2)
    """
    if isinstance(map, Dense):
        outputs, features = map.weight.shape
        return Columns(map, 1, outputs, features)
    if isinstance(map, Convolution):
        narrow, wide_per_group, *kernel = map.weight.shape
        width = math.prod(kernel)
        if map.transposed:
            return Columns(map, map.groups, wide_per_group, narrow // map.groups * width)
        return Columns(map, map.groups, narrow // map.groups, wide_per_group * width)
    return None
