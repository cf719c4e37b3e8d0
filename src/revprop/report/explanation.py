"""The page of one explained unit: what ``revprop explain`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from revprop.report.hypersurface_figures import (
    channel_maps,
    feature_maps,
    hypersurface_bars,
    hypersurface_maps,
    share_bars,
)
from revprop.report.numerals import MINUS, signed
from revprop.report.page import Section, write_page
from revprop.report.tables import Table

__all__ = ["certificate_words", "grouped", "unit_words", "write_explanation"]

Row = Mapping[str, Any]
KINDS = ("biases", "running means", "constants of operators")
MOST_BARS = 24


def write_explanation(
    path: Path, row: Row, picture: npt.ArrayLike, image: str, network: str, named: str = "", label: str = ""
) -> Path:
    """Writes the page of one unit for one input.

    Args:
        path: the page. row: what :func:`revprop.experiments.explanation.run` returned.
        picture: the image as a person sees it, (rows, columns) or (rows, columns, 3), 0 to 1.
        image, network: their names, as "image 0 of digits". named: the unit's name, as its class. label: the image's.

    Returns:
        the path.
    """
    what = unit_words(row) + (f" (\u201c{named}\u201d)" if named else "")
    title = f"{what[:1].upper()}{what[1:]}, explained"
    largest = " This unit is the largest of its layer." if row["chosen"] else ""
    labelled = f", labelled \u201c{label}\u201d" if label else ""
    constants = sum(value for *_, value in row["shares"])
    lead = (
        f"{network}, {image}{labelled}: the value of {what} is {_number(row['value'], 6)}.{largest} Here the value is taken apart, "
        f"exactly, into what the input contributes ({_number(row['input'])}) and what the network adds by itself, its biases and "
        f"other constants ({_number(constants)}). The largest parts: {_largest(row)}.\n\n{certificate_words(row)}"
    )
    return write_page(path, title, lead, [*_pictures(row, picture), _shares(row), _held(row), _features(row)])


def unit_words(row: Row) -> str:
    """Which unit it is, for a person.

    >>> unit_words({"layer": "conv1", "unit": (3, 0, 2), "mode": "unit"})
    'channel 3, row 0, column 2 of conv1'
    >>> unit_words({"layer": "conv1", "unit": (3,), "mode": "RM1"})
    'channel 3 of conv1, summed over all positions, before its bias'
    """
    layer, unit, mode = row["layer"], tuple(row["unit"]), row["mode"]
    if mode in ("RM3", "RM4"):
        out, channel, *position = unit
        where = f" at {_position(position)}" if mode == "RM4" else ", summed over all positions"
        return f"what channel {out} of {layer} takes from in-channel {channel}{where}"
    if mode == "RM1":
        return f"channel {unit[0]} of {layer}, summed over all positions, before its bias"
    words = f"unit {unit[0]}" if len(unit) == 1 else f"unit {unit}"
    if len(unit) == 3:
        words = f"channel {unit[0]}, {_position(unit[1:])}"
    return f"{words} of {layer}" + ("" if mode == "unit" else ", before its bias")


def certificate_words(row: Row) -> str:
    """The sum beside the value, and how far they are apart.

    >>> certificate_words({"value": 2.0, "reconstructed": 2.5, "double": True})
    'All contributions add up to 2.5, and the network computes 2: 0.5 apart, or 0.25 of the value (double precision).'
    """
    apart = abs(row["reconstructed"] - row["value"])
    if not apart:
        return f"All contributions add up to {row['value']:.8g}, to the last digit what the network computes."
    share = f", or {apart / abs(row['value']):.2g} of the value" if row["value"] else ""
    precision = "double" if row["double"] else "single"
    return (
        f"All contributions add up to {row['reconstructed']:.8g}, and the network computes {row['value']:.8g}: {apart:.2g} "
        f"apart{share} ({precision} precision)."
    )


def grouped(shares: list[tuple[str, str, str, float]], most: int = MOST_BARS) -> dict[str, dict[str, float]]:
    """What each module's constants contribute, by kind; modules of one block together where there are more than ``most``.

    >>> shares = [("a.0.bias", "a.0", "biases", 1.0), ("a.1.bias", "a.1", "biases", 2.0)]
    >>> grouped(shares), grouped(shares, most=1)
    ({'a.0': {'biases': 1.0}, 'a.1': {'biases': 2.0}}, {'a': {'biases': 3.0}})
    """
    depth = max((module.count(".") + 1 for _, module, *_ in shares), default=1)
    groups: dict[str, dict[str, float]] = {}
    for level in range(depth, 0, -1):
        groups = {}
        for _, module, kind, value in shares:
            parts = groups.setdefault(".".join(module.split(".")[:level]), {})
            parts[kind] = parts.get(kind, 0.0) + value
        if len(groups) <= most:
            break
    return groups


def _pictures(row: Row, picture: npt.ArrayLike) -> list[Section]:
    x, h = np.asarray(row["x"], dtype=np.float64), np.asarray(row["h"], dtype=np.float64)
    shape = [size for size in x.shape if size > 1]
    total = f"Summed over the input, x \u00b7 h is {_number(row['input'])}, the input's part of the value."
    zero = (
        "Contributions are counted from x = 0, which stands for the mean that was subtracted when the image was scaled."
    )
    text = (
        "For this input the network is a linear map, and this unit one row of it: h has a number for every entry of the input x, "
        "and the input's part of the unit is the sum of x \u00b7 h. h says how the unit weighs the input; x \u00b7 h, what is "
        f"there to be weighed. {total}"
    )
    if len(shape) < 2:
        reading = (
            f"Orange entries are positive, blue ones negative; those of x \u00b7 h raise and lower the unit. {zero}"
        )
        return [Section("What the unit sees", text, figures=[hypersurface_bars(x.ravel(), h.ravel())], reading=reading)]
    x, h = (v if v.ndim == 3 else v.reshape(1, *shape) for v in (x, h))
    slope = "" if row["held"] else "Where h is red, a larger x would raise the unit. "
    reading = (
        "Red is positive, blue negative, white zero. Where x \u00b7 h is red, what the image has there raises the unit; where it "
        f"is blue, it lowers it. {slope}{zero} An arrow at a colour bar: one value in a hundred lies beyond."
    )
    sections = [Section("What the unit sees", text, figures=[hypersurface_maps(picture, x, h)], reading=reading)]
    if len(x) > 1:
        text = "The same for each channel. The panels of one row share one scale, so that channels can be compared."
        sections.append(Section("Channel by channel", text, figures=[channel_maps(x, h)]))
    return sections


def _shares(row: Row) -> Section:
    groups = grouped(row["shares"])
    bars = {"the input": row["input"], **{name: sum(parts.values()) for name, parts in groups.items()}}
    kinds = [kind for kind in KINDS if any(kind in parts for parts in groups.values())]
    lines: list[list[str | float | None]] = [["the input", *[None] * len(kinds), row["input"]]]
    lines += [[name, *(parts.get(kind) for kind in kinds), sum(parts.values())] for name, parts in groups.items()]
    columns = [sum(parts.get(kind, 0.0) for parts in groups.values()) for kind in kinds]
    lines.append(["all together", *columns, row["reconstructed"]])
    table = Table(
        "Contributions to the unit",
        ["from", *kinds, "in all"],
        lines,
        note="Layers in forward order. Biases: all parameters that are added, those of norms too. Running means: what a batch norm "
        "subtracts. Constants of operators: the part of an operator that does not scale with its input.",
        bold={(len(lines) - 1, len(kinds) + 1)},
    )
    text = (
        "What reaches the unit from the input, and from what each layer adds by itself, seen through all layers behind it. Bars to "
        f"the right raise the unit, those to the left lower it; they add up to its value. {certificate_words(row)}"
    )
    figures: list[Figure] = [share_bars(bars, ("sum = the unit", row["reconstructed"]))]
    return Section("Where the value comes from", text, figures=figures, tables=[table])


def _held(row: Row) -> Section:
    held: Mapping[str, str] = row["held"]
    if not held:
        return Section(
            "What was held",
            "Nothing. Every operator on the way is linear in pieces, so the network is this linear map not only for this input but "
            "for all around it, until a unit switches from one piece to another.",
        )
    by_words: dict[str, list[str]] = {}
    for name, words in held.items():
        by_words.setdefault(words, []).append(name)
    table = Table(
        "Held at what it is for this input",
        ["what", "operators", "where"],
        [[words, len(names), ", ".join(names)] for words, names in by_words.items()],
    )
    return Section(
        "What was held",
        "The sum is exact for this input. But some operators are no linear maps, not even in pieces: part of each was held at what "
        "it is for this input. For an input nearby that part would be another, so h is not the slope of the unit.",
        tables=[table],
    )


def _features(row: Row) -> Section:
    original, found = (np.asarray(row[name], dtype=np.float64) for name in ("original", "features"))
    difference, largest = float(np.abs(found - original).max()), float(np.abs(original).max())
    apart = f"differ from them by {difference:.2g} at most" if difference else "are the same to the last digit"
    text = (
        f"The same sum for every unit of {row['maps']} at once. The values reach {largest:.3g}; the sums {apart}. Red is positive, "
        "blue negative, white zero. The first three panels share one scale, so an exact reconstruction leaves the third one white; "
        "the fourth shows what is left, on a scale of its own: rounding."
    )
    return Section(f"All of {row['maps']}, reconstructed", text, figures=[feature_maps(original, found)])


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}".replace("-", MINUS)


def _largest(row: Row) -> str:
    """The three largest parts in words."""
    parts = {"the input": row["input"], **{name: sum(kinds.values()) for name, kinds in grouped(row["shares"]).items()}}
    ranked = sorted(parts.items(), key=lambda part: -abs(part[1]))
    return ", ".join(f"{name} ({signed(value)})" for name, value in ranked[:3])


def _position(position: Any) -> str:
    return ", ".join(f"{name} {i}" for name, i in zip(("row", "column"), position, strict=False)) or "its position"
