"""The units of trained networks as their effective hypersurfaces say: Tables 3 and 4, Figures 6 to 11 of AdjointBackMapV2."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from revprop.report.aggregation import Row, three_digits
from revprop.report.figures import BLUE, GREY, VERMILLION, figure_style, fix_layout
from revprop.report.page import Section
from revprop.report.published import PUBLISHED_ACCURACY, PUBLISHED_UNITS
from revprop.report.tables import Cell, Table

__all__ = ["adjoint_sections", "error_histograms"]

EDGE = 1e-4  # of the histograms, as published
ACROSS = 5  # panels in a line
FIRST_FIGURE = {3: 6, 4: 9}
SHARED = ("data", "way", "reduced", "images", "explained", "baseline_seed")


def adjoint_sections(rows: Sequence[Row], draw: bool = True) -> list[Section]:
    """Make a section of the rows of each data set, and one of the networks that were only trained.

    Args:
        rows: finished runs of any kind; others than "adjoint" and, of its networks, "baseline" are left alone.
        draw: whether to draw the histograms.

    >>> adjoint_sections([])
    []
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["settings"].get("kind") == "adjoint":
            shared = json.dumps([row["settings"].get(name) for name in SHARED], default=str)
            groups.setdefault(shared, []).append(row)
    trained = [
        row
        for row in rows
        if row["settings"].get("kind") == "baseline" and (row["settings"]["network"], 3) in PUBLISHED_ACCURACY
    ]
    return [*([_trained(trained)] if trained else []), *(_section(group, draw) for group in groups.values())]


def _number(row: Row) -> int:
    return 4 if "cifar100" in row["settings"]["data"] else 3


def _trained(rows: Sequence[Row]) -> Section:
    lines: list[list[Cell]] = []
    for row in rows:
        settings = row["settings"]
        published = PUBLISHED_ACCURACY[settings["network"], _number(row)]
        about = [settings["network"], settings["data"], settings["seed"], settings["epochs"]]
        lines.append([*about, f"{100 * row['accuracy']:.2f}", f"{published:.1f}"])
    columns = ["network", "data", "seed", "epochs", "accuracy (%)", "published (%)"]
    note = "Test accuracy after the last epoch; published: on the data set's original images, after 121 to 701 epochs."
    return Section("The networks of AdjointBackMapV2, trained", "", [Table("Networks", columns, lines, note)])


def _section(rows: Sequence[Row], draw: bool) -> Section:
    settings, number = rows[0]["settings"], _number(rows[0])
    networks = _by_network(rows)
    accuracies = "; ".join(
        f"{name} {100 * layers[0]['accuracy']:.2f} % (published {PUBLISHED_ACCURACY[name, number]:.1f} %)"
        for name, layers in networks.items()
    )
    folded = "folded" if settings["way"] == "folded" else "as trained, nothing folded"
    images, (explained, units) = settings["images"], settings["explained"]
    reduced = f" Reduced: {settings['reduced']}." if settings["reduced"] else ""
    return Section(
        f"Tables and figures of AdjointBackMapV2: units of {settings['data']} networks as their hypersurfaces say",
        "Every convolution but the first, and the fully connected layer; values in front of the layer's own bias; batch norm and "
        f"multipliers {folded}. All units: of {images[0]:,} test images ({images[1]:,} in double precision), by a forward "
        f"derivative along [x; b]. Explicit: {units} random units of {explained} images, layer by layer, by the dot products "
        f"<x, h> + sum <b, h_b>, as published. Networks, test accuracy: {accuracies}.{reduced}",
        tables=[_shares(networks, number), _errors(networks)],
        figures=[
            error_histograms(layers, f"Figure {FIRST_FIGURE[number] + list(PUBLISHED).index(name)}: {name}")
            for name, layers in networks.items()
            if draw
        ],
        reading="The identity is exact; what is left is rounding, which a value near 0 makes large as a relative error. A unit "
        "whose value is exactly 0 counts as right if its reconstruction is 0, too: the smallest positive number stands in for it "
        "in the denominator. " + _verdict(networks, number),
    )


PUBLISHED = dict.fromkeys(name for name, _ in PUBLISHED_ACCURACY)


def _by_network(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (list(PUBLISHED).index(row["settings"]["network"]), row["place"])):
        found.setdefault(row["settings"]["network"], []).append(row)
    return found


def _share(part: Mapping[str, Any]) -> float:
    return 100 * part["within"] / part["units"]


def _percent(share: float) -> str:
    """All digits that tell it from 100 %.

    >>> _percent(100.0), _percent(99.99876)
    ('100', '99.9988')
    """
    return "100" if share == 100 else f"{min(share, 99.9999):.4f}"


