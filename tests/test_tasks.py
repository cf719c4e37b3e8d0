"""Tasks beyond one label per input: projections against SciPy, both strategies, diagnosis and post-training on small networks."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import revprop
from revprop import Classification, MultiLabel, NonFiniteError, Regression
from revprop.closed_form import ClosedForm
from revprop.embedding import embed_labels
from revprop.krylov import least_squares_and_dual
from revprop.tasks import Task, by_sample, infer
from revprop.training import Training, accuracy_of, train_baseline

F64 = torch.float64
IGNORED = -100


def constraints(task: Task, out: Tensor, labels: Tensor, margin: float, last: bool = False) -> list[Tensor]:
    """Of one sample, by loops: what has to be >= 0 for its labels to hold."""
    found = []
    if isinstance(task, Classification):
        if last:
            out = out.movedim(-1, 0)
        for at in itertools.product(*(range(size) for size in labels.shape)):
            y = int(labels[at])
            if y != task.ignore or not labels.dim():
                found += [out[(y, *at)] - out[(i, *at)] - margin for i in range(len(out)) if i != y]
    for at in itertools.product(*(range(size) for size in out.shape)):
        if isinstance(task, MultiLabel):
            sign = 1 if labels[at] else -1
            found.append(sign * (out[at] - task.threshold) - margin)
        elif isinstance(task, Regression):
            half = max(task.tolerance - margin, 0.0)
            found += [out[at] - (labels[at] - half), labels[at] + half - out[at]]
    return found


def nearest_by_slsqp(f: Callable[[Tensor], list[Tensor]], origin: Tensor) -> Tensor:
    """The point nearest to ``origin`` at which none of ``f`` is negative, by a general constrained optimiser."""
    start = origin.detach().flatten().numpy()

    def values(a: np.ndarray, tensor: bool = False) -> Any:
        found = torch.stack(f(torch.from_numpy(a).view(origin.shape)))
        return found if tensor else found.numpy()

    def slopes(a: np.ndarray) -> np.ndarray:
        jacobian = torch.autograd.functional.jacobian(
            lambda b: torch.stack(f(b)), torch.from_numpy(a).view(origin.shape)
        )
        return jacobian.flatten(1).numpy()

    if not f(origin):
        return origin
    found = scipy.optimize.minimize(
        lambda a: 0.5 * ((a - start) ** 2).sum(),
        start.copy(),
        jac=lambda a: a - start,
        constraints={"type": "ineq", "fun": values, "jac": slopes},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 400},
    )
    assert values(found.x).min() > -1e-6
    return torch.from_numpy(found.x).view(origin.shape)


def dense_case(last: bool, classes: int, size: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Outputs and labels of two samples; some positions are ignored."""
    shape = (2, *size, classes) if last else (2, classes, *size)
    out = torch.randn(shape, generator=generator, dtype=F64) * 2
    labels = torch.randint(0, classes, (2, *size), generator=generator)
    return out, torch.where(torch.rand(labels.shape, generator=generator) < 0.25, IGNORED, labels)


CASES = ("pixels", "tokens", "one label", "yes or no", "values")


