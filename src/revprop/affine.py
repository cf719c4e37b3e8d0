"""A network as the affine map that it is at its recorded values: linear in its input and in constants that have names.

Every operator is run so that its output is *linear* (homogeneous) in what moves, jointly with entries: biases, running means,
position embeddings, and the constant parts of operators. Then for any unit c, with h the gradient with respect to the input x and
h_b the gradients with respect to the entries b,

    c = <x, h> + sum <b, h_b>

holds to rounding (Euler's identity; for piecewise linear networks AdjointBackMapV2 Eq. 4). How each operator is run so is the
business of :mod:`revprop.completion`; here is the run itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from revprop.graph import Graph
from revprop.samples import Samples
from revprop.segment import INSTEAD

__all__ = ["Entry", "Kind", "Run", "Runner", "Use", "given", "order", "plan", "source_name", "title"]


@dataclass
class Entry:
    """Something constant that the network adds.

    Attributes:
        value: b; with a row for each sample where these differ (``rows``). leaf: (rows, *b.shape), what gradients are taken with
            respect to: b itself for each row, or what is ``factor`` b in a sum (several entries may share a leaf).
    """

    value: Tensor
    leaf: Tensor
    rows: bool = False
    factor: Tensor | None = None


@dataclass
class Use:
    """A constant where it is added, with a leaf of its own for every position there.

    Attributes:
        leaf: the entry's. value: (rows, c, *positions), what gradients are taken with respect to. node: what it is added to.
        repeated: per dimension of the positions, whether the constant is the same for all.
    """

    leaf: Tensor
    value: Tensor
    node: fx.Node
    repeated: tuple[bool, ...]


@dataclass
class Run:
    """A run of the part of a network in front of some values.

    Attributes:
        values: of the nodes asked for. inputs: the leaves of floating point inputs, by argument name. entries: by name.
        held: what was held, in words, by name of the operator. fronts: of convolutions and matrix products that these were asked
            of, the values in front of their own bias. uses: of the entries, where these are laid out by position.
    """

    values: dict[fx.Node, Tensor] = field(default_factory=dict)
    fronts: dict[fx.Node, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)


class Runner:
    """Runs a graph node by node.

    Args:
        inputs: the model's inputs; of double precision where everything is to be.
        kind: operator -> how it is run. held: operator -> those of its arguments that it holds.
        lift: makes a leaf of a detached value.
        bare: a convolution or matrix product whose own bias is left out. fronts: those whose values in front of it are kept.
        by_position: entries are laid out over the positions of what they are added to, which is (rows, c, *positions): the
            gradients are those of :attr:`Run.uses`.
    """

    def __init__(
        self,
        graph: Graph,
        inputs: tuple[Tensor, ...],
        kind: Callable[[Graph, fx.Node], Kind],
        held: Callable[[Graph, fx.Node], frozenset[fx.Node]],
        lift: Callable[[Tensor], Tensor],
        bare: fx.Node | None = None,
        fronts: Collection[fx.Node] = (),
        by_position: bool = False,
    ) -> None:
        self.graph, self.kind, self.held, self.lift, self.bare, self.fronts = graph, kind, held, lift, bare, fronts
        self.by_position = by_position
        self.rows = len(inputs[0])
        self.dtype = next((x.dtype for x in inputs if x.is_floating_point()), torch.get_default_dtype())
        self.device = inputs[0].device
        self.env: dict[fx.Node, Any] = {}
        self.result = Run()
        self._names: dict[tuple[str, Any], str] = {}
        self._shared: dict[tuple[str, ...], Tensor] = {}
        for node, name, x in zip(graph.inputs, graph.input_names, inputs, strict=True):
            self.env[node] = self.result.inputs.setdefault(name, lift(x.detach())) if x.is_floating_point() else x

    def run(self, wanted: tuple[fx.Node, ...]) -> Run:
        """Runs what is in front of some nodes, and drops values that are not needed again."""
        nodes, last, live = plan(self.graph, wanted, self.held)
        for node in nodes:
            if node not in self.env:
                self.env[node] = self._value(node, node in live)
            for done in last.get(node, ()):
                self.env.pop(done, None)
        self.result.values = {node: self.env[node] for node in wanted}
        return self.result

    def _value(self, node: fx.Node, live: bool) -> Any:
        graph = self.graph
        if node in graph.constants:
            return self.cast(graph.tensor(graph.constants[node]).detach())
        if live and any(a in graph.movable for a in node.all_input_nodes):
            return self.kind(graph, node)(self, node)
        with torch.no_grad():
            found = self.native(node)
        if live:  # looked up by index: the first value that can move
            return self.constant(title(graph, node), found, node, node)
        return found

    def native(self, node: fx.Node, instead: dict[fx.Node, Any] | None = None) -> Any:
        """The operator itself, on the values of its arguments or on others instead."""
        env = self.env if instead is None else {**self.env, **instead}
        args: Any = _valued(node.args, env)
        kwargs: Any = _valued(node.kwargs, env) if node.kwargs else {}
        if self.dtype == torch.float64:  # an operator that names single precision
            args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: torch.float64 if a is torch.float32 else a)
        operator: Any = node.target
        return INSTEAD.get(operator, operator)(*args, **kwargs)

    def cast(self, value: Tensor) -> Tensor:
        """A constant in the precision of the run."""
        return value.to(self.dtype) if value.is_floating_point() and self.dtype == torch.float64 else value

    def moving(self, node: fx.Node) -> dict[fx.Node, Any]:
        """The arguments of an operator that move, and their values."""
        return {a: self.env[a] for a in dict.fromkeys(node.all_input_nodes) if a in self.graph.movable}

    def hold(self, node: fx.Node, words: str) -> None:
        """Notes that something at an operator was held."""
        self.result.held.setdefault(title(self.graph, node), words)

    # -- entries ---------------------------------------------------------------------------------------------------------

    def entry(self, name: str, value: Tensor, key: Any = None) -> Tensor:
        """The leaf (rows, *value.shape) of a value that all rows share; the same name and key give the same leaf again."""
        return self._leaf(name, (key, tuple(value.shape)), value, value.expand(self.rows, *value.shape), False)

    def _leaf(self, name: str, key: Any, value: Tensor, rows: Tensor, differ: bool) -> Tensor:
        if (name, key) not in self._names:
            unique = self._names[name, key] = self._unique(name)
            self.result.entries[unique] = Entry(value.detach(), self.lift(rows.detach().contiguous()), differ)
        return self.result.entries[self._names[name, key]].leaf

    def _rows_of(self, value: Tensor) -> Tensor:
        return self.lift(value.detach().expand(self.rows, *value.shape).contiguous())

    def _unique(self, name: str) -> str:
        """The name itself, or where something else has it, with a number behind it."""
        unique, k = name, 1
        while unique in self.result.entries:
            unique, k = f"{name}@{k}", k + 1
        return unique

    def bias(self, source: fx.Node, node: fx.Node, behind: int) -> Tensor:
        """A parameter that an operator adds, as an entry: in front of so many more dimensions of the operator's output."""
        return self.spread(self.entry(*self._named(source, node)), node, behind=behind)

    def shift(self, parts: Sequence[tuple[fx.Node, Tensor | None]], node: fx.Node, behind: int) -> Tensor:
        """``sum factor b`` over parameters b (a factor of None is 1), added as :meth:`bias` is: entries that share a leaf."""
        named = [(*self._named(source, node), factor) for source, factor in parts]
        key = tuple(name for name, *_ in named)
        if key not in self._shared:
            terms = [value if factor is None else factor * value for _, value, _, factor in named]
            leaf = self._rows_of(torch.stack(terms).sum(0) if len(terms) > 1 else terms[0])
            for name, value, _, factor in named:
                self.result.entries[self._unique(name)] = Entry(value.detach(), leaf, False, factor)
            self._shared[key] = leaf
        return self.spread(self._shared[key], node, behind=behind)

    def _named(self, source: fx.Node, node: fx.Node) -> tuple[str, Tensor, Any]:
        name = source_name(self.graph, source, node)
        return name, self.env[source], None if source in self.graph.constants else source

    def constant(self, name: str, value: Any, source: fx.Node | None, node: fx.Node) -> Tensor:
        """A constant that is added at ``node``, as an entry laid out to broadcast there.

        Args:
            source: the node it is the value of, if any. Its rows may differ (a mask): then each has its own value.
        """
        samples = Samples.of(source.meta["val"]) if source is not None else None
        if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
            value = value.to(self.dtype)
        if samples is not None and isinstance(value, Tensor):
            apart = samples.apart(value) if samples.times > 1 else value.movedim(samples.axis, 0)
            differ = source in self.graph.active
            own = apart if differ else apart[0] if len(apart) else apart.new_zeros(apart.shape[1:])
            leaf = self._leaf(name, source, own, apart, differ)
            laid = samples.together(leaf) if samples.times > 1 else leaf.movedim(0, samples.axis)
            return self._use(leaf, laid, node) if self.by_position else laid
        value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else self.dtype, device=self.device)
        key = source if name not in self.graph.constants.values() else None
        return self.spread(self.entry(name, value, node if source is None else key), node)

    def rest(self, node: fx.Node, out: Tensor, rest: Tensor, result: int | None = None) -> Tensor:
        """An operator's output whose constant part gets an entry of the operator's name: a one, times what it is."""
        size = float(out.detach().abs().amax()) if out.numel() else 0.0
        if not rest.numel() or float(rest.abs().amax()) <= 16 * torch.finfo(out.dtype).eps * size:
            return out
        return (
            out - rest + rest * self.spread(self.entry(title(self.graph, node), rest.new_ones(()), node), node, result)
        )

    def spread(self, leaf: Tensor, node: fx.Node, result: int | None = None, behind: int = 0) -> Tensor:
        """A leaf (rows, *constant's shape) laid out to broadcast against the value of a node (or one of its results), in front of
        so many more dimensions of it, its samples where they lie."""
        laid = self._laid(leaf.view(*leaf.shape, *[1] * behind) if behind else leaf, node, result)
        return self._use(leaf, laid, node) if self.by_position else laid

    def _use(self, leaf: Tensor, laid: Tensor, node: fx.Node) -> Tensor:
        repeated = tuple(size == 1 for size in laid.shape[2:])
        positions = [s if r else -1 for s, r in zip(self.graph.shape(node)[1:], repeated, strict=True)]
        value = self.lift(laid.detach().expand(-1, -1, *positions))
        self.result.uses.append(Use(leaf, value, node, repeated))
        return value

    def _laid(self, leaf: Tensor, node: fx.Node, result: int | None) -> Tensor:
        samples, dims = _layout(self.graph, node, result)
        missing = dims - (leaf.dim() - 1)
        if samples == _FIRST and not missing and leaf.shape[1] == 1:
            return leaf.squeeze(1)
        if samples == _FIRST and missing == 1:
            return leaf
        padded = leaf.reshape(len(leaf), *[1] * missing, *leaf.shape[1:])
        if samples is None or padded.shape[1 + samples.axis] != 1:
            raise ValueError(
                f"{title(self.graph, node)} adds a constant that differs along the batch, which is no one sample's: give the "
                "batch a dimension of its own in front"
            )
        if samples.times > 1:
            # several results (a recurrent layer's) merge the batch as their input does
            merged = node if result is None else next(a for a in node.all_input_nodes if a in self.graph.movable)
            outer, inner = order(self.graph, merged)
            padded = padded.repeat_interleave(inner, 0).repeat(outer, *[1] * (padded.dim() - 1))
        return padded.movedim(0, samples.axis).flatten(samples.axis, samples.axis + 1)


