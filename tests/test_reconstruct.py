"""``reconstruct``: both strategies against plain references, certificates, and what bad input gets."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import revprop
from revprop.errors import NonFiniteError, UnsupportedOperatorError
from revprop.linear_map import Dense
from revprop.networks import NETWORKS

F64 = torch.float64


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.Tanh, seed: int = 0, gain: float = 1.0) -> nn.Sequential:
    """Linear maps with an activation between them, in double precision; layer "0" is the first linear map. ``gain``
    times the usual initial weights: as in a trained network, other labels are then near."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    net = nn.Sequential(*layers[:-1]).double().eval()
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(gain)
    return net


def rest(net: nn.Sequential, layer: str) -> nn.Module:
    """What comes behind a layer of a plain chain."""
    return net if layer == "input" else nn.Identity() if layer == "output" else net[int(layer) + 1 :]


def norm(x: Tensor) -> Tensor:
    return x.detach().flatten(1).norm(dim=1)


def gap(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the label wins over the best other class."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


class Gated(nn.Module):
    """Operators without a greedy rule: a softmax and a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(6, 6), nn.Softmax(dim=1))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(h * self.gate(h))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(self.branch(h) + h)


class Swapped(nn.Module):
    """A sequence that comes first within, and a flip, whose rule reads sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.head(x.flip(2).flatten(1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 5), nn.Linear(2, 5), nn.Linear(10, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(a).tanh(), self.right(b).tanh()], 1))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).mean(1).tanh())


# -- greedy: fixed point ---------------------------------------------------------------------------------------------

FIXED_POINTS = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar10-reversed": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "tiny-imagenet": (3, 64, 64),
    "imagenette": (3, 224, 224),
    "resnet20": (3, 32, 32),
    "cifar10-simple-cnn": (3, 32, 32),
}


def lively(name: str) -> nn.Module:
    """A network of the library in eval mode, its batch norms with statistics of their own."""
    net = NETWORKS[name](seed=0).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net


@pytest.mark.parametrize("name", FIXED_POINTS)
def test_own_output_returns_own_features_at_every_layer(name: str) -> None:
    net = lively(name).double()
    large = FIXED_POINTS[name][-1] > 64
    x = torch.randn(1 if large else 2, *FIXED_POINTS[name], dtype=F64)
    own = net(x).detach()
    graph = revprop.trace(net, x)
    for damping, solver in ((0.0, "fft"), (0.01, "fft")) if large else ((0.0, "fft"), (0.01, "exact")):
        rec = revprop.reconstruct(graph, x, target=own, strategy="greedy", damping=damping, solver=solver)
        assert set(rec) == set(graph.layers)
        for layer in rec:
            torch.testing.assert_close(rec[layer], rec.recorded[layer], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["cifar10", "resnet20"])
def test_own_output_returns_own_features_in_single_precision(name: str) -> None:
    net = lively(name)
    x = torch.randn(2, 3, 32, 32)
    rec = revprop.reconstruct(net, x, target=net(x).detach(), strategy="greedy", damping=0.01)
    for layer in rec:
        torch.testing.assert_close(rec[layer], rec.recorded[layer], rtol=0, atol=1e-4)


# -- greedy: values --------------------------------------------------------------------------------------------------


def walk_back(net: nn.Sequential, x: Tensor, wanted: Tensor, damping: float, keep: float) -> dict[str, Tensor]:
    """FR-PT for a chain of linear maps and tanh: layer -> wanted features. ``keep``: tanh targets stay within it."""
    recorded = [x]
    for module in net:
        recorded.append(module(recorded[-1]).detach())
    found = {"output": wanted, str(len(net) - 1): wanted}
    for i in reversed(range(len(net))):
        module, a, z = net[i], recorded[i], recorded[i + 1]
        if isinstance(module, nn.Linear):
            w = module.weight.detach()
            mu = damping * torch.linalg.matrix_norm(w, 2) ** 2
            change = wanted - z
            small = torch.linalg.solve(w @ w.T + mu * torch.eye(len(w), dtype=F64), change.T)
            wanted = a + (small.T @ w if damping else (torch.linalg.pinv(w) @ change.T).T)
        else:
            wanted = wanted.clamp(-keep, keep).atanh()
        found["input" if i == 0 else str(i - 1)] = wanted
    return found


@pytest.mark.parametrize("rules", ["nearest", "paper"])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_greedy_walks_a_chain_like_the_formulae(rules: Any, damping: float) -> None:
    net = mlp(6, 5, 4, 3)
    x, target = torch.randn(7, 6, dtype=F64), torch.randn(7, 3, dtype=F64)
    expected = walk_back(net, x, target, 0.0 if rules == "paper" else damping, 0.998)
    rec = revprop.reconstruct(net, x, target=target, strategy="greedy", rules=rules, damping=damping)
    assert set(rec) == set(expected)
    for layer in rec:
        torch.testing.assert_close(rec[layer], expected[layer], rtol=1e-8, atol=1e-8)
        assert rec.certificates[layer].damping == (0.0 if rules == "paper" else damping)


