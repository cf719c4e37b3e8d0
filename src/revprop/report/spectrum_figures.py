"""Singular values and leading right vectors of a layer as figures, beside the data it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from revprop.report.aggregation import three_digits
from revprop.report.figures import BLUE, GREY, figure_style, fix_layout
from revprop.report.hypersurface_figures import DIVERGING

Array = npt.NDArray[np.float64]
ACROSS = 8


def spectrum_pictures(
    values: npt.ArrayLike,
    right: npt.ArrayLike,
    data: npt.ArrayLike,
    shares: npt.ArrayLike | None = None,
    title: str = "",
    most: int = 16,
) -> Figure:
    """Draw a layer's singular values, and its leading right singular vectors as pictures beside data.

    The journal version of racecar training ("Reviving Autoencoder Pretraining") asks whether these vectors show the data.

    Args:
        values: (k,), the largest first. right: (k, ...), the right vectors.
        data: (n, ...), of as many entries per sample as a vector, whose shape the vectors are drawn in: (channels, rows,
            columns), (rows, columns) or (entries,). Three channels are red, green and blue; of other numbers the mean is drawn.
        shares: (k,), how much of the data lies along each vector, as :meth:`revprop.Spectrum.shares` says.
        title: which layer of which network. most: so many vectors, and samples, at most.

    Returns:
        A figure of a curve and two sets of pictures: each vector on its own scale, zero white, red above and blue below; each
        sample from its smallest value to its largest.

    Raises:
        ValueError: no value, numbers of values, vectors and shares that differ, samples of another size than the vectors.

    Example:
        >>> spectrum_pictures([2.0, 1.0], np.eye(2, 16), np.ones((3, 1, 4, 4)), [0.5, 0.25]).get_label()
        '2 singular values from 2 to 1. The leading 2 right vectors hold 75.0 % of the data; drawn beside 3 samples.'
    """
    s, samples = np.asarray(values, dtype=np.float64).ravel(), np.asarray(data, dtype=np.float64)
    vectors = _shaped(np.asarray(right, dtype=np.float64), samples)
    held = None if shares is None else np.asarray(shares, dtype=np.float64).ravel()
    if not len(s) or len(s) != len(vectors) or (held is not None and len(held) != len(s)):
        raise ValueError(
            f"expected as many vectors and shares as values, and at least one; given {len(s)} values, {len(vectors)} vectors"
            + ("" if held is None else f" and {len(held)} shares")
        )
    shown, beside = min(len(s), most), min(len(samples), most)
    rows = math.ceil(shown / ACROSS) + math.ceil(beside / ACROSS)
    with figure_style():
        figure = Figure(figsize=(11.0, max(3.0, 0.9 + rows * (1.15 if held is None else 1.2))), layout="constrained")
        if title:
            figure.suptitle(title, fontsize=9.5)
        left, pictures = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 2.7), wspace=0.03)[0]
        axes = left.subplots()
        axes.plot(range(1, len(s) + 1), s, color=BLUE, marker="o", markersize=3.5, linewidth=1.2)
        axes.set(xlabel="number", ylabel="singular value", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        upper, lower = pictures.subfigures(
            2, 1, squeeze=False, height_ratios=(_lines(shown) + 0.35, _lines(beside)), hspace=0.02
        )[:, 0]
        whole = "" if held is None else f", which hold {100 * held[:shown].sum():.1f} % of the data"
        names = [three_digits(value) for value in s[:shown]]
        if held is not None:
            names = [f"{name}; {100 * share:.1f} %" for name, share in zip(names, held, strict=False)]
        _grid(upper, vectors[:shown], f"leading right vectors{whole}", names)
        _grid(lower, samples[:beside], "data", None)
        fix_layout(figure)
    holds = f" hold {100 * held[:shown].sum():.1f} % of the data;" if held is not None else ""
    figure.set_label(
        f"{title + ': ' if title else ''}{len(s)} singular values from {s[0]:.3g} to {s[-1]:.3g}. The leading {shown} right "
        f"vectors{holds} {'are ' if held is None else ''}drawn beside {beside} samples."
    )
    return figure


def _shaped(vectors: Array, samples: Array) -> Array:
    """The vectors in the shape of the samples."""
    if samples.ndim < 2 or samples.ndim > 4 or vectors.ndim < 2 or not samples.size:
        raise ValueError(
            f"expected samples (n, channels, rows, columns), (n, rows, columns) or (n, entries), and vectors (k, ...); given "
            f"{samples.shape} and {vectors.shape}"
        )
    if math.prod(vectors.shape[1:]) != math.prod(samples.shape[1:]):
        raise ValueError(
            f"expected samples of as many entries as a vector has; given {samples.shape[1:]} and {vectors.shape[1:]}"
        )
    return vectors.reshape(len(vectors), *samples.shape[1:])


def _grid(figure: SubFigure, pictures: Array, title: str, names: Sequence[str] | None) -> None:
    """Pictures in rows of eight; those with names are signed, and white where zero."""
    figure.suptitle(title, fontsize=8.5, color=GREY, x=0.01, ha="left")
    grid = figure.subplots(_lines(len(pictures)), ACROSS, squeeze=False)
    for axes in grid.flat[len(pictures) :]:
        axes.set_axis_off()
    for number, (axes, picture) in enumerate(zip(grid.flat, pictures, strict=False)):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="#CCCCCC", linewidth=0.6)
        _show(axes, picture, signed=names is not None)
        if names is not None:
            axes.set_title(names[number], fontsize=7.5, pad=2)


def _show(axes: Axes, picture: Array, signed: bool) -> None:
    if picture.ndim == 1:
        picture = picture[None]
    coloured = picture.ndim == 3 and len(picture) == 3
    if picture.ndim == 3 and not coloured:
        picture = picture.mean(0)
    aspect: Literal["auto", "equal"] = "auto" if picture.shape[-2] == 1 else "equal"
    largest = float(np.abs(picture).max()) or 1.0
    if coloured:
        low, high = (-largest, largest) if signed else (float(picture.min()), float(picture.max()))
        scaled = (picture - low) / ((high - low) or 1.0)
        axes.imshow(np.moveaxis(scaled, 0, -1), interpolation="nearest", aspect=aspect)
    elif signed:
        axes.imshow(picture, cmap=DIVERGING, vmin=-largest, vmax=largest, interpolation="nearest", aspect=aspect)
    else:
        axes.imshow(picture, cmap="gray", interpolation="nearest", aspect=aspect)


def _lines(count: int) -> int:
    return max(1, math.ceil(count / ACROSS))
