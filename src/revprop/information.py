"""Mutual information of layers with input and label, in bits, by binning: the information plane of a network.

Tishby and Zaslavsky (2015); Shwartz-Ziv and Tishby (2017), whose task and plane racecar training is shown on (section 4, Fig. 2-4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from revprop.errors import require_finite
from revprop.families import BY_COLUMNS, CONVOLUTIONS
from revprop.graph import Example, Graph
from revprop.reverse import as_graph
from revprop.rules import Pointwise, Refusal
from revprop.rules.registry import bind, closed

__all__ = ["InformationPlane", "InformationPoint", "information_plane", "mutual_information"]

Range = tuple[float, float]
aten = torch.ops.aten
LEARNED = {*BY_COLUMNS, *CONVOLUTIONS, aten.mm.default, aten.matmul.default}
SHARES = {aten.softmax.int, aten.special_softmax.default, aten._softmax.default}  # each within (0, 1)
# what they return lies in the range of what they are given
WITHIN = {
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.contiguous.default, aten.clone.default),
    *(aten.dropout.default, aten.feature_dropout.default, aten.slice.Tensor, aten.select.int, aten.mean.dim),
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.adaptive_max_pool2d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool2d.default),
}


def mutual_information(a: Tensor | npt.ArrayLike, b: Tensor | npt.ArrayLike) -> float:
    """``I(A; B) = sum p(a, b) log2(p(a, b) / (p(a) p(b)))`` of two discrete variables, in bits.

    The plug-in estimate: exact for the distribution that the samples are. As an estimate for the one they were drawn from it is
    too large, the more so the fewer samples there are for each pair of symbols.

    Args:
        a, b: (n,) or (n, ...), sample by sample; each distinct entry, or row of entries, is a symbol of its own. Values that are
            not discrete are binned first, see :func:`information_plane`.

    Raises:
        ValueError: no sample, or another number of them in b than in a.
        NonFiniteError: NaN or infinity.

    >>> a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    >>> mutual_information(a, a), mutual_information(a, b)
    (1.0, 0.0)
    >>> mutual_information(torch.stack([a, b], 1), a ^ b)
    1.0
    """
    first, second = _symbols(a, "a"), _symbols(b, "b")
    if len(first) != len(second):
        raise ValueError(f"expected as many samples of b as of a, {len(first)}; given {len(second)}")
    return _information(first, second)


@dataclass(frozen=True)
class InformationPoint:
    """One layer at one epoch: ``input_bits`` is I(X; L), ``label_bits`` I(L; Y); binned from ``low`` to ``high``."""

    layer: str
    epoch: int
    input_bits: float
    label_bits: float
    low: float
    high: float


@dataclass(frozen=True)
class InformationPlane:
    """What :func:`information_plane` returns; planes of several epochs add up to one.

    Attributes:
        points: one per layer and epoch.
        input_entropy: H(X), which no I(X; L) exceeds. label_information: I(X; Y), which no I(L; Y) exceeds. bins: per unit.
    """

    points: tuple[InformationPoint, ...]
    input_entropy: float
    label_information: float
    bins: int

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, in forward order."""
        return tuple(dict.fromkeys(point.layer for point in self.points))

    def __getitem__(self, layer: str) -> tuple[InformationPoint, ...]:
        """A layer's points, in the order in which they were added."""
        if layer not in self.layers:
            raise KeyError(f"{layer!r} is none of the layers of this plane: {', '.join(self.layers)}")
        return tuple(point for point in self.points if point.layer == layer)

    def __add__(self, other: InformationPlane) -> InformationPlane:
        """The points of both. Raises ValueError where they are of other data, or other bins."""
        mine, theirs = ((plane.input_entropy, plane.label_information, plane.bins) for plane in (self, other))
        if not all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(mine, theirs, strict=True)):
            raise ValueError(
                "expected planes of the same data and bins to add up: (H(X), I(X; Y), bins) is "
                f"{tuple(round(value, 4) for value in mine)} here and {tuple(round(value, 4) for value in theirs)} there"
            )
        return InformationPlane(self.points + other.points, *mine)

    def rows(self) -> list[dict[str, Any]]:
        """One dict per point, of numbers and names: what :func:`revprop.report.information_planes` draws."""
        return [asdict(point) for point in self.points]

    def __str__(self) -> str:
        lines = [f"H(X) {self.input_entropy:.3f}, I(X; Y) {self.label_information:.3f} bits, {self.bins} bins"]
        lines += [f"{'layer':<20}{'epoch':>8}{'I(X; L)':>10}{'I(L; Y)':>10}"]
        lines += [f"{p.layer:<20}{p.epoch:>8}{p.input_bits:>10.3f}{p.label_bits:>10.3f}" for p in self.points]
        return "\n".join(lines)