def test_greedy_features_give_the_wanted_output_where_every_step_has_a_preimage() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.LeakyReLU(0.3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 4)).double()
    x = torch.randn(5, 3, 6, 6, dtype=F64)
    target = torch.randn(5, 4, dtype=F64) * 5
    rec = revprop.reconstruct(net, x, target=target, strategy="greedy", damping=0.0, solver="exact")
    for layer, certificate in rec.certificates.items():
        assert float(certificate.residual.max()) < 1e-8, layer
        assert bool(certificate.reached.all())


def test_a_residual_addition_shares_the_correction_and_a_fan_out_takes_the_mean() -> None:
    net = Residual().double()
    x, target = torch.randn(6, 4, dtype=F64), torch.randn(6, 3, dtype=F64)
    rec = revprop.reconstruct(net, x, target=target, strategy="greedy", damping=0.0)
    at_sum = (target - net(x).detach()) @ torch.linalg.pinv(net.head.weight.detach()).T
    by_branch = (at_sum / 2) @ torch.linalg.pinv(net.branch.weight.detach()).T
    torch.testing.assert_close(rec["branch"] - rec.recorded["branch"], at_sum / 2)
    torch.testing.assert_close(rec["stem"] - rec.recorded["stem"], (by_branch + at_sum / 2) / 2)


def test_a_batch_that_is_moved_and_moved_back_is_reversed_for_every_batch_size() -> None:
    net = Swapped().double()
    graph = revprop.trace(net, torch.zeros(2, 3, 4, dtype=F64))
    shapes = {module: shape for _, module, shape, _, _ in revprop.check(graph).rows}
    assert shapes["body"] == "(3, n, 4)"
    for n in (2, 3, 5):
        x, target = torch.randn(n, 3, 4, dtype=F64), torch.randn(n, 2, dtype=F64)
        rec = revprop.reconstruct(graph, x, target=target, to="input", strategy="greedy", damping=0.0)
        torch.testing.assert_close(net(rec["input"]), target)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_rank_deficient_weights_are_solved_and_the_certificate_says_so(damping: float) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    with torch.no_grad():
        net[0].weight[0] = 0
        net[0].weight[3] = net[0].weight[1]
        net[1].weight[2] = 2 * net[1].weight[0]
    x, target = torch.randn(4, 5, dtype=F64), torch.randn(4, 3, dtype=F64)
    rec = revprop.reconstruct(net, x, target=target, to=["0", "input"], strategy="greedy", damping=damping)
    maps = rec.certificates["input"].maps
    assert [(m.operator, m.module, m.solver, m.rank, m.size) for m in maps] == [
        ("linear.default", "0", "dense", 2, (4, 5)),
        ("linear.default", "1", "dense", 2, (3, 4)),
    ]
    weights = [layer.weight.detach() for layer in net]
    expected_mu = [damping * float(torch.linalg.matrix_norm(w, 2)) ** 2 for w in weights]
    assert [m.damping for m in maps] == pytest.approx(expected_mu)
    assert [m.module for m in rec.certificates["0"].maps] == ["1"]
    if damping == 0:
        least = torch.linalg.lstsq(weights[1], (target - net(x).detach()).T, driver="gelsd").solution
        torch.testing.assert_close(rec["0"] - rec.recorded["0"], least.T)
        expected = torch.linalg.lstsq(weights[0], least, driver="gelsd").solution.T
        torch.testing.assert_close(rec["input"] - x, expected)


def test_solvers_are_named_in_the_certificate() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randn(2, 2, 4, 4, dtype=F64)
    for solver, rank in (("fft", None), ("exact", 12)):
        rec = revprop.reconstruct(net, x, target=net(x) + 1, strategy="greedy", damping=0.0, solver=solver)
        first = rec.certificates["input"].maps[0]
        assert (first.solver, first.rank) == ("fft" if solver == "fft" else "dense", rank)
        assert rec.certificates["input"].solver == solver


# -- global: minimality ----------------------------------------------------------------------------------------------


