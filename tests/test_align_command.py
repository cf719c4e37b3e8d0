"""``revprop align``: a model trained and asked for images, after a stop, too; and what is asked wrongly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from revprop import TrainingDivergedError
from revprop.align_command import SAMPLED
from revprop.alignment import MODELS
from revprop.cli import main
from revprop.datasets import load_digits
from revprop.experiments import alignment_model, alignment_training
from revprop.experiments.alignment_model import AlignmentModel, find, load, pixels
from revprop.runs import RunStore

SMALL = ("--hidden", "32", "--width", "4", "--latent", "8", "--learning-rate", "0.002", "--samples", "500")


def train(model: str, out: Path, *more: str) -> int:
    shared = ["--model", model, "--data", "digits", *SMALL, "--out", str(out), "--device", "cpu"]
    return main(["align", "train", *shared, *more])


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("align")
    for model in MODELS:
        assert train(model, out, "--epochs", "60" if model == "fa" else "1") == 0
    return out


def test_what_training_says(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert train("fa", trained, "--epochs", "60") == 0  # again: there already
    said = capsys.readouterr().out
    assert "settings: published-code. Where paper differs:" in said
    assert "  output: sigmoid (paper: None)" in said
    assert "  learning_rate: 0.0001 (paper: 1e-05)" in said
    assert "  but learning_rate: 0.002, as asked for" in said
    assert "32 hidden neurons, 4 channels (published: 4096, 32)" in said
    assert f"next: revprop align interpolate --model fa --out {trained}" in said
    (row,) = (row for row in RunStore(trained / "rows").rows() if row["settings"]["model"] == "fa")
    x = load_digits().test.images[:200].float() / 255
    constant = float((x - x.mean(0)).square().sum((1, 2, 3)).mean())
    assert row["error"] < 0.7 * constant


def test_the_other_preset_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("fa", tmp_path, "--epochs", "1", "--preset", "paper", "--samples", "64") == 0
    assert "  init: uniform (published-code: zeros)" in capsys.readouterr().out
    chosen, _ = find(tmp_path, "fa")
    model = load(chosen, load_digits().test, tmp_path)
    assert (model.init, model.output) == ("uniform", None)
    assert float(pixels(load_digits().test, chosen.preset).min()) == 0


@pytest.mark.parametrize("model", MODELS)
def test_every_model_reconstructs_and_interpolates(trained: Path, tmp_path: Path, model: str) -> None:
    for action, more in (("reconstruct", ["--count", "10"]), ("interpolate", ["--last", "5", "--steps", "4"])):
        asked = ["align", action, "--model", model, "--out", str(trained), "--png", str(tmp_path / f"{action}.png")]
        assert main([*asked, *more]) == 0
    chosen, _ = find(trained, model)
    test = load_digits().test
    x = pixels(test, chosen.preset)
    sheet = picture(tmp_path / "reconstruct.png")
    assert sheet.shape == (4 * 9 - 1, 8 * 9 - 1)  # ten of them: two lines of originals, two of reconstructions
    found = load(chosen, test, trained)
    for top, left, image in ((0, 9, x[1]), (18, 9, x[9]), (9, 9, found.reconstruct(x[:10])[1])):
        np.testing.assert_allclose(sheet[top : top + 8, left : left + 8], 255 * image[0].clamp(0, 1), atol=0.51)
    assert (sheet[18:26, 18:] == 255).all()
    strip = picture(tmp_path / "interpolate.png")
    assert strip.shape == (8, 6 * 9 - 1)
    for left, image in ((0, x[0]), (45, x[5])):
        np.testing.assert_allclose(strip[:, left : left + 8], 255 * image[0], atol=0.51)
    if model not in ("gan", "vfa", "vfa-gan"):  # a GAN's codes are searched; vfa's first image is of the class it sees
        np.testing.assert_allclose(strip[:, 9:17], 255 * found.reconstruct(x[:1])[0, 0].clamp(0, 1), atol=1.01)


@pytest.mark.parametrize("model", SAMPLED)
def test_samples_are_those_of_the_model(trained: Path, tmp_path: Path, model: str) -> None:
    png = tmp_path / "some" / "samples.png"
    asked = ["align", "sample", "--model", model, "--out", str(trained), "--count", "3", "--png", str(png)]
    assert main([*asked, "--seed", "4"]) == 0
    found = load(find(trained, model)[0], load_digits().test, trained)
    expected = found.sample(3, generator=torch.Generator().manual_seed(4))
    np.testing.assert_allclose(picture(png)[:, 9:17], 255 * expected[1, 0].clamp(0, 1), atol=0.51)


def test_a_class_is_asked_for(trained: Path, tmp_path: Path) -> None:
    png = tmp_path / "fours.png"
    asked = ["align", "sample", "--model", "vfa", "--out", str(trained), "--count", "2", "--png", str(png)]
    assert main([*asked, "--label", "4", "--emphasis", "3", "--temperature", "0.5"]) == 0
    found = load(find(trained, "vfa")[0], load_digits().test, trained)
    generator = torch.Generator().manual_seed(0)
    expected = found.sample(2, torch.tensor([4, 4]), emphasis=3.0, temperature=0.5, generator=generator)
    np.testing.assert_allclose(picture(png)[:, :8], 255 * expected[0, 0].clamp(0, 1), atol=0.51)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("vfa", tmp_path / "whole", "--epochs", "3") == 0
    fit = alignment_training.fit

    def stopping(*args: object, **options: object) -> object:
        arguments = list(args)
        begun = iter(range(3))

        def begin(epoch: int) -> None:
            if next(begun) == 2:
                raise KeyboardInterrupt

        arguments[7] = begin
        return fit(*arguments, **options)

    monkeypatch.setattr(alignment_training, "fit", stopping)
    assert train("vfa", tmp_path / "parts", "--epochs", "3") == 130
    assert not list((tmp_path / "parts").glob("rows/*.json"))
    monkeypatch.setattr(alignment_training, "fit", fit)
    assert train("vfa", tmp_path / "parts", "--epochs", "3") == 0
    test = load_digits().test
    whole, parts = (load(find(tmp_path / name, "vfa")[0], test, tmp_path / name) for name in ("whole", "parts"))
    samples = [m.sample(2, generator=torch.Generator().manual_seed(0)) for m in (whole, parts)]
    assert torch.equal(*samples)


def test_the_last_one_trained_is_taken(tmp_path: Path) -> None:
    for latent in ("3", "2"):
        assert train("ae", tmp_path, "--epochs", "0", "--latent", latent) == 0
    assert find(tmp_path, "ae")[0].latent == 2


WRONG = {
    "untrained": (
        ["sample", "--model", "vae"],
        "holds no trained vae; this trains one: revprop align train --model vae",
    ),
    "no samples": (["sample", "--model", "fa"], "fa has no distribution of codes to sample from; these have: vae, gan"),
    "count": (["reconstruct", "--model", "vfa", "--count", "0"], "count: expected at least 1, given 0"),
    "steps": (["interpolate", "--model", "vfa", "--steps", "1"], "steps: expected at least 2, given 1"),
    "data": (["train", "--model", "vfa", "--data", "mnits"], "unknown data set 'mnits'; did you mean"),
    "hidden": (["train", "--model", "vfa", "--data", "digits", "--hidden", "0"], "hidden: expected at least 1"),
    "rate": (["train", "--model", "vfa", "--data", "digits", "--learning-rate", "0"], "expected a positive number"),
    "generator rate": (
        ["train", "--model", "gan", "--data", "digits", "--generator-rate", "0"],
        "generator_rate: expected a positive number, given 0",
    ),
    "no generator": (
        ["train", "--model", "vfa", "--data", "digits", "--generator-rate", "1e-3"],
        "generator_rate: vfa has none; it is of gan and vfa-gan",
    ),
    "no perceptual loss": (
        ["train", "--model", "gan", "--data", "digits", "--perceptual", "1"],
        "perceptual: gan has none; it is of vfa-gan",
    ),
    "samples": (["train", "--model", "vfa", "--data", "digits", "--samples", "-1"], "or 0 for all, given -1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_asked_wrongly_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    arguments, message = WRONG[case]
    assert main(["align", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_what_a_trained_model_cannot_give(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(trained)]
    assert main(["align", "sample", "--model", "vfa", "--label", "ten", *out]) == 2
    assert "label: expected one of 0, 1, 2" in capsys.readouterr().err
    assert main(["align", "sample", "--model", "vae", "--label", "1", *out]) == 2
    assert "this model has no classes, given 1" in capsys.readouterr().err
    assert main(["align", "interpolate", "--model", "vae", "--last", "450", *out]) == 2
    assert "last: expected the number of a test image, 0 to 449, given 450" in capsys.readouterr().err


def test_weights_that_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("ae", tmp_path, "--epochs", "0") == 0
    find(tmp_path, "ae")[0].weights(tmp_path).unlink()
    assert main(["align", "reconstruct", "--model", "ae", "--out", str(tmp_path)]) == 2
    assert "is gone" in capsys.readouterr().err


def test_training_that_diverges_says_where(tmp_path: Path) -> None:
    chosen = AlignmentModel("vfa", "digits", 16, 4, 2, preset="paper", learning_rate=1e8, epochs=2, samples=300)
    with pytest.raises(TrainingDivergedError, match=r"at step \d+ of epoch 1.*encoder reconstruction"):
        alignment_model.run(chosen, load_digits(), tmp_path, "cpu")
