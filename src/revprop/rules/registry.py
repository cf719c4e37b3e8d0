"""What an operator is, as facts, and where they are registered.

A rule is a function ``rule(call) -> Fact`` registered for one or more operators. It states what the operator *is*; how to step
backwards through it is the business of :mod:`revprop.modes`. To cover a new operator::

    @rule(torch.ops.aten.atanh.default)
    def atanh(call: Call) -> Fact:
        return Pointwise(torch.atanh, preimage=lambda value, recorded: torch.tanh(value))
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from revprop.graph import Graph
from revprop.linear_map import LinearMap
from revprop.samples import Layout, Samples
from revprop.windows import Windows

__all__ = [
    "MARGIN",
    "Call",
    "Fact",
    "Linear",
    "Nonlinear",
    "Pointwise",
    "Refusal",
    "Selection",
    "bind",
    "closed",
    "describe",
    "registered",
    "rule",
    "searched",
    "whole",
]

MARGIN = (
    1e-3  # how far from the end of an open range a target is kept, as a share of the range (of 1 where it is unbounded)
)


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


@dataclass(frozen=True)
class Nonlinear:
    """``y = f(x_1, ..., x_k)``: differentiable, neither linear nor entry by entry (softmax, norms, products, attention).

    Attributes:
        function: the values of :attr:`Call.values` -> the output.
        preimage: (wanted output, *the same values) -> for each activation that moves the value nearest to the one given with
            ``f = wanted`` (where none gives it: for the attainable output that the rule says), or None for one that is to
            stay as it is. Without one, modes search by Gauss-Newton.
        linear: the same values -> (which of them, the linear map in it) where the others are as recorded: the values of an
            attention by its recorded weights.
        layout: where the samples of the values lie (filled in by :func:`describe`).
        entrywise: whether every output depends on the entry at the same place alone: searched entry by entry.
    """

    function: Callable[..., Tensor]
    preimage: Callable[..., tuple[Tensor | None, ...]] | None = None
    linear: Callable[..., tuple[int, LinearMap]] | None = None
    layout: Layout = Layout()
    entrywise: bool = False


Fact = Linear | Pointwise | Selection | Nonlinear


class Refusal(Exception):
    """Raised by a rule that does not cover this very call; the text is the remedy shown to the user.

    Args:
        final: whether to search a preimage instead would be wrong, too.
    """

    def __init__(self, remedy: str, final: bool = False) -> None:
        super().__init__(remedy)
        self.final = final


@dataclass(frozen=True)
class Call:
    """One call of an operator in a graph: its arguments by name, constants as live tensors, activations as nodes.

    Attributes:
        operator: what is called. moving: the activations that may move; others (masks, token indices, what by-passes the
            layers asked for) are held at their recorded values. within: of several operators as one, these; entrywise: whether
            they make a function entry by entry. precision: of constants; that of the traced value where not given.
    """

    graph: Graph
    node: fx.Node
    operator: Any
    arguments: dict[str, Any]
    moving: frozenset[fx.Node]
    within: frozenset[fx.Node] = frozenset()
    entrywise: bool = False
    precision: torch.dtype | None = None

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The activations among the arguments that move, in order; the corrections a mode returns have this order."""
        return tuple(node for node in _nodes(self.arguments) if node in self.moving)

    @cached_property
    def held(self) -> tuple[fx.Node, ...]:
        """The tensors among the arguments that depend on the input or the batch size and do not move."""
        found = (n for n in _nodes(self.arguments) if n not in self.moving and isinstance(n.meta.get("val"), Tensor))
        return tuple(dict.fromkeys(found))

    @property
    def values(self) -> tuple[fx.Node, ...]:
        """What a :class:`Nonlinear` fact is given the values of: each activation that moves, then each that is held."""
        return (*dict.fromkeys(self.inputs), *self.held)

    @property
    def layout(self) -> Layout:
        """Where the samples of :attr:`values` and of the output lie."""
        moving = tuple(Samples.of(node.meta["val"]) for node in dict.fromkeys(self.inputs))
        held = tuple(Samples.of(node.meta["val"]) for node in self.held)
        return Layout(moving, held, Samples.of(self.node.meta["val"]))

    def run(self, *values: Tensor) -> Tensor:
        """The operator itself, on :attr:`values`."""
        return self.graph.segment(self.values, (self.node,))(*values)[0]

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

    @property
    def batch_first(self) -> bool:
        """Whether the batch is the first dimension of the output and of everything that moves."""
        return all(_batch_first(node.meta["val"]) for node in (self.node, *self.inputs))

    def is_activation(self, value: Any) -> bool:
        """Whether an argument is an activation that moves."""
        return isinstance(value, fx.Node) and value in self.moving

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
            values,
            dtype=self.precision or self.node.meta["val"].dtype,
            device=parameter.device if parameter is not None else None,
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
        for target in operators:
            if target in _RULES:
                raise ValueError(f"{target} has a rule already: {_RULES[target].__qualname__}")
            _RULES[target] = function
            if anywhere:
                _ANYWHERE.add(target)
        return function

    return register


