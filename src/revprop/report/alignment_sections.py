"""Feature alignment's experiments as sections of a page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from revprop.report.aggregation import Row, three_digits
from revprop.report.figures import BLUE, GREEN, GREY, VERMILLION, figure_style, fix_layout
from revprop.report.page import Section
from revprop.report.tables import Cell, Table

__all__ = ["alignment_sections", "sine_panels"]


def alignment_sections(rows: Sequence[Row], draw: bool = True) -> list[Section]:
    """Make a section of each of feature alignment's experiments that the rows allow.

    Args:
        rows: finished runs of any kind; others are left alone. draw: whether to draw the figures.

    >>> alignment_sections([])
    []
    """
    toys = [row for row in rows if row["settings"].get("kind") == "alignment-figure2"]
    studies = {(row["settings"]["hidden"], row["settings"]["epochs"]): None for row in toys}
    return [
        _figure2([r for r in toys if (r["settings"]["hidden"], r["settings"]["epochs"]) == s], draw) for s in studies
    ]


def _figure2(rows: Sequence[Row], draw: bool) -> Section:
    settings = rows[0]["settings"]
    ways = list(dict.fromkeys(row["settings"]["way"] for row in rows))
    lines: list[list[Cell]] = []
    for way in ways:
        same = [row for row in rows if row["settings"]["way"] == way]
        lines.append([way, len(same), *(_spread(same, name) for name in ("fit", "error", "error_many", "value"))])
    first = min(row["settings"]["seed"] for row in rows)
    return Section(
        "Figure 2: sin(3 pi x), and x asked back",
        f"Networks of two hidden layers of {settings['hidden']:,} neurons learn y = sin(3 pi x). From their outputs alone, x is "
        f"asked back by one step from zero down their own gradient. {_sentence(settings['reduced'])}",
        tables=(
            Table(
                "Mean absolute errors",
                ["network", "runs", "f against y", "x, one step", "x, 200 steps of 0.01", "sin of what is recovered"],
                lines,
                "Mean and standard deviation over the runs. A guess of x = 0 has an error of 0.5.",
            ),
        ),
        figures=(sine_panels([row for row in rows if row["settings"]["seed"] == first]),) if draw else (),
        reading="The paper's claim is that alignment with a latent neuron recovers x over the whole interval. Without it x cannot "
        "be recovered by any method: up to six values of x have the same y. One step from zero is an affine map of the outputs, "
        "so with one output it is a multiple of y.",
    )


def _spread(rows: Sequence[Row], name: str) -> str:
    values = [row[name] for row in rows]
    spread = f" \u00b1 {three_digits(statistics.stdev(values))}" if len(values) > 1 else ""
    return three_digits(statistics.fmean(values)) + spread


def _sentence(reduced: str) -> str:
    return f"Reduced: {reduced}." if reduced else ""


def sine_panels(rows: Sequence[Row]) -> Figure:
    """Draw what networks recover, as Figure 2 does: a panel each, y = sin(3 pi x) and the points (x recovered, f).

    Args:
        rows: of kind "alignment-figure2", one per panel.
    """
    with figure_style():
        figure = Figure(figsize=(0.6 + 2.9 * len(rows), 3.1), layout="constrained")
        grid = figure.subplots(1, len(rows), squeeze=False, sharey=True)
        for axes, row in zip(grid.flat, rows, strict=True):
            x = np.array(row["x"])
            axes.plot(x, np.sin(3 * math.pi * x), color=GREY, linewidth=1, label="y = sin(3\u03c0x)")
            axes.plot(x, row["f"], color=BLUE, linewidth=1, linestyle=(0, (4, 2)), label="f(x)")
            recovered = np.array(row["recovered"])
            axes.scatter(row["recovered_many"], row["f"], s=3, color=GREEN, alpha=0.5, label="by 200 small steps")
            axes.scatter(recovered, row["f"], s=5, color=VERMILLION, label="(x recovered by one step, f)")
            axes.set_title(row["settings"]["way"], fontsize=9)
            axes.set_xlim(-1.6, 1.6)
            axes.set_xlabel("x")
        grid.flat[0].set_ylabel("y")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        fix_layout(figure)
    said = "; ".join(f"{row['settings']['way']} {three_digits(row['error'])}" for row in rows)
    figure.set_label(f"Figure 2, x recovered from outputs by one step. Mean absolute error of x: {said}.")
    return figure
