"""Receptive fields against what autograd says units depend on; units that share rows against units with a row each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explain_cases import Net, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import revprop
from revprop import adjoint, hypersurface
from revprop.adjoint import Hypersurface
from revprop.heads import head_of
from revprop.receptive import Field, receptive_fields
from revprop.shared_rows import SharedRows, shared_rows

F64 = torch.float64
CONV = {1: nn.Conv1d, 2: nn.Conv2d}
AVG = {1: nn.AvgPool1d, 2: nn.AvgPool2d}
MAX = {1: nn.MaxPool1d, 2: nn.MaxPool2d}


# -- what units can depend on ----------------------------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Module, int, int]:
    """Convolutions, pooling and residual sums in a row, all weights positive; dimensions; size of the image."""
    dims = draw(st.sampled_from((1, 2)))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("conv", "conv", "residual", "avg", "max", "cut")))
        kernel, padding = draw(st.integers(1, 3)), draw(st.integers(0, 2))
        stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        if kind == "conv":
            layers.append(CONV[dims](2, 2, kernel, stride, padding, dilation, groups=draw(st.sampled_from((1, 2)))))
        elif kind == "residual":
            layers.append(
                Net(lambda net, x: x + net.conv(x), conv=CONV[dims](2, 2, kernel, padding="same", dilation=dilation))
            )
        elif kind == "cut":
            layers.append(Net(lambda net, x: F.pad(x[..., 1::2], (2, 1))))
        else:
            pool = {"avg": AVG, "max": MAX}[kind][dims]
            layers.append(pool(kernel, stride, min(padding, kernel // 2), ceil_mode=draw(st.booleans())))
    net = nn.Sequential(CONV[dims](2, 2, 1), *layers).double().eval()
    for parameter in net.parameters():
        parameter.data.uniform_(0.5, 1.0)
    return net, dims, draw(st.integers(9, 13))


def support(graph: revprop.Graph, node: Any, size: int, dims: int) -> Tensor:
    """(positions of the units, positions of the input): where autograd finds a slope, for any channels."""
    x = torch.rand(1, 2, *[size] * dims, dtype=F64) + 0.5
    of = torch.autograd.functional.jacobian(lambda x: graph.segment(graph.inputs, (node,))(x)[0], x)
    return (of[0].sum((0, 1 + dims, 2 + dims)) != 0).reshape(-1, size**dims)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(chains())
def test_units_depend_on_nothing_outside_of_their_fields(chain: tuple[nn.Module, int, int]) -> None:
    net, dims, size = chain
    try:
        graph = revprop.trace(net, torch.zeros(2, 2, *[size] * dims, dtype=F64))
    except (RuntimeError, revprop.ExportError):  # a window larger than what it slides over
        return
    fields = receptive_fields(graph, graph.output)
    assert fields is not None
    sizes = graph.shape(graph.output)[1:]
    positions = torch.cartesian_prod(*map(torch.arange, sizes)).view(-1, dims)
    seen = torch.ones(len(positions), *[1] * dims, dtype=torch.bool)
    for d in range(dims):
        one = fields[graph.inputs[0]].seen(d, positions[:, d], size)
        seen = seen & one.view(len(one), *[-1 if i == d else 1 for i in range(dims)])
    found = support(graph, graph.output, size, dims)
    assert not bool((found & ~seen.flatten(1)).any())
    units = [(c, *map(int, at)) for c in range(2) for at in positions]
    shared = shared_rows(graph, head_of(graph, "output", "unit"), units)
    if shared is not None:  # units of a row depend on nothing in common
        rows = shared.rows(shared.stages[-1])
        for row in range(shared.counts[-1]):
            place = [int(i) for i in (shared.index[rows == row][:, 1:] * torch.tensor([*sizes[1:], 1][-dims:])).sum(1)]
            assert int(found[place].sum(0).max()) <= 1
    x = torch.rand(2, 2, *[size] * dims, dtype=F64)
    same(hypersurface(graph, x), alone(graph, x))


def test_fields_are_as_small_as_what_is_seen() -> None:
    block = [nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)]
    net = nn.Sequential(
        nn.Conv2d(2, 2, 3, 2), Net(lambda net, x: x + net.block(x), block=nn.Sequential(*block)), nn.MaxPool2d(2)
    )
    graph = revprop.trace(net, torch.zeros(2, 2, 21, 21))
    fields = receptive_fields(graph, graph.output)
    assert fields is not None
    assert fields[graph.node("0")] == Field((2, 2), (-2, -2), (3, 3))
    assert fields[graph.inputs[0]] == Field((4, 4), (-4, -4), (8, 8))
    assert fields[graph.inputs[0]].spacing == (4, 4)


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "flattened": lambda: nn.Sequential(nn.Flatten(), nn.Linear(288, 16), nn.Unflatten(1, (1, 4, 4))),
    "up-sampled": lambda: nn.Upsample(scale_factor=2),
    "transposed": lambda: nn.ConvTranspose2d(2, 2, 3),
    "by its own statistics": lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2)),
    "windows of several lengths": lambda: nn.AdaptiveAvgPool2d(7),
    "turned": lambda: Net(lambda net, x: x.transpose(2, 3)),
    "mirrored": lambda: Net(lambda net, x: x.flip(2)),
    "repeated over positions": lambda: Net(lambda net, x: x + x.mean((2, 3), keepdim=True)),
    "two strides": lambda: Net(lambda net, x: torch.cat([x[..., ::2], x[..., :6]], 1)),
    "reflected at the border": lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(2, 2, 3)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_seen_of_other_values_is_not_known(name: str) -> None:
    graph = revprop.trace(UNKNOWN[name]().eval(), torch.zeros(2, 2, 12, 12))
    assert receptive_fields(graph, graph.output) is None


# -- shared rows --------------------------------------------------------------------------------------------------------------


def residual() -> nn.Module:
    def block(net: Any, x: Tensor) -> Tensor:
        z = net.second(F.relu(net.first(x)))
        return F.relu(z + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))

    first = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4))
    second = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4))
    return nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), Net(block, first=first, second=second))


def constants(net: Any, x: Tensor) -> Tensor:
    """Constants of every shape: per position, per column, per channel, one for all, one row for each sample."""
    z = net.conv(x) + net.place + net.column
    z = 1.5 - F.hardtanh(z * net.channel + net.channel, -0.3, 0.4)
    z = torch.sigmoid(z) + z.new_full((len(z), 1, 1, 1), 0.3)
    return net.last(
        F.pad(torch.cat([z, net.place.expand(1, -1, -1, -1).expand(len(z), -1, -1, -1)], 1), (1, 0), value=0.7)
    )


def gated(net: Any, x: Tensor) -> Tensor:
    z = F.relu(net.conv(x))
    return z * torch.sigmoid(net.gate(z.mean((2, 3), keepdim=True))) + z * z


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def again(net: Any, x: Tensor) -> Tensor:
    return net.block(net.block(net.stem(x)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.LeakyReLU(0.1),
            nn.Conv2d(3, 3, 3, 2, groups=3), nn.ReLU(), nn.Conv2d(3, 2, (1, 2), dilation=2)), (2, 14, 13)),
    "residual": (residual, (2, 20, 18)),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 5), nn.BatchNorm1d(3), nn.PReLU(3), nn.Conv1d(3, 2, 3, 2, 1)), (1, 31)),
    "three dimensions": (lambda: nn.Sequential(nn.Conv3d(2, 2, 2), nn.ReLU(), nn.MaxPool3d((1, 2, 1))), (2, 5, 6, 6)),
    "pooling": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 2, 1),
                              nn.AvgPool2d(2, 1, ceil_mode=True), nn.Tanh()), (1, 16, 16)),
    "constants": (
        lambda: Net(constants, conv=nn.Conv2d(2, 3, 3), place=parameter(3, 9, 11), column=parameter(1, 11),
                    channel=parameter(3, 1, 1), last=nn.Conv2d(6, 2, 2)), (2, 11, 13)),
    "a module again": (
        lambda: Net(again, stem=nn.Conv2d(2, 3, 3), block=nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Hardtanh(-0.2, 0.3))), (2, 18, 18)),
    "a gate by all positions": (
        lambda: Net(gated, conv=nn.Conv2d(2, 3, 3), gate=nn.Conv2d(3, 3, 1)), (2, 9, 9)),
}  # fmt: skip


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> list[SharedRows | None]:
    """What was found to share, call by call."""
    found: list[SharedRows | None] = []

    def noted(*args: Any) -> SharedRows | None:
        found.append(shared_rows(*args))
        return found[-1]

    monkeypatch.setattr(adjoint, "shared_rows", noted)
    return found


def alone(*args: Any, **kwargs: Any) -> Hypersurface:
    """The units with a row each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adjoint, "shared_rows", lambda *args: None)
        return hypersurface(*args, **kwargs)


