"""Affine maps by a dense weight: linear layers and matrix products with a constant."""

from __future__ import annotations

import torch
from torch import fx

from revprop.linear_map import Dense, Separable
from revprop.rules.product import weighted
from revprop.rules.registry import Call, Fact, Linear, Refusal, rule

aten = torch.ops.aten


@rule(aten.linear.default, anywhere=True)
def linear(call: Call) -> Fact:
    """``z = a W^T + b`` on the last dimension."""
    call.only()
    weight = call.constant("weight")
    assert weight is not None
    return Linear(Dense(weight))


@rule(aten.addmm.default)
def addmm(call: Call) -> Fact:
    """``z = beta b + alpha a M``."""
    call.only("mat1")
    matrix = call.constant("mat2")
    assert matrix is not None
    return Linear(Dense(matrix.mT * call["alpha"]))


@rule(aten.mm.default, aten.matmul.default)
def matmul(call: Call) -> Fact:
    """A product with a constant matrix on either side is a linear map; one of two activations is not."""
    left, right = ("input", "mat2") if "mat2" in call.arguments else ("input", "other")
    if isinstance(call[left], fx.Node) and isinstance(call[right], fx.Node):
        return weighted(call, call[left], call[right])
    if call.is_activation(call[left]):
        matrix = call.constant(right)
        if matrix is None or matrix.dim() != 2 or len(call.shape_of(left)) < 1:
            raise Refusal('only a product with a constant matrix (two dimensions) has a rule; use strategy="global"')
        return Linear(Dense(matrix.mT))
    matrix = call.constant(left)
    if matrix is None or matrix.dim() != 2 or len(call.shape_of(right)) < 2:
        raise Refusal(
            'a constant on the left of a batch needs two dimensions, and the activation three; use strategy="global"'
        )
    return Linear(Separable({-2: matrix}))
