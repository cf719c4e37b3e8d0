"""The two-phase study: complete rows, one network for both second phases, the same numbers after a kill; and what is reported."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import run_and_kill

import revprop
from revprop.experiments import racecar_study, racecar_tables
from revprop.experiments.baseline import Data, build_network
from revprop.experiments.catalogue import CATALOGUE, settings_of
from revprop.experiments.racecar_measures import observed_epochs, plane_of, reconstruction
from revprop.experiments.racecar_study import PHASES, RacecarStudy, Schedule, run
from revprop.networks import load_weights
from revprop.report import study_tables, write_figures, write_markdown, write_report
from revprop.report.racecar_sections import racecar_sections
from revprop.runs import Row

Smoke = tuple[Path, RacecarStudy, list[Row]]


@pytest.fixture(scope="module")
def bits(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    folder = tmp_path_factory.mktemp("bits")
    study = replace(settings_of("racecar/table1", "smoke", seeds=2, ways=("rr",)), phases=PHASES)
    return folder, study, run(study, folder, device="cpu", workers=1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    folder = tmp_path_factory.mktemp("digits")
    study = settings_of("racecar/table3", "smoke", ways=("rr",))
    study = replace(study, phases=PHASES, samples=32, test_samples=20)
    return folder, study, run(study, folder, device="cpu", workers=1)


def by_name(rows: list[Row], seed: int = 0) -> dict[tuple[str, str], Row]:
    return {(r["settings"]["way"], r["settings"]["phase"]): r for r in rows if r["settings"]["seed"] == seed}


def test_every_phase_of_every_way_has_a_row(bits: Smoke, digits: Smoke) -> None:
    for _, study, rows in (bits, digits):
        assert len(rows) == 7 * len(study.seeds)
        for row in rows:
            epochs = study.schedule(row["settings"]["phase"]).epochs
            assert [e["epoch"] for e in row["history"]] == list(range(epochs + 1))
            assert row["accuracy"] == row["history"][-1]["accuracy"]
            assert row["error"] > 0
            assert row["seconds"] > 0
            penalised = row["settings"]["phase"] == "A" and row["settings"]["way"] != "Std"
            assert ("penalty" in row["history"][-1]) == penalised
    assert {row["parameters"] for row in bits[2]} == {294}
    assert {row["parameters"] for row in digits[2]} == {38645}


def test_the_second_phases_go_on_from_the_first(bits: Smoke, digits: Smoke) -> None:
    for _, _, rows in (bits, digits):
        found = by_name(rows)
        for way in {way for way, _ in found}:
            assert found[way, "AA"]["history"][0]["accuracy"] == found[way, "A"]["accuracy"]
            assert found[way, "AA"]["settings"]["first"] == found[way, "A"]["settings"]
    found = by_name(bits[2], seed=1)
    for way in ("Std", "RR"):  # every label is inverted: what was right is wrong
        assert found[way, "AB"]["history"][0]["accuracy"] == pytest.approx(1 - found[way, "A"]["accuracy"])
    assert found["Std", "B"]["history"][0]["accuracy"] == pytest.approx(1 - found["Std", "A"]["history"][0]["accuracy"])


def test_again_repeats_nothing(bits: Smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, study, rows = bits
    monkeypatch.setattr(racecar_study, "train_phase", lambda *_: pytest.fail("run again"))
    assert run(study, folder, device="cpu", workers=1) == rows
    assert run(replace(study, phases=("AA",)), folder, device="cpu", workers=1) == [
        row for row in rows if row["settings"]["phase"] == "AA"
    ]


def test_penalties_do_what_they_are_for(tmp_path: Path) -> None:
    study = replace(settings_of("racecar/figure2", "smoke", ways=("ort", "rr")), passes=60)
    heavy = [replace(way, orthogonality=way.orthogonality and 1.0) for way in study.ways]
    found = by_name(run(replace(study, ways=tuple(heavy)), tmp_path, device="cpu", workers=1))
    assert found["RR", "A"]["error"] < found["Std", "A"]["error"]
    spread = {}
    for way in heavy:
        model = build_network("racecar-bits", 0, 2)
        load_weights(model, racecar_study._Run(study, "A", way, 0, tmp_path).weights)
        weight = next(model.parameters()).detach()
        spread[way.name] = float((weight @ weight.T - torch.eye(10)).abs().max())
    assert spread["Ort"] < 0.5 * spread["Std"]


def test_a_new_head_is_the_only_part_that_begins_afresh(tmp_path: Path) -> None:
    study = settings_of("racecar/table5", "smoke")
    one = racecar_study._Run(study, "AB", study.ways[0], 0, tmp_path)
    trained = build_network(study.network, 5, 10)
    racecar_study.save_weights(trained, replace(one, phase="A").weights)
    begun = racecar_study._started(one, one.data)
    fresh = build_network(study.network, 0, 100)
    for name, value in begun.state_dict().items():
        expected = fresh if name.startswith("fc3.") else trained
        assert torch.equal(value, expected.state_dict()[name]), name
    assert racecar_study._started(replace(one, phase="AA"), one.data).fc3[0].out_features == 10  # type: ignore[union-attr,index]


KILLED = ("RR", "RR, share 0.25")


def train_in_a_process(folder: Path) -> None:
    torch.set_num_threads(1)
    (folder.parent / "started").touch()
    run(_long(), folder, device="cpu", workers=1)


def _long() -> RacecarStudy:
    study = settings_of("racecar/table1", "smoke", ways=("rr", "rr-share"))
    ways = tuple(way for way in study.ways if way.name in KILLED)
    return replace(study, ways=ways, phases=("A", "AA"), schedules=(Schedule(40, 0.004),) * 4, passes=2)


def numbers(rows: list[Row]) -> list[Any]:
    kept = ("accuracy", "error", "information")
    histories = [[{k: v for k, v in e.items() if k != "seconds"} for e in row["history"]] for row in rows]
    return [[row["settings"], *(row[name] for name in kept), h] for row, h in zip(rows, histories, strict=True)]


@pytest.mark.filterwarnings("ignore:.* is skipped. it is being written now")
def test_a_study_killed_at_random_times_gives_the_same_rows(tmp_path: Path) -> None:
    draw, kills = random.Random(0), 0
    arguments = (train_in_a_process, (tmp_path / "runs",), tmp_path / "started")
    while kills < 3 and run_and_kill(*arguments, after=draw.uniform(0.3, 1.0)):
        kills += 1
        (tmp_path / "started").unlink()
    assert kills >= 2
    continued = run(_long(), tmp_path / "runs", device="cpu", workers=1)
    assert numbers(continued) == numbers(run(_long(), tmp_path / "whole", device="cpu", workers=1))
    assert not list((tmp_path / "runs" / "weights").glob("*/state*"))  # nothing but the networks of phase I is kept
    assert len(list((tmp_path / "runs" / "weights").glob("*.safetensors"))) == 2


# -- what is measured -------------------------------------------------------------------------------


class Copies(nn.Module):
    """Layers whose information is known: all bits, the first two, and the exclusive or of these."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.two, self.one = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 1)  # values in (-1, 1)
        with torch.no_grad():
            for layer in (self.all, self.two):
                layer.weight.copy_(torch.eye(3)[: len(layer.weight)])
                layer.bias.zero_()
            self.one.weight.copy_(torch.tensor([[0.5, 0.25]]))
            self.one.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.two(self.all(x)))


