"""Wanted features scaled by their variance, and computed anew while training: numbers by hand, and what it leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_cases import Residual, changed, digits, digits_network, residual_data, state_of

from revprop import PostTraining, post_train, reconstruct, training
from revprop.closed_form import ClosedForm
from revprop.graph import Graph, trace

F64 = torch.float64
QUICK: dict[str, Any] = {"epochs": 3, "batch_size": 64, "learning_rate": 0.003, "device": "cpu"}


@pytest.fixture(scope="module")
def digits_graph() -> Graph:
    return trace(digits_network(), digits().train[0][:2])


@pytest.fixture(scope="module")
def residual_graph() -> Graph:
    return trace(Residual().double().eval(), residual_data(dtype=F64)[0])


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The wanted features as each epoch begins."""
    found: list[Tensor] = []
    run: Any = training.fit

    def watched(module: nn.Module, data: Any, *rest: Any) -> Any:
        *others, before = rest

        def before_epoch(epoch: int) -> None:
            if before is not None:
                before(epoch)
            found.append(data[-1].clone())

        return run(module, data, *others, before_epoch)

    monkeypatch.setattr("revprop.post_training.fit", watched)
    return found


# -- rescale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", ["nearest", "maximum", "one_hot"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize(("start", "stop"), [("stem", "block1"), ("block2", "output")])
def test_the_rescaled_loss_by_hand(residual_graph: Graph, start: str, stop: str, alpha: float, embedding: Any) -> None:
    x, y = residual_data(dtype=F64)
    settings = {**QUICK, "epochs": 1, "learning_rate": 1e-15}
    result = post_train(
        residual_graph, (x, y), start, stop, alpha=alpha, rescale=True, embedding=embedding, margin=0.5, **settings
    )
    rec = reconstruct(residual_graph, x, y, to=stop, embedding=embedding, margin=0.5)
    recorded, wanted = rec.recorded[stop], rec[stop]
    variance = float((wanted - wanted.mean(0)).square().mean())  # each entry over the samples, then over the entries
    if embedding == "maximum":
        distance = float((recorded - wanted).abs().mean()) / variance**0.5
    else:
        distance = float((recorded - wanted).square().mean()) / variance
    classification = F.cross_entropy(residual_graph(x), y).item()
    losses = result.history[1].losses
    assert losses["reconstruction"] == pytest.approx(distance, rel=1e-5)
    assert losses["loss"] == pytest.approx((1 - alpha) * classification * (alpha < 1) + alpha * distance, rel=1e-5)


@pytest.mark.parametrize("n", [1, 20])
def test_wanted_features_that_are_all_the_same_are_not_scaled(n: int) -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(n, 4)
    labels = torch.ones(n, dtype=torch.long)
    runs = [
        post_train(model, (x, labels), "input", "output", embedding="one_hot", rescale=r, **QUICK)
        for r in (True, False)
    ]
    assert runs[0].history[1].losses == runs[1].history[1].losses
    assert changed(state_of(runs[0].model), state_of(runs[1].model)) == set()


@pytest.mark.parametrize("options", [{"rescale": True}, {"refresh": 1}, {"refresh": 2, "rescale": True}], ids=str)
def test_methods_without_wanted_features_do_not_mind(residual_graph: Graph, options: dict[str, Any]) -> None:
    data, way = residual_data(dtype=F64), ClosedForm((1.0,), (0.1,), sweeps=2)
    for method in ({"method": "bp"}, {"method": "fr", "alpha": 0.0}, {"method": "solve", "closed_form": way}):
        plain, other = (
            post_train(residual_graph, data, "stem", "block1", **method, **more, **QUICK) for more in ({}, options)
        )
        assert changed(state_of(plain.model), state_of(other.model)) == set()
        assert [e.losses for e in plain.history] == [e.losses for e in other.history]


# -- refresh ----------------------------------------------------------------------------------------


def after_epochs(graph: Graph, data: Any, folder: Path, **options: Any) -> list[nn.Module]:
    """The network after 0, 1, 2, ... epochs of one run, stopped and continued by its checkpoint."""
    models = [graph.model]
    for epochs in range(1, options["epochs"]):
        run = post_train(graph, data, "conv1", "fc1", checkpoint=folder, **{**options, "epochs": epochs})
        models.append(copy.deepcopy(run.model))
    return models


@pytest.mark.parametrize(
    "way", [{"strategy": "global", "margin": 0.5}, {"strategy": "greedy", "damping": 0.1}], ids=str
)
def test_refreshed_targets_are_those_of_the_network_as_it_is_then(
    digits_graph: Graph, targets: list[Tensor], tmp_path: Path, way: dict[str, Any]
) -> None:
    """Greedy, too, where what was factored of the weights before must not be used again."""
    x, y = digits().train
    options = {**QUICK, **way, "alpha": 0.5, "refresh": 1}
    models = after_epochs(digits_graph, (x, y), tmp_path, **options)
    targets.clear()
    post_train(digits_graph, (x, y), "conv1", "fc1", **options)
    assert len(targets) == 3
    for model, found in zip(models, targets, strict=True):
        graph = digits_graph.on(model)
        wanted = torch.cat(
            [reconstruct(graph, a, b, to="fc1", **way)["fc1"] for a, b in zip(x.split(256), y.split(256), strict=True)]
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(targets[0], targets[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("refresh", "renewed"), [(None, []), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3]), (9, [])])
def test_targets_are_refreshed_after_so_many_epochs(
    digits_graph: Graph, targets: list[Tensor], refresh: int | None, renewed: list[int]
) -> None:
    post_train(digits_graph, digits().train, "conv1", "fc1", refresh=refresh, **{**QUICK, "epochs": 5})
    assert [i for i in range(1, 5) if not torch.equal(targets[i], targets[i - 1])] == renewed


