"""Linear maps ``z = A a`` and their damped pseudo-inverses: factor once, apply to many batches.

Every map acts on a batch ``(n, ...)``. ``factor(damping)`` returns a :class:`Factor` whose ``solve`` is

    A+_mu r = (A^T A + mu I)^-1 A^T r,   mu = damping * sigma_max(A)^2,

and for ``damping=0`` the Moore-Penrose pseudo-inverse: the least-squares solution of smallest norm, for any rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = [
    "Dense",
    "Diagonal",
    "Factor",
    "Gate",
    "LinearMap",
    "Matrices",
    "Separable",
    "batched_pinv",
]

Tensors = Tensor | tuple[Tensor, ...]
EXACT_EIGENVALUES = 2**28  # stacks of up to this many multiplications get their exact largest eigenvalue


@dataclass(frozen=True)
class Factor:
    """A factored map, ready to solve.

    Attributes:
        solve: residual ``r`` in the output's shape -> correction in the input's shape (a tuple where there are several inputs).
        solver: how: "closed form", "separable", "dense", "fft", "conjugate gradients".
        damping: the absolute mu that was used; 0 for the pseudo-inverse.
        rank: the numerical rank of the map (None where it is not known without a dense factorisation).
        size: (rows, columns) of the map for one sample where they are fixed.
    """

    solve: Callable[[Tensor], Tensors]
    solver: str = "closed form"
    damping: float = 0.0
    rank: int | None = None
    size: tuple[int, int] | None = field(default=None)


class LinearMap(ABC):
    """``z = A a`` with its adjoint and damped pseudo-inverse. ``a`` is a tensor, or several for maps of several inputs."""

    @abstractmethod
    def apply(self, *a: Tensor) -> Tensor:
        """``A a``."""

    @abstractmethod
    def adjoint(self, z: Tensor) -> Tensors:
        """``A^T z``: ``<A a, z> = <a, A^T z>``."""

    @abstractmethod
    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        """Factors the map for ``A+``. ``solver`` ("fft" | "exact") matters to convolutions only."""

    def reads(self, outputs: Tensor | None, like: Tensor) -> tuple[Tensor | None, ...]:
        """At which entries of each input some of the given outputs look: 1 or 0; () or None: at all of them.

        Args:
            outputs: 1 for the outputs asked about, 0 for others; None: all. like: the output.
        """
        return ()


class Dense(LinearMap):
    """``z = W a`` on the last dimension, for any leading dimensions. W: (..., rows, columns) broadcast over the leading ones.

    >>> wide = Dense(torch.tensor([[2.0, 0.0]]))
    >>> wide.factor().solve(torch.tensor([[6.0]]))
    tensor([[3., 0.]])
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()

    def apply(self, *a: Tensor) -> Tensor:
        return (self.weight @ a[0].unsqueeze(-1)).squeeze(-1) if self.weight.dim() > 2 else a[0] @ self.weight.mT

    def adjoint(self, z: Tensor) -> Tensor:
        return (self.weight.mT @ z.unsqueeze(-1)).squeeze(-1) if self.weight.dim() > 2 else z @ self.weight

    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        inverse, mu, rank = batched_pinv(self.weight, damping)
        rows, columns = self.weight.shape[-2:]
        if self.weight.dim() == 2:
            transposed = inverse.mT.contiguous()
            return Factor(lambda r: r @ transposed, "dense", mu, rank, (rows, columns))
        return Factor(lambda r: (inverse @ r.unsqueeze(-1)).squeeze(-1), "dense", mu, rank, (rows, columns))


class Matrices(LinearMap):
    """``z = P a`` along the last but one dimension, a matrix P of its own for each sample (and head), as recorded.

    Damping is relative to each matrix' own largest singular value, so that samples do not depend on each other.

    Args:
        matrices: (..., rows, columns), for a of shape (..., columns, features).
    """

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = matrices.detach()

    def apply(self, *a: Tensor) -> Tensor:
        return self.matrices @ a[0]

    def adjoint(self, z: Tensor) -> Tensor:
        return self.matrices.mT @ z

    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        u, s, vt = torch.linalg.svd(self.matrices, full_matrices=False)
        largest = s.amax(-1, keepdim=True) if s.numel() else s
        floor = torch.finfo(s.dtype).eps * max(self.matrices.shape[-2:], default=1) * largest
        gain = torch.where(s > floor, s / (s.square() + damping * largest.square()), 0.0).unsqueeze(-1)
        return Factor(lambda r: vt.mT @ (gain * (u.mT @ r)), "recorded weights", damping)