def same(ours: Hypersurface, theirs: Hypersurface, tolerance: float = 1e-12) -> None:
    assert ours.units == theirs.units
    assert ours.held == theirs.held
    assert list(ours.images) == list(theirs.images)
    assert list(ours.biases) == list(theirs.biases)
    pairs = [(ours.value, theirs.value), *((ours.images[n], theirs.images[n]) for n in ours.images)]
    pairs += [(ours.biases[n], theirs.biases[n]) for n in ours.biases]
    pairs += [(ours.bias_values[n], theirs.bias_values[n]) for n in ours.biases]
    for a, b in pairs:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = float(b.abs().max()) if b.numel() else 0.0
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_shared_is_as_a_row_each(name: str, sharing: list[SharedRows | None]) -> None:
    network, shape = NETWORKS[name]
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    graph = revprop.trace(seeded(network), x)
    ours = hypersurface(graph, x)
    same(ours, alone(graph, x))
    assert float((ours.reconstructed - ours.value).abs().max() / ours.value.abs().max()) < 1e-12
    # a list in any order, borders among them, some of them twice
    every = torch.cartesian_prod(*map(torch.arange, graph.shape(graph.output)))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(2))
    some = [tuple(map(int, unit)) for unit in (*every[order], *every[order[:9]])]
    for given_ in (x, x[:1], x[:0]):
        same(hypersurface(graph, given_, unit=some), alone(graph, given_, unit=some))
    same(hypersurface(graph, x, unit=some, memory_budget=1), alone(graph, x, unit=some))
    assert len(sharing) == 5
    assert all(shared is not None and max(shared.counts) < len(every) for shared in sharing)


