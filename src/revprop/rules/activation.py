"""Activations: the function, its range, and the preimage nearest to a recorded value."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from revprop.rules.registry import Call, Fact, Pointwise, Refusal, rule

aten = torch.ops.aten


def bijection(
    function: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    low: float = -math.inf,
    high: float = math.inf,
) -> Pointwise:
    """A strictly monotone function onto the open interval (low, high)."""
    return Pointwise(function, lambda value, recorded: inverse(value), (low, high))


def clipped(
    function: Callable[[Tensor], Tensor], low: float, high: float, scale: float = 1.0, shift: float = 0.0
) -> Pointwise:
    """``clamp(scale z + shift, low, high)``: at an end every z beyond it is a preimage, a recorded one there is kept."""

    def preimage(value: Tensor, recorded: Tensor) -> Tensor:
        z = (value - shift) / scale
        if low > -math.inf:
            z = torch.where(value <= low, recorded.clamp_max((low - shift) / scale), z)
        if high < math.inf:
            z = torch.where(value >= high, recorded.clamp_min((high - shift) / scale), z)
        return z

    return Pointwise(function, preimage, (low, high), (True, True), inverse=lambda value: (value - shift) / scale)


@rule(aten.tanh.default, anywhere=True)
def tanh(call: Call) -> Fact:
    call.only()
    return bijection(torch.tanh, torch.atanh, -1.0, 1.0)


@rule(aten.sigmoid.default, anywhere=True)
def sigmoid(call: Call) -> Fact:
    call.only()
    return bijection(torch.sigmoid, torch.logit, 0.0, 1.0)


@rule(aten.atan.default, anywhere=True)
def arctan(call: Call) -> Fact:
    call.only()
    return bijection(torch.atan, torch.tan, -math.pi / 2, math.pi / 2)


@rule(aten.asinh.default, anywhere=True)
def arcsinh(call: Call) -> Fact:
    call.only()
    return bijection(torch.asinh, torch.sinh)


@rule(aten.sinh.default, anywhere=True)
def sinh(call: Call) -> Fact:
    call.only()
    return bijection(torch.sinh, torch.asinh)


@rule(aten.softplus.default, anywhere=True)
def softplus(call: Call) -> Fact:
    """``log(1 + exp(beta z)) / beta``, the identity beyond the threshold."""
    call.only()
    beta, threshold = float(call["beta"]), float(call["threshold"])

    def inverse(value: Tensor) -> Tensor:
        scaled = value * beta
        # log(expm1(y)) = y + log(-expm1(-y)) keeps its precision for large y
        return torch.where(scaled > threshold, value, (scaled + torch.log(-torch.expm1(-scaled))) / beta)

    return bijection(lambda z: F.softplus(z, beta, threshold), inverse, low=0.0)


@rule(aten.log_sigmoid.default, anywhere=True)
def log_sigmoid(call: Call) -> Fact:
    """``-softplus(-z)``."""
    call.only()
    # logit(exp(y)) = y - log(-expm1(y)) keeps its precision for very negative y
    return bijection(F.logsigmoid, lambda value: value - torch.log(-torch.expm1(value)), high=0.0)


@rule(aten.erf.default, anywhere=True)
def erf(call: Call) -> Fact:
    call.only()
    return bijection(torch.erf, torch.erfinv, -1.0, 1.0)


@rule(aten.elu.default, anywhere=True)
def elu(call: Call) -> Fact:
    call.only()
    return exponential_units(float(call["alpha"]), float(call["scale"]), float(call["input_scale"]))


@rule(aten.celu.default, anywhere=True)
def celu(call: Call) -> Fact:
    call.only()
    return exponential_units(float(call["alpha"]), 1.0, 1.0 / float(call["alpha"]))


@rule(aten.selu.default, anywhere=True)
def selu(call: Call) -> Fact:
    """With the constants of Klambauer et al., 2017."""
    call.only()
    return exponential_units(1.6732632423543772, 1.0507009873554805, 1.0)


def exponential_units(alpha: float, scale: float, slope: float) -> Pointwise:
    """``scale * z`` for positive z, ``scale * alpha * (exp(slope z) - 1)`` for negative: ELU, CELU and SELU."""
    if min(alpha, scale, slope) <= 0:
        raise Refusal('it is only invertible for a positive alpha; use strategy="global"')

    def inverse(value: Tensor) -> Tensor:
        return torch.where(value > 0, value / scale, torch.log1p(value.clamp_max(0.0) / (scale * alpha)) / slope)

    return bijection(lambda z: aten.elu(z, alpha, scale, slope), inverse, low=-scale * alpha)


@rule(aten.relu.default, anywhere=True)
def relu(call: Call) -> Fact:
    call.only()
    return clipped(torch.relu, 0.0, math.inf)


@rule(aten.relu6.default, anywhere=True)
def relu6(call: Call) -> Fact:
    call.only()
    return clipped(F.relu6, 0.0, 6.0)


@rule(aten.hardtanh.default, anywhere=True)
def hardtanh(call: Call) -> Fact:
    call.only()
    low, high = float(call["min_val"]), float(call["max_val"])
    return clipped(lambda z: F.hardtanh(z, low, high), low, high)


@rule(aten.hardsigmoid.default, anywhere=True)
def hardsigmoid(call: Call) -> Fact:
    """``z / 6 + 1 / 2``, cut to [0, 1]."""
    call.only()
    return clipped(F.hardsigmoid, 0.0, 1.0, 1 / 6, 0.5)


@rule(aten.threshold.default, anywhere=True)
def threshold(call: Call) -> Fact:
    """``z`` above the threshold, a constant up to it: of both branches the one that comes nearer to the target."""
    call.only()
    limit, constant = float(call["threshold"]), float(call["value"])

    def preimage(value: Tensor, recorded: Tensor) -> Tensor:
        jump = (
            4 * torch.finfo(value.dtype).eps * (recorded.abs() + abs(limit))
        )  # so that rounding does not step over it
        above = torch.maximum(value, limit + jump)
        below = torch.where(recorded > limit, limit - jump, recorded)
        miss_above, miss_below = (above - value).abs(), (constant - value).abs()
        nearer = (below - recorded).abs() < (above - recorded).abs()
        tie = (miss_below - miss_above).abs() <= jump
        return torch.where(torch.where(tie, nearer, miss_below < miss_above), below, above)

    ends = min(limit, constant), math.inf
    return Pointwise(lambda z: F.threshold(z, limit, constant), preimage, ends, (constant <= limit, False))


@rule(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, anywhere=True)
def clamp(call: Call) -> Fact:
    call.only()
    low = -math.inf if call.get("min") is None else float(call["min"])
    high = math.inf if call.get("max") is None else float(call["max"])
    return clipped(lambda z: torch.clamp(z, low, high), low, high)


@rule(aten.leaky_relu.default, anywhere=True)
def leaky_relu(call: Call) -> Fact:
    call.only()
    return two_slopes(call.like(float(call["negative_slope"])))


@rule(aten.rrelu.default, anywhere=True)
def rrelu(call: Call) -> Fact:
    """In eval mode leaky ReLU, its slope the mean of those that training draws from."""
    call.only()
    if call["training"]:
        raise Refusal(
            "it draws its slopes at random even in eval mode (F.rrelu with training=True): drop that argument",
            final=True,
        )
    return two_slopes(call.like((float(call["lower"]) + float(call["upper"])) / 2))


@rule(aten.prelu.default)
def prelu(call: Call) -> Fact:
    call.only()
    weight = call.constant("weight")
    assert weight is not None
    spatial = max(len(call.shape) - 1, 0)
    return two_slopes(weight.view(-1, *[1] * spatial) if weight.numel() > 1 else weight.reshape(()))


def two_slopes(slope: Tensor) -> Pointwise:
    """``z`` for positive z, ``slope * z`` for negative; a learned slope may be zero or negative, then two branches compete."""

    def preimage(value: Tensor, recorded: Tensor) -> Tensor:
        positive = value.clamp_min(0.0)
        safe = torch.where(slope == 0, 1.0, slope)
        negative = torch.where(slope == 0, recorded.clamp_max(0.0), (value / safe).clamp_max(0.0))
        miss_positive, miss_negative = (positive - value).abs(), (slope * negative - value).abs()
        nearer = (negative - recorded).abs() < (positive - recorded).abs()
        exact = torch.finfo(value.dtype).eps * value.abs() * 4
        tie = (miss_positive - miss_negative).abs() <= exact
        return torch.where(torch.where(tie, nearer, miss_negative < miss_positive), negative, positive)

    def function(z: Tensor) -> Tensor:
        return torch.where(z > 0, z, slope * z)

    low = -math.inf if bool((slope > 0).all()) else (0.0 if bool((slope <= 0).all()) else -math.inf)
    inverse = None if bool((slope > 0).all()) else (lambda value: value)
    return Pointwise(function, preimage, (low, math.inf), (True, True), inverse)


@rule(aten.sin.default, anywhere=True)
def sin(call: Call) -> Fact:
    call.only()
    return wave(torch.sin, torch.asin, math.pi)


def wave(function: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], mirrored: float) -> Pointwise:
    """Sine and cosine: the nearest of infinitely many preimages. The textbook inverse normalises into [-1, 1] (FR-PT 3.4).

    Args:
        mirrored: with every z its mirror image ``mirrored - z`` has the same value.
    """
    turn = 2 * math.pi

    def preimage(value: Tensor, recorded: Tensor) -> Tensor:
        angle = inverse(value)
        first = angle + turn * torch.round((recorded - angle) / turn)
        second = mirrored - angle + turn * torch.round((recorded - mirrored + angle) / turn)
        return torch.where((first - recorded).abs() <= (second - recorded).abs(), first, second)

    def textbook(value: Tensor) -> Tensor:
        if value.numel() == 0:
            return value
        largest = value.abs().flatten(1).amax(1).clamp_min(1.0) if value.dim() > 1 else value.abs().clamp_min(1.0)
        return inverse(value / largest.view(-1, *[1] * (value.dim() - 1)))

    return Pointwise(function, preimage, (-1.0, 1.0), (True, True), textbook)
