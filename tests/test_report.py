"""Tables, figures and the page: that they show the numbers they were given, and nothing from elsewhere."""

import html.parser
import io
import re
import statistics

import numpy as np
import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from revprop.report import (
    Table,
    accuracy_curves,
    deviation_bars,
    diagnosis_table,
    group_runs,
    post_training_table,
)


def make_run(method="fr", layers=(0, 1), seed=0, accuracies=None, memory=8_000_000, **settings):
    accuracies = {0: 0.6, 1: 0.61, 5: 0.62, 10: 0.63} if accuracies is None else accuracies
    return {
        "settings": {
            "data": "cifar10",
            "network": "cnn",
            "start": f"layer{layers[0]}",
            "stop": f"layer{layers[1]}",
            "method": method,
            "alpha": 0.1,
            "seed": seed,
            "epochs": 10,
            "reduced": "",
            **settings,
        },
        "l_start": layers[0],
        "l_stop": layers[1],
        "parameters": 33053,
        "peak_memory_bytes": memory,
        "seconds": 2.0,
        "baseline_accuracy": 0.6,
        "history": [
            {"epoch": epoch, "loss": None, "accuracy": accuracy, "seconds": 0.5}
            for epoch, accuracy in accuracies.items()
        ],
    }


def cell(table, line, column):
    names = [row[0] for row in table.rows]
    return table.rows[names.index(line)][table.columns.index(column)]


# --- the post-training table ------------------------------------------------------------------------------------------


def test_a_line_gives_mean_and_sample_standard_deviation_over_seeds():
    pairs = [(0.61, 8e6), (0.62, 9e6), (0.66, 7e6)]
    runs = [make_run(seed=seed, accuracies={1: a}, memory=m) for seed, (a, m) in enumerate(pairs)]
    table = post_training_table(runs, epochs=(1,))
    assert table.rows == [["FR (0, 1)", 33053, "9.00", "2.00", "63.00 \u00b1 2.65"]]
    assert statistics.stdev([61, 62, 66]) == pytest.approx(2.65, abs=5e-3)
    assert "3 runs, 3 a line" in table.note
    assert "Baseline accuracy (mean): 60.00 %" in table.note


def test_one_seed_gives_the_plain_value():
    table = post_training_table([make_run()])
    assert table.columns[:4] == ["trained", "parameters", "peak memory (MB)", "seconds"]
    assert table.columns[4:] == ["epoch 1 (%)", "epoch 5 (%)", "epoch 10 (%)"]
    assert table.rows == [["FR (0, 1)", 33053, "8.00", "2.00", "61.00", "62.00", "63.00"]]
    assert "\u00b1" not in table.note
    assert "1 run, 1 a line" in table.note


def test_lines_come_in_the_order_of_the_paper():
    pairs = [(1, 3), (0, 1), (2, 3), (0, 3), (0, 2), (1, 2)]
    table = post_training_table([make_run(method, pair) for pair in pairs for method in ("fr", "bp")])
    ordered = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert [row[0] for row in table.rows] == [f"{method} {pair}" for pair in ordered for method in ("BP", "FR")]


def test_the_best_of_many_means_is_not_stressed():
    runs = [make_run(method, accuracies={1: accuracy}) for method, accuracy in (("bp", 0.61), ("fr", 0.62))]
    assert not post_training_table(runs).bold


def test_seconds_are_of_the_whole_run_and_averaged():
    runs = [
        {**make_run(seed=seed), "seconds": seconds, "target_seconds": 0.5} for seed, seconds in ((0, 2.0), (1, 4.0))
    ]
    assert cell(post_training_table(runs), "FR (0, 1)", "seconds") == "3.50"


def test_epochs_that_some_runs_did_not_reach_say_so():
    runs = [make_run(seed=0), make_run(seed=1, accuracies={1: 0.63})]
    table = post_training_table(runs, epochs=(1, 10, 50))
    assert table.rows[0][4:] == ["62.00 \u00b1 1.41", "63.00 (1 of 2)", None]


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged():
    runs = [
        make_run(seed=seed, alpha=alpha, accuracies={1: 0.6 + alpha / 10}) for seed in (0, 1) for alpha in (0.1, 0.9)
    ]
    table = post_training_table([*runs, make_run("bp", accuracies={1: 0.5})], epochs=(1,))
    assert [(row[0], row[4]) for row in table.rows] == [
        ("BP (0, 1)", "50.00"),
        ("FR (0, 1), alpha=0.1", "61.00 \u00b1 0.00"),
        ("FR (0, 1), alpha=0.9", "69.00 \u00b1 0.00"),
    ]
    assert "5 runs, 1 to 2 a line" in table.note


