"""The one walk backwards over a graph, and the proof, before any computation, that every operator on the way is covered."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from revprop.errors import UnsupportedOperatorError
from revprop.graph import Example, Graph, trace
from revprop.linear_map import Factor
from revprop.modes import Mode
from revprop.outputs import Choice
from revprop.regions import inputs_of, regions
from revprop.rules import Call, Fact, Linear, Nonlinear, Pointwise, Refusal, bind, closed, describe, searched

__all__ = ["Coverage", "Step", "check", "factors_behind", "walk"]


@dataclass(frozen=True)
class Step:
    """One operator or block, ready to be stepped through: its facts and what the mode prepared from the weights.

    Attributes:
        inputs: what moves. held: the other values that its facts are about. node: whose value it gives.
        name: the operator, or "block".
    """

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    held: tuple[fx.Node, ...]
    fact: Fact
    state: Factor | None
    name: str

    @property
    def searched(self) -> bool:
        """Whether its preimage is searched, for want of a closed form."""
        return isinstance(self.fact, Nonlinear) and self.fact.preimage is None


@dataclass(frozen=True)
class Coverage:
    """What :func:`check` found; ``str()`` prints a table.

    Attributes:
        rows: per operator call that a correction can reach (operator, module path, output shape, kind, remedy); kind is
            "closed form"; "fallback": the preimage is searched by Gauss-Newton; "stops here": an embedding of token indices,
            which cannot move; or "no rule".
        covered: whether the greedy strategy gets through every operator; the global one needs no rules.
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
        searched = sum(kind == "fallback" for *_, kind, _ in self.rows)
        by = f", {searched} of them by fallback" if searched else ""
        verdict = (
            "everything is covered" if self.covered else 'strategy="global" works on all layers; greedy on those behind'
        )
        return "\n".join([*lines, f"{good} of {len(self.rows)} operators covered{by}: {verdict}"])


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
    return Coverage(tuple((*_name(graph, node), *_kind(graph, node)) for node in _operators(graph)))


def _kind(graph: Graph, node: fx.Node) -> tuple[str, str]:
    call = bind(graph, node)
    if not call.inputs:
        return "stops here", "what it looks up moves, the indices cannot"
    try:
        closed(call)
    except Refusal as refusal:
        try:
            searched(call, refusal)
        except Refusal:
            return "no rule", str(refusal)
        return "fallback", ""
    return "closed form", ""


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


def factors_behind(graph: Graph, mode: Mode, nodes: Iterable[fx.Node], blocks: Sequence[str] = ()) -> list[Step]:
    """The steps from the output down to the given nodes, factored, in reverse order.

    Args:
        blocks: layers each of which is stepped through as one map; of one that holds a given node, what lies behind it.

    Raises:
        UnsupportedOperatorError: all operators on the way without a rule, at once, before anything is factored.
    """
    # (node, mode, inputs that move) -> (copies of the weights read, step); factored again only when its weights have changed
    cache: dict[Any, Any] = graph.factored
    route = (frozenset(nodes), tuple(blocks))
    if route not in cache:
        cache[route] = _on_the_way(graph, *route)
    moving, planned = cache[route]
    fresh, refused = {}, []
    for i, (call, names, key) in enumerate(planned):
        weights = [graph.tensor(name).detach() for name in names]
        known = cache.get((mode, *key))
        if known is None or not all(_same(old, new) for old, new in zip(known[0], weights, strict=True)):
            now = call if call.within else bind(graph, call.node, moving)  # its constants as they are now
            try:
                fresh[i] = (weights, now, describe(now))
            except Refusal as refusal:
                refused.append((*_name(graph, call.node), str(refusal)))
    if refused:
        raise UnsupportedOperatorError(refused[::-1])
    for i, (weights, call, fact) in fresh.items():
        kept = [weight.clone() for weight in weights]
        name = "block" if call.within else _name(graph, call.node)[0]
        inputs = tuple(dict.fromkeys(call.inputs)) if isinstance(fact, Nonlinear) else call.inputs
        step = Step(call.node, inputs, call.held, fact, mode.prepare(fact), name)
        cache[mode, *planned[i][2]] = (kept, step)
    return [cache[mode, *key][1] for _, _, key in planned]