def test_which_units_share(sharing: list[SharedRows | None]) -> None:
    network, shape = NETWORKS["convolutions"]
    x = torch.randn(2, *shape, dtype=F64)
    graph = revprop.trace(seeded(network), x)
    wide = [(c, i, j) for c in range(3) for i in (0, 6, 12) for j in (0, 6, 12)]
    same(hypersurface(graph, x, "1", wide), alone(graph, x, "1", wide))
    same(hypersurface(graph, x, "0", wide, mode="position"), alone(graph, x, "0", wide, mode="position"))
    assert [s is not None and max(s.counts) for s in sharing] == [3, 3]  # one row a channel
    near = [(0, 0, 0), (0, 1, 1), (0, 2, 2)]
    hypersurface(graph, x, "1", near)
    hypersurface(graph, x, "1", (0, 3, 3))
    hypersurface(graph, x, "0", [(0,), (1,)], mode="channel")
    hypersurface(graph, x, "0", [(0, 0, 0, 0), (0, 0, 6, 6)], mode="slice")
    assert sharing[2:] == [None] * 4


def test_few_rows_next_to_the_layer(sharing: list[SharedRows | None]) -> None:
    def block(net: Any, x: Tensor) -> Tensor:
        return F.relu(x + net.conv(x))

    blocks = [Net(block, conv=nn.Conv2d(2, 2, 3, padding=1)) for _ in range(4)]
    x = torch.randn(1, 2, 26, 26, dtype=F64)
    graph = revprop.trace(seeded(lambda: nn.Sequential(*blocks)), x)
    same(hypersurface(graph, x), alone(graph, x))
    assert sharing[0] is not None
    counts = sharing[0].counts
    assert len(counts) > 1
    assert counts == sorted(set(counts))
    assert counts[-1] == 2 * 9**2  # of each channel one for every position of a window
    middle = [(c, i, j) for c in range(2) for i in range(9, 18) for j in range(9, 18)]
    same(hypersurface(graph, x, unit=middle), alone(graph, x, unit=middle))
    assert sharing[1] is not None  # the last rows are one each: it is the first that save
    assert sharing[1].counts[-1] == len(middle)


def test_in_single_precision_and_with_its_own_bias_left_out(sharing: list[SharedRows | None]) -> None:
    x = torch.randn(1, 2, 20, 18)
    graph = revprop.trace(seeded(residual).float(), x)
    ours = hypersurface(graph, x, "2.second.0", mode="front")
    assert sharing[0] is not None
    same(ours, alone(graph, x, "2.second.0", mode="front"), 1e-5)
    same(hypersurface(graph, x, "0", mode="front", float64=True), alone(graph, x, "0", mode="front", float64=True))
    assert ours.image is not None
    assert ours.image.is_contiguous()


def test_units_of_the_input_itself(sharing: list[SharedRows | None]) -> None:
    x = torch.randn(2, 2, 8, 8)
    found = hypersurface(revprop.trace(nn.Conv2d(2, 3, 3).eval(), x), x, "input")
    assert sharing[0] is not None
    assert sharing[0].counts == [2]  # one for each channel
    assert found.image is not None
    assert torch.equal(found.image[1].reshape(128, 128), torch.eye(128))
    assert torch.equal(found.value, x)
