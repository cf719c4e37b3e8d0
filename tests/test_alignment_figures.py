"""Feature alignment's figures and Table 2 by name: which models on which data, and pages of them from tiny runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from revprop.alignment import Sizes
from revprop.datasets import load_data
from revprop.experiments import alignment_figures, alignment_images
from revprop.experiments.alignment_figures import FIGURES, on
from revprop.experiments.catalogue import CATALOGUE, settings_of
from revprop.report.alignment_sections import alignment_sections
from revprop.report.study import write_report
from revprop.runs import Row


@pytest.fixture
def everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which every data set seems to be: only its place is looked at."""
    for place in ("cifar10/cifar-10-batches-py", "celeba", "stl10_binary"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("name", FIGURES)
def test_every_name_is_there_at_every_scale(name: str) -> None:
    assert f"alignment/{name}" in CATALOGUE
    for scale in ("smoke", "reduced", "paper"):
        figure = settings_of(f"alignment/{name}", scale)
        data, models = FIGURES[name]
        assert (len(figure.studies), figure.left_out) == (len(data), ())
        for study in figure.studies:
            assert study.models == models
            assert len(study.seeds) == (3 if name in ("figure15", "table2") and scale != "smoke" else 1)
            assert bool(study.reduced) == (scale != "paper")
            assert study.sizes.latent == 2 or name != "figure6"
        assert [s.seeds for s in settings_of(f"alignment/{name}", scale, seeds=2).studies] == [(0, 1)] * len(data)


@pytest.mark.usefixtures("everything")
def test_what_the_paper_says_of_its_data() -> None:
    for data, perceptual, training in (
        ("mnist", None, ""),
        ("cifar10", 0.0, ""),
        ("celeba", 1.0, ""),
        ("stl10", None, "stl10-unlabelled"),
    ):
        paper, reduced = on(data, "paper"), on(data, "reduced")
        assert (paper.perceptual, paper.training, reduced.training) == (perceptual, training, "")
        expected = replace(Sizes.paper(data), classes=2) if data == "celeba" else Sizes.paper(data)
        assert paper.sizes == expected
        assert reduced.sizes.hidden == paper.sizes.hidden // 8
        assert (reduced.sizes.latent, reduced.sizes.mirrored) == (paper.sizes.latent, paper.sizes.mirrored)


def test_data_that_is_not_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no data for 'stl10' in .*--scale smoke needs none"):
        settings_of("alignment/figure14", "reduced")
    figure = settings_of("alignment/figure16", "paper")
    assert [study.classifier.data for study in figure.studies] == ["mnist"]
    (tmp_path / "images" / "celeba64").mkdir(parents=True)
    assert on("celeba", "reduced").classifier.data == "celeba64"
    assert on("celeba", "paper").reduced == "a thousand faces"
    said: list[str] = []
    alignment_figures.run(replace(figure, studies=()), tmp_path, report=said.append)
    assert [line.partition(" in ")[0] for line in said] == [
        "left out: no data for 'cifar10' nor 'cifar10-jpeg'",
        "left out: no data for 'celeba' nor 'celeba64'",
        "left out: no data for 'stl10'",
    ]


def test_figures_share_their_rows() -> None:
    def keys(name: str) -> set[str]:
        figure = settings_of(f"alignment/{name}", "smoke")
        return {str(alignment_images._key(study, model, 0)) for study in figure.studies for model in study.models}

    mnist = settings_of("alignment/mnist", "smoke")
    whole = {str(alignment_images._key(mnist, model, 0)) for model in mnist.models}
    assert keys("figure8") < keys("figure7") < whole
    assert keys("figure12") < keys("figure11") < keys("figure15")
    assert not keys("figure6") & whole
    of_some = {"training", "perceptual", "generator_rate"}
    assert not of_some & set(alignment_images._key(mnist, "vfa", 0))
    assert of_some & set(alignment_images._key(mnist, "gan", 0)) == {"generator_rate"}
    assert of_some & set(alignment_images._key(mnist, "vfa-gan", 0)) == {"perceptual", "generator_rate"}
    assert "refiner" not in alignment_images._key(mnist, "gan", 0)["sizes"]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    folder = tmp_path_factory.mktemp("figures")
    return folder, alignment_figures.run(settings_of("alignment/figure16", "smoke"), folder, device="cpu", workers=1)


def test_layer_by_layer_on_all_data(local: tuple[Path, list[Row]]) -> None:
    folder, rows = local
    assert [row["settings"]["data"] for row in rows] == ["digits", "made:cifar10", *["made:tiny-imagenet"] * 2]
    assert all(row["error"] > 0 and set(row["grids"]) == {"reconstruction"} for row in rows)
    first, *others = alignment_sections(rows)
    assert first.heading == "Several data sets"
    (table,) = first.tables  # nothing is sampled
    assert table.columns == ["data", "local FA"]
    assert [line[0] for line in table.rows] == [
        "digits",
        "made:cifar10",
        "made:tiny-imagenet",
        "made:tiny-imagenet (2)",
    ]
    assert [len(section.figures) for section in (first, *others)] == [1, 1, 1, 1, 1]
    assert "Several data sets" in write_report(folder, rows=rows).read_text(encoding="utf-8")


def test_the_latent_plane(tmp_path: Path) -> None:
    figure = settings_of("alignment/figure6", "smoke")
    (row,) = alignment_figures.run(figure, tmp_path, device="cpu", workers=1)
    codes, labels = np.array(row["plane"]["codes"]), row["plane"]["labels"]
    assert codes.shape == (200, 2)
    assert labels == load_data("digits").test.labels[:200].tolist()
    (section,) = alignment_sections([row])
    assert section.heading == "Feature alignment on digits, two latent variables"
    captions = [str(drawn.get_label()) for drawn in section.figures]
    assert captions[0].startswith("The codes of 200 test images in two latent variables")
    assert captions[-1].startswith("Classes with latent variables at zero")
    points = sum(len(drawn.get_offsets()) for drawn in section.figures[0].axes[0].collections)
    assert points == 200


def test_others_to_train_on_and_another_weight(tmp_path: Path) -> None:
    study = on("cifar10", "smoke")
    study = replace(study, models=("vfa-gan",), training="made:cifar100", perceptual=0.5, samples=1000, images=10)
    study = replace(study, sizes=replace(study.sizes, classes=0))
    found = alignment_images._training_images(study, (torch.zeros(0), torch.zeros(0)), tmp_path)[0]
    expected = load_data("made:cifar100").train.images.float() / 255
    assert torch.equal(found, expected)  # as many as there are
    (row,) = alignment_images.run(replace(study, samples=32), tmp_path, device="cpu", workers=1)
    assert (row["settings"]["training"], row["settings"]["perceptual"]) == ("made:cifar100", 0.5)
    assert "generator perceptual" in row["history"][-1]
    (none,) = alignment_images.run(replace(study, samples=32, perceptual=0.0), tmp_path, device="cpu", workers=1)
    assert "generator perceptual" not in none["history"][-1]


def test_the_paper_s_orders_are_counted_run_by_run() -> None:
    about = {
        "kind": "alignment-images",
        "data": "mnist",
        "judge": {"network": "judge"},
        "images": 10,
        "preset": "paper",
    }
    about |= {"epochs": 1, "reduced": "", "sizes": {"latent": 8}, "learning_rate": 0.0}
    distances = {"ae": [None] * 3, "vae": [1.0, 1.0, 3.0], "gan": [4.0, 4.0, 4.0], "vfa": [2.0, 2.0, 2.0]}
    rows = [
        {
            "settings": {**about, "model": name, "seed": seed},
            **{"error": 5.0 - len(name) + seed, "accuracy": 1.0, "accuracy_real": 1.0, "parameters": 1, "seconds": 1.0},
            **{"frechet_reconstruction": 1.0, "frechet_real": 1.0, "grids": {}},
            **({} if distance is None else {"frechet": distance}),
        }
        for name, values in distances.items()
        for seed, distance in enumerate(values)
    ]
    (section,) = alignment_sections(rows, draw=False)
    assert "VAE < VFA < GAN, another than the paper's order in Table 2, VAE < GAN < VFA" in section.reading
    assert "VAE is below GAN in 3 of 3 runs, GAN is below VFA in 0 of 3 runs" in section.reading
    assert "AE is below VAE in 0 of 3 runs" in section.reading
