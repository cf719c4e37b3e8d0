"""Mutual information of distributions for which it is known, and planes of networks whose layers are."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import revprop
import revprop.networks
from revprop import NonFiniteError, information_plane, mutual_information


def entropy(*shares: float) -> float:
    return -sum(share * math.log2(share) for share in shares if share)


def direct(a: list[Any], b: list[Any]) -> float:
    """``H(A) + H(B) - H(A, B)``, counted pair by pair."""
    n = len(a)
    of_a, of_b, of_both = (entropy(*(c / n for c in Counter(v).values())) for v in (a, b, zip(a, b, strict=True)))
    return of_a + of_b - of_both


def samples(table: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Samples that occur as often as a table says."""
    pairs = [(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    return torch.tensor([i for i, _ in pairs]), torch.tensor([j for _, j in pairs])


BITS = torch.tensor([[i >> k & 1 for k in range(3)] for i in range(8)])


@pytest.mark.parametrize(
    ("a", "b", "bits"),
    [
        (BITS[:, 0], BITS[:, 1], 0.0),  # independent
        (BITS[:, 0], BITS[:, 0], 1.0),  # the same
        (BITS, BITS.flip(1), 3.0),  # the same under other names
        (BITS[:, 0], 1 - BITS[:, 0], 1.0),
        (BITS[:, 0], BITS[:, 0] ^ BITS[:, 1], 0.0),  # either input of XOR says nothing ...
        (BITS[:, :2], BITS[:, 0] ^ BITS[:, 1], 1.0),  # ... and both say all
        (BITS[:, :2], BITS[:, 0] & BITS[:, 1], 2 - 0.75 * math.log2(3)),
        (BITS, torch.zeros(8), 0.0),
        (torch.zeros(8, 0), BITS, 0.0),
        ([5], [7], 0.0),
    ],
)
def test_known_distributions(a, b, bits):
    assert mutual_information(a, b) == pytest.approx(bits, abs=1e-12)
    assert mutual_information(b, a) == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize("flipped", [0, 1, 11, 50, 100])
def test_the_binary_symmetric_channel(flipped):
    """1 - H(p) bits of each, where p of the bits are flipped."""
    a, b = samples([[100 - flipped, flipped], [flipped, 100 - flipped]])
    p = flipped / 100
    assert mutual_information(a, b) == pytest.approx(1 - entropy(p, 1 - p), abs=1e-12)


@pytest.mark.parametrize("erased", [0, 1, 4])
def test_the_erasure_channel(erased):
    a, b = samples([[4 - erased, 0, erased], [0, 4 - erased, erased]])
    assert mutual_information(a, b) == pytest.approx(1 - erased / 4, abs=1e-12)


@given(st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=1, max_size=5))
def test_any_table(table):
    assume(any(map(any, table)))
    a, b = samples(table)
    bits = mutual_information(a, b)
    assert bits == pytest.approx(direct(a.tolist(), b.tolist()), abs=1e-12)
    assert -1e-12 <= bits <= min(mutual_information(a, a), mutual_information(b, b)) + 1e-12
    order = torch.randperm(len(a))
    assert mutual_information(a[order] * 3 - 7, b[order].double() / 3) == pytest.approx(bits, abs=1e-12)
    assert mutual_information(a, a % 2) <= mutual_information(a, a) + 1e-12
    assert mutual_information(a, b % 2) <= bits + 1e-12  # processing adds nothing


@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 10**6))
def test_rows_are_symbols(n, width, seed):
    generator = np.random.default_rng(seed)
    a, b = generator.integers(0, 3, (n, width)), generator.integers(0, 2, (n, 2, 2))
    rows = [[tuple(row.ravel().tolist()) for row in values] for values in (a, b)]
    assert mutual_information(a, torch.from_numpy(b)) == pytest.approx(direct(*rows), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64])
def test_symbols_of_any_type(dtype):
    values = torch.tensor([0, 1, 0, 1]).to(dtype)
    assert mutual_information(values, torch.tensor([1, 0, 1, 0])) == 1.0


def test_minus_zero_is_zero():
    assert mutual_information([0.0, -0.0, 1.0, 1.0], [0, 1, 2, 2]) == 1.0


def test_what_bad_samples_get():
    with pytest.raises(ValueError, match="as many samples of b as of a, 2; given 3"):
        mutual_information([0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="samples along the first dimension"):
        mutual_information([], [])
    with pytest.raises(ValueError, match="samples along the first dimension"):
        mutual_information(torch.tensor(1), torch.tensor(1))
    with pytest.raises(NonFiniteError, match="b holds 1 of 2"):
        mutual_information([0, 1], [0.0, math.nan])


# --- planes -----------------------------------------------------------------------------------------------------------

TWELVE = torch.tensor([[i >> k & 1 for k in range(12)] for i in range(4096)]).float()


def tanh_network(*sizes: int) -> nn.Sequential:
    blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*blocks)


