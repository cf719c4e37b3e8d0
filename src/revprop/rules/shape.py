"""Operators that move entries without changing them: every output is a copy of one input, or a constant."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from revprop.rules.registry import Call, Fact, Linear, Refusal, rule
from revprop.structural_map import Copy

aten = torch.ops.aten


@rule(aten.clone.default, aten.alias.default, aten.detach.default, anywhere=True)
def identity(call: Call) -> Fact:
    call.only()
    return Linear(Copy(lambda a: a, lambda z: z))


@rule(aten.native_dropout.default, anywhere=True)
def dropout(call: Call) -> Fact:
    """Only found where dropout stays on in eval mode; torch.export leaves no trace of it otherwise."""
    raise Refusal(
        "it drops at random even in eval mode (F.dropout without training=self.training): pass that argument",
        final=True,
    )


@rule(aten.view.default, aten._unsafe_view.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
def reshape(call: Call) -> Fact:
    node = call.only()
    before, after = call.graph.shape(node), call.shape

    def to(x: Tensor, source: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        # the first dimension may be the batch times another one, so it is computed, for empty batches, too
        first = x.shape[0] * math.prod(source) // max(math.prod(shape), 1)
        return x.reshape(first, *shape)

    return Linear(Copy(lambda a: to(a, before, after), lambda z: to(z, after, before)))


@rule(aten.permute.default, aten.transpose.int, aten.t.default, anywhere=True)
def permute(call: Call) -> Fact:
    node = call.only()
    rank = len(call.graph.shape(node)) + 1
    operator: Any = call.node.target
    moved = operator(torch.empty(tuple(range(1, rank + 1))), *call.node.args[1:], **call.node.kwargs)
    order = [size - 1 for size in moved.shape]
    back = [order.index(i) for i in range(rank)]
    return Linear(Copy(lambda a: a.permute(order), lambda z: z.permute(back)))


@rule(
    aten.slice.Tensor,
    aten.select.int,
    aten.constant_pad_nd.default,
    aten.pad.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    aten.expand.default,
    aten.repeat.default,
    aten.flip.default,
    aten.roll.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.index_select.default,
)
def copy(call: Call) -> Fact:
    """Any operator whose outputs are copies of inputs or constants: the adjoint by autograd, the copies by counting."""
    node = call.only()
    _keep_batch(call)
    before = node.meta["val"].shape
    replaced = {"value": 0.0} if call.arguments.get("value") else {}  # a padding constant is no part of the linear map
    schema = call.node.target._schema.arguments  # type: ignore[union-attr]

    def forward(a: Tensor) -> Tensor:
        batch = _batch(before[0], a.shape[0])
        given = {s.name: replaced.get(s.name, call.arguments["input" if s.name == "self" else s.name]) for s in schema}
        given = {
            name: a if v is node else fx.map_arg(v, lambda s: _at(s.meta["val"], batch)) for name, v in given.items()
        }
        out = call.node.target(
            *(given[s.name] for s in schema if not s.kwarg_only),  # type: ignore[operator]
            **{s.name: given[s.name] for s in schema if s.kwarg_only},
        )
        assert isinstance(out, Tensor)
        return out

    def backward(z: Tensor) -> Tensor:
        first = _at(before[0], _batch(call.node.meta["val"].shape[0], z.shape[0]))
        if first == 0:  # autograd refuses empty batches for some operators
            return z.new_zeros(first, *before[1:])
        with torch.enable_grad():
            a = z.new_zeros(first, *before[1:]).requires_grad_()
            return torch.autograd.grad(forward(a), a, z)[0]

    counts = backward(call.like(torch.ones(_at(call.node.meta["val"].shape[0], 1), *call.shape)))
    return Linear(Copy(forward, backward, counts[:1]))


def _keep_batch(call: Call) -> None:
    """Refuses a copy that mixes or drops samples: each one is reversed on its own."""
    before, after = call["input"].meta["val"].shape, call.node.meta["val"].shape
    moved = call.node.target in (aten.flip.default, aten.roll.default) and (
        not call["dims"] or any(d % len(before) == 0 for d in call["dims"])
    )
    # sizes are compared as expressions: the batch size of the example means nothing
    if str(after[0]) != str(before[0]) or moved:
        raise Refusal(
            'it selects or moves along the batch dimension; keep samples independent, or use strategy="global"'
        )


def _at(size: Any, batch: int) -> int:
    """A traced size for a given number of samples."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.subs({symbol: batch for symbol in expression.free_symbols}))
    return int(size)


def _batch(size: Any, actual: int) -> int:
    """The number of samples, from the actual first dimension and its traced size."""
    return actual // max(_at(size, 1), 1)
