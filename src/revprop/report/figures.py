"""Finished runs and reconstructions as figures.

Every figure carries, as its label (`figure.get_label()`), one sentence that says what it shows, for readers who cannot
see it; :func:`figure_to_svg` and the page take it from there. Colours are those of Okabe and Ito, and viridis: told
apart by readers with any colour vision. No figure touches pyplot's state.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from revprop.report.aggregation import Row, RunGroup, group_runs, summarise_diagnosis, three_digits

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#595959"
METHOD_COLOURS = {"bp": BLUE, "fr": VERMILLION, "solve": GREEN}
OTHER_COLOURS = (PURPLE, ORANGE)
MARKERS = "os^Dv"
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), "-.")

MOST_CHANNELS = 16
CHANNELS_A_LINE = 8


def discrepancy_maps(maps: Mapping[str, npt.ArrayLike], title: str) -> Figure:
    """Draw where the recorded features depart from the wanted ones, |recorded - wanted|, as Fig. 4 of the paper does.

    Args:
        maps: per layer, in the order to show them, the differences of one sample or their mean over samples: features
            in maps (c, h, w), one map (h, w), or a vector (n,). Drawn by magnitude.
        title: what is shown.

    Returns:
        A figure with one row per layer: its channels as images, at most 16 of them, on one colour scale per layer; a
        vector as a strip.

    Raises:
        ValueError: there is no layer; a layer has another number of dimensions, no value, or one that is not finite.

    Example:
        >>> discrepancy_maps({"conv1": np.ones((20, 6, 6)), "fc1": np.zeros(10)}, "Digit 3").get_label()
        'Digit 3: |recorded - wanted| by channel and position, for conv1 (16 of 20 channels), fc1 (10 units).'
    """
    if not maps:
        raise ValueError("there is no layer to draw: give at least one map")
    layers = {layer: _channels_of(layer, values) for layer, values in maps.items()}

    # Placed by hand, in inches: cells of one size in every row, which no automatic layout gives.
    left, cell, gap, bar, top = 1.75, 0.82, 0.07, 0.13, 0.75
    row_gap, number_height, strip = 0.3, 0.17, 0.3
    inner = CHANNELS_A_LINE * cell + (CHANNELS_A_LINE - 1) * gap
    width = left + inner + 0.15 + bar + 0.7
    cell_heights, row_heights = [], []
    for channels in layers.values():
        ratio = channels.shape[1] / channels.shape[2]
        lines = math.ceil(min(len(channels), MOST_CHANNELS) / CHANNELS_A_LINE)
        is_strip = channels.shape[:2] == (1, 1)
        cell_heights.append(strip if is_strip else cell * min(max(ratio, 0.25), 2.5))
        row_heights.append(strip if is_strip else lines * (cell_heights[-1] + number_height))
    height = top + sum(row_heights) + row_gap * len(layers) + 0.15

    with figure_style():
        figure = Figure(figsize=(width, height))
        figure.text(0.15 / width, 1 - 0.16 / height, title, va="top", fontsize=11, weight="bold")
        explained = (
            "|recorded \u2212 wanted|, in the units of each layer's features; every layer has its own colour scale"
        )
        figure.text(0.15 / width, 1 - 0.38 / height, explained, va="top", fontsize=8, color=GREY)
        described = []
        y = height - top
        for (layer, channels), cell_height, row_height in zip(layers.items(), cell_heights, row_heights, strict=True):
            is_strip = channels.shape[:2] == (1, 1)
            norm = Normalize(0.0, float(channels.max()) or 1.0)
            image: AxesImage | None = None
            shown = channels[:MOST_CHANNELS]
            for number, channel in enumerate(shown):
                line, column = divmod(number, CHANNELS_A_LINE)
                x = left + column * (cell + gap)
                bottom = y - (line + 1) * cell_height - (0 if is_strip else (line + 1) * number_height)
                box = (x / width, bottom / height, (inner if is_strip else cell) / width, cell_height / height)
                axes = figure.add_axes(box)
                image = axes.imshow(channel, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if not is_strip:
                    axes.set_title(str(number), fontsize=7, pad=1.5, color=GREY)
            count, size = _size_of(channels)
            figure.text(0.15 / width, (y - 0.02) / height, layer, va="top", fontsize=9, weight="bold")
            figure.text(0.15 / width, (y - 0.2) / height, f"{count}{size}", va="top", fontsize=7.5, color=GREY)
            bar_box = ((left + inner + 0.15) / width, (y - row_height) / height, bar / width, row_height / height)
            if not is_strip:  # as high as the images, without the number above the first line
                bar_box = (*bar_box[:3], (row_height - number_height) / height)
            assert image is not None
            scale = figure.colorbar(image, cax=figure.add_axes(bar_box), ticks=[0.0, norm.vmax])
            scale.ax.set_yticklabels(["0", f"{norm.vmax:.2g}"], fontsize=7)
            scale.outline.set_visible(False)
            y -= row_height + row_gap
            described.append(f"{layer} ({count})")
    figure.set_label(f"{title}: |recorded - wanted| by channel and position, for {', '.join(described)}.")
    return figure


def deviation_bars(diagnosis: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the mean relative deviation |wanted - recorded| / |recorded| per layer.

    Args:
        diagnosis: per layer `layer`, `deviation`, `reached` and optionally `active`, as `summarise_diagnosis` takes
            them.

    Returns:
        A figure with one group of bars per layer, in the order given from the top: all samples and, where `active` is
        given, the samples that the network gets wrong.

    Raises:
        ValueError: as `summarise_diagnosis` does.

    Example:
        >>> deviation_bars([{"layer": "fc1", "deviation": [0.5, 0.25], "active": [True, False]}]).get_label()
        'Mean relative deviation per layer: fc1 0.375 (0.500 over wrong samples).'
    """
    summaries = summarise_diagnosis(diagnosis)
    series = [("all samples", BLUE, [summary.deviation for summary in summaries])]
    if any(summary.deviation_wrong is not None for summary in summaries):
        wrong = [math.nan if summary.deviation_wrong is None else summary.deviation_wrong for summary in summaries]
        series.insert(0, ("samples the network gets wrong", VERMILLION, wrong))
    thickness = 0.8 / len(series)
    with figure_style():
        figure = Figure(figsize=(7.2, 1.1 + 0.27 * (len(series) + 0.6) * len(summaries)), layout="constrained")
        axes = figure.subplots()
        for number, (name, colour, values) in enumerate(series):
            places = [place + (number - (len(series) - 1) / 2) * thickness for place in range(len(summaries))]
            lengths = [value if math.isfinite(value) else 0.0 for value in values]
            bars = axes.barh(places, lengths, height=thickness * 0.92, color=colour, label=name)
            texts = ["\u2013" if math.isnan(value) else three_digits(value) for value in values]
            axes.bar_label(bars, texts, padding=3, fontsize=8)
        axes.set_yticks(range(len(summaries)), [summary.layer for summary in summaries])
        axes.invert_yaxis()  # the first layer on top
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("mean of |wanted \u2212 recorded| / |recorded|  (relative, no unit)")
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=2, frameon=False)
        fix_layout(figure)
    texts = [
        f"{summary.layer} {three_digits(summary.deviation)}"
        + ("" if summary.deviation_wrong is None else f" ({three_digits(summary.deviation_wrong)} over wrong samples)")
        for summary in summaries
    ]
    figure.set_label(f"Mean relative deviation per layer: {', '.join(texts)}.")
    return figure


