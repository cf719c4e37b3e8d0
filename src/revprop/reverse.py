"""The one walk backwards over a graph, and the proof, before any computation, that every operator on the way is covered."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from revprop.errors import UnsupportedOperatorError
from revprop.graph import Example, Graph, trace
from revprop.linear_map import Factor
from revprop.modes import Mode
from revprop.outputs import Choice
from revprop.rules import Fact, Refusal, describe

__all__ = ["Coverage", "Step", "check", "factors_behind", "walk"]


@dataclass(frozen=True)
class Step:
    """One operator, ready to be stepped through: its facts and what the mode prepared from the weights."""

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    fact: Fact
    state: Factor | None


@dataclass(frozen=True)
class Coverage:
    """What :func:`check` found; ``str()`` prints a table.

    Attributes:
        rows: per operator call (operator, module path, output shape, kind, remedy); kind is "closed form" or "no rule".
        covered: whether every operator has a rule, so that the greedy strategy runs; the global one needs none.
    """

    rows: tuple[tuple[str, str, str, str, str], ...]

    @property
    def covered(self) -> bool:
        return all(kind != "no rule" for *_, kind, _ in self.rows)

    def __str__(self) -> str:
        head = ("operator", "module", "output", "reverse")
        body = [
            (op, path or "-", shape, kind + (f": {remedy}" if remedy else ""))
            for op, path, shape, kind, remedy in self.rows
        ]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in [head, *body]
        ]
        good = sum(kind != "no rule" for *_, kind, _ in self.rows)
        verdict = (
            "everything is covered" if self.covered else 'strategy="global" works on all layers; greedy on those behind'
        )
        return "\n".join([*lines, f"{good} of {len(self.rows)} operators covered: {verdict}"])


def check(model: nn.Module | Graph, example: Example | None = None, *, output: Choice = None) -> Coverage:
    """Coverage of a network by reverse rules: every operator, its module, whether it has a closed form.

    Args:
        model: a module, or a traced graph. example, output: what :func:`revprop.trace` takes, for a module.

    Raises:
        ExportError: where the model cannot be traced.

    >>> print(check(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.zeros(1, 2)))
    operator        module  output  reverse
    linear.default  0       (n, 2)  closed form
    relu.default    1       (n, 2)  closed form
    2 of 2 operators covered: everything is covered
    """
    graph = as_graph(model, example, output)
    rows = []
    for node in _operators(graph):
        remedy = ""
        try:
            describe(graph, node)
        except Refusal as refusal:
            remedy = str(refusal)
        rows.append((*_name(graph, node), "no rule" if remedy else "closed form", remedy))
    return Coverage(tuple(rows))


def as_graph(model: nn.Module | Graph, example: Example | None, output: Choice = None) -> Graph:
    """The graph itself, or a model traced on an example."""
    if isinstance(model, Graph):
        if output is not None:
            raise ValueError("output: a graph was traced with the output it has; give output= to revprop.trace")
        return model
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module or a revprop.Graph, given {type(model).__name__}")
    if example is None:
        raise ValueError("a module is traced with an example input: give one, or pass the graph of revprop.trace")
    return trace(model, example, output=output)


def factors_behind(graph: Graph, mode: Mode, nodes: Iterable[fx.Node]) -> list[Step]:
    """The steps from the output down to the given nodes, factored, in reverse order.

    Raises:
        UnsupportedOperatorError: all operators on the way without a rule, at once, before anything is factored.
    """
    targets = set(nodes)
    below = graph.descendants(targets)
    on_the_way = [n for n in reversed(_operators(graph)) if n in below and any(a in below for a in n.all_input_nodes)]
    # (node, mode) -> (copies of the weights read, step); a step is factored again only when its weights have changed
    cache: dict[tuple[fx.Node, Mode], tuple[list[Tensor], Step]] = graph.factored
    steps, facts, refused = [], {}, []
    for node in on_the_way:
        weights = _weights(graph, node)
        known = cache.get((node, mode))
        if known is None or not all(_same(old, new) for old, new in zip(known[0], weights, strict=True)):
            try:
                facts[node] = (weights, describe(graph, node))
            except Refusal as refusal:
                refused.append((*_name(graph, node), str(refusal)))
    if refused:
        raise UnsupportedOperatorError(refused[::-1])
    for node in on_the_way:
        if node in facts:
            weights, fact = facts[node]
            kept = [weight.clone() for weight in weights]
            cache[node, mode] = (kept, Step(node, _activations(graph, node), fact, mode.prepare(fact)))
        steps.append(cache[node, mode][1])
    return steps


def walk(
    graph: Graph, mode: Mode, recorded: Mapping[fx.Node, Tensor], change: Tensor, to: Sequence[fx.Node]
) -> dict[fx.Node, Tensor]:
    """Walks a correction of the output back to the given nodes, operator by operator.

    Args:
        recorded: every node's value, as :meth:`Graph.record` returns them. change: wanted minus recorded output.
        to: the nodes whose corrections are wanted.

    Returns:
        node -> correction (wanted minus recorded value).
    """
    asked: dict[fx.Node, list[Tensor]] = {graph.output: [change]}
    wanted = set(to)
    below = graph.descendants(to)
    found: dict[fx.Node, Tensor] = {}
    with torch.no_grad():
        for step in factors_behind(graph, mode, to):
            joined = mode.join(asked.pop(step.node))
            if step.node in wanted:
                found[step.node] = joined
            inputs = [recorded[node] for node in step.inputs]
            for node, part in zip(
                step.inputs, mode.step(step.fact, step.state, inputs, recorded[step.node], joined), strict=True
            ):
                if node in below:
                    asked.setdefault(node, []).append(part)
        for node in to:
            if node not in found:
                parts = asked.get(node)
                found[node] = mode.join(parts) if parts else torch.zeros_like(recorded[node])
    return found


def _operators(graph: Graph) -> list[fx.Node]:
    """The operators; what picks one of several results belongs to the operator that returns them (none has a rule)."""
    return [node for node in graph.nodes if node.target is not operator.getitem]


def _activations(graph: Graph, node: fx.Node) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda a: found.append(a) if a in graph.active else None)
    return tuple(found)


def _weights(graph: Graph, node: fx.Node) -> list[Tensor]:
    """The weights an operator reads, as they are now."""
    read = graph.ancestors([node], stop=graph.active - {node})
    return [graph.tensor(name).detach() for constant, name in graph.constants.items() if constant in read]


def _same(old: Tensor, new: Tensor) -> bool:
    """By value: torch's version counters miss edits through ``.data``."""
    return old.dtype == new.dtype and old.device == new.device and torch.equal(old, new)


def _name(graph: Graph, node: fx.Node) -> tuple[str, str, str]:
    value = node.meta.get("val")
    shape = (
        ", ".join("n" if isinstance(d, torch.SymInt) else str(d) for d in value.shape)
        if isinstance(value, Tensor)
        else "several tensors"
    )
    name = str(node.target).removeprefix("aten.")
    return name, graph.path(node), f"({shape})"