def nearest_by_slsqp(
    tail: Callable[[Tensor], Tensor], recorded: Tensor, starts: int, label: int = 0, target: Tensor | None = None
) -> float:
    """The shortest distance to a label's region, or to a target, that a general constrained optimiser finds: from the
    recorded features, and from points around them."""
    origin, best = recorded.numpy(), np.inf

    def values(a: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            out = tail(torch.from_numpy(a)[None])[0]
        return ((out[label] - out)[torch.arange(len(out)) != label] if target is None else out - target).numpy()

    def slopes(a: np.ndarray) -> np.ndarray:
        jacobian = torch.autograd.functional.jacobian(lambda b: tail(b[None])[0], torch.from_numpy(a))
        rows = (jacobian[label] - jacobian)[torch.arange(len(jacobian)) != label] if target is None else jacobian
        return rows.numpy()

    generator = np.random.default_rng(0)
    for i in range(starts):
        found = scipy.optimize.minimize(
            lambda a: 0.5 * ((a - origin) ** 2).sum(),
            origin + 0.1 * i * generator.standard_normal(origin.shape),
            jac=lambda a: a - origin,
            constraints={"type": "ineq" if target is None else "eq", "fun": values, "jac": slopes},
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 300},
        )
        miss = max(-values(found.x).min(), 0) if target is None else np.abs(values(found.x)).max()
        if miss < 1e-6:
            best = min(best, float(np.linalg.norm(found.x - origin)))
    return best


def lengths_against_slsqp(net: nn.Sequential, layer: str, starts: int) -> list[tuple[float, float]]:
    """(length of the reconstruction, shortest by SLSQP) for the second best label of samples for which it is near,
    relative to the features; an unreached label counts as infinitely far."""
    x = torch.randn(20, 6, dtype=F64)
    labels = net(x).topk(2).indices[:, 1]
    rec = revprop.reconstruct(net, x, labels, to=layer, tolerance=1e-3)
    tail, size = rest(net, layer), norm(rec.recorded[layer])
    won = gap(tail(rec[layer]), labels) >= -1e-9
    lengths = torch.where(won, norm(rec[layer] - rec.recorded[layer]), torch.inf) / size
    found = []
    for i in range(20):
        best = nearest_by_slsqp(tail, rec.recorded[layer][i].detach(), starts, int(labels[i])) / float(size[i])
        if best < 0.3:
            found.append((float(lengths[i]), best))
    return found


@pytest.mark.parametrize(
    ("act", "layers", "starts", "reached", "nearest"),
    [
        (nn.Tanh, ("input", "0", "1", "2"), 3, 1.0, 0.95),
        (nn.Softplus, ("input", "1"), 2, 1.0, 0.95),
        # with kinks both searches are local, and a step into a dead region ends one
        (nn.ReLU, ("0", "2"), 1, 0.9, 0.9),
    ],
)
def test_global_features_for_a_label_are_as_near_as_a_general_optimisers(
    act: type[nn.Module], layers: tuple[str, ...], starts: int, reached: float, nearest: float
) -> None:
    found = [
        pair
        for seed in range(2)
        for layer in layers
        for pair in lengths_against_slsqp(mlp(6, 8, 5, 4, act=act, seed=seed, gain=3.0), layer, starts)
    ]
    assert len(found) >= 15
    assert sum(length < torch.inf for length, _ in found) >= reached * len(found)
    assert sum(length <= 1.01 * best for length, best in found) >= nearest * len(found)


def test_accumulated_steps_are_shortened_once_the_label_is_reached() -> None:
    net = mlp(6, 8, 5, 4, seed=2, gain=3.0)
    x = torch.randn(20, 6, dtype=F64)[6:7]
    label = net(x).topk(2).indices[:, 1]
    rec = revprop.reconstruct(net, x, label, to="0", tolerance=1e-3)
    steps = rec.certificates["0"].steps
    assert steps is not None
    assert int(steps) > 4  # so many project the recorded features; then steps accumulate
    best = nearest_by_slsqp(net[1:], rec.recorded["0"][0].detach(), 1, int(label))
    assert float(norm(rec["0"] - rec.recorded["0"])) <= 1.04 * best


@pytest.mark.parametrize("act", [nn.Tanh, nn.Softplus])
@pytest.mark.parametrize("layer", ["input", "0", "1", "2"])
def test_global_features_for_a_target_are_the_nearest(act: type[nn.Module], layer: str) -> None:
    net = mlp(7, 9, 6, 3, act=act, seed=5)
    torch.manual_seed(2)
    x = torch.randn(8, 7, dtype=F64)
    target = net(x + 0.5 * torch.randn_like(x)).detach()
    rec = revprop.reconstruct(net, x, target=target, to=layer, tolerance=1e-3)
    tail = rest(net, layer)
    assert bool((norm(tail(rec[layer]) - target) <= 1e-5 * norm(net(x) - target) + 1e-9).all())
    lengths = norm(rec[layer] - rec.recorded[layer])
    for i in range(8):
        best = nearest_by_slsqp(tail, rec.recorded[layer][i].detach(), 3, target=target[i])
        assert float(lengths[i]) <= 1.01 * best, i


