"""Differences and their intervals as dots and bars, against a line at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from revprop.report.ablation import Change
from revprop.report.aggregation import method_name
from revprop.report.cell_tables import published_difference
from revprop.report.comparison import Paired
from revprop.report.figures import GREY, METHOD_COLOURS, figure_style, fix_layout
from revprop.report.grid import Grid, Way
from revprop.report.numerals import MINUS, with_interval
from revprop.report.published import PUBLISHED_EPOCHS

INK = "#222222"


def difference_dots(
    panels: Mapping[str, Mapping[str, Paired]],
    first: tuple[str, str],
    second: tuple[str, str],
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Draw differences as dots with their 95 % intervals, one line per label, one panel per time of measuring.

    Args:
        panels: by the title of each panel, the differences by the label of their line; the labels of the first panel
            that has them give the order from the top.
        first: name and colour of what is better to the right of zero.
        second: name and colour of what is better to the left.
        published: the published differences in the same form, drawn as crosses.

    Returns:
        A figure. A dot is filled and coloured where a difference is shown (corrected p below 0.05), hollow and grey where
        none is.

    Raises:
        ValueError: no panel has a difference.

    Example:
        >>> difference_dots({"epoch 1": {"(0, 1)": Paired(5, 0.2, (0.1, 0.3))}}, ("FR", "red"), ("BP", "blue")).get_label()
        'FR minus BP, in points of a percent. epoch 1: (0, 1) +0.200 [+0.100, +0.300].'
    """
    panels = {title: {label: one for label, one in part.items() if one.seeds} for title, part in panels.items()}
    panels = {title: part for title, part in panels.items() if part}
    if not panels:
        raise ValueError("there is no difference to draw: two settings with a seed in common were expected")
    labels = list(dict.fromkeys(label for part in panels.values() for label in part))
    widest = 0.35 + 0.07 * max(len(label) for label in labels)  # inches
    with figure_style():
        size = (min(11.0, widest + max(2.2, 7.4 / len(panels)) * len(panels)), 1.35 + 0.23 * len(labels))
        figure = Figure(figsize=size, layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
        for axes, (title, part) in zip(all_axes, panels.items(), strict=True):
            axes.axvline(0.0, color=INK, linewidth=1.1, zorder=1)
            for label, paired in part.items():
                assert paired.mean is not None
                place = labels.index(label)
                colour = (first if paired.mean > 0 else second)[1] if paired.shown else GREY
                if paired.interval is not None:
                    width = 2.0 if paired.shown else 1.2
                    axes.plot(paired.interval, (place, place), color=colour, linewidth=width, zorder=2)
                face = colour if paired.shown else "white"
                axes.plot(paired.mean, place, "o", color=colour, markerfacecolor=face, markersize=5.5, zorder=4)
                theirs = (published or {}).get(title, {}).get(label)
                if theirs is not None:
                    axes.plot(theirs, place, "x", color=INK, markersize=4.5, markeredgewidth=0.9, zorder=3)
            axes.set_title(title, fontsize=9)
            axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
            axes.tick_params(axis="y", length=0)
        for place in range(0, len(labels), 2):  # a faint band on every other line leads the eye to its label
            for axes in all_axes:
                axes.axhspan(place - 0.5, place + 0.5, color="#F4F4F4", zorder=0, linewidth=0)
        all_axes[0].set_yticks(range(len(labels)), labels)
        all_axes[0].set_ylim(len(labels) - 0.5, -0.5)  # the first on top
        figure.supxlabel(
            f"\u2190 {second[0]} better      {first[0]} {MINUS} {second[0]} (points of a percent)      {first[0]} better \u2192",
            fontsize=9,
        )
        handles = [
            Line2D([], [], marker="o", color=colour, linewidth=2, label=f"{name} better (corrected p < 0.05)")
            for name, colour in (first, second)
        ]
        handles.append(
            Line2D([], [], marker="o", markerfacecolor="white", color=GREY, linewidth=1.2, label="no difference shown")
        )
        if published:
            handles.append(Line2D([], [], marker="x", color=INK, linewidth=0, markersize=4.5, label="published"))
        figure.legend(handles=handles, loc="outside upper left", ncols=2 if size[0] < 8.5 else 4, frameon=False)
        fix_layout(figure)
    parts = [
        f"{title}: " + "; ".join(f"{label} {with_interval(paired)}" for label, paired in part.items())
        for title, part in panels.items()
    ]
    figure.set_label(f"{first[0]} minus {second[0]}, in points of a percent. {'. '.join(parts)}.")
    return figure


def comparison_figure(grid: Grid, way: Way) -> Figure | None:
    """Draw how one way of training compares with BP in every cell, after each tabulated epoch.

    Args:
        grid: the runs of one network on one data set.
        way: the way to compare with the grid's BP.

    Returns:
        A figure of :func:`difference_dots`; the published differences beside ours, for FR. None where no cell has both.

    Example:
        >>> run = {"settings": {"method": "fr", "seed": 0}, "l_start": 0, "l_stop": 1, "parameters": 52,
        ...        "baseline_accuracy": 0.5, "history": [{"epoch": 1, "accuracy": 0.75}]}
        >>> grid = Grid.of([run])
        >>> comparison_figure(grid, grid.fr[0]) is None
        True
    """
    panels, published = {}, {}
    for epoch in grid.epochs if way.by_epochs else [None]:
        found = {str(layers): paired for layers, paired in grid.against_bp(way, epoch).items()}
        title = "at the end of each" if epoch is None else f"after {epoch} epoch{'s' if epoch > 1 else ''}"
        panels[title] = found
        if epoch in PUBLISHED_EPOCHS and way.method == "fr" and grid.published is not None:
            differences = {
                str(layers): published_difference(grid.published, layers, epoch) for layers in way.cells if epoch
            }
            published[title] = {label: value for label, value in differences.items() if value is not None}
    if not any(paired.seeds for part in panels.values() for paired in part.values()):
        return None
    name = method_name(way.method)
    colours = METHOD_COLOURS.get(way.method, METHOD_COLOURS["fr"]), METHOD_COLOURS["bp"]
    figure = difference_dots(panels, (name, colours[0]), ("BP", colours[1]), published or None)
    figure.set_label(f"Against BP by cell: {way.label}. {figure.get_label()}")
    return figure


def ablation_figure(changes: Sequence[Change]) -> Figure | None:
    """Draw what each change of an option does to the accuracy.

    Args:
        changes: those of :func:`find_changes`.

    Returns:
        A figure of :func:`difference_dots`: differences to the default of each method. None where there is none.

    Example:
        >>> ablation_figure([]) is None
        True
    """
    found = {f"{change.name} {change.group.layers}": change.to_default for change in changes if change.to_default.seeds}
    if not found:
        return None
    names = ("changed", METHOD_COLOURS["fr"]), ("default", METHOD_COLOURS["bp"])
    return difference_dots({"at the end of each run": found}, *names)
