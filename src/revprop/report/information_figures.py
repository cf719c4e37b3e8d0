"""Information planes as figures: what the layers of networks tell of input and label while they are trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from revprop.report.aggregation import Row
from revprop.report.figures import GREY, figure_style, fix_layout

EPOCHS = "viridis"  # dark at first, yellow at last, as in the paper; told apart with any colour vision
LAYER_MARKERS = "os^DvPX<>*phd"
LOGARITHMIC = 100  # epochs are spread by their logarithm where the last one is so many: most happens early
ACROSS = 4


def information_planes(planes: Mapping[str, Sequence[Row]], label_information: float | None = None) -> Figure:
    """Draw information planes side by side (racecar training, Fig. 2-4): I(X; L) to the right, I(L; Y) upwards, in bits.

    Args:
        planes: by model, :meth:`revprop.InformationPlane.rows`: "layer", "epoch", "input_bits", "label_bits"; of several runs
            one after the other.
        label_information: I(X; Y), drawn as the line that no layer gets above.

    Returns:
        A figure of one panel per model on the same axes: a point per layer and epoch, its shape the layer, its colour the
        epoch; those of the last epoch are larger. A layer's points are joined where there is one per epoch.

    Raises:
        ValueError: there is no point.

    Example:
        >>> rows = [{"layer": "fc1", "epoch": e, "input_bits": 12.0 - e, "label_bits": 0.5 * e} for e in range(3)]
        >>> information_planes({"Std": rows}).get_label()
        'Information planes, in bits. Std: fc1 from I(X; L) 12.00, I(L; Y) 0.00 at epoch 0 to 10.00, 1.00 at epoch 2.'
    """
    rows = [row for plane in planes.values() for row in plane]
    if not rows:
        raise ValueError("there is no point to draw: give the rows of at least one information plane")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    markers = dict(zip(layers, itertools.cycle(LAYER_MARKERS), strict=False))
    colours, shift = _colours([row["epoch"] for row in rows])
    columns = 3 if len(planes) in (5, 6) else min(len(planes), ACROSS)
    lines = math.ceil(len(planes) / columns)
    with figure_style():
        figure = Figure(figsize=(max(4.6, 1.5 + 2.35 * columns), 1.15 + 2.3 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (model, plane) in zip(grid.flat, planes.items(), strict=False):
            if label_information is not None:
                axes.axhline(label_information, color=GREY, linestyle="--", linewidth=0.8, zorder=1)
            for layer, left in zip(layers, range(len(layers), 0, -1), strict=True):
                own = [row for row in plane if row["layer"] == layer]
                _draw(axes, own, markers[layer], 28 + 9 * left, colours, shift)  # what lies behind is larger
            axes.set_title(model, fontsize=9)
            axes.grid(color="#E5E5E5", linewidth=0.6)
        for axes in grid.flat[len(planes) :]:
            axes.set_axis_off()
        for axes in grid.flat[max(0, len(planes) - columns) : len(planes)]:  # the lowest panel of every column
            axes.tick_params(labelbottom=True)
        most = max(row["input_bits"] for row in rows), max(row["label_bits"] for row in rows)
        grid.flat[0].set(xlim=(-0.04 * (most[0] or 1), 1.04 * (most[0] or 1)))
        top = max(most[1], label_information or 0.0) or 1.0
        grid.flat[0].set(ylim=(-0.05 * top, 1.07 * top))
        figure.supxlabel("I(X; L), bits", fontsize=9)
        figure.supylabel("I(L; Y), bits", fontsize=9)
        handles = [
            Line2D([], [], color=GREY, linestyle="", marker=markers[layer], markersize=5, label=layer)
            for layer in layers
        ]
        if label_information is not None:
            handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=0.8, label="I(X; Y)"))
        widest = 0.45 + 0.075 * max(len(str(handle.get_label())) for handle in handles)  # inches, at nine points
        entries = max(1, int((figure.get_figwidth() - 0.4) / widest))
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=min(entries, len(handles)),
            frameon=False,
            handletextpad=0.2,
        )
        _bar(figure, list(grid.flat), colours, shift)
        fix_layout(figure)
    figure.set_label(f"Information planes, in bits. {'; '.join(map(_said, planes, planes.values()))}.")
    return figure


def _colours(epochs: Sequence[int]) -> tuple[Normalize, int]:
    """The scale of epochs, and what is added to them in front of a logarithm."""
    least, most = min(epochs), max(epochs)
    if most - least < LOGARITHMIC:
        return Normalize(least, max(most, least + 1)), 0
    return LogNorm(1 if least < 1 else least, most + (least < 1)), int(least < 1)


def _draw(axes: Axes, rows: Sequence[Row], marker: str, size_of_last: float, colours: Normalize, shift: int) -> None:
    rows = sorted(rows, key=lambda row: row["epoch"])
    epochs = [row["epoch"] for row in rows]
    x, y = [row["input_bits"] for row in rows], [row["label_bits"] for row in rows]
    if not rows:
        return
    if len(set(epochs)) == len(epochs):
        axes.plot(x, y, color="#BBBBBB", linewidth=0.6, zorder=2)
    last = [epoch == epochs[-1] for epoch in epochs]
    for chosen, size, edge, order in ((False, 13.0, "none", 3), (True, size_of_last, "#222222", 4)):
        kept = [i for i, is_last in enumerate(last) if is_last == chosen]
        axes.scatter(
            [x[i] for i in kept],
            [y[i] for i in kept],
            c=[epochs[i] + shift for i in kept],
            norm=colours,
            cmap=EPOCHS,
            marker=marker,
            s=size,
            linewidths=0.7,
            edgecolors=edge,
            zorder=order,
            clip_on=False,
        )


def _bar(figure: Figure, beside: list[Axes], colours: Normalize, shift: int) -> None:
    drawn = ScalarMappable(colours, matplotlib.colormaps[EPOCHS])
    bar = figure.colorbar(drawn, ax=beside, aspect=28, pad=0.02, shrink=0.9)
    if isinstance(colours, LogNorm):
        bar.locator = LogLocator(numticks=6)
        bar.minorlocator = NullLocator()
        bar.formatter = matplotlib.ticker.FuncFormatter(
            lambda value, _: f"{round(value) - shift if value < 2 else value:,.0f}"
        )
    else:
        bar.locator = MaxNLocator(5, integer=True)
    bar.update_ticks()
    bar.set_label("epoch")
    bar.outline.set_visible(False)


def _said(model: str, rows: Sequence[Row]) -> str:
    parts = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if row["layer"] == layer]
        (first, x, y), (last, u, v) = (
            (
                epoch,
                *(
                    sum(r[name] for r in own if r["epoch"] == epoch) / sum(r["epoch"] == epoch for r in own)
                    for name in ("input_bits", "label_bits")
                ),
            )
            for epoch in (min(row["epoch"] for row in own), max(row["epoch"] for row in own))
        )
        parts.append(
            f"{layer} from I(X; L) {x:.2f}, I(L; Y) {y:.2f} at epoch {first} to {u:.2f}, {v:.2f} at epoch {last}"
        )
    return f"{model}: {', '.join(parts)}"