def test_global_features_in_front_of_a_linear_map_are_a_projection() -> None:
    net = mlp(5, 6, 2)
    x = torch.randn(9, 5, dtype=F64)
    labels = torch.randint(0, 2, (9,))
    rec = revprop.reconstruct(net, x, labels, to="1", tolerance=1e-4)
    normal = net[2].weight[1] - net[2].weight[0]
    sign = labels.to(F64) * 2 - 1
    missing = (-gap(net(x), labels)).clamp_min(0) / (normal @ normal)
    torch.testing.assert_close(
        rec["1"], (rec.recorded["1"] + (sign * missing)[:, None] * normal).detach(), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("margin", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("strategy", ["global", "greedy"])
def test_the_label_wins_by_the_margin(strategy: Any, margin: float) -> None:
    net = mlp(8, 7, 4, act=lambda: nn.LeakyReLU(0.3), gain=4.0)
    x = torch.randn(10, 8, dtype=F64)
    labels = net(x).topk(2).indices[:, 1]
    rec = revprop.reconstruct(net, x, labels, strategy=strategy, margin=margin, damping=0.0)
    for layer, certificate in rec.certificates.items():
        assert bool((gap(rest(net, layer)(rec[layer]), labels) >= margin - 1e-6).all()), layer
        assert bool(certificate.reached.all())
        assert float(certificate.residual.max()) < 1e-6


@pytest.mark.parametrize("outputs", [70, 130])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_targets_with_many_outputs_are_met(outputs: int, scale: float) -> None:
    net = nn.Sequential(nn.Linear(200, 160), nn.Tanh(), nn.Linear(160, outputs)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    x = torch.randn(3, 200, dtype=F64)
    target = net(x + 0.2 * torch.randn_like(x)).detach()
    rec = revprop.reconstruct(net, x, target=target, to="0", tolerance=1e-3)
    certificate = rec.certificates["0"]
    assert bool(certificate.reached.all())
    assert bool((norm(net[1:](rec["0"]) - target) <= 1e-4 * norm(net(x) - target)).all())
    # a tanh away from its ends is nearly linear: the correction of one pseudo-inverse is about as long
    jacobian = net[2].weight.detach() * (1 - rec.recorded["0"].tanh() ** 2)[:, None, :]
    step = torch.linalg.pinv(jacobian) @ (target - net(x)).detach().unsqueeze(-1)
    assert bool((norm(rec["0"] - rec.recorded["0"]) <= 1.3 * norm(step)).all())


def test_targets_with_many_outputs_are_met_behind_a_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 70)).double()
    x = torch.randn(5, 1, 8, 8, dtype=F64)
    target = net(x + 0.3 * torch.randn_like(x)).detach()
    rec = revprop.reconstruct(net, x, target=target, to="1")
    assert bool(rec.certificates["1"].reached.all())
    step = torch.linalg.pinv(net[3].weight.detach()) @ (target - net(x)).detach().unsqueeze(
        -1
    )  # what is behind is linear
    torch.testing.assert_close(norm(rec["1"] - rec.recorded["1"]), norm(step), rtol=1e-3, atol=0)


@pytest.mark.parametrize("outputs", [20, 70])
def test_a_target_is_met_from_features_of_zeros(outputs: int) -> None:
    """Zeros set no scale for the first step; and many outputs, some of which hardly change, are met all the same."""
    torch.manual_seed(3)
    act = nn.LeakyReLU(0.3)
    net = nn.Sequential(nn.Linear(300, 240), act, nn.Linear(240, 200), act, nn.Linear(200, outputs)).double()
    with torch.no_grad():
        net[4].weight.mul_(torch.logspace(0, -1, outputs, dtype=F64)[:, None])
    zeros = torch.zeros(4, 300, dtype=F64)
    target = net(torch.rand(4, 300, dtype=F64)).detach()
    rec = revprop.reconstruct(net, zeros, target=target, to="input")
    assert bool(rec.certificates["input"].reached.all())
    assert bool((norm(net(rec["input"]) - target) <= 1e-3 * norm(net(zeros) - target)).all())


def test_images_reach_another_label_through_a_residual_network() -> None:
    net = lively("resnet20")
    x = torch.randn(4, 3, 32, 32)
    labels = net(x).topk(2).indices[:, 1]
    rec = revprop.reconstruct(net, x, labels, to=["layer3.1.conv1", "layer1.2"])
    for certificate in rec.certificates.values():
        assert bool(certificate.reached.all())
        assert certificate.steps is not None
        assert int(certificate.steps.max()) <= 16


# -- what stays as it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["global", "greedy"])
def test_samples_that_are_right_already_are_not_touched(strategy: Any) -> None:
    net = mlp(5, 6, 3)
    x = torch.randn(10, 5, dtype=F64)
    labels = net(x).argmax(1)
    labels[:4] = (labels[:4] + 1) % 3
    rec = revprop.reconstruct(net, x, labels, strategy=strategy)
    for layer in rec:
        torch.testing.assert_close(rec[layer][4:], rec.recorded[layer][4:], rtol=0, atol=0)
        assert bool((norm(rec[layer] - rec.recorded[layer])[:4] > 0).all())
    assert not rec.deviation["input"][4:].any()
    if strategy == "global":
        steps = rec.certificates["0"].steps
        assert steps is not None
        assert bool((steps[:4] > 0).all())
        assert not steps[4:].any()


def test_samples_that_are_right_already_cost_no_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp(5, 6, 3)
    x = torch.randn(10, 5, dtype=F64)
    graph = revprop.trace(net, x)
    labels = net(x).argmax(1)
    rows: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda out, *args, **options: rows.append(len(out)) or grad(out, *args, **options)
    )
    revprop.reconstruct(graph, x, labels, to="0")
    assert rows == []
    labels[:2] = (labels[:2] + 1) % 3
    revprop.reconstruct(graph, x, labels, to="0")
    assert rows
    assert max(rows) == 2


