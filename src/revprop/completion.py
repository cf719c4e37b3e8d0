"""How each operator is run so that its output is linear in what moves and in named constants.

- Linear operators, and piecewise linear ones through the origin (ReLU, max-pooling): as they are, biases as entries.
- Piecewise linear ones with constant pieces (hardtanh, clamp): the constant part is an entry of the operator's name.
- ``phi(z)`` entry by entry: the secant, ``z (phi(z) - phi(0)) / z + phi(0)`` (the condition of AdjointBackMapV2 Eq. C.14).
- Layer, group, instance and RMS norm: 1 / standard deviation is held; so is the divisor of a division.
- Products of two activations: the gate of the two (sigmoid, softmax, then tanh) is held; where neither is one, each for half.
- Attention: its weights are held.
- Whatever else has a slope: its tangent at the recorded values, ``f(z) - J z`` an entry of the operator's name.

What is held is noted. Where nothing is, the affine map is the network itself in a neighbourhood of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from revprop.affine import Kind, Run, Runner, given, source_name, title
from revprop.families import BY_COLUMNS, CONSTANT_PADDINGS, CONVOLUTIONS, PIECES, PLAIN, PRODUCTS, QUOTIENTS
from revprop.graph import Graph
from revprop.held import held_operands
from revprop.rules import Linear, Pointwise, Refusal, Selection, bind, closed

__all__ = ["run_affine"]

aten = torch.ops.aten


def run_affine(
    graph: Graph,
    inputs: tuple[Tensor, ...],
    wanted: tuple[fx.Node, ...],
    lift: Callable[[Tensor], Tensor] = Tensor.requires_grad_,
    bare: fx.Node | None = None,
    fronts: Collection[fx.Node] = (),
    by_position: bool = False,
) -> Run:
    """Runs the part of a network in front of some nodes, linear in its leaves.

    Args:
        inputs: the model's inputs; of double precision where everything is to be. lift: makes a leaf of a detached value.
        bare: a convolution or matrix product whose own bias is left out. fronts: those whose values in front of it are kept.
        by_position: constants are laid out over the positions of what they are added to (:class:`revprop.affine.Use`).

    Raises:
        ValueError: an operator on the way normalises by the statistics of the batch.

    >>> import revprop
    >>> graph = revprop.trace(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU6()), torch.zeros(1, 3))
    >>> sorted(run_affine(graph, (torch.full((1, 3), 1e3),), (graph.output,)).entries)[0]
    '0.bias'
    """
    return Runner(graph, inputs, _kind, held_operands, lift, bare, fronts, by_position).run(wanted)


# -- linear operators ----------------------------------------------------------------------------------------------------


def _plain(run: Runner, node: fx.Node) -> Any:
    """Linear, or piecewise linear through the origin: what autograd takes for its slope is the operator itself."""
    return run.native(node)


def _join(run: Runner, node: fx.Node) -> Any:
    """Sums and concatenations: constants among what is joined are entries."""
    constants = {
        a: run.constant(source_name(run.graph, a, node), run.env[a], a, node)
        for a in dict.fromkeys(node.all_input_nodes)
        if a not in run.graph.movable and isinstance(run.env[a], Tensor)
    }
    numbers = [i for i, a in enumerate(node.args[:2]) if isinstance(a, int | float) or _is_number(a)]
    if node.target not in _SUMS or not numbers:
        return run.native(node, constants)
    number = node.args[numbers[0]]
    value: Any = run.env[number] if isinstance(number, fx.Node) else number
    entry = run.constant(title(run.graph, node), float(value), None, node)
    other: Any = run.env[node.all_input_nodes[0] if numbers[0] else node.args[1]]  # type: ignore[index]
    first, second = (other, entry) if numbers[0] else (entry, other)
    return _SUMS[node.target](first, second, float(given(node).get("alpha", 1.0)))


def _biased(run: Runner, node: fx.Node) -> Any:
    """Convolutions and matrix products: the bias is an entry."""
    arguments = given(node)
    name = "self" if node.target is aten.addmm.default else "bias"
    bias = arguments.get(name)
    weight = arguments.get("mat2" if node.target is aten.addmm.default else "weight")
    scaled = arguments.get("alpha", 1) != 1 or arguments.get("beta", 1) != 1
    if weight in run.graph.movable or bias in run.graph.movable or scaled:
        if node is run.bare or node in run.fronts:
            raise ValueError(
                f"{title(run.graph, node)} has no values in front of a bias of its own (its weight or bias is computed, or it is "
                "scaled): explain it in mode 'unit'"
            )
        return _tangent(run, node)
    if node.target is aten.addmm.default:
        out = run.env[arguments["mat1"]] @ run.env[arguments["mat2"]]
    else:
        out = run.native(node, {} if bias is None else {bias: None})
    if node in run.fronts:
        run.result.fronts[node] = out
    if bias is None or node is run.bare:
        return out
    return out + run.bias(bias, node, 0 if node.target in BY_COLUMNS else out.dim() - 2)


def _by_running_statistics(run: Runner, node: fx.Node) -> Any:
    """Batch norm in eval mode: a scale per channel, and two entries, the running mean and the bias."""
    arguments = given(node)
    mean, variance = arguments.get("running_mean"), arguments.get("running_var")
    if mean is None or variance is None or arguments.get("training") or arguments.get("use_input_stats"):
        raise ValueError(
            f"{title(run.graph, node)} normalises by the statistics of the batch, so that a unit is no function of its own "
            "sample: set track_running_stats=True"
        )
    (z,) = run.moving(node).values()
    weight, bias, behind = arguments.get("weight"), arguments.get("bias"), z.dim() - 2
    scale = torch.rsqrt(run.env[variance] + arguments["eps"])
    scale = scale if weight is None else scale * run.env[weight]
    parts: list[tuple[fx.Node, Tensor | None]] = [(mean, -scale), *([] if bias is None else [(bias, None)])]
    return torch.addcmul(run.shift(parts, node, behind), z, scale.view(-1, *[1] * behind))


# -- what is held --------------------------------------------------------------------------------------------------------


def _normalise(run: Runner, node: fx.Node) -> Any:
    """Norms by the statistics of the entries themselves: their mean is linear, 1 / standard deviation is held."""
    arguments = given(node)
    if node.target is aten.instance_norm.default and not arguments["use_input_stats"]:
        return _by_running_statistics(run, node)
    (z,) = run.moving(node).values()
    eps = arguments.get("eps")
    if eps is None:
        eps = 1e-5 if node.target is not aten.rms_norm.default else torch.finfo(node.meta["val"].dtype).eps
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        entries, behind = z, 0
        dims = tuple(range(-len(arguments["normalized_shape"]), 0))
    else:
        groups = arguments["num_groups"] if node.target is aten.group_norm.default else z.shape[1]
        entries, dims, behind = z.reshape(len(z), groups, -1), (-1,), z.dim() - 2
    if node.target is not aten.rms_norm.default:
        entries = entries - entries.mean(dims, keepdim=True)
    run.hold(node, "1 / standard deviation")
    scale = torch.rsqrt(entries.detach().square().mean(dims, keepdim=True) + eps)
    out = (entries * scale).reshape(z.shape)
    weight, bias = arguments.get("weight"), arguments.get("bias")
    if weight is not None:
        factor = run.env[weight]
        out = out * factor.view(*factor.shape, *[1] * behind)
    return out if bias is None else out + run.bias(bias, node, behind)


def _product(run: Runner, node: fx.Node) -> Any:
    """Bilinear operators, and division: one factor is held, the other moves."""
    moving = run.moving(node)
    factors = [a for a in _nodes(node.args) if a in moving]
    if node.target in QUOTIENTS and node.args[1] in moving:
        divisor = factors[-1]
        if factors[0] is divisor:
            return _tangent(run, node)
        run.hold(node, "the divisor")
        return run.native(node, {divisor: moving[divisor].detach()})
    if len(factors) == 1:
        return run.native(node)
    if len(factors) > 2:
        return _tangent(run, node)
    first, second = factors
    if first is second:
        run.hold(node, "each of the two equal factors, for half of the product")
        return _Half.apply(run.native(node))  # type: ignore[no-untyped-call]
    gates = held_operands(run.graph, node)
    if not gates:
        run.hold(node, "each of the two factors, for half of the product")
        return 0.5 * (
            run.native(node, {second: moving[second].detach()}) + run.native(node, {first: moving[first].detach()})
        )
    run.hold(node, "the gate of the two factors")
    return run.native(node, {gate: moving[gate].detach() for gate in gates})


class _Half(torch.autograd.Function):
    """The value as it is, half of its slope: one of two equal factors moves at a time, each for half."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 0.5 * gradients[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return 0.5 * tangents[0]


