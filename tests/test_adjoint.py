"""Hypersurfaces: against autograd and dense references, the modes' algebra, completeness on networks of every kind."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explain_cases import Net, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import revprop
from revprop import NonFiniteError, completeness, completion, hypersurface
from revprop.adjoint import Hypersurface
from revprop.completion import run_affine

F64 = torch.float64
FRONTS = {"front": (nn.Conv2d, nn.Linear), "channel": nn.Conv2d, "position": nn.Conv2d, "logit": nn.Linear}


def error(h: Hypersurface) -> float:
    scale = float(h.value.abs().max()) or 1.0
    return float((h.reconstructed - h.value).abs().max()) / scale


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def se(net: Any, x: Tensor) -> Tensor:
    z = F.relu(net.conv(x))
    return net.head((z * torch.sigmoid(net.gate(z.mean((2, 3))))[:, :, None, None]).mean((2, 3)))


def attention(net: Any, x: Tensor) -> Tensor:
    tokens = net.norm(net.embed(x).flatten(2).transpose(1, 2))
    mixed, _ = net.attend(tokens, tokens, tokens, need_weights=False)
    return net.head((tokens + mixed).mean(1))


def masked(net: Any, x: Tensor) -> Tensor:
    """Attention written by hand: later tokens masked by the smallest number of single precision, in which the softmax is."""
    tokens = net.embed(x).flatten(2).transpose(1, 2)
    logits = net.query(tokens) @ tokens.transpose(1, 2) / 2.0
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    logits = 20.0 * torch.tanh(logits / 20.0)
    weights = torch.softmax(logits + later * torch.finfo(torch.float32).min, -1, dtype=torch.float32)
    return net.head((weights.to(tokens.dtype) @ tokens).mean(1))


def arithmetic(net: Any, x: Tensor) -> Tensor:
    z = net.conv((x - 0.4) / 0.2)
    return net.head(torch.flatten(3.0 - 2.0 * F.hardtanh(z, -0.3, 0.4) + F.pad(z[..., :-1], (1, 0), value=0.7), 1))


def recurrent(net: Any, x: Tensor) -> Tensor:
    return net.head(net.cells(x.flatten(1, 2))[0][:, -1])


def reused(net: Any, x: Tensor) -> Tensor:
    z = net.block(net.block(net.stem(x)))
    return net.head(torch.cat([z, net.stem(x)], 1).mean((2, 3)))


def images(channels: int = 2) -> tuple[Tensor, ...]:
    return (torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(1), dtype=F64),)


CONV = {"stem": lambda: nn.Conv2d(2, 4, 3, padding=1), "head": lambda: nn.Linear(8, 5)}

# network, inputs, whether nothing is held
MATRIX: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], bool]] = {
    "convolutions": (convolutional, images(), True),
    "reused modules": (
        lambda: Net(reused, stem=CONV["stem"](), head=CONV["head"](), block=nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())), images(), True),
    "attention masked by hand": (
        lambda: Net(masked, embed=nn.Conv2d(2, 4, 4, 4), query=nn.Linear(4, 4), head=nn.Linear(4, 5)), images(), False),
    "batch norm without weights": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        images(), True),
    "batch norm of vectors": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 7), nn.BatchNorm1d(7), nn.PReLU(7), nn.Linear(7, 3)), images(), True),
    "three dimensions": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 3, (1, 3, 3)), nn.BatchNorm3d(3), nn.ReLU(),
                              nn.MaxPool3d((1, 2, 2)), nn.Flatten(), nn.Linear(54, 3)), images(), True),
    "transposed convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3, 2), nn.ReLU6(), nn.Flatten(),
                              nn.Linear(147, 3)), images(), True),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        images(), False),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Flatten(),
                              nn.Linear(144, 3)), images(), False),
    "instance norm by running statistics": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Flatten(),
                              nn.Linear(144, 3)), images(), True),
    "RMS norm": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.RMSNorm(6), nn.Linear(6, 3)), images(), False),
    "hardtanh": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 9), nn.Hardtanh(-0.2, 0.3), nn.Linear(9, 3)), images(), True),
    "GELU": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 9), nn.GELU(), nn.Linear(9, 3)), images(), False),
    "sigmoid": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 9), nn.Sigmoid(), nn.Linear(9, 3)), images(), False),
    "probabilities": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 9), nn.SiLU(), nn.Linear(9, 3), nn.Softmax(1)), images(), False),
    "arithmetic in forward": (lambda: Net(arithmetic, conv=nn.Conv2d(2, 3, 3), head=nn.Linear(108, 3)), images(), True),
    "squeeze-excite": (
        lambda: Net(se, conv=nn.Conv2d(2, 4, 3), gate=nn.Linear(4, 4), head=nn.Linear(4, 3)), images(), False),
    "transformer": (
        lambda: Net(attention, embed=nn.Conv2d(2, 8, 4, 4), norm=nn.LayerNorm(8),
                    attend=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8, 3)), images(), False),
    "samples second": (
        lambda: Net(lambda net, x: net.head(net.layer(x.flatten(2).permute(2, 0, 1)).mean(0)),
                    layer=nn.TransformerEncoderLayer(2, 2, 6), head=nn.Linear(2, 3)), images(), False),
    "LSTM": (lambda: Net(recurrent, cells=nn.LSTM(8, 5, batch_first=True), head=nn.Linear(5, 3)), images(), False),
    "square root of a maximum": (
        lambda: Net(lambda net, x: net.head(torch.sqrt(F.relu(net.first(x.flatten(1))))), first=nn.Linear(128, 7),
                    head=nn.Linear(7, 3)), images(), False),
    "logarithm": (
        lambda: Net(lambda net, x: net.head(torch.log(1 + net.first(x.flatten(1)).abs())), first=nn.Linear(128, 7),
                    head=nn.Linear(7, 3)), images(), False),
    "squares": (
        lambda: Net(lambda net, x: net.head(net.first(x.flatten(1)) * net.first(x.flatten(1))), first=nn.Linear(128, 7),
                    head=nn.Linear(7, 3)), images(), False),
    "maximum of a constant": (
        lambda: Net(lambda net, x: net.head(torch.maximum(net.first(x.flatten(1)), torch.tensor(0.3, dtype=x.dtype))),
                    first=nn.Linear(128, 7), head=nn.Linear(7, 3)), images(), True),
}  # fmt: skip


@pytest.mark.parametrize("name", MATRIX)
def test_every_unit_of_every_layer_is_what_its_functional_says(name: str) -> None:
    network, x, exact = MATRIX[name]
    net = seeded(network)
    graph = revprop.trace(net, x)
    found = completeness(graph, x)
    for layer, complete in found.items():
        scale = float(complete.value.abs().max()) or 1.0
        assert float((complete.reconstructed - complete.value).abs().max()) < 1e-12 * scale, layer
        unit = tuple(size // 2 for size in graph.shape(graph.node(layer)))
        h = hypersurface(graph, x, layer, unit)
        at = (slice(None), *unit)
        torch.testing.assert_close(h.value, complete.value[at])
        assert float((h.reconstructed - complete.reconstructed[at]).abs().max()) < 1e-12 * scale, layer
    assert h.exact == exact, h.held
    with torch.no_grad():
        torch.testing.assert_close(h.value, net(*x)[(slice(None), *unit)])


@pytest.mark.parametrize("name", [name for name, (_, _, exact) in MATRIX.items() if exact])
def test_where_nothing_is_held_the_functional_is_the_network_around_the_input(name: str) -> None:
    network, x, _ = MATRIX[name]
    net = seeded(network)
    h = hypersurface(net, x, "output", 1)
    near = x[0] + 1e-9 * torch.randn(x[0].shape, dtype=F64)
    with torch.no_grad():
        change = net(near)[:, 1] - net(*x)[:, 1]
    assert h.image is not None
    torch.testing.assert_close(((near - x[0]) * h.image).flatten(1).sum(1), change, rtol=1e-5, atol=1e-14)


def test_piecewise_linear_parts_are_autograds_gradients_of_input_and_biases() -> None:
    net, (x,) = seeded(convolutional), images()
    biases = {name: p.detach() for name, p in net.named_parameters() if name.endswith("bias")}

    def unit(x: Tensor, biases: dict[str, Tensor]) -> Tensor:
        return functional_call(net, biases, (x[None],))[0]

    h = hypersurface(net, x)
    assert h.image is not None
    assert h.image.shape == (3, 5, 2, 8, 8)
    for i in range(3):
        image, of_biases = jacrev(unit, (0, 1))(x[i], biases)
        torch.testing.assert_close(h.image[i], image)
        for name, gradient in of_biases.items():
            torch.testing.assert_close(h.biases[name][i], gradient)
    assert set(h.biases) == set(biases)
    torch.testing.assert_close(h.relative_error, torch.zeros(3, 5, dtype=F64), rtol=0, atol=1e-12)


def test_running_statistics_are_entries() -> None:
    net, (x,) = seeded(MATRIX["reused modules"][0]), images()
    norm: Any = net.get_submodule("block.1")
    h = hypersurface(net, x, "output", 0)

    def value(mean: Tensor) -> Tensor:
        def normalise(module: Any, inputs: Any, output: Any) -> Tensor:
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            return (inputs[0] - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

        hook = norm.register_forward_hook(normalise)
        try:
            return net(x)[:, 0]
        finally:
            hook.remove()

    dense = torch.autograd.functional.jacobian(value, norm.running_mean.clone())
    torch.testing.assert_close(h.biases["block.1.running_mean"], dense)
    torch.testing.assert_close(h.bias_values["block.1.running_mean"], norm.running_mean)


@given(transposed=st.booleans(), groups=st.sampled_from([1, 2]), stride=st.integers(1, 2), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=5)
def test_the_modes_add_up(transposed: bool, groups: int, stride: int, seed: int) -> None:
    torch.manual_seed(seed)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    net = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), kind(4, 6, 3, stride, groups=groups)).double()
    x = torch.randn(2, 1, 6, 6, dtype=F64)
    modes = {m: hypersurface(net, x, "2", mode=m) for m in ("channel", "position", "channel slice", "slice")}
    rm1, rm2, rm3, rm4 = modes.values()
    for name in (None, "0.bias"):
        h1, h2, h3, h4 = (h.image if name is None else h.biases[name] for h in (rm1, rm2, rm3, rm4))
        torch.testing.assert_close(h4.sum((3, 4)), h3)  # Eq. 10
        torch.testing.assert_close(h4.sum(2), h2)  # Eq. 11
        torch.testing.assert_close(h3.sum(2), h1)  # Eq. 12
        torch.testing.assert_close(h2.sum((2, 3)), h1)
    own = net[2].bias.view(-1, 1, 1)
    torch.testing.assert_close(rm2.value, net(x) - own)  # in front of its own bias
    torch.testing.assert_close(rm1.value, (net(x) - own).sum((2, 3)))
    assert "2.bias" not in rm2.biases
    for h in modes.values():
        assert error(h) < 1e-12
    (one,) = (hypersurface(net, x, "2", [(3, 1, 0, 1)], mode="RM4"),)
    assert one.image is not None
    torch.testing.assert_close(one.image[:, 0], rm4.image[:, 3, 1, 0, 1])
    assert one.units == ((3, 1, 0, 1),)


def test_a_class_in_front_of_its_own_bias() -> None:
    net, (x,) = seeded(convolutional), images()
    h = hypersurface(net, x, "7", 3, mode="logit")
    torch.testing.assert_close(h.value, net(x)[:, 3] - net[7].bias[3])
    assert "7.bias" not in h.biases
    assert error(h) < 1e-12


@pytest.mark.parametrize("budget", [1, 60_000, 1 << 30])
def test_chunks_change_nothing(budget: int) -> None:
    net, (x,) = seeded(convolutional), images()
    whole = hypersurface(net, x, "3")
    parts = hypersurface(net, x, "3", memory_budget=budget)
    torch.testing.assert_close(parts.image, whole.image)
    assert set(parts.biases) == set(whole.biases)
    for name, h in parts.biases.items():
        torch.testing.assert_close(h, whole.biases[name])
    alone = hypersurface(net, x[1:2], "3", [(5, 0, 1), (0, 1, 0)])
    torch.testing.assert_close(alone.image[0, 0], whole.image[1, 5, 0, 1])  # type: ignore[index]
    torch.testing.assert_close(alone.value[0, 1], whole.value[1, 0, 1, 0])


def test_double_precision_for_a_network_of_single() -> None:
    net, (x,) = seeded(MATRIX["transformer"][0]).float(), images()
    single, double = (hypersurface(net, x.float(), "output", 1, float64=wide) for wide in (False, True))
    assert double.value.dtype == F64
    assert error(double) < 1e-13 < error(single) < 1e-5
    torch.testing.assert_close(single.image, double.image.float(), rtol=1e-3, atol=1e-5)  # type: ignore[union-attr]
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_rows_of_a_mask_have_their_own_values() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            z = torch.tanh(self.embed(ids))
            scores = (z @ z.transpose(1, 2)).masked_fill(mask[:, None, :] == 0, -math.inf)
            return self.head((scores.softmax(-1) @ z + (1.0 - mask[:, :, None].to(z)) * 0.5).mean(1))

    torch.manual_seed(0)
    net = Masked().double()
    ids, mask = torch.randint(11, (4, 5)), torch.ones(4, 5, dtype=torch.int64)
    mask[1::2, 3:] = 0
    for k in range(3):
        h = hypersurface(net, (ids, mask), "output", k)
        assert h.image is None
        assert error(h) < 1e-12
        assert h.biases["embed:embedding"].shape == (4, 5, 6)
    alone = hypersurface(net, (ids[1:2], mask[1:2]), "output", 2)
    torch.testing.assert_close(
        alone.bias_contributions["embed:embedding"], h.bias_contributions["embed:embedding"][1:2]
    )


def test_two_inputs_have_two_functionals() -> None:
    net = Net(
        lambda net, a, b: net.first(a) + F.relu(net.second(b)), first=nn.Linear(3, 2), second=nn.Linear(4, 2)
    ).double()
    a, b = torch.randn(5, 3, dtype=F64), torch.randn(5, 4, dtype=F64)
    h = hypersurface(net, (a, b), "output", 1)
    assert [image.shape for image in h.images.values()] == [(5, 3), (5, 4)]
    assert error(h) < 1e-12


def test_no_samples_and_one_number_per_sample() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0)).double()
    h = hypersurface(net, torch.randn(4, 3, dtype=F64))
    assert h.value.shape == (4,)
    assert error(h) < 1e-12
    graph = revprop.trace(net, torch.randn(2, 3, dtype=F64))
    none = hypersurface(graph, torch.zeros(0, 3, dtype=F64))
    assert none.image is not None
    assert none.image.shape == (0, 3)


def test_the_model_is_untouched() -> None:
    net, (x,) = seeded(MATRIX["reused modules"][0]), images()
    net.train()
    before = copy.deepcopy(net.state_dict())
    net.head.weight.grad = torch.ones_like(net.head.weight)  # type: ignore[union-attr,operator]
    x.requires_grad_()
    hypersurface(net, x, "output", 0)
    completeness(net, x)
    assert net.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert bool((net.head.weight.grad == 1).all())  # type: ignore[union-attr]
    assert x.grad is None


def test_weights_are_read_live() -> None:
    net, (x,) = seeded(convolutional), images()
    graph = revprop.trace(net, x)
    first = hypersurface(graph, x, "output", 0)
    with torch.no_grad():
        net[3].weight.mul_(2.0)
    second = hypersurface(graph, x, "output", 0)
    with torch.no_grad():
        torch.testing.assert_close(second.value, net(x)[:, 0])
    assert error(second) < 1e-12
    assert not torch.allclose(first.value, second.value)


def test_what_is_refused() -> None:
    net, (x,) = seeded(convolutional), images()
    for options, message in (
        ({"unit": 5}, r"unit: expected an index within \(5,\) \(unit\); given \(5,\)"),
        ({"unit": (1, 2)}, r"unit: expected an index within \(5,\)"),
        ({"layer": "8"}, "unknown layer '8'"),
        ({"mode": "RM9"}, "unknown mode 'RM9'; did you mean 'RM"),
        ({"layer": "1", "mode": "RM2"}, "mode RM2 is of one convolution, and layer '1' has 0 of them.*: 0, 3"),
        ({"layer": "0", "mode": "logit"}, "mode RM0 is of one fully connected layer.*: 7"),
    ):
        with pytest.raises(ValueError, match=message):
            hypersurface(net, x, **options)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError):
        hypersurface(net, x * math.nan)
    with pytest.raises(ValueError, match=r"statistics of the batch.*track_running_stats=True"):
        hypersurface(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)), torch.randn(4, 3))


def test_it_says_what_it_found() -> None:
    net, (x,) = seeded(MATRIX["transformer"][0]), images()
    text = str(hypersurface(net, x, "output", 0))
    assert "held: the weights of the attention of attend:scaled_dot_product_attention" in text
    assert "head.bias" in text
    assert "nothing held: exact around x" in str(hypersurface(seeded(convolutional), x, "output", 0))


def test_contributions_are_an_attribution_method() -> None:
    net, (x,) = seeded(convolutional), images()
    method = revprop.Contributions(net)
    classes = torch.tensor([4, 0, 4])
    parts, delta = method.attribute(x, target=classes, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-12
    for i, k in enumerate(classes.tolist()):
        h = hypersurface(net, x[i : i + 1], "output", k)
        torch.testing.assert_close(parts[i : i + 1], h.contributions)
    plain = revprop.Contributions(net, x, multiply_by_inputs=False).attribute(x, target=2)
    torch.testing.assert_close(plain, hypersurface(net, x, "output", 2).image)
    inner = revprop.Contributions(net, x, layer="3").attribute(x, target=(0, 1, 1))
    torch.testing.assert_close(inner, hypersurface(net, x, "3", (0, 1, 1)).contributions)
    with pytest.raises(ValueError, match="one class for each of 3 samples; given 2"):
        method.attribute(x, target=torch.tensor([1, 2]))


def test_completeness_is_that_of_the_hypersurfaces_in_every_mode() -> None:
    net, (x,) = seeded(convolutional), images()
    graph = revprop.trace(net, x)
    for mode in ("front", "channel", "position", "logit"):
        found = completeness(graph, x, mode=mode)
        assert set(found) - {"output"} == {n for n, m in net.named_modules() if isinstance(m, FRONTS[mode])}
        for layer, both in found.items():
            h = hypersurface(graph, x, layer, mode=mode)
            torch.testing.assert_close(both.value, h.value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(both.reconstructed, h.reconstructed, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="has no value of its own"):
        completeness(graph, x, ["0"], "slice")
    assert completeness(graph, x, mode="slice") == {}


def test_completeness_runs_the_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x,) = seeded(convolutional), images()
    graph = revprop.trace(net, x)
    runs = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(args)
        return run_affine(*args, **kwargs)

    monkeypatch.setattr(sys.modules["revprop.completeness"], "run_affine", counted)
    assert len(completeness(graph, x, mode="front")) > 2
    assert len(runs) == 1


def test_a_derived_weight_has_no_front() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight.T, alpha=2.0)

    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="in front of a bias of its own"):
        completeness(Scaled(), x, ["output"], "front")


# -- fold ------------------------------------------------------------------------------------------------------------


class Fixup(nn.Module):
    """A convolution with a multiplier of one number, and scalars around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, bias=False)
        self.scale, self.before, self.after = (nn.Parameter(torch.randn(1)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x + self.before) * self.scale + self.after)