class Gate(LinearMap):
    """``z = s * a``, s a factor of its own for each sample, as recorded; damping is relative to its largest entry squared."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale.detach()

    def apply(self, *a: Tensor) -> Tensor:
        return a[0] * self.scale

    def adjoint(self, z: Tensor) -> Tensor:
        return z * self.scale

    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        square = self.scale.square()
        dims = tuple(range(1, square.dim()))
        largest = square.amax(dims, keepdim=True) if square.numel() else square
        kept = square > torch.finfo(square.dtype).eps ** 2 * largest
        bottom = (square + damping * largest).clamp_min(torch.finfo(square.dtype).tiny)
        return Factor(lambda r: r * torch.where(kept, self.scale / bottom, 0.0), "recorded factor", damping)


class Diagonal(LinearMap):
    """``z = d * a``, d broadcast against ``a`` without enlarging it (batch norm in eval mode, a constant factor)."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale.detach()

    def apply(self, *a: Tensor) -> Tensor:
        return a[0] * self.scale

    def adjoint(self, z: Tensor) -> Tensor:
        return z * self.scale

    def reads(self, outputs: Tensor | None, like: Tensor) -> tuple[Tensor | None, ...]:
        return (outputs,)

    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        square = self.scale.square()
        largest = float(square.max()) if square.numel() else 0.0
        mu = damping * largest
        kept = square > largest * torch.finfo(square.dtype).eps ** 2
        inverse = torch.where(kept, self.scale / (square + mu).clamp_min(torch.finfo(square.dtype).tiny), 0.0)
        return Factor(lambda r: r * inverse, "closed form", mu)


class Separable(LinearMap):
    """``A = A_1 (x) A_2 (x) ...``: one small matrix for each of the given dimensions, the same for all channels.

    Average pooling of any window, stride and padding, and interpolation of every mode, are of this form. The singular values
    are products of the axes' own, so the damped pseudo-inverse is exact.

    Args:
        matrices: dimension (negative, counted from the end) -> (out, in) matrix.
    """

    def __init__(self, matrices: dict[int, Tensor]) -> None:
        self.matrices = matrices

    def apply(self, *a: Tensor) -> Tensor:
        return _along_axes(a[0], self.matrices)

    def adjoint(self, z: Tensor) -> Tensor:
        return _along_axes(z, {dim: m.mT for dim, m in self.matrices.items()})

    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        parts = {dim: torch.linalg.svd(m, full_matrices=False) for dim, m in self.matrices.items()}
        dims = sorted(parts)
        values = torch.ones(
            (), dtype=next(iter(self.matrices.values())).dtype, device=next(iter(self.matrices.values())).device
        )
        for dim in dims:
            values = values.unsqueeze(-1) * parts[dim][1]
        gain, mu, rank = _filter(values.flatten(), damping, max(max(m.shape) for m in self.matrices.values()))
        gain = gain.view(values.shape)
        missing = range(dims[0], 0)
        # the filter's axes stand where the map's do; dimensions between them that the map leaves alone broadcast
        gain = gain.view([parts[d][1].shape[0] if d in parts else 1 for d in missing])
        left = {dim: parts[dim][0].mT for dim in dims}
        right = {dim: parts[dim][2].mT for dim in dims}
        rows = math.prod(m.shape[0] for m in self.matrices.values())
        columns = math.prod(m.shape[1] for m in self.matrices.values())
        if mu == 0.0 and len(dims) > 0 and bool((gain > 0).all()):  # full rank: the pseudo-inverse is separable, too
            inverses = {dim: (right[dim] / parts[dim][1]) @ left[dim] for dim in dims}
            return Factor(lambda r: _along_axes(r, inverses), "closed form", 0.0, rank, (rows, columns))
        return Factor(lambda r: _along_axes(_along_axes(r, left) * gain, right), "separable", mu, rank, (rows, columns))


# -- small dense algebra shared by the maps ----------------------------------------------------------------------------------


