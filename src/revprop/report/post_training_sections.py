"""The sections of a page on post-training studies: what came out, every cell, FR against BP, and what each option does."""

from __future__ import annotations

from collections.abc import Sequence

from revprop.report.ablation import ablation_table, find_changes
from revprop.report.aggregation import Row
from revprop.report.cell_tables import comparison_table, memory_table, published_table
from revprop.report.difference_figures import ablation_figure, comparison_figure
from revprop.report.figures import accuracy_curves
from revprop.report.grid import STUDY, Grid, split_by_study
from revprop.report.page import Section
from revprop.report.summary import summary_table
from revprop.report.tables import Table, post_training_table
from revprop.report.verdict import best_verdicts, cell_verdicts

ABLATION = "ablation"
FIGURE = "figure"  # studies for a figure of the paper have a section of their own


def post_training_sections(rows: Sequence[Row], draw: bool = True) -> list[Section]:
    """Make the sections of every post-training study among some rows.

    Args:
        rows: finished runs of any kind; others than post-training are left alone, and so are studies for one figure.
        draw: whether to draw figures.

    Returns:
        Per study the verdict, the accuracy of every cell, and the comparison with BP; per ablation one section.

    Example:
        >>> run = {"settings": {"kind": "post-training", "method": "bp", "seed": 0, "network": "n", "data": "d"},
        ...        "l_start": 0, "l_stop": 1, "parameters": 52, "baseline_accuracy": 0.5,
        ...        "history": [{"epoch": 1, "accuracy": 0.75}]}
        >>> [section.heading for section in post_training_sections([run])]
        ['Post-training n on d', 'Post-training n on d: every cell']
    """
    grids = _grids(rows)
    headings = [_heading(grid, grids) for grid in grids]
    sections = []
    for grid, heading in zip(grids, headings, strict=True):
        if _study(grid) == ABLATION:
            sections.append(_ablation(grid, heading, _references(grid, grids), draw))
        else:
            sections += _study_sections(grid, heading, draw)
    return sections


def accuracy_tables(grid: Grid) -> list[Table]:
    """Tabulate every cell of a study: what is trained by epochs in one table, what by sweeps in another.

    Args:
        grid: the runs of one network on one data set.

    Returns:
        One or two tables of :func:`post_training_table`.
    """
    tables = []
    by_epochs = [run for group in grid.groups_by_epochs for run in group.runs]
    if by_epochs:
        tables.append(post_training_table(by_epochs, grid.epochs))
    sweeping = [way for way in grid.ways if not way.by_epochs]
    if sweeping:
        runs = [run for way in sweeping for group in way.groups for run in group.runs]
        ends = sorted({1, *(way.last for way in sweeping)} - {0})
        tables.append(post_training_table(runs, ends, step="sweep"))
    return tables


def _study_sections(grid: Grid, heading: str, draw: bool) -> list[Section]:
    ways = grid.others if draw else []
    figures = [figure for way in ways if (figure := comparison_figure(grid, way)) is not None]
    verdicts = [text for way in grid.others if (text := cell_verdicts(grid, way))]
    sections = [
        Section(
            heading,
            "\n\n".join([*verdicts, *best_verdicts(grid)]),
            tables=(summary_table(grid),),
            figures=figures,
            reading="A dot is the mean difference over seeds that share a baseline, the bar its 95 % interval. Filled and in "
            "colour: a difference is shown, after correction for the number of cells; hollow and grey: none is, whichever side "
            "of zero it lies on. A bar that misses zero and is hollow did not survive the correction."
            if figures
            else "",
        )
    ]
    published = published_table(grid)
    curves = [accuracy_curves(grid.rows)] if draw and any(way.last for way in grid.ways) else []
    sections.append(
        Section(
            f"{heading}: every cell",
            "Each line trains the layers (lS, lR] of the same baseline, everything else frozen: BP by the classification loss "
            "alone, FR by classification and the distance to the wanted features of layer lR.",
            tables=[*accuracy_tables(grid), *([published] if published else [])],
            figures=curves,
            reading="The dashed line is the baseline, a band one standard deviation over seeds. Seeds differ in their baselines, "
            "so that the spread of a line is larger than that of the differences between two lines."
            if curves
            else "",
        )
    )
    tables = []
    for way in grid.others:
        epochs: Sequence[int | None] = grid.epochs[::-1] if way.by_epochs else [None]
        found = [comparison_table(grid, way, epoch) for epoch in epochs] + [memory_table(grid, way)]
        tables += [table for table in found if table is not None]
    if tables:
        sections.append(
            Section(
                f"{heading}: against BP, cell by cell",
                "The same seeds, hence the same baselines, on both sides: what all cells have in common drops out.",
                tables=tables,
                reading="Read the corrected p: with many cells, some uncorrected p falls below 0.05 by chance alone. With few "
                "seeds the Wilcoxon test cannot fall below 2 / 2^seeds, whatever the differences.",
            )
        )
    return sections


def _ablation(grid: Grid, heading: str, references: Grid | None, draw: bool) -> Section:
    figure = ablation_figure(find_changes(grid, references)) if draw else None
    return Section(
        heading,
        "One option of a method changed at a time, everything else at its default; the same seeds and baselines in every line.",
        tables=(ablation_table(grid, references),),
        figures=(figure,) if figure else (),
        reading="A line differs from the default of its method by what its name says. To the right of zero the change helps; "
        "hollow and grey dots show no difference."
        if figure
        else "",
    )


def _grids(rows: Sequence[Row]) -> list[Grid]:
    grids = [Grid.of(study) for study in split_by_study(rows)]
    return [grid for grid in grids if not _study(grid).startswith(FIGURE)]


def _study(grid: Grid) -> str:
    return str(grid.rows[0]["settings"].get("study") or "")


def _heading(grid: Grid, grids: Sequence[Grid]) -> str:
    """The network and data; where several studies share them, what sets this one apart."""
    settings = grid.rows[0]["settings"]
    study = "What each option does" if _study(grid) == ABLATION else "Post-training"
    rivals = [other.rows[0]["settings"] for other in grids if other.name == grid.name and _study(other) == _study(grid)]
    apart = [
        f"{key} {settings[key]}" if key != "reduced" else str(settings[key])
        for key in (key for key in STUDY if key not in ("network", "data", "study"))
        if len({str(rival.get(key) or "") for rival in rivals}) > 1 and settings.get(key)
    ]
    separator = ": " if _study(grid) == ABLATION else " "
    return f"{study}{separator}{grid.name}" + (f" ({', '.join(apart)})" if apart else "")


def _references(grid: Grid, grids: Sequence[Grid]) -> Grid | None:
    """The study whose BP an ablation without its own is held against: the same but for its purpose."""

    def same(one: Grid) -> tuple[str, ...]:
        settings = one.rows[0]["settings"]
        return tuple(str(settings.get(key) or "") for key in ("network", "data", "samples", "holdout", "classes"))

    return next((one for one in grids if _study(one) != ABLATION and one.bp and same(one) == same(grid)), None)
