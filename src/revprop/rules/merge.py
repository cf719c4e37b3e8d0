"""Arithmetic with constants, and the places where several activations meet: add, subtract, concatenate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from revprop.linear_map import Diagonal, LinearMap
from revprop.rules.product import product, quotient
from revprop.rules.registry import Call, Fact, Linear, Nonlinear, Refusal, rule
from revprop.structural_map import Broadcast, Concatenate, Copy, Sum

aten = torch.ops.aten


@rule(aten.add.Tensor, aten.add.Scalar, anywhere=True)
def add(call: Call) -> Fact:
    return _sum(call, 1.0, float(call["alpha"]))


@rule(aten.sub.Tensor, aten.sub.Scalar, anywhere=True)
def sub(call: Call) -> Fact:
    return _sum(call, 1.0, -float(call["alpha"]))


@rule(aten.rsub.Scalar, aten.rsub.Tensor, anywhere=True)
def rsub(call: Call) -> Fact:
    return _sum(call, -float(call["alpha"]), 1.0)


@rule(aten.neg.default)
def neg(call: Call) -> Fact:
    return Linear(_scaled(call, call["input"], call.like(-1.0)))


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(call: Call) -> Fact:
    """A product with a constant is a linear map; one of two activations is not."""
    first, second = call["input"], call["other"]
    if _is_tensor(first) and _is_tensor(second):
        return product(call)
    node, constant = (first, second) if call.is_activation(first) else (second, first)
    return Linear(_scaled(call, node, call.like(constant)))


@rule(aten.div.Tensor, aten.div.Scalar)
def div(call: Call) -> Fact:
    if _is_tensor(call["other"]) and (_is_tensor(call["input"]) or call.is_activation(call["other"])):
        return quotient(call)
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


def _is_tensor(argument: Any) -> bool:
    """Whether it is the value of a node, no constant and no size."""
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), Tensor)


@rule(aten.stack.default)
def stack(call: Call) -> Fact:
    """Joins activations (and constants) along a new dimension behind the batch."""
    dim = call["dim"] if call["dim"] < 0 else call["dim"] - len(call.shape) - 1
    if dim == -len(call.shape) - 1:
        raise Refusal('it stacks along the batch; keep samples independent, or use strategy="global"')
    spans = [(i, 1) for i, part in enumerate(call["tensors"]) if call.is_activation(part)]
    return Linear(Concatenate(dim, spans, len(call["tensors"]), new=True))


@rule(aten.where.self, aten.masked_fill.Scalar)
def choose(call: Call) -> Fact:
    """Takes each entry from one of two, by a condition that is held: what is taken is as wanted, the rest stays."""
    condition = call.get("condition") if "condition" in call.arguments else call["mask"]
    place = call.values.index(condition) if isinstance(condition, fx.Node) else None
    picked = (
        call.operator is aten.where.self
    )  # the first is taken where the condition holds; of a filled one where it does not
    if any(call.graph.shape(node) != call.shape for node in call.inputs):
        raise Refusal("a choice that repeats what moves")
    first = [call.is_activation(call["input"]) and node is call["input"] for node in call.inputs]

    def preimage(wanted: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        holds = values[place] if place is not None else condition
        return tuple(
            torch.where(holds == (own == picked), wanted, value) for own, value in zip(first, values, strict=False)
        )

    return Nonlinear(call.run, preimage)


def _meta(part: Any) -> Any:
    return part.shape if isinstance(part, Tensor) else part.meta["val"].shape


def _sum(call: Call, first: float, second: float) -> Fact:
    a, b = call["input"], call["other"]
    alike = all(str(node.meta["val"].shape) == str(call.node.meta["val"].shape) for node in call.inputs)
    if not call.batch_first and not alike:
        raise Refusal('it mixes samples, or the batch is not the first dimension here; use strategy="global"')
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
