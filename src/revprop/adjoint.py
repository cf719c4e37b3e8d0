"""Explain: the effective hypersurface of any unit, the linear functional on the input and the biases that *is* the unit.

AdjointBackMapV2 (Wan, Cheung, Choe, 2023): for a piecewise linear network and the biases as a second input,
``c(x) = <x, J_x^T w> + <b, J_b^T w>`` exactly (Eq. 4). One vector-Jacobian product gives both parts; many units go through the
network together as rows of one batch. For other networks the same identity holds with what is held named
(:mod:`revprop.completion`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from revprop.affine import Run
from revprop.completion import run_affine
from revprop.graph import Example, Graph
from revprop.hardware import channels_last
from revprop.heads import Head, head_of
from revprop.reverse import as_graph
from revprop.shared_rows import shared_rows

__all__ = ["Hypersurface", "Unit", "check_run", "hypersurface", "in_precision", "relative_error"]

Unit = int | Sequence[int]
AT_ONCE = 1 << 21  # bytes of the largest value of a chunk on a CPU: what stays in its cache is walked through fastest


@dataclass(frozen=True)
class Hypersurface:
    """Units as linear functionals on the input and on the constants that the network adds.

    With (n, *units) in front of every shape, ``units`` being () for one unit, (U,) for a list, the layer's shape for all:

    Attributes:
        image: the functional on the input, (n, *units, *input shape); None where the input is no floating point tensor.
        biases: on each constant b by name, (n, *units, *b.shape): parameters, running means, and the constant parts of operators
            (``layer:operator``; there b is 1). bias_values: b; (n, *b.shape) where it differs from sample to sample.
        value: the units as the network computes them, (n, *units), in the run that is linear in its leaves; the first time that a
            layer is explained, this run is compared with the network's own.
        inputs: x, and images: ``image``, of each floating point input by name. layer, mode, units: what was asked for.
        held: what was held at its recorded value, in words, by operator. Where nothing was, the network equals this functional
            in a neighbourhood of x.
    """

    image: Tensor | None
    biases: Mapping[str, Tensor]
    bias_values: Mapping[str, Tensor]
    value: Tensor
    inputs: Mapping[str, Tensor]
    images: Mapping[str, Tensor]
    layer: str
    mode: str
    units: tuple[tuple[int, ...], ...] | None
    held: Mapping[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether nothing was held."""
        return not self.held

    @property
    def contributions(self) -> Tensor | None:
        """``x * h``: what each entry of the input contributes, (n, *units, *input shape)."""
        return None if self.image is None else self.image * self._beside(next(iter(self.inputs.values())), self.image)

    @property
    def bias_contributions(self) -> dict[str, Tensor]:
        """``<b, h_b>``: what each constant contributes in all, (n, *units)."""
        found = {}
        for name, h in self.biases.items():
            b = self.bias_values[name]
            per_sample = b.dim() == h.dim() - (self.value.dim() - 1)
            b = self._beside(b, h) if per_sample else b
            parts = torch.where(h == 0, 0.0, h * b)  # nothing of a masked logit, which is infinite
            found[name] = parts.flatten(self.value.dim()).sum(-1) if h.dim() > self.value.dim() else parts
        return found

    @property
    def image_contribution(self) -> Tensor:
        """``<x, h>``: what the input contributes in all, (n, *units)."""
        total = torch.zeros_like(self.value)
        for name, h in self.images.items():
            total = total + (h * self._beside(self.inputs[name], h)).flatten(self.value.dim()).sum(-1)
        return total

    @property
    def reconstructed(self) -> Tensor:
        """``<x, h> + sum <b, h_b>``, (n, *units)."""
        return torch.stack([self.image_contribution, *self.bias_contributions.values()]).sum(0)

    @property
    def relative_error(self) -> Tensor:
        """``(reconstructed - value) / value``, zeros in the denominator replaced by the smallest positive number (Eq. 16)."""
        return relative_error(self.value, self.reconstructed)

    def _beside(self, value: Tensor, h: Tensor) -> Tensor:
        """(n, *shape) -> (n, 1, ..., *shape), to broadcast against h."""
        return value.to(h).reshape(len(value), *[1] * (h.dim() - value.dim()), *value.shape[1:])

    def __str__(self) -> str:
        shares = sorted(self.bias_contributions.items(), key=lambda item: -float(item[1].abs().sum()))
        scale = float(self.value.abs().max()) if self.value.numel() else 0.0
        error = float((self.reconstructed - self.value).abs().max()) if self.value.numel() else 0.0
        which = "" if self.units is None else f" {', '.join(str(u[0] if len(u) == 1 else u) for u in self.units[:4])}"
        which += ", ..." if self.units is not None and len(self.units) > 4 else ""
        count = f"{self.value.numel()} value{'' if self.value.numel() == 1 else 's'}"
        lines = [
            f"{self.layer} ({self.mode}){which}, {count} up to {scale:.4g}; largest error {error:.2g}",
            f"{'input':<32}{float(self.image_contribution.mean()):12.5g}",
            *(f"{name:<32}{float(v.mean()):12.5g}" for name, v in shares[:12]),
        ]
        if len(shares) > 12:
            lines.append(f"{f'{len(shares) - 12} more':<32}{sum(float(v.mean()) for _, v in shares[12:]):12.5g}")
        lines += [f"held: {words} of {name}" for name, words in self.held.items()] or ["nothing held: exact around x"]
        return "\n".join(lines)


