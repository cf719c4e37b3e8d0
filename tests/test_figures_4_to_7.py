"""Figures 4 to 7: the stages are where they should be, rows are what direct calls give, and the pages say what rows say."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from revprop.experiments import figure4, figure5, figure6, figure7, post_training_grid
from revprop.experiments.baseline import Baseline, Data, build_network
from revprop.experiments.catalogue import table
from revprop.experiments.figure4 import Figure4, Trained, is_checked
from revprop.experiments.figure6 import Evolving, Figure6
from revprop.experiments.grid_study import GridStudy
from revprop.experiments.post_training_grid import PostTrainingGrid
from revprop.graph import trace
from revprop.networks import load_weights
from revprop.post_training import post_train
from revprop.reconstruction import reconstruct
from revprop.report.figures import GREEN, VERMILLION, figure_to_svg
from revprop.report.grid import Grid
from revprop.report.page import write_page
from revprop.report.study_drawings import by_stage, embeddings, stage_boxes, stage_maps
from revprop.report.study_figures import sections
from revprop.runs import RunStore
from revprop.settings import Settings
from revprop.sweep import SweepError
from revprop.training import Training, accuracy_of, train_baseline

Row = dict[str, Any]
DIGITS = Trained("digits", "digits", batch_size=64)


def here(experiment: Any, settings: Any, folder: Path) -> list[Row]:
    """Runs an experiment in this process."""
    return experiment.run(settings, folder, device="cpu", workers=1)


def same(model: torch.nn.Module, path: Path) -> bool:
    other = build_network("digits", seed=1)
    load_weights(other, path)
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", [figure4, figure5, figure6, figure7])
def test_scales_are_checked(experiment):
    with pytest.raises(ValueError, match="unknown scale 'papr'; did you mean 'paper'"):
        experiment.settings("papr")
    with pytest.raises(ValueError, match="seeds: expected at least 1, given 0"):
        experiment.settings("smoke", seeds=0)


def test_the_paper_scale_is_the_published_setting():
    assert figure4.settings("paper").seeds == (0,)
    assert figure4.settings("paper").stages == (0.0, 0.5894, 0.9675)
    six = figure6.settings("paper")
    assert (six.stages, six.epochs, len(six.seeds)) == (tuple(range(1, 31)), 10, 10)
    assert [(n.trained.data, n.alpha, n.start, n.stop) for n in six.networks] == [
        ("cifar10-jpeg", 0.1, "conv1", "fc1"),
        ("cifar100", 0.7, "conv1", "fc1"),
    ]
    assert six.fr == post_training_grid.Reconstruct("nearest", "greedy", "paper")


@pytest.mark.parametrize("experiment", [figure4, figure6])
def test_keys_do_not_tell_how_many_seeds_there_are(experiment, tmp_path):
    few, more = (replace(experiment.settings("smoke", seeds), epochs=30) for seeds in (1, 2))
    if experiment is figure4:
        few, more = (replace(f, stages=(0.0,), samples=5, ways=f.ways[:1]) for f in (few, more))
    else:
        few, more = (replace(f, stages=(1,), epochs=1) for f in (few, more))
    first, both = here(experiment, few, tmp_path), here(experiment, more, tmp_path)
    assert len(both) == 2 * len(first)
    assert all(row in both for row in first)


# --- figure 4 ---------------------------------------------------------------------------------------------------------


def test_the_accuracy_is_measured_often_enough():
    steps = [step for step in range(10_000) if is_checked(step)]
    assert steps[:65] == list(range(65))
    assert all(b - a <= max(1, a / 32) for a, b in itertools.pairwise(steps))
    assert len(steps) < 350


@pytest.fixture(scope="module")
def evolved(tmp_path_factory) -> tuple[Path, Figure4, list[Row]]:
    folder = tmp_path_factory.mktemp("figure4")
    figure = Figure4(DIGITS, stages=(0.0, 0.4), samples=50)
    return folder, figure, here(figure4, figure, folder)


def test_a_stage_is_the_first_step_that_passes_its_accuracy(evolved):
    _, _, rows = evolved
    data, model = Data.load("digits"), build_network("digits", 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.randperm(len(data.train[1]), generator=torch.Generator().manual_seed(0))
    accuracies = []
    for step in range(64):
        with torch.no_grad():
            accuracies.append(float((model(data.test[0]).argmax(1) == data.test[1]).double().mean()))
        batch = order[64 * step : 64 * (step + 1)]
        if not len(batch):
            break
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.train[0][batch]), data.train[1][batch]).backward()
        optimizer.step()
    reached = {row["settings"]["stage"]: row for row in rows}
    assert (reached[0.0]["step"], reached[0.0]["accuracy"]) == (0, pytest.approx(accuracies[0]))
    passed = [step for step, accuracy in enumerate(accuracies) if accuracy >= 0.4]
    if passed:  # within the first epoch, which this loop goes through
        assert reached[0.4]["step"] == passed[0]
    else:
        assert reached[0.4]["step"] >= len(accuracies) - 1
    assert reached[0.4]["epoch"] == pytest.approx(reached[0.4]["step"] / 22)


def test_rows_hold_what_a_reconstruction_of_the_kept_network_gives(evolved):
    folder, figure, rows = evolved
    assert [(r["settings"]["stage"], r["settings"]["way"]["strategy"]) for r in rows] == [
        (0.0, "greedy"),
        (0.0, "global"),
        (0.4, "greedy"),
        (0.4, "global"),
    ]
    row = rows[2]
    model, data = build_network("digits", 3), Data.load("digits")
    load_weights(model, figure4._weights(DIGITS, figure.stages, 1, folder))
    assert accuracy_of(model.eval(), [data.test]) == pytest.approx(row["accuracy"])
    x, labels = data.test[0][:50], data.test[1][:50]
    result = reconstruct(model, x, labels, to="conv1", strategy="greedy", rules="paper")
    layer = next(layer for layer in row["layers"] if layer["layer"] == "conv1")
    maps = (result["conv1"] - result.recorded["conv1"]).abs().mean(0)
    torch.testing.assert_close(torch.tensor(layer["maps"]), maps, atol=1e-4, rtol=1e-4)
    assert layer["discrepancy"] == pytest.approx(float(maps.mean()), rel=1e-4)
    assert layer["deviation"] == pytest.approx(float(result.deviation["conv1"].mean()), rel=1e-4)
    wrong = model(x).argmax(1) != labels
    assert row["wrong"] == int(wrong.sum())
    assert layer["deviation_wrong"] == pytest.approx(float(result.deviation["conv1"][wrong].mean()), rel=1e-4)
    assert [d["layer"] for d in row["layers"]] == ["input", "conv1", "conv2", "fc1", "fc2"]


def test_nothing_is_done_again(evolved):
    folder, figure, rows = evolved
    lines: list[str] = []
    assert figure4.run(figure, folder, device="cpu", report=lines.append, workers=1) == rows
    assert not [line for line in lines if "right" in line]


def test_a_stage_out_of_reach_says_so(tmp_path):
    figure = Figure4(DIGITS, stages=(0.0, 1.0), epochs=1, samples=5, ways=(Settings(),))
    with pytest.raises(SweepError, match=r"does not reach a test accuracy of 1\.0 within 1 epochs"):
        here(figure4, figure, tmp_path)


# --- figure 6 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> tuple[Path, Figure6, list[Row]]:
    folder = tmp_path_factory.mktemp("figure6")
    figure = Figure6((Evolving(DIGITS, alpha=0.5, reduced="digits"),), stages=(1, 3), epochs=2, seeds=(0, 1))
    return folder, figure, here(figure6, figure, folder)


def test_each_stage_is_the_network_after_so_many_epochs(staged):
    folder, _, rows = staged
    data = Data.load("digits")
    for epochs in (1, 2, 3):
        model = build_network("digits", 0)
        history = train_baseline(model, data.train, data.test, Training(epochs, 64, device="cpu"))
        assert same(model, figure6._weights(DIGITS, epochs, folder))
        for row in rows:
            if row["settings"]["stage"] == epochs:
                assert row["baseline_accuracy"] == history[-1].accuracy


def test_rows_are_what_post_training_the_stage_gives(staged):
    folder, figure, rows = staged
    assert len(rows) == 2 * 2 * 2
    model, data = build_network("digits", 0), Data.load("digits")
    load_weights(model, figure6._weights(DIGITS, 3, folder))
    graph = trace(model.eval(), data.train[0][:2])
    for method, options in (("bp", {}), ("fr", {"alpha": 0.5, **asdict(figure.fr)})):
        result = post_train(
            graph,
            data.train,
            "conv1",
            "fc1",
            method=method,
            epochs=2,
            validation=data.test,
            seed=1,
            batch_size=64,
            device="cpu",
            **options,
        )
        (row,) = (
            r
            for r in rows
            if (r["settings"]["stage"], r["settings"]["method"], r["settings"]["seed"]) == (3, method, 1)
        )
        assert [e["accuracy"] for e in row["history"]] == [e.accuracy for e in result.history]
        assert (row["l_start"], row["l_stop"]) == (1, 3)
        assert ("alpha" in row["settings"]) == (method == "fr")


def test_a_stage_that_was_killed_before_its_row_comes_out_the_same(staged, tmp_path):
    folder, figure, _ = staged
    short = replace(figure, stages=(1,), seeds=(0,), epochs=1)
    here(figure6, short, tmp_path)
    stages = RunStore(tmp_path / "stages")
    # as if killed when the checkpoint was written and nothing else
    figure6._weights(DIGITS, 1, tmp_path).unlink()
    (stages.folder / f"{stages.key(figure6._stage(DIGITS, 1))}.json").unlink()
    here(figure6, replace(short, stages=(1, 2)), tmp_path)
    for stage in (1, 2):
        model = build_network("digits", 0)
        load_weights(model, figure6._weights(DIGITS, stage, folder))
        assert same(model, figure6._weights(DIGITS, stage, tmp_path))


def test_a_network_without_data_is_left_out(staged, tmp_path, monkeypatch):
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    folder, figure, rows = staged
    lines: list[str] = []
    more = replace(figure, networks=(*figure.networks, Evolving(Trained("cifar100", "cifar100"))))
    assert figure6.run(more, folder, device="cpu", report=lines.append, workers=1) == rows
    assert lines[0].startswith("left out: no data for 'cifar100'")


# --- figures 5 and 7 --------------------------------------------------------------------------------------------------

LAST = PostTrainingGrid(Baseline("digits", "digits", 2, 64), 0.1, 1, cells=(("fc1", "fc2"),), fr=figure5.EMBEDDINGS)


@pytest.fixture(scope="module")
def last_layer(tmp_path_factory) -> list[Row]:
    grids = tuple(replace(LAST, seeds=(0, 1), alpha=alpha) for alpha in (0.1, 0.9))
    return here(figure5, GridStudy(grids, "figure5"), tmp_path_factory.mktemp("figure5"))


def test_figure_5_has_bp_once_and_every_embedding_at_every_alpha(last_layer):
    found = [tuple(row["settings"].get(k) for k in ("method", "embedding", "alpha", "seed")) for row in last_layer]
    embeddings = ("nearest", "maximum", "one_hot")
    fr = [("fr", embedding, alpha, seed) for embedding in embeddings for alpha in (0.1, 0.9) for seed in (0, 1)]
    assert sorted(found, key=str) == sorted([*fr, ("bp", None, None, 0), ("bp", None, None, 1)], key=str)
    assert {row["settings"]["study"] for row in last_layer} == {"figure5"}
    assert {(row["l_start"], row["l_stop"]) for row in last_layer} == {(3, 4)}


def test_figure_5_runs_on_what_there_is(monkeypatch, tmp_path):
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    figure = figure5.settings("reduced")
    assert [(grid.baseline.data, grid.alpha) for grid in figure.grids] == [("digits", a) for a in (0.1, 0.5, 0.9)]
    assert len(figure.left_out) == 6
    lines: list[str] = []
    assert figure5.run(replace(figure, grids=()), tmp_path, device="cpu", report=lines.append) == []
    assert [line.startswith("left out: ") for line in lines] == [True] * 6


def test_figure_7_shares_the_rows_of_table_2(tmp_path):
    seven = figure7.settings("smoke")
    cell = (("fc1", "fc2"),)
    seven = replace(seven, grids=tuple(replace(grid, cells=cell) for grid in seven.grids))
    rows = here(figure7, seven, tmp_path)
    assert [row["settings"]["network"] for row in rows] == ["cifar10"] * 2 + ["cifar10-reversed"] * 2
    second = post_training_grid.run(replace(table(2, "smoke"), cells=cell), tmp_path, device="cpu", workers=1)
    assert second == rows[:2]
    (section,) = sections(rows)
    assert section.heading.startswith("Figure 7: cifar10")
    assert "not tested, for want of seeds" in section.reading


# --- the sections -----------------------------------------------------------------------------------------------------


def make_stage(stage: float, values: dict[str, float], strategy: str = "greedy", seed: int = 0) -> Row:
    layers = [
        {"layer": layer, "maps": [[[v, v]]], "discrepancy": v, "deviation": v, "deviation_wrong": None}
        for layer, v in values.items()
    ]
    way = {"strategy": strategy, "rules": "paper" if strategy == "greedy" else "nearest"}
    settings = {
        "kind": "figure4",
        "network": "net",
        "data": "set",
        "samples": 7,
        "stage": stage,
        "seed": seed,
        "way": way,
    }
    return {"settings": {**settings, "reduced": ""}, "accuracy": stage, "step": int(100 * stage), "layers": layers}


def make_run(method: str, seed: int, accuracy: float, cell: tuple[int, int] = (3, 4), **settings: Any) -> Row:
    return {
        "settings": {
            "kind": "post-training",
            "network": "net",
            "data": "set",
            "method": method,
            "seed": seed,
            **settings,
        },
        "l_start": cell[0],
        "l_stop": cell[1],
        "parameters": 5,
        "baseline_accuracy": 0.5,
        "history": [{"epoch": 0, "accuracy": 0.5}, {"epoch": 1, "accuracy": accuracy}],
    }


def test_the_claim_of_figure_4_is_judged_layer_by_layer():
    falling, rising = {"conv1": 0.5, "fc1": 0.5}, {"conv1": 0.75, "fc1": 0.25}
    (section,) = sections([make_stage(0.1, falling), make_stage(0.9, rising)])
    verdict = (
        "the mean |difference| falls from stage to stage in fc1 and does not in conv1 (0.500, 0.750): confirmed in part"
    )
    assert verdict in section.reading
    half = {"conv1": 0.25, "fc1": 0.25}
    (section,) = sections([make_stage(0.1, falling, "global"), make_stage(0.9, half, "global")])
    assert "With global, the mean |difference| falls from stage to stage in conv1, fc1: confirmed" in section.reading
    assert "contradicted" in sections([make_stage(0.1, half), make_stage(0.9, falling)])[0].reading
    assert section.tables[0].rows[0][:3] == ["conv1", "0.500", "0.250"]
    assert section.tables[0].columns[1:3] == ["mean |difference|, at 10.00 %", "mean |difference|, at 90.00 %"]


def test_several_networks_are_averaged_and_ways_are_kept_apart():
    rows = [
        make_stage(0.1, {"fc1": v}, strategy, s) for strategy in ("greedy", "global") for s, v in ((0, 0.5), (1, 1.5))
    ]
    (section,) = sections(rows)
    assert [t.rows[0][1] for t in section.tables] == ["1.00 \u00b1 0.707"] * 2
    assert len(section.figures) == 2
    assert "the first of 2 networks" in section.text


def test_the_stages_of_a_layer_share_one_scale(evolved):
    _, _, rows = evolved
    figure = stage_maps([row for row in rows if row["settings"]["way"]["strategy"] == "global"])
    images = [axes.images[0] for axes in figure.axes if axes.images]
    layers = rows[1]["layers"]
    for column, layer in enumerate(layers):
        largest = max(
            np.max(row["layers"][column]["maps"]) for row in rows if row["settings"]["way"]["strategy"] == "global"
        )
        own = [image for image in images if image.get_clim() == pytest.approx((0, largest))]
        assert len(own) >= 2, layer["layer"]
    shown = images[len(layers)].get_array()  # the second stage's input: one channel, magnified
    maps = np.asarray(rows[3]["layers"][0]["maps"])[0]
    factor = shown.shape[0] // maps.shape[0]
    np.testing.assert_allclose(shown[::factor, ::factor], maps)
    assert "% right" in figure.axes[0].get_ylabel()
    with pytest.raises(ValueError, match="one per stage"):
        stage_maps(rows)


def test_figure_5_compares_with_one_hot(last_layer):
    rows = [
        make_run("fr", s, a + 0.01 * (s % 2), study="figure5", embedding=e, alpha=0.5)
        for e, a in (("nearest", 0.75), ("maximum", 0.6), ("one_hot", 0.7))
        for s in range(5)
    ] + [make_run("bp", s, 0.65, study="figure5") for s in range(5)]
    rows[0]["history"][1]["accuracy"] = 0.76  # so that differences are not all the same
    rows[5]["history"][1]["accuracy"] = 0.61
    (section,) = sections(rows)
    (lines,) = (t.rows for t in section.tables)
    named = {line[2]: line for line in lines}
    assert named["nearest (MSE)"][5].startswith("+5.20 [")
    assert named["maximum (L1)"][5].startswith("\u22129.80 [")
    assert named["BP"][3] == "65.00"
    assert "Of 2 comparisons, 1 show a difference in its favour and 1 against it" in section.reading
    assert "holds in some cases and fails in others" in section.reading
    figure = embeddings([Grid.of(rows)])
    points = {to_hex(line.get_color()): line for line in figure.axes[0].lines if line.get_marker() == "^"}
    assert points[to_hex(GREEN)].get_ydata()[0] == pytest.approx(70.4)
    assert len(sections(last_layer)) == 1


def test_figure_6_compares_each_stage_with_bp():
    def stage(number: int, method: str, seed: int, accuracy: float) -> Row:
        way = {"alpha": 0.5} if method == "fr" else {}
        return make_run(method, seed, accuracy + 0.01 * seed, kind="figure6", stage=number, start="a", stop="b", **way)

    rows = [
        stage(number, method, seed, accuracy)
        for number, bp, fr in ((1, 0.6, 0.5), (2, 0.6, 0.6), (3, 0.6, 0.7))
        for method, accuracy in (("bp", bp), ("fr", fr))
        for seed in range(8)
    ]
    for row in rows[8:12]:  # so that differences are not all the same
        row["history"][1]["accuracy"] -= 0.01
    (section,) = sections(rows)
    assert "\u221210.50 in the first third, 0.00 in the middle third, +10.00 in the last third" in section.reading
    assert "ahead in 1 and behind in 1 of 3 stages" in section.reading
    assert "In the last third, FR after 1 epoch is best of all" in section.reading
    assert section.tables[0].rows[0][:3] == ["1", "50.00", "63.50"]
    bp, fr = (by_stage([r for r in rows if r["settings"]["method"] == m]) for m in ("bp", "fr"))
    figure = stage_boxes(bp, fr, (1,))
    above, below = figure.axes
    medians = [
        line.get_ydata()[0] for line in above.lines if line.get_color() == "black" and len(line.get_xdata()) == 2
    ]
    assert medians == pytest.approx([53.0, 63.5, 73.5])
    assert below.lines[0].get_ydata() == pytest.approx([-10.5, 0.0, 10.0])


def both_networks(growing: float, shrinking: float) -> list[Row]:
    """FR minus BP in points, of two cells and five seeds, with a little noise."""
    return [
        make_run(
            method, seed, 0.6 + (method == "fr") * (gain + 0.1 * (seed % period)) / 100, cell, network=network, data="d"
        )
        for network, gain, period in (("net", growing, 2), ("net-reversed", shrinking, 3))
        for cell in ((0, 1), (1, 2))
        for method in ("bp", "fr")
        for seed in range(5)
    ]


@pytest.mark.parametrize(
    ("growing", "shrinking", "verdict"), [(0, 2, "confirmed"), (2, 0, "contradicted"), (1, 1, "not shown")]
)
def test_figure_7_compares_the_gains_of_two_networks(growing, shrinking, verdict):
    rows = both_networks(growing, shrinking)
    (section,) = sections(rows)
    assert f"The claim is {verdict}." in section.reading
    assert f"in (b) +{shrinking + 0.08:.2f} points on average" in section.reading
    figure = section.figures[0]
    assert [axes.get_title() for axes in figure.axes] == ["(a) net on d", "(b) net-reversed on d"]
    dots = [line for line in figure.axes[1].lines if line.get_marker() == "o"]
    assert [float(np.ravel(dot.get_xdata())[0]) for dot in dots] == pytest.approx([shrinking + 0.08] * 2)
    if shrinking == 2:
        assert {to_hex(dot.get_color()) for dot in dots} == {to_hex(VERMILLION)}


def test_other_rows_have_no_section(evolved, last_layer):
    plain = [make_run("fr", 0, 0.5), make_run("bp", 0, 0.5), {"settings": {"kind": "diagnosis"}}]
    assert sections(plain) == []
    headings = [section.heading[:8] for section in sections([*plain, *last_layer, *evolved[2], *both_networks(0, 1)])]
    assert headings == ["Figure 4", "Figure 5", "Figure 7"]


def test_the_page_holds_the_figures_with_their_labels(evolved, last_layer, staged, tmp_path):
    found = sections([*evolved[2], *last_layer, *staged[2], *both_networks(0, 1)])
    assert [section.heading[:8] for section in found] == ["Figure 4", "Figure 5", "Figure 6", "Figure 7"]
    text = write_page(tmp_path / "page.html", "Figures", "Four of them.", found).read_text()
    for section in found:
        assert section.reading
        for figure in section.figures:
            assert len(str(figure.get_label())) > 40
            assert figure_to_svg(figure) == figure_to_svg(figure)
    assert text.count("<img") == 5
    undrawn = sections([*evolved[2], *last_layer, *staged[2], *both_networks(0, 1)], draw=False)
    for drawn, bare in zip(found, undrawn, strict=True):  # what explains a figure alone is left out with it
        assert replace(drawn, figures=[], reading="") == replace(bare, reading="")
        assert bare.reading
        assert drawn.reading.endswith(bare.reading)
