"""What the racecar study measures of a network: the input that its reverse pass gives back, and the information in its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from revprop.experiments.baseline import Data
from revprop.graph import Graph
from revprop.information import information_plane
from revprop.racecar import Racecar
from revprop.training import Epoch

__all__ = ["in_bytes", "observed_epochs", "plane_of", "plane_rows", "reconstruction"]

BINS = 30  # of a unit's range, as Shwartz-Ziv and Tishby (2017) took them
POINTS = 24  # epochs in an information plane


def reconstruction(model: nn.Module | Graph, x: Tensor, layers: int, chunk: int = 500) -> tuple[float, Tensor, Tensor]:
    """What the reverse pass gives back of inputs, through the first so many layers.

    Args:
        model: in eval mode, or its graph. x: (n, ...). layers: learned layers from the first on. chunk: inputs at once.

    Returns:
        |I' - I| / |I| over all of ``x``; the first chunk of I, and of I'.
    """
    reverse = Racecar(model, x[:2], layers=layers, weight=1.0)
    apart = size = 0.0
    first: Tensor | None = None
    for part in x.split(chunk):
        back = reverse.regenerate(part)["input"]
        apart += float((back - part).double().square().sum())
        size += float(part.double().square().sum())
        first = back if first is None else first
    assert first is not None
    return (apart / size) ** 0.5, x[:chunk], first


def in_bytes(original: Tensor, regenerated: Tensor) -> dict[str, Tensor]:
    """Inputs and what came back of them as pictures, from 0 to 255 by the range of each input; one that leaves this range is
    scaled into it, so that what it shows is seen whatever its size.

    >>> in_bytes(torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.0, 20.0, 10.0]]))["regenerated"]
    tensor([[  0, 255, 128]], dtype=torch.uint8)
    """
    found = {}
    low, high = (edge(original.flatten(1), 1) for edge in (torch.amin, torch.amax))
    for name, part in (("original", original), ("regenerated", regenerated)):
        flat = part.flatten(1).nan_to_num()
        first = torch.minimum(low, flat.amin(1)).unsqueeze(1)
        reach = torch.maximum(high, flat.amax(1)).unsqueeze(1) - first
        found[name] = (255 * (flat - first) / reach.clamp_min(1e-12)).round().to(torch.uint8).view_as(part)
    return found


def observed_epochs(epochs: int) -> frozenset[int]:
    """Those at which the information is measured: 0, the last, and at most so many between, as far apart as their logarithms.

    >>> sorted(observed_epochs(5))
    [0, 1, 2, 3, 4, 5]
    """
    steps = [round((epochs + 1) ** (i / (POINTS - 1))) - 1 for i in range(POINTS)]
    return frozenset([0, epochs, *(step for step in steps if 0 <= step <= epochs)])


def plane_of(graph: Graph, data: Data) -> dict[str, float]:
    """I(X; L) and I(L; Y) in bits of the output of every block of a traced network, over all inputs of a task.

    Returns:
        under "x.<block>" and "y.<block>".
    """
    place = next(graph.model.parameters()).device
    x, y = (torch.cat((data.train[i], data.test[i])).to(place) for i in (0, 1))
    blocks = [name for name, _ in graph.model.named_children()]
    points = information_plane(graph, x, y, blocks, BINS).points
    return {f"x.{p.layer}": p.input_bits for p in points} | {f"y.{p.layer}": p.label_bits for p in points}


def plane_rows(history: Sequence[Epoch]) -> list[dict[str, object]]:
    """The information as rows keep it, in the form of :meth:`revprop.InformationPlane.rows`."""
    return [
        {
            "layer": name[2:],
            "epoch": e.epoch,
            "input_bits": value,
            "label_bits": e.observed[f"y.{name[2:]}"],
        }
        for e in history
        for name, value in e.observed.items()
        if name.startswith("x.")
    ]
