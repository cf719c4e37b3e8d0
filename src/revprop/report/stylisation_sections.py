"""Style through networks trained with and without the racecar penalty: Figures 10 to 13 of that paper, with the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from revprop.report.aggregation import Row, three_digits
from revprop.report.figures import figure_style, fix_layout
from revprop.report.page import Section
from revprop.report.tables import Cell, Table

__all__ = ["stylisation_pictures", "stylisation_sections"]

PUBLISHED = {"Std": (73.24, 0.308), "RR": (66.73, 0.636)}
"""Figure 22: top-5 accuracy (%) of VGG19 on ImageNet after phase I, and seconds per batch of 24."""
SHARED = ("network", "data", "epochs", "size", "steps", "delta", "reduced")
WHAT = {
    10: "a scene and a painting, a horse and a zebra",
    11: "two shapes of one colour, the style alone",
    12: "from low to high resolution",
    13: "an object with its shadow",
}
READING = {
    11: "Only the style is minimised, and the two pictures differ in the shape alone: the less the picture changes, the better the "
    "features keep shape apart from style.",
    12: "The error is the mean difference of pixels in [0, 1] from the picture of high resolution, which is the style as well.",
}
PATTERN = (
    "Style left, content moved: each loss over what it is between the two pictures themselves, so that networks with larger "
    "features are not weighed otherwise. Change: mean difference of pixels in [0, 1] from the content picture."
)


def stylisation_sections(rows: Sequence[Row], draw: bool = True, folder: Path | None = None) -> list[Section]:
    """Make a section of each figure, and of each way of training and size of pictures in it.

    Args:
        rows: finished runs of any kind; others than "stylisation" are left alone.
        draw: whether to draw the pictures. folder: the runs' folder, which holds them; without it none is drawn.

    >>> stylisation_sections([])
    []
    """
    groups: dict[str, list[Row]] = {}
    for row in sorted(
        (row for row in rows if row["settings"].get("kind") == "stylisation"), key=lambda row: row["settings"]["figure"]
    ):
        shared = json.dumps([row["settings"]["figure"], *(row["settings"].get(name) for name in SHARED)], default=str)
        groups.setdefault(shared, []).append(row)
    return [_section(group, draw, folder) for group in groups.values()]


def _section(rows: Sequence[Row], draw: bool, folder: Path | None) -> Section:
    settings = rows[0]["settings"]
    number = settings["figure"]
    pictures = _first_pictures(rows, folder) if draw and folder is not None else {}
    lost = draw and folder is not None and len(pictures) < len(_pairs(rows))
    losses = (
        "the style loss alone" if settings["style_only"] else f"content and style losses, as 1 to {settings['delta']:g}"
    )
    text = (
        f"After Figure {number} of the racecar paper (there: {WHAT[number]}): {settings['steps']} steps of L-BFGS on {losses}, "
        f"from the content picture on, {settings['size']} pixels, through {settings['network']}."
        + (f" Reduced: {settings['reduced']}." if settings["reduced"] else "")
        + (" Some pictures are not in the folder any more." if lost else "")
    )
    figures = [stylisation_pictures(pictures, f"Figure {number}: what networks make of a style")] if pictures else []
    return Section(
        f"Figure {number} of the racecar paper: stylisation",
        text,
        tables=[_losses(rows), _networks(rows)],
        figures=figures,
        reading=" ".join(part for part in (PATTERN, READING.get(number, "")) if part),
    )


def _ways(rows: Sequence[Row]) -> list[str]:
    known = list(PUBLISHED)
    found = dict.fromkeys(str(row["settings"]["way"]) for row in rows)
    return sorted(found, key=lambda way: known.index(way) if way in known else len(known))


def _pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["settings"]["content"], row["settings"]["style"]) for row in rows))


def _losses(rows: Sequence[Row]) -> Table:
    errors = any(row["error"] is not None for row in rows)
    lines: list[list[Cell]] = []
    for content, style in _pairs(rows):
        for way in _ways(rows):
            own = [
                row
                for row in rows
                if (row["settings"]["content"], row["settings"]["style"], row["settings"]["way"])
                == (content, style, way)
            ]
            if not own:
                continue
            line: list[Cell] = [content, style, way, len(own)]
            line += [_percent(row["style"][1] for row in own), _percent(row["content"][1] for row in own)]
            line += [three_digits(fmean(row["change"] for row in own))]
            if errors:
                line += [three_digits(fmean(row["error"][place] for row in own)) for place in (0, 1)]
            lines.append(line)
    columns = ["content", "style", "network", "runs", "style left (%)", "content moved (%)", "change"]
    columns += ["error of the content", "error of the result"] if errors else []
    note = "Means over runs, which differ in the network's seed."
    return Table("What is reached", columns, lines, note)


def _networks(rows: Sequence[Row]) -> Table:
    lines: list[list[Cell]] = []
    for way in _ways(rows):
        own = {row["settings"]["seed"]: row for row in rows if row["settings"]["way"] == way}
        known = [row["network"] for row in own.values()]
        published = PUBLISHED.get(way, (None, None))
        lines.append(
            [
                way,
                f"{next(iter(own.values()))['settings']['weight']:g}",
                len(own),
                _mean(known, "accuracy", 100),
                _mean(known, "top5", 100),
                None if published[0] is None else f"{published[0]:.2f}",
                _mean(known, "regenerated", 100),
                _mean(known, "seconds", 1),
                None if published[1] is None else f"{published[1]:.3f}",
            ]
        )
    columns = [
        "network",
        "lambda",
        "runs",
        "accuracy (%)",
        "top 5 (%)",
        "top 5, published (%)",
        "input not given back (%)",
    ]
    columns += ["seconds per step", "published"]
    note = (
        "Test accuracy after phase I. Published: VGG19 on ImageNet, in batches of 24 (Figure 22). Input not given back: mean "
        "|I - I'| / |I| over test images, I' what the reverse pass gives. None where weights were given."
    )
    return Table("The networks", columns, lines, note)


def _mean(known: Sequence[Mapping[str, Any]], name: str, factor: float) -> str | None:
    values = [part[name] for part in known if part[name] is not None]
    return three_digits(factor * fmean(values)) if values else None


def _percent(values: Any) -> str:
    return three_digits(100 * fmean(values))


def _first_pictures(rows: Sequence[Row], folder: Path) -> dict[tuple[str, str], dict[str, npt.NDArray[np.uint8]]]:
    """Per pair: "content", "style" and the result of each way with the lowest seed; pairs whose files are there."""
    found: dict[tuple[str, str], dict[str, npt.NDArray[np.uint8]]] = {}
    for row in sorted(rows, key=lambda row: (_ways(rows).index(row["settings"]["way"]), row["settings"]["seed"])):
        path = folder / row["pictures"]
        if not path.is_file():
            continue
        panels = found.setdefault((row["settings"]["content"], row["settings"]["style"]), {})
        with np.load(path, allow_pickle=False) as kept:
            for name, part in (("content", "content"), ("style", "style"), (row["settings"]["way"], "image")):
                panels.setdefault(name, kept[part])
    return found


def stylisation_pictures(pictures: Mapping[tuple[str, str], Mapping[str, npt.NDArray[np.uint8]]], title: str) -> Figure:
    """Draw pairs of pictures and what networks made of them, a pair a line.

    Args:
        pictures: by pair (content, style): by name, (rows, columns, 3), 0 to 255. title: what is shown.

    Raises:
        ValueError: no pictures.

    >>> grey = np.full((4, 4, 3), 128, np.uint8)
    >>> stylisation_pictures({("cat", "dots"): {"content": grey, "style": grey, "Std": grey}}, "Figure").get_label()
    'Figure. cat in the style of dots: content, style, Std.'
    """
    if not pictures:
        raise ValueError("no pictures to draw")
    columns = list(dict.fromkeys(name for panels in pictures.values() for name in panels))
    with figure_style():
        figure = Figure(figsize=(0.3 + 2.1 * len(columns), 0.5 + 2.3 * len(pictures)), layout="constrained")
        grid = figure.subplots(len(pictures), len(columns), squeeze=False)
        for line, (pair, panels) in zip(grid, pictures.items(), strict=True):
            for axes, name in zip(line, columns, strict=True):
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                said = {"content": f"content: {pair[0]}", "style": f"style: {pair[1]}"}.get(name, name)
                axes.set_title(said, fontsize=8)
                if name in panels:
                    axes.imshow(panels[name], interpolation="nearest")
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
        fix_layout(figure)
    said = "; ".join(f"{a} in the style of {b}: {', '.join(panels)}" for (a, b), panels in pictures.items())
    figure.set_label(f"{title}. {said}.")
    return figure
