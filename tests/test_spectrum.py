"""Singular values and vectors of layers against the dense SVD of their Jacobian matrix."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import revprop
from revprop import Spectrum, spectrum


def jacobian(module: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """The matrix of an affine module on one sample, by autograd."""
    x = torch.zeros(1, *shape, dtype=torch.float64)
    found = torch.autograd.functional.jacobian(module, x)
    assert isinstance(found, Tensor)
    return found.reshape(-1, math.prod(shape)).numpy()


def agrees(found: Spectrum, matrix: np.ndarray, tolerance: float = 1e-9) -> None:
    """The values are the largest ones; the vectors are orthonormal, belong to them, and have the sign that is said."""
    k = len(found.values)
    values = np.linalg.svd(matrix, compute_uv=False)
    right, left = (v.double().flatten(1).numpy() for v in (found.right, found.left))
    assert found.size == matrix.shape
    np.testing.assert_allclose(found.values.double().numpy(), values[:k], atol=tolerance * values[0])
    np.testing.assert_allclose(right @ right.T, np.eye(k), atol=1e-9 + tolerance)
    np.testing.assert_allclose(left @ left.T, np.eye(k), atol=1e-9 + tolerance)
    scale, allowed = max(values[0], 1.0), max(10 * tolerance, 1e-6 if found.solver == "iterative" else 0)
    s = found.values.double().numpy()[:, None]
    np.testing.assert_allclose(right @ matrix.T, s * left, atol=allowed * scale)
    np.testing.assert_allclose(left @ matrix, s * right, atol=allowed * scale)
    assert all(row[np.abs(row).argmax()] > 0 for row in right)
    assert found.residual <= 2 * allowed


MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(60, 90), (60,)),
    (nn.Linear(90, 60), (90,)),
    (nn.Conv1d(3, 5, 4, stride=2, padding=1), (3, 40)),
    (nn.Conv2d(2, 6, 3), (2, 8, 8)),
    (nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=2), (2, 11, 10)),
    (nn.Conv2d(4, 6, 3, padding="same", groups=2), (4, 6, 6)),
    (nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 5, 5)),
    (nn.Conv2d(3, 12, 4, stride=4), (3, 16, 16)),  # patches: each singular value sixteen times
    (nn.Conv2d(3, 5, 1), (3, 6, 6)),
    (nn.Conv3d(2, 3, 2, padding=1), (2, 4, 4, 4)),
    (nn.ConvTranspose1d(3, 2, 4, stride=2), (3, 30)),
    (nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), (4, 5, 5)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1), (4, 6, 6)),
    (nn.ConvTranspose3d(2, 1, 2, stride=2), (2, 3, 4, 4)),
]


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda value: str(value))
def test_layers_against_their_dense_matrix(module, shape):
    module = copy.deepcopy(module).double()
    matrix = jacobian(module, shape)
    graph = revprop.trace(nn.Sequential(module), torch.zeros(1, *shape, dtype=torch.float64))
    every = spectrum(graph, None, "0", k=None)
    assert (every.solver, len(every.values)) == ("dense", min(matrix.shape))
    agrees(every, matrix)
    few = spectrum(graph, None, "0", k=5, solver="iterative")
    assert few.solver == "iterative"
    agrees(few, matrix)
    output = tuple(module(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
    assert (few.right.shape, few.left.shape) == ((5, *shape), (5, *output))
    assert every.values.dtype == torch.float64


def test_separate_singular_values_have_the_vectors_of_the_dense_decomposition():
    layer = nn.Conv2d(1, 1, 3, bias=False).double()
    matrix = jacobian(layer, (1, 12, 12))
    _, s, vt = np.linalg.svd(matrix)
    found = spectrum(layer, torch.zeros(1, 1, 12, 12).double(), "output", k=3, solver="iterative")
    assert float(np.min(s[:3] - s[1:4])) > 1e-3
    for one, other in zip(found.right.flatten(1).numpy(), vt, strict=False):
        assert abs(float(one @ other)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("solver", ["dense", "iterative"])
def test_single_precision_is_worked_with_in_double(solver):
    layer = nn.Conv2d(3, 4, 3)
    found = spectrum(layer, torch.zeros(1, 3, 9, 9), "output", k=4, solver=solver)
    assert found.right.dtype == torch.float32
    agrees(found, jacobian(copy.deepcopy(layer).double(), (3, 9, 9)), 1e-6)
    assert found.residual < 1e-7
    half = copy.deepcopy(layer).bfloat16()
    reduced = spectrum(half, torch.zeros(1, 3, 9, 9, dtype=torch.bfloat16), "output", k=4, solver=solver)
    assert reduced.values.dtype == torch.float32
    agrees(reduced, jacobian(copy.deepcopy(half).double(), (3, 9, 9)), 1e-6)


@pytest.mark.parametrize("solver", ["dense", "iterative"])
@pytest.mark.parametrize("rank", [0, 2])
def test_maps_of_low_rank(solver, rank):
    """Beyond the rank the values are 0 and the vectors orthonormal still."""
    layer = nn.Linear(60, 80, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(80, rank).double() @ torch.randn(rank, 60).double())
    found = spectrum(layer, torch.zeros(1, 60).double(), "output", k=5, solver=solver)
    agrees(found, layer.weight.detach().numpy(), 1e-8)
    assert float(found.values[rank:].max()) < 1e-6


def test_the_largest_maps_are_iterated_and_small_ones_factored():
    conv = nn.Conv2d(3, 16, 3, padding=1)
    large = spectrum(conv, torch.zeros(1, 3, 32, 32), "output", k=4)
    assert (large.solver, large.size) == ("iterative", (16384, 3072))
    assert large.residual < 1e-6
    # against the square of the map, by the power method
    square = large.right[:1]
    for _ in range(20):
        square = nn.functional.conv_transpose2d(
            nn.functional.conv2d(square, conv.weight, padding=1), conv.weight, padding=1
        )
        square = square / square.norm()
    gain = nn.functional.conv2d(square, conv.weight, padding=1).norm().item()
    assert large.values[0].item() == pytest.approx(gain, rel=1e-4)
    assert spectrum(conv, torch.zeros(1, 3, 8, 8), "output", k=4).solver == "dense"
    assert spectrum(conv, torch.zeros(1, 3, 2, 2), "output").values.shape == (12,)  # all there are


class Plus(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2))
        self.pair = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
        self.fc = nn.Linear(4, 3)
        self.sum = Plus()
        self.register_buffer("ones", torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        h = self.sum(self.pair(h), h)
        return self.fc(h.flatten(2)) @ self.ones


def test_which_map_a_layer_is():
    net = Several().double().eval()
    net.block[1].running_var.copy_(torch.tensor([4.0, 0.25]))
    graph = revprop.trace(net, torch.zeros(1, 1, 4, 4).double())
    conv = jacobian(net.block[0], (1, 4, 4))
    agrees(spectrum(graph, None, "block.0", k=None), conv)
    agrees(spectrum(graph, None, "block", k=None), conv)  # the one convolution in it
    agrees(spectrum(graph, None, "block.1", k=None), jacobian(net.block[1], (2, 4, 4)))
    agrees(spectrum(graph, None, "block.3", k=None), jacobian(net.block[3], (2, 4, 4)))
    fc = spectrum(graph, None, "fc", k=None)
    agrees(fc, net.fc.weight.detach().numpy())  # one position's, not block diagonal over all
    assert (fc.right.shape, fc.left.shape) == ((3, 4), (3, 3))
    agrees(spectrum(graph, None, "output", k=None), np.ones((2, 3)), 1e-6)  # a product with a constant


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (
            "pair",
            "layer 'pair' has 2 linear layers or convolutions, not one map; layers that are one: block.0, pair.0, ",
        ),
        ("block.2", r"layer 'block.2' \(aten.relu.default\) is not linear; layers that are one"),
        ("sum", "is a map of several values"),
        ("input", "is an input: no map leads to it"),
        ("blok", "unknown layer 'blok'; did you mean 'block'"),
    ],
)
def test_layers_that_are_no_map(layer, words):
    with pytest.raises(ValueError, match=words):
        spectrum(Several().eval(), torch.zeros(1, 1, 4, 4), layer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "at least 1 singular value, of a 30 x 20 map; given 0"),
        ({"solver": "denes"}, "unknown solver 'denes'; did you mean 'dense'"),
        ({"solver": "iterative", "k": 3}, 'k: "iterative" finds up to 2 of 20 singular values; given 3'),
    ],
)
def test_what_bad_options_get(options, words):
    with pytest.raises(ValueError, match=words):
        spectrum(nn.Linear(20, 30), torch.zeros(1, 20), "output", **options)


def test_a_matrix_too_large_is_refused_before_it_is_made():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    with pytest.raises(ValueError, match=r"is a 131072 x 49152 map, whose matrix takes 48 GiB; ask for fewer"):
        spectrum(conv, torch.zeros(1, 3, 128, 128), "output", k=None)


def test_shares_of_data():
    layer = nn.Linear(6, 8, dtype=torch.float64)
    found = spectrum(layer, torch.zeros(1, 6).double(), "output", k=None)
    data = torch.randn(50, 6).double()
    expected = [(data @ v).square().sum() / data.square().sum() for v in found.right]
    torch.testing.assert_close(found.shares(data), torch.stack(expected))
    assert found.shares(data).sum().item() == pytest.approx(1)  # all of the input's space
    torch.testing.assert_close(found.shares(3 * found.right[2:3]), torch.eye(6).double()[2])
    torch.testing.assert_close(found.shares(data.view(5, 10, 6)), found.shares(data))  # at every position
    assert found.shares(torch.zeros(2, 6)).tolist() == [0] * 6
    picture = spectrum(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 4, 4), "output")
    assert 0 < picture.shares(torch.rand(9, 1, 4, 4)).sum().item() <= 1 + 1e-6
    with pytest.raises(ValueError, match=r"what layer 'output' is given, \(n, 6\); given \(2, 5\)"):
        found.shares(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"given \(6,\)"):
        found.shares(torch.zeros(6))


def test_trained_to_reproduce_the_data_the_leading_vectors_span_it():
    """``W^T W x = x`` on data of three directions: three singular values of 1, and their vectors hold all of the data."""
    basis, _ = torch.linalg.qr(torch.randn(20, 3))
    x = torch.randn(200, 3) @ basis.mT
    layer = nn.Linear(20, 10, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, weight_decay=0.02)
    before = spectrum(layer, x[:1], "output", k=3).shares(x).sum().item()
    for _ in range(1500):
        optimizer.zero_grad()
        (layer(x) @ layer.weight - x).square().sum(1).mean().backward()
        optimizer.step()
    after = spectrum(layer, x[:1], "output", k=4)
    assert before < 0.5
    assert after.shares(x)[:3].sum().item() > 0.99
    assert after.values[:3].tolist() == pytest.approx([1, 1, 1], abs=0.05)
    assert after.values[3].item() < 0.3


def test_the_seed_says_the_vectors_and_the_model_stays_as_it_is():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout()).train()
    state: dict[str, Any] = copy.deepcopy(net.state_dict())
    x = torch.zeros(1, 2, 12, 12)
    first, again = (spectrum(net, x, "0", k=3, solver="iterative", seed=7) for _ in range(2))
    assert torch.equal(first.right, again.right)
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    with torch.no_grad():
        net[0].weight.mul_(2)
    graph = revprop.trace(net, x)
    torch.testing.assert_close(spectrum(graph, None, "0", k=3).values, 2 * first.values)
    assert str(first).startswith("0: 3 of 288 singular values of a 300 x 288 map (iterative, residual ")