def registered() -> dict[Any, Callable[[Call], Fact]]:
    """Operator -> rule, as registered."""
    return dict(_RULES)


def bind(graph: Graph, node: fx.Node, moving: Collection[fx.Node] | None = None) -> Call:
    """One operator call, its arguments by name.

    Args:
        moving: the activations that may move; all that can where not given.
    """
    source = (
        node.args[0] if node.target is operator.getitem else node
    )  # one of several results belongs to who returns them
    assert isinstance(source, fx.Node)
    return Call(
        graph, node, source.target, _bind(graph, source), frozenset(graph.movable if moving is None else moving)
    )


def whole(
    graph: Graph, last: fx.Node, region: frozenset[fx.Node], moving: Collection[fx.Node], entrywise: bool = False
) -> Call:
    """Several operators as one call: those of a region with one result."""
    read = [a for n in graph.nodes if n in region for a in n.all_input_nodes if a not in region]
    values = [a for a in dict.fromkeys(read) if a in graph.active or a in graph.recorded]
    return Call(graph, last, None, {str(a): a for a in values}, frozenset(moving), region, entrywise)


def describe(call: Call) -> Fact:
    """The facts of one call: those of its rule, or what it computes, for modes to search its preimage.

    Raises:
        Refusal: with a remedy, where no rule covers it and there is nothing to differentiate.
    """
    try:
        return closed(call)
    except Refusal as refusal:
        return searched(call, refusal)


def closed(call: Call) -> Fact:
    """The facts by a rule. Raises Refusal where there is none, or where it does not cover this very call."""
    function = _RULES.get(call.operator)
    if function is None:
        raise Refusal('no rule yet; use strategy="global", or register one (see "Write your own rule" in the docs)')
    if call.operator not in _ANYWHERE and not call.batch_first:
        raise Refusal('it mixes samples, or the batch is not the first dimension here; use strategy="global"')
    fact = function(call)
    return replace(fact, layout=call.layout) if isinstance(fact, Nonlinear) else fact


def searched(call: Call, refusal: Refusal) -> Nonlinear:
    """What the operator computes, for its preimage to be searched. Raises the refusal where that cannot be done: where an
    output of one sample depends on another, or nothing can be differentiated."""
    fact = Nonlinear(call.run, layout=call.layout, entrywise=call.entrywise)
    if not call.inputs or refusal.final or None in (*fact.layout.moving, fact.layout.output):
        raise refusal
    try:
        _try(call, fact)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise refusal from error
    return fact


def _try(call: Call, fact: Nonlinear) -> None:
    """Runs an operator on made values of two samples. Raises where it has no slope, or where one sample's output depends on
    another."""
    generator = torch.Generator().manual_seed(0)

    def made(node: fx.Node) -> Tensor:
        value, samples = node.meta["val"], Samples.of(node.meta["val"])
        shape = samples.shape(value, 2) if samples is not None else tuple(int(size) for size in value.shape)
        if value.dtype == torch.bool:  # nothing masked
            return torch.ones(shape, dtype=torch.bool)
        if not value.is_floating_point():  # the first index
            return torch.zeros(shape, dtype=value.dtype)
        return 0.1 + 0.8 * torch.rand(shape, generator=generator).to(value.dtype)

    device = call.like(0.0).device
    values = [made(node).to(device) for node in call.values]
    count, last = len(fact.layout.moving), fact.layout.output
    assert last is not None
    with torch.enable_grad():
        leaves = [value.requires_grad_() for value in values[:count]]
        rows = last.rows(fact.function(*leaves, *values[count:]))
        of_each = [torch.autograd.grad(row.sum(), leaves, allow_unused=True, retain_graph=True) for row in rows]
    for i, gradients in enumerate(of_each):
        found = [
            samples.rows(gradient)[1 - i]
            for gradient, samples in zip(gradients, fact.layout.moving, strict=True)
            if gradient is not None and samples is not None
        ]
        if any(bool((part != 0).any()) for part in found):
            raise ValueError("one sample depends on another")


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
        name = "input" if argument.name == "self" else argument.name
        named[name] = fx.map_arg(value, lambda a: _constant(graph, a))
    return named


def _nodes(arguments: dict[str, Any]) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(tuple(arguments.values()), lambda node: found.append(node))
    return found


def _constant(graph: Graph, node: fx.Node) -> Any:
    """The value of a constant; the node itself where it is an activation, a number, or depends on the batch size."""
    if node in graph.active or any(
        not isinstance(n.meta.get("val"), Tensor | tuple | list) for n in graph.ancestors([node])
    ):
        return node
    if node in graph.constants:
        return graph.tensor(graph.constants[node]).detach()
    with torch.no_grad():
        return graph.segment((), (node,))()[0]


def as_tuple(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """torch's way of giving one number for all dimensions."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