def _attention(run: Runner, node: fx.Node) -> Any:
    """``softmax(q k^T) v``: its weights are held."""
    query, key, value = node.args[:3]
    if value not in run.graph.movable or given(node).get("dropout_p"):
        return _tangent(run, node)
    run.hold(node, "the weights of the attention")
    rest, kwargs = fx.map_arg((node.args[3:], node.kwargs), lambda a: _detached(run.env[a]))
    values: list[Any] = [run.env[a] for a in (query, key, value) if isinstance(a, fx.Node)]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
        return aten.scaled_dot_product_attention.default(
            values[0].detach(), values[1].detach(), values[2], *rest, **kwargs
        )


def _secant(run: Runner, node: fx.Node, function: Callable[[Tensor], Tensor]) -> Any:
    """``phi(z) = z s + phi(0)``, s the slope of the secant through 0; next to 0, the derivative half way there."""
    ((a, z),) = run.moving(node).items()
    with torch.no_grad():
        recorded = z.detach()
        value, origin = run.native(node, {a: recorded}), function(recorded.new_zeros(()))
        near = recorded.abs() < torch.finfo(recorded.dtype).eps ** (1 / 3)
        slope = (value - origin) / torch.where(recorded == 0, 1.0, recorded)
    if not bool(slope.isfinite().all()):  # no value at 0 (a logarithm)
        return _tangent(run, node)
    if bool(near.any()):
        with torch.enable_grad():
            half = (0.5 * recorded[near]).requires_grad_()
            (there,) = torch.autograd.grad(function(half).sum(), half)
        slope[near] = torch.where(there.isfinite(), there, slope[near])  # a root has none at 0
    run.hold(node, "the slope of the secant through 0")
    out = z * slope
    return out if float(origin) == 0.0 else out + run.constant(title(run.graph, node), origin, None, node)


