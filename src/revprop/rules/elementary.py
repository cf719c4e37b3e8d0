"""Elementary functions, entry by entry: exponentials, logarithms, powers, the absolute value, the cosine.

What is recorded lies in a function's domain, and so does the preimage nearest to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from revprop.rules.activation import bijection, wave
from revprop.rules.registry import MARGIN, Call, Fact, Pointwise, rule
from revprop.rules.valley import valley

aten = torch.ops.aten


@rule(aten.exp.default, anywhere=True)
def exp(call: Call) -> Fact:
    call.only()
    return bijection(torch.exp, torch.log, low=0.0)


@rule(aten.expm1.default, anywhere=True)
def expm1(call: Call) -> Fact:
    call.only()
    return bijection(torch.expm1, torch.log1p, low=-1.0)


@rule(aten.log.default, anywhere=True)
def log(call: Call) -> Fact:
    call.only()
    return bijection(torch.log, lambda value: _within(value.exp(), 0.0))


@rule(aten.log1p.default, anywhere=True)
def log1p(call: Call) -> Fact:
    call.only()
    return bijection(torch.log1p, lambda value: _within(value.expm1(), -1.0))


@rule(aten.abs.default, anywhere=True)
def absolute(call: Call) -> Fact:
    call.only()
    return valley(torch.abs, 0.0, lambda value, recorded: -value, lambda value: value)


@rule(aten.square.default, anywhere=True)
def square(call: Call) -> Fact:
    call.only()
    return powers(2.0)


@rule(aten.sqrt.default, anywhere=True)
def sqrt(call: Call) -> Fact:
    call.only()
    return powers(0.5)


@rule(aten.rsqrt.default, anywhere=True)
def rsqrt(call: Call) -> Fact:
    call.only()
    return powers(-0.5)


@rule(aten.reciprocal.default, anywhere=True)
def reciprocal(call: Call) -> Fact:
    call.only()
    return powers(-1.0)


@rule(aten.pow.Tensor_Scalar, anywhere=True)
def power(call: Call) -> Fact:
    call.only()
    return powers(float(call["exponent"]))


def powers(exponent: float) -> Pointwise:
    """``z ** exponent``. Odd powers keep the sign, even ones have two preimages, fractional ones are for ``z >= 0`` alone.

    No value of an odd negative power is 0: nearer to it than the margin (or than the recorded value, where that is nearer)
    the value there on the recorded side is aimed at.
    """

    def function(z: Tensor) -> Tensor:
        return z**exponent

    def root(value: Tensor) -> Tensor:
        return value ** (1 / exponent)

    def signed_root(value: Tensor) -> Tensor:
        return torch.copysign(root(value.abs()), value)

    if exponent == 0:  # a constant
        return Pointwise(function, lambda value, recorded: recorded, (1.0, 1.0), (True, True))
    if exponent % 1:
        return Pointwise(function, lambda value, recorded: root(value), (0.0, math.inf), (exponent > 0, False))
    if exponent % 2 == 0:
        if exponent > 0:
            return valley(function, 0.0, lambda value, recorded: -root(value), root)
        return Pointwise(
            function, lambda value, recorded: torch.copysign(root(value), recorded), (0.0, math.inf), (False, False)
        )
    if exponent > 0:
        return bijection(function, signed_root)

    def preimage(value: Tensor, recorded: Tensor) -> Tensor:
        own = function(recorded)
        least = own.abs().clamp_max(MARGIN)
        return signed_root(torch.where(value.abs() < least, torch.copysign(least, own), value))

    return Pointwise(function, preimage)


@rule(aten.cos.default, anywhere=True)
def cos(call: Call) -> Fact:
    call.only()
    return wave(torch.cos, torch.acos, 0.0)


def _within(z: Tensor, low: float) -> Tensor:
    """What overflows is the largest number there is, what would be the end of the domain the number next to it."""
    numbers = torch.finfo(z.dtype)
    return z.clamp(low + (numbers.eps if low else numbers.tiny), numbers.max)