def accuracy_curves(rows: Sequence[Row]) -> Figure:
    """Draw test accuracy by epoch, one panel per module trained, FR against BP.

    Args:
        rows: finished post-training runs, all of one network on one data set.

    Returns:
        A figure with one panel per (lS, lR), all on the same axes: a curve per method (and per other settings, where
        these differ) through the means over the seeds, a band of one sample standard deviation where there are several
        seeds, the mean baseline as a dashed line.

    Raises:
        ValueError: as `group_runs` does; or no run reports an accuracy.

    Example:
        >>> run = {"settings": {"method": "fr", "seed": 0}, "l_start": 0, "l_stop": 1, "parameters": 52,
        ...        "baseline_accuracy": 0.6,
        ...        "history": [{"epoch": 1, "accuracy": 0.61}, {"epoch": 2, "accuracy": 0.62}]}
        >>> accuracy_curves([run]).get_label()
        'Test accuracy by epoch. FR (0, 1): 62.00 % after epoch 2. Baseline 60.00 %.'
    """
    groups = group_runs(rows)
    if not any(group.epochs() for group in groups):
        raise ValueError("no run reports an accuracy in its history: there is no curve to draw")
    panels = [
        ((l_start, l_stop), list(members))
        for (l_stop, l_start), members in itertools.groupby(groups, key=lambda group: (group.l_stop, group.l_start))
    ]
    styles = _curve_styles(groups)
    baseline = 100 * float(np.mean([row["baseline_accuracy"] for row in rows]))
    columns = min(len(panels), 5 if len(panels) > 8 else 3 if len(panels) in (5, 6) else 4)
    lines = math.ceil(len(panels) / columns)
    with figure_style():
        size = (max(4.2, 1.1 + 1.85 * columns), 1.2 + 1.6 * lines) if len(panels) > 1 else (5.2, 3.4)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (layers, members) in zip(grid.flat, panels, strict=False):
            for group in members:
                _draw_curve(axes, group, styles[group.method_label])
            own = 100 * float(np.mean([run["baseline_accuracy"] for group in members for run in group.runs]))
            axes.axhline(own, color=GREY, linestyle="--", linewidth=1, zorder=1)
            axes.set_title(f"layers trained: {layers}" if len(panels) == 1 else str(layers), fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:  # the lowest panel of every column
            axes.tick_params(labelbottom=True)
        panels_say = "" if len(panels) == 1 else "; above each panel the layers trained, $(l_S, l_R)$"
        sweeps = " (of the closed form: sweeps)" if any(group.method == "solve" for group in groups) else ""
        figure.supxlabel(f"epochs of post-training{sweeps}{panels_say}", fontsize=9)
        figure.supylabel("test accuracy (%)", fontsize=9)
        handles = [Line2D([], [], **style, label=label) for label, style in styles.items()]
        handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="baseline"))
        widest = 0.65 + 0.075 * max(len(str(handle.get_label())) for handle in handles)  # inches, at nine points
        entries = min(len(handles), max(1, int((size[0] - 0.2) / widest)))
        figure.legend(handles=handles, loc="outside upper left", ncols=entries, frameon=False, handlelength=3)
        fix_layout(figure)
    last = [
        f"{group.label}: {np.mean(group.accuracies(group.epochs()[-1])):.2f} % after epoch {group.epochs()[-1]}"
        for group in groups
        if group.epochs()
    ]
    figure.set_label(f"Test accuracy by epoch. {'; '.join(last)}. Baseline {baseline:.2f} %.")
    return figure


