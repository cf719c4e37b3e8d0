"""What feature alignment's experiments draw: the toy, sheets of images, a latent plane, errors on several data sets."""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.figure import Figure

from revprop.report.aggregation import Row, three_digits
from revprop.report.figures import BLUE, GREEN, GREY, VERMILLION, figure_style, fix_layout

__all__ = ["NAMES", "errors_by_data", "image_sheets", "latent_plane", "sine_panels"]

NAMES = {
    "ae": "AE",
    "vae": "VAE",
    "gan": "GAN",
    "fa": "FA",
    "vfa": "VFA",
    "vfa-gan": "VFA-GAN",
    "local": "local FA",
    "vfa, affine": "VFA, written out",
}


SAID = {
    "reconstruction": " (below the images they are of)",
    "classes": " with latent variables at zero, their one-hot target 1, 2, 3 and 4 high line by line",
}
"""What the caption of a sheet adds."""


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


def image_sheets(rows: Sequence[Row], what: str) -> Figure:
    """Draw the sheets of images of several models: "reconstruction", "samples", "interpolation" or "classes".

    Args:
        rows: of kind "alignment-images"; those without such a sheet are left out.

    Raises:
        ValueError: none has one.
    """
    shown = [row for row in rows if what in row["grids"]]
    if not shown:
        raise ValueError(f"no row has a sheet of {what}")
    sheets: list[Any] = [
        matplotlib.image.imread(io.BytesIO(base64.b64decode(row["grids"][what])), "png") for row in shown
    ]
    height = 2.6 * sheets[0].shape[0] / sheets[0].shape[1] + 0.35
    across = min(3, len(shown))
    down = math.ceil(len(shown) / across)
    with figure_style():
        figure = Figure(figsize=(2.8 * across, 0.1 + height * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, row, sheet in zip(grid.flat, shown, sheets, strict=False):
            axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(NAMES[row["settings"]["model"]], fontsize=9)
        fix_layout(figure)
    above = SAID.get(what, "")
    names = ", ".join(NAMES[row["settings"]["model"]] for row in shown)
    figure.set_label(f"{what.capitalize()}{above}: {names}.")
    return figure


def latent_plane(row: Row) -> Figure:
    """Draw the codes of test images in a plane, each in its class's colour (Figure 6a).

    Args:
        row: of kind "alignment-images", with "plane".
    """
    codes, labels = np.array(row["plane"]["codes"]), np.array(row["plane"]["labels"])
    classes = sorted(set(labels.tolist()))
    colours = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20"]
    with figure_style():
        figure = Figure(figsize=(4.6, 3.6), layout="constrained")
        axes = figure.subplots()
        for place, label in enumerate(classes):
            of_class = codes[labels == label]
            axes.scatter(of_class[:, 0], of_class[:, 1], s=6, color=colours(place % colours.N), label=str(label))
        axes.set_xlabel("latent variable 1")
        axes.set_ylabel("latent variable 2")
        figure.legend(loc="outside right center", fontsize=8, frameon=False, markerscale=2)
        fix_layout(figure)
    figure.set_label(f"The codes of {len(codes):,} test images in two latent variables, by class.")
    return figure


def errors_by_data(groups: Mapping[str, Mapping[str, Sequence[Row]]]) -> Figure:
    """Draw the mean error of reconstructions by data set and model, on a logarithmic scale, as Figure 15 does.

    Args:
        groups: rows of kind "alignment-images" by data set and model.
    """
    models = list(dict.fromkeys(name for by_model in groups.values() for name in by_model))
    colours = matplotlib.colormaps["tab10"]
    wide = 0.8 / len(models)
    with figure_style():
        figure = Figure(figsize=(1.2 + 1.6 * len(groups), 3.1), layout="constrained")
        axes = figure.subplots()
        for index, model in enumerate(models):
            there = [(i, by[model]) for i, by in enumerate(groups.values()) if model in by]
            heights = [math.sqrt(statistics.fmean(row["error"] for row in same)) for _, same in there]
            places = [i + (index - (len(models) - 1) / 2) * wide for i, _ in there]
            axes.bar(places, heights, 0.9 * wide, color=colours(index % colours.N), label=NAMES[model])
        axes.set_yscale("log")
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_ylabel("|x - reconstruction|")
        figure.legend(loc="outside lower center", ncols=len(models), fontsize=8, frameon=False)
        fix_layout(figure)
    figure.set_label(
        "Figure 15, the error of reconstructions by data set and model: roots of the mean squared errors above."
    )
    return figure