def test_the_note_says_what_a_reduced_run_reduces():
    reduced = "4,000 of 50,000 training images."
    assert f"Reduced (all of the runs): {reduced}" in post_training_table([make_run(reduced=reduced)]).note
    mixed = post_training_table([make_run(reduced=reduced), make_run("bp")])
    assert f"Reduced (1 of the runs): {reduced}" in mixed.note
    assert "Reduced" not in post_training_table([make_run()]).note


@pytest.mark.parametrize("report", [post_training_table, accuracy_curves, group_runs])
def test_runs_that_cannot_be_reported_are_refused_readably(report):
    with pytest.raises(ValueError, match="no finished post-training run"):
        report([])
    with pytest.raises(ValueError, match=r"row 1 is no post-training run: it has no parameters, history"):
        report([make_run(), {key: value for key, value in make_run().items() if key not in ("parameters", "history")}])
    with pytest.raises(ValueError, match=r"settings\.data .*: cifar10, mnist"):
        report([make_run(), make_run(data="mnist")])


def test_percent_for_a_share_is_refused():
    with pytest.raises(ValueError, match=r"accuracy 61\.0 at epoch 1: a share"):
        post_training_table([make_run(accuracies={1: 61.0})])


# --- the diagnosis ----------------------------------------------------------------------------------------------------

DIAGNOSIS = [
    {"layer": "conv1", "deviation": [0.4, 0.0, 0.8, 0.0], "reached": [True, True, False, True], "active": [1, 0, 1, 0]},
    {"layer": "fc1", "deviation": np.array([0.02, 0.0, 0.04, 0.0]), "reached": 1.0, "active": [1, 0, 1, 0]},
    {"layer": "output", "deviation": 0.125, "reached": 0.5},
]


def test_the_diagnosis_table_averages_over_wrong_and_over_all_samples():
    table = diagnosis_table(DIAGNOSIS)
    assert table.columns == ["layer", "deviation, wrong samples", "deviation, all samples", "label reached (%)"]
    assert table.rows == [
        ["conv1", "0.600", "0.300", "75.0"],
        ["fc1", "0.0300", "0.0150", "100.0"],
        ["output", None, "0.125", "50.0"],
    ]
    assert "2 of 4 are wrong" in table.note


def test_a_diagnosis_of_tensors_is_read():
    torch = pytest.importorskip("torch")
    entry = {
        "layer": "fc1",
        "deviation": torch.tensor([0.5, 0.0]),
        "reached": torch.tensor([True, False]),
        "active": torch.tensor([True, False]),
    }
    assert diagnosis_table([entry]).rows == [["fc1", "0.500", "0.250", "50.0"]]


def test_where_nothing_is_wrong_there_is_no_mean_over_wrong_samples():
    assert diagnosis_table([{"layer": "fc1", "deviation": [0, 0], "active": [0, 0]}]).rows == [
        ["fc1", None, "0.00", None]
    ]


@pytest.mark.parametrize("report", [diagnosis_table, deviation_bars])
def test_a_diagnosis_that_cannot_be_reported_is_refused_readably(report):
    with pytest.raises(ValueError, match="no layer"):
        report([])
    with pytest.raises(ValueError, match="entry 0 of the diagnosis has no deviation"):
        report([{"layer": "fc1"}])
    with pytest.raises(ValueError, match=r"active of fc1 has shape \(2,\), its deviation \(3,\)"):
        report([{"layer": "fc1", "deviation": [1, 2, 3], "active": [0, 1]}])
    with pytest.raises(ValueError, match=r"deviation of fc1 has shape \(0,\)"):
        report([{"layer": "fc1", "deviation": []}])


# --- a table in three forms -------------------------------------------------------------------------------------------


