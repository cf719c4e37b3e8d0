"""A part of a traced network as a function: compiled once, its parameters read live at every call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from revprop.samples import Samples

if TYPE_CHECKING:
    from revprop.graph import Graph

__all__ = ["INSTEAD", "Segment", "build_segment"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Segment:
    """A part of a graph as a function: values of ``inputs`` in, values of ``outputs`` out, parameters read live.

    ``segment(*values)`` uses the model's parameters as they are now; ``segment(*values, parameters={...})`` uses those
    given by name instead, which is how training differentiates with respect to some of them only.
    """

    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    constants: tuple[str, ...]
    function: Callable[..., tuple[Tensor, ...]] = field(repr=False)
    read: Callable[[str], Tensor] = field(repr=False)

    def __call__(self, *values: Tensor, parameters: Mapping[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        given = parameters or {}
        constants = [given[name] if name in given else self.read(name) for name in self.constants]
        return self.function(*values, *constants)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Scaled dot-product attention; the fused kernels can be differentiated once only, so not where a slope is asked for."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        with sdpa_kernel(SDPBackend.MATH):
            return aten.scaled_dot_product_attention.default(query, key, value, *args, **kwargs)
    return aten.scaled_dot_product_attention.default(query, key, value, *args, **kwargs)


def _hardsigmoid(x: Tensor) -> Tensor:
    """``clamp(x + 3, 0, 6) / 6``: torch's own can be differentiated once only."""
    return (x + 3).clamp(0, 6) / 6


INSTEAD: dict[Any, Callable[..., Tensor]] = {
    aten.view.default: aten.reshape.default,  # the traced strides are the example's; other inputs may lie otherwise
    aten.scaled_dot_product_attention.default: _attention,
    aten.hardsigmoid.default: _hardsigmoid,
}


def build_segment(graph: Graph, inputs: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...]) -> Segment:
    """Compiles the part of ``graph`` from ``inputs`` to ``outputs``; :meth:`revprop.graph.Graph.segment` keeps the result.

    Sizes that the traced code reads off tensors outside of the part are read off the part's own inputs.

    Raises:
        ValueError: the part needs a model input that is not among ``inputs``.
    """
    given = set(inputs)
    needed = graph.ancestors([n for n in outputs if n not in given], stop=given)
    symbolic = {n for n in needed if isinstance(n.meta.get("val"), torch.SymInt)}
    # sizes are read off the segment's own inputs, so what they were read off in the whole graph is not needed for them
    tensors = graph.ancestors([n for n in outputs if n not in given], stop=given | symbolic) - symbolic
    missing = [n.name for n in graph.inputs if n in tensors and n not in given]
    if missing:
        raise ValueError(f"this part of the network also needs the model's input {', '.join(missing)}")
    new = fx.Graph()
    copied: dict[fx.Node, Any] = {node: new.placeholder(f"cut_{i}") for i, node in enumerate(inputs)}
    constants = [(n, name) for n, name in graph.constants.items() if n in tensors and n not in given]
    for i, (node, _) in enumerate(constants):
        copied[node] = new.placeholder(f"constant_{i}")
    sizes: dict[str, Any] = {}
    for i, node in enumerate(inputs):
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                sizes.setdefault(str(size), (i, dim, 1))
                samples = Samples.of(node.meta["val"])
                if samples is not None:  # a multiple of the batch: the batch, too, can be read off it
                    (batch,) = size.node.expr.free_symbols
                    sizes.setdefault(str(batch), (i, dim, samples.times))

    def size_of(node: fx.Node) -> Any:
        name = str(node.meta["val"])
        if name in sizes:
            if isinstance(sizes[name], tuple):
                i, dim, times = sizes[name]
                size = new.call_function(aten.sym_size.int, (copied[inputs[i]], dim))
                sizes[name] = size if times == 1 else new.call_function(operator.floordiv, (size, times))
            return sizes[name]
        if node.target is aten.sym_size.int:
            raise ValueError(f"the size {name} cannot be read off this part's inputs")
        return new.node_copy(node, lambda a: copied.setdefault(a, size_of(a)) if a not in copied else copied[a])

    for node in graph.fx_graph.nodes:
        if node in tensors and node not in copied and node.op == "call_function":
            copied[node] = new.node_copy(node, lambda a: copied[a] if a in copied else copied.setdefault(a, size_of(a)))
            copied[node].target = INSTEAD.get(node.target, node.target)
    new.output(tuple(copied[n] for n in outputs))
    module = fx.GraphModule(nn.Module(), new)
    return Segment(inputs, outputs, tuple(name for _, name in constants), module.forward, graph.tensor)
