"""Figures 10 to 13 of the racecar paper at smoke scale: networks trained, pictures stylised, kept and shown."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from revprop import trace
from revprop.cli import main
from revprop.datasets.pictures import load_picture
from revprop.experiments import racecar_networks, stylisation
from revprop.experiments.baseline import Baseline, build_network, save_weights
from revprop.experiments.catalogue import CATALOGUE, settings_of
from revprop.experiments.racecar_networks import PhaseOne, convolutions, load_phase_one
from revprop.experiments.reconstruction_quality import IMAGENET_MEAN, IMAGENET_STD
from revprop.experiments.stylisation import StylisationStudy, loss_layers, picture
from revprop.networks.vgg import vgg_small
from revprop.report import study_tables, write_figures, write_markdown, write_report
from revprop.report.stylisation_sections import stylisation_sections
from revprop.runs import Row, RunStore
from revprop.stylisation import stylise


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StylisationStudy, list[Row], list[str]]:
    """Figure 12: two networks, one pair."""
    folder, said = tmp_path_factory.mktemp("racecar"), list[str]()
    study = settings_of("racecar/figure12", "smoke")
    rows = CATALOGUE["racecar/figure12"].run(study, folder, device="cpu", report=said.append, workers=1)
    return folder, study, rows, said


def test_rows_hold_what_was_reached_and_where_the_pictures_are(smoke: Any) -> None:
    folder, _, rows, said = smoke
    assert [row["settings"]["way"] for row in rows] == ["Std", "RR"]
    assert len(said) == 4
    for row in rows:
        assert row["style"][0] == pytest.approx(1.0)  # it starts at the content
        assert row["content"][0] == 0.0
        total = [100 * style + content for content, style in zip(row["content"], row["style"], strict=True)]
        assert total[1] < 0.5 * total[0]
        assert row["history"][0] == [0.0, row["style"][0]]
        with np.load(folder / row["pictures"]) as kept:
            pixels = {name: torch.from_numpy(kept[name]).permute(2, 0, 1) / 255 for name in kept}
        assert set(pixels) == {"content", "style", "image"}
        low, high = picture("low:china", 32), picture("china", 32)
        torch.testing.assert_close(pixels["content"], low, rtol=0, atol=0.5 / 255 + 1e-6)
        torch.testing.assert_close(pixels["style"], high, rtol=0, atol=0.5 / 255 + 1e-6)
        assert row["error"][0] == pytest.approx(float((low - high).abs().mean()))
        assert row["error"][1] == pytest.approx(float((pixels["image"] - high).abs().mean()), abs=2 / 255)
        assert row["change"] == pytest.approx(float((pixels["image"] - low).abs().mean()), abs=2 / 255)
    std, rr = (row["network"] for row in rows)
    assert rr["regenerated"] < 0.9 * std["regenerated"]  # which the penalty is for


def test_again_repeats_nothing(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, study, rows, _ = smoke
    monkeypatch.setattr(stylisation, "stylise", lambda *_, **__: pytest.fail("stylised again"))
    monkeypatch.setattr(racecar_networks, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert stylisation.run(study, folder, device="cpu", workers=1) == rows


def test_the_penalty_begins_behind_the_first_epochs(tmp_path: Path) -> None:
    baseline = Baseline("vgg-small", "made:cifar10", 2, batch_size=32, samples=64)
    networks = [PhaseOne(baseline), PhaseOne(baseline, "RR", 1e-7, alone=1), PhaseOne(baseline, "RR", 1e-7, 0.5)]
    found = [racecar_networks.train_phase_one(network, tmp_path, "cpu")["history"] for network in networks]
    assert found[0][1] == found[1][1] | {"seconds": found[0][1]["seconds"]}
    assert found[1][1]["penalty"] == 0.0
    assert found[1][2]["penalty"] > 0.0
    assert found[2][1]["penalty"] > 0.0
    assert found[2][1]["loss"] == pytest.approx(found[2][1]["classification"] + found[2][1]["penalty"])


def test_the_report_shows_pictures_and_numbers(smoke: Any, tmp_path: Path) -> None:
    folder, _, rows, _ = smoke
    reached, networks = study_tables(rows)
    assert [line[:4] for line in reached.rows] == [["low:china", "china", way, 1] for way in ("Std", "RR")]
    assert reached.columns[-1] == "error of the result"
    assert [line[0] for line in networks.rows] == ["Std", "RR"]
    assert networks.rows[1][5] == "66.73"
    (section,) = stylisation_sections(rows, True, folder)
    assert str(section.figures[0].get_label()).endswith("low:china in the style of china: content, style, Std, RR.")
    page = write_report(folder, tmp_path / "page.html", "Figure 12", rows).read_text()
    assert "low:china in the style of china" in page
    assert "scikit-learn&#39;s photographs, 32 pixels" in page
    assert [path.name for path in write_figures(folder, tmp_path)] == ["1-figure-12.svg"]
    assert "### What is reached" in write_markdown([folder], tmp_path / "page.md").read_text()
    # rows that travelled without their pictures
    (alone,) = stylisation_sections(rows, True, tmp_path)
    assert (alone.figures, "not in the folder any more" in alone.text) == ([], True)


def test_weights_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("mine", 3), ("other", 4)):
        save_weights(vgg_small(seed=seed), tmp_path / f"{name}.safetensors")
    options = ["--network", "vgg-small", "--weights", "mine.safetensors", "other.safetensors"]
    command = ["reproduce", "racecar/figure11", "--scale", "smoke", "--workers", "1", "--out", "out", *options]
    assert main(command) == 0, capsys.readouterr().err
    rows = RunStore(tmp_path / "out" / "racecar-smoke" / "rows").rows()
    assert [row["settings"]["way"] for row in rows] == ["mine", "other"]
    assert rows[0]["network"]["accuracy"] is None
    assert rows[0]["content"] == [0.0, 0.0]  # the style alone is minimised
    assert rows[0]["style"][1] < 1.0
    network = PhaseOne(
        Baseline("vgg-small", "", weights="mine.safetensors", mean=IMAGENET_MEAN, std=IMAGENET_STD), "mine"
    )
    trained = load_phase_one(network, tmp_path / "out" / "racecar-smoke")
    torch.testing.assert_close(trained.state_dict(), vgg_small(seed=3).state_dict())


def test_a_network_without_a_scale_takes_standardised_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(vgg_small(seed=3), tmp_path / "mine.safetensors")
    network = PhaseOne(Baseline("vgg-small", "", weights=str(tmp_path / "mine.safetensors")), "mine")
    study = StylisationStudy(10, (network,), (("china", "flower"),), size=32, steps=2)
    taken = []
    monkeypatch.setattr(
        stylisation, "stylise", lambda *given, **named: taken.append(given[1]) or stylise(*given, **named)
    )
    (row,) = stylisation.run(study, tmp_path, device="cpu", workers=1)
    torch.testing.assert_close(taken[0].mean((2, 3)), torch.zeros(1, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(taken[0].std((2, 3), correction=0), torch.ones(1, 3))
    assert 0 < row["change"] < 0.3


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stylisation, "find_data", lambda name: None)
    with pytest.raises(FileNotFoundError, match="no data for 'tinyimagenet10'"):
        settings_of("racecar/figure10", "reduced")
    with pytest.raises(FileNotFoundError, match="--weights of networks that are trained"):
        settings_of("racecar/figure10", "paper")
    with pytest.raises(ValueError, match="leave them out beside weights"):
        settings_of("racecar/figure10", "smoke", seeds=2, weights=["a.safetensors"])
    with pytest.raises(ValueError, match="files of different names"):
        settings_of("racecar/figure10", "smoke", weights=["1/a.safetensors", "2/a.safetensors"])
    with pytest.raises(ValueError, match="has no option network"):
        settings_of("fr-pt/table1", "smoke", network="digits")
    with pytest.raises(ValueError, match="unknown shape 'disk'; did you mean 'disc'"):
        picture("shape:disk", 32)
    study = settings_of("racecar/figure11", "smoke")
    with pytest.raises(ValueError, match="not trained yet"):
        stylisation.stylise_pair(study, study.networks[0], *study.pairs[0], tmp_path)


def test_the_published_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    study = settings_of("racecar/figure10", "paper", data="images")
    std, rr = study.networks
    assert (study.size, study.style_only, rr.weight, rr.alone, std.weight) == (224, False, 1e-10, 6, 0.0)
    assert rr.baseline.recipe.rates is not None
    assert sum(count for count, _ in rr.baseline.recipe.rates) == rr.baseline.epochs == 36
    weighted = settings_of("racecar/figure11", "paper", weights=["std.safetensors", "rr.safetensors"])
    assert [(n.way, n.baseline.network) for n in weighted.networks] == [
        ("std", stylisation.VGG19),
        ("rr", stylisation.VGG19),
    ]
    assert weighted.style_only
    seeds = [n.baseline.seed for n in settings_of("racecar/figure13", "smoke", seeds=2).networks]
    assert seeds == [0, 0, 1, 1]


def test_layers_of_the_losses() -> None:
    # VGG19's plan: conv1_1 to conv5_1 for the style, conv4_2 for the content (Gatys et al. 2016)
    counts, parts, channels = (2, 2, 4, 4, 4), [], 3
    for count in counts:
        for _ in range(count):
            parts += [torch.nn.Conv2d(channels, 2, 3, padding=1), torch.nn.ReLU(inplace=True)]
            channels = 2
        parts.append(torch.nn.MaxPool2d(2))
    content, style = loss_layers(trace(torch.nn.Sequential(*parts), torch.zeros(1, 3, 32, 32)))
    assert style == ["1", "6", "11", "20", "29"]  # relu1_1, relu2_1, ..., where torchvision has them
    assert content == ["22"]
    resnet = build_network("resnet20", 0)
    content, style = loss_layers(trace(resnet, torch.zeros(1, 3, 32, 32)))
    assert style == ["conv1", "layer2.0.conv1", "layer3.0.conv1"]
    assert content == ["layer2.0.conv2"]
    assert len(convolutions(resnet)) == 19
    with pytest.raises(ValueError, match="no convolution among the layers"):
        loss_layers(trace(torch.nn.Linear(3, 2), torch.zeros(1, 3)))


def test_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "n01_red.png")
    with tarfile.open(tmp_path / "some.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "n01_red.png", "some/n01_red.png")
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    for source in (tmp_path / "some.tar.gz", tmp_path):
        assert torch.equal(load_picture("red", 4, source), red)
    assert torch.equal(load_picture(tmp_path / "n01_red.png", 4), red)
    with pytest.raises(ValueError, match="did you mean 'red'"):
        load_picture("rad", 4, tmp_path / "some.tar.gz")
    with pytest.raises(FileNotFoundError, match="give 'china' or 'flower'"):
        load_picture("nothing", 4)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        load_picture("china", 0)
    low = picture("low:flower", 32)
    assert float((low - picture("flower", 32)).abs().mean()) > 0.01
    assert set(map(tuple, picture("shape:disc", 16).flatten(1).T.tolist())) == set(
        map(tuple, picture("shape:square", 16).flatten(1).T.tolist())
    )


def test_small_vgg_takes_any_size_and_refuses_no_width() -> None:
    net = vgg_small(classes=7, seed=0, width=4)
    assert net(torch.zeros(2, 3, 16, 24)).shape == (2, 7)
    assert [m.out_channels for m in net.modules() if isinstance(m, torch.nn.Conv2d)] == [4, 4, 8, 8, 16, 16, 32, 32]
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        for name, block in vgg_small(seed=0).named_children():
            x = block(x)
            if name.startswith("conv"):
                assert 0.1 < float(x.std()) < 3.0  # neither dies out nor grows with the depth
    with pytest.raises(ValueError, match="at least 1 channel"):
        vgg_small(width=0)
