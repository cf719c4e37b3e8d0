"""The ablation and what came of it: options measured on held-out images, the same rows as the tables where they are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from revprop.experiments import ablation, beyond
from revprop.experiments.catalogue import CATALOGUE
from revprop.experiments.grid_study import GridStudy
from revprop.report import study_tables, write_report


def test_the_ablation_never_sees_a_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    for place in ("mnist", "cifar10/cifar10_jpeg.tar.gz", "images/tinyimagenet10.tar.gz"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).mkdir() if place == "mnist" else (tmp_path / place).touch()
    for scale, seeds in (("smoke", 1), ("reduced", 3), ("paper", 10)):
        study = ablation.settings(scale)
        assert len(study.grids) == (2 if scale == "smoke" else 6)
        assert all(grid.baseline.holdout == 0.1 and grid.seeds == tuple(range(seeds)) for grid in study.grids)
        assert all(grid.bp and len(grid.cells or ()) == 1 for grid in study.grids)
    assert all(not grid.baseline.holdout for grid in beyond.settings("paper").grids)


def test_rows_of_the_ablation_are_told_from_those_of_tables(tmp_path: Path) -> None:
    output, inside = ablation.settings("smoke").grids
    few = (replace(output, ways=(output.ways[2], output.ways[-2])), replace(inside, ways=inside.ways[-1:]))
    rows = CATALOGUE["fr-pt/ablation"].run(GridStudy(few, "ablation"), tmp_path, device="cpu", workers=1)
    assert {row["settings"]["study"] for row in rows} == {"ablation"}
    assert [row["settings"]["method"] for row in rows] == ["bp", "fr", "fr", "bp", "solve"]
    assert rows[2]["settings"]["first"]["closed_form"]["margins"] == [10.0]
    (table,) = study_tables(rows)
    assert "what each option does" in table.title
    assert "what each option does" in write_report(tmp_path, rows=rows).read_text(encoding="utf-8")


def test_beyond_the_paper_every_way_starts_from_the_tables_baseline(tmp_path: Path) -> None:
    study = beyond.settings("smoke")
    rows = CATALOGUE["fr-pt/beyond"].run(study, tmp_path, device="cpu", workers=1)
    methods = [(row["settings"].get("first", {}).get("method"), row["settings"]["method"]) for row in rows]
    assert methods == [(None, "bp"), (None, "fr"), (None, "fr"), (None, "solve"), ("solve", "bp"), ("solve", "fr")]
    assert len({row["baseline_accuracy"] for row in rows}) == 1
    solved = rows[3]["history"][-1]["accuracy"]
    assert rows[4]["history"][0]["accuracy"] == rows[5]["history"][0]["accuracy"] == solved
    assert solved > rows[3]["baseline_accuracy"]
    assert "Closed form, then FR" in write_report(tmp_path).read_text(encoding="utf-8")