def figure_to_svg(figure: Figure) -> str:
    """Write a figure as SVG, to be put into a page or a file; the same figure gives the same text.

    Args:
        figure: a figure with a label that says what it shows.

    Returns:
        An `<svg>` element, without declaration, document type and metadata, with the label for its `aria-label` and
        its title.

    Raises:
        ValueError: the figure has no label.

    Example:
        >>> figure = Figure(label="An empty figure.")
        >>> 'role="img" aria-label="An empty figure."' in figure_to_svg(figure)
        True
    """
    label = html.escape(_label_of(figure))
    buffer = io.StringIO()
    # The salt fixes the names that matplotlib otherwise draws at random.
    with matplotlib.rc_context({"svg.hashsalt": "revprop", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    return re.sub(
        r"<svg ([^>]*)>",
        rf'<svg role="img" aria-label="{_literal(label)}" \1><title>{_literal(label)}</title>',
        text,
        count=1,
    )


def figure_to_png_uri(figure: Figure, dots_per_inch: int = 144) -> str:
    """Write a figure as PNG in a `data:` address, which stands for the file in a page or a notebook.

    Args:
        figure: the figure.
        dots_per_inch: the resolution.

    Returns:
        The address.

    Example:
        >>> figure_to_png_uri(Figure(figsize=(1, 1)))[:32]
        'data:image/png;base64,iVBORw0KGg'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@contextmanager
def figure_style() -> Iterator[None]:
    """Give every figure made within the look of the others."""
    with matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.labelcolor": "#222222",
            "axes.axisbelow": True,
            "xtick.color": GREY,
            "ytick.color": GREY,
            "xtick.labelcolor": "#222222",
            "ytick.labelcolor": "#222222",
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.fontsize": 9,
        }
    ):
        yield


def fix_layout(figure: Figure) -> None:
    """Place the parts of a figure once and for all."""
    # The layout is found by iteration, from wherever the last drawing left it: every drawing would differ a little.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _channels_of(layer: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    array = np.abs(np.asarray(values, dtype=np.float64))
    if array.ndim not in (1, 2, 3) or array.size == 0:
        raise ValueError(
            f"the map of {layer} has shape {array.shape}: (c, h, w), (h, w) or (n,) was expected, of one sample or "
            "averaged over samples"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"the map of {layer} has values that are not finite")
    return array.reshape((1,) * (3 - array.ndim) + array.shape)


def _size_of(channels: npt.NDArray[np.float64]) -> tuple[str, str]:
    count, height, width = channels.shape
    if (count, height) == (1, 1):
        return f"{width} unit{'s' if width > 1 else ''}", ""
    total = f"{count} channel{'s' if count > 1 else ''}"
    return f"{MOST_CHANNELS} of {total}" if count > MOST_CHANNELS else total, f"\n{height} \u00d7 {width} each"


def _curve_styles(groups: Sequence[RunGroup]) -> dict[str, dict[str, Any]]:
    """One look per method and variant, the same in every panel: the colour says the method, dashes the variant."""
    styles: dict[str, dict[str, Any]] = {}
    others = itertools.cycle(OTHER_COLOURS)
    colours: dict[str, str] = dict(METHOD_COLOURS)
    for group in sorted(groups, key=lambda group: (group.method, group.method_label)):
        colour = colours.get(group.method) or colours.setdefault(group.method, next(others))
        if group.method_label not in styles:
            number = sum(style["color"] == colour for style in styles.values())
            styles[group.method_label] = {
                "color": colour,
                "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
                "marker": MARKERS[(list(colours).index(group.method) + 2 * number) % len(MARKERS)],
                "markersize": 3.5,
                "linewidth": 1.5,
            }
    return styles


def _draw_curve(axes: Axes, group: RunGroup, style: Mapping[str, Any]) -> None:
    epochs = group.epochs()
    values = [group.accuracies(epoch) for epoch in epochs]
    means = np.array([np.mean(same) for same in values])
    axes.plot(epochs, means, **style, zorder=3)
    if len(group.runs) > 1:
        spreads = np.array([np.std(same, ddof=1) if len(same) > 1 else 0.0 for same in values])
        axes.fill_between(epochs, means - spreads, means + spreads, color=style["color"], alpha=0.18, linewidth=0)


def _label_of(figure: Figure) -> str:
    label = str(figure.get_label() or "").strip()
    if not label:
        raise ValueError(
            "the figure does not say what it shows: figure.set_label('one sentence, for readers who cannot see it')"
        )
    return label


def _literal(text: str) -> str:
    return text.replace("\\", r"\\")  # in a replacement a backslash would refer to a group