# -- certificates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["global", "greedy"])
@pytest.mark.parametrize("embedding", ["nearest", "maximum", "one_hot"])
def test_certificates_hold_what_running_the_rest_of_the_network_gives(strategy: Any, embedding: Any) -> None:
    net = mlp(5, 6, 4, 3, act=nn.ReLU, seed=2)
    x, labels = torch.randn(20, 5, dtype=F64), torch.randint(0, 3, (20,))
    rec = revprop.reconstruct(net, x, labels, strategy=strategy, embedding=embedding, margin=0.1)
    with torch.no_grad():
        torch.testing.assert_close(rec.output, net(x))
        wanted = revprop.embed_labels(net(x), labels, embedding, 0.1)
    torch.testing.assert_close(rec.wanted, wanted)
    assert list(rec) == ["input", "0", "1", "2", "3", "4", "output"]
    assert list(rec.certificates) == list(rec)
    assert len(rec) == len(rec.certificates) == 7
    for layer in rec:
        tail, certificate = rest(net, layer), rec.certificates[layer]
        outputs = tail(rec[layer]).detach()
        goal = revprop.embed_labels(outputs, labels, "nearest", 0.1) if embedding == "nearest" else wanted
        torch.testing.assert_close(certificate.residual, norm(outputs - goal))
        slack = 1e-4 * outputs.abs().amax(1).clamp_min(1.0)
        assert torch.equal(certificate.reached, gap(outputs, labels) >= -slack)
        torch.testing.assert_close(
            rec.recorded[layer],
            (net[: int(layer) + 1](x) if layer.isdigit() else net(x) if layer == "output" else x).detach(),
        )
        deviation = norm(rec[layer] - rec.recorded[layer]) / norm(rec.recorded[layer])
        torch.testing.assert_close(certificate.deviation, deviation)
        torch.testing.assert_close(rec.deviation[layer], deviation)
        assert certificate.strategy == strategy
        assert (certificate.steps is None) == (strategy == "greedy")
        assert str(certificate).startswith(f"reached {int(certificate.reached.sum())} of 20, mean residual ")


def test_a_target_that_no_features_give_is_certified_as_missed() -> None:
    net = nn.Sequential(*mlp(5, 6, 3), nn.ReLU())
    x = torch.randn(6, 5, dtype=F64)
    target = torch.full((6, 3), -1.0, dtype=F64)
    for strategy in ("global", "greedy"):
        rec = revprop.reconstruct(net, x, target=target, to="0", strategy=strategy)
        certificate = rec.certificates["0"]
        assert not certificate.reached.any()
        assert bool((certificate.residual >= 3**0.5 - 1e-9).all())
        assert bool(torch.isfinite(rec["0"]).all())


def test_certificates_hold_what_by_passes_a_layer() -> None:
    net = Residual().double()
    x, labels = torch.randn(6, 4, dtype=F64), torch.randint(0, 3, (6,))
    rec = revprop.reconstruct(net, x, labels, to="branch", tolerance=1e-3)
    outputs = net.head(rec["branch"] + rec.recorded["stem"] if "stem" in rec else rec["branch"] + net.stem(x))
    assert bool((gap(outputs, labels) >= -1e-9).all())
    torch.testing.assert_close(rec.certificates["branch"].residual, torch.zeros(6, dtype=F64), rtol=0, atol=1e-9)


# -- shapes of the call ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["global", "greedy"])
def test_to_takes_a_layer_a_list_or_none(strategy: Any) -> None:
    net = mlp(4, 5, 3)
    graph = revprop.trace(net, torch.zeros(1, 4, dtype=F64))
    x, labels = torch.randn(6, 4, dtype=F64), torch.randint(0, 3, (6,))
    everything = revprop.reconstruct(graph, x, labels, strategy=strategy)
    assert tuple(everything) == graph.layers
    assert tuple(revprop.reconstruct(graph, x, labels, to="1", strategy=strategy)) == ("1",)
    some = revprop.reconstruct(net, x, labels, to=["1", "input"], strategy=strategy)
    assert tuple(some) == ("1", "input")
    for layer in some:
        torch.testing.assert_close(some[layer], everything[layer], rtol=0, atol=0)
    with pytest.raises(KeyError, match="unknown layer of this reconstruction '0'"):
        some["0"]


