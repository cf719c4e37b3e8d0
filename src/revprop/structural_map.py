"""Linear maps that move, add and repeat entries without learned weights: copies, sums, means, concatenations.

Well conditioned by construction, so they ignore damping (:class:`Broadcast` with a scale apart).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from revprop.linear_map import Factor, LinearMap

__all__ = ["Broadcast", "Concatenate", "Copy", "Reduce", "Sum"]


class Copy(LinearMap):
    """Every output is a copy of one input, or a constant: reshape, permute, slice, pad, flip, roll, expand, repeat.

    ``A^T A`` is then diagonal and holds how often each input is copied, so ``A+ = diag(1/copies) A^T``, exactly; inputs that
    are never copied keep their recorded value.

    Args:
        forward: the linear part of the operator (constants left out), batch in, batch out.
        backward: its adjoint, given the output's tensor.
        copies: how often each input is copied, broadcast to the input's shape; None: each once.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor], copies: Tensor | None = None
    ) -> None:
        self._forward, self._backward, self.copies = forward, backward, copies

    def apply(self, *a: Tensor) -> Tensor:
        return self._forward(a[0])

    def adjoint(self, z: Tensor) -> Tensor:
        return self._backward(z)

    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        if self.copies is None or not bool((self.copies > 1).any()):
            return Factor(self._backward)
        share = 1.0 / self.copies.clamp_min(1)
        return Factor(lambda r: self._backward(r) * share)

    def reads(self, outputs: Tensor | None, like: Tensor) -> tuple[Tensor | None, ...]:
        if outputs is not None:
            return ((self._backward(outputs) > 0).to(like),)
        if self.copies is None or not bool((self.copies == 0).any()):
            return (None,)
        return ((self._backward(torch.ones_like(like)) > 0).to(like),)


class Broadcast(LinearMap):
    """``z = scale * a`` where ``a`` is expanded along the dimensions in which its size is 1 and the output's is not.

    Args:
        shape: the input's shape behind the batch; out_shape: the output's.
        scale: a number or a tensor that broadcasts against the output.
    """

    def __init__(self, shape: Sequence[int], out_shape: Sequence[int], scale: Tensor) -> None:
        self.padded = (1,) * (len(out_shape) - len(shape)) + tuple(shape)
        self.shape, self.out_shape, self.scale = tuple(shape), tuple(out_shape), scale.detach()
        self.dims = tuple(
            i - len(out_shape) for i, (p, o) in enumerate(zip(self.padded, out_shape, strict=True)) if p != o
        )

    def apply(self, *a: Tensor) -> Tensor:
        n = a[0].shape[0]
        return (a[0].reshape(n, *self.padded) * self.scale).expand(n, *self.out_shape)

    def adjoint(self, z: Tensor) -> Tensor:
        weighted = z * self.scale
        return (weighted.sum(self.dims, keepdim=True) if self.dims else weighted).reshape(z.shape[0], *self.shape)

    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        square = self.scale.square().expand(self.out_shape)
        square = (square.sum(self.dims, keepdim=True) if self.dims else square).reshape(self.shape)
        largest = float(square.max()) if square.numel() else 0.0
        mu = damping * largest
        kept = square > largest * torch.finfo(square.dtype).eps ** 2
        inverse = torch.where(kept, 1.0 / (square + mu).clamp_min(torch.finfo(square.dtype).tiny), 0.0)
        return Factor(lambda r: self.adjoint(r) * inverse, "closed form", mu)


class Reduce(LinearMap):
    """``z = scale * (sum of a over some dimensions)``: the mean and the sum. The pseudo-inverse spreads evenly.

    Args:
        shape: the input's shape behind the batch; dims: the dimensions summed, negative; keepdim: as in torch.
    """

    def __init__(self, shape: Sequence[int], dims: Sequence[int], scale: float, keepdim: bool) -> None:
        self.shape, self.dims, self.scale = tuple(shape), tuple(dims), scale
        self.kept = tuple(1 if i - len(shape) in self.dims else s for i, s in enumerate(shape))
        self.out = self.kept if keepdim else tuple(s for i, s in enumerate(shape) if i - len(shape) not in self.dims)

    def apply(self, *a: Tensor) -> Tensor:
        return (a[0].sum(self.dims, keepdim=True) * self.scale).reshape(a[0].shape[0], *self.out)

    def adjoint(self, z: Tensor) -> Tensor:
        return (z * self.scale).reshape(z.shape[0], *self.kept).expand(z.shape[0], *self.shape)

    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        count = math.prod(self.shape[d] for d in self.dims)
        share = 1.0 / (count * self.scale**2) if count and self.scale else 0.0
        return Factor(lambda r: self.adjoint(r * share))


