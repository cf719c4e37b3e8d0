"""Racecar's smoke tests: Table 6 beside the paper's, and Figures 8, 9 and 18 to 21."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from revprop.report.aggregation import Row
from revprop.report.figures import BLUE, GREY, VERMILLION, figure_style, fix_layout
from revprop.report.page import Section
from revprop.report.tables import Cell, Table

__all__ = ["PUBLISHED_SMOKE", "smoke_sections"]

PUBLISHED_SMOKE = {
    ("B1", "std"): (8401.43, 12559.15),
    ("B1", "rr"): (187.03, 41.61),
    ("B1", "scratch"): (28704.33, 5554.11),
    ("B2", "std"): (75.6e7, 119e7),
    ("B2", "rr"): (2.36e7, 0.578e7),
    ("B2", "scratch"): (4.07e7, 1.82e7),
}
"""Racecar Table 6, by task and start: mean and standard deviation over three runs of the L2 loss, in a unit that is not told."""

MODELS = {"std": "Std", "rr": "RR", "scratch": "from scratch"}
COLOURS = {"std": BLUE, "rr": VERMILLION, "scratch": GREY}
FIGURES = {"B1": (18, 19), "B2": (20, 21)}
Pictures = Mapping[str, npt.NDArray[np.float32]]


def smoke_sections(rows: Sequence[Row], draw: bool = True, folder: Path | None = None) -> list[Section]:
    """Make a section of the rows of each setting.

    Args:
        rows: finished runs of any kind; others than "smoke" are left alone. draw: whether to draw the figures.
        folder: where ``pictures`` is; without it, or where a file is not there, no pictures are drawn.

    >>> smoke_sections([])
    []
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        settings = row["settings"]
        if settings.get("kind") == "smoke":
            shared = {name: value for name, value in settings.items() if name not in ("part", "model", "seed")}
            groups.setdefault(json.dumps(shared, sort_keys=True), []).append(row)
    return [_section(group, draw, folder) for group in groups.values()]


def _section(rows: Sequence[Row], draw: bool, folder: Path | None) -> Section:
    settings = rows[0]["settings"]
    parts = [part for part in ("B1", "B2") if _of(rows, part)]
    tables = [_transfers(rows, parts)] if parts else []
    if _of(rows, "A"):
        tables.append(_super_resolution(_of(rows, "A")))
    figures: list[Figure] = []
    if draw:
        figures = [*([_losses(rows, parts)] if parts else []), *_curves_and_pictures(rows, parts, folder)]
    data = "made blobs" if settings["made"] else f"{settings['simulations']} simulations of {settings['frames']} frames"
    reduced = f" Reduced: {settings['reduced']}." if settings["reduced"] else ""
    return Section(
        "Smoke: Table 6, Figures 8, 9 and 18 to 21 of racecar training",
        f"Phase I (A): a GAN enlarges images of plumes four times, from {settings['size'] // 4} to {settings['size']} pixels; Std "
        "without, RR with the penalty on all six layers of the generator (lambda 0.1, mean of squares). Phase II: auto-encoders of "
        "the generator's six layers backwards and then forwards, of the same plumes (B1) and of smoke blown past an obstacle, in "
        "colour (B2: it stands in for the paper's captured smoke; five of six layers fit, as there); they start from A's layers or "
        "from scratch. The paper does not draw its auto-encoders: this is how all six layers and no other can make one, and the "
        f"penalty has trained RR's reverse pass before, which shows in the losses before training. "
        f"Data: {data} of each kind; {settings['training']} are trained on, the others tested on.{reduced}",
        tables=tables,
        figures=figures,
        reading=_verdict(rows, parts),
    )


def _of(rows: Sequence[Row], part: str, model: str | None = None) -> list[Row]:
    """The rows of a part, by seed."""
    found = [r for r in rows if r["settings"]["part"] == part and model in (None, r["settings"]["model"])]
    return sorted(found, key=lambda r: (list(MODELS).index(r["settings"]["model"]), r["settings"]["seed"]))


def _mean_and_deviation(values: Iterable[float]) -> str:
    """Mean and sample standard deviation, with three digits.

    >>> _mean_and_deviation([0.001, 0.003]), _mean_and_deviation([0.5])
    ('2.00e-03 \u00b1 1.4e-03', '5.00e-01')
    """
    found = list(values)
    spread = f" \u00b1 {statistics.stdev(found):.1e}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2e}{spread}"


