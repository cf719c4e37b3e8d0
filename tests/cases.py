"""For every operator with a rule one or more small networks that consist of it and what it cannot do without.

``CASES`` are covered calls, ``REFUSALS`` calls that a rule must refuse. Nothing here imports the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

aten = torch.ops.aten
Kind = Literal["linear", "pointwise", "selection", "nonlinear", "searched"]


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an operator: ``forward(*activations, *weights)``.

    Attributes:
        shapes: of the activations, behind the batch. weights: in double precision.
        kind: what the operator is.
        low, high: a pointwise operator's range; open_low, open_high: whether the end is approached only.
        alone: whether it is traced as this one operator.
        domain: from all numbers to those that the operator takes.
    """

    name: str
    operator: Any
    forward: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    weights: tuple[Tensor, ...] = ()
    kind: Kind = "linear"
    low: float = -torch.inf
    high: float = torch.inf
    open_low: bool = False
    open_high: bool = False
    alone: bool = True
    domain: Callable[[Tensor], Tensor] = torch.clone

    def module(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The network, in eval mode."""
        return (_One if len(self.shapes) == 1 else _Two)(self.forward, [w.to(dtype) for w in self.weights]).eval()

    def inputs(self, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
        """A batch of n samples for each activation."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            self.domain(torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype) * 1.5)
            for shape in self.shapes
        )


@dataclass(frozen=True, eq=False)
class RefusedCall:
    """A call that no rule covers, and words of the remedy."""

    name: str
    operator: Any
    forward: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    remedy: str

    def module(self, dtype: torch.dtype) -> nn.Module:
        return (_One if len(self.shapes) == 1 else _Two)(self.forward, []).eval()

    def inputs(self, n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.ones(n, *shape, dtype=dtype) for shape in self.shapes)


class _One(nn.Module):
    def __init__(self, function: Callable[..., Tensor], weights: list[Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(w, requires_grad=False) for w in weights])

    def forward(self, a: Tensor) -> Tensor:
        return self.function(a, *self.weights)


class _Two(_One):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return self.function(a, b, *self.weights)


