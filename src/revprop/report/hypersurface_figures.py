"""Effective hypersurfaces, contributions and reconstructed features as figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from revprop.report.aggregation import three_digits
from revprop.report.figures import BLUE, GREY, VERMILLION, figure_style, fix_layout
from revprop.report.numerals import MINUS

DIVERGING = "RdBu_r"  # of ColorBrewer: told apart with any colour vision; white is zero, red above, blue below
DOT = " \u00b7 "
Array = npt.NDArray[np.float64]


def hypersurface_maps(picture: npt.ArrayLike, x: npt.ArrayLike, h: npt.ArrayLike) -> Figure:
    """Draw an image, the effective hypersurface of a unit, and what each pixel contributes.

    Args:
        picture: (rows, columns) or (rows, columns, 3), 0 to 1: the image as a person sees it.
        x: (channels, rows, columns), as the network takes it. h: of the same shape; summed over channels where several.

    Returns:
        A figure of panels, each with its own scale, centred on zero: x where there is one channel, h, x h, and of images of 16
        pixels or more x h summed over patches, about eight by eight of them.

    Raises:
        ValueError: x and h are no images of one shape.

    Example:
        >>> hypersurface_maps(np.zeros((4, 4)), np.ones((1, 4, 4)), np.eye(4)[None]).get_label()
        'An image; x, as the network takes it, from 1 to 1; h, from 0 to 1; x h, from 0 to 1.'
    """
    x, h = _images(x, h)
    several = len(x) > 1
    over = ", summed over channels" if several else ""
    panels = {} if several else {"x, as the network takes it": x[0]}
    panels |= {f"h{over}": h.sum(0), f"x \u00b7 h{over}": (x * h).sum(0)}
    side = math.ceil(max(x.shape[1:]) / 8)
    if side > 1:
        panels[f"x \u00b7 h, summed over {side} \u00d7 {side} pixels"] = _patches((x * h).sum(0), side)
    with figure_style():
        figure = Figure(figsize=(11.0, 11.0 / (1 + len(panels)) * min(x.shape[1] / x.shape[2], 2.0) + 0.65))
        figure.set_layout_engine("constrained", wspace=0.05)
        first, *rest = figure.subplots(1, 1 + len(panels))
        first.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        _bare(first, "the image")
        for axes, (title, values) in zip(rest, panels.items(), strict=True):
            drawn = axes.imshow(values, cmap=DIVERGING, norm=_centred(values), interpolation="nearest")
            _bare(axes, title)
            _bar(figure, drawn, [axes], values, "bottom")
        fix_layout(figure)
        own, beside = (
            first.get_position(),
            rest[0].get_position(),
        )  # it has no colour bar, and is to lie as the others do
        first.set_position((own.x0, beside.y0, own.width, beside.height))
    said = "; ".join(f"{title.replace(DOT, ' ')}, {_range(values)}" for title, values in panels.items())
    figure.set_label(f"An image; {said}.")
    return figure


def channel_maps(x: npt.ArrayLike, h: npt.ArrayLike) -> Figure:
    """Draw x, h and x h channel by channel: each row of panels on one scale, centred on zero.

    Args:
        x, h: (channels, rows, columns); the first eight channels are drawn.

    Raises:
        ValueError: as `hypersurface_maps`.

    Example:
        >>> channel_maps(np.ones((3, 4, 4)), np.zeros((3, 4, 4))).get_label()
        'By channel (red, green, blue): the input x, from 1 to 1; the hypersurface h, from 0 to 0; the contributions x h,
        from 0 to 0.'
    """
    x, h = _images(x, h)
    names = ["red", "green", "blue"] if len(x) == 3 else [f"channel {i}" for i in range(min(len(x), 8))]
    rows = {
        "the input x": ("x, as the network takes it", x),
        "the hypersurface h": ("h, the hypersurface", h),
        "the contributions x h": ("x \u00b7 h, the contributions", x * h),
    }
    with figure_style():
        figure = Figure(figsize=(1.3 + 2.1 * len(names), 6.6), layout="constrained")
        grid = figure.subplots(3, len(names), squeeze=False)
        for row, (line, (title, values)) in enumerate(zip(grid, rows.values(), strict=True)):
            norm = _centred(values[: len(names)])
            for axes, name, channel in zip(line, names, values, strict=False):
                drawn = axes.imshow(channel, cmap=DIVERGING, norm=norm, interpolation="nearest")
                _bare(axes, name if row == 0 else "")
            line[0].set_ylabel(title, fontsize=8.5)
            _bar(figure, drawn, list(line), values[: len(names)])
        fix_layout(figure)
    said = "; ".join(f"{name}, {_range(values)}" for name, (_, values) in rows.items())
    figure.set_label(f"By channel ({', '.join(names)}): {said}.")
    return figure


def hypersurface_bars(x: npt.ArrayLike, h: npt.ArrayLike) -> Figure:
    """Draw x, h and x h entry by entry, for an input that is a vector.

    Args:
        x, h: (entries,).

    Example:
        >>> hypersurface_bars([1.0, 2.0], [0.5, -1.0]).get_label()
        'By entry (2 of them): the input x, from 1 to 2; the hypersurface h, from -1 to 0.5; the contributions x h, from -2 to
        0.5.'
    """
    x, h = np.asarray(x, dtype=np.float64).ravel(), np.asarray(h, dtype=np.float64).ravel()
    rows = {
        "the input x": ("x", x),
        "the hypersurface h": ("h", h),
        "the contributions x h": ("x \u00b7 h", x * h),
    }
    with figure_style():
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        lines = figure.subplots(3, 1, sharex=True)
        edges = np.arange(len(x) + 1) - 0.5
        for axes, (title, values) in zip(lines, rows.values(), strict=True):
            for part, colour in ((values.clip(min=0), VERMILLION), (values.clip(max=0), BLUE)):
                axes.stairs(part, edges, fill=True, color=colour)
            axes.axhline(0.0, color=GREY, linewidth=0.8)
            axes.set_ylabel(title)
        lines[-1].set_xlabel("entry of the input")
        lines[-1].set_xlim(-0.5, max(len(x), 1) - 0.5)
        fix_layout(figure)
    said = "; ".join(f"{name}, {_range(values)}" for name, (_, values) in rows.items())
    figure.set_label(f"By entry ({len(x)} of them): {said}.")
    return figure


def share_bars(shares: Mapping[str, float], total: tuple[str, float]) -> Figure:
    """Draw what the input and each layer's constants contribute to a unit, and below them their sum.

    Args:
        shares: by name, the input first, then layers in forward order. total: the name and value of the sum.

    Raises:
        ValueError: there is no share.

    Example:
        >>> share_bars({"input": 2.0, "conv1": -0.5}, ("sum", 1.5)).get_label()
        'Contributions: input 2.00, conv1 -0.500; sum 1.50.'
    """
    if not shares:
        raise ValueError("there is no contribution to draw: the input's at least was expected")
    lines = [*shares.items(), total]
    values = [value for _, value in lines]
    colours = [VERMILLION if value > 0 else BLUE for value in values[:-1]] + [GREY]
    with figure_style():
        figure = Figure(figsize=(7.4, 0.75 + 0.245 * len(lines)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(range(len(lines)), values, height=0.72, color=colours)
        axes.bar_label(bars, [_signed(value) for value in values], padding=3, fontsize=8)
        axes.axvline(0.0, color=GREY, linewidth=0.8)
        axes.axhline(len(lines) - 1.5, color="#BBBBBB", linewidth=0.8)
        axes.set_yticks(range(len(lines)), [name for name, _ in lines])
        axes.get_yticklabels()[-1].set_fontweight("bold")
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.margins(x=0.14)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("contribution, in the unit's own units")
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        fix_layout(figure)
    said = ", ".join(f"{name} {_plain(value)}" for name, value in shares.items())
    figure.set_label(f"Contributions: {said}; {total[0]} {_plain(total[1])}.")
    return figure


def feature_maps(original: npt.ArrayLike, reconstructed: npt.ArrayLike, most: int = 96) -> Figure:
    """Draw a layer's features, the reconstructed ones, their difference, and that on a scale of its own (AdjointBackMapV2
    Fig. E.1 to E.6).

    Args:
        original, reconstructed: (maps, rows, columns); a matrix is one map, a vector a strip. most: so many maps at most.

    Returns:
        A figure of four panels, each a grid of maps, about eight rows of them. The first three share one scale.

    Raises:
        ValueError: the shapes differ, or have more than three sizes, or none.

    Example:
        >>> feature_maps(np.ones((20, 4, 4)), np.full((20, 4, 4), 1.5)).get_label()
        '20 of 20 feature maps, 4 x 4 each: original, reconstructed, and their difference, which is 0.5 at most.'
    """
    first, second = _as_maps(original), _as_maps(reconstructed)
    if first.shape != second.shape:
        raise ValueError(f"features of shape {first.shape} were expected to be compared with such, not {second.shape}")
    count, *size = first.shape
    difference = second - first
    shown = min(count, most)
    columns = 1 if size[0] == 1 else max(min(2, shown), math.ceil(shown / 8))
    scale = _centred(np.stack([first[:shown], second[:shown]]))
    panels = {
        "original": (first, scale),
        "reconstructed": (second, scale),
        "difference": (difference, scale),
        "difference, on its own scale": (difference, _centred(difference[:shown])),
    }
    pictures = {title: (_mosaic(maps[:shown], columns), norm) for title, (maps, norm) in panels.items()}
    rows, wide = next(iter(pictures.values()))[0].shape
    height = min(max(2.3 * rows / wide, 0.35), 5.2)
    colours = matplotlib.colormaps[DIVERGING].with_extremes(bad="#8A8A8A")
    with figure_style():
        figure = Figure(figsize=(11.0, height + 0.85), layout="constrained")
        grid = figure.subplots(1, 4)
        for axes, (title, (picture, norm)) in zip(grid, pictures.items(), strict=True):
            aspect = "auto" if size[0] == 1 else "equal"
            drawn = axes.imshow(picture, cmap=colours, norm=norm, interpolation="nearest", aspect=aspect)
            _bare(axes, title)
            if title in ("difference", "difference, on its own scale"):
                shared = title == "difference"
                _bar(figure, drawn, list(grid[:3]) if shared else [axes], first if shared else difference, "bottom")
        fix_layout(figure)
    largest = float(np.abs(difference).max()) if difference.size else 0.0
    figure.set_label(
        f"{shown} of {count} feature map{'s' if count > 1 else ''}, {size[0]} x {size[1]} each: original, reconstructed, and "
        f"their difference, which is {largest:.2g} at most."
    )
    return figure


def _mosaic(maps: Array, columns: int) -> Array:
    """Maps side by side, with narrow gaps; small ones enlarged."""
    times = max(1, 32 // max(maps.shape[1:]))
    maps = maps.repeat(times, 1).repeat(times, 2)
    count, height, width = maps.shape
    gap = 0 if count == 1 else max(1, round(max(height, width) / 16))
    lines = math.ceil(count / columns)
    picture = np.full((lines * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for number, one in enumerate(maps):
        row, column = divmod(number, columns)
        top, left = row * (height + gap), column * (width + gap)
        picture[top : top + height, left : left + width] = one
    return picture


def _as_maps(values: npt.ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2, 3) or not array.size:
        raise ValueError(
            f"features of shape {array.shape}: (maps, rows, columns), (rows, columns) or (n,) was expected"
        )
    array = array.reshape((1,) * (3 - array.ndim) + array.shape)
    return array.reshape(1, 1, -1) if array.shape[1:] == (1, 1) else array


def _images(x: npt.ArrayLike, h: npt.ArrayLike) -> tuple[Array, Array]:
    first, second = np.asarray(x, dtype=np.float64), np.asarray(h, dtype=np.float64)
    if first.ndim != 3 or first.shape != second.shape:
        raise ValueError(
            f"x and h of one shape (channels, rows, columns) were expected, not {first.shape} and {second.shape}"
        )
    return first, second


def _patches(values: Array, side: int) -> Array:
    rows = np.add.reduceat(values, range(0, values.shape[0], side), 0)
    return np.add.reduceat(rows, range(0, values.shape[1], side), 1)


def _centred(values: Array) -> Normalize:
    """A scale with zero in its middle, to the largest value; where a few are far larger than the others, without these."""
    sizes = np.abs(values[values != 0])
    largest, usual = (float(sizes.max()), float(np.quantile(sizes, 0.99))) if sizes.size else (1.0, 1.0)
    largest = usual if 1.3 * usual < largest else largest
    return Normalize(-largest, largest)


def _bare(axes: Axes, title: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=8.5)


def _bar(figure: Figure, drawn: AxesImage, beside: Sequence[Axes], values: Array, where: str = "right") -> None:
    """A colour bar, with an arrow where values lie beyond it."""
    end = float(np.max(drawn.norm.vmax or 1.0))
    above, below = bool((values > end).any()), bool((values < -end).any())
    extend = "both" if above and below else "max" if above else "min" if below else "neither"
    options: dict[str, Any] = {
        "ticks": [-end, 0.0, end],
        "location": where,
        "shrink": 0.9,
        "pad": 0.02,
        "extend": extend,
    }
    bar = figure.colorbar(drawn, ax=list(beside), aspect=36 if len(beside) > 1 else 18, **options)
    bar.set_ticklabels([f"{MINUS}{end:.2g}", "0", f"{end:.2g}"], fontsize=7.5)
    bar.outline.set_visible(False)


def _range(values: Array) -> str:
    return f"from {values.min():.3g} to {values.max():.3g}" if values.size else "empty"


def _plain(value: float) -> str:
    return f"{value:.3g}" if value == 0 else three_digits(value)


def _signed(value: float) -> str:
    return three_digits(value).replace("-", MINUS)