def case(kind: str, classes: int, width: int, seed: int) -> tuple[Task, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("pixels", "tokens"):
        out, labels = dense_case(kind == "tokens", classes, (width, 2)[: 1 if kind == "tokens" else 2], generator)
        return Classification(dim=-1 if kind == "tokens" else 1), out, labels
    out = torch.randn(2, classes, generator=generator, dtype=F64) * 2
    if kind == "one label":
        return Classification(), out, torch.randint(0, classes, (2,), generator=generator)
    if kind == "yes or no":
        return MultiLabel(0.3), out, torch.rand(2, classes, generator=generator) < 0.5
    return Regression(0.4), out, torch.randn(2, classes, generator=generator, dtype=F64)


# -- what holds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([0.0, 0.25, 1.0]))
def test_nearest_is_the_projection_and_miss_the_worst_constraint(
    kind: str, classes: int, width: int, seed: int, margin: float
) -> None:
    task, out, labels = case(kind, classes, width, seed)
    task.check(out, labels)
    found = task.embed(out, labels, "nearest", margin)
    assert found.shape == out.shape
    assert found.dtype == out.dtype
    for one, label, wanted, missed in zip(out, labels, found, task.miss(out, labels, margin), strict=True):
        demands = lambda a, y=label: constraints(task, a, y, margin, kind == "tokens")  # noqa: E731
        torch.testing.assert_close(wanted, nearest_by_slsqp(demands, one), rtol=0, atol=1e-5)
        assert float(missed) == pytest.approx(max((-float(c) for c in demands(one)), default=-math.inf), abs=1e-12)
        assert min((float(c) for c in demands(wanted)), default=0.0) >= -1e-12
        if missed <= 0:
            assert torch.equal(wanted, one)
    torch.testing.assert_close(task.embed(found, labels, "nearest", margin), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", CASES)
def test_the_derivative_of_the_projection_is_one_onto_the_face(kind: str) -> None:
    """Which is what the global strategy takes it for."""
    task, out, labels = case(kind, 3, 3, 5)
    derivative = torch.autograd.functional.jacobian(lambda o: task.embed(o, labels), out)
    derivative = derivative.reshape(out.numel(), out.numel())
    torch.testing.assert_close(derivative, derivative.T)
    torch.testing.assert_close(derivative @ derivative, derivative)
    off = (out - task.embed(out, labels)).flatten()
    assert off.any()
    torch.testing.assert_close(derivative @ off, torch.zeros_like(off))


@given(st.integers(0, 10**6), st.booleans(), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_every_position_is_embedded_by_itself(seed: int, last: bool, size: list[int]) -> None:
    out, labels = dense_case(last, 4, tuple(size), torch.Generator().manual_seed(seed))
    for embedding in ("nearest", "maximum", "one_hot"):
        task = Classification(dim=-1 if last else 1)
        found = task.embed(out, labels, embedding, 0.3).movedim(-1 if last else 1, -1)
        logits = out.movedim(-1 if last else 1, -1)
        for at in np.ndindex(*labels.shape):
            one, label = logits[at][None], labels[at][None]
            expected = one if label == IGNORED else embed_labels(one, label, embedding, 0.3)
            torch.testing.assert_close(found[at][None], expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", CASES)
def test_a_margin_for_each_sample(kind: str) -> None:
    task, out, labels = case(kind, 3, 2, 1)
    margins = torch.tensor([0.1, 0.9], dtype=F64)
    found = task.embed(out, labels, "nearest", margins)
    for i in range(2):
        alone = task.embed(out[i : i + 1], labels[i : i + 1], "nearest", float(margins[i]))
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=1e-12)


def test_other_embeddings_of_yes_or_no_and_of_values() -> None:
    out, yes = torch.tensor([[2.0, -1.0, 0.3]]), torch.tensor([[1, 1, 0]])
    assert torch.equal(MultiLabel().embed(out, yes, "maximum", 0.5), MultiLabel().embed(out, yes, "nearest", 0.5))
    assert MultiLabel().embed(out, yes, "one_hot").tolist() == [[1.0, 1.0, 0.0]]
    values = torch.tensor([[1.0, -1.0, 0.0]], dtype=F64)
    assert torch.equal(Regression(0.1).embed(out, values, "maximum"), Regression(0.1).embed(out, values))
    assert torch.equal(Regression(0.1).embed(out, values, "one_hot"), values.float())
    for task, labels in ((MultiLabel(), yes), (Regression(), values), (Classification(), torch.tensor([0]))):
        with pytest.raises(ValueError, match="unknown embedding 'nearst'; did you mean 'nearest'"):
            task.embed(out, labels, "nearst")


def test_margin_and_room_of_values() -> None:
    out, labels = torch.tensor([[5.0, 0.2]]), torch.tensor([[1.0, 0.0]])
    task = Regression(0.5)
    torch.testing.assert_close(task.embed(out, labels, margin=0.4), torch.tensor([[1.1, 0.1]]))
    assert torch.equal(task.embed(out, labels, margin=2.0), labels)  # inside by more than there is: the label itself
    assert (task.room(), task.room(0.5), task.room(2.0), Regression().room()) == (0.5, 0.0, 0.0, 0.0)
    assert MultiLabel().room(3.0) == Classification().room() == math.inf


# -- losses and accuracies -------------------------------------------------------------------------------------------


def test_losses_are_torchs() -> None:
    out, labels = dense_case(False, 3, (4, 5), torch.Generator().manual_seed(0))
    expected = F.cross_entropy(out, labels, ignore_index=IGNORED)
    torch.testing.assert_close(Classification().loss(out, labels), expected)
    torch.testing.assert_close(Classification().loss(out.movedim(1, -1), labels), expected)
    void = torch.where(labels == IGNORED, 1, labels)
    torch.testing.assert_close(Classification(ignore=1).loss(out, void), F.cross_entropy(out, void, ignore_index=1))
    yes = torch.randint(0, 2, (4, 3))
    logits = torch.randn(4, 3)
    expected = F.binary_cross_entropy_with_logits(logits, yes.float())
    for kind in (torch.bool, torch.int64, torch.uint8, torch.float32, F64):
        torch.testing.assert_close(MultiLabel().loss(logits, yes.to(kind)), expected)
    values = torch.randn(4, 3, dtype=F64)
    torch.testing.assert_close(Regression().loss(logits, values), F.mse_loss(logits, values.float()))


def test_nothing_counted_is_a_loss_of_zero() -> None:
    out = torch.randn(2, 3, 4, requires_grad=True)
    loss = Classification().loss(out, torch.full((2, 4), IGNORED))
    (slope,) = torch.autograd.grad(loss, out)
    assert (loss.item(), slope.abs().max().item()) == (0.0, 0.0)
    assert Classification().right(out, torch.full((2, 4), IGNORED))[1].tolist() == [0, 0]
    assert MultiLabel().loss(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0.0
    assert Regression().loss(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0.0


def test_what_is_right_by_hand() -> None:
    out = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]], [[1.0, 1.0, 1.0], [0.0, 5.0, 2.0]]])  # (2, 2 classes, 3)
    labels = torch.tensor([[0, 1, 1], [IGNORED, 1, IGNORED]])
    right, counted = Classification().right(out, labels)
    assert (right.tolist(), counted.tolist()) == ([2, 1], [3, 1])
    out = torch.tensor([[0.5, 0.6], [0.4, 0.5]])
    right, counted = MultiLabel(0.5).right(out, torch.tensor([[1, 1], [0, 0]]))  # on the threshold is not above it
    assert (right.tolist(), counted.tolist()) == ([1, 2], [2, 2])
    assert MultiLabel(0.5).miss(out, torch.tensor([[1, 1], [0, 0]])).tolist() == [0.0, 0.0]  # but it holds
    right, counted = Regression(0.25).right(out, torch.tensor([[0.25, 0.9], [0.4, 0.5]]))
    assert (right.tolist(), counted.tolist()) == ([1, 2], [2, 2])
    right, counted = Regression(1.0).right(torch.tensor([3.0, 5.0]), torch.tensor([3.5, 7.0]))
    assert (right.tolist(), counted.tolist()) == ([1, 0], [1, 1])


# -- labels that do not fit ------------------------------------------------------------------------------------------


PIXELS, TOKENS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 7, 3)