def test_the_three_forms_show_the_same_cells():
    table = Table("Title", ["name", "n", "x"], [["a", 33053, 0.123456], ["b", None, 12.0]], note="Note.", bold={(0, 1)})
    assert table.to_markdown().splitlines() == [
        "**Title**",
        "",
        "| name | n | x |",
        "|:---|---:|---:|",
        "| a | **33,053** | 0.1235 |",
        "| b | \u2013 | 12 |",
        "",
        "Note.",
    ]
    assert re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", table.to_html()) == [
        *("name", "n", "x"),
        *("a", "<strong>33,053</strong>", "0.1235"),
        *("b", "\u2013", "12"),
    ]
    output = io.StringIO()
    rich.console.Console(file=output, width=80).print(table.to_rich())
    text = output.getvalue()
    assert all(part in text for part in ("Title", "name", "33,053", "0.1235", "\u2013", "12", "Note."))


def test_a_line_of_another_length_is_refused():
    with pytest.raises(ValueError, match="line 1 of 'T' has 1 cells for 2 columns"):
        Table("T", ["a", "b"], [["x", 1], ["y"]])


class Cells(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.cells, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=20))
def test_no_text_breaks_out_of_its_cell(text):
    table = Table("T", ["a", "b"], [["[bold]x[/bold]", text]])
    parser = Cells()
    parser.feed(table.to_html())
    assert parser.cells[3].rstrip() == text.rstrip()
    assert parser.tags <= {"figure", "figcaption", "div", "table", "thead", "tbody", "tr", "th", "td"}
    line = table.to_markdown().splitlines()[4]
    assert len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) >= 3
    output = io.StringIO()
    rich.console.Console(file=output, width=200).print(table.to_rich())
    assert "[bold]x[/bold]" in output.getvalue()


# --- figures ----------------------------------------------------------------------------------------------------------


def test_bars_have_the_mean_deviations_for_lengths():
    axes = deviation_bars(DIAGNOSIS).axes[0]
    lengths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert lengths["samples the network gets wrong"] == pytest.approx([0.6, 0.03, 0.0])
    assert lengths["all samples"] == pytest.approx([0.3, 0.015, 0.125])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "fc1", "output"]
    assert axes.yaxis_inverted()
    assert "relative" in axes.get_xlabel()
    assert len(deviation_bars(DIAGNOSIS[2:]).axes[0].containers) == 1


def test_curves_are_the_means_by_epoch_and_the_baseline_is_dashed():
    runs = [
        make_run(method, layers, seed, {0: 0.6, 1: base + seed / 100, 2: base})
        for method, base in (("bp", 0.62), ("fr", 0.64))
        for layers in ((0, 1), (0, 2), (1, 2))
        for seed in (0, 2)
    ]
    figure = accuracy_curves(runs)
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in panels] == ["(0, 1)", "(0, 2)", "(1, 2)"]
    bp, fr, baseline = panels[1].get_lines()
    assert (bp.get_color(), fr.get_color()) == ("#0072B2", "#D55E00")
    np.testing.assert_allclose(bp.get_xydata(), [[0, 60], [1, 63], [2, 62]])
    np.testing.assert_allclose(fr.get_xydata(), [[0, 60], [1, 65], [2, 64]])
    assert baseline.get_linestyle() == "--"
    assert set(baseline.get_ydata()) == {60.0}
    band = panels[1].collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((60, 63 + statistics.stdev([62, 64])))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["BP", "FR", "baseline"]
    assert figure.get_supylabel() == "test accuracy (%)"
    assert "FR (1, 2): 64.00 % after epoch 2" in figure.get_label()


def test_other_settings_are_curves_of_their_own():
    figure = accuracy_curves([make_run("bp"), make_run(alpha=0.1), make_run(alpha=0.9)])
    _, one, other, _ = figure.axes[0].get_lines()
    assert one.get_color() == other.get_color()
    assert one.get_linestyle() != other.get_linestyle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "BP",
        "FR, alpha=0.1",
        "FR, alpha=0.9",
        "baseline",
    ]


@pytest.mark.parametrize("layers", [[(0, 1)], [(0, 1), (0, 2), (1, 2)]])
def test_the_legend_stays_within_the_figure(layers):
    runs = [make_run(layers=pair, alpha=alpha, strategy=s) for pair in layers for alpha in (0.1, 0.9) for s in "ab"]
    figure = accuracy_curves([*runs, make_run("bp", layers[0])])
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert box.y0 >= max(axes.bbox.y1 for axes in figure.axes)


def test_runs_without_an_accuracy_give_no_curve():
    with pytest.raises(ValueError, match="no run reports an accuracy"):
        accuracy_curves([make_run(accuracies={})])
