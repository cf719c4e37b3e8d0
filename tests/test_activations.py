"""Activations at extremes: values far out, minima, flat parts, jumps, poles; and branches inverted numerically."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor, nn

from revprop.graph import trace
from revprop.modes import Adjoint, NearestPreimage, PaperReconstruction
from revprop.rules import Pointwise, bind, closed

F64 = torch.float64


def gelu_by_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


GATED = {"gelu": F.gelu, "tanh": gelu_by_tanh, "silu": F.silu, "mish": F.mish}


class Only(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


FACTS: dict[Callable[[Tensor], Tensor], Pointwise] = {}


def fact_of(function: Callable[[Tensor], Tensor]) -> Pointwise:
    if function not in FACTS:
        graph = trace(Only(function), torch.zeros(1, 2, dtype=F64))
        fact = closed(bind(graph, graph.nodes[0]))
        assert isinstance(fact, Pointwise)
        FACTS[function] = fact
    return FACTS[function]


def preimage(function: Callable[[Tensor], Tensor], z: Tensor, wanted: Tensor) -> Tensor:
    output = function(z)
    (change,) = NearestPreimage().step(fact_of(function), None, [z], output, wanted - output)
    assert change is not None
    return z + change


def tensor(*values: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# -- one minimum ---------------------------------------------------------------------------------------------------------


def scalar(function: Callable[[Tensor], Tensor]) -> Callable[[float], float]:
    return lambda z: float(function(tensor(z)))


@pytest.mark.parametrize("name", GATED)
@given(st.floats(-30.0, 60.0), st.floats(-30.0, 60.0))
def test_the_nearer_of_the_roots_on_both_branches_is_found(name: str, recorded: float, other: float) -> None:
    function = GATED[name]
    f, wanted = scalar(function), float(function(tensor(other)))
    bottom = minimize_scalar(f, (-3.0, -1.0, 0.0), tol=1e-12).x
    found = float(preimage(function, tensor(recorded), tensor(wanted)))
    assert f(found) == pytest.approx(wanted, rel=1e-12, abs=1e-13)
    if wanted > f(bottom) + 1e-6 and abs(wanted) > 1e-9:  # elsewhere a root is no number of so many digits
        roots = [brentq(lambda z: f(z) - wanted, bottom, 70.0, xtol=1e-14)]
        if wanted < 0:
            roots.append(brentq(lambda z: f(z) - wanted, -40.0, bottom, xtol=1e-14))
        assert abs(found - recorded) <= min(abs(root - recorded) for root in roots) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GATED)
def test_every_value_above_the_minimum_is_reached_to_the_last_digits(name: str, dtype: torch.dtype) -> None:
    function, fact = GATED[name], fact_of(GATED[name])
    low, eps = fact.range[0], torch.finfo(dtype).eps  # torch's own GELU is no more precise, far below 0
    heights = torch.logspace(-18, 4, 2000, dtype=F64)
    wanted = torch.cat([low + heights, -heights[heights < -low]]).to(dtype).clamp_min(low)
    for recorded in (-40.0, -3.0, -0.8, 0.5, 40.0):
        found = function(fact.preimage(wanted, torch.full_like(wanted, recorded)))
        torch.testing.assert_close(found, wanted, rtol=4 * eps, atol=16 * eps)


@pytest.mark.parametrize("name", [*GATED, "hardswish"])
def test_values_below_the_minimum_go_to_it(name: str) -> None:
    function = {**GATED, "hardswish": F.hardswish}[name]
    z = tensor(-5.0, -1.0, 0.0, 4.0)
    found = preimage(function, z, torch.full_like(z, -2.0))
    lowest = minimize_scalar(scalar(function), (-3.0, -1.0, 0.0), tol=1e-12)
    torch.testing.assert_close(function(found), torch.full_like(z, lowest.fun))
    torch.testing.assert_close(found, torch.full_like(z, lowest.x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GATED)
def test_far_below_zero_rounding_moves_nothing_and_a_value_above_zero_is_reached(name: str, dtype: torch.dtype) -> None:
    function, noise = GATED[name], torch.finfo(dtype).eps / 4
    z = torch.full((2,), -40.0, dtype=dtype)
    wanted = function(z) + tensor(noise, -noise, dtype=dtype)
    torch.testing.assert_close(preimage(function, z, wanted), z, rtol=0, atol=0)
    torch.testing.assert_close(function(preimage(function, z, wanted + 0.5)), wanted + 0.5)


def test_hard_swish_keeps_what_lies_in_its_flat_part() -> None:
    z = tensor(-7.0, -3.0, -2.9, -1.0, 1.0)
    found = preimage(F.hardswish, z, torch.zeros_like(z))
    torch.testing.assert_close(found, tensor(-7.0, -3.0, -3.0, 0.0, 0.0))


def test_the_adjoint_is_the_slope_and_the_published_rule_clamps_and_inverts() -> None:
    z = torch.linspace(-5, 5, 20, dtype=F64)
    for function in (*GATED.values(), F.hardswish):
        leaf = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(leaf).sum(), leaf)
        (found,) = Adjoint().step(fact_of(function), None, [z], function(z), torch.ones_like(z))
        torch.testing.assert_close(found, slope)
        (step,) = PaperReconstruction().step(fact_of(function), None, [z], function(z), torch.full_like(z, -9.0))
        assert step is not None
        torch.testing.assert_close(function(z + step), torch.full_like(z, fact_of(function).range[0]))


# -- jumps, poles, ends --------------------------------------------------------------------------------------------------


def test_a_threshold_gives_what_comes_nearest_to_a_target_in_its_gap() -> None:
    def function(z: Tensor) -> Tensor:
        return F.threshold(z, 1.0, -1.0)

    z = tensor(-2.0, 0.5, 3.0, 3.0, -2.0)
    wanted = tensor(0.9, -0.9, 0.9, -0.9, 2.0)  # nothing lies between -1 and 1
    found = preimage(function, z, wanted)
    torch.testing.assert_close(found, tensor(1.0, 0.5, 1.0, 1.0, 2.0))
    torch.testing.assert_close(function(found), tensor(1.0, -1.0, 1.0, -1.0, 2.0))


def test_a_reciprocal_changes_sign_where_asked_and_never_aims_at_infinity() -> None:
    z = tensor(2.0, 2.0, -2.0, -2.0, 5000.0)
    found = preimage(torch.reciprocal, z, tensor(-0.5, 0.0, 0.0, -1e-9, -1e-9))
    # 0.001 from 0 on the recorded side, or where the recorded value is, if that is nearer
    torch.testing.assert_close(found, tensor(-2.0, 1000.0, -1000.0, -1000.0, 5000.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [torch.log, torch.log1p])
def test_logarithms_of_numbers_too_large_or_too_small_stay_in_their_domain(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    z = torch.ones(2, dtype=dtype)
    found = fact_of(function).preimage(tensor(2e3, -2e3, dtype=dtype), z)
    assert bool(found.isfinite().all())
    assert bool(function(found).isfinite().all())


@pytest.mark.parametrize("exponent", [-3, -2, -1.5, -1, -0.5, 0.5, 1, 1.5, 2, 3, 4])
def test_powers_reach_every_value_of_theirs_at_the_nearest_root(exponent: float) -> None:
    def function(z: Tensor) -> Tensor:
        return z**exponent

    generator = torch.Generator().manual_seed(0)
    z, other = torch.rand(2, 50, generator=generator, dtype=F64) * 2 + 0.1
    if exponent % 1 == 0:  # elsewhere the domain is positive
        z, other = (value * torch.randn(50, generator=generator, dtype=F64).sign() for value in (z, other))
    found = preimage(function, z, function(other))
    torch.testing.assert_close(function(found), function(other))
    roots = torch.stack([other, -other]) if exponent % 2 == 0 else other.unsqueeze(0)
    torch.testing.assert_close((found - z).abs(), (roots - z).abs().amin(0))


def test_cosine_and_sine_take_the_nearest_of_all_turns() -> None:
    z = torch.linspace(-20, 20, 41, dtype=F64)
    for function, angle in ((torch.cos, np.arccos(0.3)), (torch.sin, np.arcsin(0.3))):
        mirrored = -angle if function is torch.cos else np.pi - angle
        roots = torch.cat([torch.arange(-5, 6, dtype=F64) * 2 * np.pi + a for a in (angle, mirrored)])
        found = preimage(function, z, torch.full_like(z, 0.3))
        torch.testing.assert_close((found - z).abs(), (roots[:, None] - z).abs().amin(0))
