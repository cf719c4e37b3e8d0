"""Which operands of a product, division or attention are held at their recorded values, so that it is linear in the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from revprop.affine import given
from revprop.families import CARRIED, GATES, PRODUCTS, QUOTIENTS
from revprop.graph import Graph

__all__ = ["held_operands"]

aten = torch.ops.aten


def held_operands(graph: Graph, node: fx.Node) -> frozenset[fx.Node]:
    """Those of an operator's arguments that it holds: a divisor, the gate of a product, all but the values of an attention."""
    factors = [a for a in _nodes(node.args) if a in graph.movable]
    distinct = frozenset(factors)
    if node.target is aten.scaled_dot_product_attention.default:
        value = node.args[2]
        return distinct - {value} if value in distinct and not given(node).get("dropout_p") else frozenset()
    if len(factors) != 2 or len(distinct) != 2 or node.target not in {*PRODUCTS, *QUOTIENTS}:
        return frozenset()
    if node.target in QUOTIENTS:
        return frozenset(factors[1:])
    ranks = [_gate(graph, a) for a in factors]
    return frozenset() if ranks[0] == ranks[1] else frozenset({factors[0] if ranks[0] > ranks[1] else factors[1]})


def _gate(graph: Graph, node: fx.Node) -> int:
    """How much of a gate a factor is: 2 where it is a sigmoid or softmax, up to constants and its shape; 1 tanh; 0 none."""
    while node.target not in GATES and node.target in CARRIED:
        moving = [a for a in node.all_input_nodes if a in graph.movable]
        if len(moving) != 1:
            return 0
        node = moving[0]
    target: Any = node.target
    return GATES.get(target, 0)


def _nodes(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, lambda a: found.append(a))
    return found