def test_the_information_of_known_layers() -> None:
    x = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 3)
    y = (x[:, 0] > 0).long()
    data = Data((x[:5], y[:5]), (x[5:], y[5:]), ("0", "1"))
    graph = revprop.trace(Copies(), x)
    found = plane_of(graph, data)
    assert found["x.all"] == pytest.approx(3)
    assert found["x.two"] == pytest.approx(2)
    assert found["x.one"] == pytest.approx(2)
    assert found["y.all"] == pytest.approx(1)
    assert found["y.one"] == pytest.approx(1)
    parity = ((x > 0).sum(1) % 2).long()
    of_parity = plane_of(graph, Data((x[:5], parity[:5]), (x[5:], parity[5:]), ("0", "1")))
    assert of_parity["y.all"] == pytest.approx(1)
    assert of_parity["y.two"] == pytest.approx(0, abs=1e-12)


def test_planes_begin_and_end_with_the_training(bits: Smoke) -> None:
    _, study, rows = bits
    for row in rows:
        epochs = study.schedule(row["settings"]["phase"]).epochs
        layers = [f"fc{i}" for i in range(1, 7)]
        expected = [(epoch, layer) for epoch in sorted(observed_epochs(epochs)) for layer in layers]
        assert [(point["epoch"], point["layer"]) for point in row["information"]] == expected
        for point in row["information"]:
            assert 0 <= point["label_bits"] <= min(point["input_bits"], 1) + 1e-9
            assert point["input_bits"] <= 12
    assert max(observed_epochs(200)) == 200
    assert len(observed_epochs(200)) <= 26


