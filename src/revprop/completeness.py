"""The identity of :mod:`revprop.adjoint` for every unit of every layer at once, by one forward derivative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from revprop.adjoint import check_run, in_precision, relative_error
from revprop.completion import run_affine
from revprop.graph import Example, Graph
from revprop.hardware import channels_last
from revprop.heads import Head, head_of
from revprop.reverse import as_graph

__all__ = ["Completeness", "completeness"]

ALONG = 0.7  # the derivative is taken along so much of [x; b]: along all of it, it would be the network's own run over again


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

    The derivative is rounded otherwise than the values are, but in the order of the network's own sums: the explicit dot products
    of :func:`hypersurface` differ from it by their rounding.

    Args:
        model, x, mode, float64: as for :func:`hypersurface`. layers: names; all where not given (of a mode other than "unit": all
            that it is for).

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3))
    >>> found = completeness(net, torch.randn(6, 4))
    >>> list(found), bool(found["2"].relative_error.abs().max() < 1e-3)
    (['0', '1', '2', 'output'], True)
    """
    graph = as_graph(model, x)
    inputs = graph.check_input(x)
    names = layers if layers is not None else [n for n in graph.layers if graph.node(n) not in graph.inputs]
    heads = _heads(graph, names, mode, layers is not None)
    if not heads:
        return {}
    nodes = tuple(dict.fromkeys(head.node for head in heads.values()))
    check_run(graph, nodes, inputs)
    inputs = in_precision(inputs, float64)
    fronts = {head.bare for head in heads.values() if head.bare is not None}
    with torch.no_grad(), forward_ad.dual_level():
        laid = tuple(channels_last(v) for v in inputs)
        run = run_affine(graph, laid, nodes, _along_itself, fronts=fronts)
        duals = {
            name: forward_ad.unpack_dual(run.values[head.node] if head.bare is None else run.fronts[head.bare])
            for name, head in heads.items()
        }
    found = {}
    for name, (value, tangent) in duals.items():
        both = (value, torch.zeros_like(value) if tangent is None else tangent / ALONG)
        if heads[name].mode == "RM1":
            both = (both[0].flatten(2).sum(2), both[1].flatten(2).sum(2))
        found[name] = Completeness(*both)
    return found


def _along_itself(value: Tensor) -> Tensor:
    return forward_ad.make_dual(value, ALONG * torch.where(value.isinf(), 0.0, value))


def _heads(graph: Graph, names: Sequence[str], mode: str, asked: bool) -> dict[str, Head]:
    """What a unit of each layer is; of layers that were not asked for, those that the mode is for."""
    found = {}
    for name in names:
        try:
            head = head_of(graph, name, mode)
            if head.operator is not None:
                raise ValueError(
                    f"mode {mode!r}: what comes from one channel has no value of its own in a run; use hypersurface"
                )
        except ValueError:
            if asked:
                raise
            continue
        found[name] = head
    return found