def normal(*shape: int) -> Tensor:
    """A weight: the same numbers for the same shape."""
    generator = torch.Generator().manual_seed(sum(s * 31**i for i, s in enumerate(shape)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def deficient(*shape: int) -> Tensor:
    """A weight of low rank: first output zero, last output like the second, last input like the first."""
    weight = normal(*shape)
    weight[0] = 0.0
    weight[-1] = weight[1]
    weight[:, -1] = weight[:, 0]
    return weight


CASES: list[Case] = []


def linear(
    operator: Any,
    name: str,
    forward: Callable[..., Tensor],
    *shapes: tuple[int, ...],
    weights: tuple[Tensor, ...] = (),
    alone: bool = True,
) -> None:
    CASES.append(Case(_name(operator, name), operator, forward, shapes, weights, alone=alone))


def pointwise(
    operator: Any,
    name: str,
    forward: Callable[..., Tensor],
    low: float = -torch.inf,
    high: float = torch.inf,
    ends: str = "()",
    weights: tuple[Tensor, ...] = (),
    shape: tuple[int, ...] = (3, 4),
    domain: Callable[[Tensor], Tensor] = torch.clone,
    alone: bool = True,
) -> None:
    """``ends``: "(" or ")" where the end of the range is approached only, "[" or "]" where it is taken."""
    CASES.append(
        Case(
            _name(operator, name),
            operator,
            forward,
            (shape,),
            weights,
            "pointwise",
            low,
            high,
            ends[0] == "(",
            ends[1] == ")",
            alone,
            domain,
        )
    )


def selection(operator: Any, name: str, forward: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    CASES.append(Case(_name(operator, name), operator, forward, (shape,), kind="selection"))


def nonlinear(
    operator: Any,
    name: str,
    forward: Callable[..., Tensor],
    *shapes: tuple[int, ...],
    weights: tuple[Tensor, ...] = (),
    alone: bool = True,
) -> None:
    CASES.append(Case(_name(operator, name), operator, forward, shapes, weights, "nonlinear", alone=alone))


def _name(operator: Any, name: str) -> str:
    head = str(operator).removeprefix("aten.")
    return f"{head}-{name}" if name else head


# -- activations -----------------------------------------------------------------------------------------------------

INF = torch.inf
pointwise(aten.tanh.default, "", torch.tanh, -1.0, 1.0)
pointwise(aten.sigmoid.default, "", torch.sigmoid, 0.0, 1.0)
pointwise(aten.atan.default, "", torch.atan, -torch.pi / 2, torch.pi / 2)
pointwise(aten.asinh.default, "", torch.asinh)
pointwise(aten.sinh.default, "", torch.sinh)
pointwise(aten.softplus.default, "", F.softplus, 0.0)
pointwise(aten.softplus.default, "beta", lambda a: F.softplus(a, beta=2.5), 0.0)
pointwise(aten.elu.default, "", F.elu, -1.0)
pointwise(aten.elu.default, "alpha", lambda a: F.elu(a, 0.5), -0.5)
pointwise(aten.elu.default, "scaled", lambda a: aten.elu(a, 0.5, 1.2, 0.7), -0.6)
pointwise(aten.celu.default, "alpha", lambda a: F.celu(a, 0.5), -0.5)
pointwise(aten.selu.default, "", F.selu, -1.0507009873554805 * 1.6732632423543772)
pointwise(aten.relu.default, "", F.relu, 0.0, ends="[)")
pointwise(aten.relu6.default, "", F.relu6, 0.0, 6.0, "[]")
pointwise(aten.hardtanh.default, "", lambda a: F.hardtanh(a, -0.5, 0.75), -0.5, 0.75, "[]")
pointwise(aten.clamp.default, "both", lambda a: a.clamp(-0.5, 0.75), -0.5, 0.75, "[]")
pointwise(aten.clamp.default, "below", lambda a: a.clamp(min=-0.5), -0.5, ends="[)")
pointwise(aten.clamp.default, "above", lambda a: a.clamp(max=0.5), high=0.5, ends="(]")
pointwise(aten.clamp_min.default, "", lambda a: a.clamp_min(0.25), 0.25, ends="[)")
pointwise(aten.clamp_max.default, "", lambda a: a.clamp_max(0.25), high=0.25, ends="(]")
pointwise(aten.leaky_relu.default, "", lambda a: F.leaky_relu(a, 0.1))
pointwise(aten.leaky_relu.default, "folding", lambda a: F.leaky_relu(a, -0.5), 0.0, ends="[)")
pointwise(aten.leaky_relu.default, "flat", lambda a: F.leaky_relu(a, 0.0), 0.0, ends="[)")
pointwise(aten.prelu.default, "shared", F.prelu, weights=(torch.tensor([0.2], dtype=torch.float64),))
pointwise(aten.prelu.default, "channels", F.prelu, weights=(torch.tensor([0.2, 0.9, 1.5], dtype=torch.float64),))
pointwise(
    aten.prelu.default, "image", F.prelu, weights=(torch.tensor([0.2, 2.0], dtype=torch.float64),), shape=(2, 3, 3)
)
pointwise(aten.sin.default, "", torch.sin, -1.0, 1.0, "[]")
pointwise(aten.cos.default, "", torch.cos, -1.0, 1.0, "[]")
pointwise(aten.log_sigmoid.default, "", F.logsigmoid, high=0.0)
pointwise(aten.erf.default, "", torch.erf, -1.0, 1.0)
pointwise(aten.hardsigmoid.default, "", F.hardsigmoid, 0.0, 1.0, "[]")
pointwise(aten.threshold.default, "constant below", lambda a: F.threshold(a, 0.1, -2.0), -2.0, ends="[)")
pointwise(aten.threshold.default, "constant above", lambda a: F.threshold(a, -0.5, 0.25), -0.5)
pointwise(aten.rrelu.default, "", F.rrelu)


def lowest(function: Callable[[Tensor], Tensor]) -> float:
    """The smallest value of a function whose only minimum lies between -3 and 0."""
    found = minimize_scalar(
        lambda z: float(function(torch.tensor(z, dtype=torch.float64))), (-3.0, -1.0, 0.0), tol=1e-12
    )
    return float(found.fun)


for label, gate in (("", "none"), ("tanh", "tanh")):
    pointwise(
        aten.gelu.default,
        label,
        lambda a, g=gate: F.gelu(a, approximate=g),
        lowest(lambda a, g=gate: F.gelu(a, approximate=g)),
        ends="[)",
    )
pointwise(aten.silu.default, "", F.silu, lowest(F.silu), ends="[)")
pointwise(aten.mish.default, "", F.mish, lowest(F.mish), ends="[)")
pointwise(aten.hardswish.default, "", lambda a: F.hardswish(2 * a), -0.375, ends="[)", alone=False)

# -- elementary functions --------------------------------------------------------------------------------------------


def off_zero(a: Tensor) -> Tensor:
    return a + torch.copysign(torch.full_like(a, 0.3), a)


pointwise(aten.exp.default, "", torch.exp, 0.0)
pointwise(aten.expm1.default, "", torch.expm1, -1.0)
pointwise(aten.log.default, "", torch.log, domain=torch.exp)
pointwise(aten.log1p.default, "", torch.log1p, domain=torch.expm1)
pointwise(aten.abs.default, "", torch.abs, 0.0, ends="[)")
pointwise(aten.square.default, "", torch.square, 0.0, ends="[)")
pointwise(aten.sqrt.default, "", torch.sqrt, 0.0, ends="[)", domain=torch.exp)
pointwise(aten.rsqrt.default, "", torch.rsqrt, 0.0, domain=torch.exp)
pointwise(aten.reciprocal.default, "", torch.reciprocal, domain=off_zero)
pointwise(aten.pow.Tensor_Scalar, "even", lambda a: a**4, 0.0, ends="[)")
pointwise(aten.pow.Tensor_Scalar, "odd", lambda a: a**3)
pointwise(aten.pow.Tensor_Scalar, "fraction", lambda a: a**1.5, 0.0, ends="[)", domain=torch.exp)
pointwise(aten.pow.Tensor_Scalar, "negative", lambda a: a**-2, 0.0, domain=off_zero)
pointwise(aten.pow.Tensor_Scalar, "constant", lambda a: a**0, 1.0, 1.0, "[]")

# -- dense maps ------------------------------------------------------------------------------------------------------

for label, weight in (
    ("wide", normal(2, 5)),
    ("square", normal(4, 4)),
    ("tall", normal(5, 2)),
    ("one", normal(1, 3)),
    ("deficient", deficient(4, 4)),
    ("zero", torch.zeros(2, 3, dtype=torch.float64)),
):
    linear(
        aten.linear.default,
        label,
        lambda a, w, b: F.linear(a, w, b),
        (weight.shape[1],),
        weights=(weight, normal(len(weight))),
    )
linear(aten.linear.default, "sequence", lambda a, w: F.linear(a, w), (3, 4), weights=(normal(2, 4),))
linear(
    aten.addmm.default,
    "",
    lambda a, m, b: torch.addmm(b, a, m, beta=0.5, alpha=2.0),
    (3,),
    weights=(normal(3, 4), normal(4)),
)
linear(aten.mm.default, "", torch.mm, (3,), weights=(normal(3, 4),))
linear(aten.matmul.default, "right", torch.matmul, (2, 3), weights=(normal(3, 4),))
linear(aten.matmul.default, "left", lambda a, m: m @ a, (3, 4), weights=(normal(2, 3),))
linear(aten.matmul.default, "left, deficient", lambda a, m: m @ a, (2, 4, 3), weights=(deficient(4, 4),))

# -- convolutions ----------------------------------------------------------------------------------------------------

CONVOLUTIONS = ((F.conv1d, aten.conv1d, (7,)), (F.conv2d, aten.conv2d, (5, 6)), (F.conv3d, aten.conv3d, (3, 4, 3)))
for dims, (conv, packet, size) in enumerate(CONVOLUTIONS, start=1):
    kernel = (3, 2, 2)[:dims]
    linear(packet.default, "plain", conv, (2, *size), weights=(normal(3, 2, *kernel), normal(3)))
    linear(
        packet.default,
        "strided",
        lambda a, w, f=conv: f(a, w, None, 2, 1),
        (2, *size),
        weights=(normal(3, 2, *kernel),),
    )
    linear(packet.default, "1x1", conv, (3, *size), weights=(normal(2, 3, *[1] * dims),))
    linear(
        packet.padding,
        "same",
        lambda a, w, f=conv: f(a, w, None, padding="same"),
        (2, *size),
        weights=(normal(2, 2, *kernel),),
    )
linear(
    aten.conv2d.padding,
    "valid",
    lambda a, w: F.conv2d(a, w, None, padding="valid"),
    (2, 4, 3),
    weights=(normal(2, 2, 2, 3),),
)
linear(
    aten.conv2d.default, "groups", lambda a, w: F.conv2d(a, w, None, groups=2), (4, 5, 4), weights=(normal(2, 2, 3, 2),)
)
linear(
    aten.conv2d.default, "1x1, strided", lambda a, w: F.conv2d(a, w, None, 2), (2, 5, 4), weights=(normal(3, 2, 1, 1),)
)
linear(aten.conv2d.default, "deficient", F.conv2d, (3, 5, 4), weights=(deficient(3, 3, 3, 2),))
linear(
    aten.conv2d.default,
    "dilated",
    lambda a, w: F.conv2d(a, w, None, dilation=(2, 1)),
    (2, 5, 4),
    weights=(normal(2, 2, 2, 3),),
)
linear(
    aten.conv2d.default,
    "depthwise",
    lambda a, w: F.conv2d(a, w, None, groups=3, padding=1),
    (3, 4, 4),
    weights=(normal(6, 1, 3, 3),),
)
linear(
    aten.conv2d.padding,
    "same, dilated",
    lambda a, w: F.conv2d(a, w, None, padding="same", dilation=2),
    (1, 5, 4),
    weights=(normal(2, 1, 2, 3),),
)
TRANSPOSED = (
    (F.conv_transpose1d, aten.conv_transpose1d.default, (4,)),
    (F.conv_transpose2d, aten.conv_transpose2d.input, (3, 2)),
    (F.conv_transpose3d, aten.conv_transpose3d.input, (2, 2, 2)),
)
for dims, (conv, operator, size) in enumerate(TRANSPOSED, start=1):
    kernel = (3, 2, 2)[:dims]
    linear(
        operator, "strided", lambda a, w, f=conv: f(a, w, None, 2, 1, 1), (2, *size), weights=(normal(2, 1, *kernel),)
    )
conv, operator, size = TRANSPOSED[1]
linear(operator, "plain", conv, (2, *size), weights=(normal(2, 3, 3, 2), normal(3)))
linear(
    operator, "groups", lambda a, w: F.conv_transpose2d(a, w, None, groups=2), (4, *size), weights=(normal(4, 2, 3, 2),)
)
linear(operator, "1x1", lambda a, w: F.conv_transpose2d(a, w, None, 2, 0, 1), (2, *size), weights=(normal(2, 3, 1, 1),))

# -- arithmetic and merges -------------------------------------------------------------------------------------------

linear(aten.add.Tensor, "residual", lambda a, b: a + b, (3, 4), (3, 4))
linear(aten.add.Tensor, "broadcast", lambda a, b: a + b, (1, 3, 1), (2, 1, 4))
linear(aten.add.Tensor, "one side broadcast", lambda a, b: torch.add(a, b, alpha=-2.0), (3, 4), (1, 4))
linear(aten.add.Tensor, "constant", lambda a, c: a + c, (2, 3, 1), weights=(normal(2, 1, 4),))
linear(aten.add.Tensor, "number", lambda a: a + 2, (3,))
linear(aten.add.Scalar, "", lambda a: aten.add.Scalar(a, 2.0), (3,))
linear(aten.sub.Tensor, "", lambda a, b: torch.sub(a, b, alpha=0.5), (3,), (3,))
linear(aten.sub.Tensor, "from a constant", lambda a, c: c - a, (3,), weights=(normal(3),))
linear(aten.sub.Scalar, "", lambda a: aten.sub.Scalar(a, 2.0), (3,))
linear(aten.rsub.Scalar, "", lambda a: 2.0 - a, (3,))
linear(aten.rsub.Tensor, "", lambda a, b: torch.rsub(a, b, alpha=3.0), (3,), (3,))
linear(aten.neg.default, "", torch.neg, (3,))
linear(
    aten.mul.Tensor,
    "channels",
    lambda a, c: a * c,
    (3, 4),
    weights=(torch.tensor([[2.0], [0.0], [-0.5]], dtype=torch.float64),),
)
linear(aten.mul.Tensor, "batched constant", lambda a, c: c * a, (3, 4), weights=(normal(1, 3, 4),))
linear(
    aten.mul.Tensor,
    "outer",
    lambda a, c: c * a,
    (3, 1),
    weights=(torch.tensor([1.0, 0.0, -2.0, 3.0], dtype=torch.float64),),
)
linear(aten.mul.Tensor, "integers", lambda a: a * torch.tensor([1, 0, 3]), (3,))
linear(aten.mul.Tensor, "number", lambda a: 3 * a, (3,))
linear(aten.mul.Scalar, "", lambda a: aten.mul.Scalar(a, -2.0), (3,))
linear(aten.div.Tensor, "", lambda a, c: a / c, (3, 4), weights=(normal(4),))
linear(aten.div.Tensor, "number", lambda a: a / 4, (3,))
linear(aten.div.Scalar, "", lambda a: aten.div.Scalar(a, 4.0), (3,))
linear(aten.cat.default, "channels", lambda a, b: torch.cat([a, b], 1), (2, 3), (4, 3))
linear(
    aten.cat.default,
    "with a constant",
    lambda a, b, c: torch.cat([a, c.expand(a.shape[0], 2), b], -1),
    (2,),
    (1,),
    weights=(normal(2),),
)
linear(
    aten.batch_norm.default,
    "image",
    lambda a, m, v, w, b: F.batch_norm(a, m, v.exp(), w, b),
    (3, 2, 2),
    weights=(normal(3), normal(3), torch.tensor([1.5, 0.0, -0.3], dtype=torch.float64), normal(3)),
)
linear(
    aten.batch_norm.default,
    "not affine",
    lambda a, m, v: F.batch_norm(a, m, v.exp()),
    (3,),
    weights=(normal(3), normal(3)),
)

# -- softmax and normalisation ---------------------------------------------------------------------------------------

nonlinear(aten.softmax.int, "last", lambda a: F.softmax(a, -1), (3, 4))
nonlinear(aten.softmax.int, "channels", lambda a: F.softmax(a, 1), (3, 2, 2))
nonlinear(
    aten.softmax.int, "batch moved", lambda a: F.softmax(a.permute(1, 0, 2), 0).permute(1, 0, 2), (3, 2), alone=False
)
nonlinear(aten._softmax.default, "", lambda a: aten._softmax(a, -1, False), (3,))
nonlinear(aten.special_softmax.default, "", lambda a: torch.special.softmax(a, -1), (3,))
nonlinear(aten.log_softmax.int, "", lambda a: F.log_softmax(a, 1), (3, 2))
nonlinear(aten._log_softmax.default, "", lambda a: aten._log_softmax(a, -1, False), (3,))
nonlinear(aten.special_log_softmax.default, "", lambda a: torch.special.log_softmax(a, -1), (3,))
nonlinear(
    aten.layer_norm.default,
    "affine",
    lambda a, w, b: F.layer_norm(a, (4,), w, b),
    (3, 4),
    weights=(normal(4), normal(4)),
)
nonlinear(aten.layer_norm.default, "two dimensions", lambda a: F.layer_norm(a, (3, 2), eps=0.1), (2, 3, 2))
nonlinear(aten.layer_norm.default, "one entry", lambda a: F.layer_norm(a, (1,)), (3, 1))
nonlinear(aten.rms_norm.default, "affine", lambda a, w: F.rms_norm(a, (4,), w, 1e-5), (3, 4), weights=(normal(4),))
nonlinear(aten.rms_norm.default, "without eps", lambda a: F.rms_norm(a, (3,)), (3,))
nonlinear(
    aten.group_norm.default,
    "affine",
    lambda a, w, b: F.group_norm(a, 2, w, b),
    (4, 3),
    weights=(normal(4), normal(4)),
)
nonlinear(
    aten.instance_norm.default,
    "affine",
    lambda a, w, b: F.instance_norm(a, None, None, w, b),
    (2, 2, 3),
    weights=(torch.tensor([1.5, -0.3], dtype=torch.float64), normal(2)),
)
linear(
    aten.instance_norm.default,
    "running statistics",
    lambda a, m, v: F.instance_norm(a, m, v.exp(), use_input_stats=False),
    (3, 2, 2),
    weights=(normal(3), normal(3)),
)
nonlinear(aten.linalg_vector_norm.default, "kept", lambda a: torch.linalg.vector_norm(a, dim=1, keepdim=True), (3, 2))
nonlinear(aten.linalg_vector_norm.default, "", lambda a: torch.linalg.vector_norm(a, dim=(-1, 1)), (3, 2, 2))

# -- pooling and up-sampling -----------------------------------------------------------------------------------------

SIZES = ((7,), (4, 6), (4, 2, 4))
for dims, (max_pool, avg_pool, adaptive_max, adaptive_avg) in enumerate(
    (
        (F.max_pool1d, F.avg_pool1d, F.adaptive_max_pool1d, F.adaptive_avg_pool1d),
        (F.max_pool2d, F.avg_pool2d, F.adaptive_max_pool2d, F.adaptive_avg_pool2d),
        (F.max_pool3d, F.avg_pool3d, F.adaptive_max_pool3d, F.adaptive_avg_pool3d),
    ),
    start=1,
):
    image = (2, *SIZES[dims - 1])
    even = (2, *[4] * dims)
    to = {op: getattr(aten, f"{op}{dims}d").default for op in ("max_pool", "avg_pool", "adaptive_avg_pool")}
    selection(to["max_pool"], "tiles", lambda a, f=max_pool: f(a, 2), image)
    selection(to["max_pool"], "padded", lambda a, f=max_pool: f(a, 3, 2, 1), image)
    selection(to["max_pool"], "with indices", lambda a, f=max_pool: f(a, 2, return_indices=True)[0], even)
    selection(to["max_pool"], "adaptive", lambda a, f=adaptive_max: f(a, 2), even)
    uneven = getattr(aten, f"adaptive_max_pool{dims}d").default
    CASES.append(
        Case(
            _name(uneven, "overlapping"),
            uneven,
            lambda a, f=adaptive_max: f(a, 3),
            (even,),
            (),
            "selection",
            alone=False,
        )
    )
    linear(to["avg_pool"], "overlapping", lambda a, f=avg_pool: f(a, 2, 1), image)
    linear(to["avg_pool"], "padding not counted", lambda a, f=avg_pool: f(a, 3, 2, 1, count_include_pad=False), even)
    linear(to["adaptive_avg_pool"], "uneven", lambda a, f=adaptive_avg: f(a, 3), even)
    for mode, operator in (
        ("nearest", getattr(aten, f"upsample_nearest{dims}d").vec),
        ("nearest-exact", getattr(aten, f"_upsample_nearest_exact{dims}d").vec),
        (
            ("linear", "bilinear", "trilinear")[dims - 1],
            getattr(aten, ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")[dims - 1]).vec,
        ),
    ):
        linear(
            operator,
            "factor",
            lambda a, m=mode, s=(2.0, 1.5, 0.5)[:dims]: F.interpolate(a, scale_factor=s, mode=m),
            even,
        )
selection(aten.max_pool1d.default, "overlapping", lambda a: F.max_pool1d(a, 2, 1), (2, 7))
selection(aten.max_pool1d.default, "gaps", lambda a: F.max_pool1d(a, 1, 2), (2, 7))
selection(aten.max_pool2d.default, "ceil", lambda a: F.max_pool2d(a, 2, 3, 1, ceil_mode=True), (2, 4, 4))
linear(aten.avg_pool2d.default, "tiles", lambda a: F.avg_pool2d(a, 2), (2, 4, 6))
linear(aten.avg_pool2d.default, "padded", lambda a: F.avg_pool2d(a, 2, 1, 1), (1, 4, 3))
linear(aten.avg_pool2d.default, "ceil", lambda a: F.avg_pool2d(a, 3, 2, 1, ceil_mode=True), (2, 4, 4))
linear(aten.adaptive_avg_pool2d.default, "even", lambda a: F.adaptive_avg_pool2d(a, 2), (2, 4, 4))
linear(aten.upsample_nearest2d.vec, "size", lambda a: F.interpolate(a, (5, 3)), (2, 4, 4))
linear(aten.upsample_bilinear2d.vec, "size", lambda a: F.interpolate(a, (5, 3), mode="bilinear"), (2, 4, 4))
linear(aten.avg_pool2d.default, "divisor", lambda a: F.avg_pool2d(a, 2, divisor_override=3), (2, 4, 4))
linear(
    aten.avg_pool2d.default, "negative divisor", lambda a: F.avg_pool2d(a, (2, 1), 1, divisor_override=-2), (1, 3, 3)
)
selection(aten.max_pool2d.default, "dilated", lambda a: F.max_pool2d(a, 2, 1, 0, (2, 1)), (1, 4, 3))
linear(
    aten.upsample_bilinear2d.vec,
    "corners",
    lambda a: F.interpolate(a, (5, 7), mode="bilinear", align_corners=True),
    (1, 4, 3),
)
linear(
    aten.upsample_bicubic2d.vec,
    "factor",
    lambda a: F.interpolate(a, scale_factor=(1.5, 2.0), mode="bicubic"),
    (1, 4, 3),
)
linear(
    aten.upsample_bicubic2d.vec,
    "corners",
    lambda a: F.interpolate(a, (5, 2), mode="bicubic", align_corners=True),
    (2, 4, 3),
)
linear(
    aten._upsample_bilinear2d_aa.vec,
    "size",
    lambda a: F.interpolate(a, (3, 5), mode="bilinear", antialias=True),
    (2, 5, 4),
)
linear(
    aten._upsample_bicubic2d_aa.vec,
    "factor",
    lambda a: F.interpolate(a, scale_factor=(0.5, 1.4), mode="bicubic", antialias=True),
    (1, 5, 4),
)
linear(aten.adaptive_avg_pool2d.default, "area", lambda a: F.interpolate(a, (3, 2), mode="area"), (2, 5, 4))
linear(aten.mean.dim, "image", lambda a: a.mean((2, 3)), (2, 3, 2))
linear(aten.mean.dim, "kept", lambda a: a.mean(-2, keepdim=True), (2, 3, 2))
linear(aten.sum.dim_IntList, "", lambda a: a.sum((1, 3)), (2, 3, 2))
linear(aten.sum.dim_IntList, "kept", lambda a: a.sum(1, keepdim=True), (2, 3))

# -- copies ----------------------------------------------------------------------------------------------------------

linear(aten.clone.default, "", torch.clone, (3,))
linear(aten.alias.default, "", aten.alias, (3,))
linear(aten.detach.default, "", torch.detach, (3,))
linear(aten.view.default, "flatten", lambda a: a.flatten(1), (2, 3))
linear(aten.view.default, "batch merged", lambda a: a.reshape(-1, 3).reshape(-1, 2, 3), (2, 3), alone=False)
linear(aten._unsafe_view.default, "", lambda a: aten._unsafe_view(a, [-1, 6]), (2, 3))
linear(aten.squeeze.dims, "all", torch.squeeze, (1, 3, 1))
linear(aten.squeeze.dim, "", lambda a: a.squeeze(1), (1, 3, 1))
linear(aten.squeeze.dims, "", lambda a: a.squeeze((1, 3)), (1, 3, 1))
linear(aten.unsqueeze.default, "", lambda a: a.unsqueeze(-1), (2, 3))
linear(aten.permute.default, "", lambda a: a.permute(0, 3, 1, 2), (2, 3, 4))
linear(aten.permute.default, "batch moved", lambda a: a.permute(2, 0, 1).clone().permute(1, 2, 0), (2, 3), alone=False)
linear(aten.transpose.int, "", lambda a: a.transpose(-1, 1), (2, 3, 4))
linear(aten.t.default, "", lambda a: a.t().t(), (3,), alone=False)
linear(aten.slice.Tensor, "", lambda a: a[:, 1:6:2, :-1], (7, 3), alone=False)
linear(aten.select.int, "", lambda a: a[:, :, -1], (2, 3), alone=False)
linear(aten.constant_pad_nd.default, "", lambda a: aten.constant_pad_nd(a, [1, -1, 0, 2], 0.5), (2, 3))
linear(aten.pad.default, "constant", lambda a: F.pad(a, (1, 2), value=3.0), (2, 3))
linear(aten.pad.default, "reflect", lambda a: F.pad(a, (2, 1), mode="reflect"), (2, 3))
linear(aten.pad.default, "replicate", lambda a: F.pad(a, (1, 1, 0, 2), mode="replicate"), (1, 2, 3))
linear(aten.pad.default, "circular", lambda a: F.pad(a, (2, 1), mode="circular"), (2, 3))
for dims, image in enumerate(((2, 3), (1, 3, 2), (1, 2, 2, 2)), start=1):
    pads = [1] * (2 * dims)
    for mode in ("reflection", "replication"):
        operator = getattr(aten, f"{mode}_pad{dims}d").default
        linear(operator, "", lambda a, f=operator, p=pads: f(a, p), image)
linear(aten.expand.default, "", lambda a: a.expand(-1, 2, 3), (1, 3))
linear(aten.repeat.default, "", lambda a: a.repeat(1, 2, 3), (1, 2))
linear(aten.flip.default, "", lambda a: a.flip(-1), (2, 3))
linear(aten.roll.default, "", lambda a: a.roll((1, -1), (1, 2)), (2, 3))
linear(aten.pixel_shuffle.default, "", lambda a: F.pixel_shuffle(a, 2), (4, 2, 1))
linear(aten.pixel_unshuffle.default, "", lambda a: F.pixel_unshuffle(a, 2), (1, 4, 2))
linear(aten.channel_shuffle.default, "", lambda a: F.channel_shuffle(a, 2), (4, 2, 1))
linear(aten.index_select.default, "", lambda a: a.index_select(1, torch.tensor([2, 0, 0])), (4, 2))

linear(aten.index.Tensor, "", lambda a: a[:, torch.tensor([2, 0, 0])], (4, 2), alone=False)
linear(aten.tile.default, "", lambda a: a.tile(1, 2), (3,))
linear(aten.unfold.default, "", lambda a: a.unfold(1, 3, 2), (7,))
linear(aten.im2col.default, "", lambda a: F.unfold(a, 2), (2, 3, 3))
linear(aten.diagonal.default, "", lambda a: a.diagonal(dim1=1, dim2=2), (3, 4))
linear(aten.select.int, "batch not first", lambda a: a.permute(1, 0, 2)[1], (3, 2), alone=False)
linear(
    aten.view.default,
    "batch not first",
    lambda a: a.transpose(0, 1).unflatten(2, (2, 2)).transpose(0, 1),
    (3, 4),
    alone=False,
)
linear(aten.view.default, "merged and apart", lambda a: a.flatten(0, 1).unflatten(0, (-1, 3)), (3, 4), alone=False)
linear(
    aten.add.Tensor,
    "batch not first",
    lambda a, b: (a.transpose(0, 1) + b.transpose(0, 1)).transpose(0, 1),
    (3, 2),
    (3, 2),
    alone=False,
)
linear(aten.stack.default, "", lambda a, b: torch.stack([a, torch.ones_like(a), b], 2), (2, 3), (2, 3), alone=False)
linear(
    aten.slice.Tensor,
    "apart and together",
    lambda a: torch.cat([p * (i + 1) for i, p in enumerate(a.chunk(3, 1))], 1),
    (6,),
    alone=False,
)

# -- products and quotients -------------------------------------------------------------------------------------------


def nonlinear(
    operator: Any, name: str, forward: Callable[..., Tensor], *shapes: tuple[int, ...], alone: bool = True
) -> None:
    CASES.append(Case(_name(operator, name), operator, forward, shapes, kind="nonlinear", alone=alone))


nonlinear(aten.mul.Tensor, "of activations", torch.mul, (2, 3), (2, 3))
nonlinear(aten.mul.Tensor, "shared factor", torch.mul, (2, 3, 2), (2, 1, 1))
nonlinear(aten.mul.Tensor, "shared factor first", torch.mul, (1, 3), (4, 3))
nonlinear(aten.mul.Tensor, "by a mask", lambda a: a * (a > -9), (2, 3), alone=False)
nonlinear(aten.div.Tensor, "of activations", torch.div, (2, 3), (2, 3))
nonlinear(aten.div.Tensor, "shared divisor", torch.div, (2, 3), (2, 1))
nonlinear(aten.where.self, "", lambda a, b: torch.where(a + b > -99, a, b), (2, 3), (2, 3), alone=False)
nonlinear(aten.masked_fill.Scalar, "", lambda a: a.masked_fill(a < -99, 0.5), (2, 3), alone=False)
nonlinear(aten.bmm.default, "weights", lambda a, b: torch.bmm(a.softmax(-1), b), (2, 3), (3, 2), alone=False)
nonlinear(
    aten.scaled_dot_product_attention.default,
    "",
    lambda a, b: F.scaled_dot_product_attention(b, b, a),
    (3, 2),
    (3, 2),
)

# -- without a closed form: searched -------------------------------------------------------------------------------------


def searched(operator: Any, name: str, forward: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
    CASES.append(Case(_name(operator, name), operator, forward, shapes, kind="searched", alone=False))


searched(aten.matmul.default, "of activations", torch.matmul, (2, 3), (3, 2))
searched(aten.div.Tensor, "by an activation", lambda a: torch.ones(3) / (2 + a.square()), (3,))
searched(aten.div.Tensor, "by the batch size", lambda a: a / a.shape[0] * a.shape[0], (3,))
searched(aten.mul.Tensor, "by a constant of the batch size", lambda a: a * torch.ones(a.shape[0], 3), (3,))
searched(aten.matmul.default, "with a vector", lambda a: a @ torch.ones(3, dtype=a.dtype), (2, 3))
searched(aten.elu.default, "folding", lambda a: F.elu(a, -1.0), (3,))
searched(
    aten.layer_norm.default,
    "some weights zero",
    lambda a: F.layer_norm(a, (4,), torch.tensor([1.0, 0.0, -0.5, 0.0], dtype=a.dtype), eps=0.1),
    (4,),
)
searched(aten.linalg_vector_norm.default, "sum", lambda a: torch.linalg.vector_norm(a, 1, dim=1), (3,))
searched(aten.max_pool2d.default, "without channels", lambda a: F.max_pool2d(a, 2), (4, 4))
searched(aten.avg_pool1d.default, "without channels", lambda a: F.avg_pool1d(a, 2), (4,))

# -- refused ---------------------------------------------------------------------------------------------------------

REFUSALS = [
    RefusedCall(
        "batch statistics",
        aten._native_batch_norm_legit.no_stats,
        lambda a: F.batch_norm(a, None, None, training=True),
        ((3, 2),),
        "statistics",
    ),
    RefusedCall("softmax of the samples", aten.softmax.int, lambda a: F.softmax(a, 0), ((3,),), "mixes samples"),
    RefusedCall(
        "norm of the samples",
        aten.linalg_vector_norm.default,
        lambda a: a / torch.linalg.vector_norm(a, dim=0, keepdim=True),
        ((3,),),
        "of each sample",
    ),
    RefusedCall("roll of the batch", aten.roll.default, lambda a: a.roll(1, 0), ((3,),), "along the batch"),
    RefusedCall("roll of everything", aten.roll.default, lambda a: a.roll(1), ((3,),), "along the batch"),
    RefusedCall("flip of the batch", aten.flip.default, lambda a: a.flip(-2), ((3,),), "along the batch"),
    RefusedCall(
        "samples repeated",
        aten.repeat.default,
        lambda a: a.repeat(2, 1).view(2, -1, 3).sum(0),
        ((3,),),
        "along the batch",
    ),
    RefusedCall(
        "samples joined",
        aten.cat.default,
        lambda a: torch.cat([a, a], 0).view(2, -1, 3).sum(0),
        ((3,),),
        "along the batch",
    ),
    RefusedCall(
        "samples chosen",
        aten.index_select.default,
        lambda a: a + a.index_select(0, torch.tensor([0, 1])).sum(0),
        ((3,),),
        "along the batch",
    ),
    RefusedCall("mean of the samples", aten.mean.dim, lambda a: a - a.mean(0, keepdim=True), ((3,),), "mixes samples"),
    RefusedCall("mean of everything", aten.mean.dim, lambda a: a - a.mean(()), ((3,),), "mixes samples"),
    RefusedCall(
        "mean where the batch is not first",
        aten.mean.dim,
        lambda a: a + a.permute(1, 0, 2).mean(1),
        ((2, 3),),
        "batch is not the first",
    ),
]
