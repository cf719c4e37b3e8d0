"""Closed-form post-training as a whole: what a sweep may do, what chooses, what is refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_cases import Residual, Tied, changed, digits, digits_network, residual_data, state_of

import revprop.closed_form
from revprop import NonFiniteError, PostTraining, Training, post_train, train_baseline
from revprop.closed_form import ClosedForm, Refit
from revprop.graph import Graph, trace
from revprop.networks import NETWORKS
from revprop.training import accuracy_of

F64 = torch.float64
QUICK = ClosedForm((1.0,), (0.1,), sweeps=3)


def solved(model: nn.Module | Graph, data: Any, start: str, stop: str, **options: Any) -> PostTraining:
    return post_train(model, data, start, stop, method="solve", **{"closed_form": QUICK, "device": "cpu", **options})


def small(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes))


def points(n: int = 60, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 4, generator=generator), torch.randint(0, classes, (n,), generator=generator)


class Depthwise(nn.Module):
    """(n, 2, 6, 6) -> (n, 4): dilated and grouped convolutions, and one whose output goes two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(2, 4, 3, dilation=2, padding=2, groups=2)
        self.deep = nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.wide(x))
        b = torch.relu(self.norm(self.deep(a)))
        return self.head(torch.cat([a.mean((2, 3)), b.amax((2, 3))], 1))


class Upwards(nn.Module):
    """(n, 2, 6, 6) -> (n, 4): through one dimension, up again by a transposed convolution, and through three."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(2, 4, 5, stride=4)
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1)
        self.volume = nn.Conv3d(1, 2, 2)
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.line(x.flatten(2)))[..., :4]
        b = torch.tanh(self.up(a.view(-1, 4, 2, 2)))
        return self.head(torch.tanh(self.volume(b[:, None])).mean((2, 3, 4)))


NETWORKS_2X6X6: dict[str, tuple[Callable[[], nn.Module], str, str, set[str]]] = {
    "residual, all": (
        Residual,
        "input",
        "output",
        {"stem", "block1.conv1", "block1.conv2", "block1.down", "block2.conv1", "block2.conv2", "block2.down", "head"},
    ),
    "residual, a block": (Residual, "stem", "block1", {"block1.conv1", "block1.conv2", "block1.down"}),
    "residual, in a block": (Residual, "block1.bn1", "block1.conv2", {"block1.conv2"}),
    "residual, the head": (Residual, "block2", "output", {"head"}),
    "grouped and dilated": (Depthwise, "input", "output", {"wide", "deep", "head"}),
    "one and three dimensions": (Upwards, "input", "output", {"line", "up", "volume", "head"}),
}


@functools.cache
def graph_of(make: Callable[[], nn.Module]) -> Graph:
    return trace(make().double().eval(), residual_data(2, F64)[0])


@pytest.mark.parametrize("embedding", ["nearest", "maximum", "one_hot"])
@pytest.mark.parametrize("kind", NETWORKS_2X6X6)
def test_no_refit_takes_the_outputs_further_from_the_wanted_ones(
    kind: str, embedding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: the linear layers and convolutions asked for change, nothing else does, and the model given is as it was."""
    make, start, stop, expected = NETWORKS_2X6X6[kind]
    traced, model, data = graph_of(make), graph_of(make).model, residual_data(50, F64)
    before, distances, real = state_of(model), [], revprop.closed_form._refit

    def watched(graph: Graph, layer: Refit, batches: Any, wanted: Any, *rest: Any) -> float:
        first = layer.distance(batches, wanted)
        result = real(graph, layer, batches, wanted, *rest)
        distances.append((first, layer.distance(batches, wanted)))
        return result

    monkeypatch.setattr(revprop.closed_form, "_refit", watched)
    result = solved(traced, data, start, stop, embedding=embedding, batch_size=20)
    assert len(distances) == QUICK.sweeps * len(expected)
    assert all(after <= first * (1 + 1e-9) for first, after in distances)
    assert distances[-1][1] < distances[0][0]
    names = {n for n in before if n.rpartition(".")[0] in expected}
    assert set(result.trained) == names
    assert changed(before, state_of(result.model)) <= names
    assert changed(before, state_of(model)) == set()
    assert result.parameters == sum(before[name].numel() for name in names)
    assert all(p.requires_grad and p.grad is None for p in result.model.parameters())
    assert result.peak_memory > 0


