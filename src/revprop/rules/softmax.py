"""Softmax and its logarithm. Adding a constant to the logits changes nothing, so every preimage is one up to a constant."""

from __future__ import annotations

import torch
from torch import Tensor

from revprop.rules.registry import MARGIN, Call, Fact, Nonlinear, Refusal, rule
from revprop.samples import Samples

aten = torch.ops.aten


@rule(aten.softmax.int, aten.special_softmax.default, aten._softmax.default, anywhere=True)
def softmax(call: Call) -> Fact:
    """Nearest to the recorded logits of all with the wanted probabilities: ``log p* + mean(z^ - log p*)``.

    Wanted probabilities are first brought onto the simplex: kept above a thousandth of the uniform one (or above the recorded
    one, where that is lower), then scaled to the sum 1, which asks nothing of those that are to stay as they are. What differs
    from the recorded probability by rounding is to stay. Logits of minus infinity (masked) stay.
    """
    dim = _along(call)

    def preimage(wanted: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        logs = torch.log_softmax(z, dim, dtype=wanted.dtype)
        own = call.run(z)
        wanted = torch.maximum(wanted, own.clamp_max(MARGIN / max(z.shape[dim], 1)))
        change = torch.where((wanted - own).abs() <= torch.finfo(own.dtype).eps, 0.0, wanted.log() - logs)
        return (z + _centred(change, z, dim).to(z.dtype),)

    return Nonlinear(call.run, preimage)


@rule(aten.log_softmax.int, aten.special_log_softmax.default, aten._log_softmax.default, anywhere=True)
def log_softmax(call: Call) -> Fact:
    """Nearest to the recorded logits of all with the wanted log-probabilities, brought to the sum of probabilities 1:
    ``y* + mean(z^ - y*)``."""
    dim = _along(call)

    def preimage(wanted: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return (z + _centred(wanted - call.run(z), z, dim).to(z.dtype),)

    return Nonlinear(call.run, preimage)


def _along(call: Call) -> int:
    """The dimension, counted from the end; refused where it is the one of the samples."""
    value = call.only().meta["val"]
    samples, dim = Samples.of(value), call["dim"] % value.dim()
    if samples is None or samples.axis == dim:
        raise Refusal('it mixes samples, or the batch size is in more than one dimension; use strategy="global"')
    return int(dim) - value.dim()


def _centred(change: Tensor, z: Tensor, dim: int) -> Tensor:
    """Without its mean over the logits that can move."""
    moves = z.isfinite()
    change = torch.where(moves, change, 0.0)
    return change - moves * change.sum(dim, keepdim=True) / moves.sum(dim, keepdim=True).clamp_min(1)
