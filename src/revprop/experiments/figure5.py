"""FR-PT Figure 5: the last layer alone, trained towards each embedding of the label, on every data set there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from revprop.experiments.baseline import Baseline
from revprop.experiments.grid_study import run_grids
from revprop.experiments.post_training_grid import PostTrainingGrid, Reconstruct
from revprop.runs import Row

__all__ = ["Figure5", "run", "settings"]

EMBEDDINGS = tuple(Reconstruct(embedding=embedding) for embedding in ("nearest", "maximum", "one_hot"))
DIGITS = PostTrainingGrid(Baseline("digits", "digits", epochs=40, batch_size=64), seeds=tuple(range(10)))


@dataclass(frozen=True)
class Figure5:
    """The figure.

    Attributes:
        grids: one per data set, of one cell each: its last layer. Their alphas are the published ones.
        alphas: further shares of the reconstruction loss to try on each: with a small one the embeddings hardly differ.
        left_out: of data sets that are not there, what was looked for.
    """

    grids: tuple[PostTrainingGrid, ...]
    alphas: tuple[float, ...] = (0.5, 0.9)
    left_out: tuple[str, ...] = ()


def settings(scale: str, seeds: int | None = None) -> Figure5:
    """The figure's settings at a scale.

    Args:
        scale: "smoke": scikit-learn's digits and made images; "reduced" and "paper": those of FR-PT's Tables 1 to 6 on the
            data sets that are there, and the digits.
        seeds: so many baselines of each data set instead.

    Raises:
        ValueError: an unknown scale, or fewer than one seed.

    >>> [grid.baseline.data for grid in settings("smoke").grids]
    ['digits', 'made:mnist']
    """
    from revprop.experiments.catalogue import table  # here: the catalogue lists this module

    grids, left_out = [], []
    for number in (1,) if scale == "smoke" else range(1, 7):
        try:
            grids.append(table(number, scale, seeds))
        except FileNotFoundError as error:
            left_out.append(str(error))
    digits = replace(DIGITS, seeds=tuple(range(seeds)) if seeds else DIGITS.seeds)
    if scale == "smoke":
        digits = replace(digits, baseline=replace(digits.baseline, epochs=10), epochs=3, seeds=tuple(range(seeds or 2)))
    elif scale == "reduced":
        digits = replace(digits, seeds=grids[0].seeds if grids else tuple(range(seeds or 3)))
    cells = [("conv2", "fc1") if grid.baseline.network == "mnist" else ("fc1", "fc2") for grid in [digits, *grids]]
    return Figure5(
        tuple(
            replace(grid, cells=(cell,), fr=EMBEDDINGS, ways=())
            for grid, cell in zip([digits, *grids], cells, strict=True)
        ),
        left_out=tuple(left_out),
    )


def run(
    figure: Figure5,
    folder: Path,
    device: str = "auto",
    report: Callable[[str], None] = lambda line: None,
    workers: int | None = None,
    engine: str = "local",
) -> list[Row]:
    """Post-trains the last layers that have no row yet, and returns all rows.

    Args:
        folder: where baselines and rows are kept; running again continues. That of a table shares its baselines.
        report: gets one line per finished run. workers, engine: as for :func:`revprop.sweep.sweep`.

    Returns:
        rows of kind "post-training", with "figure5" as the ``study`` of their settings.

    Raises:
        SweepError: some runs failed.
    """
    for why in figure.left_out:
        report(f"left out: {why}")
    grids = [
        replace(grid, alpha=alpha)
        for grid in figure.grids
        for alpha in dict.fromkeys((grid.alpha, *figure.alphas))  # BP has none: its rows are the same for all
    ]
    return run_grids(grids, folder, device, report, workers, engine, study="figure5")