def _on_the_way(
    graph: Graph, targets: frozenset[fx.Node], blocks: tuple[str, ...]
) -> tuple[set[fx.Node], list[tuple[Call, tuple[str, ...], tuple[Any, ...]]]]:
    """What moves with the targets, and the calls between the output and them in reverse order, each with the names of the
    weights it reads and what tells it from other ways to call the same operator. Depends on the graph alone."""
    moving = graph.reached(targets)
    wholes, within = regions(graph, set(targets), moving, blocks)
    planned = []
    for node in reversed(_operators(graph)):
        if (
            node not in moving
            or not any(a in moving for a in inputs_of(node))
            or (node in within and node not in wholes)
        ):
            continue
        call = wholes.get(node) or bind(graph, node, moving)
        planned.append((call, _weights(graph, call), (node, call.values, len(call.held), call.within)))
    return moving, planned


def walk(
    graph: Graph,
    mode: Mode,
    recorded: Mapping[fx.Node, Tensor],
    change: Tensor,
    to: Sequence[fx.Node],
    blocks: Sequence[str] = (),
) -> dict[fx.Node, Tensor]:
    """Walks a correction of the output back to the given nodes, operator by operator.

    Args:
        recorded: every node's value, as :meth:`Graph.record` returns them. change: wanted minus recorded output.
        to: the nodes whose corrections are wanted. blocks: layers stepped through as one map each.

    Returns:
        node -> correction (wanted minus recorded value).
    """
    # what consumers ask for, and at which entries: (correction, 1 where asked; None: everywhere)
    asked: dict[fx.Node, list[tuple[Tensor, Tensor | None]]] = {graph.output: [(change, None)]}
    wanted = set(to)
    found: dict[fx.Node, Tensor] = {}
    with torch.no_grad():
        for step in factors_behind(graph, mode, to, blocks):
            asks = asked.pop(step.node, None)
            if asks is None:  # all that follows is to stay as it is
                continue
            joined, share = mode.join(*zip(*asks, strict=True)), _joined([share for _, share in asks])
            if step.node in wanted:
                found[step.node] = joined
            values = [recorded[node] for node in (*step.inputs, *step.held)]
            parts = mode.step(step.fact, step.state, values, recorded[step.node], joined)
            shares = _shares(step.fact, share, len(step.inputs), joined)
            for node, part, kept in zip(step.inputs, parts, shares, strict=True):
                if part is not None:
                    asked.setdefault(node, []).append((part, kept))
        for node in to:
            if node not in found:
                asks = asked.get(node)
                found[node] = mode.join(*zip(*asks, strict=True)) if asks else torch.zeros_like(recorded[node])
    return found


def _joined(shares: Sequence[Tensor | None]) -> Tensor | None:
    """The entries at which any consumer asks for something."""
    given = [share for share in shares if share is not None]
    return torch.stack(given).amax(0) if given and len(given) == len(shares) else None


def _shares(fact: Fact, share: Tensor | None, count: int, like: Tensor) -> tuple[Tensor | None, ...]:
    """The entries of each input at which a step asks for something; None: everywhere, or it is not followed further."""
    if isinstance(fact, Linear):
        return fact.map.reads(share, like) or (None,) * count
    return (share,) if isinstance(fact, Pointwise) else (None,) * count


def _operators(graph: Graph) -> list[fx.Node]:
    """The operators that a correction can reach; one with several results is found at each result that is used."""
    return [node for node in graph.nodes if node in graph.movable and isinstance(node.meta.get("val"), Tensor)]


def _weights(graph: Graph, call: Call) -> tuple[str, ...]:
    """The names of the weights a call reads."""
    read = graph.ancestors([call.node], stop=call.values)
    return tuple(name for constant, name in graph.constants.items() if constant in read)


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
    source = node.args[0] if node.target is operator.getitem else node
    name = str(source.target).removeprefix("aten.")  # type: ignore[union-attr]
    return name, graph.path(node), f"({shape})"
