"""Back through one operator, on values, by its own weights: what :mod:`revprop.mirror` walks with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from revprop.affine import given, title
from revprop.families import BY_COLUMNS, CONVOLUTIONS, PLAIN, TRANSPOSED
from revprop.graph import Graph
from revprop.live_run import BATCH_NORMS
from revprop.rules import Call, Linear, Nonlinear, Pointwise, Refusal, Selection, bind, closed
from revprop.samples import Samples
from revprop.structural_map import Concatenate, Sum

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "Back",
    "Values",
    "is_learned",
    "is_pointwise",
    "precise",
    "reverse",
    "several",
    "solution",
    "takes_copies",
    "tiles",
    "transposed_tangent",
    "weight_of",
]

aten = torch.ops.aten
Values = Mapping[str, Tensor]
Back = Callable[[Tensor, Values], Sequence[Tensor | None]]

NORMS = BATCH_NORMS | {aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default}
ACTIVATIONS = frozenset({aten.softmax.int, aten.log_softmax.int})
_NEAREST = {aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec}
_LARGEST: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSE: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def weight_of(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The weight of a convolution or fully connected layer; None where the operator is none, or the weight moves."""
    if node.target not in CONVOLUTIONS and node.target not in BY_COLUMNS:
        return None
    weight = given(node).get("mat2" if node.target is aten.addmm.default else "weight")
    return weight if isinstance(weight, fx.Node) and weight not in graph.active else None


def is_learned(graph: Graph, node: fx.Node) -> bool:
    """Whether an operator is linear by weights of the model, so that what it gives back lacks the activation in front of it."""
    if weight_of(graph, node) is not None:
        return True
    matrices = {aten.matmul.default, aten.mm.default, aten.einsum.default}
    return node.target in matrices and bool(graph.parameters_of([node])) and len(bind(graph, node).inputs) == 1


_Found = tuple[Back, tuple[fx.Node, ...]]  # how; whose recorded values it reads


def reverse(call: Call, pooling: fx.Node | None = None) -> _Found | None:
    """The way back, where there is one that reads no more than what is linear; None: by the tangent.

    Args:
        pooling: of a convolution, the one behind it whose value it starts from.
    """
    call = precise(call)
    graph, node = call.graph, call.node
    if weight_of(graph, node) is not None and len(call.inputs) == 1:
        return _by_weights(graph, node, None if pooling is None else tiles(graph, pooling)), ()
    if node.target in NORMS or node.target in ACTIVATIONS:
        return _same, ()
    try:
        fact = closed(call)
    except Refusal:
        return None
    if isinstance(fact, Pointwise):
        return _same, ()
    if isinstance(fact, Selection):
        return (lambda value, recorded: (fact.windows.spread(value, 0.0),)), ()
    if isinstance(fact, Nonlinear):
        return None
    return _by_map(call, fact), ()


def _same(value: Tensor, recorded: Values) -> Sequence[Tensor]:
    return (value,)


def _live(graph: Graph, node: fx.Node) -> Callable[[], Tensor]:
    """A constant of the graph as it is now, also where it is computed from parameters."""
    if node in graph.constants:
        name = graph.constants[node]
        return lambda: graph.tensor(name)
    segment = graph.segment((), (node,))
    return lambda: segment()[0]


def takes_copies(graph: Graph, node: fx.Node) -> bool:
    """Whether an operator is a convolution that moves by one entry at a time."""
    if node.target not in CONVOLUTIONS - TRANSPOSED or weight_of(graph, node) is None:
        return False
    arguments = given(node)
    ones = all(_alone(arguments.get(name, 1)) for name in ("stride", "dilation"))
    return ones and not arguments.get("transposed") and arguments.get("padding") != "same"


def _alone(value: int | Sequence[int]) -> bool:
    return all(v == 1 for v in ((value,) if isinstance(value, int) else value))


def tiles(graph: Graph, node: fx.Node) -> tuple[int, ...] | None:
    """How often pooling back copies each entry per dimension, where its windows tile the image; None where not, or no pooling."""
    try:
        fact = closed(bind(graph, node))
    except Refusal:
        return None
    windows = fact.windows if isinstance(fact, Linear | Selection) else None
    return None if windows is None else windows.tiled