@pytest.mark.parametrize("goal", ["labels", "target"])
@pytest.mark.parametrize("strategy", ["global", "greedy"])
def test_results_do_not_depend_on_the_batch_size_and_repeat_exactly(strategy: Any, goal: str) -> None:
    net = mlp(6, 7, 5, 4, act=nn.ReLU)
    x = torch.randn(11, 6, dtype=F64)
    wanted = {"labels": torch.randint(0, 4, (11,))} if goal == "labels" else {"target": torch.randn(11, 4, dtype=F64)}
    graph = revprop.trace(net, x)
    whole = revprop.reconstruct(graph, x, **wanted, strategy=strategy)
    again = revprop.reconstruct(net, x, **wanted, strategy=strategy)
    close = 1e-6 if strategy == "global" else 1e-12  # a search repeats rounding errors of batched solvers
    for size in (1, 4, 11):
        parts = revprop.reconstruct(graph, x, **wanted, strategy=strategy, batch_size=size)
        for layer in whole:
            torch.testing.assert_close(parts[layer], whole[layer], rtol=close, atol=close)
            for name in ("residual", "deviation"):
                of_parts, of_whole = (getattr(r.certificates[layer], name) for r in (parts, whole))
                torch.testing.assert_close(of_parts, of_whole, rtol=close, atol=close)
            assert torch.equal(parts.certificates[layer].reached, whole.certificates[layer].reached)
        torch.testing.assert_close(parts.wanted, whole.wanted)
    for layer in whole:
        assert torch.equal(again[layer], whole[layer])


@pytest.mark.parametrize("strategy", ["global", "greedy"])
def test_no_samples_give_no_features(strategy: Any) -> None:
    net = NETWORKS["digits"](seed=0)
    rec = revprop.reconstruct(net, torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), strategy=strategy)
    assert rec["conv1"].shape == (0, 4, 3, 3)
    assert rec.certificates["conv1"].residual.shape == (0,)
    assert str(rec.certificates["conv1"]).startswith("reached 0 of 0")


@pytest.mark.parametrize("strategy", ["global", "greedy"])
def test_a_network_with_two_inputs(strategy: Any) -> None:
    net = TwoInputs().double()
    a, b = torch.randn(6, 3, dtype=F64), torch.randn(6, 2, dtype=F64)
    labels = torch.randint(0, 3, (6,))
    rec = revprop.reconstruct(net, (a, b), labels, strategy=strategy, damping=0.0)
    assert rec["input:a"].shape == a.shape
    assert rec["input:b"].shape == b.shape
    for layer, outputs in (("input:a", net(rec["input:a"], b)), ("input:b", net(a, rec["input:b"]))):
        goal = revprop.embed_labels(outputs.detach(), labels)
        torch.testing.assert_close(rec.certificates[layer].residual, norm(outputs - goal))
    if strategy == "global":
        assert bool((gap(net(rec["input:a"], b), labels) >= -1e-9)[rec.certificates["input:a"].reached].all())


def test_features_that_are_indices_cannot_be_reconstructed_but_those_behind_them_can() -> None:
    net = Tokens().double()
    x, labels = torch.randint(0, 7, (5, 3)), torch.randint(0, 3, (5,))
    rec = revprop.reconstruct(net, x, labels)
    assert tuple(rec) == ("embedding", "head", "output")
    assert bool(rec.certificates["embedding"].reached.all())
    assert bool(
        revprop.reconstruct(net, x, labels, to="embedding", strategy="greedy").certificates["embedding"].reached.any()
    )
    with pytest.raises(ValueError, match=r"layer 'input' holds torch.int64: only floating point features"):
        revprop.reconstruct(net, x, labels, to="input")


def test_dropout_and_batch_norm_in_training_mode_do_not_matter() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x, labels = torch.randn(8, 4, dtype=F64), torch.randint(0, 3, (8,))
    net(x)
    for strategy in ("global", "greedy"):
        trained = revprop.reconstruct(net.train(), x, labels, strategy=strategy)
        evaluated = revprop.reconstruct(net.eval(), x, labels, strategy=strategy)
        for layer in trained:
            assert torch.equal(trained[layer], evaluated[layer])


# -- what bad input gets ---------------------------------------------------------------------------------------------


