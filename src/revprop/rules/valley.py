"""Functions that fall to one minimum and then rise: GELU, SiLU, Mish, hard-swish, and the helper for all that are like them.

Every value above the minimum has a preimage on the rising branch, and those below what the falling one starts from have a
second one there; the nearest preimage is the nearer of the two. Branches without an inverse in closed form are inverted to
the last digits by Newton's method from a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from revprop.rules.registry import Call, Fact, Pointwise, rule

__all__ = ["gated", "inverse_from", "valley"]

aten = torch.ops.aten
REACH = 44.0  # 4 before that a gate is 0 or 1 in double precision: exp(-40) < 2^-53
NODES = 2**14  # of a table: right in single precision, in double after one step of Newton's method


def valley(
    function: Callable[[Tensor], Tensor],
    bottom: float,
    falling: Callable[[Tensor, Tensor], Tensor],
    rising: Callable[[Tensor], Tensor],
) -> Pointwise:
    """A function that falls to its minimum and then rises without end.

    Args:
        bottom: its smallest value, which is taken; targets below it go there.
        falling: (value, recorded z) -> the preimage on the falling branch; -inf where there is none.
        rising: value -> the preimage on the rising branch.

    >>> square = valley(torch.square, 0.0, lambda value, recorded: -value.sqrt(), torch.sqrt)
    >>> square.preimage(torch.tensor([4.0, 4.0]), torch.tensor([-1.0, 1.0]))
    tensor([-2.,  2.])
    """

    def preimage(value: Tensor, recorded: Tensor) -> Tensor:
        left, right = falling(value, recorded), rising(value)
        return torch.where((left - recorded).abs() < (right - recorded).abs(), left, right)

    return Pointwise(function, preimage, (bottom, math.inf), (True, False))


@cache
def gated(function: Callable[[Tensor], Tensor]) -> Pointwise:
    """``z`` times a gate that rises from 0 to 1: falls from 0 to its one minimum, then rises towards ``z``.

    Of the falling branch only what differs from 0 in the type's precision is told apart: where a target differs from the
    recorded output by less than that, the recorded preimage is kept.
    """
    at = _minimiser(function)
    turn, depth, smallest = float(at), float(function(at)), torch.finfo(torch.float64).eps
    # the height above the minimum is quadratic there; these are smooth from the minimum to the end of the branch
    left = inverse_from(
        function,
        (at, at - REACH),
        height=lambda value: (-torch.log1p((value - depth) / depth)).sqrt(),
        level=lambda height: depth * torch.exp(-height.square()),
        top=math.sqrt(math.log(-depth / smallest)),
    )
    right = inverse_from(
        function,
        (at, at + REACH),
        height=lambda value: (value - depth).sqrt(),
        level=lambda height: depth + height.square(),
        top=math.sqrt(REACH + turn - depth),
    )

    def falling(value: Tensor, recorded: Tensor) -> Tensor:
        eps, flat = torch.finfo(value.dtype).eps, value.flatten()
        negative = (flat < 0).nonzero().squeeze(1)
        found = torch.full_like(flat, -math.inf)
        found.index_copy_(0, negative, left(flat.index_select(0, negative).clamp_(depth, -eps)))
        kept = (recorded < turn) & ((value - function(recorded)).abs() <= eps)
        return torch.where(kept, recorded, found.view(value.shape))

    def rising(value: Tensor) -> Tensor:
        return torch.where(value > REACH - 4, value, right(value.clamp(depth, REACH - 4)))

    return valley(function, depth, falling, rising)


def inverse_from(
    function: Callable[[Tensor], Tensor],
    branch: tuple[Tensor, Tensor],
    height: Callable[[Tensor], Tensor],
    level: Callable[[Tensor], Tensor],
    top: float,
) -> Callable[[Tensor], Tensor]:
    """The inverse of one branch to the last digits: a table and, in double precision, a step of Newton's method from it.

    Args:
        branch: its ends, where its value is smallest and where it is largest, in double precision.
        height: value -> what the preimage is a smooth function of, from 0 on; level: the inverse of it; top: its end.

    >>> ends = torch.tensor(0.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    >>> inverse = inverse_from(torch.cosh, ends, lambda v: (v - 1).sqrt(), lambda h: 1 + h * h, 5.0)
    >>> inverse(torch.tensor([1.0, 1.5, 20.0], dtype=torch.float64)).cosh()
    tensor([ 1.0000,  1.5000, 20.0000], dtype=torch.float64)
    """
    wanted = level(torch.linspace(0.0, top, NODES, dtype=torch.float64))
    lowest, highest = (end.expand(NODES) for end in branch)
    for _ in range(60):
        nodes = (lowest + highest) / 2
        below = function(nodes) < wanted
        lowest, highest = torch.where(below, nodes, lowest), torch.where(below, highest, nodes)

    def inverse(value: Tensor) -> Tensor:
        place, first = nodes.to(value), branch[0].to(value)
        share = height(value) * ((NODES - 1) / top)
        cell = share.floor().clamp(0, NODES - 2)
        start = cell.long()
        found = torch.lerp(place.take(start), place.take(start + 1), share - cell)
        if value.dtype == torch.float64:
            output, slope = _with_slope(function, found)
            step = torch.where(slope == 0, 0.0, (output - value) / slope)
            near = (found - first).abs() / 16  # the table is nearer than that; at the ends the slope is rounding
            found = found - torch.minimum(torch.maximum(step, -near), near)
        return found

    return inverse


def _with_slope(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        output = function(leaf)
        (slope,) = torch.autograd.grad(output.sum(), leaf)
    return output.detach(), slope


def _minimiser(function: Callable[[Tensor], Tensor]) -> Tensor:
    """Where a gated function has its minimum: the one zero of its slope between -3 and 0, halving the interval."""
    low, high = torch.tensor(-3.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _with_slope(function, middle)[1] > 0 else (middle, high)
    return high


@rule(aten.gelu.default, anywhere=True)
def gelu(call: Call) -> Fact:
    call.only()
    return gated(F.gelu if call["approximate"] == "none" else _gelu_by_tanh)


def _gelu_by_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


@rule(aten.silu.default, anywhere=True)
def silu(call: Call) -> Fact:
    call.only()
    return gated(F.silu)


@rule(aten.mish.default, anywhere=True)
def mish(call: Call) -> Fact:
    call.only()
    return gated(F.mish)


@rule(aten.hardswish.default, anywhere=True)
def hardswish(call: Call) -> Fact:
    """``z (z + 3) / 6`` between -3 and 3, 0 below and ``z`` above: a recorded value in the flat part stays for a target of 0."""
    call.only()

    def falling(value: Tensor, recorded: Tensor) -> Tensor:
        root = (9 + 24 * value).clamp_min(0.0).sqrt()
        left = torch.where(value < 0, -(root + 3) / 2, recorded.clamp_max(-3.0))
        return torch.where(value > 0, -math.inf, left)

    def rising(value: Tensor) -> Tensor:
        root = (9 + 24 * value).clamp_min(0.0).sqrt()
        return torch.where(value > 3, value, 12 * value / (root + 3))  # without the cancellation of (root - 3) / 2

    return valley(F.hardswish, -0.375, falling, rising)
