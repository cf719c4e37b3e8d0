"""A trained network as a functional graph whose values are named by module path.

``trace`` runs ``torch.export`` in eval mode and keeps the semantic operators (a convolution stays one operator), so that
in-place, functional and module spellings of one thing become one operator. The graph reads every parameter and buffer live
from the user's model at each call and never writes to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from revprop.errors import near_matches, require_finite
from revprop.export import export, verify
from revprop.inputs import Example, arguments_of, in_order
from revprop.outputs import Call, Choice, Path, paths_of
from revprop.program import program_of
from revprop.segment import Segment, build_segment

__all__ = ["Example", "Graph", "Segment", "trace"]

aten = torch.ops.aten


class Graph:
    """The traced network. Made by :func:`trace`; holds the user's model by reference and never changes it.

    Attributes:
        model: the user's model.
        layers: names a user can point at, in forward order: "input", module paths, "output". The second call of a
            reused module is ``path@1``. A layer's features are its module's output.
        nodes: the operators between input and output that depend on the input, in forward order.
        inputs: the placeholders of the model's inputs; output: the node of its output.
        active: the inputs and the values that depend on them. movable: those of them that a correction can reach: floating
            point, from the inputs or an embedding of token indices on, through operators that have a slope.
        input_names: the arguments of the model's forward that the inputs are, in their order.
        outputs: the path and shape (without the batch) of each of the model's outputs that the output consists of.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        inputs: Sequence[fx.Node],
        constants: Mapping[fx.Node, str],
        tensors: Mapping[str, Tensor],
        output: fx.Node,
    ) -> None:
        self.model = model
        self.fx_graph = graph
        self.inputs = tuple(inputs)
        self.output = output
        self.input_names: tuple[str, ...] = tuple(node.meta.get("argument", node.name) for node in self.inputs)
        self.outputs: tuple[tuple[Path, tuple[int, ...]], ...] = output.meta.get("outputs", ())
        self.constants = dict(constants)
        self._tensors = dict(tensors)
        self._segments: dict[tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]], Segment] = {}
        self.factored: dict[
            Any, Any
        ] = {}  # what the walk backwards has factored; its steps refer to this graph, so it lives here
        depends = set(self.inputs)
        for node in graph.nodes:
            if node.op == "call_function" and _is_tensor(node) and any(a in depends for a in node.all_input_nodes):
                depends.add(node)
        wanted = self.ancestors([output])
        self.nodes = tuple(n for n in graph.nodes if n.op == "call_function" and n in depends and n in wanted)
        self.active = frozenset(depends & wanted)
        self.movable = frozenset(self._movable())
        self._layers = _name_layers(self)
        self.layers = tuple(self._layers)

    # -- names ---------------------------------------------------------------------------------------------------------

    def node(self, layer: str) -> fx.Node:
        """The node whose value is this layer's features.

        Raises:
            ValueError: an unknown layer, with the near matches.
        """
        if layer not in self._layers:
            raise ValueError(near_matches(layer, self.layers, "layer"))
        return self._layers[layer]

    def inside(self, layer: str) -> frozenset[fx.Node]:
        """The operators of a module call, by its layer name.

        Raises:
            ValueError: an unknown layer, with the near matches.
        """
        self.node(layer)
        return frozenset(n for n in self.nodes if layer in _module_stack(n))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The static shape of a node's value behind the batch dimension; -1 where the batch was moved to."""
        # int() of a symbolic size would fix the batch size of the whole graph to the example's
        return tuple(-1 if isinstance(d, torch.SymInt) else int(d) for d in node.meta["val"].shape[1:])

    def _movable(self) -> set[fx.Node]:
        found = {n for n in self.inputs if _is_floating(n)}
        for node in self.nodes:
            if not _is_floating(node) or node.target in _FLAT:
                continue
            if node.target in _LOOKUPS or any(a in found for a in node.all_input_nodes):
                found.add(node)
        return found

    def reached(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes themselves and every value that moves when they do."""
        found = set(nodes)
        for node in self.nodes:
            if node in self.movable and any(a in found for a in node.all_input_nodes):
                found.add(node)
        return found

    def per_sample(self, node: fx.Node) -> bool:
        """Whether a node's value is one tensor whose first dimension is the samples, neither merged with others nor moved."""
        value = node.meta.get("val")
        return isinstance(value, Tensor) and str(value.shape[:1]) == str(self.inputs[0].meta["val"].shape[:1])

    @staticmethod
    def path(node: fx.Node) -> str:
        """The module path a node was called in; the empty string is the model itself."""
        stack = _module_stack(node)
        return stack[-1] if stack else ""

    # -- parameters, live ----------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """A parameter, buffer or traced constant by name, as the model holds it now."""
        if name in self._tensors:
            value = self._tensors[name]
            device = next((p.device for p in self.model.parameters()), value.device)
            return value if value.device == device else value.to(device)
        holder, _, leaf = name.rpartition(".")
        module: Any = self.model
        for part in holder.split(".") if holder else ():  # get_submodule's checks would cost more than a small layer
            module = module._modules[part]
        value = getattr(module, leaf)
        assert isinstance(value, Tensor)
        return value

    def parameters_of(self, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
        """Names of the parameters (not buffers) that these operators read, directly or through constant arithmetic."""
        read = self.ancestors(nodes, stop=self.active)
        trainable = {id(p) for p in self.model.parameters()}
        return tuple(
            name for node, name in self.constants.items() if node in read and id(self.tensor(name)) in trainable
        )

    def on(self, model: nn.Module) -> Graph:
        """The same graph reading the parameters of a copy of the model."""
        return Graph(model, self.fx_graph, self.inputs, self.constants, self._tensors, self.output)

    # -- structure -----------------------------------------------------------------------------------------------------

    def ancestors(self, nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
        """The nodes themselves and everything they are computed from; nodes in ``stop`` are not passed through."""
        held, found, stack = set(stop), set(), list(nodes)
        first = set(stack)
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            stack.extend(a for a in node.all_input_nodes if a not in held or (a in first and a not in found))
        return found

    def descendants(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes themselves and every operator computed from them, as far as the output depends on it."""
        found = set(nodes)
        for node in self.nodes:
            if any(a in found for a in node.all_input_nodes):
                found.add(node)
        return found

    # -- running -------------------------------------------------------------------------------------------------------

    def segment(self, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Segment:
        """Compiles the part of the graph that computes ``outputs`` from ``inputs`` and the parameters.

        Raises:
            ValueError: where the outputs need a model input that is not among ``inputs``.
        """
        key = (tuple(inputs), tuple(outputs))
        if key not in self._segments:
            self._segments[key] = build_segment(self, *key)
        return self._segments[key]

    def behind(self, layer: str) -> tuple[Segment, tuple[fx.Node, ...]]:
        """The network behind a layer: a segment from (the layer, the values that by-pass it) to the output.

        Returns the segment and the by-passing nodes, whose recorded values are held.
        """
        node = self.node(layer)
        changed = self.descendants([node])
        needed = [n for n in self.nodes if n in changed and n is not node]
        held = dict.fromkeys(a for n in needed for a in n.all_input_nodes if a in self.active and a not in changed)
        by_pass = tuple(held)
        return self.segment((node, *by_pass), (self.output,)), by_pass

    def check_input(self, x: Example) -> tuple[Tensor, ...]:
        """The model's inputs as a tuple in the traced order, checked for names, number, shape and finite values.

        Raises:
            ValueError: another number of tensors, unknown or missing names, another shape behind the batch dimension or
                another kind of numbers (floating point, indices) than was traced.
            NonFiniteError: NaN or infinity.
        """
        values = in_order(x, self.input_names)
        for name, node, value in zip(self.input_names, self.inputs, values, strict=True):
            expected, traced = self.shape(node), node.meta["val"]
            if tuple(value.shape[1:]) != expected or value.dim() == 0:
                raise ValueError(
                    f"input {name!r} was traced as (n, {', '.join(map(str, expected))}); given: {tuple(value.shape)}"
                )
            if value.is_floating_point() != traced.is_floating_point():
                raise ValueError(f"input {name!r} was traced as {traced.dtype}; given: {value.dtype}")
            require_finite(value, f"input {name!r}")
        if len({len(value) for value in values}) > 1:
            raise ValueError(
                f"expected inputs of one batch size; given: {', '.join(str(len(value)) for value in values)}"
            )
        return values

    def split_output(self, output: Tensor) -> tuple[Tensor, ...]:
        """The parts of an output ``(n, total)`` in their own shapes ``(n, ...)``, in the order of ``trace(..., output=[...])``.

        Works on all that has the output's shape: outputs, wanted outputs, corrections. One output is returned as it is.

        >>> class Heads(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 4)
        ...     def forward(self, x):
        ...         return {"a": self.a(x), "b": self.b(x).view(-1, 2, 2)}
        >>> graph = trace(Heads(), torch.zeros(1, 3), output=["a", "b"])
        >>> output = graph(torch.zeros(5, 3))
        >>> output.shape, [part.shape for part in graph.split_output(output)]
        (torch.Size([5, 6]), [torch.Size([5, 2]), torch.Size([5, 2, 2])])
        """
        if tuple(output.shape[1:]) != self.shape(self.output):
            expected = ", ".join(map(str, self.shape(self.output)))
            raise ValueError(f"expected the output's shape (n, {expected}); given {tuple(output.shape)}")
        if len(self.outputs) < 2:
            return (output,)
        parts = output.split([math.prod(shape) for _, shape in self.outputs], dim=1)
        return tuple(part.reshape(len(output), *shape) for part, (_, shape) in zip(parts, self.outputs, strict=True))

    def record(self, x: Example) -> dict[fx.Node, Tensor]:
        """Runs the network once and returns the value of every node that depends on the input or the batch size, and the inputs."""
        values = self.check_input(x)
        with torch.no_grad():
            results = self.segment(self.inputs, self.recorded)(*values)
        return {**dict(zip(self.inputs, values, strict=True)), **dict(zip(self.recorded, results, strict=True))}

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """The position of each node in forward order."""
        return {node: i for i, node in enumerate(self.fx_graph.nodes)}

    @cached_property
    def recorded(self) -> tuple[fx.Node, ...]:
        """The operators, and the constants they read whose size is that of the batch (they are no parameters)."""
        read = {a for node in self.nodes for a in node.all_input_nodes if a not in self.active}
        sized = [
            n
            for n in self.fx_graph.nodes
            if n in read
            and isinstance(n.meta.get("val"), Tensor)
            and any(isinstance(a.meta.get("val"), torch.SymInt) for a in self.ancestors([n]))
        ]
        return (*self.nodes, *sized)

    def __call__(self, x: Example) -> Tensor:
        """The network's output, as the model in eval mode computes it."""
        return self.segment(self.inputs, (self.output,))(*self.check_input(x))[0]

    def __repr__(self) -> str:
        return f"Graph({type(self.model).__name__}, {len(self.nodes)} operators, {len(self.layers)} layers)"


def trace(model: nn.Module, example: Example, *, output: Choice = None) -> Graph:
    """Traces a model into a functional graph with named layers; the batch size stays free.

    The model is exported in eval mode and left exactly as it was (training flags, attributes, parameters, buffers, gradients,
    hooks). It is run on three samples of the example, twice, and the graph has to give the same.

    Args:
        model: any module that ``torch.export`` can export.
        example: an input ``(n, ...)``, a tuple of inputs in the order of ``forward``, or a dict of them by argument name, such
            as ``{"input_ids": ids, "attention_mask": mask}``; floating point, integers or flags, the batch first.
        output: which of the model's outputs is run backwards, where it returns several: an index, a key or attribute name, or
            a path of these such as ``("logits",)`` or ``(0, 1)``. A list of these makes them one output (n, total): they
            flattened and concatenated along dimension 1, so that goals on several are possible; see
            :meth:`Graph.split_output`. A structure that holds one floating point tensor needs no choice.

    Returns:
        A :class:`Graph`; ``graph.layers`` are the names that :func:`revprop.reconstruct` and :func:`revprop.post_train` take.

    Raises:
        ExportError: what in the model stops the export, with its line and the usual rewrite; or, with their shapes, the
            outputs to choose from.
        ValueError: an example that is no batch, or that ``forward`` does not take.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> trace(net, torch.zeros(1, 3)).layers
    ('input', '0', '1', '2', 'output')
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module; given {type(model).__name__}")
    paths = paths_of(output)
    arguments = arguments_of(model, example)
    call = Call(model, arguments, paths)
    program = program_of(call, export(call, arguments))
    graph = Graph(model, program.graph, program.inputs, program.constants, program.tensors, program.output)
    verify(call, arguments, lambda values: graph.segment(graph.inputs, (graph.output,))(*values)[0])
    return graph


_LOOKUPS = frozenset({aten.embedding.default, aten.embedding_bag.default})
# without a slope: what they give is held
_FLAT = frozenset(
    {
        *(aten.sign.default, aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default),
        *(aten.heaviside.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
        *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.rand_like.default),
    }
)


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(part, Tensor) and part.is_floating_point() for part in parts)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | tuple | list)


def _module_stack(node: fx.Node) -> list[str]:
    """Module paths around a node, outermost first, a repeated call of a module as ``path@k``."""
    return [call.removesuffix("@0") for call in node.meta.get("nn_module_stack", ())]


def _name_layers(graph: Graph) -> dict[str, fx.Node]:
    """Layer name -> node: of each module call, the one value that something outside of it uses."""
    inside: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        for path in _module_stack(node):
            if path:
                inside.setdefault(path, []).append(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[str, fx.Node] = {}
    for path, nodes in inside.items():
        members = set(nodes)
        leaving = [n for n in nodes if n is graph.output or any(u not in members and u in order for u in n.users)]
        # features are per sample: a value that merges or moves the batch dimension is no layer
        if len(leaving) == 1 and graph.per_sample(leaving[0]):
            found[path] = leaving[0]
    named = dict(sorted(found.items(), key=lambda item: (order[item[1]], -item[0].count("."))))
    inputs = dict(zip((f"input:{name}" for name in graph.input_names), graph.inputs, strict=True))
    first = {"input": graph.inputs[0]} if len(graph.inputs) == 1 else inputs
    return {**first, **named, "output": graph.output}