def _tangent(run: Runner, node: fx.Node) -> Any:
    """Any operator with a slope: its tangent at the recorded values."""
    moving = run.moving(node)

    def function(*values: Tensor) -> tuple[Any, ...]:
        found = run.native(node, dict(zip(moving, values, strict=True)))
        return tuple(found) if isinstance(found, tuple | list) else (found,)

    if not _is_exact(run.graph, node):
        run.hold(node, "the tangent at the recorded values")
    out = _with_slope(run, node, function)
    several = isinstance(out, tuple | list)
    results = tuple(out) if several else (out,)
    floating = [i for i, o in enumerate(results) if isinstance(o, Tensor) and (o.is_floating_point() or o.is_complex())]
    products = _jvp(lambda *v: tuple(function(*v)[i] for i in floating), tuple(v.detach() for v in moving.values()))
    done = list(results)
    for i, product in zip(floating, products, strict=True):
        done[i] = run.rest(node, results[i], results[i].detach() - product, i if several else None)
    return done if several else done[0]


def _with_slope(run: Runner, node: fx.Node, function: Callable[..., tuple[Any, ...]]) -> Any:
    """The operator itself; in a forward derivative also where it has no forward mode."""
    try:
        return run.native(node)
    except NotImplementedError:
        duals = [forward_ad.unpack_dual(value) for value in run.moving(node).values()]
        primals = tuple(dual.primal for dual in duals)
        tangents = tuple(torch.zeros_like(d.primal) if d.tangent is None else d.tangent for d in duals)
        made = [
            forward_ad.make_dual(o, t)
            for o, t in zip(function(*primals), _by_reverse_mode_twice(function, primals, tangents), strict=True)
        ]
        return made[0] if len(made) == 1 else made


