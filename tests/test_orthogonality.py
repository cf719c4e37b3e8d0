"""The SRIP penalty against dense eigenvalues."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import revprop
from revprop import Orthogonality


def dense(matrix: np.ndarray) -> float:
    """The spectral norm of the smaller of ``W^T W - I`` and ``W W^T - I``."""
    rows, columns = matrix.shape
    gram = matrix.T @ matrix if columns <= rows else matrix @ matrix.T
    return float(np.abs(np.linalg.eigvalsh(gram - np.eye(len(gram)))).max())


def block_diagonal(module: Any) -> np.ndarray:
    """A convolution's kernels as rows, zero where a group does not look; a transposed one as what it is the adjoint of."""
    weight = module.weight.detach().numpy()
    groups, height = module.groups, len(weight) // module.groups
    width = weight[0].size
    matrix = np.zeros((len(weight), groups * width))
    for g in range(groups):
        for row in range(g * height, (g + 1) * height):
            matrix[row, g * width : (g + 1) * width] = weight[row].ravel()
    return matrix


def linear(matrix: Tensor) -> nn.Linear:
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(matrix.clone())
    return layer


def of_spectrum(rows: int, columns: int, values: list[float], seed: int = 0) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.mT


@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (4, 7), (4, 4)])
@pytest.mark.parametrize(
    ("values", "expected"),
    [([2.0, 1.0, 0.5, 0.1], 3.0), ([1.2, 1.0, 1.0, 0.1], 0.99), ([1.0, 1.0, 1.0, 0.0], 1.0)],
)
def test_the_norm_of_a_known_spectrum(rows, columns, values, expected):
    """The largest of |s^2 - 1|, whether the largest singular value or the smallest one makes it, in either shape."""
    penalty = Orthogonality(linear(of_spectrum(rows, columns, values)), weight=2.0, steps=60)
    assert penalty().item() == pytest.approx(2 * expected, rel=1e-9)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_from_below_and_in_the_end_dense(rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    layer, norm = linear(weight), dense(weight.numpy())
    few = [Orthogonality(layer, 1.0, steps=steps, seed=seed)().item() for steps in (1, 2, 5, 25)]
    assert all(a <= b * (1 + 1e-12) for a, b in zip(few, [*few[1:], norm], strict=True))
    assert Orthogonality(layer, 1.0, steps=400, seed=seed)().item() == pytest.approx(norm, rel=0.02)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(3, 5, 4),
        nn.Conv2d(2, 40, 3, stride=2, padding=1),
        nn.Conv3d(2, 3, 2, dilation=2),
        nn.Conv2d(6, 9, 3, groups=3),
        nn.Conv2d(4, 80, 3, groups=2),
        nn.Conv2d(5, 5, 3, groups=5),
        nn.ConvTranspose1d(6, 2, 2),
        nn.ConvTranspose2d(3, 4, 3, stride=2),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.ConvTranspose3d(2, 3, 2),
    ],
    ids=str,
)
def test_convolutions_are_reshaped_to_their_kernels(module):
    module = module.double()
    expected = dense(block_diagonal(module))
    assert Orthogonality(module, 1.0, steps=3000)().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_penalised_as_its_adjoint(groups):
    forward = nn.Conv2d(4, 6, 3, groups=groups, bias=False)
    back = nn.ConvTranspose2d(6, 4, 3, groups=groups, bias=False)
    back.weight.data.copy_(forward.weight)
    assert Orthogonality(back, 1.0)().item() == Orthogonality(forward, 1.0)().item()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh()), nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 3)
    ).double()


def test_the_layers_sum_up():
    net = network()
    penalty = Orthogonality(net, 0.5, steps=500)
    assert penalty.layers == ("0.0", "1", "3")
    each = [dense(block_diagonal(net[0][0])), dense(block_diagonal(net[1])), dense(net[3].weight.detach().numpy())]
    assert [norm.item() for norm in penalty.norms().values()] == pytest.approx(each, rel=1e-3)
    assert penalty().item() == pytest.approx(0.5 * sum(each), rel=1e-3)
    assert Orthogonality(net, 0.5, layers=["3", "0"]).layers == ("0.0", "3")
    assert Orthogonality(net, 0.5, layers="0").layers == ("0.0",)
    assert set(penalty.layers) <= set(revprop.trace(net, torch.zeros(1, 1, 6, 6, dtype=torch.float64)).layers)


@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (3, 5)])
def test_the_gradient_is_that_of_the_norm(rows, columns):
    """Of ``max |s^2 - 1|``: ``2 s u v^T``, once the iteration has converged."""
    weight = of_spectrum(rows, columns, [1.7, 1.1, 0.8])
    layer = linear(weight)
    Orthogonality(layer, 3.0, steps=80)().backward()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    expected = 3.0 * 2 * s[0] * torch.outer(u[:, 0], vt[0])
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_estimate_is_differentiated_as_it_is(steps):
    layer = nn.Conv2d(4, 6, 2, groups=2, bias=False, dtype=torch.float64)
    penalty = Orthogonality(layer, 1.0, steps=steps)

    def value(weight: Tensor) -> Tensor:
        penalty.calls = 0
        return torch.func.functional_call(_Called(layer, penalty), {"layer.weight": weight}, ())

    assert torch.autograd.gradcheck(value, (layer.weight.detach().clone().requires_grad_(),))