def _transfers(rows: Sequence[Row], parts: Sequence[str]) -> Table:
    columns = [(part, model) for part in parts for model in MODELS]
    seeds = sorted({row["settings"]["seed"] for part in parts for row in _of(rows, part)})
    found = {(part, model): {r["settings"]["seed"]: r for r in _of(rows, part, model)} for part, model in columns}
    lines: list[list[Cell]] = [
        [f"run {seed + 1}", *(f"{found[c][seed]['l2']:.2e}" if seed in found[c] else None for c in columns)]
        for seed in seeds
    ]

    def line(name: str, say: Callable[[Sequence[Row]], Cell]) -> list[Cell]:
        return [name, *(say(list(found[c].values())) if found[c] else None for c in columns)]

    lines += [
        line("mean \u00b1 deviation", lambda runs: _mean_and_deviation(r["l2"] for r in runs)),
        line("before training", lambda runs: _mean_and_deviation(r["before_l2"] for r in runs)),
        line("a black image", lambda runs: f"{runs[0]['black_l2']:.2e}"),
        [
            "published",
            *(f"{mean:.4g} \u00b1 {deviation:.3g}" for mean, deviation in (PUBLISHED_SMOKE[c] for c in columns)),
        ],
    ]
    heads = [f"{part} {MODELS[model]}" for part, model in columns]
    note = (
        "Mean squared error per pixel of test images, after training. Published: of other data and in a unit that is not told; "
        "only the order of the columns can be compared."
    )
    return Table("Table 6: loss of the auto-encoders", ["", *heads], lines, note)


def _super_resolution(rows: Sequence[Row]) -> Table:
    lines: list[list[Cell]] = []
    for model in ("std", "rr"):
        runs = _of(rows, "A", model)
        if runs:
            errors = (_mean_and_deviation(r[name] for r in runs) for name in ("l2", "input_l2"))
            seconds = statistics.mean(r["seconds_per_step"] for r in runs)
            lines.append([MODELS[model], len(runs), *errors, f"{seconds:.3g}"])
    first = rows[0]
    lines.append(["bilinear interpolation", None, f"{first['enlarged_l2']:.2e}", None, None])
    lines.append(["a black image", None, f"{first['black_l2']:.2e}", f"{first['input_black_l2']:.2e}", None])
    columns = ["generator", "runs", "enlarged image", "regenerated input", "seconds per step"]
    note = "Mean squared error per pixel of test images. A step is one of the generator and one of the discriminator."
    return Table("Phase I: super-resolution, and the input that the reverse pass gives back", columns, lines, note)


def _verdict(rows: Sequence[Row], parts: Sequence[str]) -> str:
    says = []
    input_errors = {model: [r["input_l2"] for r in _of(rows, "A", model)] for model in ("std", "rr")}
    if all(input_errors.values()):
        std, rr = (statistics.mean(input_errors[model]) for model in ("std", "rr"))
        black = _of(rows, "A")[0]["input_black_l2"]
        says.append(
            f"The small image that RR's reverse pass gives back is off by {rr / black:.3g} of a black image's error, Std's by "
            f"{std / black:.3g}."
        )
    for part in parts:
        losses = {m: {r["settings"]["seed"]: r["l2"] for r in _of(rows, part, m)} for m in MODELS}
        for other in ("std", "scratch"):
            pairs = [(losses["rr"][s], losses[other][s]) for s in losses["rr"] if s in losses[other]]
            if pairs:
                ahead = sum(rr < of_other for rr, of_other in pairs)
                than = "Std's" if other == "std" else "that from scratch"
                says.append(f"{part}: RR's loss is below {than} in {ahead} of {len(pairs)} runs.")
    return " ".join(says)


def _losses(rows: Sequence[Row], parts: Sequence[str]) -> Figure:
    """Figure 9: every run a dot, a line for their mean."""
    with figure_style():
        figure = Figure(figsize=(1.0 + 2.8 * len(parts), 3.0), layout="constrained")
        grid = figure.subplots(1, len(parts), squeeze=False)
        told = []
        for axes, part in zip(grid.flat, parts, strict=True):
            for place, model in enumerate(MODELS):
                losses = [r["l2"] for r in _of(rows, part, model)]
                if not losses:
                    continue
                axes.hlines(statistics.mean(losses), place - 0.25, place + 0.25, color=COLOURS[model])
                axes.plot([place] * len(losses), losses, "o", color=COLOURS[model], markersize=4, alpha=0.6)
                told.append(f"{part} {MODELS[model]} {statistics.mean(losses):.2e}")
            axes.set_xticks(range(len(MODELS)), list(MODELS.values()))
            axes.set_xlim(-0.5, len(MODELS) - 0.5)
            axes.set_yscale("log")
            axes.set_title(f"task {part}", fontsize=9)
        grid[0, 0].set_ylabel("mean squared error")
        fix_layout(figure)
    figure.set_label(f"Figure 9: test loss of the auto-encoders. Means: {', '.join(told)}.")
    return figure


