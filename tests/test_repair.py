"""One block of a ResNet and of a vision transformer: the settings at each scale, layers inside of blocks, a run of seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from revprop.experiments import repair
from revprop.experiments.baseline import Baseline, load_baseline, load_baseline_data, weights_name
from revprop.experiments.catalogue import CATALOGUE, settings_of
from revprop.experiments.grid_study import GridStudy
from revprop.experiments.post_training_grid import PostTrainingGrid, grid_tasks
from revprop.networks import NETWORKS
from revprop.report import write_report
from revprop.runs import RunStore

PLACES = ("mnist/t", "cifar10/cifar10_lossless_subset.npz", "checkpoints/cifar10_resnet20.safetensors")


def put(root: Path, *places: str) -> None:
    for place in places:
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).touch()


def test_what_is_not_there_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no data for 'cifar10-lossless'.*no weights .*no data for 'mnist'"):
        repair.settings("reduced")
    put(tmp_path, PLACES[0], PLACES[1])
    study = repair.settings("reduced")
    assert [grid.baseline.network for grid in study.grids] == ["vit-mnist"]
    assert [why.partition(" in ")[0] for why in study.left_out] == [
        "no weights checkpoints/cifar10_resnet20.safetensors"
    ]
    put(tmp_path, PLACES[2])
    for scale, seeds, epochs in (("reduced", 3, 5), ("paper", 10, 10)):
        study = settings_of("any-network/repair", scale)
        assert [grid.baseline.network for grid in study.grids] == ["resnet20", "vit-mnist"]
        assert all(grid.seeds == tuple(range(seeds)) and grid.epochs == epochs for grid in study.grids)
        assert all(bool(grid.reduced) == (scale == "reduced") for grid in study.grids)
        assert not study.left_out
    with pytest.raises(ValueError, match="unknown scale 'small'"):
        repair.settings("small")
    with pytest.raises(ValueError, match="seeds: expected at least 1, given 0"):
        repair.settings("smoke", 0)


def test_weights_are_found_in_the_folder_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    save_file(NETWORKS["digits"](seed=7).state_dict(), tmp_path / "checkpoints" / "mine.safetensors")
    name = weights_name("checkpoints/mine.safetensors")
    assert name.startswith("checkpoints/mine.safetensors (")  # where the folder lies is no part of a row
    assert name[name.index("(") :] == weights_name(tmp_path / "checkpoints/mine.safetensors").split(" ")[-1]
    with pytest.raises(FileNotFoundError, match="no weights file checkpoints/yours"):
        weights_name("checkpoints/yours.safetensors")


def test_a_study_from_given_weights_tells_of_its_baseline(tmp_path: Path) -> None:
    save_file(NETWORKS["digits"](seed=7).state_dict(), tmp_path / "mine.safetensors")
    baseline = Baseline("digits", "digits", weights=str(tmp_path / "mine.safetensors"), samples=64)
    grid = PostTrainingGrid(baseline, epochs=1, cells=(("fc1", "fc2"),), fr=())
    lines: list[str] = []
    CATALOGUE["any-network/repair"].run(GridStudy((grid,)), tmp_path, device="cpu", report=lines.append, workers=1)
    assert ["baseline" in line for line in lines] == [True, False]


def test_cells_may_name_layers_inside_of_blocks(tmp_path: Path) -> None:
    made = Baseline("resnet20", "made:cifar10", 1)
    grid = PostTrainingGrid(made, cells=(("layer3.1", "layer3.2"), ("layer2", "layer3.0")), fr=())
    names = [task.name for task in grid_tasks(grid, tmp_path)[1:]]
    # conv1, bn1, relu, three blocks and layer1, three and layer2, three and layer3
    assert names == ["seed 0: BP (11, 12)", "seed 0: BP (13, 14)"]
    outside = replace(grid, cells=(("layer2", "layer3"),))
    (among_blocks,) = grid_tasks(outside, tmp_path)[1:]
    assert among_blocks.name == "seed 0: BP (5, 6)"
    with pytest.raises(ValueError, match=r"'layer3\.9'.* are not"):
        grid_tasks(replace(grid, cells=(("layer3.1", "layer3.9"),)), tmp_path)


def test_damage_is_drawn_from_the_seed_and_stays_in_its_module(tmp_path: Path) -> None:
    whole = Baseline("digits", "digits", 1, samples=64)
    data = load_baseline_data(whole)
    sound, accuracy, _ = load_baseline(whole, data, tmp_path, "cpu")
    broken, after, row = load_baseline(replace(whole, damage=("fc1", 2.0)), data, tmp_path, "cpu")
    other, _, _ = load_baseline(replace(whole, damage=("fc1", 2.0), seed=1), data, tmp_path, "cpu")
    assert row["accuracy_before_damage"] == accuracy
    assert row["accuracy"] == after != accuracy
    was, now = sound.state_dict(), broken.state_dict()
    assert [name for name in was if not torch.equal(was[name], now[name])] == ["fc1.0.weight"]
    noise = (now["fc1.0.weight"] - was["fc1.0.weight"]) / was["fc1.0.weight"].std()
    assert abs(float(noise.std()) - 2) < 0.1
    assert not torch.equal(now["fc1.0.weight"], other.state_dict()["fc1.0.weight"])
    with pytest.raises(ValueError, match="unknown module to damage 'fc3'; did you mean 'fc"):
        load_baseline(replace(whole, damage=("fc3", 2.0)), data, tmp_path, "cpu")


def test_both_blocks_are_trained_by_every_way(tmp_path: Path) -> None:
    grids = tuple(replace(grid, baseline=replace(grid.baseline, samples=64)) for grid in repair.settings("smoke").grids)
    rows = CATALOGUE["any-network/repair"].run(GridStudy(grids), tmp_path, device="cpu", workers=1)
    assert [row["settings"]["method"] for row in rows] == ["bp", "fr", "fr", "fr", "solve"] * 2
    assert [row["settings"].get("refine", 0) for row in rows] == [0, 0, 0, 4, 0] * 2
    assert {(row["settings"]["network"], row["l_start"], row["l_stop"]) for row in rows} == {
        ("resnet20", 13, 14),
        ("vit-mnist", 3, 4),
    }
    # two convolutions of 64 channels with their norms; one encoder block of width 48
    assert [row["parameters"] for row in rows[:4]] == [2 * (64 * 64 * 9 + 128)] * 4
    assert [row["parameters"] for row in rows[5:9]] == [2 * 96 + 49 * 144 + 49 * 48 + 49 * 96 + 97 * 48] * 4
    for baseline in RunStore(tmp_path / "baselines").rows():
        assert baseline["accuracy_before_damage"] is not None
    for row in rows:
        assert row["history"][0]["accuracy"] == row["baseline_accuracy"]
    for fr in (1, 2, 3, 6, 7, 8):  # towards wanted features, which are not the network's own
        assert rows[fr]["history"][-1]["reconstruction_loss"] > 0
    page = write_report(tmp_path, rows=rows).read_text(encoding="utf-8")
    assert "resnet20" in page
    assert "vit-mnist" in page