def information_plane(
    model: nn.Module | Graph,
    x: Example,
    y: Tensor,
    layers: Sequence[str] | None = None,
    bins: int = 30,
    range: Literal["auto"] | Range | Mapping[str, Range] = "auto",
    epoch: int = 0,
) -> InformationPlane:
    """I(X; L) and I(L; Y) of a network's layers, by binning (Shwartz-Ziv and Tishby, 2017).

    Each unit's range is cut into ``bins`` intervals of equal width; a layer's symbol is the row of its units' bins. Each distinct
    input is a symbol of its own, each distinct label as well. Both are :func:`mutual_information` of the samples given: give all
    inputs there are, or many. The network has no noise, so I(X; L) is the entropy of the binned layer, and a layer of many units
    or bins tells all samples apart: it says ``log2(n)``, which is a statement about the bins.

    Args:
        model: a module, run in eval mode, or the graph of :func:`revprop.trace`. x: inputs (n, ...). y: labels (n,) or (n, ...).
        layers: names of ``graph.layers``. None: what each linear layer or convolution behind the first is given, where it has a
            name, and the output; so activations and pools, not the values in front of them.
        bins: per unit.
        range: where bins begin and end. "auto": the activation's range, (-1, 1) for tanh, (0, 1) for sigmoid and softmax; an end
            that it has not, as ReLU's upper one, is that of the values recorded in the whole layer, which may differ from epoch to
            epoch. (low, high) for all layers; or a dict of them by layer, the others by "auto". Values beyond belong to the bin at
            that end.
        epoch: written to the points.

    Returns:
        An :class:`InformationPlane`. Those of several epochs add up: ``plane = plane + information_plane(..., epoch=2)``.

    Raises:
        ValueError: an unknown layer, no sample, another number of labels than of inputs, no bin, a range that is none.
        NonFiniteError: NaN or infinity in inputs, labels or a layer.

    >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> net = nn.Sequential(nn.Linear(2, 1), nn.Sigmoid())
    >>> with torch.no_grad():
    ...     _ = net[0].weight.copy_(torch.tensor([[4.0, 4.0]])), net[0].bias.fill_(-6.0)
    >>> plane = information_plane(net, x, x.prod(1), bins=2)  # a sigmoid that computes "and"
    >>> print(plane)
    H(X) 2.000, I(X; Y) 0.811 bits, 2 bins
    layer                  epoch   I(X; L)   I(L; Y)
    output                     0     0.811     0.811
    """
    graph = as_graph(model, x)
    inputs = graph.check_input(x)
    if bins < 1:
        raise ValueError(f"bins: expected at least 1 interval per unit; given {bins}")
    names = default_layers(graph) if layers is None else (layers,) if isinstance(layers, str) else tuple(layers)
    nodes = [graph.node(name) for name in names]
    given = _ranges(graph, names, range)
    of_x = _joint([_symbols(value, "x") for value in inputs])
    of_y = _symbols(y, "y")
    if len(of_x) != len(of_y):
        raise ValueError(f"expected one label for each of {len(of_x)} inputs; given {len(of_y)}")
    with torch.no_grad():
        values = graph.segment(graph.inputs, tuple(nodes))(*inputs)
    points = []
    for name, node, value in zip(names, nodes, values, strict=True):
        require_finite(value, f"layer {name!r}")
        low, high = given.get(name) or _range_of(graph, node, value)
        of_layer = _symbols(_binned(value, low, high, bins), name)
        point = InformationPoint(
            name, epoch, _information(of_x, of_layer), _information(of_layer, of_y), float(low), float(high)
        )
        points.append(point)
    return InformationPlane(tuple(points), _information(of_x, of_x), _information(of_x, of_y), bins)