def test_the_history_has_one_entry_per_sweep() -> None:
    x, y = points()
    result = solved(small(), (x, y), "input", "output", validation=(x, y))
    assert [e.epoch for e in result.history] == [0, 1, 2, 3]
    assert result.history[0].losses == {}
    assert all(e.losses["loss"] == e.losses["reconstruction"] > 0 for e in result.history[1:])
    assert result.history[-1].accuracy == accuracy_of(result.model, [(x, y)])
    assert result.seconds == sum(e.seconds for e in result.history) >= 0


def test_the_seed_decides_the_numbers() -> None:
    model, few = trace(small(), points()[0]), ClosedForm((1.0,), (0.1,), sweeps=2, per_sweep=20)
    states = [state_of(solved(model, points(), "input", "2", closed_form=few, seed=s).model) for s in (0, 0, 1)]
    assert changed(states[0], states[1]) == set()
    assert changed(states[0], states[2]) == set(states[0])


def test_the_batch_size_plays_no_part() -> None:
    model, (x, y) = small().double(), points()
    first, second = (state_of(solved(model, (x.double(), y), "input", "2", batch_size=b).model) for b in (7, 256))
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-9)


def test_labels_that_win_already_ask_for_no_change() -> None:
    model, (x, _) = small(), points()
    labels = model(x).argmax(1)
    result = solved(model, (x, labels), "input", "output", closed_form=ClosedForm((0.0,), (0.1,), sweeps=2))
    torch.testing.assert_close(state_of(result.model), state_of(model), rtol=1e-6, atol=1e-6)
    assert [e.losses["loss"] for e in result.history[1:]] == [0.0, 0.0]


@pytest.mark.parametrize("n", [1, 2])
def test_one_sample_one_class_one_output(n: int) -> None:
    x, _ = points(n)
    result = solved(small(), (x, torch.full((n,), 2)), "input", "output")
    assert (result.model(x).argmax(1) == 2).all()
    single = small(1)
    result = solved(single, (x, torch.zeros(n, dtype=torch.long)), "input", "output")
    assert changed(state_of(single), state_of(result.model)) == set()


def test_more_outputs_than_are_inverted_densely() -> None:
    x, _ = points(200)
    model, y = small(80), nn.Linear(4, 80)(x).argmax(1)
    result = solved(model, (x, y), "input", "output", validation=(x, y))
    assert set(result.trained) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert result.history[-1].accuracy > result.history[0].accuracy + 0.02  # type: ignore[operator]


def test_more_outputs_than_are_inverted_densely_behind_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 70)).double()
    x = torch.randn(90, 1, 6, 6, dtype=F64)
    y = nn.Sequential(nn.Flatten(), nn.Linear(36, 70)).double()(x).argmax(1)
    result = solved(model, (x, y), "input", "output", validation=(x, y))
    assert set(result.trained) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert result.history[-1].accuracy > result.history[0].accuracy + 0.02  # type: ignore[operator]


# -- which samples are seen -------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The labels of each refit, in its order."""
    found: list[Tensor] = []
    real = Refit.normal_equations

    def watched(self: Refit, batches: Any, *rest: Any) -> Any:
        found.append(torch.cat([labels for *_, labels in batches]))
        return real(self, batches, *rest)

    monkeypatch.setattr(Refit, "normal_equations", watched)
    return found


def test_each_sweep_is_on_the_next_samples_and_so_many(seen: list[Tensor]) -> None:
    model, x, numbers = nn.Linear(4, 60), points()[0], torch.arange(60)
    way = ClosedForm((1.0,), (0.1,), sweeps=4, per_sweep=25, samples=None)
    solved(model, (x, numbers), "input", "output", closed_form=way)
    assert [len(labels) for labels in seen] == [25] * 4
    assert len(set(torch.cat(seen[:2]).tolist())) == 50
    assert set(torch.cat(seen[:3]).tolist()) == set(range(60))  # and round again
    assert torch.cat(seen[:3])[60:].equal(seen[0][:15])