def _curves_and_pictures(rows: Sequence[Row], parts: Sequence[str], folder: Path | None) -> list[Figure]:
    figures = []
    first = min(row["settings"]["seed"] for row in rows)
    kept = {
        (part, model): pictures
        for part in ("A", "B1", "B2")
        for model in MODELS
        for row in _of(rows, part, model)
        if row["settings"]["seed"] == first and (pictures := _pictures(row, folder)) is not None
    }
    if ("A", "std") in kept and ("A", "rr") in kept:
        figures.append(_enlarged(kept["A", "std"], kept["A", "rr"]))
    for part in parts:
        figures.append(_curves(rows, part))
        shown = {model: kept[part, model] for model in MODELS if (part, model) in kept}
        if shown:
            figures.append(_reproduced(part, shown))
    return figures


def _pictures(row: Row, folder: Path | None) -> Pictures | None:
    if folder is None or not (folder / row["pictures"]).exists():
        return None
    with np.load(folder / row["pictures"]) as file:
        return {name: file[name].astype(np.float32) for name in file.files}


def _curves(rows: Sequence[Row], part: str) -> Figure:
    """Figures 18 and 20: the loss of training by epoch; a thin line per run, a thick one for their mean."""
    with figure_style():
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = figure.subplots()
        told = []
        for model, name in MODELS.items():
            curves = [[e["loss"] for e in row["history"]] for row in _of(rows, part, model)]
            if not curves:
                continue
            epochs = range(1, len(curves[0]) + 1)
            for curve in curves:
                axes.plot(epochs, curve, color=COLOURS[model], alpha=0.3, linewidth=0.8)
            mean = np.mean(np.array(curves), axis=0)
            axes.plot(epochs, mean, color=COLOURS[model], label=name)
            told.append(f"{name} {mean[-1]:.2e}")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("epoch of phase II")
        axes.set_ylabel("training loss")
        axes.legend(frameon=False)
        fix_layout(figure)
    figure.set_label(
        f"Figure {FIGURES[part][0]}: training of the auto-encoders of {part}. Last means: {', '.join(told)}."
    )
    return figure


def _show(axes: Any, image: npt.NDArray[np.float32], title: str = "", **options: Any) -> Any:
    """One picture, (channels, h, w); what lies outside [0, 1] is clipped."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=8)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1, **options}
    picture = image[0] if len(image) == 1 else np.clip(np.moveaxis(image, 0, -1), 0, 1)
    return axes.imshow(picture, interpolation="nearest", **(grey if len(image) == 1 else {}))


def _enlarged(std: Pictures, rr: Pictures) -> Figure:
    """Figure 8: small image, what either reverse pass gives back, what either generator makes of it, and the reference."""
    columns = [
        ("input", std["low"]),
        ("regenerated, Std", std["regenerated"]),
        ("regenerated, RR", rr["regenerated"]),
        ("output, Std", std["output"]),
        ("output, RR", rr["output"]),
        ("reference", std["reference"]),
    ]
    count = len(std["low"])
    with figure_style():
        figure = Figure(figsize=(1.5 * len(columns), 0.3 + 1.5 * count), layout="constrained")
        grid = figure.subplots(count, len(columns), squeeze=False)
        for line in range(count):
            for axes, (title, images) in zip(grid[line], columns, strict=True):
                _show(axes, images[line], title if line == 0 else "")
        fix_layout(figure)
    figure.set_label(
        f"Figure 8: {count} small test images, what the reverse pass of Std and of RR gives back for them, what both generators "
        "make of them, and the large images they were made of."
    )
    return figure


def _reproduced(part: str, shown: Mapping[str, Pictures]) -> Figure:
    """Figures 19 and 21: what the auto-encoders make of test images, and how far that is off."""
    reference = next(iter(shown.values()))["reference"]
    errors = {model: np.abs(p["output"] - reference).mean(axis=1, keepdims=True) for model, p in shown.items()}
    most = max(float(e.max()) for e in errors.values())
    count = len(reference)
    with figure_style():
        figure = Figure(figsize=(1.0 + 1.5 * (len(shown) + 1), 0.3 + 3.1 * count), layout="constrained")
        grid = figure.subplots(2 * count, len(shown) + 1, squeeze=False)
        image: Any = None
        for i in range(count):
            for j, (model, pictures) in enumerate(shown.items()):
                _show(grid[2 * i, j], pictures["output"][i], MODELS[model])
                told = f"|error|, mean {errors[model][i].mean():.3f}"
                image = _show(grid[2 * i + 1, j], errors[model][i], told, cmap="viridis", vmax=most)
            _show(grid[2 * i, len(shown)], reference[i], "reference")
            grid[2 * i + 1, len(shown)].set_visible(False)
        bar = figure.colorbar(image, ax=grid[:, -1].tolist(), shrink=0.5)
        bar.outline.set_visible(False)
        fix_layout(figure)
    told = ", ".join(f"{MODELS[model]} {float(e.mean()):.3f}" for model, e in errors.items())
    figure.set_label(
        f"Figure {FIGURES[part][1]}: auto-encoded test images of {part} and their absolute errors. Means: {told}."
    )
    return figure