@pytest.mark.parametrize(
    ("outputs", "labels", "dim"),
    [
        (PIXELS, (2, 4, 5), None),
        (TOKENS, (2, 7), None),
        (TOKENS.movedim(-1, 1), (2, 7), None),
        (PIXELS, (2, 3, 5), 2),
        (PIXELS, (2, 3, 5), -2),
        (torch.zeros(2, 4, 4), (2, 4), 1),
        (torch.zeros(2, 4, 4), (2, 4), -1),
        (torch.zeros(2, 3), (2,), -1),
        (torch.zeros(0, 3, 4), (0, 4), None),
    ],
)
def test_the_class_dimension_is_told_by_the_shapes(outputs: Tensor, labels: tuple[int, ...], dim: int | None) -> None:
    task, wanted = Classification(dim), torch.zeros(labels, dtype=torch.int64)
    task.check(outputs, wanted)
    classes = outputs.numel() // max(wanted.numel(), 1) if wanted.numel() else 3
    assert task.missing(outputs, wanted).shape == (len(outputs), math.prod(labels[1:]), classes)
    assert task.embed(outputs, wanted).shape == outputs.shape


@pytest.mark.parametrize(
    ("task", "outputs", "labels", "message"),
    [
        (
            Classification(),
            PIXELS,
            torch.zeros(2, 5, 4, dtype=torch.int64),
            r"labels: expected shape \(2, 4, 5\) \(classes in dimension 1\) or \(2, 3, 4\) \(classes in dimension 3\) for "
            r"outputs \(2, 3, 4, 5\); given \(2, 5, 4\)",
        ),
        (
            Classification(),
            torch.zeros(2, 4, 4),
            torch.zeros(2, 4, dtype=torch.int64),
            r"say which: task=revprop.Classification\(dim=1\) or task=revprop.Classification\(dim=-1\)",
        ),
        (
            Classification(dim=3),
            TOKENS,
            torch.zeros(2, 7, dtype=torch.int64),
            r"dim=3: the outputs \(2, 7, 3\) have no",
        ),
        (
            Classification(),
            PIXELS,
            torch.zeros(2, 4, 5),
            r"int64 class indices, given torch.float32; .*labels.long\(\)",
        ),
        (Classification(), PIXELS, [0], "expected a tensor of int64 class indices, given a list"),
        (
            Classification(),
            PIXELS,
            torch.zeros(2, dtype=torch.int64),
            r"labels need outputs of shape \(n, classes\); the network's are \(2, 3, 4, 5\): give target=",
        ),
        (
            Classification(),
            TOKENS,
            torch.full((2, 7), 3),
            "labels: expected 0 to 2 for 3 classes, or -100 where a position does not count; given 3 to 3",
        ),
        (Classification(ignore=9), TOKENS, torch.full((2, 7), IGNORED), "or 9 where a position .*given -100 to -100"),
        (Classification(), torch.zeros(2, 3), torch.tensor([0, IGNORED]), "expected 0 to 2 for 3 outputs; given -100"),
        (Classification(dim=-1), torch.zeros(2), torch.tensor([0, 1]), r"outputs of shape \(n, classes\)"),
        (MultiLabel(), torch.zeros(2, 3), torch.zeros(2), r"0 or 1 of the outputs' shape \(2, 3\); given \(2,\)"),
        (MultiLabel(), torch.zeros(2, 3), torch.full((2, 3), 2), "expected 0 or 1 for each output; given 2"),
        (MultiLabel(), torch.zeros(1, 1), torch.tensor([[math.nan]]), "expected 0 or 1 for each output; given nan"),
        (MultiLabel(), torch.zeros(1, 1), [[1]], "expected a tensor 0 or 1, given a list"),
        (Regression(), torch.zeros(2, 1), torch.zeros(2), r"values of the outputs' shape \(2, 1\); given \(2,\)"),
        (
            Regression(),
            torch.zeros(2, 1),
            torch.zeros(2, 1, dtype=torch.int64),
            r"given torch.int64; .*labels.float\(\)",
        ),
        (Regression(), torch.zeros(1, 1), torch.tensor([[math.nan]]), "labels holds 1 of 1 values that are NaN"),
        (Regression(), torch.zeros(1, 1), torch.tensor([[math.inf]]), "labels holds 1 of 1 values that are NaN"),
    ],
)
def test_labels_that_do_not_fit_are_refused(task: Task, outputs: Tensor, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.check(outputs.to("meta"), labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classification(dim=0), "dim: expected the outputs' class dimension, .*; given 0"),
        (lambda: Classification(dim=1.0), "dim: expected .* given 1.0"),
        (lambda: Classification(ignore=None), "ignore: expected the label of positions that do not count; given None"),
        (lambda: MultiLabel(math.nan), "threshold: expected a finite number of logits; given nan"),
        (lambda: Regression(-0.1), "tolerance: expected a number >= 0, in the outputs' units; given -0.1"),
        (lambda: Regression(math.nan), "tolerance: expected a number >= 0"),
        (
            lambda: infer(torch.zeros(2)),
            r"torch.float32; .*labels.long\(\).*revprop.MultiLabel\(\).*revprop.Regression\(\)",
        ),
        (lambda: infer(torch.zeros(2, dtype=torch.bool)), r"given torch.bool; .*revprop.MultiLabel\(\)"),
    ],
)
def test_tasks_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- the least-squares solver ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(3, 12), (12, 12), (20, 12)])
def test_least_squares_and_its_dual_in_any_shapes(rows: int, columns: int) -> None:
    matrix = torch.randn(4, rows, columns, dtype=F64)
    b = torch.randn(4, rows, dtype=F64)
    x, y = least_squares_and_dual(
        lambda v: (matrix @ v.view(4, columns, 1)).squeeze(2),
        lambda v: (matrix.mT @ v.unsqueeze(2)).view(4, 3, 2, 2),
        b,
    )
    expected = torch.linalg.lstsq(matrix, b.unsqueeze(2), driver="gelsd").solution.view(4, 3, 2, 2)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((matrix.mT @ y.unsqueeze(2)).view(4, 3, 2, 2), x, rtol=1e-9, atol=1e-9)


