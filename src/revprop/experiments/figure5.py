"""FR-PT Figure 5: the last layer alone, trained towards each embedding of the label, on every data set there is."""

from __future__ import annotations

from dataclasses import replace

from revprop.experiments.baseline import Baseline
from revprop.experiments.grid_study import GridStudy, run
from revprop.experiments.post_training_grid import PostTrainingGrid, Reconstruct

__all__ = ["ALPHAS", "EMBEDDINGS", "run", "settings"]

EMBEDDINGS = tuple(Reconstruct(embedding=embedding) for embedding in ("nearest", "maximum", "one_hot"))
ALPHAS = (0.5, 0.9)
"""Shares of the reconstruction loss beside the published ones: with a small one the embeddings hardly differ."""
DIGITS = PostTrainingGrid(Baseline("digits", "digits", epochs=40, batch_size=64), seeds=tuple(range(10)))


def settings(scale: str, seeds: int | None = None) -> GridStudy:
    """The figure's settings at a scale.

    Args:
        scale: "smoke": scikit-learn's digits and made images; "reduced" and "paper": those of FR-PT's Tables 1 to 6 on the
            data sets that are there, and the digits.
        seeds: so many baselines of each data set instead.

    Raises:
        ValueError: an unknown scale, or fewer than one seed.

    >>> [(grid.baseline.data, grid.alpha) for grid in settings("smoke").grids]
    [('digits', 0.1), ('digits', 0.5), ('digits', 0.9), ('made:mnist', 0.1), ('made:mnist', 0.5), ('made:mnist', 0.9)]
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
    return GridStudy(
        tuple(
            replace(grid, cells=(cell,), fr=EMBEDDINGS, ways=(), alpha=alpha)
            for grid, cell in zip([digits, *grids], cells, strict=True)
            for alpha in dict.fromkeys((grid.alpha, *ALPHAS))  # BP has none: its rows are the same for all
        ),
        name="figure5",
        left_out=tuple(left_out),
    )