class Sum(LinearMap):
    """``z = s_1 a_1 + s_2 a_2``: residual additions, with broadcasting behind the batch dimension.

    With m_i the number of outputs that share one entry of a_i and P_i the mean over them, ``A A^T = s_1^2 m_1 P_1 + s_2^2 m_2
    P_2``; the projections commute, so the pseudo-inverse is closed form. For equal shapes and s = 1 each side gets r / 2.
    """

    def __init__(
        self, shapes: tuple[Sequence[int], Sequence[int]], out_shape: Sequence[int], scales: tuple[float, float]
    ) -> None:
        unit = torch.ones(())
        self.parts = tuple(Broadcast(shape, out_shape, unit) for shape in shapes)
        self.scales = scales
        self.copies = tuple(math.prod(out_shape[d] for d in part.dims) for part in self.parts)

    def apply(self, *a: Tensor) -> Tensor:
        return self.scales[0] * self.parts[0].apply(a[0]) + self.scales[1] * self.parts[1].apply(a[1])

    def adjoint(self, z: Tensor) -> tuple[Tensor, ...]:
        return tuple(scale * part.adjoint(z) for scale, part in zip(self.scales, self.parts, strict=True))

    def reads(self, outputs: Tensor | None, like: Tensor) -> tuple[Tensor | None, ...]:
        if outputs is None:
            return (None, None)
        return tuple((part.adjoint(outputs) > 0).to(like) for part in self.parts)

    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        first, second = (s * s * m for s, m in zip(self.scales, self.copies, strict=True))
        dims = tuple(part.dims for part in self.parts)

        def solve(r: Tensor) -> tuple[Tensor, ...]:
            if not dims[0] and not dims[1]:
                return tuple(r * (s / (first + second)) if first + second else torch.zeros_like(r) for s in self.scales)
            one = r.mean(dims[0], keepdim=True) if dims[0] else r
            two = r.mean(dims[1], keepdim=True) if dims[1] else r
            both = one.mean(dims[1], keepdim=True) if dims[1] else one
            y = both / (first + second) if first + second else torch.zeros_like(both)
            y = y + ((one - both) / first if first else 0) + ((two - both) / second if second else 0)
            return self.adjoint(y.expand_as(r))

        return Factor(solve)


class Concatenate(LinearMap):
    """Concatenation of several inputs (and constants) along one dimension behind the batch: ``A`` is orthogonal.

    Args:
        dim: the dimension, negative.
        spans: for each input the (start, length) it fills.
        total: the size of the output along ``dim``. new: whether the inputs have no such dimension yet (stacking).
    """

    def __init__(self, dim: int, spans: Sequence[tuple[int, int]], total: int, new: bool = False) -> None:
        self.dim, self.spans, self.total, self.new = dim, tuple(spans), total, new

    def apply(self, *a: Tensor) -> Tensor:
        parts = [part.unsqueeze(self.dim) if self.new else part for part in a]
        shape = list(parts[0].shape)
        shape[self.dim] = self.total
        z = a[0].new_zeros(shape)
        for part, (start, length) in zip(parts, self.spans, strict=True):
            z.narrow(self.dim, start, length).copy_(part)
        return z

    def adjoint(self, z: Tensor) -> tuple[Tensor, ...]:
        parts = (z.narrow(self.dim, start, length) for start, length in self.spans)
        return tuple(part.squeeze(self.dim) if self.new else part for part in parts)

    def reads(self, outputs: Tensor | None, like: Tensor) -> tuple[Tensor | None, ...]:
        return self.adjoint(outputs) if outputs is not None else ()

    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        return Factor(self.adjoint)
