"""The training loop: what it computes, and that no interruption changes the numbers."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_cases import Residual, changed, residual_data, run_and_kill, state_of

from revprop.experiments.baseline import Data
from revprop.networks import NETWORKS
from revprop.training import Epoch, Training, TrainingDivergedError, accuracy_of, fit, train_baseline

PLAIN = Training(epochs=5, batch_size=32, learning_rate=0.01, seed=3, device="cpu")


def problem(n: int = 100, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=generator, dtype=dtype)
    return x, torch.sin(2 * x).sum(1, keepdim=True)


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def two_part_loss(module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    error = module(batch[0]) - batch[1]
    return {"loss": error.square().mean(), "largest": error.abs().max()}


def numbers(history: list[Epoch]) -> list[tuple[int, dict[str, float], float | None]]:
    """A history without its times."""
    return [(e.epoch, e.losses, e.accuracy) for e in history]


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "batch_size"), [(96, 32), (100, 32), (20, 64)])
def test_fit_is_adam_on_seeded_shuffles(dtype: torch.dtype, n: int, batch_size: int) -> None:
    data, training = problem(n, dtype), replace(PLAIN, epochs=3, batch_size=batch_size)
    model, reference = network(dtype=dtype), network(dtype=dtype)
    fitted = fit(model, data, two_part_loss, training)

    generator = torch.Generator().manual_seed(training.seed)
    adam = torch.optim.Adam(reference.parameters(), lr=training.learning_rate)
    means = []
    for _ in range(training.epochs):
        total = [0.0, 0.0]
        for rows in torch.randperm(n, generator=generator).split(batch_size):
            losses = two_part_loss(reference, tuple(t[rows] for t in data))
            adam.zero_grad()
            losses["loss"].backward()
            adam.step()
            total = [t + v.item() * len(rows) for t, v in zip(total, losses.values(), strict=True)]
        means.append({"loss": total[0] / n, "largest": total[1] / n})
    torch.testing.assert_close(state_of(model), state_of(reference))  # torch's two ways to step Adam: equal to rounding
    assert fitted.history[0].losses == {}
    assert [e.losses for e in fitted.history[1:]] == [pytest.approx(mean, rel=1e-5) for mean in means]


def test_only_what_requires_gradients_is_trained() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = state_of(model)
    fit(model, problem(), two_part_loss, PLAIN)
    assert changed(before, state_of(model)) == {"2.weight", "2.bias"}


def test_the_seed_and_nothing_else_decides_the_numbers() -> None:
    def run(seed: int, outside: int) -> tuple[dict[str, Tensor], list[Any]]:
        model = Residual()
        torch.manual_seed(outside)  # dropout must not draw from here
        history = train_baseline(model, residual_data(), residual_data(), replace(PLAIN, epochs=2, seed=seed))
        return state_of(model), numbers(history)

    first, again, other = run(0, 1), run(0, 2), run(4, 1)
    assert changed(first[0], again[0]) == set()
    assert first[1] == again[1]
    assert "head.weight" in changed(first[0], other[0])
    assert first[1][1] != other[1][1]


def test_random_state_outside_is_left_alone() -> None:
    before = torch.get_rng_state()
    train_baseline(Residual(), residual_data(), None, replace(PLAIN, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_history() -> None:
    data, model = problem(), network()
    seen: list[float] = []

    def evaluate() -> float:
        seen.append(float((model(data[0]) - data[1]).detach().abs().mean()))
        return seen[-1]

    fitted = fit(model, data, two_part_loss, PLAIN, evaluate)
    assert [e.epoch for e in fitted.history] == [0, 1, 2, 3, 4, 5]
    assert [e.accuracy for e in fitted.history] == seen
    assert fitted.history[0] == Epoch(0, {}, seen[0], 0.0)
    assert all(set(e.losses) == {"loss", "largest"} and e.seconds > 0 for e in fitted.history[1:])
    assert all(b.losses["loss"] < a.losses["loss"] for a, b in itertools.pairwise(fitted.history[1:]))

    untouched = network()
    nothing = fit(untouched, data, two_part_loss, replace(PLAIN, epochs=0), lambda: 0.25)
    assert nothing.history == [Epoch(0, {}, 0.25, 0.0)]
    assert nothing.memory == 0
    assert changed(state_of(network()), state_of(untouched)) == set()


def test_an_epoch_of_several_passes_is_several_epochs(tmp_path: Path) -> None:
    data, one, other = problem(), network(), network()
    seen = fit(one, data, two_part_loss, replace(PLAIN, epochs=2, passes=3)).history
    apart = fit(other, data, two_part_loss, replace(PLAIN, epochs=6)).history
    assert changed(state_of(one), state_of(other)) == set()
    for epoch in (1, 2):
        mean = sum(e.losses["loss"] for e in apart[3 * epoch - 2 : 3 * epoch + 1]) / 3
        assert seen[epoch].losses["loss"] == pytest.approx(mean, rel=1e-6)
    kept = replace(PLAIN, epochs=1, passes=3, checkpoint=tmp_path)
    fit(network(), data, two_part_loss, kept)
    with pytest.raises(ValueError, match="passes differ"):
        fit(network(), data, two_part_loss, replace(kept, passes=2, epochs=2))
    with pytest.raises(ValueError, match="passes: expected at least 1, given 0"):
        replace(PLAIN, passes=0)


def test_what_is_observed_is_kept_and_accuracy_measured_when_asked(tmp_path: Path) -> None:
    def train(epochs: int, checkpoint: Path | None) -> list[Epoch]:
        training = replace(PLAIN, epochs=epochs, measure_every=2, checkpoint=checkpoint)
        return fit(
            network(),
            problem(),
            two_part_loss,
            training,
            lambda: 0.5,
            observe=lambda e: {"half": e / 2} if e != 1 else {},
        ).history

    train(3, tmp_path)
    history = train(5, tmp_path)
    assert [e.observed for e in history] == [{"half": 0.0}, {}, *({"half": e / 2} for e in range(2, 6))]
    assert [e.accuracy for e in train(5, None)] == [0.5, None, 0.5, None, 0.5, 0.5]


def test_memory_of_a_step_against_a_count_by_hand() -> None:
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    frozen, layer = nn.Linear(4, 4), nn.Linear(4, 3)
    frozen.requires_grad_(False)

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"loss": (module(batch[0]) - batch[1]).square().mean()}

    fitted = fit(nn.Sequential(frozen, layer), (x, y), loss, replace(PLAIN, epochs=1, batch_size=5))
    parameters = 4 * 20 + 3 * 4 * 15  # frozen ones as they are; trained ones with Adam's two averages
    batch, hidden, error = 4 * (20 + 15), 4 * 20, 4 * 15  # what is kept for the backward pass: layer's input, and x - y
    least = parameters + batch + hidden + error
    assert least < fitted.memory <= least + 5 * error  # and what the backward pass makes on the way of the error's size


def test_baseline_accuracies_and_mode() -> None:
    data = Data.load("digits")
    model = NETWORKS["digits"](seed=0)
    history = train_baseline(model, data.train, data.test, replace(PLAIN, epochs=10))
    assert not model.training
    with torch.no_grad():
        right = float((model(data.test[0]).argmax(1) == data.test[1]).double().mean())
    assert history[-1].accuracy == pytest.approx(right, abs=1e-12)
    assert right >= 0.95
    assert accuracy_of(model, [(data.test[0][:50], data.test[1][:50]), (data.test[0][50:], data.test[1][50:])]) == right
    without = train_baseline(NETWORKS["digits"](seed=0), data.train, None, replace(PLAIN, epochs=1))
    assert [e.accuracy for e in without] == [None, None]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"epochs": -1}, "epochs: expected at least 0, given -1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, given 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number, given 0.0"),
        ({"learning_rate": -0.1}, "learning_rate: expected a positive number, given -0.1"),
        ({"learning_rate": math.nan}, "learning_rate: expected a positive number, given nan"),
    ],
)
def test_bad_options(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**option)


@pytest.mark.parametrize(
    ("device", "accelerator", "devices"),
    [
        ("cpu", "cpu", 1),
        (torch.device("cpu"), "cpu", 1),
        ("cuda", "cuda", 1),
        ("cuda:2", "cuda", [2]),
        ("auto", "auto", 1),
    ],
)
def test_devices_are_named_as_in_torch(
    monkeypatch: pytest.MonkeyPatch, device: Any, accelerator: str, devices: Any
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("revprop.training.Fabric", lambda **options: asked.update(options))
    Training(device=device).fabric()
    assert asked == {"accelerator": accelerator, "devices": devices, "precision": "32-true"}


# -- interruptions ---------------------------------------------------------------------------------


class Net:
    """One of the networks on which interruptions are tried, with everything its training needs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def model(self, seed: int = 0) -> nn.Module:
        return network(seed) if self.name == "plain" else Residual(seed)

    def train(self, model: nn.Module, training: Training) -> list[Epoch]:
        if self.name == "plain":
            data = problem()
            return fit(model, data, two_part_loss, training, lambda: float(model(data[0]).detach().mean())).history
        return train_baseline(model, residual_data(), residual_data(40), training)