@pytest.mark.parametrize("kind", ["tensors", "list", "DataLoader"])
def test_so_many_samples_are_used_at_all(seen: list[Tensor], kind: str) -> None:
    x, numbers = points()[0], torch.arange(60)
    loader: Any = {
        "tensors": (x, numbers),
        "list": list(zip(x.split(7), numbers.split(7), strict=True)),
        "DataLoader": DataLoader(TensorDataset(x, numbers), batch_size=16),
    }[kind]
    way = ClosedForm((1.0,), (0.1,), sweeps=3, per_sweep=15, samples=20)
    solved(nn.Linear(4, 60), loader, "input", "output", closed_form=way)
    assert [len(labels) for labels in seen] == [15] * 3
    assert len(set(torch.cat(seen).tolist())) == 20


def test_fewer_samples_than_asked_for_are_all_used(seen: list[Tensor]) -> None:
    solved(small(), points(), "input", "output")
    assert [len(labels) for labels in seen] == [60] * (3 * 2)


def test_memory_mapped_features_give_the_same_numbers() -> None:
    graph = trace(digits_network(), digits().train[0][:2])
    states = [
        state_of(solved(graph, digits().train, "conv1", "output", memory_budget=budget).model) for budget in (2**30, 0)
    ]
    assert changed(*states) == set()


# -- what chooses -----------------------------------------------------------------------------------


def test_several_ways_without_unseen_data_to_choose_by_are_refused() -> None:
    for way in (ClosedForm((1.0, 2.0)), ClosedForm(dampings=(0.1, 1.0))):
        with pytest.raises(
            ValueError, match=r"2 pairs of margin and damping, .*: give selection=<loader>, or one of each"
        ):
            solved(small(), points(), "input", "output", closed_form=way)


def test_selection_keeps_the_best_of_all_sweeps_of_all_ways() -> None:
    graph, data = trace(digits_network(), digits().train[0][:2]), digits().train
    held_out = digits().test
    ways = [(margin, damping) for margin in (0.5, 5.0) for damping in (0.1, 10.0)]
    scores = {}
    for margin, damping in ways:
        one = solved(
            graph,
            data,
            "conv2",
            "output",
            closed_form=ClosedForm((margin,), (damping,), sweeps=3),
            validation=held_out,
        )
        scores[margin, damping] = [e.accuracy for e in one.history]
    best = max(max(trail) for trail in scores.values())  # type: ignore[type-var]
    way = ClosedForm((0.5, 5.0), (0.1, 10.0), sweeps=3)
    result = solved(graph, data, "conv2", "output", closed_form=way, selection=held_out, validation=held_out)
    accuracies = [e.accuracy for e in result.history]
    assert accuracies[-1] == best == accuracy_of(result.model, [held_out])
    assert accuracies in [trail[: len(accuracies)] for trail in scores.values()]
    assert best > accuracies[0]  # type: ignore[operator]


def test_selection_keeps_the_network_as_it_was_where_everything_is_worse() -> None:
    """Noise to fit, and labels to choose by that are the network's own answers."""
    model, (x, y) = small(), points()
    way = ClosedForm((5.0, 10.0), (0.01, 0.1), sweeps=2)
    result = solved(model, (x, y), "input", "output", closed_form=way, selection=(x, model(x).argmax(1)))
    assert changed(state_of(model), state_of(result.model)) == set()
    assert [(e.epoch, e.losses) for e in result.history] == [(0, {})]


@pytest.mark.parametrize("selected", [True, False])
def test_validation_never_has_a_say(selected: bool) -> None:
    (x, y), model = points(), trace(small(), points()[0])
    options: dict[str, Any] = {"selection": (x[:20], y[:20])} if selected else {}
    results = [
        solved(model, (x[20:], y[20:]), "input", "output", validation=validation, **options)
        for validation in (None, (x, y), (x, (y + 1) % 3))
    ]
    for result in results[1:]:
        assert changed(state_of(results[0].model), state_of(result.model)) == set()
        assert [e.losses for e in result.history] == [e.losses for e in results[0].history]


@pytest.mark.parametrize("what", ["selection", "validation"])
def test_unseen_data_that_is_empty_is_refused(what: str) -> None:
    x, y = points()
    with pytest.raises(ValueError, match=rf"{what}: expected batches of \(inputs, labels\); it gave none"):
        solved(small(), (x, y), "input", "output", **{what: (x[:0], y[:0])})


