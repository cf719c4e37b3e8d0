"""The identity of :mod:`revprop.adjoint` for every unit of every layer at once, by one forward derivative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from revprop.adjoint import in_precision, relative_error
from revprop.completion import run_affine
from revprop.graph import Example, Graph
from revprop.hardware import channels_last
from revprop.heads import Head, head_of
from revprop.reverse import as_graph

__all__ = ["Completeness", "completeness"]


@dataclass(frozen=True)
class Completeness:
    """A layer's values and what the identity makes of them, for every unit: ``value``, ``reconstructed``, (n, *shape)."""

    value: Tensor
    reconstructed: Tensor

    @property
    def relative_error(self) -> Tensor:
        """As :attr:`Hypersurface.relative_error`."""
        return relative_error(self.value, self.reconstructed)


def completeness(
    model: nn.Module | Graph,
    x: Example,
    layers: Sequence[str] | None = None,
    mode: str = "unit",
    *,
    float64: bool = False,
) -> dict[str, Completeness]:
    """The identity for every unit of every layer at once: one forward derivative along [x; b] gives ``<x, h> + sum <b, h_b>``.

    Args:
        model, x, mode, float64: as for :func:`hypersurface`. layers: names; all where not given (of a mode other than "unit": all
            that it is for).

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3))
    >>> found = completeness(net, torch.randn(6, 4))
    >>> list(found), bool(found["2"].relative_error.abs().max() < 1e-3)
    (['0', '1', '2', 'output'], True)
    """
    graph = as_graph(model, x)
    inputs = in_precision(graph.check_input(x), float64)
    names = layers if layers is not None else [n for n in graph.layers if graph.node(n) not in graph.inputs]
    found = {}
    for bare, group in _groups(graph, names, mode, layers is not None).items():
        nodes = tuple(dict.fromkeys(head.node for head in group.values()))
        with torch.no_grad(), forward_ad.dual_level():
            laid = tuple(channels_last(v) for v in inputs)
            run = run_affine(graph, laid, nodes, _along_itself, bare=bare)
            duals = {node: forward_ad.unpack_dual(run.values[node]) for node in nodes}
        for name, head in group.items():
            dual = duals[head.node]
            tangent = torch.zeros_like(dual.primal) if dual.tangent is None else dual.tangent
            found[name] = Completeness(dual.primal, tangent)
    return {name: found[name] for name in names if name in found}


def _along_itself(value: Tensor) -> Tensor:
    return forward_ad.make_dual(value, torch.where(value.isinf(), 0.0, value))


def _groups(graph: Graph, names: Sequence[str], mode: str, asked: bool) -> dict[fx.Node | None, dict[str, Head]]:
    """Layers by what has to run without its bias: those of mode "unit" all in one run."""
    groups: dict[fx.Node | None, dict[str, Head]] = {}
    for name in names:
        try:
            head = head_of(graph, name, mode)
        except ValueError:
            if asked:
                raise
            continue
        groups.setdefault(head.bare, {})[name] = head
    return groups