def test_least_squares_within_a_radius() -> None:
    """As far as the radius; nearer to the solution than steepest descent gets; the whole of it where there is room."""
    matrix, b = torch.randn(3, 8, 12, dtype=F64), torch.randn(3, 8, dtype=F64)

    def apply(v: torch.Tensor) -> torch.Tensor:
        return (matrix @ v.unsqueeze(2)).squeeze(2)

    def adjoint(v: torch.Tensor) -> torch.Tensor:
        return (matrix.mT @ v.unsqueeze(2)).squeeze(2)

    whole, _ = least_squares_and_dual(apply, adjoint, b)
    radius = whole.norm(dim=1) * torch.tensor([0.3, 0.8, 2.0], dtype=F64)
    x, y = least_squares_and_dual(apply, adjoint, b, radius=radius)
    torch.testing.assert_close(x.norm(dim=1)[:2], radius[:2], rtol=1e-12, atol=0)
    torch.testing.assert_close(x[2], whole[2], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(adjoint(y), x, rtol=1e-9, atol=1e-9)
    slope = adjoint(b)
    length = slope.norm(dim=1).square() / apply(slope).norm(dim=1).square()
    descent = torch.minimum(length, radius / slope.norm(dim=1))[:, None] * slope
    assert ((b - apply(x)).norm(dim=1) <= (b - apply(descent)).norm(dim=1) + 1e-12).all()


# -- networks --------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """(n, t) token indices -> (n, t, classes): every token sees its neighbours."""

    def __init__(self, act: type[nn.Module], classes: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.mix = nn.Conv1d(6, 8, 3, padding=1)
        self.act = act()
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.mix(self.embedding(x).transpose(1, 2))).transpose(1, 2))


def network(kind: str, act: type[nn.Module] = nn.Tanh, gain: float = 2.0) -> nn.Module:
    """In double precision, with weights as large as a trained network's."""
    if kind == "pixels":
        net: nn.Module = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), act(), nn.Conv2d(4, 6, 3, padding=1), act(), nn.Conv2d(6, 3, 1)
        )
    elif kind == "tokens":
        net = Tokens(act)
    else:
        net = nn.Sequential(nn.Linear(8, 16), act(), nn.Linear(16, 12), act(), nn.Linear(12, 5))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                module.weight.mul_(gain)
    return net.double().eval().requires_grad_(False)


def inputs(kind: str, n: int, size: int = 4) -> Tensor:
    if kind == "pixels":
        return torch.randn(n, 1, size, size, dtype=F64)
    return torch.randint(0, 9, (n, size)) if kind == "tokens" else torch.randn(n, 8, dtype=F64)


def near_labels(kind: str, outputs: Tensor, share: float = 0.3) -> tuple[Task, Tensor]:
    """Labels of which a share is not what the network says, but what it says next; sample 0 is right."""
    change = torch.rand(outputs.shape if kind in ("yes or no", "values") else outputs.movedim(1, -1).shape[:-1]) < share
    if kind in ("pixels", "tokens"):
        best = outputs.topk(2, dim=1 if kind == "pixels" else -1).indices.movedim(1 if kind == "pixels" else -1, -1)
        change = torch.rand(best.shape[:-1]) < share
        change[0] = False
        labels = torch.where(change, best[..., 1], best[..., 0])
        labels[1:][torch.rand(labels[1:].shape) < 0.2] = IGNORED
        return Classification(dim=1 if kind == "pixels" else -1), labels
    change[0] = False
    if kind == "yes or no":
        return MultiLabel(), (outputs > 0) ^ change
    return Regression(0.05), torch.where(change, outputs + 0.4 * torch.randn_like(outputs), outputs)