@pytest.mark.parametrize(
    ("network", "norms"),
    [
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), 0),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4, affine=False)), 0),
        (lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.BatchNorm2d(4)), 0),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 4), nn.BatchNorm1d(4), nn.Tanh()), 0),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), 1),
        (MATRIX["reused modules"][0], 1),
        (Fixup, 0),
    ],
)
def test_folding_changes_no_output(network: Callable[[], nn.Module], norms: int) -> None:
    net, (x,) = seeded(network), images()
    before = copy.deepcopy(net)
    folded = revprop.fold(net, x)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), net(x), rtol=1e-9, atol=1e-9)
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules()) == norms
    assert str(net) == str(before)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.state_dict().values(), strict=True))
    if isinstance(folded, Fixup):
        assert float(folded.scale) == 1.0
    h = hypersurface(folded, x)
    assert error(h) < 1e-12


def test_a_wrong_form_is_noticed_by_the_networks_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity alone would hold for another network, too."""
    monkeypatch.setitem(completion._KINDS, torch.ops.aten.relu.default, lambda run, node: 2.0 * run.native(node))
    net, (x,) = seeded(convolutional), images()
    for explain in (hypersurface, completeness):
        with pytest.raises(RuntimeError, match="gives other values than the network"):
            explain(net, x)


def test_the_weights_of_an_attention_are_its_gate_through_a_cast() -> None:
    net = seeded(MATRIX["attention masked by hand"][0])
    assert hypersurface(net, images()[0]).held["matmul"] == "the gate of the two factors"
