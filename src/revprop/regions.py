"""Which operators a walk steps through as one map: blocks asked for, and functions of one value that are written out."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from revprop.graph import Graph
from revprop.rules import Call, Refusal, bind, closed, whole

__all__ = ["inputs_of", "regions"]

aten = torch.ops.aten
LONGEST = 24  # operators of a function that is written out
ENTRYWISE = frozenset(
    {
        *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor),
        *(aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.where.self, aten.where.ScalarSelf),
        *(aten.where.ScalarOther, aten.abs.default, aten.exp.default, aten.log.default, aten.log1p.default),
        *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.square.default, aten.pow.Tensor_Scalar),
        *(aten.tanh.default, aten.sigmoid.default, aten.erf.default, aten.softplus.default, aten.relu.default),
        *(aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.sin.default),
        *(aten.cos.default, aten.hardsigmoid.default, aten.elu.default, aten.silu.default, aten.maximum.default),
        *(aten.minimum.default, aten.leaky_relu.default, aten.atan.default, aten.clone.default),
    }
)
"""Operators whose every output depends on the entries of the inputs at the same place alone."""


def regions(
    graph: Graph, targets: set[fx.Node], moving: set[fx.Node], names: Sequence[str]
) -> tuple[dict[fx.Node, Call], set[fx.Node]]:
    """Operators that are stepped through as one: the last node of each region -> the region as one call, and all their nodes.

    Args:
        targets: the nodes asked for. moving: the values that move. names: layers that are to be regions; beside them, functions
            of one value that are written out entry by entry, such as ``x / (1 + |x|)``.
    """
    wholes: dict[fx.Node, Call] = {}
    within: set[fx.Node] = set()
    members = [(graph.node(name), graph.inside(name)) for name in names]
    for last, inside in sorted(members, key=lambda member: -len(member[1])):  # of nested ones the outer
        while last in inside and last not in targets and _alone(graph, last, moving):
            last = next(a for a in inputs_of(last) if a in moving)
        front = graph.ancestors(n for n in targets if n in inside and n is not last)
        behind = graph.ancestors([last])
        region = frozenset(n for n in inside if n in moving and n in behind and n not in front)
        if last in region and not region & within:
            wholes[last] = whole(graph, last, region, moving)
            within |= region
    for last in reversed(graph.nodes):
        found = _written_out(graph, last, targets, moving) if last in moving and last not in within else frozenset()
        if found and not found & within:
            wholes[last] = whole(graph, last, _with_conditions(graph, found), moving, entrywise=True)
            within |= found
    return wholes, within


def _written_out(graph: Graph, last: fx.Node, targets: set[fx.Node], moving: set[fx.Node]) -> frozenset[fx.Node]:
    """The operators of a function of one value written out entry by entry that ends in a merge; empty: it is none."""
    if last.target not in ENTRYWISE or len({a for a in last.all_input_nodes if a in moving}) < 2:
        return frozenset()
    order = graph.order
    region: set[fx.Node] = set()
    left = {last}
    while len(left) > 1 or left == {last}:
        node = max(left, key=order.__getitem__)  # what nothing else that is left depends on
        inputs = {a for a in node.all_input_nodes if a in moving}
        like = all(str(a.meta["val"].shape) == str(last.meta["val"].shape) for a in inputs)
        # a value asked for, or read elsewhere, too, has to be stepped to on its own
        inner = node is last or (node not in targets and all(user in region for user in node.users if user in moving))
        if node.target not in ENTRYWISE or not inputs or not like or not inner or len(region) == LONGEST:
            return frozenset()
        region.add(node)
        left = (left | inputs) - {node}
    return frozenset(region)


def _with_conditions(graph: Graph, region: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """The region and what is computed of its one value on the side: conditions and signs, which go along with it."""
    source = {a for node in region for a in node.all_input_nodes if a in graph.movable and a not in region}
    before = graph.ancestors(region)
    known = set(region | source)
    for node in graph.nodes:
        active = [a for a in node.all_input_nodes if a in graph.active]
        if node in before and active and all(a in known for a in active):
            known.add(node)
    return frozenset(known - source)


def _alone(graph: Graph, node: fx.Node, moving: set[fx.Node]) -> bool:
    """Whether an operator has one input that moves and a closed form: no need to search through it."""
    call = bind(graph, node, moving)
    if len(call.inputs) != 1:
        return False
    try:
        closed(call)
    except Refusal:
        return False
    return True


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """What an operator reads; for one of several results, what the operator that gives them reads."""
    source = node.args[0]
    picked = node.target is operator.getitem and isinstance(source, fx.Node)
    return source.all_input_nodes if picked else node.all_input_nodes  # type: ignore[union-attr]
