"""What an operator is, as facts, and where they are registered.

A rule is a function ``rule(call) -> Fact`` registered for one or more operators. It states what the operator *is*; how to step
backwards through it is the business of :mod:`revprop.modes`. To cover a new operator::

    @rule(torch.ops.aten.atanh.default)
    def atanh(call: Call) -> Fact:
        return Pointwise(torch.atanh, preimage=lambda value, recorded: torch.tanh(value))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from revprop.graph import Graph
from revprop.linear_map import LinearMap
from revprop.windows import Windows

__all__ = ["Call", "Fact", "Linear", "Pointwise", "Refusal", "Selection", "describe", "registered", "rule"]


@dataclass(frozen=True)
class Linear:
    """``z = A a + b`` in the activations among the operator's arguments (several for a merge).

    ``windows`` is set where the map is a pooling, for modes that treat pooling by copying.
    """

    map: LinearMap
    windows: Windows | None = None


@dataclass(frozen=True)
class Pointwise:
    """``a = phi(z)``, entry by entry.

    Attributes:
        function: phi.
        preimage: (value, recorded z) -> the z nearest to the recorded one with ``phi(z) = value``, for values in the range.
        range: the smallest and largest value of phi; ``attained``: whether each is taken, or only approached.
        inverse: the textbook inverse where phi is no bijection (the identity for ReLU); without it ``preimage`` is one.
    """

    function: Callable[[Tensor], Tensor]
    preimage: Callable[[Tensor, Tensor], Tensor]
    range: tuple[float, float] = (-math.inf, math.inf)
    attained: tuple[bool, bool] = (False, False)
    inverse: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Selection:
    """Every output is the largest entry of one window of the input: max-pooling."""

    windows: Windows


Fact = Linear | Pointwise | Selection


class Refusal(Exception):
    """Raised by a rule that does not cover this very call; the text is the remedy shown to the user."""


@dataclass(frozen=True)
class Call:
    """One call of an operator in a graph: its arguments by name, constants as live tensors, activations as nodes."""

    graph: Graph
    node: fx.Node
    arguments: dict[str, Any]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The activations among the arguments, in order; the corrections a mode returns have this order."""
        return self.activations_of(self.node)

    def activations_of(self, node: fx.Node) -> tuple[fx.Node, ...]:
        found: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), lambda a: found.append(a) if a in self.graph.active else None)
        return tuple(found)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    @property
    def shape(self) -> tuple[int, ...]:
        """The output's shape behind the batch dimension."""
        return self.graph.shape(self.node)

    def shape_of(self, name: str = "input") -> tuple[int, ...]:
        """An activation argument's shape behind the batch dimension."""
        return self.graph.shape(self[name])

    def is_activation(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.graph.active

    def constant(self, name: str) -> Tensor | None:
        """A constant tensor argument (or None), refused where it depends on the input."""
        value = self.arguments.get(name)
        if self.is_activation(value):
            raise Refusal(f'its {name!r} depends on the input (a product of activations); use strategy="global"')
        if isinstance(value, fx.Node):
            raise Refusal(f'its {name!r} depends on the input or the batch size; use strategy="global"')
        return value if isinstance(value, Tensor) or value is None else torch.as_tensor(value)

    def like(self, values: Any) -> Tensor:
        """A tensor of the output's type, on the model's device."""
        if isinstance(values, fx.Node):
            raise Refusal('a factor that depends on the input or the batch size; use strategy="global"')
        parameter = next(self.graph.model.parameters(), None)
        return torch.as_tensor(
            values, dtype=self.node.meta["val"].dtype, device=parameter.device if parameter is not None else None
        )

    def only(self, name: str = "input") -> fx.Node:
        """The one activation, refused where another argument depends on the input, too."""
        if self.inputs != (self.arguments.get(name),):
            raise Refusal('more than one of its arguments depends on the input; use strategy="global"')
        node = self.arguments[name]
        assert isinstance(node, fx.Node)
        return node


_RULES: dict[Any, Callable[[Call], Fact]] = {}
_ANYWHERE: set[Any] = set()


def rule(*operators: Any, anywhere: bool = False) -> Callable[[Callable[[Call], Fact]], Callable[[Call], Fact]]:
    """Registers a function as the rule of these operators; registering one twice is an error.

    Args:
        anywhere: the rule holds wherever the batch dimension is; other rules are only asked where it is the first.
    """

    def register(function: Callable[[Call], Fact]) -> Callable[[Call], Fact]:
        for operator in operators:
            if operator in _RULES:
                raise ValueError(f"{operator} has a rule already: {_RULES[operator].__qualname__}")
            _RULES[operator] = function
            if anywhere:
                _ANYWHERE.add(operator)
        return function

    return register


def registered() -> dict[Any, Callable[[Call], Fact]]:
    """Operator -> rule, as registered."""
    return dict(_RULES)


def describe(graph: Graph, node: fx.Node) -> Fact:
    """The facts of one operator call.

    Raises:
        Refusal: with a remedy, where no rule covers it.
    """
    function = _RULES.get(node.target)
    if function is None:
        raise Refusal('no rule yet; use strategy="global", or register one (see "Write your own rule" in the docs)')
    call = Call(graph, node, _bind(graph, node))
    if node.target not in _ANYWHERE and not all(_batch_first(n.meta["val"]) for n in (node, *call.inputs)):
        raise Refusal('it mixes samples, or the batch is not the first dimension here; use strategy="global"')
    return function(call)


def _batch_first(value: Tensor) -> bool:
    """Whether the first dimension is the batch, or a multiple of it (the batch merged with others), and no other one is."""
    if (
        not value.shape
        or not isinstance(value.shape[0], torch.SymInt)
        or any(isinstance(d, torch.SymInt) for d in value.shape[1:])
    ):
        return False
    expression = value.shape[0].node.expr
    return all(expression == expression.coeff(symbol) * symbol for symbol in expression.free_symbols)


def _bind(graph: Graph, node: fx.Node) -> dict[str, Any]:
    schema = node.target._schema  # type: ignore[union-attr]
    named: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(node.args):
            value: Any = node.args[i]
        elif argument.name in node.kwargs:
            value = node.kwargs[argument.name]
        else:
            value = argument.default_value if argument.has_default_value() else None
        named[argument.name] = fx.map_arg(value, lambda a: _constant(graph, a))
    if "self" in named:
        named["input"] = named.pop("self")
    return named


def _constant(graph: Graph, node: fx.Node) -> Any:
    """The value of a constant; the node itself where it is an activation, a number, or depends on the batch size."""
    if node in graph.active or any(not isinstance(n.meta.get("val"), Tensor) for n in graph.ancestors([node])):
        return node
    if node in graph.constants:
        return graph.tensor(graph.constants[node]).detach()
    with torch.no_grad():
        return graph.segment((), (node,))()[0]


def as_tuple(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """torch's way of giving one number for all dimensions."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
