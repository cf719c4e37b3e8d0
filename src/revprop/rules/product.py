"""Products and quotients of activations: gates, squeeze-excite, normalisation by a norm; matrix products; attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from revprop.linear_map import Gate, LinearMap, Matrices
from revprop.rules.registry import Call, Fact, Nonlinear, Refusal, rule

aten = torch.ops.aten


def product(call: Call) -> Nonlinear:
    """``z = x s`` with both moving, s perhaps broadcast: the nearest point of the hyperbola, or x by a factor that is held."""
    first, second = call["input"], call["other"]
    if first is second:
        raise Refusal("a square")
    if not (call.is_activation(first) and call.is_activation(second)):
        if call.graph.shape(call.inputs[0]) != call.shape:
            raise Refusal("a product that repeats what moves")
        return Nonlinear(call.run, linear=lambda x, s: (0, Gate(s.to(x.dtype).expand_as(x))))
    shapes = [call.graph.shape(node) for node in (first, second)]
    if call.shape not in shapes:
        raise Refusal("a product that repeats both factors")
    whole = shapes.index(call.shape)

    def preimage(wanted: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        x, s = _shared(values[whole], values[1 - whole], wanted)
        return (x, s) if whole == 0 else (s, x)

    return Nonlinear(call.run, preimage)


def quotient(call: Call) -> Nonlinear:
    """``z = x / s``: linear in (x, s) once z is given, so the nearest point of a plane; or what moves of the two alone."""
    numerator, denominator = call["input"], call["other"]
    if numerator is denominator:
        raise Refusal("one")
    if not call.is_activation(denominator):
        if call.graph.shape(numerator) != call.shape:
            raise Refusal("a quotient that repeats what moves")
        return Nonlinear(call.run, linear=lambda x, s: (0, Gate((1.0 / s.to(x.dtype)).expand_as(x))))
    if (
        not (isinstance(numerator, fx.Node) and call.is_activation(numerator))
        or call.graph.shape(numerator) != call.shape
    ):
        raise Refusal("a quotient of something that does not move, or is repeated")

    def preimage(wanted: Tensor, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        # argmin |x' - x|^2 + (s' - s)^2 subject to x' = z s'
        new = (s + _sum_to(wanted * x, s)) / (1 + _sum_to(wanted.square(), s))
        return wanted * new, new

    return Nonlinear(call.run, preimage)


def _shared(x: Tensor, s: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest (x', s') with ``x' s' = wanted``, one s for several x.

    With z the wanted entries that share an s, x' = z / s', so only the part of x along z moves freely: with p = <x, z> / |z|
    the nearest point of the hyperbola p' s' = |z|.
    """
    size = _sum_to(wanted.square(), s).sqrt()
    along = _sum_to(x * wanted, s) / size.clamp_min(torch.finfo(x.dtype).tiny)
    one, factor = hyperbola(along, s, size)
    # nothing wanted at all: either all x of an s vanish or the s does, whichever is nearer
    none = size == 0
    drop = none & (s.square() < _sum_to(x.square(), s))
    factor = torch.where(none, torch.where(drop, 0.0, s), factor)
    share = torch.where(none, 0.0, one / size.clamp_min(torch.finfo(x.dtype).tiny))
    return torch.where(drop, x, wanted * share), factor


def _sum_to(value: Tensor, like: Tensor) -> Tensor:
    return value.sum_to_size(like.shape)