def test_an_orthogonal_layer_gives_its_input_back() -> None:
    layer = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    with torch.no_grad():
        layer[0].weight.copy_(torch.linalg.qr(torch.randn(6, 6)).Q)
        layer[0].bias.zero_()
    x = 1e-3 * torch.randn(20, 6)  # where tanh is the identity
    error, original, back = reconstruction(layer.eval(), x, 1, chunk=7)
    assert error < 1e-4
    torch.testing.assert_close(back, original, rtol=1e-3, atol=1e-8)
    with torch.no_grad():
        layer[0].weight.zero_()
    assert reconstruction(layer, x, 1)[0] == pytest.approx(1)


# -- settings and report ----------------------------------------------------------------------------


def test_the_settings_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*(f"table{i}" for i in range(1, 6)), *(f"figure{i}" for i in range(2, 7))]
    assert {f"racecar/{name}" for name in names} <= set(CATALOGUE)
    there = {"mnist", "n-mnist", "cifar10", "cifar100", "spherical-12bit"}
    monkeypatch.setattr(racecar_tables, "find_task", lambda name: name if name in there else None)
    table3, table5 = (settings_of(f"racecar/table{i}", "paper") for i in (3, 5))
    assert [schedule.epochs for schedule in table3.schedules] == [100, 400, 700, 700]
    assert [schedule.learning_rate for schedule in table3.schedules] == [1e-3, 1e-4, 1e-4, 1e-4]
    assert (table3.target, table3.reduced, table3.batch_size, table3.layers) == ("n-mnist", "", 64, 3)
    assert [way.weight for way in table3.ways] == [0.0, 0.0, 1e-5, 1e-5]
    assert (table5.network, table5.target, table5.batch_size) == ("racecar-cifar", "cifar100", 200)
    rates = [table5.schedule("A").recipe.rate(0.1, done, 180) for done in (79.5, 80.5, 120.5)]
    assert rates == [0.1, 0.01, 0.001]
    there.clear()
    there.update({"mnist", "cifar10-jpeg", "tinyimagenet10"})
    assert "stands in for n-MNIST" in settings_of("racecar/table4", "reduced").reduced
    study = settings_of("racecar/table5", "reduced")
    assert (study.source, study.target) == ("cifar10-jpeg", "tinyimagenet10, halved")
    assert "stand in for CIFAR-100" in study.reduced
    with pytest.raises(FileNotFoundError, match="no data for 'spherical-12bit'"):
        settings_of("racecar/table1", "paper")
    with pytest.raises(ValueError, match="did you mean 'rr-share'"):
        settings_of("racecar/table3", "smoke", ways=["rr-shared"])


def test_the_report_holds_them_against_the_paper(bits: Smoke, digits: Smoke, tmp_path: Path) -> None:
    folder, _, rows = bits
    accuracies, differences = study_tables(rows)
    lines = {line[0]: line for line in accuracies.rows}
    assert list(lines) == ["Std_A", "RR_A", "Std_AA", "RR_AA", "Std_AB", "RR_AB", "Std_B"]
    assert lines["RR_AA"][3] == "99.42 ± 0.41"
    assert lines["Std_AB"][3] == "13.60 ± 0.00"
    mean = sum(row["accuracy"] for row in rows if row["settings"]["phase"] == "B") / 2
    assert str(lines["Std_B"][2]).startswith(f"{100 * mean:.2f} ± ")
    assert [line[0] for line in differences.rows] == ["RR_AA - Std_AA", "RR_AB - Std_AB", "RR_AB - Std_B"]
    assert differences.rows[1][4] == "+86.06"
    (section,) = racecar_sections(rows)
    assert [str(figure.get_label()).partition(",")[0] for figure in section.figures[1:]] == [
        "Figure 2",
        "Figure 3",
        "Figure 4",
        "Figure 4",
    ]
    assert "a made rule" in section.text
    page = write_report(folder, tmp_path / "page.html", "Table 1", rows).read_text()
    assert "trains a network with its own reverse pass" in page
    assert "Differences, the 12-bit task" in write_markdown([folder], tmp_path / "page.md").read_text()
    names = [path.name for path in write_figures(digits[0], tmp_path)]
    assert names == ["1-accuracy.svg", "2-regenerated-inputs.svg"]
    pictures = by_name(digits[2])["RR", "A"]["pictures"]
    assert torch.tensor(pictures["regenerated"]).shape == torch.tensor(pictures["original"]).shape == (8, 1, 28, 28)
    assert [row["settings"]["phase"] for row in digits[2] if "pictures" in row] == ["A"] * 2
