"""Ways to train: the rates of published schedules, the penalty, changed images, and that a default changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from revprop.experiments.baseline import Baseline
from revprop.recipe import Recipe, augmented, flipped
from revprop.training import Training, train_baseline


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def trained(epochs: int, recipe: Recipe, checkpoint: Path | None = None) -> nn.Module:
    model = net()
    training = Training(epochs, 16, 0.01, 0, "cpu", checkpoint=checkpoint, recipe=recipe)
    torch.manual_seed(3)
    train_baseline(model, data(), None, training, augment=lambda x: recipe.augment(x, (0.0,) * 3, (1.0,) * 3))
    return model


def test_gradient_descent_takes_its_steps() -> None:
    recipe = Recipe("sgd", rates=((1, 0.5), (1, 0.25)), l1=0.1)
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 3.0]]))
    optimizer = recipe.optimizer_of(model.parameters(), 0.5)
    penalty = recipe.penalty(model)
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.6)
    penalty.backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.95, -1.95, 2.95]]))


def test_biases_and_norms_are_not_penalised() -> None:
    model = net()
    kernels = sum(float(p.abs().sum()) for p in (model[0].weight, model[4].weight))
    assert Recipe(l1=2.0).penalty(model).item() == pytest.approx(2 * kernels, rel=1e-5)
    assert Recipe().penalty(model) is None


@pytest.mark.parametrize("recipe", [Recipe(one_cycle=True, augmentation="adjoint"), Recipe("sgd", l1=1e-3)])
def test_an_interrupted_training_continues_to_the_same_numbers(tmp_path: Path, recipe: Recipe) -> None:
    whole = trained(3, recipe, tmp_path / "whole")
    kept = tmp_path / "parts"

    class StopError(Exception):
        pass

    calls = 0

    def stopping(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 4:  # within the second epoch of three steps
            raise StopError
        return recipe.augment(x, (0.0,) * 3, (1.0,) * 3)

    training = Training(3, 16, 0.01, 0, "cpu", checkpoint=kept, recipe=recipe)
    with pytest.raises(StopError):
        train_baseline(net(), data(), None, training, augment=stopping)
    continued = trained(3, recipe, kept)
    for a, b in zip(whole.parameters(), continued.parameters(), strict=True):
        assert torch.equal(a, b)


def test_images_are_changed_one_by_one() -> None:
    x = torch.rand(64, 3, 16, 16)
    mirrored = flipped(x)
    same = (mirrored == x).flatten(1).all(1)
    assert 0 < int(same.sum()) < 64
    assert torch.equal(mirrored[~same], x[~same].flip(3))
    grey = torch.full((64, 3, 16, 16), 0.5)
    shown = augmented(grey)
    assert shown.shape == grey.shape
    assert float((shown - shown[:, :, :1, :1]).abs().max()) < 1e-5  # what has one colour keeps one
    assert 0.4 < float((shown[:, 0, 0, 0] - 0.5).abs().max()) <= 0.5 + 1e-5  # brightness
    scaled = Recipe(augmentation="adjoint").augment((x - 0.5) / 0.2, (0.5,) * 3, (0.2,) * 3)
    torch.manual_seed(5)
    first = Recipe(augmentation="adjoint").augment((x - 0.5) / 0.2, (0.5,) * 3, (0.2,) * 3)
    torch.manual_seed(5)
    torch.testing.assert_close(first, (augmented(x) - 0.5) / 0.2, rtol=1e-4, atol=1e-4)
    assert scaled.shape == x.shape


def test_what_is_no_recipe() -> None:
    for wrong, words in (
        ({"optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"augmentation": "flip"}, "did you mean 'flips'"),
        ({"l1": -1.0}, "at least 0"),
        ({"rates": ((1, 0.1),), "one_cycle": True}, "none beside a cycle"),
    ):
        with pytest.raises(ValueError, match=words):
            Recipe(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give the mean and std"):
        Recipe(augmentation="adjoint").augment(torch.rand(1, 3, 8, 8), None, None)


def test_a_recipe_names_its_row_and_its_absence_does_not() -> None:
    plain = Baseline("digits", "digits", 2)
    assert "recipe" not in plain.settings()
    assert replace(plain, recipe=Recipe(l1=0.5)).settings()["recipe"] == Recipe(l1=0.5)