@pytest.mark.parametrize("rescale", [False, True])
def test_a_refreshed_run_that_was_interrupted_continues_to_the_same_numbers(
    digits_graph: Graph, tmp_path: Path, rescale: bool
) -> None:
    def run(epochs: int, checkpoint: Path | None) -> PostTraining:
        options = {**QUICK, "epochs": epochs, "alpha": 0.5, "refresh": 1, "rescale": rescale}
        return post_train(digits_graph, digits().train, "conv1", "fc1", checkpoint=checkpoint, **options)

    whole, _, continued = run(4, None), run(2, tmp_path), run(4, tmp_path)
    assert changed(state_of(whole.model), state_of(continued.model)) == set()
    assert [e.losses for e in continued.history] == [e.losses for e in whole.history]
    other = {**QUICK, "epochs": 5, "alpha": 0.5}
    with pytest.raises(ValueError, match=r"the checkpoint of other settings \(.*refresh.* differ\)"):
        post_train(digits_graph, digits().train, "conv1", "fc1", checkpoint=tmp_path, rescale=rescale, **other)
    with pytest.raises(ValueError, match=r"the checkpoint of other settings \(.*rescale.* differ\)"):
        post_train(
            digits_graph,
            digits().train,
            "conv1",
            "fc1",
            checkpoint=tmp_path,
            rescale=not rescale,
            **{**other, "refresh": 1},
        )


@pytest.mark.parametrize("budget", [0, 100_000])
def test_memory_mapped_targets_are_refreshed_to_the_same_numbers(digits_graph: Graph, budget: int) -> None:
    x, y = digits().train
    kept = x.clone()
    runs = [
        post_train(
            digits_graph, (x, y), "conv1", "fc1", alpha=0.5, refresh=1, rescale=True, memory_budget=size, **QUICK
        )
        for size in (2**30, budget)
    ]
    assert changed(*(state_of(r.model) for r in runs)) == set()
    assert [e.losses for e in runs[0].history] == [e.losses for e in runs[1].history]
    assert torch.equal(x, kept)


def test_a_refreshed_model_is_the_copy_alone(digits_graph: Graph) -> None:
    before = state_of(digits_graph.model)
    result = post_train(digits_graph, digits().train, "conv1", "fc1", refresh=1, **QUICK)
    assert changed(before, state_of(digits_graph.model)) == set()
    assert changed(before, state_of(result.model)) == set(result.trained)
    assert all(p.grad is None and p.requires_grad for p in result.model.parameters())


@pytest.mark.parametrize(("refresh", "checkpoint"), [(0, False), (-1, False), (2, True), (0, True)])
def test_a_refresh_that_cannot_be_is_refused(
    digits_graph: Graph, tmp_path: Path, refresh: int, checkpoint: bool
) -> None:
    with pytest.raises(
        ValueError, match=rf"refresh: expected a number of epochs >= 1, and 1 where .*; given {refresh}"
    ):
        post_train(
            digits_graph,
            digits().train,
            "conv1",
            "fc1",
            refresh=refresh,
            checkpoint=tmp_path if checkpoint else None,
            **QUICK,
        )


# -- values kept by sample --------------------------------------------------------------------------


class Moved(nn.Module):
    """(n, 7, 4) -> (n, 3): in the middle time comes first, or time and samples are one dimension."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged = merged
        self.front, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.front(x))
        if self.merged:
            return self.b(torch.tanh(self.a(x.reshape(-1, 4))).reshape(-1, 7, 5).mean(1))
        return self.b(torch.tanh(self.a(x.transpose(0, 1))).transpose(0, 1).mean(1))


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("method", ["bp", "fr"])
def test_samples_that_are_moved_or_merged_in_front_of_what_is_trained(method: Any, merged: bool) -> None:
    """What is kept of the frozen part is kept by sample, so samples can be shuffled."""
    torch.manual_seed(0)
    model, x, y = Moved(merged).double(), torch.randn(30, 7, 4, dtype=F64), torch.arange(30) % 3
    result = post_train(model, (x, y), "front", "output", method=method, alpha=0.5, **{**QUICK, "batch_size": 8})
    assert set(result.trained) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    wanted = reconstruct(model, x, y, to="output")["output"]
    reference = copy.deepcopy(model)
    trained = [p for name, p in reference.named_parameters() if name in result.trained]
    adam, generator = torch.optim.Adam(trained, lr=QUICK["learning_rate"]), torch.Generator().manual_seed(0)
    for _ in range(QUICK["epochs"]):
        for rows in torch.randperm(30, generator=generator).split(8):
            outputs = reference(x[rows])
            loss = F.cross_entropy(outputs, y[rows])
            if method == "fr":
                loss = 0.5 * loss + 0.5 * F.mse_loss(outputs, wanted[rows])
            reference.zero_grad()
            loss.backward()
            adam.step()
    torch.testing.assert_close(state_of(result.model), state_of(reference), rtol=1e-7, atol=1e-9)