def relative_error(value: Tensor, reconstructed: Tensor) -> Tensor:
    """AdjointBackMapV2 Eq. 16: zeros of ``value`` are replaced by the smallest positive normal number of its precision.

    >>> relative_error(torch.tensor([2.0, 0.0]), torch.tensor([2.5, 0.0]))
    tensor([0.2500, 0.0000])
    """
    return (reconstructed - value) / torch.where(value == 0, torch.finfo(value.dtype).tiny, value)


def hypersurface(
    model: nn.Module | Graph,
    x: Example,
    layer: str = "output",
    unit: Unit | Sequence[Sequence[int]] | None = None,
    mode: str = "unit",
    *,
    float64: bool = False,
    memory_budget: int = 1 << 30,
) -> Hypersurface:
    """The effective hypersurfaces of units of a layer (AdjointBackMapV2 Algorithm 1, for any traced network).

    Of many units of a convolutional layer, those whose receptive fields are disjoint go backwards together (Curtis, Powell, Reid,
    1974).

    Args:
        model: a module, or the graph of :func:`revprop.trace`. x: inputs (n, ...).
        layer: a name of ``graph.layers``.
        unit: the index of one unit in the layer's features, such as ``(channel, row, column)`` or a class; a list of indices;
            None for all.
        mode: what a unit is. "unit": an entry of the layer's features. The paper's, of a convolution's or matrix product's
            values in front of its own bias: "RM0" or "logit", of a fully connected layer, index (k,); "RM1" or "channel": the
            sum over all positions, (out channel,); "RM2" or "position": one position, (out channel, *position); "RM3" or
            "channel slice" and "RM4" or "slice": the part of these from one in-channel, (out channel, in channel, *position).
            "front": RM0 or RM2, as the layer is.
        float64: compute in double precision.
        memory_budget: bytes for the rows that go through the network together; the result has the size it has.

    Returns:
        a :class:`Hypersurface`.

    Raises:
        ValueError: an unknown layer or mode, a unit outside of the layer, inputs that do not fit.
        NonFiniteError: NaN or infinity in the inputs.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    >>> h = hypersurface(net, torch.randn(5, 1, 4, 4), unit=2)
    >>> h.image.shape, h.biases["0.bias"].shape, h.value.shape, h.exact
    (torch.Size([5, 1, 4, 4]), torch.Size([5, 2]), torch.Size([5]), True)
    >>> bool((h.reconstructed - h.value).abs().max() < 1e-5)
    True
    """
    graph = as_graph(model, x)
    inputs = graph.check_input(x)
    head = head_of(graph, layer, mode)
    units = head.units(unit)
    check_run(graph, [head.node], inputs)
    inputs = in_precision(inputs, float64)
    chosen = units if units is not None else list(_all(head.shape))
    parts = list(_chunks(graph, head, inputs, chosen, memory_budget))
    return _joined(parts, graph, inputs, head, layer, units, unit)


