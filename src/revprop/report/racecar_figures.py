"""Figures of racecar training: accuracies of both phases and regenerated inputs (Figures 5 and 6 of its paper)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from revprop.report.aggregation import Row
from revprop.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, figure_style, fix_layout

__all__ = ["accuracy_chart", "regenerated_inputs"]

# the paper's colours: yellow for plain training, green for racecar, blue for orthogonality
COLOURS = {"Std": ORANGE, "Ort": BLUE, "RR1": PURPLE, "RR": GREEN}


def accuracy_chart(
    found: Mapping[str, Sequence[float]], published: Mapping[str, Sequence[float]], title: str
) -> Figure:
    """Draw the accuracies of ways and phases, as Figure 6 does: each run a dot, their mean a line, the published mean a cross.

    Args:
        found: by the name of the training, its runs' accuracies in percent; at least one. published: the same of the paper, or
            none.
        title: what is shown.
    """
    with figure_style():
        figure = Figure(figsize=(max(4.0, 0.9 + 0.62 * len(found)), 3.4), layout="constrained")
        axes = figure.subplots()
        for place, (name, values) in enumerate(found.items()):
            colour = COLOURS[name.partition("_")[0]]
            axes.scatter([place] * len(values), values, s=16, color=colour, alpha=0.6, linewidths=0)
            axes.hlines(statistics.fmean(values), place - 0.3, place + 0.3, color=colour, linewidth=2)
            if published.get(name):
                axes.plot([place], [statistics.fmean(published[name])], marker="x", color=GREY, linestyle="none")
        axes.set_xticks(range(len(found)), list(found), rotation=45, ha="right")
        axes.set_ylabel("test accuracy (%)")
        axes.set_title(f"{title}; dots: runs, lines: means, crosses: published", fontsize=9, loc="left")
        axes.yaxis.grid(visible=True, color="#dddddd")
        fix_layout(figure)
    means = ", ".join(f"{name} {statistics.fmean(values):.2f} %" for name, values in found.items())
    figure.set_label(f"{title}: {means}.")
    return figure


def regenerated_inputs(rows: Mapping[str, Row], title: str) -> Figure:
    """Draw what the reverse pass of each network makes of some test inputs, as Figure 5 does; the inputs in the last line.

    Args:
        rows: by the name of the training, a row with "pictures": "original" and "regenerated", (n, c, h, w) from 0 to 255.
        title: what is shown.
    """
    lines = {name: np.asarray(row["pictures"]["regenerated"], dtype=np.uint8) for name, row in rows.items()}
    lines["input"] = np.asarray(next(iter(rows.values()))["pictures"]["original"], dtype=np.uint8)
    across = len(lines["input"])
    with figure_style():
        figure = Figure(figsize=(1.5 + 0.7 * across, 0.5 + 0.72 * len(lines)), layout="constrained")
        grid = figure.subplots(len(lines), across, squeeze=False)
        for line, (name, images) in zip(grid, lines.items(), strict=True):
            for axes, image in zip(line, images, strict=True):
                shown = image.transpose(1, 2, 0)
                axes.imshow(shown if shown.shape[2] == 3 else shown[:, :, 0], cmap="gray", vmin=0, vmax=255)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(visible=True, color="#bbbbbb", linewidth=0.5)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
        fix_layout(figure)
    errors = ", ".join(f"{name} {100 * row['error']:.0f} %" for name, row in rows.items() if row["error"] is not None)
    figure.set_label(
        f"{title}: what the reverse pass gives back of {across} test inputs; one that leaves its input's range is scaled into it. "
        f"Relative error over 1,000: {errors}."
    )
    return figure