def _jvp(function: Callable[..., tuple[Tensor, ...]], primals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """J z at z, by forward-mode differentiation; by reverse mode twice where an operator has no forward mode."""
    with suppress(RuntimeError):  # NotImplementedError is one
        return torch.func.jvp(function, primals, tuple(map(_finite, primals)))[1]
    return _by_reverse_mode_twice(function, primals, tuple(map(_finite, primals)))


def _by_reverse_mode_twice(
    function: Callable[..., tuple[Tensor, ...]], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in primals]
        found = []
        for out in function(*leaves):
            u = torch.zeros_like(out, requires_grad=True)
            pulled = torch.autograd.grad(out, leaves, u, create_graph=True, materialize_grads=True)
            total = torch.stack([(g * t).sum() for g, t in zip(pulled, tangents, strict=True)]).sum()
            found.append(torch.autograd.grad(total, u, materialize_grads=True)[0])
        return tuple(found)


def _finite(value: Tensor) -> Tensor:
    """What is infinite, or would be in single precision (a masked logit), is no part of what moves."""
    return torch.where(value.abs() >= 0.5 * torch.finfo(torch.float32).max, 0.0, value)


# -- which operator is run in which way ----------------------------------------------------------------------------------

_SUMS: dict[Any, Callable[[Any, Any, float], Tensor]] = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), lambda first, second, alpha: first + alpha * second),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), lambda first, second, alpha: first - alpha * second),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), lambda first, second, alpha: second - alpha * first),
}
_KINDS: dict[Any, Kind] = {
    **dict.fromkeys((*_SUMS, aten.cat.default, aten.stack.default), _join),
    **dict.fromkeys((*CONVOLUTIONS, *BY_COLUMNS), _biased),
    **dict.fromkeys((aten.batch_norm.default, aten._native_batch_norm_legit.no_stats), _by_running_statistics),
    **dict.fromkeys(
        (aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.instance_norm.default),
        _normalise,
    ),
    **dict.fromkeys(
        (*QUOTIENTS, *PRODUCTS),
        _product,
    ),
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys(PIECES, _tangent),
    **dict.fromkeys(PLAIN, _plain),
}


def _kind(graph: Graph, node: fx.Node) -> Kind:
    key = ("kind", node)
    if key not in graph.factored:
        graph.factored[key] = _find_kind(graph, node)
    return graph.factored[key]


def _find_kind(graph: Graph, node: fx.Node) -> Kind:
    if node.target in CONSTANT_PADDINGS and not given(node).get("value"):
        return _plain
    if node.target in _KINDS:
        return _KINDS[node.target]
    try:
        fact = closed(bind(graph, node))
    except Refusal:
        return _tangent
    return partial(_secant, function=fact.function) if isinstance(fact, Pointwise) else _tangent


def _is_exact(graph: Graph, node: fx.Node) -> bool:
    """Whether the tangent is the operator itself around the recorded values."""
    if node.target in PIECES:
        return True
    try:
        return isinstance(closed(bind(graph, node)), Linear | Selection)
    except Refusal:
        return False


def _nodes(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, lambda a: found.append(a))
    return found


def _is_number(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and not isinstance(argument.meta.get("val"), Tensor)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
