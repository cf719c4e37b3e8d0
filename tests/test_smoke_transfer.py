"""Smoke: its data, the networks of Racecar's Table 13, and the experiment and report at smoke scale."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from revprop.datasets import smoke as data
from revprop.datasets.smoke import load_smoke, made_smoke, simulate, write_smoke
from revprop.experiments import smoke_transfer
from revprop.experiments.catalogue import CATALOGUE, settings_of
from revprop.experiments.smoke_transfer import SmokeTransfer, train_gan
from revprop.networks.smoke import SmokeGenerator, smoke_autoencoder, smoke_discriminator, smoke_generator
from revprop.racecar import Racecar
from revprop.report import study_tables, write_figures, write_markdown, write_report
from revprop.report.smoke_sections import PUBLISHED_SMOKE, smoke_sections
from revprop.runs import Row

# -- data ------------------------------------------------------------------------------------------------------------------


def test_simulations_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []

    def fake(kind: str, group: int, frames: int, report: Any = None) -> data.Densities:
        asked.append((kind, group, frames))
        return np.full((8, frames, 64, 64), 10 * group + frames, dtype=np.uint8)

    monkeypatch.setattr(data, "simulate", fake)
    assert [path.name for path in write_smoke("plume", 9, 2, tmp_path)] == ["plume-000-007.npz", "plume-008-015.npz"]
    write_smoke("plume", 8, 2, tmp_path)
    write_smoke("plume", 16, 1, tmp_path)
    assert asked == [("plume", 0, 2), ("plume", 1, 2)]
    found = load_smoke("plume", 9, 2, tmp_path)
    assert found.shape == (9, 2, 1, 64, 64)
    assert torch.equal(found[:, 0, 0, 0, 0], torch.tensor([2.0] * 8 + [12.0]) / 255)
    with pytest.raises(ValueError, match="expected 3 frames, given 2"):
        load_smoke("plume", 8, 3, tmp_path)
    write_smoke("plume", 8, 3, tmp_path)
    assert load_smoke("plume", 8, 3, tmp_path).shape[1] == 3
    assert {path.suffix for path in tmp_path.iterdir()} == {".npz"}


def test_a_simulation_that_is_killed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "simulate", lambda *_, **__: np.zeros((8, 1, 64, 64), dtype=np.uint8))
    monkeypatch.setattr(np, "savez_compressed", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_smoke("plume", 8, 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_files_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"python -m revprop.datasets.smoke --kind plume --simulations 8 --frames 2"
    ):
        load_smoke("plume", 8, 2, tmp_path)
    with pytest.raises(ValueError, match="did you mean 'plume'"):
        load_smoke("plumes", 8, 2, tmp_path)
    path = tmp_path / "plume-000-007.npz"
    np.savez_compressed(path, density=np.zeros((8, 2, 64)))
    with pytest.raises(
        ValueError, match=r"expected uint8 densities of 8 simulations .* given float64 of shape \(8, 2, 64\)"
    ):
        load_smoke("plume", 8, 2, tmp_path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="holds no simulated smoke"):
        load_smoke("plume", 8, 2, tmp_path)
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(ImportError, match=r"pip install 'revprop\[smoke\]'"):
        simulate("plume", 0, 1)


def test_smoke_past_an_obstacle_is_in_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    density = np.zeros((8, 1, 64, 64), dtype=np.uint8)
    density[:, :, 60:] = 255
    monkeypatch.setattr(data, "simulate", lambda *_, **__: density)
    write_smoke("obstacle", 8, 1, tmp_path)
    pictures = load_smoke("obstacle", 8, 1, tmp_path)[:, 0]
    assert pictures.shape == (8, 3, 64, 64)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    for picture, number in zip(pictures, range(8), strict=True):
        drawn = data._draw("obstacle", number)
        row, column = 63 - int(drawn.obstacle_y), int(drawn.obstacle_x)  # the first row is the top
        assert picture[:, row, column].tolist() == pytest.approx([0.35, 0.33, 0.3])
        assert picture[1, 62, 5] > 0.4 > picture[1, 2, 5]


def test_phiflow_lets_smoke_rise() -> None:
    pytest.importorskip("phi.flow", reason="the extra 'smoke' is not installed")
    density = simulate("plume", 0, 6, size=16)
    assert density.shape == (8, 6, 16, 16)
    assert density.max() == 255
    height = (density * np.arange(16, 0, -1)[:, None]).sum((2, 3)) / density.sum((2, 3))
    assert (height[:, -1] > height[:, 0]).all()


def test_made_smoke_is_seeded() -> None:
    assert torch.equal(made_smoke("plume", 2, 3, 16), made_smoke("plume", 2, 3, 16))
    assert not torch.equal(made_smoke("plume", 2, 3, 16), made_smoke("plume", 2, 3, 16, seed=1))
    heights = (made_smoke("plume", 4, 5, 16) * torch.arange(16.0, 0, -1)[:, None]).sum((2, 3, 4))
    assert (heights[:, -1] > heights[:, 0]).all()


# -- networks --------------------------------------------------------------------------------------------------------------


def test_the_layers_of_table_13() -> None:
    generator = smoke_generator(seed=0)
    assert [tuple(layer.weight.shape[:2]) for layer in generator.convolutions] == [
        (64, 1),
        (128, 64),
        (128, 128),
        (64, 128),
        (32, 64),
        (1, 32),
    ]
    small = smoke_generator(width=0.125, seed=0).double()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    z = x
    for place, layer in enumerate(small.convolutions):
        z = F.conv2d(z, layer.weight, layer.bias, padding=2)
        z = z.clamp(min=0) if place < 5 else z
        z = z.repeat_interleave(2, 2).repeat_interleave(2, 3) if place < 2 else z
    torch.testing.assert_close(small(x), z)
    channels = [module.out_channels for module in smoke_discriminator(8).features if hasattr(module, "out_channels")]
    assert channels == [32, 64, 128, 256]
    with pytest.raises(ValueError, match="width: expected a positive share"):
        SmokeGenerator(width=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_encoder_is_the_reverse_pass_of_the_penalty(channels: int) -> None:
    autoencoder = smoke_autoencoder(channels, 0.125, seed=0).double()
    low = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    back = Racecar(autoencoder.generator, low, weight=0.1).regenerate(low)["input"]
    assert back.max() > 0
    torch.testing.assert_close(autoencoder.encode(autoencoder.generator(low)), back)


# -- the experiment --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SmokeTransfer, list[Row]]:
    """Everything at smoke scale."""
    folder = tmp_path_factory.mktemp("smoke")
    study = settings_of("racecar/table6", "smoke")
    return folder, study, CATALOGUE["racecar/table6"].run(study, folder, device="cpu", workers=1)


def test_every_part_has_its_rows(finished: Any) -> None:
    folder, study, rows = finished
    names = [(row["settings"]["part"], row["settings"]["model"]) for row in rows]
    assert names == [(part, model) for part in ("A", "B1", "B2") for model in smoke_transfer.MODELS[part]]
    for row in rows:
        assert [e["epoch"] for e in row["history"]] == [1, 2]
        assert 0 < row["l2"] < 2 * row["black_l2"]
        assert row["images"] == study.training * study.frames
        part, model = row["settings"]["part"], row["settings"]["model"]
        with np.load(folder / row["pictures"]) as pictures:
            assert pictures["reference"].shape == (2, 3 if part == "B2" else 1, 32, 32)
            assert pictures["output"].shape == pictures["reference"].shape
            if part == "A":
                assert pictures["regenerated"].shape == pictures["low"].shape == (2, 1, 8, 8)
        if part == "A":
            assert (row["history"][0]["penalty"] > 0) == (model == "rr")
        else:
            layers = 0 if model == "scratch" else 6 if part == "B1" else 5
            assert row["reused"] == [f"conv{i}" for i in range(1, layers + 1)]


def test_again_repeats_nothing(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, rows = finished
    for name in ("train_gan", "train_autoencoder"):
        monkeypatch.setattr(smoke_transfer, name, lambda *_: pytest.fail("run again"))
    study = settings_of("racecar/figure20", "smoke")
    found = CATALOGUE["racecar/figure20"].run(study, folder, device="cpu", workers=1)
    assert found == [row for row in rows if row["settings"]["part"] in ("A", "B2")]


def test_the_same_seed_gives_the_same_numbers(finished: Any, tmp_path: Path) -> None:
    _, study, rows = finished
    again = train_gan(study, "A", "rr", 0, tmp_path, "cpu")
    row = next(r for r in rows if r["settings"]["part"] == "A" and r["settings"]["model"] == "rr")
    assert (again["l2"], again["input_l2"], again["history"]) == (row["l2"], row["input_l2"], row["history"])


def test_weights_that_are_gone_are_named(finished: Any, tmp_path: Path) -> None:
    _, study, _ = finished
    with pytest.raises(FileNotFoundError, match="the weights of a finished run: delete"):
        smoke_transfer.train_autoencoder(study, "B1", "std", 0, tmp_path, "cpu")


def test_simulations_that_are_not_there_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    for scale, more in (("reduced", "--simulations 8 --frames 40"), ("paper", "--simulations 20 --frames 120")):
        with pytest.raises(FileNotFoundError, match=more):
            smoke_transfer.run(settings_of("racecar/figure9", scale), tmp_path)
    assert settings_of("racecar/figure8", "paper").parts == ("A",)
    assert settings_of("racecar/figure8", "reduced", seeds=1).seeds == (0,)


def test_the_penalty_gives_the_input_back(tmp_path: Path) -> None:
    """What it is for: after the same training the reverse pass of RR knows the input, that of Std does not."""
    study = replace(
        settings_of("racecar/figure8", "smoke"), epochs=(25, 0), width=0.125, learning_rates=(3e-3, 2e-4, 2e-4)
    )
    std, rr = (train_gan(study, "A", model, 0, tmp_path, "cpu") for model in ("std", "rr"))
    assert rr["input_l2"] < 0.5 * rr["input_black_l2"] < std["input_l2"]
    assert rr["l2"] < 0.5 * rr["black_l2"]


# -- the report ------------------------------------------------------------------------------------------------------------


def test_the_report_holds_it_against_the_paper(finished: Any, tmp_path: Path) -> None:
    folder, _, rows = finished
    transfers, enlarged = study_tables(rows)
    assert [line[0] for line in transfers.rows] == [
        "run 1",
        "mean \u00b1 deviation",
        "before training",
        "a black image",
        "published",
    ]
    assert transfers.rows[-1][1:4] == ["8401 \u00b1 1.26e+04", "187 \u00b1 41.6", "2.87e+04 \u00b1 5.55e+03"]
    assert float(transfers.rows[0][1]) == pytest.approx(rows[2]["l2"], rel=0.01)
    assert [line[0] for line in enlarged.rows][:2] == ["Std", "RR"]
    page = write_report(folder, tmp_path / "page.html", "Smoke", rows).read_text()
    assert "made blobs" in page
    names = [path.name for path in write_figures(folder, tmp_path)]
    assert names == [f"{i}-figure-{n}.svg" for i, n in enumerate((9, 8, 18, 19, 20, 21), start=1)]
    assert "Phase I: super-resolution" in write_markdown([folder], tmp_path / "page.md").read_text()


def test_without_pictures_the_curves_are_drawn(finished: Any) -> None:
    _, _, rows = finished
    (section,) = smoke_sections([row for row in rows if row["settings"]["part"] == "B1"])
    assert [str(figure.get_label()).partition(":")[0] for figure in section.figures] == ["Figure 9", "Figure 18"]
    assert "RR's loss is below Std's in" in section.reading


def test_the_published_means_are_those_of_the_runs() -> None:
    runs = {
        ("B1", "std"): (22883, 493.3, 1828),
        ("B1", "rr"): (211.9, 139, 210.2),
        ("B1", "scratch"): (31911, 22291, 31911),
    }
    for key, losses in runs.items():
        mean, deviation = PUBLISHED_SMOKE[key]
        assert np.mean(losses) == pytest.approx(mean, abs=0.01)
        assert np.std(losses, ddof=1) == pytest.approx(deviation, abs=0.01)