def _by_weights(graph: Graph, node: fx.Node, times: tuple[int, ...] | None = None) -> Back:
    """``A^T (z - b)`` of a convolution, a transposed one, or a fully connected layer; of z copied so often per dimension."""
    arguments = given(node)
    found = weight_of(graph, node)
    assert found is not None
    weight = _live(graph, found)
    dense = node.target in BY_COLUMNS
    added = arguments.get("self" if node.target is aten.addmm.default else "bias")
    bias = _live(graph, added) if isinstance(added, fx.Node) else None
    alpha, beta = float(arguments.get("alpha", 1.0)), float(arguments.get("beta", 1.0))
    transpose = _dense(node.target is aten.addmm.default, alpha) if dense else _geometry(graph, node, arguments, times)
    behind = 0 if dense else len(graph.shape(node)) - 1

    def back(value: Tensor, recorded: Values) -> Sequence[Tensor]:
        if bias is not None:
            shift = bias() if dense else bias().view(-1, *[1] * behind)
            value = value - (shift if beta == 1.0 else beta * shift)
        return (transpose(value, weight()),)

    return back


def _dense(by_columns: bool, alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    def transpose(value: Tensor, weight: Tensor) -> Tensor:
        out = value @ (weight.mT if by_columns else weight)
        return out if alpha == 1.0 else alpha * out

    return transpose


def _geometry(
    graph: Graph, node: fx.Node, arguments: Mapping[str, Any], times: tuple[int, ...] | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The transpose of a convolution's or transposed convolution's linear part, in the geometry it was traced with.

    Of entries copied t times it is the transposed convolution of stride t by the kernel summed over windows of t: fewer products,
    and the copies are never made.
    """
    (source,) = bind(graph, node).inputs
    size, out = graph.shape(source)[1:], graph.shape(node)[1:]
    dims = len(size)
    kernel = tuple(weight_of(graph, node).meta["val"].shape[2:])  # type: ignore[union-attr]

    def each(name: str, otherwise: int) -> tuple[int, ...]:
        value = arguments.get(name, otherwise)
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * dims if len(values) == 1 else values

    stride, dilation, groups = each("stride", 1), each("dilation", 1), int(arguments.get("groups", 1))
    if node.target in TRANSPOSED or arguments.get("transposed"):
        padding = each("padding", 0)
        return lambda value, weight: _CONVOLVE[dims](value, weight, None, stride, padding, dilation, groups)
    asked = arguments.get("padding", 0)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if asked == "same":  # torch pads the odd one behind: cut off here

        def same(value: Tensor, weight: Tensor) -> Tensor:
            out = _TRANSPOSE[dims](value, weight, None, 1, 0, 0, groups, dilation)
            for dim, (r, s) in enumerate(zip(reach, size, strict=True)):
                out = out.narrow(2 + dim, r // 2, s)
            return out

        return same
    padding = (0,) * dims if asked == "valid" else each("padding", 0)
    if times is not None:
        ones = (1, 1, *times)
        ends = tuple(t - 1 for t in times)

        def copied(value: Tensor, weight: Tensor) -> Tensor:
            planes = weight.reshape(-1, 1, *weight.shape[2:])
            summed = _CONVOLVE[dims](planes, weight.new_ones(ones), None, 1, ends)
            summed = summed.view(*weight.shape[:2], *summed.shape[2:])
            return _TRANSPOSE[dims](value, summed, None, times, padding, 0, groups)

        return copied
    rest = tuple(
        s - ((o - 1) * t - 2 * p + r + 1) for s, o, t, p, r in zip(size, out, stride, padding, reach, strict=True)
    )
    return lambda value, weight: _TRANSPOSE[dims](value, weight, None, stride, padding, rest, groups, dilation)


def _by_map(call: Call, fact: Linear) -> Back:
    """Linear without weights of its own: copies, sums, means, scales by constants. Other learned ones by their transpose."""
    graph, node = call.graph, call.node
    if isinstance(fact.map, Concatenate):
        return lambda value, recorded: several(fact.map.adjoint(value))
    offset = None if node.target in PLAIN or isinstance(fact.map, Sum) else _offset(call)

    def centred(value: Tensor) -> Tensor:
        return value if offset is None else value - offset(value)

    if fact.windows is not None:
        windows = fact.windows
        return lambda value, recorded: (windows.spread(value, 0.0),)
    if isinstance(fact.map, Sum):
        return lambda value, recorded: several(fact.map.adjoint(value))
    if graph.parameters_of([node]):
        transposed = _transposed(call)
        added = node.target in {aten.add.Tensor, aten.sub.Tensor}
        return (
            (lambda value, recorded: (centred(value),))
            if added
            else (lambda value, recorded: (transposed(centred(value)),))
        )
    if node.target in _NEAREST:
        size, out = call.shape_of()[1:], call.shape[1:]
        factors = call.get("scale_factors") or [o / s for s, o in zip(size, out, strict=True)]
        if all(o == f * s and f % 1 == 0 for s, o, f in zip(size, out, factors, strict=True)):
            times = tuple(o // s for s, o in zip(size, out, strict=True))
            return lambda value, recorded: (_LARGEST[len(times)](value, times),)
    solve = solution(call, fact)
    return lambda value, recorded: several(solve(centred(value)))


def several(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value


def precise(call: Call) -> Call:
    """The same call with constants as precise as the parameters are now, and no less than in single precision."""
    parameter = next(call.graph.model.parameters(), None)
    double = (call.node.meta["val"] if parameter is None else parameter).dtype == torch.float64
    return replace(call, precision=torch.float64 if double else torch.float32)


def solution(call: Call, fact: Linear) -> Callable[[Tensor], Tensor | tuple[Tensor, ...]]:
    """The pseudo-inverse of a :func:`precise` call's map, for values of any precision."""
    factor, precision = fact.map.factor(0.0), call.precision

    def solve(value: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = factor.solve(value.to(precision))
        return found.to(value.dtype) if isinstance(found, Tensor) else tuple(part.to(value.dtype) for part in found)

    return solve


def _zeros(call: Call, value: Tensor, n: int | None = None) -> Tensor:
    """A zero for the one input of an operator, of as many samples as a value of its output has, or n."""
    (source,) = call.inputs
    ours, theirs = Samples.of(source.meta["val"]), Samples.of(call.node.meta["val"])
    if ours is None or theirs is None:
        raise ValueError(f"{title(call.graph, call.node)}: the samples lie along no one dimension of its values")
    return value.new_zeros(ours.shape(source.meta["val"], theirs.count(value) if n is None else n))


def _offset(call: Call) -> Callable[[Tensor], Tensor] | None:
    """What an affine operator gives for 0, as it is now: for one sample, where that is the same for all."""
    samples = Samples.of(call.node.meta["val"])
    if call.held or samples is None or len(call.inputs) != 1:
        return None
    segment, n = call.graph.segment(tuple(call.inputs), (call.node,)), 1 if samples.times == 1 else None
    return lambda value: segment(_zeros(call, value, n))[0]


def _transposed(call: Call) -> Callable[[Tensor], Tensor]:
    """The transpose of an operator that is affine in its one input, by its own derivative."""
    segment = call.graph.segment(call.values, (call.node,))

    def transpose(value: Tensor) -> Tensor:
        with torch.enable_grad():
            at = _zeros(call, value).requires_grad_()
            return torch.autograd.grad(segment(at)[0], at, value, create_graph=torch.is_grad_enabled())[0]

    return transpose


def transposed_tangent(call: Call, moving: Collection[fx.Node]) -> _Found:
    """``J^T z`` at the recorded values, in those of an operator's inputs that move: for what has no other way back, and for what is
    linear in one operand (gates, divisors and the weights of an attention are held, so the tangent in the rest is the
    operator)."""
    if not moving:  # an embedding: indices get nothing
        return (lambda value, recorded: [None] * len(call.inputs)), ()
    names = [n.name for n in call.values]
    distinct = list(dict.fromkeys(call.inputs))
    free = [i for i, n in enumerate(distinct) if n in moving]
    places = [
        free.index(distinct.index(n)) if n in moving and call.inputs.index(n) == i else None
        for i, n in enumerate(call.inputs)
    ]

    def back(value: Tensor, recorded: Values) -> Sequence[Tensor | None]:
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            at = [recorded[name] for name in names]
            for i in free:
                at[i] = at[i].view_as(at[i]) if at[i].requires_grad else at[i].detach().requires_grad_()
            leaves = [at[i] for i in free]
            found = torch.autograd.grad(call.run(*at), leaves, value, create_graph=keep, allow_unused=True)
        return [None if place is None else found[place] for place in places]

    return back, call.values


def is_pointwise(graph: Graph, node: fx.Node) -> bool:
    """Whether an operator works entry by entry on the one value that moves, by a rule."""
    try:
        return isinstance(closed(bind(graph, node)), Pointwise)
    except Refusal:
        return False
