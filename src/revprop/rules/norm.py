"""Normalisation by constants: batch norm in eval mode is a diagonal map."""

from __future__ import annotations

import torch

from revprop.linear_map import Diagonal
from revprop.rules.registry import Call, Fact, Linear, Refusal, rule

aten = torch.ops.aten


@rule(aten.batch_norm.default)
def batch_norm(call: Call) -> Fact:
    """``z = (a - mean) / sqrt(var + eps) * weight + bias``, per channel, with the running statistics."""
    call.only()
    variance, weight = call.constant("running_var"), call.constant("weight")
    assert variance is not None
    scale = torch.rsqrt(variance + call["eps"])
    scale = scale if weight is None else scale * weight
    return Linear(Diagonal(scale.view(-1, *[1] * (len(call.shape) - 1))))


@rule(aten._native_batch_norm_legit.no_stats, anywhere=True)
def batch_statistics(call: Call) -> Fact:
    raise Refusal(
        'it normalises by the statistics of the batch; set track_running_stats=True, or use strategy="global"',
        final=True,
    )