# -- running -------------------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    """Some images: their values and functionals for all units, (images, units, ...)."""

    value: Tensor
    images: dict[str, Tensor]
    biases: dict[str, Tensor]
    values: dict[str, tuple[Tensor, bool]]
    held: dict[str, str]


def _chunks(
    graph: Graph, head: Head, inputs: tuple[Tensor, ...], units: list[tuple[int, ...]], budget: int
) -> Iterator[_Part]:
    """Images by chunks; each is repeated, so that many of its units go backwards together."""
    n, shared = len(inputs[0]), shared_rows(graph, head, units, max(budget // 4, 1))
    count = max(1, len(units) if shared is None else max(shared.counts))
    rows = _rows(graph, head, inputs, budget)
    repeat = -(-count // -(-count // rows))  # chunks of one size, as far as that goes
    together = max(1, min(n, rows // repeat))
    for start in range(0, max(n, 1), together):
        chunk = tuple(x[start : start + together] for x in inputs)
        repeated = tuple(channels_last(x.repeat_interleave(repeat, 0) if repeat > 1 else x) for x in chunk)
        with torch.enable_grad():
            wanted = (head.node,) if shared is None else shared.wanted
            run = run_affine(graph, repeated, wanted, bare=head.bare, by_position=shared is not None)
        yield _part(run, repeat, *(shared or _OwnRows(head, units)).backward(run, len(chunk[0]), repeat))


def _part(run: Run, repeat: int, value: Tensor, gradients: dict[int, Tensor]) -> _Part:
    kept = {name: entry for name, entry in run.entries.items() if id(entry.leaf) in gradients}
    return _Part(
        value,
        {name: gradients[id(leaf)] for name, leaf in run.inputs.items()},
        {
            name: gradients[id(e.leaf)] if e.factor is None else gradients[id(e.leaf)] * e.factor
            for name, e in kept.items()
        },
        {name: (e.value[::repeat] if e.rows else e.value, e.rows) for name, e in kept.items()},
        run.held,
    )


@dataclass
class _OwnRows:
    """Units that go backwards in a row of the batch each."""

    head: Head
    units: list[tuple[int, ...]]

    def backward(self, run: Run, images: int, repeat: int) -> tuple[Tensor, dict[int, Tensor]]:
        """As :meth:`SharedRows.backward`, of a run that is not laid out by position."""
        head, units, target = self.head, self.units, run.values[self.head.node]
        inputs = {id(leaf): leaf for leaf in run.inputs.values()}
        leaves = list((inputs | {id(entry.leaf): entry.leaf for entry in run.entries.values()}).values())
        found: list[list[Tensor]] = [[] for _ in leaves]
        reached: set[int] = set()
        values = []
        for start in range(0, max(len(units), 1), repeat):
            some = units[start : start + repeat]
            cotangent = channels_last(head.cotangent(target.detach(), some, images, repeat))
            gradients: Sequence[Tensor | None] = [None] * len(leaves)
            if target.requires_grad:
                last = start + repeat >= len(units)
                gradients = torch.autograd.grad(target, leaves, cotangent, retain_graph=not last, allow_unused=True)
            values.append(
                (target.detach() * cotangent)
                .view(len(target), *target.shape[1:], 1)
                .flatten(1)
                .sum(1)
                .view(images, repeat)[:, : len(some)]
            )
            for leaf, gradient, parts in zip(leaves, gradients, found, strict=True):
                if gradient is not None:
                    reached.add(id(leaf))
                gradient = torch.zeros_like(leaf) if gradient is None else gradient
                parts.append(gradient.view(images, repeat, *leaf.shape[1:])[:, : len(some)])
        of_leaf = {id(leaf): _cat(parts, 1) for leaf, parts in zip(leaves, found, strict=True)}
        return _cat(values, 1), {key: value for key, value in of_leaf.items() if key in reached or key in inputs}


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)


def _joined(
    parts: list[_Part],
    graph: Graph,
    inputs: tuple[Tensor, ...],
    head: Head,
    layer: str,
    units: list[tuple[int, ...]] | None,
    asked: object,
) -> Hypersurface:
    one = units is not None and not _is_list(asked)
    front = head.shape if units is None else () if one else (len(units),)

    def shaped(value: Tensor) -> Tensor:
        return value.reshape(len(value), *front, *value.shape[2:])

    names = list(dict.fromkeys(name for part in parts for name in part.biases))
    biases, values = {}, {}
    for name in names:
        like = next(part for part in parts if name in part.biases)
        pieces = [
            part.biases[name]
            if name in part.biases
            else like.biases[name].new_zeros(*part.value.shape, *like.biases[name].shape[2:])
            for part in parts
        ]
        biases[name] = shaped(_cat(pieces, 0))
        value, per_sample = like.values[name]
        if per_sample:
            rows = [
                p.values[name][0]
                if name in p.values
                else torch.zeros_like(value[:1]).expand(len(p.value), *value.shape[1:])
                for p in parts
            ]
            value = _cat(rows, 0)
        values[name] = value
    images = {name: shaped(_cat([part.images[name] for part in parts], 0)) for name in parts[0].images}
    named = dict(zip(graph.input_names, inputs, strict=True))
    return Hypersurface(
        next(iter(images.values()), None),
        biases,
        values,
        shaped(_cat([part.value for part in parts], 0)),
        {name: named[name] for name in images},
        images,
        layer,
        head.mode,
        None if units is None else tuple(units),
        {name: words for part in parts for name, words in part.held.items()},
    )


def _rows(graph: Graph, head: Head, inputs: tuple[Tensor, ...], budget: int) -> int:
    """How many rows go through the network together: within the budget, and on a CPU within its cache."""
    key = ("sizes", head.node)
    if key not in graph.factored:
        graph.factored[key] = [
            math.prod(int(d) for d in node.meta["val"].shape if not isinstance(d, torch.SymInt))
            for node in graph.ancestors([head.node])
            if node in graph.movable and isinstance(node.meta.get("val"), Tensor)
        ]
    sizes = graph.factored[key]
    item = max((x.element_size() for x in inputs), default=4)
    within = budget // max(3 * item * sum(sizes), 1)
    cached = AT_ONCE // max(item * max(sizes, default=1), 1) if inputs[0].device.type == "cpu" else 1024
    return max(1, min(within, max(cached, 4), 1024))


def check_run(graph: Graph, nodes: Iterable[fx.Node], inputs: tuple[Tensor, ...]) -> None:
    """The first time that values are explained, they are compared with what the network itself computes.

    Raises:
        RuntimeError: they differ: a rule of :mod:`revprop.completion` is wrong.
    """
    fresh = tuple(dict.fromkeys(node for node in nodes if ("explained", node) not in graph.factored))
    if not fresh or not len(inputs[0]):
        return
    few = tuple(x[:2] for x in inputs)
    with torch.no_grad():
        own = graph.segment(graph.inputs, fresh)(*few)
        found = run_affine(graph, few, fresh, lambda value: value).values
    for node, value in zip(fresh, own, strict=True):
        scale = float(value.abs().max()) if value.numel() else 0.0
        if not torch.allclose(value, found[node], rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
            raise RuntimeError(f"{node}: the affine form gives other values than the network; please report this")
        graph.factored["explained", node] = True


def in_precision(inputs: tuple[Tensor, ...], float64: bool) -> tuple[Tensor, ...]:
    return tuple(x.double() if float64 and x.is_floating_point() else x for x in inputs)


def _all(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def _is_list(unit: object) -> bool:
    return isinstance(unit, Sequence) and bool(len(unit)) and isinstance(unit[0], Sequence)