KINDS = ("pixels", "tokens", "yes or no", "values")


def layers_of(kind: str) -> tuple[str, ...]:
    return ("embedding", "mix", "act") if kind == "tokens" else ("input", "0", "1", "2", "3")


def tail(net: nn.Module, layer: str) -> Callable[[Tensor], Tensor]:
    if isinstance(net, nn.Sequential):
        return net if layer == "input" else net[int(layer) + 1 :]
    assert isinstance(net, Tokens)
    steps = [lambda a: net.mix(a.transpose(1, 2)), net.act, lambda a: net.head(a.transpose(1, 2))]
    first = ("embedding", "mix", "act").index(layer)

    def run(a: Tensor) -> Tensor:
        for step in steps[first:]:
            a = step(a)
        return a

    return run


# -- reconstruct -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 6])  # 48 and 108 outputs of pixels: by rows of the Jacobian, and without them
@pytest.mark.parametrize("margin", [0.0, 0.02])
@pytest.mark.parametrize("kind", KINDS)
def test_global_features_hold_and_samples_that_hold_already_stay(kind: str, margin: float, size: int) -> None:
    net, x = network(kind), inputs(kind, 8, size)
    task, labels = near_labels(kind, net(x), 0.15)
    rec = revprop.reconstruct(net, x, labels, task, to=layers_of(kind), margin=margin)
    demands = [constraints(task, o, y, margin, kind == "tokens") for o, y in zip(net(x), labels, strict=True)]
    holds = torch.tensor([min(float(c) for c in demanded) >= 0 for demanded in demands])
    assert not holds.all()
    assert bool(holds[0]) or margin > 0
    for layer in rec:
        outputs = tail(net, layer)(rec[layer])
        certificate = rec.certificates[layer]
        for o, y in zip(outputs, labels, strict=True):
            assert min(float(c) for c in constraints(task, o, y, margin, kind == "tokens")) >= -1e-9, layer
        assert bool(certificate.reached.all())
        assert float(certificate.residual.max()) <= 1e-9
        assert certificate.steps is not None
        assert torch.equal(certificate.steps == 0, holds)
        assert torch.equal(rec[layer][holds], rec.recorded[layer][holds])
    torch.testing.assert_close(rec.wanted, task.embed(net(x), labels, "nearest", margin))


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_global_features_are_as_near_as_a_general_optimisers(
    kind: str, rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rows of the Jacobian and without: over few outputs both do."""
    monkeypatch.setattr("revprop.global_solve.DENSE_OUTPUTS", 64 if rows else 0)
    net, x = network(kind, gain=1.5), inputs(kind, 5 if kind == "pixels" else 14)
    task, labels = near_labels(kind, net(x), 0.15 if kind == "pixels" else 0.25)
    found: list[float] = []
    for layer in layers_of(kind)[-3:]:
        rec = revprop.reconstruct(net, x, labels, task, to=layer, tolerance=1e-3)
        assert bool(rec.certificates[layer].reached.all())
        run = tail(net, layer)
        for i in range(1, len(x)):
            origin = rec.recorded[layer][i]
            best = nearest_by_slsqp(
                lambda a, y=labels[i], f=run: constraints(task, f(a[None])[0], y, 0.0, kind == "tokens"), origin
            )
            length = float((best - origin).norm())
            if 0 < length < 0.3 * float(origin.norm()):  # far away there are many local answers
                found.append(float((rec[layer][i] - origin).norm()) / length)
    assert len(found) >= 8
    assert sum(ratio <= 1.01 for ratio in found) >= 0.9 * len(found), found
    assert max(found) <= 1.1


def test_a_narrow_tolerance_is_met_inside_of_it() -> None:
    net, x = network("values"), inputs("values", 5)
    labels = net(x) + 0.3 * torch.randn(5, 5, dtype=F64)
    for tolerance in (1e-2, 1e-6):
        rec = revprop.reconstruct(net, x, labels, Regression(tolerance), to="1")
        assert bool(rec.certificates["1"].reached.all())
        assert float((net[2:](rec["1"]) - labels).abs().max()) <= tolerance


def test_no_tolerance_is_a_target() -> None:
    net, x = network("values"), inputs("values", 5)
    labels = net(x) + 0.3 * torch.randn(5, 5, dtype=F64)
    for strategy in ("global", "greedy"):
        target = revprop.reconstruct(net, x, target=labels, strategy=strategy)
        for task, options in (
            (Regression(), {}),
            (Regression(0.5), {"margin": 0.5}),
            (Regression(), {"embedding": "one_hot"}),
        ):
            rec = revprop.reconstruct(net, x, labels, task, strategy=strategy, **options)
            for layer in rec:
                assert torch.equal(rec[layer], target[layer])
                assert torch.equal(rec.certificates[layer].reached, target.certificates[layer].reached)
                torch.testing.assert_close(rec.certificates[layer].residual, target.certificates[layer].residual)


@pytest.mark.parametrize("embedding", ["nearest", "maximum", "one_hot"])
@pytest.mark.parametrize("strategy", ["global", "greedy"])
@pytest.mark.parametrize("kind", KINDS)
def test_certificates_hold_what_running_the_rest_gives(kind: str, strategy: Any, embedding: Any) -> None:
    net, x = network(kind, nn.LeakyReLU), inputs(kind, 5)
    task, labels = near_labels(kind, net(x))
    rec = revprop.reconstruct(net, x, labels, task, strategy=strategy, embedding=embedding, margin=0.02)
    assert "output" in rec
    torch.testing.assert_close(rec.wanted, task.embed(net(x), labels, embedding, 0.02))
    for layer in layers_of(kind):
        outputs, certificate = tail(net, layer)(rec[layer]), rec.certificates[layer]
        goal = task.embed(outputs, labels, "nearest", 0.02) if embedding == "nearest" else rec.wanted
        torch.testing.assert_close(certificate.residual, (outputs - goal).flatten(1).norm(dim=1))
        slack = 1e-4 * outputs.abs().flatten(1).amax(1).clamp_min(1.0)
        slack = slack.clamp_max(5e-4) if kind == "values" else slack
        assert torch.equal(certificate.reached, task.miss(outputs, labels) <= slack)
        torch.testing.assert_close(
            certificate.deviation,
            (rec[layer] - rec.recorded[layer]).flatten(1).norm(dim=1) / rec.recorded[layer].flatten(1).norm(dim=1),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_undamped_reaches_what_is_wanted_in_front_of_the_last_map(kind: str) -> None:
    net, x = network(kind, nn.LeakyReLU), inputs(kind, 6)
    task, labels = near_labels(kind, net(x))
    layer = layers_of(kind)[-1]
    rec = revprop.reconstruct(net, x, labels, task, strategy="greedy", damping=0.0, margin=0.01)
    assert bool(rec.certificates[layer].reached.all())
    torch.testing.assert_close(tail(net, layer)(rec[layer]), rec.wanted, rtol=0, atol=1e-8)
    assert torch.equal(
        rec[layer][task.miss(net(x), labels, 0.01) <= 0], rec.recorded[layer][task.miss(net(x), labels, 0.01) <= 0]
    )


@pytest.mark.parametrize("strategy", ["global", "greedy"])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_batch(
    kind: str, rows: bool, strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revprop.global_solve.DENSE_OUTPUTS", 64 if rows else 0)
    net, x = network(kind), inputs(kind, 6)
    task, labels = near_labels(kind, net(x), 0.15)
    graph = revprop.trace(net, x)
    whole = revprop.reconstruct(graph, x, labels, task, to=layers_of(kind), strategy=strategy)
    again = revprop.reconstruct(graph, x, labels, task, to=layers_of(kind), strategy=strategy)
    for size in (1, 4):
        parts = revprop.reconstruct(graph, x, labels, task, to=layers_of(kind), strategy=strategy, batch_size=size)
        for layer in whole:
            assert torch.equal(again[layer], whole[layer])
            torch.testing.assert_close(parts[layer], whole[layer], rtol=1e-6, atol=1e-6)
            assert torch.equal(parts.certificates[layer].reached, whole.certificates[layer].reached)
            torch.testing.assert_close(
                parts.certificates[layer].residual, whole.certificates[layer].residual, rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("rows", [True, False])
def test_gradients_that_are_off_outside_make_no_difference(rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revprop.global_solve.DENSE_OUTPUTS", 64 if rows else 0)
    net, x = network("pixels").requires_grad_(True), inputs("pixels", 4)
    task, labels = near_labels("pixels", net(x).detach())
    first = revprop.reconstruct(net, x, labels, task, to="2")["2"]
    with torch.no_grad():
        second = revprop.reconstruct(net, x, labels, task, to="2")["2"]
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("strategy", ["global", "greedy"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_samples_and_nothing_asked_for(kind: str, strategy: Any) -> None:
    net, x = network(kind), inputs(kind, 3)
    task, labels = near_labels(kind, net(x))
    none = revprop.reconstruct(net, x[:0], labels[:0], task, strategy=strategy)
    layer = layers_of(kind)[-1]
    assert none[layer].shape == (0, *revprop.reconstruct(net, x, labels, task, to=layer)[layer].shape[1:])
    assert str(none.certificates[layer]).startswith("reached 0 of 0")
    if kind in ("pixels", "tokens"):
        rec = revprop.reconstruct(net, x, torch.full_like(labels, IGNORED), task, strategy=strategy, margin=3.0)
        for name in rec:
            assert torch.equal(rec[name], rec.recorded[name])
            assert bool(rec.certificates[name].reached.all())


@pytest.mark.parametrize("strategy", ["global", "greedy"])
def test_one_class_everywhere_wants_nothing(strategy: Any) -> None:
    net, x = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 1, 1)).double(), torch.randn(4, 2, 6, dtype=F64)
    rec = revprop.reconstruct(net, x, torch.zeros(4, 4, dtype=torch.int64), strategy=strategy, margin=1.0)
    assert all(torch.equal(rec[layer], rec.recorded[layer]) for layer in rec)


@pytest.mark.parametrize("strategy", ["global", "greedy"])
def test_a_network_that_returns_one_number_per_sample(strategy: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
    x = torch.randn(6, 3, dtype=F64)
    labels = (net(x) + torch.tensor([0.0, 0.1, -0.1, 0.2, 0.0, 0.3])).detach()
    rec = revprop.reconstruct(net, x, labels, Regression(0.05), strategy=strategy, damping=0.0)
    for layer in ("1", "2"):
        assert float((net[int(layer) + 1 :](rec[layer]) - labels).detach().abs().max()) <= 0.05 + 1e-9
        assert rec.certificates[layer].residual.shape == (6,)
    target = revprop.reconstruct(net, x, target=labels, to="1", strategy=strategy, damping=0.0)
    assert bool(target.certificates["1"].reached.all())


def test_dense_labels_need_no_task_where_the_shapes_tell() -> None:
    net, x = network("pixels"), inputs("pixels", 3)
    labels = torch.randint(0, 3, (3, 4, 4))
    stated = revprop.reconstruct(net, x, labels, Classification(dim=1), to="2")
    assert torch.equal(revprop.reconstruct(net, x, labels, to="2")["2"], stated["2"])


def test_what_the_verbs_refuse() -> None:
    net, x = network("values"), inputs("values", 3)
    values = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"given torch.float32; .*task=revprop.Regression\(\)"):
        revprop.reconstruct(net, x, values)
    with pytest.raises(ValueError, match=r"task=Regression.* says what labels are, and target= has none"):
        revprop.reconstruct(net, x, target=values, task=Regression())
    for verb in (revprop.reconstruct, lambda *given: revprop.post_train(net, given[1:3], "0", "2", task=given[3])):
        with pytest.raises(ValueError, match=r"task: expected revprop.Classification\(\).*; given 'regression'"):
            verb(net, x, values, "regression")
    with pytest.raises(NonFiniteError, match="labels holds 15 of 15"):
        revprop.reconstruct(net, x, values * math.nan, Regression())
    with pytest.raises(ValueError, match=r"the outputs' shape \(3, 5\); given \(3, 1\)"):
        revprop.diagnose(net, (x, values[:, :1]), task=Regression())
    for method in ("bp", "fr", "solve"):
        with pytest.raises(ValueError, match=r"the outputs' shape \(3, 5\); given \(3, 1\)"):
            revprop.post_train(net, (x, values[:, :1]), "0", "2", task=MultiLabel(), method=method, device="cpu")
        with pytest.raises(ValueError, match=r"given torch.float32; .*task=revprop.MultiLabel\(\)"):
            revprop.post_train(net, (x, values), "0", "2", method=method, device="cpu")


# -- diagnose --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_diagnosis_by_hand(kind: str) -> None:
    net, x = network(kind), inputs(kind, 9)
    task, labels = near_labels(kind, net(x), 0.15)
    layers = layers_of(kind)[-2:]
    report = revprop.diagnose(net, [(x[:4], labels[:4]), (x[4:], labels[4:])], layers, task=task)
    outputs = net(x)
    if kind in ("pixels", "tokens"):
        counted = labels != IGNORED
        right = (outputs.argmax(1 if kind == "pixels" else -1) == labels) & counted
    elif kind == "yes or no":
        right, counted = (outputs > 0) == labels, torch.ones_like(labels)
    else:
        right, counted = (outputs - labels).abs() <= 0.05, torch.ones_like(labels, dtype=torch.bool)
    assert torch.equal(report.wrong, (right.flatten(1).sum(1) < counted.flatten(1).sum(1)))
    assert report.accuracy == pytest.approx(int(right.sum()) / int(counted.sum()))
    assert str(report).startswith(f"accuracy {100 * report.accuracy:.2f} % of {int(counted.sum())} labels of 9 samples")
    rec = revprop.reconstruct(net, x, labels, task, to=layers)
    for found in report.layers:
        torch.testing.assert_close(found.deviation, rec.deviation[found.layer], rtol=1e-5, atol=1e-6)
        assert torch.equal(found.reached, rec.certificates[found.layer].reached)
        assert not found.deviation[~report.wrong].any()


# -- training --------------------------------------------------------------------------------------------------------


def problem(kind: str) -> tuple[nn.Module, tuple[Tensor, Tensor], Task, str, str]:
    """A network, data that another one of its kind has labelled, the task, and what to train."""
    torch.manual_seed(1)
    teacher, net = network(kind, gain=3.0), network(kind, gain=1.0).requires_grad_(True)
    x = inputs(kind, 40)
    task, labels = near_labels(kind, teacher(x), 0.0)
    if kind == "values":
        task = Regression(0.3)
    return net, (x, labels), task, *(("embedding", "output") if kind == "tokens" else ("0", "output"))


QUICK: dict[str, Any] = {"epochs": 4, "batch_size": 16, "learning_rate": 0.01, "device": "cpu"}


@pytest.mark.parametrize("method", ["bp", "fr", "solve"])
@pytest.mark.parametrize("kind", KINDS)
def test_post_training_improves_its_loss_and_repeats(kind: str, method: Any) -> None:
    net, data, task, start, stop = problem(kind)
    way = ClosedForm((0.5,), (0.1,), sweeps=4)
    options: dict[str, Any] = {**QUICK, "task": task, "method": method, "alpha": 0.5, "closed_form": way, "margin": 0.1}
    results = [revprop.post_train(net, data, start, stop, validation=data, seed=s, **options) for s in (0, 0, 1)]
    with torch.no_grad():
        before, after = (float(task.loss(m(data[0]), data[1])) for m in (net, results[0].model))
    assert after < 0.9 * before
    assert [e.accuracy for e in results[0].history] == [e.accuracy for e in results[1].history]
    for a, b in zip(results[0].model.parameters(), results[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
    right, counted = task.right(results[0].model(data[0]), data[1])
    assert results[0].history[-1].accuracy == pytest.approx(int(right.sum()) / int(counted.sum()))
    assert results[0].history[-1].accuracy > results[0].history[0].accuracy  # type: ignore[operator]
    if method != "solve":
        assert any(
            not torch.equal(a, b)
            for a, b in zip(results[0].model.parameters(), results[2].model.parameters(), strict=True)
        )


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pixels": lambda o, y: F.cross_entropy(o, y, ignore_index=IGNORED),
    "tokens": lambda o, y: F.cross_entropy(o.movedim(-1, 1), y, ignore_index=IGNORED),
    "yes or no": lambda o, y: F.binary_cross_entropy_with_logits(o, y.to(o)),
    "values": F.mse_loss,
}


@pytest.mark.parametrize("method", ["bp", "fr"])
@pytest.mark.parametrize("kind", KINDS)
def test_post_training_is_plain_training(kind: str, method: Any) -> None:
    net, (x, y), task, start, stop = problem(kind)
    result = revprop.post_train(
        net, (x, y), start, stop, task=task, method=method, alpha=0.5, margin=0.1, validation=(x, y), **QUICK
    )
    wanted = task.embed(net(x).detach(), y, "nearest", 0.1)  # stop is the output
    reference = copy.deepcopy(net)
    trained = [p for name, p in reference.named_parameters() if name in result.trained]
    assert len(trained) == 4
    adam, generator = torch.optim.Adam(trained, lr=QUICK["learning_rate"]), torch.Generator().manual_seed(0)
    for epoch in result.history[1:]:
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(QUICK["batch_size"]):
            outputs = reference(x[rows])
            plain = PLAIN[kind](outputs, y[rows])
            loss = plain if method == "bp" else 0.5 * plain + 0.5 * F.mse_loss(outputs, wanted[rows])
            total += plain.item() * len(rows)
            reference.zero_grad()
            loss.backward()
            adam.step()
        assert epoch.losses[task.name] == pytest.approx(total / len(x), rel=1e-6)
        right, counted = task.right(reference(x), y)
        assert epoch.accuracy == pytest.approx(int(right.sum()) / int(counted.sum()))
    for a, b in zip(result.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_memory_mapped_and_targets_that_are_renewed(kind: str) -> None:
    net, data, task, start, stop = problem(kind)
    options: dict[str, Any] = {**QUICK, "task": task, "alpha": 0.5, "margin": 0.1}
    runs = [
        revprop.post_train(net, data, start, stop, refresh=refresh, memory_budget=budget, **options)
        for refresh, budget in ((1, 2**30), (1, 0), (None, 2**30))
    ]
    same, renewed = (
        all(torch.equal(a, b) for a, b in zip(runs[0].model.parameters(), other.model.parameters(), strict=True))
        for other in runs[1:]
    )
    assert same
    assert not renewed


def test_a_checkpoint_of_another_task_is_refused(tmp_path: Path) -> None:
    net, (x, _), _, start, stop = problem("values")
    labels = (net(x) > 0).double().detach()

    def run(task: Task, epochs: int) -> revprop.PostTraining:
        options = {**QUICK, "epochs": epochs}
        return revprop.post_train(net, (x, labels), start, stop, task=task, method="bp", checkpoint=tmp_path, **options)

    run(MultiLabel(), 1)
    assert [e.epoch for e in run(MultiLabel(), 2).history] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"the checkpoint of other settings \(task differ\)"):
        run(Regression(), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_of_each_task_is_trained(kind: str) -> None:
    net, (x, y), task, _, _ = problem(kind)
    before = float(task.loss(net(x), y).detach())
    how = Training(epochs=8, batch_size=16, learning_rate=0.01, device="cpu")
    history = train_baseline(net, (x, y), (x, y), how, task=task)
    assert float(task.loss(net(x), y).detach()) < 0.8 * before
    right, counted = task.right(net(x), y)
    assert history[-1].accuracy == pytest.approx(int(right.sum()) / int(counted.sum()))
    assert accuracy_of(net, [(x[:11], y[:11]), (x[11:], y[11:])], task) == pytest.approx(history[-1].accuracy)


def test_rows_of_samples() -> None:
    assert by_sample(torch.zeros(2, 3, 4)).shape == (2, 12)
    assert by_sample(torch.zeros(0, 3, 4)).shape == (0, 12)
    assert by_sample(torch.zeros(3)).shape == (3, 1)