def batched_pinv(matrices: Tensor, damping: float = 0.0) -> tuple[Tensor, float, int | None]:
    """Damped pseudo-inverses of a stack of matrices that are the blocks of one map (real or complex).

    ``(M^H M + mu I)^-1 M^H`` with ``mu = damping * s^2``, s the largest singular value over the whole stack; for damping 0 the
    pseudo-inverse, singular values below ``eps * max(rows, columns) * s`` taken as zero.

    Args:
        matrices: (..., rows, columns).
        damping: relative to the largest singular value squared.

    Returns:
        the inverses (..., columns, rows), the absolute mu, and the rank summed over the stack (None where not computed).

    >>> inverse, mu, rank = batched_pinv(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    >>> inverse[0, 0].item(), rank
    (0.3333333432674408, 1)
    """
    rows, columns = matrices.shape[-2:]
    if matrices.numel() == 0:
        return matrices.new_zeros(*matrices.shape[:-2], columns, rows), 0.0, 0
    if min(rows, columns) == 1:
        square = matrices.abs().square().sum((-2, -1), keepdim=True)
        gain, mu, rank = _filter(square.sqrt().flatten(), damping, max(rows, columns))
        over = gain.view_as(square) / square.sqrt().clamp_min(torch.finfo(square.dtype).tiny)
        return matrices.mH * over, mu, rank
    if damping == 0.0 or matrices.dim() == 2 or min(rows, columns) <= 4:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        gain, mu, rank = _filter(s.flatten(), damping, max(rows, columns))
        return (vh.mH * gain.view_as(s).unsqueeze(-2)) @ u.mH, mu, rank
    gram = matrices @ matrices.mH if rows <= columns else matrices.mH @ matrices
    mu = damping * _largest_eigenvalue(gram)
    if mu == 0.0:  # nothing but zeros
        return batched_pinv(matrices)
    small = gram.shape[-1]
    shifted = gram + mu * torch.eye(small, dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(shifted)
    if rows <= columns:
        return torch.cholesky_solve(matrices, factor).mH, mu, None
    return torch.cholesky_solve(matrices.mH.contiguous(), factor), mu, None


def _filter(s: Tensor, damping: float, size: int) -> tuple[Tensor, float, int]:
    """Gains ``s / (s^2 + mu)`` for singular values s (zero below the rank threshold), the absolute mu, and the rank."""
    largest = float(s.max()) if s.numel() else 0.0
    mu = damping * largest**2
    kept = s > torch.finfo(s.dtype).eps * size * largest
    gain = torch.where(kept, s / (s.square() + mu).clamp_min(torch.finfo(s.dtype).tiny), 0.0)
    return gain, mu, int(kept.sum())


def _largest_eigenvalue(gram: Tensor) -> float:
    """The largest eigenvalue over a stack of Hermitian positive matrices.

    Small stacks exactly: a block's largest eigenvalue is at most its Frobenius norm, so blocks whose norm is below one found
    already are skipped. Large stacks by the power method from a fixed start (within a percent or so).
    """
    blocks = gram.reshape(-1, *gram.shape[-2:])
    if blocks.numel() * blocks.shape[-1] > EXACT_EIGENVALUES and len(blocks) > 1:
        start = torch.linspace(1.0, 2.0, blocks.shape[-1], dtype=gram.real.dtype, device=gram.device)
        v, best = (start + torch.sin(37.0 * start)).to(gram.dtype).view(1, -1, 1).expand(len(blocks), -1, 1), 0.0
        for _ in range(30):
            v = blocks @ (v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny))
            best = float(torch.linalg.vector_norm(v, dim=1).max())
        return best
    norms, order = torch.linalg.matrix_norm(blocks).sort(descending=True)
    best, first, count = 0.0, 0, 4
    while first < len(order) and float(norms[first]) > best:
        best = max(best, float(torch.linalg.eigvalsh(blocks[order[first : first + count]]).max()))
        first, count = first + count, 2 * count
    return best


def _along_axes(x: Tensor, matrices: dict[int, Tensor]) -> Tensor:
    for dim, matrix in matrices.items():
        x = (
            x @ matrix.mT
            if dim == -1
            else (matrix @ x if dim == -2 else (x.transpose(dim, -1) @ matrix.mT).transpose(dim, -1))
        )
    return x
