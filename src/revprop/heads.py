"""What a unit is: the reconstruction modes RM0 to RM4 of AdjointBackMapV2 (section 3.3, Eq. 8-13), and entries of any layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from revprop.affine import given
from revprop.errors import near_matches
from revprop.families import BY_COLUMNS, CONVOLUTIONS
from revprop.graph import Graph

__all__ = ["MODES", "Head", "head_of"]

MODES = {
    "unit": "unit",
    "front": "front",
    "RM0": "RM0",
    "logit": "RM0",
    "RM1": "RM1",
    "channel": "RM1",
    "RM2": "RM2",
    "position": "RM2",
    "RM3": "RM3",
    "channel slice": "RM3",
    "RM4": "RM4",
    "slice": "RM4",
}
"""Names of the modes in plain words and as the paper has them; "front" is RM0 or RM2, as the layer is."""


@dataclass(frozen=True)
class Head:
    """Units as linear functionals of one value of the graph.

    Attributes:
        node: that value. shape: of all units. bare: the operator whose own bias does not count. mode: by the paper's name.
        operator, weight: of a slice, the convolution behind ``node`` and the name of its weight.
    """

    graph: Graph
    node: fx.Node
    shape: tuple[int, ...]
    mode: str
    bare: fx.Node | None = None
    operator: fx.Node | None = None

    def units(self, unit: Any) -> list[tuple[int, ...]] | None:
        """The indices asked for; None for all.

        Raises:
            ValueError: an index that is none of the units'.
        """
        if unit is None:
            return None
        several = isinstance(unit, Sequence) and bool(len(unit)) and isinstance(unit[0], Sequence)
        found = [tuple(u) if isinstance(u, Sequence) else (u,) for u in (unit if several else [unit])]
        for index in found:
            fits = len(index) == len(self.shape) and all(
                isinstance(i, int) and -d <= i < d for i, d in zip(index, self.shape, strict=True)
            )
            if not fits:
                raise ValueError(f"unit: expected an index within {self.shape} ({self.mode}); given {index}")
        return [tuple(i % d for i, d in zip(index, self.shape, strict=True)) for index in found]

    def cotangent(self, value: Tensor, units: Sequence[tuple[int, ...]], images: int, repeat: int) -> Tensor:
        """The functionals at :attr:`node`, for each image one row per unit (``repeat`` rows, the last ones 0)."""
        if self.operator is not None:
            rows = self._slices(value, units)
        else:
            rows = torch.zeros((len(units), *value.shape[1:]), dtype=value.dtype, device=value.device)
            index = torch.tensor(units, device=value.device).view(len(units), -1)
            at = (torch.arange(len(units), device=value.device), *index.unbind(1))
            rows[at] = 1.0
        found = value.new_zeros((images, repeat, *value.shape[1:]))
        found[:, : len(units)] = rows
        return found.flatten(0, 1)

    def _slices(self, value: Tensor, units: Sequence[tuple[int, ...]]) -> Tensor:
        """What a convolution takes from one in-channel: its adjoint of (out channel, position), cut to the in-channel."""
        operator = self.operator
        assert operator is not None
        arguments = given(operator)
        weight = self.graph.tensor(self.graph.constants[arguments["weight"]]).detach().to(value.dtype)
        rest = {k: v for k, v in arguments.items() if k not in ("input", "weight", "bias")}
        with torch.enable_grad():
            zeros = torch.zeros((len(units), *value.shape[1:]), dtype=value.dtype, device=value.device).requires_grad_()
            convolution: Any = operator.target
            out = convolution(zeros, weight, None, *rest.values())
            picked = [
                out[(r, u[0], *u[2:])].sum()
                for r, u in enumerate(units)  # one position, or all of them
            ]
            (found,) = torch.autograd.grad(torch.stack(picked).sum(), zeros)
        mask = torch.zeros((len(units), value.shape[1]), dtype=value.dtype, device=value.device)
        mask[torch.arange(len(units)), torch.tensor([u[1] for u in units])] = 1.0
        return found * mask.view(*mask.shape, *[1] * (value.dim() - 2))


def head_of(graph: Graph, layer: str, mode: str) -> Head:
    """What a unit of a layer is in a mode.

    Raises:
        ValueError: an unknown layer or mode, or a mode that is not for this layer.
    """
    if mode not in MODES:
        raise ValueError(near_matches(mode, MODES, "mode"))
    mode = MODES[mode]
    node = graph.node(layer)
    if mode == "unit":
        if not node.meta["val"].is_floating_point():
            raise ValueError(f"layer {layer!r} holds no floating point numbers: there is nothing to explain")
        return Head(graph, node, graph.shape(node), mode)
    operators = {"RM0": BY_COLUMNS, "front": {*BY_COLUMNS, *CONVOLUTIONS}}.get(mode, CONVOLUTIONS)
    inside = [n for n in (graph.inside(layer) if layer not in ("input", "output") else {node}) if n.target in operators]
    if len(inside) != 1:
        words = {"RM0": "fully connected layer", "front": "convolution or matrix product"}.get(mode, "convolution")
        able = [n for n in graph.layers if any(o.target in operators for o in [graph.node(n)])]
        raise ValueError(
            f"mode {mode} is of one {words}, and layer {layer!r} has {len(inside)} of them; layers that are one: "
            f"{', '.join(able[:20]) or 'none'}{', ...' if len(able) > 20 else ''}"
        )
    operator = inside[0]
    shape = graph.shape(operator)
    if mode in ("RM0", "RM2", "front"):
        return Head(graph, operator, shape, mode, operator)
    if mode == "RM1":
        return Head(graph, operator, shape[:1], mode, operator)
    source = operator.args[0]
    assert isinstance(source, fx.Node)
    channels = graph.shape(source)[0]
    units = (shape[0], channels) if mode == "RM3" else (shape[0], channels, *shape[1:])
    return Head(graph, source, units, mode, None, operator)
