"""The report of a post-training study: that its tables, sentences and figures say what the runs allow, and no more."""

import itertools
import re

import pytest
from report_cases import make_run, study

from revprop.report import (
    PUBLISHED_EPOCHS,
    Grid,
    Paired,
    ablation_table,
    best_of_ways,
    best_setting,
    best_verdicts,
    cell_verdicts,
    comparison_figure,
    comparison_table,
    difference_dots,
    find_changes,
    headline,
    holm,
    memory_table,
    post_training_sections,
    published_table,
    split_by_study,
    study_tables,
    summary_table,
    write_figures,
    write_markdown,
    write_report,
)
from revprop.runs import RunStore


def lines(table):
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_the_summary_holds_every_way_against_the_baseline_and_the_best_of_bp():
    rows = study({(0, 1): 0.0, (0, 4): 1.0})
    for seed in range(6):
        rows.append(make_run("solve", (3, 5), seed, (0.6, 0.65), epochs=(1, 2), memory=4e6, baseline=0.59 + seed / 100))
    grid = Grid.of([{**row, "baseline_accuracy": 0.59 + row["settings"]["seed"] / 100} for row in rows])
    table = summary_table(grid)
    assert [row[:3] for row in table.rows] == [
        ["baseline", None, None],
        ["BP", str(best_setting(grid.bp.groups, grid.epochs).group.layers), "epoch 1"],
        ["FR", "(0, 4)", "epoch 1"],
        ["Closed form", "(3, 5)", "sweep 2"],
    ]
    found = lines(table)
    assert found["baseline"]["accuracy (%)"] == "61.50 \u00b1 1.87"
    solve = next(one for one in best_of_ways(grid) if one.way.method == "solve")
    assert solve.gain.mean == pytest.approx(65 - 61.5)
    assert solve.lead.mean == pytest.approx(65 - best_setting(grid.bp.groups, grid.epochs).mean)
    assert found["Closed form"]["seconds (BP = 1)"] == "4.50 (1.8)"  # two sweeps and the targets, against one epoch
    assert found["Closed form"]["MB (BP = 1)"] == "4.00 (0.5)"
    assert "optimistic" in table.note


def test_one_training_after_another_is_a_way_of_its_own_and_pays_for_both():
    first = {"method": "solve", "margin": 6.0}
    rows = study({(0, 1): 0.0}, seeds=2)
    for seed in (0, 1):
        spent = {"seconds": 3.0, "target_seconds": 1.0, "peak_memory_bytes": 9e6}
        rows.append({**make_run("fr", (0, 1), seed, 0.63, first=first), "first": spent})
    grid = Grid.of(rows)
    assert [(way.method, way.label) for way in grid.ways] == [
        *(("bp", "BP"), ("fr", "FR"), ("solve+fr", "Closed form, then FR"))
    ]
    assert [way.label for way in grid.fr] == ["FR"]
    chained = lines(summary_table(grid))["Closed form, then FR"]
    assert chained["after"] == "epoch 1"
    assert chained["seconds (BP = 1)"] == "6.50 (2.6)"  # 2 + 0.5, and 3 + 1 before
    assert chained["MB (BP = 1)"] == "9.00 (1.1)"


def test_what_was_measured_on_held_out_images_says_so():
    rows = [make_run(seed=seed, holdout=0.1) for seed in (0, 1)]
    assert "held-out training images" in study_tables(rows)[0].title
    assert all("held-out" in section.heading for section in post_training_sections(rows, draw=False))


# --- tables of cells --------------------------------------------------------------------------------------------------


def test_only_shown_differences_are_bold():
    grid = Grid.of(study({(0, 1): 1.0, (0, 2): 0.0, (1, 2): -1.0}))
    table = comparison_table(grid, grid.fr[0], 10)
    found = lines(table)
    assert [found[layers]["verdict"] for layers in ("(0, 1)", "(0, 2)", "(1, 2)")] == [
        *("FR better", "no difference shown", "BP better")
    ]
    assert {(table.rows[i][0], table.columns[j]) for i, j in table.bold} == {
        ("(0, 1)", "verdict"),
        ("(1, 2)", "verdict"),
    }
    paired = grid.against_bp(grid.fr[0], 10)
    assert [one.corrected for one in paired.values()] == holm([one.p for one in paired.values()])
    assert found["(0, 1)"]["FR \u2212 BP"].startswith("+1.000 [+0.")
    assert "over the 6 seeds" in table.note
    assert found["(0, 1)"]["published"] == "+0.055"  # 62.722 - 62.667
    assert "for the 3 cells tested" in table.note