class _Called(nn.Module):
    """A penalty as a module's forward, so that other weights can be given to it."""

    def __init__(self, layer: nn.Module, penalty: Orthogonality) -> None:
        super().__init__()
        self.layer, self.penalty = layer, penalty

    def forward(self) -> Tensor:
        return self.penalty()


@pytest.mark.parametrize(("rows", "columns"), [(12, 5), (5, 12), (6, 6)])
def test_descent_on_it_makes_weights_orthogonal(rows, columns):
    """The optimum is attained in both shapes; fresh vectors at each call see every direction."""
    layer = nn.Linear(columns, rows, bias=False)
    penalty = Orthogonality(layer, 1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    assert dense(layer.weight.detach().double().numpy()) < 0.02


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_at_the_optimum_it_is_zero_and_its_gradient_finite(shape):
    layer = linear(torch.eye(*shape))
    value = Orthogonality(layer, 1.0)()
    value.backward()
    assert value.item() == 0
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.isfinite().all())
    assert Orthogonality(linear(torch.zeros(3, 0)), 1.0)().item() == 0


def test_the_seed_and_the_number_of_the_call_say_the_vectors():
    net = network()
    a, b, other = Orthogonality(net, 1.0, seed=3), Orthogonality(net, 1.0, seed=3), Orthogonality(net, 1.0, seed=4)
    values = [a().item() for _ in range(4)]
    assert [b().item() for _ in range(4)] == values
    assert len(set(values)) == 4
    assert other().item() not in values
    resumed = Orthogonality(net, 1.0, seed=3)
    resumed.calls = 2
    assert [resumed().item(), resumed().item()] == values[2:]
    state = torch.get_rng_state()
    a()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_stays_as_it_is_and_its_weights_are_live():
    net = network()
    before = copy.deepcopy(net.state_dict())
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    penalty = Orthogonality(net, 1.0, steps=300)
    assert not isinstance(penalty, nn.Module)
    first = penalty().item()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
    assert all(parameter.grad is None for parameter in net.parameters())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    assert penalty().item() > first
    net[3] = nn.Linear(32, 7).double()  # another head
    assert penalty.norms()["3"].item() == pytest.approx(dense(net[3].weight.detach().numpy()), rel=1e-3)


def test_a_tied_weight_counts_once_and_a_parametrised_one_is_read_as_it_is():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert Orthogonality(tied, 1.0).layers == ("0",)
    assert Orthogonality(tied, 1.0, layers=["2"]).layers == ("0",)
    net = nn.Sequential(parametrizations.orthogonal(nn.Linear(5, 3, dtype=torch.float64)))
    penalty = Orthogonality(net, 1.0, layers=["0"])
    assert penalty.layers == ("0",)
    assert penalty().item() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_does_not_reach_it(dtype):
    """``W^T W - I`` cancels near the optimum: in eight bits nothing would be left."""
    layer = linear(torch.eye(6, 4) * (1 + 1e-3))
    exact = Orthogonality(layer, 1.0)().item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Orthogonality(layer, 1.0)()
    inside.backward()
    assert inside.item() == exact == pytest.approx(2e-3, rel=0.01)
    assert inside.dtype == torch.float32
    half = nn.Linear(4, 6).to(dtype)
    value = Orthogonality(half, 1.0, steps=200)()
    value.backward()
    assert value.item() == pytest.approx(dense(half.weight.detach().double().numpy()), rel=1e-3)
    assert half.weight.grad.dtype == dtype


def test_within_a_compiled_step():
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(8, 6), torch.randn(8, 2)

    def loss(penalty: Orthogonality) -> Tensor:
        return (net(x) - y).square().mean() + penalty()

    compiled = torch.compile(loss, backend="aot_eager")
    plain, other = Orthogonality(net, 0.1), Orthogonality(net, 0.1)
    for _ in range(3):
        net.zero_grad()
        expected = loss(plain)
        expected.backward()
        wanted = [parameter.grad.clone() for parameter in net.parameters()]
        net.zero_grad()
        found = compiled(other)
        found.backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close([parameter.grad for parameter in net.parameters()], wanted)
    assert plain.calls == other.calls == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": 3}, "expected a torch.nn.Module; given int"),
        ({"model": nn.Tanh()}, "Tanh has no linear layer and no convolution"),
        ({"weight": -1.0}, "at least 0; given -1"),
        ({"weight": math.nan}, "finite number"),
        ({"steps": 0}, "at least 1 application"),
        ({"layers": ["fc"]}, "unknown layer 'fc'"),
        ({"layers": ["1"]}, r"layer '1' \(Tanh\) has no linear layer and no convolution in it; learned layers: 0, 2"),
        ({"layers": []}, "expected at least one"),
    ],
)
def test_what_bad_arguments_get(options, words):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=words):
        Orthogonality(**{"model": net, "weight": 1.0, **options})
