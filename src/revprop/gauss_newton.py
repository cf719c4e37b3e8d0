"""A preimage of any differentiable function, for operators and blocks without a closed form: damped Gauss-Newton.

``f(x) = y*`` from the recorded ``x^``: each step is the least-squares solution of smallest norm of ``J d = y* - f(x)`` by
conjugate gradients on the normal equations (CGLS), whose products are a vector-Jacobian and a Jacobian-vector product. Few
iterations are the damping: directions with a small singular value, in which a correction would be far, are left to the next
step. A step that leads away is halved. Steps are small beside the recorded values, so the point reached is near the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revprop.krylov import least_squares
from revprop.samples import Layout, Samples

__all__ = ["Effort", "search", "search_entries"]


POINTS = 40  # to each side, where entries are searched one by one
PATIENCE = 4  # steps without a tenth less missing


@dataclass(frozen=True)
class Effort:
    """How long to search.

    Attributes:
        steps: at most so many linearisations. products: at most so many iterations in each.
        tolerance: of what is missing, relative to what was missing at first; a multiple of the type's precision.
    """

    steps: int = 20
    products: int = 20
    tolerance: float = 1e4


def search(
    function: Callable[..., Tensor],
    layout: Layout,
    values: Sequence[Tensor],
    output: Tensor,
    change: Tensor,
    effort: Effort = Effort(),
) -> tuple[Tensor, ...]:
    """Corrections of the inputs that move, over all of them together, sample by sample.

    Args:
        function: the inputs' values, then those held -> the output.
        layout: where their samples lie.
        values: recorded. output: recorded, ``function(*values)``. change: wanted of it.

    Returns:
        one correction per input; where the output wanted cannot be reached, those of the nearest output found.

    >>> x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    >>> (d,) = search(lambda x: x * x, Layout((Samples(0),), (), Samples(0)), [x], x * x, torch.full_like(x, 0.5))
    >>> ((x + d) ** 2).round(decimals=6)
    tensor([[1.5000, 4.5000]], dtype=torch.float64)
    """
    ours, last = [place for place in layout.moving if place is not None], layout.output
    assert last is not None
    count = len(ours)
    shapes, dtypes = [value.shape for value in values[:count]], [value.dtype for value in values[:count]]
    rows = [place.rows(value) for place, value in zip(ours, values, strict=False)]
    widths = [part.shape[1] for part in rows]
    held = list(zip(layout.held, values[count:], strict=True))
    along = [place.rows(value) for place, value in held if place is not None]

    def run(flat: Tensor, *others: Tensor) -> Tensor:
        m = len(flat)
        parts = flat.split(widths, 1)
        moved = [
            place.values(part, _resized(shape, place, m)).to(dtype)
            for place, part, shape, dtype in zip(ours, parts, shapes, dtypes, strict=True)
        ]
        left = iter(others)
        fixed = [
            value if place is None else place.values(next(left), _resized(value.shape, place, m))
            for place, value in held
        ]
        return last.rows(function(*moved, *fixed)).to(precision)

    start, wanted = torch.cat(rows, 1), last.rows(output) + last.rows(change)
    # where a network changes precision within, no more can be asked for than the lesser of the two
    precision = max(start.dtype, wanted.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    start, wanted = start.to(precision), wanted.to(precision)
    todo = last.rows(change).any(1).nonzero().squeeze(1)
    found = torch.zeros_like(start)
    if len(todo):
        ours_only = tuple(part[todo] for part in along)
        found[todo] = _newton(lambda x: run(x, *ours_only), start[todo], wanted[todo], effort)
    return tuple(
        place.values(part, tuple(shape)).to(dtype)
        for place, part, shape, dtype in zip(ours, found.split(widths, 1), shapes, dtypes, strict=True)
    )


def _newton(function: Callable[[Tensor], Tensor], start: Tensor, wanted: Tensor, effort: Effort) -> Tensor:
    """(n, inputs): how far to go from ``start``; n >= 1 samples that do not depend on each other."""
    eps = torch.finfo(start.dtype).eps
    floor = 8 * eps * wanted.norm(dim=1, keepdim=True)  # what is missing by rounding alone
    longest = 0.5 * start.norm(dim=1, keepdim=True).clamp_min(1.0)
    moved = torch.zeros_like(start)
    best, nearest = moved.clone(), torch.full_like(start[:, :1], torch.inf)
    stalled = torch.zeros_like(nearest)
    last, step = torch.full_like(nearest, torch.inf), torch.zeros_like(start)
    first: Tensor | None = None
    for k in range(effort.steps + 1):
        with torch.enable_grad():
            x = (start + moved).requires_grad_()
            y = function(x)
        missing = wanted - y.detach()
        size = missing.norm(dim=1, keepdim=True)
        first = size if first is None else first
        stalled = torch.where(size < 0.9 * nearest, 0.0, stalled + 1)
        better = size < (1 - 1e-3) * nearest  # no long way for nothing
        best, nearest = torch.where(better, moved, best), torch.where(better, size, nearest)
        going = (nearest > torch.maximum(effort.tolerance * eps * first, floor)) & (stalled < PATIENCE)
        if k == effort.steps or not bool(going.any()):
            break
        worse = ~(size < last)  # NaN, too
        change = _linear_step(x, y, torch.where(worse | ~going, 0.0, missing), effort.products)
        change = change * (longest / change.norm(dim=1, keepdim=True).clamp_min(eps)).clamp_max(1.0)
        # a step that led away is halved instead of followed by another
        moved = torch.where(worse & going, moved - 0.5 * step, moved + change)
        step = torch.where(worse, 0.5 * step, change)
        last = torch.where(worse, last, size)
    return best


def search_entries(function: Callable[[Tensor], Tensor], start: Tensor, wanted: Tensor) -> Tensor:
    """Corrections of a value by a continuous function that acts entry by entry: the nearest change of sign of what is missing
    among points that get sparser with the distance, then bisection. Where there is none, the point that misses least.

    >>> x = torch.tensor([0.5, -2.0], dtype=torch.float64)
    >>> wanted = torch.tensor([0.5, -0.5], dtype=torch.float64)
    >>> x + search_entries(lambda x: x / (1 + x.abs()), x, wanted)
    tensor([ 1., -1.], dtype=torch.float64)
    """
    first = function(start) - wanted
    low, high = torch.zeros_like(start), torch.zeros_like(start)  # offsets between which the sign changes
    found = first == 0
    best, least = torch.zeros_like(start), first.abs()
    reach = 8 * (1 + start.abs())
    for _ in range(3):  # then closer around the point that misses least: an extremum may hide two changes of sign
        middle = best.clone()
        there = function(start + middle) - wanted
        for side in (1.0, -1.0):
            old, miss = middle, there
            for i in range(1, POINTS + 1):
                offset = middle + side * reach * (i / POINTS) ** 2
                new = function(start + offset) - wanted
                turn = (new * miss <= 0) & (
                    ~found | (offset.abs() < torch.minimum(low.abs(), high.abs()))
                )  # False for NaN
                low, high = torch.where(turn, old, low), torch.where(turn, offset, high)
                found = found | turn
                better = new.abs() < least
                best, least = torch.where(better, offset, best), torch.where(better, new.abs(), least)
                old, miss = offset, new
        if bool(found.all()):
            break
        reach = 0.1 * (reach / POINTS + best.abs())
    sign = torch.sign(function(start + low) - wanted)
    for _ in range(torch.finfo(start.dtype).bits):
        middle = 0.5 * (low + high)
        same = torch.sign(function(start + middle) - wanted) == sign
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    for end in (low, high):
        miss = (function(start + end) - wanted).abs()
        best, least = torch.where(found & (miss < least), end, best), torch.where(found & (miss < least), miss, least)
    return torch.where(first == 0, 0.0, best)


def _linear_step(x: Tensor, y: Tensor, missing: Tensor, products: int) -> Tensor:
    """The least-squares solution of smallest norm of ``J d = missing``, J the Jacobian of y by x."""
    with torch.enable_grad():
        probe = torch.zeros_like(y, requires_grad=True)
        # linear in the probe: differentiating it once more gives the Jacobian-vector product
        pulled = torch.autograd.grad(y, x, probe, create_graph=True)[0]

    def apply(v: Tensor) -> Tensor:
        if not pulled.requires_grad:  # no slope anywhere
            return torch.zeros_like(y)
        return torch.autograd.grad(pulled, probe, v, retain_graph=True)[0]

    def adjoint(u: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, u, retain_graph=True)[0]

    # where no input moves the output towards what is missing, there is but rounding to follow
    slope = adjoint(missing)
    steepness = apply(slope).norm(dim=1, keepdim=True) / slope.norm(dim=1, keepdim=True)
    size = missing.norm(dim=1, keepdim=True)
    followed = slope.norm(dim=1, keepdim=True) > 1e3 * torch.finfo(x.dtype).eps * steepness * size
    return least_squares(apply, adjoint, torch.where(followed, missing, 0.0), tolerance=1e-3, limit=products)


def _resized(shape: Sequence[int], place: Samples, n: int) -> tuple[int, ...]:
    return tuple(n * place.times if i == place.axis else size for i, size in enumerate(shape))
