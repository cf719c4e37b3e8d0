"""Softmax and the norms where a target has no preimage, where inputs are extreme, and against SciPy's optimisers."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear, minimize
from torch import Tensor, nn

from revprop.graph import Graph, trace
from revprop.modes import NearestPreimage
from revprop.reverse import walk
from revprop.rules import Linear, bind, closed

F64 = torch.float64
EPS = 1e-5


class Only(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@cache
def traced(function: Callable[[Tensor], Tensor], shape: torch.Size, dtype: torch.dtype) -> Graph:
    return trace(Only(function), torch.zeros(2, *shape, dtype=dtype))


def preimage(function: Callable[[Tensor], Tensor], x: Tensor, wanted: Tensor) -> Tensor:
    """Through the walk, as users get it."""
    graph = traced(function, x.shape[1:], x.dtype)
    recorded = graph.record(x)
    (change,) = walk(graph, NearestPreimage(), recorded, wanted - recorded[graph.output], graph.inputs).values()
    return x + change


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def last_softmax(z: Tensor) -> Tensor:
    return F.softmax(z, -1)


# -- softmax -------------------------------------------------------------------------------------------------------------


def test_logits_for_any_target_are_the_nearest_with_its_probabilities() -> None:
    z, wanted = randn(6, 5), randn(6, 5, seed=1)  # negative entries, and sums that are not 1
    floor = last_softmax(z).clamp_max(1e-3 / 5)
    p = torch.maximum(wanted, floor)
    p = p / p.sum(-1, keepdim=True)
    found = preimage(last_softmax, z, wanted)
    torch.testing.assert_close(last_softmax(found), p)
    for own, log_p, ours in zip(z.numpy(), p.log().numpy(), found.numpy(), strict=True):
        # all logits with these probabilities are log p + c
        expected = minimize(lambda c, own=own, log_p=log_p: float(np.sum((log_p + c - own) ** 2)), 0.0, tol=1e-14)
        np.testing.assert_allclose(ours, log_p + expected.x, atol=1e-6)


def test_probabilities_that_are_to_stay_keep_their_ratios_however_small_they_are() -> None:
    z = torch.tensor([[0.0, 1.0, -30.0, -1000.0]], dtype=F64)  # the last two are far below the floor
    wanted = last_softmax(z)
    wanted[0, 0] = 0.5
    found = preimage(last_softmax, z, wanted)
    torch.testing.assert_close(found[0, 1:] - found[0, 1], z[0, 1:] - z[0, 1], rtol=0, atol=1e-9)
    torch.testing.assert_close(last_softmax(found)[0, 0] / last_softmax(found)[0, 1], 0.5 / wanted[0, 1])


def test_probabilities_below_the_floor_are_kept_at_it_or_where_they_are() -> None:
    z = torch.tensor([[0.0, 1.0, -30.0]], dtype=F64)
    own = last_softmax(z)
    wanted = own.clone()
    wanted[0, 0], wanted[0, 2] = -1.0, -1.0
    found = last_softmax(preimage(last_softmax, z, wanted))
    torch.testing.assert_close(found[0, 0] / found[0, 1], 1e-3 / 3 / own[0, 1])
    torch.testing.assert_close(found[0, 2] / found[0, 1], own[0, 2] / own[0, 1])


@pytest.mark.parametrize("function", [last_softmax, lambda z: F.log_softmax(z, -1)], ids=["softmax", "log-softmax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_of_a_thousand_neither_overflow_nor_lose_the_target(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    z = torch.tensor([[1e3, 0.0, -1e3], [1e3, 1e3, 0.0]], dtype=dtype)
    wanted = function(torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, -1.0]], dtype=dtype))
    found = preimage(function, z, wanted)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(function(found), wanted, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)
    torch.testing.assert_close(found.mean(-1), z.mean(-1), rtol=1e-6, atol=1e-3)  # of all preimages the nearest


@pytest.mark.parametrize("function", [last_softmax, lambda z: F.log_softmax(z, -1)], ids=["softmax", "log-softmax"])
def test_masked_logits_stay(function: Callable[[Tensor], Tensor]) -> None:
    mask = torch.tensor([True, True, False, True])
    z = randn(3, 4)

    graph = trace(Only(function), z)
    inner = torch.where(mask, z, -torch.inf)
    wanted = function(torch.where(mask, randn(3, 4, seed=1), -torch.inf))
    fact = closed(bind(graph, graph.nodes[0]))
    change = torch.where(mask, wanted - function(inner), 0.0)
    (step,) = NearestPreimage().step(fact, None, [inner], function(inner), change)
    assert step is not None
    assert not step[:, ~mask].any()
    torch.testing.assert_close(function(inner + step), wanted)
    torch.testing.assert_close((z + step)[:, mask].mean(-1), z[:, mask].mean(-1))


def test_wanted_log_probabilities_are_normalised() -> None:
    z, wanted = randn(4, 5), randn(4, 5, seed=1)
    found = preimage(lambda a: F.log_softmax(a, -1), z, wanted)
    torch.testing.assert_close(F.log_softmax(found, -1), F.log_softmax(wanted, -1))
    torch.testing.assert_close(found.mean(-1), z.mean(-1))


# -- norms ---------------------------------------------------------------------------------------------------------------


def layer(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def nearest_on_the_ray(x: np.ndarray, d: np.ndarray, least: float, centred: bool) -> np.ndarray:
    """argmin |mean 1 + s d - x| over the mean (0 where not centred) and s >= least."""
    columns = np.stack([np.ones_like(d), d], 1) if centred else d[:, None]
    lowest = [-np.inf, least] if centred else [least]
    found = lsq_linear(columns, x, (lowest, np.inf), tol=1e-14)
    return columns @ found.x


@pytest.mark.parametrize(("function", "centred"), [(layer, True), (rms, False)], ids=["layer", "rms"])
@given(st.integers(2, 6), st.floats(0.001, 3.0), st.integers(0, 1000))
def test_any_target_is_reached_exactly_or_approached_at_the_nearest_point_in_its_direction(
    function: Callable[[Tensor], Tensor], centred: bool, m: int, size: float, seed: int
) -> None:
    x = 3 * randn(2, m, seed=seed) + 1
    wanted = function(x) + size * randn(2, m, seed=seed + 1)
    found = preimage(function, x, wanted)
    for i in range(2):
        aim = wanted[i] - wanted[i].mean() if centred else wanted[i]
        norm = float((x[i] - x[i].mean() if centred else x[i]).norm())
        smallest, square, turned = math.sqrt(m * EPS), float(aim.square().sum()), function(found[i : i + 1])[0]
        radius = math.sqrt(EPS * square / (1 - square / m)) if square < m else math.inf
        if norm / 10 <= radius <= 10 * norm or (norm < smallest and radius < math.inf):
            torch.testing.assert_close(turned, aim, rtol=0, atol=1e-9)
            continue
        d = aim / aim.norm()
        expected = nearest_on_the_ray(x[i].numpy(), d.numpy(), max(norm / 10, smallest), centred)
        np.testing.assert_allclose(found[i].numpy(), expected, atol=1e-6 * float(x[i].norm()))
        assert float(turned @ d / turned.norm()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("function", [layer, rms], ids=["layer", "rms"])
def test_targets_in_the_opposite_direction_stay_away_from_the_centre(function: Callable[[Tensor], Tensor]) -> None:
    x = randn(3, 5)
    x = x - x.mean(-1, keepdim=True)
    found = preimage(function, x, -2 * function(x))
    torch.testing.assert_close(found, -x / 10)


@pytest.mark.parametrize("scale", [0.02, 1.0, 100.0])
@pytest.mark.parametrize("function", [layer, rms], ids=["layer", "rms"])
def test_outputs_of_other_inputs_are_reached_by_their_own_radius(
    function: Callable[[Tensor], Tensor], scale: float
) -> None:
    x, other = scale * randn(8, 6), scale * randn(8, 6, seed=1)
    found = preimage(function, x, function(other))
    torch.testing.assert_close(function(found), function(other), rtol=0, atol=1e-10)
    spread = found.std(-1) / other.std(-1) if function is layer else found.norm(dim=-1) / other.norm(dim=-1)
    torch.testing.assert_close(spread, torch.ones(8, dtype=F64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("function", [layer, rms], ids=["layer", "rms"])
def test_constant_inputs_take_the_radius_of_the_target(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.full((2, 5), 0.0 if function is rms else 3.0, dtype=F64)
    other = randn(2, 5)
    torch.testing.assert_close(preimage(function, x, function(x)), x, rtol=0, atol=0)
    found = preimage(function, x, function(other))
    torch.testing.assert_close(function(found), function(other), rtol=0, atol=1e-9)
    far = preimage(function, x, 10 * function(other))  # off the sphere: the direction
    assert bool((F.cosine_similarity(function(far), function(other)) > 1 - 1e-9).all())


def test_a_target_without_a_direction_asks_for_nothing() -> None:
    x = randn(3, 5)
    torch.testing.assert_close(
        preimage(layer, x, torch.full_like(x, 2.0)), x, rtol=0, atol=0
    )  # its deviations from its mean are 0
    torch.testing.assert_close(preimage(rms, x, torch.zeros_like(x)), x)
    one = randn(3, 1)
    torch.testing.assert_close(preimage(layer, one, one), one)  # one entry a group: always 0


def test_groups_whose_weight_is_zero_stay_and_others_are_reached() -> None:
    weight, bias = torch.tensor([2.0, 0.0, -1.0], dtype=F64), torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    x, other = randn(4, 3, 2, 3), randn(4, 3, 2, 3, seed=1)

    def norm(x: Tensor) -> Tensor:
        return F.instance_norm(x, None, None, weight, bias)

    found = preimage(norm, x, norm(other) + torch.tensor([0.0, 5.0, 0.0], dtype=F64).view(3, 1, 1))
    torch.testing.assert_close(norm(found), norm(other), rtol=0, atol=1e-9)
    torch.testing.assert_close(found[:, 1], x[:, 1], rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_single_precision_reaches_outputs_of_other_inputs(scale: float) -> None:
    x, other = (scale * randn(16, 32, seed=s).float() for s in range(2))
    for function in (layer, rms):
        found = preimage(function, x, function(other))
        torch.testing.assert_close(function(found), function(other), rtol=0, atol=1e-3)


def test_instance_norm_with_running_statistics_is_a_diagonal_map() -> None:
    graph = trace(nn.InstanceNorm2d(3, affine=True, track_running_stats=True).double(), randn(2, 3, 4, 4))
    assert isinstance(closed(bind(graph, graph.nodes[0])), Linear)


def test_norms_with_the_batch_elsewhere_are_covered() -> None:
    x, other = randn(3, 2, 4), randn(3, 2, 4, seed=1)

    def first(x: Tensor) -> Tensor:  # sequences first, as in recurrent networks and some transformers
        return layer(x.transpose(0, 1)).transpose(0, 1)

    torch.testing.assert_close(first(preimage(first, x, first(other))), first(other), rtol=0, atol=1e-9)


def test_the_norm_of_nothing_rises_evenly_and_a_negative_one_is_zero() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 4.0, 0.0], [3.0, 0.0, 4.0, 0.0]], dtype=F64)

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=1)

    found = preimage(norm, x, torch.tensor([2.0, 10.0, -1.0], dtype=F64))
    expected = torch.tensor([[1.0, 1.0, 1.0, 1.0], [6.0, 0.0, 8.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(found, expected)


def test_no_solution_in_the_neighbourhood_of_the_sphere_collapses_the_group() -> None:
    # a target a little inside the sphere has a solution, but at a fraction of the recorded spread
    x = randn(4, 6)
    inside = 0.9 * layer(x)
    found = preimage(layer, x, inside)
    exact = math.sqrt(EPS * 0.81 / (1 - 0.81))
    assert bool((x.std(-1) > 20 * exact).all())
    torch.testing.assert_close(found, x, rtol=0, atol=1e-9)  # the direction is right already
