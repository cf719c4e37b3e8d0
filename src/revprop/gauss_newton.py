"""The nearest preimage of any differentiable function, for operators and blocks without a closed form.

``argmin |x - x^|`` subject to ``f(x) = y*``: the solver of :mod:`revprop.global_solve` on this one function instead of a whole
network. Slower than a closed form by the number of Jacobian products, and as exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from revprop.global_solve import Goal, Options, solve
from revprop.samples import Layout, Samples

__all__ = ["search"]


def search(
    function: Callable[..., Tensor],
    layout: Layout,
    values: Sequence[Tensor],
    output: Tensor,
    change: Tensor,
) -> tuple[Tensor, ...]:
    """Corrections of the inputs that move, of smallest norm over all of them together, sample by sample.

    Args:
        function: the inputs' values, then those held -> the output.
        layout: where their samples lie.
        values: recorded. output: recorded, ``function(*values)``. change: wanted of it.

    >>> x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    >>> (d,) = search(lambda x: x * x, Layout((Samples(0),), (), Samples(0)), [x], x * x, torch.full_like(x, 0.5))
    >>> ((x + d) ** 2).round(decimals=6)
    tensor([[1.5000, 4.5000]], dtype=torch.float64)
    """
    ours, last = [place for place in layout.moving if place is not None], layout.output
    assert last is not None
    count = len(ours)
    shapes = [value.shape for value in values[:count]]
    rows = [place.rows(value) for place, value in zip(ours, values, strict=False)]
    widths = [part.shape[1] for part in rows]
    held = list(zip(layout.held, values[count:], strict=True))
    along = [place.rows(value) for place, value in held if place is not None]

    def run(flat: Tensor, *others: Tensor) -> Tensor:
        m = len(flat)
        parts = flat.split(widths, 1)
        moved = [
            place.values(part, _resized(shape, place, m))
            for place, part, shape in zip(ours, parts, shapes, strict=True)
        ]
        left = iter(others)
        fixed = [
            value if place is None else place.values(next(left), _resized(value.shape, place, m))
            for place, value in held
        ]
        return last.rows(function(*moved, *fixed))

    flat, before = torch.cat(rows, 1), last.rows(output)
    goal = Goal(target=before + last.rows(change))
    exact = torch.finfo(flat.dtype).eps ** 0.45
    found = solve(run, flat, tuple(along), before, goal, Options(tolerance=exact))
    corrections = (found.features - flat).split(widths, 1)
    return tuple(place.values(part, tuple(shape)) for place, part, shape in zip(ours, corrections, shapes, strict=True))


def _resized(shape: Sequence[int], place: Samples, n: int) -> tuple[int, ...]:
    return tuple(n * place.times if i == place.axis else size for i, size in enumerate(shape))
