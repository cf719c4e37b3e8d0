"""Products, quotients, matrix products and attention, against SciPy and dense algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import revprop
from revprop.linear_map import Gate, Matrices
from revprop.rules.product import hyperbola

F64 = torch.float64

sizes = st.floats(1e-6, 1e6)
numbers = st.one_of(st.just(0.0), sizes, sizes.map(lambda size: -size), st.sampled_from([1.0, -1.0, 2.0, -2.0]))


class Calls(nn.Module):
    """A function of two or three inputs as a network."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function


class Two(Calls):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


class Three(Calls):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return self.function(a, b, c)


def inputs_for(net: nn.Module, values: tuple[Tensor, ...], target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """What the greedy walk wants of the inputs, undamped."""
    rec = revprop.reconstruct(net, values, target=target, strategy="greedy", damping=0.0, **options)
    return tuple(rec[layer] for layer in rec if layer.startswith("input:"))


def nearest(start: np.ndarray, constraint: Callable[[np.ndarray], np.ndarray], seeds: int = 12) -> float:
    """The distance of the nearest point that meets an equation, as a general optimiser finds it from several places."""
    rng, found = np.random.default_rng(0), []
    for k in range(seeds):
        first = start + (0 if k == 0 else 1.5) * rng.standard_normal(len(start))
        result = scipy.optimize.minimize(
            lambda p: ((p - start) ** 2).sum(),
            first,
            jac=lambda p: 2 * (p - start),
            method="SLSQP",
            constraints={"type": "eq", "fun": constraint},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        if np.abs(constraint(result.x)).max() < 1e-9:
            found.append(float(np.linalg.norm(result.x - start)))
    return min(found)


# -- the nearest point of a hyperbola --------------------------------------------------------------------------------


def distance_to_hyperbola(p: float, q: float, c: float) -> float:
    """By the critical points of ``(t - p)^2 + (c / t - q)^2``, the roots of a quartic, and for c = 0 the axes."""
    if c == 0:
        return min(abs(p), abs(q))
    best = np.inf
    for a, b in ((p, q), (q, p)):  # either coordinate as the parameter, for the digits of the smaller one
        roots = np.roots([1.0, -a, 0.0, b * c, -c * c]).real
        for t in (*roots[roots != 0], *(t for t in (a,) if t), *(s * abs(c) ** 0.5 for s in (1, -1))):
            best = min(best, float(np.hypot(t - a, c / t - b)))
    return best


@given(numbers, numbers, numbers)
def test_the_nearest_point_of_a_hyperbola(p: float, q: float, c: float) -> None:
    x, y = (float(part) for part in hyperbola(*(torch.tensor([v], dtype=F64) for v in (p, q, c))))
    scale = max(abs(p), abs(q), abs(c) ** 0.5)
    assert abs(x * y - c) <= 1e-10 * scale**2
    assert np.hypot(x - p, y - q) <= distance_to_hyperbola(p, q, c) + 1e-7 * scale


@pytest.mark.parametrize("c", [-3.0, 0.0, 0.5, 4.0])
@pytest.mark.parametrize(("p", "q"), [(0.0, 0.0), (1.0, 1.0), (1.0, -1.0), (2.0, 0.0), (-1.5, -1.5)])
def test_a_hyperbola_by_a_search_along_it(p: float, q: float, c: float) -> None:
    """Symmetric places, where two points are equally near."""
    x, y = (float(part) for part in hyperbola(*(torch.tensor([v], dtype=F64) for v in (p, q, c))))
    along = [
        scipy.optimize.minimize_scalar(
            lambda t, s=s: (s * np.exp(t) - p) ** 2 + (c * s * np.exp(-t) - q) ** 2,
            bounds=(-12, 12),
            method="bounded",
            options={"xatol": 1e-12},
        ).fun
        ** 0.5
        for s in (1, -1)
    ]
    assert x * y == pytest.approx(c, abs=1e-12)
    assert np.hypot(x - p, y - q) == pytest.approx(min(*along, *((abs(p), abs(q)) if c == 0 else ())), abs=2e-5)


def test_a_point_of_the_hyperbola_stays() -> None:
    p, q = torch.randn(2, 50, dtype=F64)
    x, y = hyperbola(p, q, p * q)
    assert torch.equal(x, p)
    assert torch.equal(y, q)
    assert hyperbola(p[:0], q[:0], p[:0])[0].shape == (0,)


# -- products and quotients of activations -----------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["one factor each", "one factor for all", "the factor first"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zeros wanted"])
def test_a_product_against_a_general_optimiser(sharing: str, zero: bool) -> None:
    x, s = torch.randn(3, 3, dtype=F64), torch.randn(3, 3 if sharing == "one factor each" else 1, dtype=F64)
    target = x * s + 0.7 * torch.randn(3, 3, dtype=F64)
    if zero:
        target[0], target[1, 0] = 0.0, 0.0
    if sharing == "the factor first":
        new_s, new_x = inputs_for(Two(torch.mul), (s, x), target)
    else:
        new_x, new_s = inputs_for(Two(torch.mul), (x, s), target)
    torch.testing.assert_close(new_x * new_s, target, rtol=1e-9, atol=1e-9)
    for i in range(3):
        best = nearest(torch.cat([x[i], s[i]]).numpy(), lambda p, i=i: p[:3] * p[3:] - target[i].numpy())
        ours = float(torch.cat([new_x[i] - x[i], new_s[i] - s[i]]).norm())
        assert ours <= best + 1e-6


@pytest.mark.parametrize("width", [1, 3])
def test_a_quotient_against_a_general_optimiser(width: int) -> None:
    x, s = torch.randn(3, 3, dtype=F64), 2.0 + torch.rand(3, width, dtype=F64)
    target = x / s + 0.3 * torch.randn(3, 3, dtype=F64)
    new_x, new_s = inputs_for(Two(torch.div), (x, s), target)
    torch.testing.assert_close(new_x / new_s, target, rtol=1e-9, atol=1e-9)
    for i in range(3):
        best = nearest(torch.cat([x[i], s[i]]).numpy(), lambda p, i=i: p[:3] - target[i].numpy() * p[3:], seeds=1)
        assert float(torch.cat([new_x[i] - x[i], new_s[i] - s[i]]).norm()) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("operator", [torch.mul, torch.div])
def test_what_by_passes_a_layer_is_a_factor_that_is_held(operator: Callable[..., Tensor]) -> None:
    """Features of one branch of a product: the other keeps its values, so the branch alone makes up for all of it."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return operator(self.left(x), 2.0 + self.right(x).sigmoid())

    net, x = Branches(), torch.randn(5, 4, dtype=F64)
    target = torch.randn(5, 3, dtype=F64)
    rec = revprop.reconstruct(net, x, target=target, to="left", strategy="greedy", damping=0.0)
    factor = 2.0 + net.right(x).sigmoid()
    wanted = target / factor if operator is torch.mul else target * factor
    torch.testing.assert_close(rec["left"], wanted.detach())


# -- maps that are recorded sample by sample -----------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (5, 3), (4, 4)])
def test_recorded_matrices_against_dense_least_squares(rows: int, columns: int, damping: float) -> None:
    """Each sample and head by its own matrix and its own damping, whatever its size beside others."""
    matrices = torch.randn(3, 2, rows, columns, dtype=F64) * torch.tensor([1.0, 1e3, 1e-3], dtype=F64).view(3, 1, 1, 1)
    matrices[0, 0, -1] = matrices[0, 0, 0]  # a deficient one
    matrices[1, 1] = 0.0
    change = torch.randn(3, 2, rows, 2, dtype=F64)
    solution = Matrices(matrices).factor(damping).solve(change)
    for i, j in np.ndindex(3, 2):
        m = matrices[i, j].numpy()
        mu = damping * np.linalg.norm(m, 2) ** 2
        expected = (
            np.linalg.pinv(m.T @ m + mu * np.eye(columns), rcond=1e-12, hermitian=True) @ m.T @ change[i, j].numpy()
        )
        np.testing.assert_allclose(solution[i, j].numpy(), expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())
    torch.testing.assert_close(Matrices(matrices[2:]).factor(damping).solve(change[2:]), solution[2:])


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_recorded_factors_against_dense_least_squares(damping: float) -> None:
    scale = torch.randn(4, 3, 2, dtype=F64) * torch.tensor([1.0, 1e4, 1e-4, 0.0], dtype=F64).view(4, 1, 1)
    scale[0, 0, 0] = 0.0
    change = torch.randn(4, 3, 2, dtype=F64)
    solution = Gate(scale).factor(damping).solve(change)
    for i in range(4):
        d = np.diag(scale[i].flatten().numpy())
        mu = damping * np.abs(d).max() ** 2
        expected = np.linalg.pinv(d.T @ d + mu * np.eye(6), rcond=1e-14) @ d.T @ change[i].flatten().numpy()
        np.testing.assert_allclose(solution[i].flatten().numpy(), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(Gate(scale[2:3]).factor(damping).solve(change[2:3]), solution[2:3])


@pytest.mark.parametrize(
    "given", [Matrices(torch.zeros(0, 2, 3)), Matrices(torch.ones(2, 2, 3)), Gate(torch.ones(2, 3))]
)
def test_recorded_maps_have_their_adjoint(given: Matrices | Gate) -> None:
    a = torch.randn(*given.matrices.shape[:-2], 3, 4) if isinstance(given, Matrices) else torch.randn(2, 3)
    z = torch.randn_like(given.apply(a))
    torch.testing.assert_close((given.apply(a) * z).sum(), (a * given.adjoint(z)).sum())
    assert given.factor(0.01).solve(z).shape == a.shape


# -- attention -------------------------------------------------------------------------------------------------------------


def hidden(rows: int, columns: int) -> Tensor:
    """A mask that hides the last key from all and the first from the first query."""
    seen = torch.ones(rows, columns, dtype=torch.bool)
    seen[:, -1], seen[0, 0] = False, False
    return seen


ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "plain": F.scaled_dot_product_attention,
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, hidden(q.shape[-2], k.shape[-2])),
    "bias": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.arange(float(k.shape[-2]), dtype=F64).expand(q.shape[-2], -1), scale=0.3
    ),
    "by hand": lambda q, k, v: torch.bmm((q @ k.mT).softmax(-1), v),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_values_by_the_recorded_weights_reach_what_is_wanted(name: str) -> None:
    """The weights have full row rank; queries and keys stay."""
    net = Three(ATTENTIONS[name])
    q, k, v = torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 5, 4, dtype=F64), torch.randn(2, 5, 2, dtype=F64)
    target = torch.randn(2, 3, 2, dtype=F64)
    new_q, new_k, new_v = inputs_for(net, (q, k, v), target)
    if name != "by hand":  # there they are searched: a product of two activations before the softmax
        assert torch.equal(new_q, q)
        assert torch.equal(new_k, k)
    torch.testing.assert_close(net(q, k, new_v), target, rtol=1e-7, atol=1e-7)
    weights = net(q, k, torch.eye(5, dtype=F64).expand(2, 5, 5))
    torch.testing.assert_close(new_v - v, torch.linalg.pinv(weights) @ (target - net(q, k, v)), rtol=1e-6, atol=1e-6)
    if name == "mask":  # a key that nobody sees keeps its value
        torch.testing.assert_close(new_v[:, -1], v[:, -1])


@pytest.mark.parametrize("name", ["plain", "causal", "mask", "bias"])
def test_all_of_an_attention_moves_on_request(name: str) -> None:
    """Queries, keys and values together, by search."""
    net = Three(ATTENTIONS[name])
    values = tuple(torch.randn(3, *shape, dtype=F64) for shape in ((3, 4), (4, 4), (4, 2)))
    near = tuple(value + 0.2 * torch.randn_like(value) for value in values)
    target = net(*near)
    found = inputs_for(net, values, target, attention="all")
    torch.testing.assert_close(net(*found), target, rtol=1e-6, atol=1e-6)
    for new, old in zip(found, values, strict=True):
        assert bool((new != old).any())


def test_a_mask_that_is_an_input_is_held() -> None:
    """Queries and keys of ones: the mean of the values that are seen."""

    class Padded(nn.Module):
        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            ones = torch.ones_like(x)
            return F.scaled_dot_product_attention(ones, ones, x, seen[:, None])

    x, seen = torch.randn(2, 3, 2, dtype=F64), torch.tensor([[True, True, True], [True, True, False]])
    target = Padded()(x, seen) + 0.5
    rec = revprop.reconstruct(Padded(), (x, seen), target=target, to="input:x", strategy="greedy", damping=0.0)
    torch.testing.assert_close(rec["input:x"], x + 0.5 * seen[:, :, None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_with_a_slope_is_the_one_without(name: str) -> None:
    """Where a slope is asked for another kernel runs: its values and slopes, masks included, against differences."""
    net = Three(ATTENTIONS[name])
    values = tuple(torch.randn(2, *shape, dtype=F64) for shape in ((3, 4), (5, 4), (5, 2)))
    graph = revprop.trace(net, values)
    own = [value.clone().requires_grad_() for value in values]
    segment = graph.segment(graph.inputs, (graph.output,))
    torch.testing.assert_close(segment(*own)[0].detach(), net(*values))
    assert torch.autograd.gradcheck(lambda *v: segment(*v)[0], own)
    assert torch.autograd.gradgradcheck(lambda *v: segment(*v)[0], own)


def test_an_encoder_can_be_differentiated_twice() -> None:
    """The global strategy needs products with the Jacobian, which torch's fused attention refuses."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(nn.Linear(4, 8), layer, nn.Flatten(), nn.Linear(24, 3)).double().eval()
    x, labels = torch.randn(6, 3, 4, dtype=F64), torch.arange(6) % 3
    rec = revprop.reconstruct(net, x, labels, to="0")
    assert bool(rec.certificates["0"].reached.all())
    graph = revprop.trace(net, x)
    own = graph.node("0")
    segment = graph.segment((own,), (graph.output,))
    point = graph.record(x)[own].requires_grad_()
    (slope,) = torch.autograd.grad(segment(point)[0].sum(), point, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.square().sum(), point)
    assert bool((curvature != 0).any())


def test_hard_sigmoid_can_be_differentiated_twice() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3)).double().eval()
    x = torch.randn(4, 4, dtype=F64, requires_grad=True)
    graph = revprop.trace(net, x.detach())
    torch.testing.assert_close(graph(x), net(x))
    assert torch.autograd.gradgradcheck(lambda a: graph(a).square(), x)