def hyperbola(p: Tensor, q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest (p', q') with ``p' q' = c``, entry by entry.

    With u, v = (p + q, p - q) / sqrt(2) the constraint is u^2 - v^2 = 2 c, and the nearest point u / (1 - m), v / (1 + m) with m in
    (-1, 1): the root of an increasing function, by Newton's method within a bracket.

    >>> p, q = hyperbola(torch.tensor([3.0]), torch.tensor([3.0]), torch.tensor([4.0]))
    >>> round(float(p), 4), round(float(q), 4)
    (2.0, 2.0)
    """
    root = 2**0.5
    u, v = (p + q) / root, (p - q) / root
    low, high, m = torch.full_like(u, -1.0), torch.full_like(u, 1.0), torch.zeros_like(u)
    kept = (u.square() - v.square() - 2 * c).abs() <= 8 * torch.finfo(u.dtype).eps * (u.square() + v.square())
    for _ in range(60):
        up, down = u / (1 - m), v / (1 + m)
        value = up.square() - down.square() - 2 * c
        low, high = torch.where(value < 0, m, low), torch.where(value < 0, high, m)
        slope = 2 * (up.square() / (1 - m) + down.square() / (1 + m))
        new = m - value / slope
        inside = (new > low) & (new < high)  # False for NaN
        new = torch.where(inside, new, 0.5 * (low + high))
        still = (new - m).abs() <= 4 * torch.finfo(u.dtype).eps
        m = new
        if bool((still | kept).all()):
            break
    # one of the two from the multiplier, the other from the constraint: the larger one, unless the multiplier is at its end,
    # where only the constraint knows the other
    up, down = u / (1 - m), v / (1 + m)
    end = torch.finfo(u.dtype).eps ** 0.5
    solved = ((c < 0) & (1 - m > end)) | (1 + m < end)
    other = torch.where(solved, up.square() - 2 * c, 2 * c + down.square()).clamp_min(0.0).sqrt()
    up, down = (
        torch.where(solved, up, torch.where(u < 0, -other, other)),
        torch.where(solved, torch.where(v < 0, -other, other), down),
    )
    return torch.where(kept, p, (up + down) / root), torch.where(kept, q, (up - down) / root)


@rule(aten.bmm.default, anywhere=True)
def batched_product(call: Call) -> Fact:
    return weighted(call, call["input"], call["mat2"])


def weighted(call: Call, left: fx.Node, right: fx.Node) -> Fact:
    """``z = P a`` for each sample. Where P is a softmax, or held: a by P as recorded. Else both are searched together."""
    if call.is_activation(left) and not _is_softmax(left):
        raise Refusal("a matrix product of two activations")
    if not call.is_activation(right):
        raise Refusal("a matrix product of an activation and something that is held")
    if call.graph.shape(left)[:-2] != call.graph.shape(right)[:-2]:
        raise Refusal("a matrix product with broadcasting")
    place = call.values.index(left), call.values.index(right)

    def linear(*values: Tensor) -> tuple[int, LinearMap]:
        return place[1], Matrices(values[place[0]])

    return Nonlinear(call.run, linear=linear)


_CARRIED = {aten.clone.default, aten.view.default, aten.expand.default, aten.to.dtype, aten._to_copy.default}


def _is_softmax(node: fx.Node) -> bool:
    while node.target in _CARRIED and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.target is aten.softmax.int


@rule(aten.scaled_dot_product_attention.default, anywhere=True)
def attention(call: Call) -> Fact:
    """``z = softmax(q k^T / sqrt(d) + mask) v``: the values by the weights as recorded (Vaswani et al., 2017, Eq. 1)."""
    value = call["value"]
    if not call.is_activation(value) or call["dropout_p"]:
        raise Refusal("an attention whose values do not move, or that drops at random")
    place = call.values.index(value)
    query, key = (call.graph.shape(call[name]) for name in ("query", "key"))
    if query[:-2] != key[:-2]:
        raise Refusal("an attention whose queries share keys")

    def linear(*values: Tensor) -> tuple[int, LinearMap]:
        given = dict(zip(call.values, values, strict=True))
        q, k, mask = (_value(given, call.get(name)) for name in ("query", "key", "attn_mask"))
        assert q is not None
        assert k is not None
        eye = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device).expand(*k.shape[:-1], k.shape[-2])
        weights = F.scaled_dot_product_attention(q, k, eye, mask, is_causal=call["is_causal"], scale=call.get("scale"))
        return place, Matrices(weights)

    return Nonlinear(call.run, linear=linear)


def _value(given: dict[fx.Node, Tensor], argument: object) -> Tensor | None:
    if isinstance(argument, fx.Node):
        return given[argument]
    return argument if isinstance(argument, Tensor) else None
