"""Krylov solvers for a batch of systems at once, one per sample: conjugate gradients, least squares, the largest singular value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_gradients", "largest_square", "least_squares", "least_squares_and_dual"]

Operator = Callable[[Tensor], Tensor]


def conjugate_gradients(
    operator: Operator, b: Tensor, precondition: Operator = lambda r: r, limit: int = 1000
) -> Tensor:
    """Solves ``operator(x) = b``; the operator is symmetric and positive definite for each sample.

    >>> conjugate_gradients(lambda x: 4 * x, torch.ones(1, 2))
    tensor([[0.2500, 0.2500]])
    """
    x, r = torch.zeros_like(b), b.clone()
    if b.numel() == 0:
        return x
    s = precondition(r)
    p, rho = s.clone(), _dot(r, s)
    goal = _tolerance(b) ** 2 * _dot(b, b)
    for _ in range(limit):
        going = _dot(r, r) > goal
        if not bool(going.any()):
            break
        q = operator(p)
        length = _like(torch.where(going, rho / _dot(p, q), 0.0).nan_to_num(0.0, 0.0, 0.0), b)
        x, r = x + length * p, r - length * q
        s = precondition(r)
        new = _dot(r, s)
        p, rho = s + _like(torch.where(going, new / rho, 0.0).nan_to_num(0.0, 0.0, 0.0), b) * p, new
    return x


def least_squares(
    apply: Operator, adjoint: Operator, b: Tensor, tolerance: float | None = None, limit: int = 2000
) -> Tensor:
    """The least-squares solution of smallest norm of ``apply(x) = b``, for any rank: CGLS from zero.

    Args:
        tolerance: of the normal equations' residual, relative; by the type's precision where not given.

    >>> least_squares(lambda x: x.sum(1, keepdim=True), lambda y: y.expand(-1, 2), torch.ones(1, 1))
    tensor([[0.5000, 0.5000]])
    """
    return least_squares_and_dual(apply, adjoint, b, tolerance, limit)[0]


def least_squares_and_dual(
    apply: Operator,
    adjoint: Operator,
    b: Tensor,
    tolerance: float | None = None,
    limit: int = 2000,
    radius: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same ``x``, and a ``y`` with ``x = adjoint(y)``: how hard each equation pulls.

    Args:
        radius: (n,): where the norm of x, which grows from step to step, reaches it, the search ends (Steihaug, 1983): directions
            in which little is gained are left out first.

    >>> least_squares_and_dual(lambda x: 2 * x, lambda y: 2 * y, torch.ones(1, 2))
    (tensor([[0.5000, 0.5000]]), tensor([[0.2500, 0.2500]]))
    """
    r = b.clone()
    s = adjoint(r)
    x, p, gamma = torch.zeros_like(s), s.clone(), _dot(s, s)
    y, pull = torch.zeros_like(b), r.clone()  # p = adjoint(pull)
    goal = (tolerance or _tolerance(b)) ** 2 * gamma
    for _ in range(limit):
        going = gamma > goal
        if not bool(going.any()):
            break
        q = apply(p)
        length = torch.where(going, gamma / _dot(q, q), 0.0).nan_to_num(0.0, 0.0, 0.0)
        if radius is not None:
            slope, size = _dot(x, p), _dot(p, p)
            room = (radius.square() - _dot(x, x)).clamp_min(0.0)
            longest = (room / (slope + (slope.square() + size * room).sqrt())).nan_to_num(torch.inf)  # inf: no bound
            goal = torch.where(length > longest, torch.inf, goal)
            length = torch.minimum(length, longest)
        x, y, r = x + _like(length, x) * p, y + _like(length, y) * pull, r - _like(length, r) * q
        s = adjoint(r)
        new = _dot(s, s)
        ratio = torch.where(going, new / gamma, 0.0).nan_to_num(0.0, 0.0, 0.0)
        p, pull, gamma = s + _like(ratio, s) * p, r + _like(ratio, r) * pull, new
    return x, y


def largest_square(apply: Operator, adjoint: Operator, like: Tensor, iterations: int = 60) -> float:
    """The largest singular value squared of a map, by the power method from a fixed start (within a percent or so).

    Args:
        like: one input ``(1, ...)``: its shape, type and device.

    >>> round(largest_square(lambda x: 3 * x, lambda y: 3 * y, torch.zeros(1, 5)), 4)
    9.0
    """
    v = torch.linspace(1.0, 2.0, like.numel(), dtype=like.dtype, device=like.device).view(like.shape)
    v = v + torch.sin(37.0 * v)
    value = 0.0
    for _ in range(iterations):
        v = adjoint(apply(v / torch.linalg.vector_norm(v)))
        value = float(torch.linalg.vector_norm(v))
    return value


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(n,): one product per sample."""
    return (a * b).reshape(len(a), a.shape[1:].numel()).sum(1)


def _like(numbers: Tensor, x: Tensor) -> Tensor:
    """One number per sample, to multiply tensors shaped like ``x`` with."""
    return numbers.view(-1, *[1] * (x.dim() - 1))


def _tolerance(x: Tensor) -> float:
    return 1e-6 if x.dtype == torch.float32 else 1e-11