Kind = Callable[[Runner, fx.Node], Any]


def given(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by name, as the graph holds them; what is not given is left out."""
    return dict(zip(_argument_names(node.target), node.args, strict=False)) | node.kwargs


@lru_cache(maxsize=1024)
def _argument_names(operator: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in operator._schema.arguments)


def _valued(argument: Any, env: dict[fx.Node, Any]) -> Any:
    """An operator's arguments with values in place of nodes."""
    if isinstance(argument, fx.Node):
        return env[argument]
    if isinstance(argument, tuple | list):
        return [_valued(a, env) for a in argument]
    if isinstance(argument, dict):
        return {name: _valued(a, env) for name, a in argument.items()}
    return argument


_FIRST = Samples(0)


def _layout(graph: Graph, node: fx.Node, result: int | None) -> tuple[Samples | None, int]:
    """Where the samples of a node's value (or of one of its results) lie, and its number of dimensions."""
    key = ("layout", node, result)
    if key not in graph.factored:
        value = node.meta["val"] if result is None else node.meta["val"][result]
        graph.factored[key] = (Samples.of(value), value.dim())
    return graph.factored[key]


def title(graph: Graph, node: fx.Node) -> str:
    """The name of an operator: its module's path and what it does, such as ``features.3:hardtanh``."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    path = graph.path(node)
    return f"{path}:{name}" if path else name


def source_name(graph: Graph, node: fx.Node, user: fx.Node) -> str:
    """The name of a constant: that of its parameter or buffer where it is one, up to its shape; else of what computes it."""
    while node not in graph.constants:
        read = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]  # sizes are none of it
        if len(read) != 1:
            break
        node = read[0]
    return graph.constants.get(node) or title(graph, user)


def order(graph: Graph, node: fx.Node) -> tuple[int, int]:
    """Of a dimension that merges the batch with others, (outer, batch, inner): the sizes of those before and behind it."""
    key = ("order", node)
    if key not in graph.factored:
        ids = _sample_ids(graph, node)
        inner = int((ids == ids[0]).long().cumprod(0).sum())
        graph.factored[key] = (len(ids) // (2 * inner), inner)
    return graph.factored[key]


def _sample_ids(graph: Graph, node: fx.Node) -> Tensor:
    """For two samples, which of them each entry along the merged dimension belongs to: followed from where they are apart."""
    samples = Samples.of(node.meta["val"])
    assert samples is not None
    if samples.times == 1:
        return torch.arange(2)
    before = next(a for a in node.all_input_nodes if a in graph.movable)
    neighbours = torch.arange(2).repeat_interleave(samples.times)  # as usual, what belongs to a sample lies together
    ours = Samples.of(before.meta["val"])
    ids = _sample_ids(graph, before) if ours is not None else neighbours
    if ours is None or (ours == samples and node.target not in _MOVES):
        return ids
    shape, after = ours.shape(before.meta["val"], 2), samples.shape(node.meta["val"], 2)
    full = ids.view(-1, *[1] * (len(shape) - 1 - ours.axis)).expand(shape)
    if node.target in _MOVES:
        operator: Any = node.target
        moved = operator(full, *node.args[1:], **node.kwargs)
    elif math.prod(shape) == math.prod(after):
        moved = full.reshape(after)
    else:
        return neighbours
    return moved.movedim(samples.axis, 0).flatten(1)[:, 0]


aten = torch.ops.aten
_MOVES = {
    *(aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.squeeze.dims, aten.select.int, aten.slice.Tensor, aten.flip.default, aten.roll.default),
}


def plan(
    graph: Graph, wanted: tuple[fx.Node, ...], held: Callable[[Graph, fx.Node], frozenset[fx.Node]]
) -> tuple[list[fx.Node], dict[fx.Node, list[fx.Node]], set[fx.Node]]:
    """The nodes in front of those asked for, in order; after each those whose values are not needed again; and those that move
    them: all that can, but for what is held on every way (the weights of an attention and what these are computed from)."""
    key = ("affine", wanted)
    if key not in graph.factored:
        needed = graph.ancestors(wanted)
        plan = [n for n in graph.fx_graph.nodes if n in needed and (n.op == "call_function" or n in graph.constants)]
        last = {a: node for node in plan for a in node.all_input_nodes}
        after: dict[fx.Node, list[fx.Node]] = {}
        for a, node in last.items():
            if a not in wanted:
                after.setdefault(node, []).append(a)
        live = set(wanted) & graph.movable
        for node in reversed(plan):
            if node in live:
                live |= {a for a in node.all_input_nodes if a in graph.movable and a not in held(graph, node)}
        graph.factored[key] = (plan, after, live)
    return graph.factored[key]