def by_hand(values: Tensor, low: float, high: float, bins: int) -> list[tuple[int, ...]]:
    """The bin of each unit: so many inner edges lie at or below it."""
    edges = np.linspace(low, high, bins + 1)[1:-1]
    return [tuple(row) for row in np.digitize(values.flatten(1).double().numpy(), edges).tolist()]


@pytest.mark.parametrize("bins", [2, 7, 30])
def test_a_plane_is_counted_by_hand(bins):
    net = tanh_network(12, 10, 7, 5, 4, 3, 2)
    y = (TWELVE.sum(1) > 6).long()
    plane = information_plane(net, TWELVE, y, bins=bins)
    assert plane.layers == ("0", "1", "2", "3", "4", "output")
    assert plane.input_entropy == 12
    assert plane.label_information == pytest.approx(direct(list(range(4096)), y.tolist()), abs=1e-12)
    with torch.no_grad():
        values = [net[: i + 1](TWELVE) for i in range(6)]
    for point, value in zip(plane.points, values, strict=True):
        symbols = by_hand(value, -1, 1, bins)
        assert (point.low, point.high) == (-1, 1)
        assert point.input_bits == pytest.approx(direct(list(range(4096)), symbols), abs=1e-9)
        assert point.input_bits == pytest.approx(direct(symbols, symbols), abs=1e-9)  # no noise: the layer's entropy
        assert point.label_bits == pytest.approx(direct(symbols, y.tolist()), abs=1e-9)
        assert point.label_bits <= plane.label_information + 1e-12


def test_equal_inputs_are_one_symbol():
    x, y = TWELVE[:64].repeat(3, 1), torch.arange(64).repeat(3) % 2
    plane = information_plane(tanh_network(12, 3), x, y)
    once = information_plane(tanh_network(12, 3), TWELVE[:64], y[:64])
    assert plane.input_entropy == once.input_entropy == 6
    assert plane.label_information == once.label_information == 1


def test_a_layer_that_copies_keeps_all_and_one_that_is_constant_nothing():
    net = tanh_network(12, 12, 2)
    with torch.no_grad():
        net[0][0].weight.copy_(torch.eye(12))
        net[0][0].bias.zero_()
        net[1][0].weight.zero_()
    plane = information_plane(net, TWELVE, TWELVE[:, 0])
    copied, constant = plane.points
    assert (copied.input_bits, copied.label_bits) == (12, 1)
    assert (constant.input_bits, constant.label_bits) == (0, 0)