def test_cells_that_cannot_be_tested_say_so():
    rows = study({(0, 1): 1.0}, seeds=1) + study({(0, 2): 1.0}, seeds=4)
    grid = Grid.of(rows)
    found = lines(comparison_table(grid, grid.fr[0], 10))
    assert found["(0, 1)"]["verdict"] == "not tested: 1 shared seed"
    assert found["(0, 1)"]["FR \u2212 BP"] == "+1.100"
    assert "1 cell with fewer than two shared seeds not tested" in cell_verdicts(grid, grid.fr[0])
    alone = Grid.of([make_run()])
    assert comparison_table(alone, alone.fr[0], 10) is None
    assert cell_verdicts(alone, alone.fr[0]) == ""


def test_the_same_data_is_compared_by_accuracy_and_other_data_by_gain():
    same = Grid.of([make_run("bp", seed=s, accuracy=0.627, data="cifar10", baseline=0.62) for s in (0, 1)])
    line = lines(published_table(same))["BP (0, 1)"]
    assert same.comparable
    assert published_table(same).rows[0][-3:] == ["62.700", "62.667", "+0.033"]
    assert line["epoch 1"] == "62.700"
    other = Grid.of([make_run("bp", seed=s, accuracy=0.607, baseline=0.6) for s in (0, 1)])
    table = published_table(other)
    assert not other.comparable
    assert table.rows[0][-3:] == ["+0.700", "+0.117", "+0.583"]  # 62.667 - 62.55
    assert "gain over the baseline" in table.title
    assert "cifar10-jpeg) is not the paper's" in table.note
    assert "Reduced: 2 of the paper's 10 runs a line" in table.note
    fewer = Grid.of([make_run("bp", data="cifar10", samples=4000)])
    assert not fewer.comparable
    assert published_table(Grid.of([make_run(network="digits", data="digits")])) is None


def test_memory_ratios_stand_beside_the_published_ones():
    rows = [
        make_run(method, layers, seed, memory=memory * (1 + seed))
        for layers, fr in (((0, 1), 9e6), ((0, 2), 12e6))
        for method, memory in (("bp", 8e6), ("fr", fr))
        for seed in (0, 1)
    ]
    grid = Grid.of(rows)
    table = memory_table(grid, grid.fr[0])
    found = lines(table)
    assert found["(0, 1)"]["FR / BP"] == "1.125"
    assert found["(0, 1)"]["published ratio"] == f"{20.45 / 17.43:.3f}"
    assert found["all"]["FR / BP"] == "1.312 [1.125, 1.500]"


# --- ablations --------------------------------------------------------------------------------------------------------


def test_an_ablation_holds_each_change_against_bp_and_the_default():
    rows = []
    for seed, layers in itertools.product(range(4), ((0, 4), (0, 5))):
        jitter = seed / 1000
        for options, accuracy in (
            ({"margin": 0.0}, 0.61),
            ({"margin": 3.0}, 0.62 + jitter),
            ({"margin": 0.0, "strategy": "greedy"}, 0.60 - jitter),
        ):
            rows.append(make_run("fr", layers, seed, accuracy, study="ablation", alpha=0.1, **options))
        rows.append(make_run("bp", layers, seed, 0.605))
    ablation, rest = sorted(split_by_study(rows), key=len, reverse=True)
    grid, references = Grid.of(ablation), Grid.of(rest)
    changes = {(change.name, change.group.layers): change for change in find_changes(grid, references)}
    assert list(changes) == [
        (name, layers) for layers in ((0, 4), (0, 5)) for name in ("FR, default", "FR, margin=3.0", "FR, greedy")
    ]
    assert changes["FR, margin=3.0", (0, 4)].to_default.mean == pytest.approx(1.15)
    assert changes["FR, margin=3.0", (0, 4)].to_bp.mean == pytest.approx(1.65)
    assert changes["FR, default", (0, 4)].to_default.seeds == 0
    table = ablation_table(grid, references)
    assert {table.columns[j] for _, j in table.bold} == {"p, corrected"}
    assert [section.heading for section in post_training_sections(rows, draw=False)] == [
        "What each option does: cifar10 on cifar10-jpeg",
        *("Post-training cifar10 on cifar10-jpeg", "Post-training cifar10 on cifar10-jpeg: every cell"),
    ]


# --- sentences --------------------------------------------------------------------------------------------------------


def test_sentences_count_the_cells_and_claim_no_more():
    grid = Grid.of(study({(0, 1): 1.0, (0, 2): 0.0, (1, 2): -1.0}))
    text = cell_verdicts(grid, grid.fr[0])
    assert text.startswith(
        "FR against BP: after 10 epochs FR beats BP in 1 of 3 cells (corrected p < 0.05): (0, 1); "
        "BP beats FR in 1: (1, 2); in 1 no difference is shown (the intervals reach 0."
    )
    assert len(re.findall(r"[Aa]fter \d+ epochs?", text)) == 3
    single = Grid.of(study({(0, 1): 1.0, (0, 2): 1.0}, seeds=1))
    assert "nothing can be tested: 2 cells have fewer than two seeds" in cell_verdicts(single, single.fr[0])
    assert "beats" not in cell_verdicts(single, single.fr[0])


