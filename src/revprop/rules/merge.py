"""Arithmetic with constants, and the places where several activations meet: add, subtract, concatenate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from revprop.linear_map import Diagonal, LinearMap
from revprop.rules.registry import Call, Fact, Linear, Refusal, rule
from revprop.structural_map import Broadcast, Concatenate, Copy, Sum

aten = torch.ops.aten


@rule(aten.add.Tensor, aten.add.Scalar)
def add(call: Call) -> Fact:
    return _sum(call, 1.0, float(call["alpha"]))


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(call: Call) -> Fact:
    return _sum(call, 1.0, -float(call["alpha"]))


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(call: Call) -> Fact:
    return _sum(call, -float(call["alpha"]), 1.0)


@rule(aten.neg.default)
def neg(call: Call) -> Fact:
    return Linear(_scaled(call, call["input"], call.like(-1.0)))


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(call: Call) -> Fact:
    """A product with a constant; a product of two activations is no linear map."""
    first, second = call["input"], call["other"]
    if call.is_activation(first) and call.is_activation(second):
        raise Refusal('a product of two activations; use strategy="global"')
    node, constant = (first, second) if call.is_activation(first) else (second, first)
    return Linear(_scaled(call, node, call.like(constant)))


@rule(aten.div.Tensor, aten.div.Scalar)
def div(call: Call) -> Fact:
    if call.is_activation(call["other"]):
        raise Refusal('a division by an activation; use strategy="global"')
    return Linear(_scaled(call, call["input"], 1.0 / call.like(call["other"])))


@rule(aten.cat.default)
def concatenate(call: Call) -> Fact:
    """Joins activations (and constants) along a dimension behind the batch."""
    rank = len(call.shape) + 1
    dim = call["dim"] - rank if call["dim"] >= 0 else call["dim"]
    if dim == -rank:
        raise Refusal('it concatenates along the batch; keep samples independent, or use strategy="global"')
    spans, start = [], 0
    for part in call["tensors"]:
        length = (call.graph.shape(part) if call.is_activation(part) else tuple(_meta(part)))[dim]
        if call.is_activation(part):
            spans.append((start, int(length)))
        start += int(length)
    return Linear(Concatenate(dim, spans, start))


def _meta(part: Any) -> Any:
    return part.shape if isinstance(part, Tensor) else part.meta["val"].shape


def _sum(call: Call, first: float, second: float) -> Fact:
    a, b = call["input"], call["other"]
    if call.is_activation(a) and call.is_activation(b):
        return Linear(Sum((call.graph.shape(a), call.graph.shape(b)), call.shape, (first, second)))
    node, scale = (a, first) if call.is_activation(a) else (b, second)
    return Linear(_scaled(call, node, call.like(scale)))


def _scaled(call: Call, node: fx.Node, scale: Tensor) -> LinearMap:
    """``scale * a`` where the result may be larger than ``a`` (broadcasting), its shape behind the batch given by the call."""
    shape = call.graph.shape(node)
    if scale.dim() > len(call.shape) and scale.shape[0] != 1:
        raise Refusal('a constant with a batch dimension of its own; use strategy="global"')
    scale = scale.reshape(scale.shape[scale.dim() - len(call.shape) :]) if scale.dim() > len(call.shape) else scale
    if shape == call.shape:
        if scale.numel() == 1:
            factor = float(scale)
            return Copy(lambda a: a, lambda z: z) if factor == 1.0 else Diagonal(scale.reshape(()))
        return Diagonal(scale)
    return Broadcast(shape, call.shape, scale)