class Activations(nn.Module):
    """Whatever is wanted of 2 x's three entries, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.tanh, self.sigmoid, self.relu, self.relu6 = nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.ReLU6()
        self.softmax, self.elu, self.linear = nn.Softmax(1), nn.ELU(), nn.Linear(3, 3)
        self.pooled = nn.Sequential(nn.Tanh(), nn.MaxPool1d(2), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        z = 2 * x
        parts = [self.tanh(z), self.sigmoid(z), self.relu(z), self.relu6(z), self.softmax(z), self.elu(z)]
        return self.linear(sum(parts)) + self.pooled(z[:, None]).sum(1, keepdim=True)


def test_bins_span_the_range_of_the_activation():
    net, x = Activations(), torch.tensor([[-0.25, 0.5, 1.0], [0.25, 0.0, -1.0]])
    names = ["tanh", "sigmoid", "relu", "relu6", "softmax", "elu", "pooled", "linear", "output"]
    plane = information_plane(net, x, torch.tensor([0, 1]), names)
    found = {point.layer: (point.low, point.high) for point in plane.points}
    with torch.no_grad():
        linear = net.linear(
            sum(f(2 * x) for f in (F.relu, F.relu6, F.elu, torch.tanh, torch.sigmoid)) + (2 * x).softmax(1)
        )
    bounded = dict.fromkeys(("tanh", "pooled"), (-1, 1)) | dict.fromkeys(("sigmoid", "softmax"), (0, 1))
    assert {name: found[name] for name in bounded} == bounded
    assert (found["relu"], found["relu6"], found["elu"]) == ((0, 2), (0, 6), (-1, 2))
    assert found["linear"] == pytest.approx((linear.min().item(), linear.max().item()))


def test_a_range_that_is_said():
    net, x = nn.Sequential(nn.Linear(1, 1), nn.Tanh()), torch.tensor([[-3.0], [-0.2], [0.2], [3.0]])
    with torch.no_grad():
        net[0].weight.fill_(1), net[0].bias.zero_()
    y = torch.arange(4)

    def bits(**options: Any) -> Any:
        return pytest.approx([point.input_bits for point in information_plane(net, x, y, ["0", "1"], **options).points])

    assert bits(bins=2) == [1, 1]
    assert bits(bins=1) == [0, 0]
    assert bits(bins=2, range=(0.1, 0.25)) == [1, 1]  # beyond: the bin at that end; tanh(0.2) lies above the middle
    assert bits(bins=3, range=(-1.0, 1.0)) == [1.5, 1.5]
    assert bits(bins=2, range={"0": (2.0, 4.0)}) == [entropy(0.25, 0.75), 1]
    assert bits(bins=2, range=[2.0, 4.0]) == [entropy(0.25, 0.75), 0]


def test_layers_where_none_are_named():
    digits = revprop.trace(revprop.networks.NETWORKS["digits"](seed=0), torch.zeros(1, 1, 8, 8))
    y = torch.arange(6)
    plane = information_plane(digits, torch.rand(6, 1, 8, 8), y)
    assert plane.layers == ("conv1", "conv2", "fc1", "output")  # what is pooled, not what is convolved
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert information_plane(flat, torch.rand(6, 2, 2), y).layers == ("0", "3", "output")
    assert information_plane(flat, torch.rand(6, 2, 2), y, layers="2").layers == ("2",)


def test_several_inputs_are_one_variable():
    class Both(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.tanh(a - b)

    a, b = torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    plane = information_plane(Both(), (a, b), (a != b).long(), ["output"])
    assert plane.input_entropy == 2
    assert (plane.points[0].input_bits, plane.points[0].label_bits) == (1.5, 1)


def test_epochs_add_up():
    net, y = tanh_network(12, 4, 2), (TWELVE.sum(1) > 6).long()
    graph = revprop.trace(net, TWELVE[:2])
    total = information_plane(graph, TWELVE, y)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for epoch in (1, 2):
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(4 * net(TWELVE), y).backward()
            optimizer.step()
        total = total + information_plane(graph, TWELVE, y, epoch=epoch)
    assert [(p.layer, p.epoch) for p in total.points] == [(layer, e) for e in range(3) for layer in ("0", "output")]
    before, _, after = total["output"]
    assert after.label_bits > 0.8 > 0.5 > before.label_bits  # it has learned the label
    assert total.rows()[-1] == {
        "layer": "output",
        "epoch": 2,
        "input_bits": after.input_bits,
        "label_bits": after.label_bits,
        "low": -1.0,
        "high": 1.0,
    }
    assert f"{'output':<20}{2:>8}{after.input_bits:>10.3f}" in str(total)
    with pytest.raises(ValueError, match="planes of the same data and bins"):
        _ = total + information_plane(graph, TWELVE[:100], y[:100])
    with pytest.raises(ValueError, match="planes of the same data and bins"):
        _ = total + information_plane(graph, TWELVE, y, bins=10)
    with pytest.raises(KeyError, match="none of the layers of this plane: 0, output"):
        _ = total["1"]


def test_the_model_stays_as_it_is():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Tanh()).train()
    state = copy.deepcopy(net.state_dict())
    planes = [information_plane(net, torch.eye(4), torch.arange(4)) for _ in range(2)]
    assert planes[0] == planes[1]
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": ["outpt"]}, "unknown layer 'outpt'; did you mean 'output'"),
        ({"y": torch.zeros(3)}, "one label for each of 4 inputs; given 3"),
        ({"bins": 0}, "at least 1 interval per unit; given 0"),
        ({"range": "tanh"}, 'expected "auto"'),
        ({"range": (1.0, 1.0)}, "low < high"),
        ({"range": (0.0, math.inf)}, "low < high"),
        ({"range": {"output": 3}}, "low < high"),
        ({"range": {"outpt": (0.0, 1.0)}}, "unknown layer 'outpt'"),
        ({"x": torch.zeros(0, 4), "y": torch.zeros(0)}, "expected samples along the first dimension"),
        ({"x": torch.full((4, 4), math.nan)}, "holds 16 of 16 values"),
    ],
)
def test_what_bad_arguments_get(options, words):
    graph = revprop.trace(tanh_network(4, 2), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=words):
        information_plane(graph, **{"x": torch.eye(4), "y": torch.arange(4), **options})
