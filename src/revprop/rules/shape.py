"""Operators that move entries without changing them: every output is a copy of one input, or a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from revprop.rules.registry import Call, Fact, Linear, Refusal, rule
from revprop.samples import Samples
from revprop.structural_map import Copy

aten = torch.ops.aten


@rule(aten.clone.default, aten.alias.default, aten.detach.default, anywhere=True)
def identity(call: Call) -> Fact:
    call.only()
    return Linear(Copy(lambda a: a, lambda z: z))


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    anywhere=True,
)
def reshape(call: Call) -> Fact:
    before, after = call.only().meta["val"], call.node.meta["val"]
    ours, theirs = _samples(call.only()), _samples(call.node)
    return Linear(
        Copy(
            lambda a: a.reshape(theirs.shape(after, ours.count(a))),
            lambda z: z.reshape(ours.shape(before, theirs.count(z))),
        )
    )


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
    aten.index.Tensor,
    aten.tile.default,
    aten.unfold.default,
    aten.im2col.default,
    aten.diagonal.default,
    anywhere=True,
)
def copy(call: Call) -> Fact:
    """Any operator whose outputs are copies of inputs or constants: the adjoint by autograd, the copies by counting."""
    node = call.only()
    if call.held:
        raise Refusal("it chooses by values that depend on the input")
    before, ours, theirs = node.meta["val"], _samples(node), _samples(call.node)
    replaced = {"value": 0.0} if call.arguments.get("value") else {}  # a padding constant is no part of the linear map
    schema = call.operator._schema.arguments

    def forward(a: Tensor) -> Tensor:
        n = ours.count(a)
        given = {s.name: replaced.get(s.name, call.arguments["input" if s.name == "self" else s.name]) for s in schema}
        given = {name: a if v is node else fx.map_arg(v, lambda s: _at(s.meta["val"], n)) for name, v in given.items()}
        out = call.operator(
            *(given[s.name] for s in schema if not s.kwarg_only),
            **{s.name: given[s.name] for s in schema if s.kwarg_only},
        )
        assert isinstance(out, Tensor)
        return out

    def backward(z: Tensor) -> Tensor:
        shape = ours.shape(before, theirs.count(z))
        if 0 in shape:  # autograd refuses empty batches for some operators
            return z.new_zeros(shape)
        keep = torch.is_grad_enabled() and z.requires_grad  # linear in z, so differentiable as often as one likes
        with torch.enable_grad():
            a = z.new_zeros(shape).requires_grad_()
            return torch.autograd.grad(forward(a), a, z, create_graph=keep)[0]

    _keep_samples(call, forward, ours, theirs)
    counts = backward(call.like(torch.ones(theirs.shape(call.node.meta["val"], 1))))
    if ours.times > 1:  # the same for all samples, so for all that lies along their dimension, or not to be told
        if not bool((counts == counts.narrow(ours.axis, 0, 1)).all()):
            raise Refusal("it copies some of what is merged with the batch more often")
        counts = counts.narrow(ours.axis, 0, 1)
    return Linear(Copy(forward, backward, counts))


def _samples(node: fx.Node) -> Samples:
    found = Samples.of(node.meta["val"])
    if found is None:
        raise Refusal(
            'it selects or moves along the batch dimension; keep samples independent, or use strategy="global"'
        )
    return found


def _keep_samples(call: Call, forward: Callable[[Tensor], Tensor], ours: Samples, theirs: Samples) -> None:
    """Refuses a copy that mixes, moves or drops samples (each one is reversed on its own): copies the numbers of samples."""
    value, n = call.only().meta["val"], 3
    numbers = call.like(torch.arange(n)).repeat_interleave(ours.times)
    shape = ours.shape(value, n)
    given = numbers.view([-1 if i == ours.axis else 1 for i in range(len(shape))]).expand(shape).contiguous()
    copied, shifted = forward(given), forward(given + n)
    told = copied.movedim(theirs.axis, 0)
    right = call.like(torch.arange(n)).repeat_interleave(theirs.times)
    constant = (copied == shifted).movedim(theirs.axis, 0)
    if len(told) != len(right) or not bool((constant | (told == right.view(-1, *[1] * (told.dim() - 1)))).all()):
        raise Refusal(
            'it selects or moves along the batch dimension; keep samples independent, or use strategy="global"',
            final=True,
        )


def _at(size: Any, batch: int) -> int:
    """A traced size for a given number of samples."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.subs({symbol: batch for symbol in expression.free_symbols}))
    return int(size)