def test_an_undertrained_network_gains_on_images_it_has_not_seen() -> None:
    data = digits()
    x, y = data.train
    model = NETWORKS["digits"](seed=0)
    train_baseline(model, (x, y), None, Training(epochs=3, batch_size=32, device="cpu"))
    result = solved(
        model.eval(),
        (x, y),
        "conv2",
        "output",
        closed_form=ClosedForm((10.0,), (1.0,), sweeps=6),
        validation=data.test,
    )
    accuracies = [e.accuracy or 0.0 for e in result.history]
    assert accuracies[0] < 0.9
    assert accuracies[-1] > accuracies[0] + 0.05


# -- what is refused --------------------------------------------------------------------------------


class Shared(nn.Module):  # a bias only
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Moved(nn.Module):
    """(n, 7, 4) -> (n, 3): in the middle time comes first, or time and samples are one dimension."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged = merged
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.b(torch.tanh(self.a(x.reshape(-1, 4))).reshape(-1, 7, 5).mean(1))
        return self.b(torch.tanh(self.a(x.transpose(0, 1))).transpose(0, 1).mean(1))


def test_a_parameter_used_twice_is_refused() -> None:
    twice = nn.Linear(4, 4)
    reused = nn.Sequential(twice, nn.Tanh(), twice, nn.Tanh(), nn.Linear(4, 3))
    for model, name in ((reused, r"0\.weight"), (Shared(), r"a\.bias")):
        with pytest.raises(ValueError, match=rf'{name} is used more than once: .*use method="fr" or "bp"'):
            solved(model, points(), "input", "output")
    x, y = digits().train
    with pytest.raises(ValueError, match=r"second\.weight is used more than once"):
        solved(Tied().eval(), (x, y), "input", "output")


def test_samples_that_are_not_the_first_dimension_are_refused() -> None:
    for merged in (True, False):
        with pytest.raises(ValueError, match=r"a\.weight is used where the samples are not the first dimension"):
            solved(Moved(merged), (torch.randn(7, 7, 4), torch.arange(7) % 3), "input", "output")


def test_modules_without_a_linear_layer_or_a_convolution_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    with pytest.raises(ValueError, match=r'nothing to refit in closed form among 1\.weight, 1\.bias: .*method="fr"'):
        solved(model, points(), "0", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margins": ()}, "margins: expected one or more numbers in a tuple, none below 0; given"),
        ({"margins": 3.0}, r"margins: .*; given 3\.0"),
        ({"margins": (1.0, math.nan)}, "margins: .*; given .*nan"),
        ({"margins": (math.inf,)}, "margins: .*; given .*inf"),
        ({"margins": ("3",)}, "margins: .*; given .*'3'"),
        ({"dampings": (-0.1,)}, "dampings: .*none below 0"),
        ({"sweeps": 0}, "sweeps: expected a whole number, at least 1; given 0"),
        ({"sweeps": 1.5}, r"sweeps: .*; given 1\.5"),
        ({"per_sweep": None}, "per_sweep: .*; given None"),
        ({"samples": 0}, "samples: .*; given 0"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClosedForm(**options)


def test_nan_is_refused_at_the_door() -> None:
    x, y = points()
    bad = x.clone()
    bad[41, 2] = math.nan
    for data, selection in (((bad, y), None), ((x, y), (bad, y))):
        with pytest.raises(NonFiniteError, match=r"input .* holds 1 of 240 values that are NaN or infinite"):
            solved(small(), data, "input", "output", selection=selection)
    model = small()
    with torch.no_grad():
        model[0].bias[1] = math.inf  # type: ignore[index]
    with pytest.raises(NonFiniteError, match=r"parameter '0\.bias' holds 1 of 6 values"):
        solved(model, (x, y), "input", "output")


def test_other_bad_options() -> None:
    x, y = points()
    for options, message in (
        ({"embedding": "nearst"}, "unknown embedding 'nearst'; did you mean 'nearest'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, given 0"),
        ({"selection": (x, y + 1)}, "labels: expected 0 to 2 for 3 outputs; given 1 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            solved(small(), (x, y), "input", "output", **options)
