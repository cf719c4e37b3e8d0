"""``revprop racecar``: from a network and data to weights, a row and a page; again, and after a stop."""

from pathlib import Path

import pytest
import torch

from revprop import Racecar
from revprop.cli import main
from revprop.datasets import load_digits
from revprop.experiments import regularised
from revprop.experiments.baseline import load_split
from revprop.networks import NETWORKS, load_weights
from revprop.runs import RunStore


def command(out: Path, *more: str) -> int:
    shared = ["--network", "digits", "--data", "digits", "--layers", "2", "--learning-rate", "0.002", "--out", str(out)]
    return main(["racecar", *shared, "--device", "cpu", *more])


def test_it_trains_keeps_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "--epochs", "4", "--weight", "0.01") == 0
    assert command(tmp_path, "--epochs", "4", "--weight", "0") == 0
    rows = {row["settings"]["weight"]: row for row in RunStore(tmp_path / "rows").rows()}
    assert rows[0.01]["error"] < 0.7 < rows[0.0]["error"]
    assert rows[0.01]["layers"] == ["conv1.0", "conv2.0"]
    said = capsys.readouterr().out
    assert f"back up to {rows[0.01]['error']:.2f}" in said
    page = (tmp_path / "racecar-digits-0.01.html").read_text(encoding="utf-8")
    assert "Given back by the reverse pass" in page
    model = NETWORKS["digits"](seed=1)
    load_weights(model, Path(rows[0.01]["weights"]))
    x = load_digits().test.tensors()[0]
    back = Racecar(model.eval(), x[:2], layers=2, weight=1.0, input_activation=None).regenerate(x)["input"]
    assert float((back - x).norm() / x.norm()) == pytest.approx(rows[0.01]["error"], rel=1e-4)


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("--epochs", "3", "--share", "0.5")
    assert command(tmp_path / "whole", *more) == 0
    done = regularised.Racecar.with_output
    calls = iter(range(10_000))

    def stopping(self: Racecar, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if next(calls) == 50:
            raise KeyboardInterrupt
        return done(self, x)

    monkeypatch.setattr(regularised.Racecar, "with_output", stopping)
    assert command(tmp_path / "parts", *more) == 130
    assert not list((tmp_path / "parts" / "rows").glob("*.json"))
    monkeypatch.setattr(regularised.Racecar, "with_output", done)
    assert command(tmp_path / "parts", *more) == 0
    (whole,), (parts,) = (RunStore(tmp_path / name / "rows").rows() for name in ("whole", "parts"))
    assert parts["error"] == pytest.approx(whole["error"], rel=1e-6)


def test_what_is_asked_wrongly_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_split("digits", tmp_path).train.classes
    assert command(tmp_path, "--share", "2") == 2
    assert "share of each batch in (0, 1]" in capsys.readouterr().err
    assert (
        main(["racecar", "--network", "digits", "--data", "digits", "--layers", "conv9", "--out", str(tmp_path)]) == 2
    )
    assert "did you mean" in capsys.readouterr().err