def calls(**changes: Any) -> dict[str, Any]:
    """A call that works, with some of its arguments changed."""
    return {
        "model": mlp(4, 5, 3),
        "x": torch.zeros(6, 4, dtype=F64),
        "labels": torch.zeros(6, dtype=torch.int64),
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "greedi"}, "unknown strategy 'greedi'; did you mean 'greedy'"),
        ({"embedding": "maximal"}, "unknown embedding 'maximal'; did you mean 'maximum'"),
        ({"strategy": "greedy", "rules": "papers"}, "unknown rules 'papers'; did you mean 'paper'"),
        ({"strategy": "greedy", "solver": "ftt"}, "unknown solver 'ftt'; did you mean 'fft'"),
        ({"to": "3"}, r"unknown layer '3'; known: 'input', '0', '1', '2', 'output'"),
        ({"to": ["1", "outputs"]}, "unknown layer 'outputs'; did you mean 'output'"),
        ({"damping": -0.1}, "damping: expected a number >= 0, .*given -0.1"),
        ({"damping": float("nan")}, "damping: expected a number >= 0"),
        ({"rules": "paper"}, 'rules="paper" is the published greedy walk: pass strategy="greedy"'),
        ({"batch_size": 0}, "batch_size: expected a number of samples >= 1; given 0"),
        ({"tolerance": 0.0}, "tolerance: expected a number > 0; given 0.0"),
        ({"margin": float("inf")}, "margin: expected a finite number; given inf"),
        ({"labels": None}, "give either labels=<class indices> or target=<wanted output>"),
        ({"target": torch.zeros(6, 3)}, "give either labels=<class indices> or target=<wanted output>"),
        ({"labels": torch.full((6,), 3)}, "labels: expected 0 to 2 for 3 outputs; given 3 to 3"),
        ({"labels": torch.zeros(6)}, "labels: expected int64 class indices, given torch.float32"),
        ({"labels": [0] * 6}, "labels: expected a tensor .* given a list"),
        (
            {"labels": torch.zeros(8, dtype=torch.int64), "batch_size": 3},
            r"expected shape \(6,\), one per sample; given \(8,\)",
        ),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"expected shape \(6,\), one per sample; given \(5,\)"),
        (
            {"labels": None, "target": torch.zeros(6, 4)},
            r"target: expected the output's shape \(6, 3\); given \(6, 4\)",
        ),
        (
            {"labels": None, "target": torch.zeros(6, 3, dtype=torch.int64)},
            "expected floating point values, .* labels=",
        ),
        ({"x": torch.zeros(6, 5, dtype=F64)}, r"traced as \(n, 4\); given: \(6, 5\)"),
        ({"model": torch.relu}, "model: expected a torch.nn.Module or a revprop.Graph, given builtin_function"),
    ],
)
def test_calls_that_cannot_work_say_what_was_expected_and_given(changes: dict[str, Any], message: str) -> None:
    arguments = calls(**changes)
    if "x" in changes:
        arguments["model"] = revprop.trace(arguments["model"], torch.zeros(1, 4, dtype=F64))
    with pytest.raises(ValueError, match=message):
        revprop.reconstruct(**arguments)


@pytest.mark.parametrize("strategy", ["global", "greedy"])
def test_nan_and_infinity_are_refused_by_name(strategy: Any) -> None:
    x = torch.zeros(6, 4, dtype=F64)
    x[2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="input 'input' holds 1 of 24 values"):
        revprop.reconstruct(**calls(x=x, strategy=strategy))
    target = torch.zeros(6, 3, dtype=F64)
    target[0] = torch.inf
    with pytest.raises(NonFiniteError, match="target holds 3 of 18 values"):
        revprop.reconstruct(**calls(labels=None, target=target, strategy=strategy))
    broken = mlp(4, 5, 3)
    with torch.no_grad():
        broken[2].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"parameter '2.weight' holds 1 of 15 values"):
        revprop.reconstruct(**calls(model=broken, strategy=strategy))
    diverged = nn.Sequential(nn.BatchNorm1d(4), mlp(4, 3)).double()
    diverged[0].running_mean[0] = torch.nan
    for wanted in ({}, {"labels": None, "target": torch.zeros(6, 3, dtype=F64)}):
        with pytest.raises(NonFiniteError, match="the network's output on this input holds 18 of 18 values"):
            revprop.reconstruct(**calls(model=diverged, strategy=strategy, **wanted))


class CentredHead(nn.Linear):
    def forward(self, a: Tensor) -> Tensor:
        return super().forward(a - a.mean(0, keepdim=True))