NETS = pytest.mark.parametrize("net", [Net("plain"), Net("residual")], ids=lambda net: net.name)


@pytest.fixture(scope="module", params=["plain", "residual"])
def uninterrupted(request: pytest.FixtureRequest) -> tuple[Net, dict[str, Tensor], list[Any]]:
    """A network, and parameters, buffers and history after five epochs without interruption or checkpoint."""
    net = Net(request.param)
    model = net.model()
    history = net.train(model, PLAIN)
    return net, state_of(model), numbers(history)


@pytest.mark.parametrize("stops", [(2,), (0, 1, 4), (5,)])
def test_resumed_training_gives_the_same_numbers(uninterrupted: Any, tmp_path: Path, stops: tuple[int, ...]) -> None:
    net, state, history = uninterrupted
    for epochs in stops:
        net.train(net.model(), replace(PLAIN, epochs=epochs, checkpoint=tmp_path))
    model = net.model(seed=9)  # whatever the module held before, the checkpoint decides
    if stops == (0, 1, 4):
        model = net.model()  # after no epoch there is no state
    assert numbers(net.train(model, replace(PLAIN, checkpoint=tmp_path))) == history
    assert changed(state, state_of(model)) == set()
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-0005.safetensors"]


def test_stopped_at_any_file_operation(uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops the run before and after each rename and removal of a file, as a kill would, and continues it."""
    net, state, history = uninterrupted
    real = {"replace": os.replace, "unlink": Path.unlink}
    left = [0]

    class StoppedError(BaseException):
        pass

    def stopping(operation: Callable[..., None]) -> Callable[..., None]:
        def stopped(*arguments: Any) -> None:
            for late in (False, True):
                if late:
                    operation(*arguments)
                left[0] -= 1
                if left[0] == 0:
                    raise StoppedError

        return stopped

    monkeypatch.setattr(os, "replace", stopping(real["replace"]))
    monkeypatch.setattr(Path, "unlink", stopping(real["unlink"]))
    for moment in range(1, 16):  # two renames and a removal per epoch, before and after: the first two epochs and more
        folder, model = tmp_path / str(moment), net.model()
        left[0] = moment
        with pytest.raises(StoppedError):
            net.train(net.model(), replace(PLAIN, checkpoint=folder))
        left[0] = -1
        assert numbers(net.train(model, replace(PLAIN, checkpoint=folder))) == history
        assert changed(state, state_of(model)) == set()


def train_in_a_process(folder: Path) -> None:
    torch.set_num_threads(1)
    net, training = Net("residual"), replace(PLAIN, epochs=40, checkpoint=folder)
    (folder.parent / "started").touch()
    net.train(net.model(), training)


def test_killed_training_continues_to_the_same_numbers(tmp_path: Path) -> None:
    draw, kills = random.Random(0), 0
    arguments = (train_in_a_process, (tmp_path / "kept",), tmp_path / "started")
    while kills < 3 and run_and_kill(*arguments, after=draw.uniform(0.1, 0.4)):
        kills += 1
        (tmp_path / "started").unlink()
    assert kills >= 1
    done = json.loads((tmp_path / "kept" / "state.json").read_text())["history"][-1]["epoch"]
    assert 1 <= done <= 40
    models = [Net("residual").model() for _ in range(2)]
    killed = Net("residual").train(models[0], replace(PLAIN, epochs=40, checkpoint=tmp_path / "kept"))
    whole = Net("residual").train(models[1], replace(PLAIN, epochs=40))
    assert numbers(killed) == numbers(whole)
    assert changed(state_of(models[1]), state_of(models[0])) == set()


def test_left_over_files_do_not_matter(uninterrupted: Any, tmp_path: Path) -> None:
    net, state, history = uninterrupted
    net.train(net.model(), replace(PLAIN, epochs=2, checkpoint=tmp_path))
    for name in (".state-0003.safetensors.part", ".state.json.part", "state-0003.safetensors", ".tmp6Xz9aQ"):
        (tmp_path / name).write_bytes(b"half a file")
    model = net.model()
    assert numbers(net.train(model, replace(PLAIN, checkpoint=tmp_path))) == history
    assert changed(state, state_of(model)) == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-0005.safetensors", "state.json"]


@pytest.mark.parametrize(
    ("other", "identity", "differing"),
    [
        ({"batch_size": 16}, {"kind": "a"}, "batch_size differ"),
        ({"learning_rate": 0.02, "seed": 4}, {"kind": "a"}, "learning_rate, seed differ"),
        ({}, {"kind": "b"}, "kind differ"),
        ({"seed": 4}, {}, "kind, seed differ"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    tmp_path: Path, other: dict[str, Any], identity: dict[str, str], differing: str
) -> None:
    settings = replace(PLAIN, epochs=2, checkpoint=tmp_path)
    fit(network(), problem(), two_part_loss, settings, identity={"kind": "a"})
    before, model = {path.name: path.read_bytes() for path in tmp_path.iterdir()}, network()
    expected = rf"{tmp_path.name} holds the checkpoint of other settings \({differing}\); choose another"
    with pytest.raises(ValueError, match=expected):
        fit(model, problem(), two_part_loss, replace(settings, **other), identity=identity)
    assert changed(state_of(network()), state_of(model)) == set()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_with_more_epochs_is_refused(tmp_path: Path) -> None:
    fit(network(), problem(), two_part_loss, replace(PLAIN, epochs=3, checkpoint=tmp_path))
    with pytest.raises(ValueError, match="has trained 3 epochs already, more than the 2 asked for"):
        fit(network(), problem(), two_part_loss, replace(PLAIN, epochs=2, checkpoint=tmp_path))


@pytest.mark.parametrize("name", ["state.json", "state-0002.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    fit(network(), problem(), two_part_loss, replace(PLAIN, epochs=2, checkpoint=tmp_path))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if damage == "cut":
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    model = network(seed=7)
    if (name, damage) == ("state.json", "gone"):  # then there is no checkpoint
        assert len(fit(model, problem(), two_part_loss, replace(PLAIN, epochs=2, checkpoint=tmp_path)).history) == 3
        return
    expected = rf"{name} is (no whole checkpoint|damaged) .*; delete .*{tmp_path.name} to start anew"
    with pytest.raises(ValueError, match=expected):
        fit(model, problem(), two_part_loss, replace(PLAIN, checkpoint=tmp_path))
    assert changed(state_of(network(seed=7)), state_of(model)) == set()


# -- divergence ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    """Sample 70 is poisonous from the third epoch on; repaired, the run continues to the numbers of a whole one."""
    data, poisonous, calls = problem(), [True], [0]

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        calls[0] += 1
        parts = two_part_loss(module, batch)
        sick = poisonous[0] and calls[0] > 8 and bool((batch[0] == data[0][70]).all(1).any())
        return {**parts, "loss": parts["loss"] * math.nan} if sick else parts

    generator = torch.Generator().manual_seed(PLAIN.seed)
    orders = [torch.randperm(100, generator=generator).tolist() for _ in range(3)]
    step = orders[2].index(70) // 32 + 1
    kept = tmp_path / "state-0002.safetensors"
    expected = f"the loss is nan at step {step} of epoch 3; the last good state is {kept}. Lower the learning rate"
    with pytest.raises(TrainingDivergedError, match=re.escape(expected)):
        fit(network(), data, loss, replace(PLAIN, checkpoint=tmp_path))

    two, five, whole = network(), network(), network()
    fit(two, data, two_part_loss, replace(PLAIN, epochs=2))
    stored = {k.removeprefix("parameter."): v for k, v in load_file(kept).items() if k.startswith("parameter.")}
    assert changed(state_of(two), stored) == set()
    poisonous[0] = False
    resumed = fit(five, data, loss, replace(PLAIN, checkpoint=tmp_path)).history
    assert numbers(resumed) == numbers(fit(whole, data, two_part_loss, PLAIN).history)
    assert changed(state_of(whole), state_of(five)) == set()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_without_checkpoint(value: float) -> None:
    expected = f"the loss is {value} at step 1 of epoch 1; no checkpoint was kept"
    with pytest.raises(TrainingDivergedError, match=expected):
        fit(network(), problem(), lambda m, b: {"loss": m(b[0]).sum() * value}, PLAIN)


def test_an_infinite_gradient_of_a_finite_loss_is_not_saved(tmp_path: Path) -> None:
    """sqrt(0) is finite, its slope is not: what an epoch's last step leaves behind must not become the checkpoint."""
    model, calls = nn.Linear(1, 1, bias=False), [0]

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        calls[0] += 1
        return {"loss": module(batch[0] * (0.0 if calls[0] == 4 else 1.0)).square().sum().sqrt()}

    expected = r"a trained parameter is NaN or infinite at step 2 of epoch 2; the last good state is .*state-0001\."
    with pytest.raises(TrainingDivergedError, match=expected):
        fit(model, (torch.ones(4, 1),), loss, replace(PLAIN, batch_size=2, checkpoint=tmp_path))
    assert bool(load_file(tmp_path / "state-0001.safetensors")["parameter.weight"].isfinite().all())
    assert json.loads((tmp_path / "state.json").read_text())["state"] == "state-0001.safetensors"