def default_layers(graph: Graph) -> tuple[str, ...]:
    """The last layer with a name in front of each linear layer or convolution, but for the input, and the output."""
    named = {graph.node(name): name for name in graph.layers}  # of several names of one value the outermost module's
    found, last = [], ""
    for node in graph.nodes:
        if node.target in LEARNED and last:
            found.append(last)
        last = named.get(node, last)
    return tuple(dict.fromkeys([*found, "output"]))


def _symbols(values: Tensor | npt.ArrayLike, name: str) -> Tensor:
    """(n, ...) -> (n,), a number for each distinct row."""
    tensor = torch.as_tensor(values).detach()
    if tensor.dim() == 0 or len(tensor) == 0:
        raise ValueError(f"{name}: expected samples along the first dimension; given shape {tuple(tensor.shape)}")
    require_finite(tensor, name)
    # compared byte by byte, which is far faster than number by number; -0.0 + 0.0 is 0.0
    plain = tensor.cpu().double() + 0.0 if tensor.is_floating_point() else tensor.cpu()
    rows = np.ascontiguousarray(plain.numpy().reshape(len(plain), -1))
    if not rows.size:
        return torch.zeros(len(rows), dtype=torch.int64)
    keys = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
    return torch.from_numpy(np.unique(keys, return_inverse=True)[1])


def _joint(symbols: Sequence[Tensor]) -> Tensor:
    return symbols[0] if len(symbols) == 1 else _symbols(torch.stack(list(symbols), 1), "x")


def _information(a: Tensor, b: Tensor) -> float:
    n, of_b = len(a), int(b.max()) + 1
    pairs, counts = torch.unique(a * of_b + b, return_counts=True)
    of_a, of_b_ = torch.bincount(a)[pairs // of_b], torch.bincount(b)[pairs % of_b]
    # as whole numbers: of independent variables the ratio is 1, and of equal ones nothing is rounded off
    ratio = (counts * n).double() / (of_a * of_b_).double()
    return max(float((counts.double() / n * ratio.log2()).sum()), 0.0)


def _binned(value: Tensor, low: float, high: float, bins: int) -> Tensor:
    if high <= low:
        return torch.zeros_like(value, dtype=torch.int32)
    return ((value.double() - low) * (bins / (high - low))).floor().clamp(0, bins - 1).to(torch.int32)


def _range_of(graph: Graph, node: fx.Node, value: Tensor) -> Range:
    low, high = _range_by_rule(graph, node)
    least, most = (float(bound) for bound in value.aminmax()) if value.numel() else (0.0, 0.0)
    return low if math.isfinite(low) else least, high if math.isfinite(high) else most


def _range_by_rule(graph: Graph, node: fx.Node) -> Range:
    """What the operator can return, as its rule says; of what only moves or pools values, what they can be."""
    while node.target in WITHIN and isinstance(node.args[0], fx.Node) and node.args[0] in graph.active:
        node = node.args[0]
    if node.target in SHARES:
        return 0.0, 1.0
    try:
        fact = closed(bind(graph, node)) if node.op == "call_function" else None
    except Refusal:
        fact = None
    return fact.range if isinstance(fact, Pointwise) else (-math.inf, math.inf)


def _ranges(graph: Graph, names: Sequence[str], asked: str | Range | Mapping[str, Range]) -> dict[str, Range]:
    """The ranges that are said, by layer."""
    if isinstance(asked, str):
        if asked != "auto":
            raise ValueError(f'range: expected "auto", (low, high), or a dict of these by layer; given {asked!r}')
        return {}
    found = dict(asked) if isinstance(asked, Mapping) else dict.fromkeys(names, asked)
    for name, pair in found.items():
        graph.node(name)
        low, high = pair if isinstance(pair, Sequence) and len(pair) == 2 else (math.nan, math.nan)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"range: expected (low, high) with low < high for layer {name!r}; given {pair!r}")
    return found