def test_the_best_is_named_with_its_interval_and_what_it_is_worth():
    grid = Grid.of(study({(0, 1): 0.0, (0, 4): 1.0}))
    bp, fr, worth, paper = best_verdicts(grid)
    assert bp.startswith("Best of BP: (0, ")
    assert re.match(
        r"Best of FR: \(0, 4\), epoch 1, 6\d\.\d\d %, \+\d\.\d{3} points over the baseline \(95 % interval", fr
    )
    assert "chosen on the other seeds, +" in fr
    assert "p-values are too small" in worth
    assert (
        "(Table 2) is +0.175 points: (0, 4) after 10 epochs against (1, 5) after 5; of epoch 10 alone, +0.207" in paper
    )
    assert "Ours was trained on other data" in paper
    assert headline(grid).startswith(
        "cifar10 on cifar10-jpeg, points above the best of BP with 95 % interval: best of FR +"
    )


# --- figures and pages ------------------------------------------------------------------------------------------------


def test_dots_are_the_differences_and_colour_means_a_difference_shown():
    grid = Grid.of(study({(0, 1): 1.0, (0, 2): 0.0}))
    figure = comparison_figure(grid, grid.fr[0])
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["after 1 epoch", "after 5 epochs", "after 10 epochs"]
    dots = [line for line in panels[2].get_lines() if line.get_marker() == "o"]
    found = grid.against_bp(grid.fr[0], 10)
    assert [dot.get_xdata()[0] for dot in dots] == [paired.mean for paired in found.values()]
    assert [dot.get_markerfacecolor() for dot in dots] == ["#D55E00", "white"]
    crosses = [line.get_xdata()[0] for line in panels[2].get_lines() if line.get_marker() == "x"]
    assert crosses == pytest.approx([62.722 - 62.667, 62.600 - 62.736])
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["(0, 1)", "(0, 2)"]
    assert "(0, 1) +" in figure.get_label()
    with pytest.raises(ValueError, match="no difference to draw"):
        difference_dots({"epoch 1": {"(0, 1)": Paired(0)}}, ("FR", "red"), ("BP", "blue"))


def test_studies_that_differ_in_their_data_stand_apart():
    rows = [
        *study({(0, 1): 0.0}, seeds=2),
        *(make_run(data="digits", network="digits", seed=s) for s in (0, 1)),
        *(make_run(samples=100, reduced="100 images", seed=s) for s in (0, 1)),
        make_run(study="figure5"),
        {"settings": {"kind": "diagnosis"}},
    ]
    assert [len(found) for found in split_by_study(rows)] == [4, 2, 2, 1]
    headings = [section.heading for section in post_training_sections(rows, draw=False)]
    assert [heading for heading in headings if ":" not in heading] == [
        *("Post-training cifar10 on cifar10-jpeg", "Post-training digits on digits"),
        "Post-training cifar10 on cifar10-jpeg (100 images, samples 100)",
    ]
    assert len(study_tables(rows)) == 4


def test_the_closed_form_has_a_table_of_its_sweeps():
    rows = [*study({(0, 1): 0.0}, seeds=2), make_run("solve", (0, 1), accuracy=(0.6, 0.62, 0.63), epochs=(1, 2, 3))]
    by_epochs, by_sweeps = study_tables(rows)
    assert by_epochs.columns[-3:] == [f"epoch {epoch} (%)" for epoch in PUBLISHED_EPOCHS]
    assert by_sweeps.columns[-2:] == ["sweep 1 (%)", "sweep 3 (%)"]
    assert by_sweeps.rows[0][0] == "Closed form (0, 1)"
    assert by_sweeps.rows[0][-1] == "63.00"


def test_a_folder_of_a_study_becomes_a_page_a_text_and_figures(tmp_path):
    store = RunStore(tmp_path / "rows")
    for row in study({(0, 1): 1.0, (0, 2): 0.0}, seeds=3):
        store.put(row["settings"], {key: value for key, value in row.items() if key != "settings"})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "FR against BP: after 10 epochs FR beats BP in" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    text = write_markdown([tmp_path], tmp_path / "results.md").read_text(encoding="utf-8")
    assert "## Post-training cifar10 on cifar10-jpeg\n\nFR against BP: after 10 epochs" in text
    assert "### cifar10 on cifar10-jpeg: what beats what" in text
    assert "\n\n> Read the corrected p" in text, "what is to be read from the tables stands below them"
    assert "dashed line" in page
    assert "dashed line" not in text, "there is no figure on that page"
    names = [path.name for path in write_figures(tmp_path, tmp_path / "figures")]
    assert names == ["1-against-bp-by-cell.svg", "2-test-accuracy-by-epoch-bp.svg"]
    with pytest.raises(ValueError, match="no finished run"):
        write_markdown([tmp_path / "none"], tmp_path / "none.md")
