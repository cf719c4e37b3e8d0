"""One unit for one input, explained: the row that a page of ``revprop explain`` is made of."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from revprop.adjoint import hypersurface
from revprop.completeness import completeness
from revprop.graph import Graph
from revprop.heads import MODES, head_of

__all__ = ["largest_unit", "run"]


def run(
    graph: Graph,
    x: Tensor,
    layer: str = "output",
    unit: tuple[int, ...] = (),
    mode: str = "unit",
    float64: bool = False,
    maps: str | None = None,
) -> dict[str, Any]:
    """Explains one unit of a layer for one input.

    Args:
        graph: a traced network of one floating point input. x: (1, *input shape).
        layer, mode, float64: as for :func:`revprop.hypersurface`. unit: its index; the largest one's where empty.
        maps: the layer whose feature maps are compared with reconstructed ones; where not given, the layer itself, or if it has
            no maps, the last one in front of it that has.

    Returns:
        ``layer``, ``mode``, ``unit``, ``chosen`` (whether the unit was left open), ``value``, ``reconstructed``; ``x``, ``h`` and
        ``contributions`` (input shape); ``input``, what the input contributes; ``shares``, what each constant contributes, as
        (name, module, kind, value) in forward order; ``held``; ``maps``, their layer; ``original`` and ``features``, its values (in
        single precision as the network itself computes them) and the reconstructed ones; ``text``, the printed form; ``double``,
        the precision.

    Raises:
        ValueError: as :func:`revprop.hypersurface`; or the input holds no floating point numbers.

    >>> import revprop
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> row = run(revprop.trace(net, torch.zeros(2, 1, 2, 2)), torch.ones(1, 1, 2, 2), unit=(1,))
    >>> [(module, kind) for _, module, kind, _ in row["shares"]], row["h"].shape, row["held"]
    ([('1', 'biases'), ('3', 'biases')], torch.Size([1, 2, 2]), {})
    """
    index = unit or largest_unit(graph, x, layer, mode, float64)
    found = hypersurface(graph, x, layer, index, mode, float64=float64)
    if found.image is None or found.contributions is None:
        raise ValueError("the input holds indices, no floating point numbers: explain from an embedding's output on")
    assert found.units is not None
    maps = maps or _layer_with_maps(graph, layer)
    features = completeness(graph, x, [maps], float64=float64)[maps]
    with torch.no_grad():
        original = features.value if float64 else graph.segment(graph.inputs, (graph.node(maps),))(x)[0]
    return {
        "layer": layer,
        "mode": found.mode,
        "unit": found.units[0],
        "chosen": not unit,
        "value": float(found.value[0]),
        "reconstructed": float(found.reconstructed[0]),
        "x": next(iter(found.inputs.values()))[0].cpu(),
        "h": found.image[0].cpu(),
        "contributions": found.contributions[0].cpu(),
        "input": float(found.image_contribution[0]),
        "shares": [(name, *_owner(graph, name), float(value[0])) for name, value in found.bias_contributions.items()],
        "held": dict(found.held),
        "maps": maps,
        "original": original[0].cpu(),
        "features": features.reconstructed[0].cpu(),
        "text": str(found),
        "double": float64,
    }


def largest_unit(
    graph: Graph, x: Tensor, layer: str = "output", mode: str = "unit", float64: bool = False
) -> tuple[int, ...]:
    """The index of the unit with the largest value for one input (of an output of logits: the predicted class).

    Of a slice (RM3, RM4): the in-channel that gives most to the largest unit of RM1, or RM2.

    Raises:
        ValueError: an unknown layer or mode, or a mode that is not for this layer.

    >>> import revprop
    >>> graph = revprop.trace(torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False)), torch.zeros(2, 2))
    >>> _ = graph.model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> largest_unit(graph, torch.tensor([[3.0, 5.0]]))
    (1,)
    """
    head = head_of(graph, layer, mode)
    if head.mode in ("RM3", "RM4"):
        out, *position = largest_unit(graph, x, layer, "RM1" if head.mode == "RM3" else "RM2", float64)
        slices = [(out, channel, *position) for channel in range(head.shape[1])]
        values = hypersurface(graph, x, layer, slices, mode, float64=float64).value[0]
        return slices[int(values.argmax())]
    value = completeness(graph, x, [layer], MODES[mode], float64=float64)[layer].value[0]
    return tuple(int(i) for i in torch.unravel_index(value.argmax(), value.shape))


def _layer_with_maps(graph: Graph, layer: str) -> str:
    """The layer itself where its features are maps, else the last one in front of it whose are."""
    layers = list(graph.layers)
    for name in reversed(layers[: layers.index(layer) + 1]):
        shape = graph.shape(graph.node(name))
        if len(shape) == 3 and math.prod(shape[1:]) > 1 and graph.node(name) not in graph.inputs:
            return name
    return layer


def _owner(graph: Graph, name: str) -> tuple[str, str]:
    """The module that a constant belongs to, and what it is."""
    bare = re.sub(r"@\d+$", "", name)
    if bare in graph.constants.values():
        module, _, leaf = bare.rpartition(".")
        return module or bare, "running means" if leaf == "running_mean" else "biases"
    return name.partition(":")[0], "constants of operators"
