"""Closed-form refits: their least squares and their smallest changes against dense references."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor, nn
from training_cases import Residual, changed, residual_data, state_of

import revprop.closed_form
from revprop import PostTraining, post_train
from revprop.closed_form import RIDGE, ClosedForm, Refit, refits, smallest_change
from revprop.embedding import embed_labels
from revprop.graph import Graph, trace
from revprop.post_training import module_parameters
from revprop.prefix import Plan

F64 = torch.float64
QUICK = ClosedForm((1.0,), (0.1,), sweeps=3)


def layers_of(graph: Graph, start: str = "input", stop: str = "output") -> tuple[Plan, tuple[Refit, ...]]:
    names = module_parameters(graph, start, stop)
    plan = Plan.of(graph, stop, names, classify=True)
    return plan, refits(graph, names, plan.crossing)


def solved(
    model: nn.Module | Graph, data: Any, start: str = "input", stop: str = "output", **options: Any
) -> PostTraining:
    return post_train(model, data, start, stop, method="solve", **{"closed_form": QUICK, "device": "cpu", **options})


# -- the normal equations --------------------------------------------------------------------------

NETWORKS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda bias: nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "linear, leading dimensions": (
        lambda bias: nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)),
        (2, 3),
    ),
    "conv1d": (
        lambda bias: nn.Sequential(nn.Conv1d(2, 4, 3, padding="same", bias=bias), nn.Flatten(), nn.Linear(20, 3)),
        (2, 5),
    ),
    "grouped, dilated": (
        lambda bias: nn.Sequential(
            nn.Conv2d(4, 4, 2, dilation=2, groups=2, padding=1, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        ),
        (4, 4, 4),
    ),
    "transposed": (
        lambda bias: nn.Sequential(
            nn.ConvTranspose2d(4, 2, 3, stride=2, groups=2, output_padding=1, bias=bias), nn.Flatten(), nn.Linear(72, 3)
        ),
        (4, 2, 2),
    ),
    "conv3d": (
        lambda bias: nn.Sequential(nn.Conv3d(2, 2, 2, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        (2, 3, 3, 3),
    ),
}


@functools.cache
def traced(kind: str, bias: bool) -> tuple[Graph, Refit]:
    """The network, whose weights are read live, and the refit of its first layer."""
    make, shape = NETWORKS[kind]
    graph = trace(make(bias).double().eval(), torch.zeros(2, *shape, dtype=F64))
    return graph, layers_of(graph)[1][0]


def stacked(network: nn.Module, x: Tensor, d: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """The explicit least-squares problem in all entries of weight and bias: (design matrix, wanted change)."""
    first = network[0]  # type: ignore[index]
    parameters = {"weight": first.weight} | ({"bias": first.bias} if bias else {})
    rest = {} if bias or first.bias is None else {"bias": torch.zeros_like(first.bias)}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(first, {**p, **rest}, (x,)).flatten())(parameters)
    return torch.cat([j.flatten(1) for j in jacobian.values()], 1), d.flatten()


def unpacked(solution: Tensor, first: Any, bias: bool) -> tuple[Tensor, Tensor | None]:
    size = first.weight.numel()
    return solution[:size].view_as(first.weight), solution[size:] if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
@profile(max_examples=10)
@given(
    seed=st.integers(0, 2**16), n=st.integers(1, 12), split=st.integers(1, 5), damping=st.sampled_from([0.01, 0.5, 3.0])
)
def test_a_refit_is_the_damped_least_squares_solution(
    kind: str, bias: bool, seed: int, n: int, split: int, damping: float
) -> None:
    torch.manual_seed(seed)
    graph, layer = traced(kind, bias)
    network, x, labels = graph.model, torch.randn(n, *NETWORKS[kind][1], dtype=F64), torch.randint(0, 3, (n,))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    assert layer.bias == ("0.bias" if bias else None)

    def wanted(outputs: Tensor, labels: Tensor) -> Tensor:
        return embed_labels(outputs, labels, margin=1.0)

    batches = list(zip(x.split(split), labels.split(split), strict=True))
    gram, product, residual = layer.normal_equations(batches, wanted)
    whole = layer.normal_equations([(x, labels)], wanted)
    torch.testing.assert_close((gram, product), whole[:2], rtol=1e-9, atol=1e-9)
    assert residual == pytest.approx(whole[2], rel=1e-9)

    first = network[0]  # type: ignore[index]
    z = first(x).detach()
    d = smallest_change(lambda z: network[1:](z), z, (), lambda o: wanted(o, labels))  # type: ignore[index]
    assert residual == pytest.approx(float(d.square().mean()), rel=1e-9)
    # mu is relative to the mean diagonal of G, group by group, the bias's entry among them
    groups = getattr(first, "groups", 1)
    matrix, right = stacked(network, x, d, bias)
    diagonal = torch.diagonal(gram, dim1=1, dim2=2)
    assert diagonal.shape == (groups, gram.shape[1])
    mu = damping * diagonal.mean(1)
    outputs = first.weight.numel() // groups
    by_weight = mu.repeat_interleave(outputs)
    by_bias = mu.repeat_interleave(len(first.bias) // groups) if bias else mu[:0]
    ridge = torch.diag(torch.cat([by_weight, by_bias]).sqrt())
    reference = torch.linalg.lstsq(
        torch.cat([matrix, ridge]), torch.cat([right, right.new_zeros(len(ridge))]), driver="gelsd"
    ).solution
    found = layer.change(gram, product, damping)
    expected = unpacked(reference, first, bias)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-7, atol=1e-8)
    if bias:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-7, atol=1e-8)
    else:
        assert found[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_undamped_with_fewer_samples_than_weights_is_the_smallest_change(dtype: torch.dtype) -> None:
    network, x = nn.Sequential(nn.Linear(6, 3)).to(dtype), torch.randn(3, 6, dtype=dtype)
    _, (layer,) = layers_of(trace(network, x))
    target = torch.randn(3, 3, dtype=dtype)
    gram, product, _ = layer.normal_equations([(x, target)], lambda outputs, target: target)
    weight, bias = layer.change(gram, product, 0.0)
    design = torch.cat([x, torch.ones(3, 1, dtype=dtype)], 1)
    expected = (torch.linalg.pinv(design) @ (target - network(x).detach())).T.double()
    assert bias is not None
    tolerance = 1e-6 if dtype == F64 else 0.05
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], 1).double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_inputs_that_are_always_zero_ask_for_no_change(dtype: torch.dtype, damping: float) -> None:
    """All of them; and those of one group of two."""
    network = nn.Sequential(
        nn.Conv1d(4, 6, 1, groups=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3, bias=False)
    ).to(dtype)
    x, labels = torch.randn(20, 4, 1, dtype=dtype), torch.arange(20) % 3
    x[:, 2:] = 0
    result = solved(network, (x, labels), closed_form=ClosedForm((1.0,), (damping,), sweeps=2))
    assert torch.equal(result.model[0].weight[3:], network[0].weight[3:])  # type: ignore[index]
    assert changed(state_of(network), state_of(result.model)) == {"0.weight", "3.weight"}
    result = solved(network, (0 * x, labels), closed_form=ClosedForm((1.0,), (damping,), sweeps=2))
    assert changed(state_of(network), state_of(result.model)) == set()


def test_without_batches_there_is_nothing_to_sum() -> None:
    _, (layer,) = layers_of(trace(nn.Linear(4, 3), torch.zeros(1, 4)))
    with pytest.raises(ValueError, match="batches: expected at least one"):
        layer.normal_equations([], lambda outputs, labels: outputs)


# -- the smallest change ---------------------------------------------------------------------------

SUFFIXES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tanh": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(6, 4)), (6,)),
    "relu, deep": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
    "more outputs than features": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 7)), (3,)),
    "convolution and pool": (
        lambda: nn.Sequential(
            nn.Tanh(), nn.Conv2d(2, 3, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
        ),
        (2, 5, 5),
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Sigmoid(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(6, 4)),
        (3, 4),
    ),
    "outputs that are no vector": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 2)), (4, 3)),
}


def dense_jacobian(suffix: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """(n, outputs, features), sample by sample."""
    rows = [torch.func.jacrev(lambda v: suffix(v[None])[0].flatten())(sample) for sample in z]
    return torch.stack(rows).flatten(2)


def ridged(jacobian: Tensor, missing: Tensor) -> Tensor:
    """The solution with the ridge, by another way: least squares of the stacked system."""
    found = []
    for j, m in zip(jacobian, missing, strict=True):
        ridge = RIDGE * (j @ j.T).diagonal().max()
        eye = torch.eye(j.shape[1], dtype=j.dtype)
        stack = torch.cat([j, ridge.sqrt() * eye])
        found.append(torch.linalg.lstsq(stack, torch.cat([m, m.new_zeros(len(eye))]), driver="gelsd").solution)
    return torch.stack(found)


@pytest.mark.parametrize("kind", SUFFIXES)
@profile(max_examples=8)
@given(seed=st.integers(0, 2**16), n=st.integers(0, 4))
def test_the_smallest_change_is_the_jacobians_pseudo_inverse(kind: str, seed: int, n: int) -> None:
    torch.manual_seed(seed)
    make, shape = SUFFIXES[kind]
    suffix, z = make().double().eval(), torch.randn(n, *shape, dtype=F64)
    with torch.no_grad():
        outputs = suffix(z)
    target = outputs + torch.randn_like(outputs)
    found = smallest_change(suffix, z, (), lambda outputs: target)
    assert found.shape == z.shape
    assert not found.requires_grad
    if not n:
        return
    jacobian, missing = dense_jacobian(suffix, z), (target - outputs).flatten(1)
    torch.testing.assert_close(found.flatten(1), ridged(jacobian, missing), rtol=1e-7, atol=1e-9)
    inverse = torch.linalg.pinv(jacobian)
    singular = torch.linalg.svdvals(jacobian)
    for i in range(n):  # where the ridge is small beside all singular values, it is the pseudo-inverse's
        if singular[i, -1] ** 2 > 0.3 * singular[i, 0] ** 2:
            torch.testing.assert_close(found[i].flatten(), inverse[i] @ missing[i], rtol=0.02, atol=0.02)


def test_with_many_outputs_the_iterative_way_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    last, z = nn.Linear(120, 70).double(), torch.randn(3, 120, dtype=F64)
    with torch.no_grad():
        last.weight.copy_(torch.linalg.qr(torch.randn(120, 70))[0].T)
    suffix = nn.Sequential(nn.Tanh(), last)
    target = suffix(z).detach() + torch.randn(3, 70, dtype=F64)
    iterative = smallest_change(suffix, z, (), lambda outputs: target)
    monkeypatch.setattr(revprop.closed_form, "DENSE_OUTPUTS", 70)
    dense = smallest_change(suffix, z, (), lambda outputs: target)
    assert not torch.equal(iterative, dense)
    assert float((iterative - dense).norm() / dense.norm()) < 0.03


@pytest.mark.parametrize("outputs", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_jacobian_of_zero_asks_for_no_change(dtype: torch.dtype, outputs: int) -> None:
    suffix = nn.Sequential(nn.ReLU(), nn.Linear(4, outputs)).to(dtype)
    z = torch.tensor([[-1.0, -2, -3, -4], [1, 2, 3, 4]], dtype=dtype)
    found = smallest_change(suffix, z, (), lambda outputs: outputs + 1)
    assert torch.equal(found[0], torch.zeros(4, dtype=dtype))
    assert found[1].isfinite().all()
    assert found[1].any()


def test_values_that_by_pass_are_held() -> None:
    z, held = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    found = smallest_change(lambda z, h: z * h, z, (held,), lambda outputs: outputs + 1)
    jacobian = torch.diag_embed(held)
    torch.testing.assert_close(found, ridged(jacobian, torch.ones(3, 4, dtype=F64)), rtol=1e-9, atol=1e-9)


def test_in_a_residual_network_the_smallest_change_is_through_what_is_behind() -> None:
    """Of a layer inside a block: the block's input by-passes it and stays."""
    model = Residual().double().eval()
    x, labels = residual_data(5, F64)
    _, layers = layers_of(trace(model, x))
    layer = next(layer for layer in layers if layer.weight == "block1.conv2.weight")
    a, z, *held = layer.front(x)
    assert held
    with torch.no_grad():
        stem = torch.tanh(model.stem(x))
        inner = torch.relu(model.block1.bn1(model.block1.conv1(stem)))
        torch.testing.assert_close((a, z), (inner, model.block1.conv2(inner)))

    def suffix(z: Tensor) -> Tensor:
        block = torch.relu(model.block1.bn2(z) + model.block1.down(stem[: len(z)] if len(z) > 1 else one[0]))
        return model.head(model.block2(block).mean((2, 3)))

    one: list[Tensor] = [stem]
    target = embed_labels(model(x).detach(), labels, margin=1.0)
    found = smallest_change(lambda z, *h: layer.behind(z, *h)[0], z, tuple(held), lambda outputs: target)
    rows = []
    for i in range(5):
        one[0] = stem[i : i + 1]
        rows.append(dense_jacobian(suffix, z[i : i + 1]))
    expected = ridged(torch.cat(rows), target - model(x).detach())
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-6, atol=1e-8)