class Centred(nn.Module):
    """Subtracts the mean of the batch twice: samples depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), CentredHead(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.body(x))
        return self.head(a - a.mean(0, keepdim=True))


def test_operators_without_a_rule_are_refused_all_at_once_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = revprop.trace(Centred(), torch.zeros(1, 4))
    x, labels = torch.randn(5, 4), torch.randint(0, 3, (5,))

    def work(*args: object) -> None:
        raise AssertionError("computed something")

    with monkeypatch.context() as patch:
        patch.setattr(Dense, "factor", work)
        patch.setattr(revprop.Graph, "segment", work)
        with pytest.raises(UnsupportedOperatorError) as caught:
            revprop.reconstruct(graph, x, labels, strategy="greedy")
    assert [row[:3] for row in caught.value.operators] == [
        ("mean.dim", "", "(1, 6)"),
        ("sub.Tensor", "", "(n, 6)"),
        ("mean.dim", "head", "(1, 6)"),
        ("sub.Tensor", "head", "(n, 6)"),
    ]
    for words in (
        "4 operators have no reverse rule",
        "mean.dim in the model itself",
        "mean.dim in head",
        'strategy="global"',
    ):
        assert words in str(caught.value)
    behind = revprop.reconstruct(graph, x, labels, to="head", strategy="greedy")
    assert bool(behind.certificates["head"].reached.all())
    coverage = revprop.check(graph)
    assert not coverage.covered
    assert "no rule: it mixes samples" in str(coverage)
    assert str(coverage).splitlines()[-1].startswith('3 of 7 operators covered: strategy="global" works on all layers')


def test_the_global_strategy_needs_no_rules() -> None:
    net = Gated().double()
    x, labels = torch.randn(8, 4, dtype=F64), torch.randint(0, 3, (8,))
    rec = revprop.reconstruct(net, x, labels, to=["body", "gate.0", "gate"])
    gated = net.body(x) * rec["gate"]
    outputs = {
        "body": net.head(rec["body"] * net.gate(rec["body"])),
        "gate.0": net.head(net.body(x) * rec["gate.0"].softmax(1)),
        "gate": net.head(gated),
    }
    for layer, out in outputs.items():
        reached = rec.certificates[layer].reached
        assert torch.equal(reached, gap(out, labels) >= -1e-4 * out.abs().amax(1).clamp_min(1.0))
    assert bool(rec.certificates["gate"].reached.all())


def test_check_lists_every_operator_with_what_reverses_it() -> None:
    coverage = revprop.check(Gated(), torch.zeros(1, 4))
    assert coverage.covered
    assert [(op, path, kind) for op, path, _, kind, _ in coverage.rows] == [
        ("linear.default", "body.0", "closed form"),
        ("tanh.default", "body.1", "closed form"),
        ("linear.default", "gate.0", "closed form"),
        ("softmax.int", "gate.1", "closed form"),
        ("mul.Tensor", "", "closed form"),
        ("linear.default", "head", "closed form"),
    ]
    lines = str(coverage).splitlines()
    assert lines[0].split() == ["operator", "module", "output", "reverse"]
    assert lines[5] == "mul.Tensor      -       (n, 6)  closed form"
    assert lines[-1] == "6 of 6 operators covered: everything is covered"
    assert str(revprop.check(mlp(3, 2), torch.zeros(1, 3, dtype=F64))).endswith("everything is covered")
    with pytest.raises(ValueError, match="a module is traced with an example input: give one"):
        revprop.check(Gated())


# -- a trained network -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "longest"), [("layer3.1.conv1", 0.02), ("layer2.1.conv1", 0.02), ("layer1.2", 0.01), ("conv1", 0.01)]
)
def test_true_labels_through_a_trained_residual_network(data_root: Path, layer: str, longest: float) -> None:
    weights, images = (
        data_root / "checkpoints/cifar10_resnet20.safetensors",
        data_root / "cifar10/cifar10_lossless_subset.npz",
    )
    if not (weights.is_file() and images.is_file()):
        pytest.skip(f"no {weights.name} or {images.name} in {data_root}")
    net = NETWORKS["resnet20"]()
    net.load_state_dict(load_file(weights))
    data = np.load(images)
    x = torch.tensor(data["x_test"][:200]).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    rec = revprop.reconstruct(net, x, torch.tensor(data["y_test"][:200]).long(), to=layer)
    certificate = rec.certificates[layer]
    assert float(certificate.reached.float().mean()) == 1.0
    assert float(certificate.deviation.mean()) <= longest


class MixedPrecision(nn.Module):
    """Single precision in the middle of a network of double, as language models have it at their norms, and a cumulative product,
    which has no closed form, across the change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6).double(), nn.RMSNorm(6), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(torch.tanh(self.first(x)).float())
        return self.last(torch.cumprod(1.0 + 0.1 * z, 1).double())


@pytest.mark.parametrize("strategy", ["greedy", "global"])
@pytest.mark.parametrize("layer", ["first", "norm"])
def test_a_network_that_changes_precision_is_reversed(strategy: Any, layer: str) -> None:
    torch.manual_seed(0)
    net, x = MixedPrecision(), torch.randn(5, 4, dtype=torch.float64)
    output = net(x).detach()
    kept = revprop.reconstruct(net, x, target=output, to=layer, strategy=strategy)
    assert torch.equal(kept[layer], kept.recorded[layer])
    with torch.no_grad():
        wanted = output + 0.05 * (net(x + 0.1) - output)
    found = revprop.reconstruct(net, x, target=wanted, to=layer, strategy=strategy, damping=0.0)
    assert found[layer].dtype == found.recorded[layer].dtype
    missing = (wanted - output).norm(dim=1)
    assert float((found.certificates[layer].residual / missing).median()) < (0.1 if strategy == "global" else 0.5)
