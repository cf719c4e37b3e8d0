"""The drawings of Figures 4 to 6 of the paper on FR post-training; what they say is in :mod:`revprop.report.study_figures`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from revprop.report.aggregation import Row, RunGroup, three_digits
from revprop.report.comparison import Paired, compare
from revprop.report.figures import (
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    MOST_CHANNELS,
    ORANGE,
    PURPLE,
    VERMILLION,
    _channels_of,
    figure_style,
    fix_layout,
)
from revprop.report.grid import Grid, Way
from revprop.report.numerals import signed

__all__ = [
    "EMBEDDINGS",
    "Stages",
    "by_stage",
    "embeddings",
    "mean_and_reach",
    "option",
    "stage_boxes",
    "stage_maps",
    "way_name",
]

GAP = 14  # the blank line between two channels is at most this part of a channel
EPOCH_COLOURS = (GREEN, BLUE, VERMILLION, PURPLE)
EMBEDDINGS = {
    "nearest": ("nearest (MSE)", BLUE),
    "maximum": ("maximum (L1)", ORANGE),
    "one_hot": ("one-hot (MSE)", GREEN),
}


def stage_maps(rows: Sequence[Row]) -> Figure:
    """Draw where the features of one network depart from the wanted ones, stage by stage, as Fig. 4 does.

    Args:
        rows: of kind "figure4", of one network (one seed) and one way of reconstructing.

    Returns:
        A figure with one line per stage and one column per layer, each layer's channels side by side; the stages of a
        layer share one colour scale, so that darker means nearer.

    Raises:
        ValueError: there is no row; or two rows are of the same stage.

    Example:
        >>> row = {"settings": {"stage": 0, "way": {"strategy": "global", "rules": "nearest"}}, "accuracy": 0.1, "step": 0,
        ...        "layers": [{"layer": "fc1", "maps": [0.5, 0.25], "discrepancy": 0.375}]}
        >>> stage_maps([row]).get_label()
        'Mean |recorded - wanted| per feature at test accuracies of 10.00 %, global: fc1 0.375.'
    """
    stages = sorted(rows, key=lambda row: row["settings"]["stage"])
    if not stages or len({row["settings"]["stage"] for row in stages}) < len(stages):
        raise ValueError(f"expected rows of one network and one way, one per stage; given {len(stages)} rows")
    layers = [layer["layer"] for layer in stages[0]["layers"]]
    maps = [[_channels_of(layer["layer"], layer["maps"]) for layer in row["layers"]] for row in stages]
    with figure_style():
        shapes = [_mosaic(channels).shape for channels in maps[0]]
        widths = [
            1.0 if high == 1 else min(max(wide / high, 0.6), 2.5) for high, wide in shapes
        ]  # a strip fills its place
        size = (1.3 + 1.75 * sum(widths), 0.9 + 1.7 * len(stages))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(stages), len(layers), squeeze=False, width_ratios=widths)
        for column, layer in enumerate(layers):
            norm = Normalize(0.0, max(float(line[column].max()) for line in maps) or 1.0)
            for axes, line in zip(grid[:, column], maps, strict=True):
                image = axes.imshow(
                    _mosaic(line[column]), cmap="viridis", norm=norm, aspect="auto", interpolation="nearest"
                )
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            count, height, width = maps[0][column].shape
            extent = f"{width} units" if (count, height) == (1, 1) else f"{count} \u00d7 {height} \u00d7 {width}"
            grid[0, column].set_title(f"{layer}\n{extent}", fontsize=9)
            bar = figure.colorbar(image, ax=grid[:, column], location="bottom", shrink=0.9, ticks=[0.0, norm.vmax])
            bar.ax.set_xticklabels(["0", three_digits(norm.vmax or 1.0)], fontsize=7)
            bar.outline.set_visible(False)
        for axes, row in zip(grid[:, 0], stages, strict=True):
            axes.set_ylabel(f"{100 * row['accuracy']:.2f} % right\nstep {row['step']:,}", fontsize=9)
        units = "mean |recorded \u2212 wanted| per feature, in the units of the layer; one scale per layer"
        figure.suptitle(f"{way_name(stages[0])}: {units}", fontsize=9, x=0.01, ha="left")
        fix_layout(figure)
    means = [", ".join(three_digits(row["layers"][i]["discrepancy"]) for row in stages) for i in range(len(layers))]
    accuracies = ", ".join(f"{100 * row['accuracy']:.2f} %" for row in stages)
    found = "; ".join(f"{layer} {text}" for layer, text in zip(layers, means, strict=True))
    figure.set_label(
        f"Mean |recorded - wanted| per feature at test accuracies of {accuracies}, {way_name(stages[0])}: {found}."
    )
    return figure


def _mosaic(channels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Channels side by side in a nearly square arrangement, a blank line between them; a vector stays one line."""
    if channels.shape[:2] == (1, 1):
        return channels[0]
    fine = -(
        -GAP // channels.shape[2]
    )  # so many cells for each position: the blank line is narrow beside small maps, too
    shown = channels[:MOST_CHANNELS].repeat(fine, axis=1).repeat(fine, axis=2)
    count, height, width = shown.shape
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    mosaic = np.full((down * (height + 1) - 1, across * (width + 1) - 1), np.nan)
    for number, channel in enumerate(shown):
        y, x = (number // across) * (height + 1), (number % across) * (width + 1)
        mosaic[y : y + height, x : x + width] = channel
    return mosaic


def way_name(row: Row) -> str:
    """The way of reconstructing that a row of Figure 4 is of, to be read."""
    way = row["settings"]["way"]
    return "global" if way["strategy"] == "global" else f"{way['strategy']}, {way['rules']} rules"


def embeddings(grids: Sequence[Grid]) -> Figure:
    """Draw what each embedding of the label makes of the last layer, as Fig. 5 does.

    Args:
        grids: one per data set; of each, BP and FR by embedding and alpha, in one cell.

    Returns:
        A figure with one panel per data set: mean test accuracy after the last epoch by alpha, with the 95 %
        interval of its gain over the baseline; lines for BP, in a band of its interval, and for the mean baseline.

    Raises:
        ValueError: there is no grid.
    """
    if not grids:
        raise ValueError("there is no run of the last layer to draw")
    described = []
    with figure_style():
        figure = Figure(figsize=(0.9 + 2.9 * len(grids), 3.5), layout="constrained")
        panels = figure.subplots(1, len(grids), squeeze=False)[0]
        for axes, grid in zip(panels, grids, strict=True):
            alphas = sorted({float(option(way, "alpha")) for way in grid.fr})
            for way in grid.fr:
                name = str(option(way, "embedding"))
                label, colour = EMBEDDINGS.get(name, (name, PURPLE))
                place = alphas.index(float(option(way, "alpha"))) + 0.22 * (list(EMBEDDINGS).index(name) - 1)
                mean, reach = mean_and_reach(way)
                marker = MARKERS[list(EMBEDDINGS).index(name)]
                axes.errorbar(
                    place, mean, yerr=reach, color=colour, marker=marker, markersize=5, capsize=3, linewidth=1.3
                )
                described.append(f"{grid.name}, {label}, alpha {option(way, 'alpha')}: {mean:.2f} %")
            if grid.bp is not None:
                mean, reach = mean_and_reach(grid.bp)
                axes.axhline(mean, color=GREY, linewidth=1.2)
                axes.axhspan(mean - reach, mean + reach, color=GREY, alpha=0.15, linewidth=0)
                described.append(f"{grid.name}, BP: {mean:.2f} %")
            baseline = 100 * statistics.fmean(row["baseline_accuracy"] for row in grid.rows)
            axes.axhline(baseline, color="black", linestyle="--", linewidth=1)
            axes.set_title(grid.name, fontsize=9)
            axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
            axes.set_xlim(-0.5, len(alphas) - 0.5)
            axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        figure.supxlabel("alpha, the share of the reconstruction loss", fontsize=9)
        figure.supylabel("test accuracy (%)", fontsize=9)
        handles = [
            Line2D([], [], color=colour, marker=marker, label=label, linewidth=1.3, markersize=5)
            for (label, colour), marker in zip(EMBEDDINGS.values(), MARKERS, strict=False)
        ]
        handles.append(Line2D([], [], color=GREY, label="BP"))
        handles.append(Line2D([], [], color="black", linestyle="--", label="baseline"))
        figure.legend(handles=handles, loc="outside upper left", ncols=5 if len(grids) > 1 else 2, frameon=False)
        fix_layout(figure)
    figure.set_label(f"Test accuracy after training the last layer. {'; '.join(described)}.")
    return figure


def option(way: Way, name: str) -> Any:
    """The value of one setting, which all runs of the way share."""
    return next(iter(way.cells.values())).runs[0]["settings"].get(name)


def mean_and_reach(way: Way) -> tuple[float, float]:
    """Mean test accuracy in percent after the last epoch, and to either side the 95 % interval of the gain.

    The interval is that of the difference from each seed's own baseline: how much the baselines differ among themselves
    says nothing about the training. 0 for one seed.
    """
    group = way.groups[0]
    accuracies = group.by_seed(way.last)
    return statistics.fmean(accuracies.values()), _reach(compare(accuracies, group.by_seed(None)))


def _reach(paired: Paired) -> float:
    return 0.0 if paired.interval is None or paired.mean is None else paired.interval[1] - paired.mean


Stages = Mapping[int, RunGroup]


def by_stage(rows: Sequence[Row]) -> Stages:
    """The runs of one way of post-training, of kind "figure6", by stage."""
    stages: dict[int, list[Row]] = {}
    for row in rows:
        stages.setdefault(row["settings"]["stage"], []).append(row)
    return {
        stage: RunGroup(
            runs[0]["settings"]["method"], runs[0]["l_start"], runs[0]["l_stop"], f"stage {stage}", tuple(runs)
        )
        for stage, runs in sorted(stages.items())
    }


def stage_boxes(bp: Stages, fr: Stages, epochs: Sequence[int]) -> Figure:
    """Draw what BP and FR make of one network at every stage of its training, as Fig. 6 does.

    Args:
        bp, fr: the runs by stage, in epochs of the network's own training. epochs: of FR, to draw.

    Returns:
        A figure of two panels. Above: boxes over the seeds for FR after each of the epochs, a line for the mean of BP after
        its last, a line for the network before. Below: FR minus BP after its last epoch, mean and 95 % interval over the
        seeds that both have.
    """
    stages = sorted(fr)
    places = {stage: place for place, stage in enumerate(stages)}
    width = 0.8 / len(epochs)
    ends = []
    with figure_style():
        figure = Figure(figsize=(max(5.5, 1.6 + 0.33 * len(stages)), 5.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        before = [100 * statistics.fmean(run["baseline_accuracy"] for run in fr[stage].runs) for stage in stages]
        above.plot(range(len(stages)), before, color="black", linewidth=1.3)
        compared = [stage for stage in stages if stage in bp and bp[stage].epochs()]
        means = [statistics.fmean(bp[stage].accuracies(bp[stage].epochs()[-1])) for stage in compared]
        above.plot([places[s] for s in compared], means, color=GREY, linewidth=2.5, alpha=0.6)
        for number, (epoch, colour) in enumerate(zip(epochs, EPOCH_COLOURS, strict=False)):
            shift = (number - (len(epochs) - 1) / 2) * width
            _draw_boxes(
                above, [places[s] + shift for s in stages], [fr[s].accuracies(epoch) for s in stages], width, colour
            )
            pairs = [compare(fr[s].by_seed(epoch), bp[s].by_seed(bp[s].epochs()[-1])) for s in compared]
            centres = [paired.mean or 0.0 for paired in pairs]
            at = [places[s] + shift for s in compared]
            marker = MARKERS[number]
            reach = [_reach(paired) for paired in pairs]
            below.errorbar(at, centres, yerr=reach, fmt=marker, color=colour, markersize=3.5, linewidth=1, capsize=1.5)
            ends += [f"FR after {epoch}: {signed(statistics.fmean(centres), 2)} on average"] if centres else []
        below.axhline(0.0, color=GREY, linewidth=1)
        above.set_ylabel("test accuracy (%)")
        below.set_ylabel("FR \u2212 BP (points)")
        below.set_xlabel("stage: epochs of the network's own training")
        every = max(1, len(stages) // 15)
        below.set_xticks(range(0, len(stages), every), [str(stage) for stage in stages[::every]])
        for axes in (above, below):
            axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        handles: list[Line2D | Patch] = [
            Patch(color=colour, label=f"FR, {epoch} epoch{'s' if epoch > 1 else ''}")
            for epoch, colour in zip(epochs, EPOCH_COLOURS, strict=False)
        ]
        last = max((bp[stage].epochs()[-1] for stage in compared), default=0)
        handles.append(Line2D([], [], color=GREY, linewidth=2.5, alpha=0.6, label=f"BP, {last} epochs"))
        handles.append(Line2D([], [], color="black", linewidth=1.3, label="before"))
        figure.legend(
            handles=handles, loc="outside upper left", ncols=5 if figure.get_figwidth() > 7 else 3, frameon=False
        )
        fix_layout(figure)
    figure.set_label(
        f"Test accuracy of one network post-trained at {len(stages)} stages of its training, from {before[0]:.2f} % at stage "
        f"{stages[0]} to {before[-1]:.2f} % at stage {stages[-1]}; FR minus BP in points: {'; '.join(ends)}."
    )
    return figure


def _draw_boxes(
    axes: Axes, places: Sequence[float], values: Sequence[Sequence[float]], width: float, colour: str
) -> None:
    line = {"color": colour, "linewidth": 1}
    axes.boxplot(
        values,
        positions=places,
        widths=0.85 * width,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": colour, "edgecolor": colour, "alpha": 0.55, "linewidth": 1},
        medianprops={"color": "black", "linewidth": 1},
        whiskerprops=line,
        capprops=line,
        flierprops={"marker": ".", "markersize": 2, "markeredgecolor": colour},
    )
