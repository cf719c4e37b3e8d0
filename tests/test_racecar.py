"""Racecar's reverse pass against the paper's appendix tables written out by hand, and against dense matrices; in any loop."""

import copy
import functools
import itertools
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revprop import Graph, Racecar, trace


def twice(value: Tensor) -> Tensor:
    """UP of the appendix tables."""
    return value.repeat_interleave(2, -1).repeat_interleave(2, -2)


def deconvolve(value: Tensor, layer: nn.Conv2d) -> Tensor:
    """``D(z - b)`` of the appendix tables."""
    assert layer.bias is not None
    return F.conv_transpose2d(value - layer.bias.view(-1, 1, 1), layer.weight, padding=layer.padding[0])


class Digits(nn.Module):
    """Table 9, narrow."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.conv3, self.fc = nn.Conv2d(width, 1, 3, padding=1), nn.Linear(4, 10)

    def features(self, x: Tensor) -> list[Tensor]:
        first = F.max_pool2d(F.relu(self.conv1(x)), 2)
        second = F.max_pool2d(F.relu(self.conv2(first)), 2)
        return [x, first, second, F.relu(self.conv3(second))]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x)[-1].flatten(1))

    def back(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        inputs = self.features(x)
        third = F.relu(deconvolve(inputs[3], self.conv3))
        second = F.relu(deconvolve(twice(third), self.conv2))
        return list(zip(inputs, [F.relu(deconvolve(twice(second), self.conv1)), second, third], strict=False))


class Bits(nn.Module):
    """Table 7."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (12, 10, 7, 5, 4, 3, 2)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def features(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for layer in self.layers:
            found.append(torch.tanh(layer(found[-1])))
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[-1]

    def back(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        inputs = self.features(x)
        value, found = inputs[-1], []
        for layer in reversed(self.layers):
            value = torch.tanh((value - layer.bias) @ layer.weight)
            found.append(value)
        return list(zip(inputs, reversed(found), strict=False))


class Normed(nn.Module):
    """The scheme of Table 11: convolutions with batch norm and pooling; the last fully connected layer is not constrained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 4), (4, 6), (6, 5)))
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(4), nn.BatchNorm2d(6), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5 * 16, 3)
        for norm in (self.bn1, self.bn2, self.bn3):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def features(self, x: Tensor) -> list[Tensor]:
        first = F.relu(self.bn1(self.conv1(x)))
        second = F.max_pool2d(F.relu(self.bn2(self.conv2(first))), 2)
        return [x, first, second, F.relu(self.bn3(self.conv3(second)))]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x)[-1].flatten(1))

    def norm(self, value: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        if self.training:
            return F.batch_norm(value, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        return norm(value)

    def back(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        twin = copy.copy(self)
        inputs = twin.features(x)
        third = F.relu(self.norm(deconvolve(inputs[3], self.conv3), self.bn2))
        second = F.relu(self.norm(deconvolve(twice(third), self.conv2), self.bn1))
        return list(zip(inputs, [F.relu(deconvolve(second, self.conv1)), second, third], strict=False))


class Enlarging(nn.Module):
    """The scheme of Table 13: up-sampling forward, max-pooling back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(a, b, 5, padding=2) for a, b in ((1, 3), (3, 4), (4, 1)))
        self.up = nn.Upsample(scale_factor=2)

    def features(self, x: Tensor) -> list[Tensor]:
        first = self.up(F.relu(self.conv1(x)))
        second = self.up(F.relu(self.conv2(first)))
        return [x, first, second, F.relu(self.conv3(second))]

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[-1]

    def back(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        inputs = self.features(x)
        third = F.relu(deconvolve(inputs[3], self.conv3))
        second = F.relu(deconvolve(F.max_pool2d(third, 2), self.conv2))
        first = F.relu(deconvolve(F.max_pool2d(second, 2), self.conv1))
        return list(zip(inputs, [first, second, third], strict=False))


def by_hand(pairs: list[tuple[Tensor, Tensor]], weight: float) -> Tensor:
    return torch.stack([0.5 * weight * (own - back).square().sum() for own, back in pairs]).sum()


def compared(model: nn.Module, penalty: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(penalty, expected)
    parameters = list(model.parameters())
    own = torch.autograd.grad(penalty, parameters, allow_unused=True)
    reference = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert [g is None for g in own] == [g is None for g in reference]
    for a, b in zip(own, reference, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


TABLES = {
    "bits": (Bits, (12,), 6),
    "digits": (Digits, (1, 8, 8), 3),
    "normed": (Normed, (3, 8, 8), 3),
    "enlarging": (Enlarging, (1, 4, 4), 3),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", TABLES)
def test_it_is_the_papers_tables_written_out(name: str, training: bool) -> None:
    make, shape, layers = TABLES[name]
    torch.manual_seed(0)
    model = make().double()
    x = torch.rand(6, *shape, dtype=torch.float64)
    if name == "normed":
        model(x)  # running statistics that are not 0 and 1
    model.train(training)
    state = copy.deepcopy(model.state_dict())
    penalty = Racecar(model, x[:1], layers=layers, weight=0.3)
    found = penalty(x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert len(penalty.layers) == layers
    assert not penalty.held
    compared(model, found, by_hand(model.back(x), 0.3))


@pytest.mark.parametrize("name", TABLES)
def test_constraining_the_first_layers_starts_behind_them(name: str) -> None:
    make, shape, layers = TABLES[name]
    torch.manual_seed(1)
    model = make().double().eval()
    x = torch.rand(3, *shape, dtype=torch.float64)
    graph = trace(model, x[:1])
    whole, one = (Racecar(graph, layers=number, weight=1.0) for number in (layers, 1))
    assert one.layers == whole.layers[:1]
    assert one.regenerate(x).keys() == {"input", one.layers[0]}
    # the first alone goes back from its own output: not the same as the first of all
    assert not torch.allclose(one.regenerate(x)["input"], whole.regenerate(x)["input"])
    recorded, back = whole.recorded(x), whole.regenerate(x)
    assert recorded.keys() == back.keys()
    terms = [0.5 * (recorded[name] - back[name]).square().sum() for name in whole.layers]
    torch.testing.assert_close(whole(x), torch.stack(terms).sum())


@given(
    st.sampled_from([1, 2, 3]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.integers(5, 7),
)
@settings(max_examples=12, deadline=None)
def test_a_convolution_is_transposed_in_any_geometry(
    dims: int, kernel: int, stride: int, padding: int, dilation: int, groups: int, transposed: bool, size: int
) -> None:
    kinds = {
        False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    }
    padding = min(padding, (kernel - 1) * dilation) if transposed else padding
    layer = kinds[transposed][dims - 1](2, 4, kernel, stride, padding, dilation=dilation, groups=groups).double()
    x = torch.randn(2, 2, *[size] * dims, dtype=torch.float64)
    z = layer(x)
    with torch.no_grad():
        shift = layer.bias.view(-1, *[1] * dims)
    _, adjoint = torch.func.vjp(lambda a: layer(a), x)
    penalty = Racecar(layer, x[:1], weight=1.0, input_activation=None)
    torch.testing.assert_close(penalty.regenerate(x)["input"], adjoint(z.detach() - shift)[0])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Linear(5, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.outer(h + self.inner(h))


def test_a_sum_and_what_it_skips_are_transposed_as_one_matrix() -> None:
    torch.manual_seed(0)
    model = Residual().double()
    x = torch.randn(7, 5, dtype=torch.float64)
    penalty = Racecar(model, x[:1], weight=1.0, input_activation=None)
    matrix = model.outer.weight @ (torch.eye(4) + model.inner.weight) @ model.stem.weight
    torch.testing.assert_close(penalty.regenerate(x)["input"], (model(x) - model.outer.bias) @ matrix)
    assert penalty.layers == ("stem", "inner", "outer")
    penalty(x).backward()
    assert all(p.grad is not None for p in model.parameters())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 2, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


def test_branches_that_are_concatenated_are_one_matrix_and_a_copy_is_a_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Branches(), nn.Linear(5, 4, bias=False)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    stacked = torch.cat([model[0].left.weight, model[0].right.weight])
    back = Racecar(model, x[:1], weight=1.0, input_activation=None).regenerate(x)["input"]
    torch.testing.assert_close(back, model(x) @ model[1].weight @ stacked)

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3, bias=False), nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(torch.cat([x, self.inner(x)], 1))

    dense = Dense().double()
    for layer in (dense.inner, dense.outer):
        nn.init.orthogonal_(layer.weight)
    x = torch.randn(4, 3, dtype=torch.float64)
    back = Racecar(dense, x[:1], weight=1.0, input_activation=None)
    torch.testing.assert_close(back.regenerate(x)["input"], x)  # orthogonal layers regenerate, copies or not
    assert back(x).item() < 1e-20


def block(width: int) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)

    return Block()


def resnet() -> nn.Sequential:
    stem = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(
        *stem, block(4), nn.AvgPool2d(2), block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def test_a_residual_network_with_batch_norm_learns_to_give_its_input_back() -> None:
    torch.manual_seed(0)
    model, x = resnet().train(), torch.rand(16, 3, 8, 8)
    y = torch.randint(3, (16,))
    penalty = Racecar(model, x[:1], layers=5, weight=1.0, reduction="mean")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = penalty(x)
        (F.cross_entropy(model(x), y) + loss).backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.6 * seen[0]
    assert penalty.layers == ("0", "3.conv1", "3.conv2", "5.conv1", "5.conv2")


def test_one_pass_forward_gives_the_output_the_penalty_and_the_running_statistics() -> None:
    torch.manual_seed(0)
    model = resnet().double().train()
    twin = copy.deepcopy(model)
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    penalty = Racecar(model, x[:1], layers=3, weight=0.1)
    expected, apart = twin(x), Racecar(twin, x[:1], layers=3, weight=0.1)(x)
    output, value = penalty.with_output(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(value, apart)
    for (name, own), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, msg=name)


def test_dropout_in_train_mode_is_refused_where_the_passes_are_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    x = torch.randn(8, 4)
    penalty = Racecar(model, x[:1], weight=1.0)
    with pytest.raises(ValueError, match="dropout"):
        penalty.with_output(x)
    torch.testing.assert_close(penalty(x), penalty(x))
    output, _ = Racecar(model.eval(), x[:1], weight=1.0).with_output(x)
    torch.testing.assert_close(output, model(x))


@functools.cache
def digits() -> tuple[Graph, Tensor]:
    """Traced once, for the tests that change nothing of it."""
    torch.manual_seed(0)
    x = torch.rand(8, 1, 8, 8, dtype=torch.float64)
    return trace(Digits().double(), x[:1]), x


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("one_pass", [False, True], ids=["beside", "with output"])
def test_a_share_of_the_batch_estimates_the_whole(reduction: str, one_pass: bool) -> None:
    graph, x = digits()
    whole = Racecar(graph, layers=3, weight=1.0, reduction=reduction)(x).detach()
    penalty = Racecar(graph, layers=3, weight=1.0, reduction=reduction, share=0.25, seed=3)
    with torch.no_grad():
        drawn = torch.stack([penalty.with_output(x)[1] if one_pass else penalty(x) for _ in range(100)])
    assert drawn.std() > 0
    assert abs(drawn.mean() - whole) < 4 * drawn.std() / 100**0.5
    again = Racecar(graph, layers=3, weight=1.0, reduction=reduction, share=0.25, seed=3)
    torch.testing.assert_close((again.with_output(x)[1] if one_pass else again(x)).detach(), drawn[0])


def test_weights_per_layer_and_reductions() -> None:
    graph, x = digits()
    pairs = graph.model.back(x)
    halves = [0.5 * (own - back).square().sum() for own, back in pairs]
    by_name = Racecar(graph, layers=3, weight={"conv1": 1.0, "conv2": 2.0, "conv3": 3.0})(x)
    torch.testing.assert_close(by_name, halves[0] + 2 * halves[1] + 3 * halves[2])
    torch.testing.assert_close(Racecar(graph, layers=3, weight=[1.0, 2.0, 3.0])(x), by_name)
    means = [(own - back).square().mean() for own, back in pairs]
    mean = Racecar(graph, layers=["conv1", "conv2", "conv3"], weight=1.0, reduction="mean")(x)
    torch.testing.assert_close(mean, torch.stack(means).sum())


class Gated(nn.Module):
    """A transformer block and a gate: what is held is named, and everything that comes back is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.gate, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(len(x), 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), 5, 8)
        x = x + self.out(mixed)
        return self.last(F.gelu(x) * torch.sigmoid(self.gate(x)))


def test_attention_and_gates_are_held_and_named() -> None:
    torch.manual_seed(0)
    model, x = Gated().double(), torch.randn(3, 5, 8, dtype=torch.float64)
    penalty = Racecar(model, x[:1], weight=0.1, reduction="mean", input_activation=None)
    assert {"qkv", "out", "last"} <= set(penalty.layers)
    found = penalty(x)
    gradients = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    assert gradients[0] is not None
    direction = [torch.randn_like(p) for p in model.parameters()]
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            for p, d in zip(model.parameters(), direction, strict=True):
                p += sign * step * d
            values.append(penalty(x))
            for p, d in zip(model.parameters(), direction, strict=True):
                p -= sign * step * d
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), slope, rtol=1e-5, atol=1e-8)


def test_recurrent_layers_come_back_by_their_tangent() -> None:
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.lstm, self.out = nn.Linear(3, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(self.read(x))[0])

    model, x = Recurrent(), torch.randn(2, 6, 3)
    penalty = Racecar(model, x[:1], weight=1.0, input_activation=None)
    assert "read" in penalty.layers
    assert any("lstm" in name for name in penalty.held)
    penalty(x).backward()
    assert model.read.weight.grad is not None


def test_weights_that_are_computed_are_read_as_they_are_now() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3).double())
    x = torch.randn(5, 4, dtype=torch.float64)
    penalty = Racecar(nn.Sequential(layer), x[:1], weight=1.0, input_activation=None)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2.0)
    back = penalty.regenerate(x)["input"]
    torch.testing.assert_close(back, (layer(x) - layer.bias) @ layer.weight)
    penalty(x).backward()
    assert layer.parametrizations.weight.original0.grad is not None


def test_autocast_and_compile() -> None:
    torch.manual_seed(0)
    model, x = Digits(), torch.rand(4, 1, 8, 8)
    penalty = Racecar(model, x[:1], layers=3, weight=1.0, reduction="mean")
    whole = penalty(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = penalty(x)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, whole, rtol=0.05, atol=0.01)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean() + penalty(x)

    compiled = torch.compile(loss, backend="aot_eager")
    expected = torch.autograd.grad(loss(x), list(model.parameters()))
    found = torch.autograd.grad(compiled(x), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def _worker(rank: int, file: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Digits()
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    penalty = Racecar(model, x[:1], layers=3, weight=0.5, reduction="mean")
    ddp = DistributedDataParallel(model)
    own = slice(4 * rank, 4 * rank + 4)
    (F.cross_entropy(ddp(x[own]), y[own]) + penalty(x[own])).backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], out)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "gradients")
        mp.spawn(_worker, (os.path.join(folder, "meet"), out), nprocs=2)
        found = torch.load(out, weights_only=True)
    torch.manual_seed(0)
    model = Digits()
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    penalty = Racecar(model, x[:1], layers=3, weight=0.5, reduction="mean")
    (F.cross_entropy(model(x), y) + penalty(x)).backward()
    for own, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad)


def test_what_is_asked_wrongly_is_answered() -> None:
    graph, x = digits()
    with pytest.raises(ValueError, match="conv3"):
        Racecar(graph, layers=["conv0"], weight=1.0)
    with pytest.raises(ValueError, match="1 to 4"):
        Racecar(graph, layers=9, weight=1.0)
    with pytest.raises(ValueError, match="share"):
        Racecar(graph, weight=1.0, share=0.0)
    with pytest.raises(ValueError, match="expected 3, one for each of conv1, conv2, conv3"):
        Racecar(graph, layers=3, weight=[1.0])
    with pytest.raises(ValueError, match="conv2"):
        Racecar(graph, layers=3, weight={"conv1": 1.0, "conv3": 1.0})
    with pytest.raises(ValueError, match="mean"):
        Racecar(graph, weight=1.0, reduction="means")
    with pytest.raises(ValueError, match="nothing to constrain"):
        Racecar(nn.ReLU(), x[:1], weight=1.0)
    with pytest.raises(ValueError, match=r"traced as \(n, 1, 8, 8\)"):
        Racecar(graph, weight=1.0)(torch.rand(2, 1, 9, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match="example"):
        Racecar(graph.model, weight=1.0)