def _shares(networks: Mapping[str, Sequence[Row]], number: int) -> Table:
    columns = ["layer"]
    for name in networks:
        columns += [f"{name}, all units", f"{name}, explicit", f"{name}, published"]
    lines: list[list[Cell]] = []
    for place in range(1, max(row["place"] for layers in networks.values() for row in layers) + 1):
        line: list[Cell] = [str(place)]
        for name, layers in networks.items():
            row = next((row for row in layers if row["place"] == place), None)
            published = PUBLISHED_UNITS[name, number]
            ours = [None, None] if row is None else [_percent(_share(row["all"])), _percent(_share(row["explicit"]))]
            line += [*ours, _percent(published[place - 1]) if place <= len(published) else None]
        lines.append(line)
    title = f"Table {number}: units with a relative error of at most 1 % in single precision (%)"
    note = "Layers are counted as in the paper: the last of each network is the fully connected one."
    return Table(title, columns, lines, note)


def _errors(networks: Mapping[str, Sequence[Row]]) -> Table:
    columns = ["network, layer", "units", "exactly 0", "all", "explicit", "all, double", "explicit, double", "apart"]
    lines: list[list[Cell]] = [
        [
            f"{name}, {row['settings']['layer']}",
            row["all"]["units"],
            row["all"]["zeros"],
            *(_relative(row[part]) for part in ("all", "explicit", "all64", "explicit64")),
            f"{row['apart']:.1e}",
        ]
        for name, layers in networks.items()
        for row in layers
    ]
    note = (
        "Largest |reconstructed - value| / the layer's largest |value|, in single and in double precision. Apart: the largest "
        "difference between the two ways for the same units, in single precision, by the same measure."
    )
    return Table("Largest errors, layer by layer", columns, lines, note)


def _relative(part: Mapping[str, Any]) -> str:
    return f"{part['error'] / part['size']:.1e}" if part["size"] else "0"


def _verdict(networks: Mapping[str, Sequence[Row]], number: int) -> str:
    says = []
    for name, layers in networks.items():
        least = min(_share(row["explicit"]) for row in layers)
        count = sum(row["explicit"]["units"] for row in layers)
        within = sum(row["explicit"]["within"] for row in layers)
        says.append(
            f"{name}: {_percent(100 * within / count)} % of {count:,} explicit units are within 1 % (least of a layer "
            f"{_percent(least)} %; published {_percent(min(PUBLISHED_UNITS[name, number]))} %), and "
            f"{_percent(min(_share(row['all']) for row in layers))} % of all units in the worst layer."
        )
    return " ".join(says)


def error_histograms(layers: Sequence[Row], title: str) -> Figure:
    """Draw the relative errors of the units of one network, layer by layer, from -1e-4 to 1e-4, as Figures 6 to 11 do.

    Args:
        layers: rows of kind "adjoint", of one network. title: what is shown.

    Returns:
        A figure with a panel per layer: the share of units in each bin, bars for all units, a line for the explicit ones.
    """
    across = min(ACROSS, len(layers))
    down = math.ceil(len(layers) / across)
    with figure_style():
        figure = Figure(figsize=(0.6 + 2.1 * across, 0.7 + 1.6 * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.flat[len(layers) :]:
            axes.set_visible(False)
        for axes, row in zip(grid.flat, layers, strict=False):
            shares = {part: np.array(row[part]["histogram"]) / row[part]["units"] for part in ("all", "explicit")}
            edges = np.linspace(-EDGE, EDGE, len(shares["all"]) + 1)
            axes.stairs(100 * shares["all"], edges, fill=True, color=BLUE, alpha=0.5)
            axes.stairs(100 * shares["explicit"], edges, color=VERMILLION)
            axes.set_yscale("symlog", linthresh=0.01)
            axes.set_ylim(0, 100)
            axes.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
            axes.set_title(f"{row['place']}: {row['settings']['layer']}", fontsize=8)
            axes.set_xticks([-EDGE, 0, EDGE], ["\u221210\u207b\u2074", "0", "10\u207b\u2074"])
            axes.tick_params(colors=GREY, labelcolor="#222222")
        figure.supxlabel("relative error", fontsize=9)
        figure.supylabel("units (%)", fontsize=9)
        figure.suptitle(f"{title}; all units (blue) and explicit ones (red)", fontsize=9, x=0.01, ha="left")
        fix_layout(figure)
    outside = max((row["explicit"]["below"] + row["explicit"]["above"]) / row["explicit"]["units"] for row in layers)
    figure.set_label(
        f"{title}. Relative errors of units in {len(layers)} layers; within 1e-4 lie at least "
        f"{three_digits(100 * (1 - outside))} % of the explicit units of every layer."
    )
    return figure
