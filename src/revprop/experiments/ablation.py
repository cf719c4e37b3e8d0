"""What each option of post-training is worth, measured on held-out training images: defaults are chosen here, not on a test set."""

from __future__ import annotations

from dataclasses import asdict, replace

from revprop.closed_form import ClosedForm
from revprop.experiments.baseline import Baseline
from revprop.experiments.grid_study import GridStudy, run
from revprop.experiments.post_training_grid import PostTrainingGrid, Reconstruct, Way

__all__ = ["closed", "run", "settings"]


def closed(margin: float, damping: float, **options: int) -> Way:
    """Closed form with one margin and one damping.

    >>> closed(10, 1).options["closed_form"].margins
    (10,)
    """
    return Way("solve", {"closed_form": ClosedForm((margin,), (damping,), **options)})


def fr(**options: object) -> Way:
    """Towards reconstructed features, alpha 0.5 where nothing else is said."""
    return Way("fr", {"alpha": 0.5, **options})


MARGIN = fr(margin=10.0)
PUBLISHED = asdict(Reconstruct())

# the module reaches the output: wanted features are the embedding itself
AT_THE_OUTPUT = (
    Way("bp", {"learning_rate": 3e-4}),
    fr(),
    fr(alpha=0.9),
    fr(embedding="maximum"),
    fr(embedding="one_hot"),
    fr(margin=3.0),
    fr(alpha=0.1, margin=5.0),
    MARGIN,
    fr(margin=10.0, alpha=0.9),
    fr(margin=10.0, rescale=True),
    fr(margin=10.0, learning_rate=3e-4),
    fr(margin=10.0, refresh=1),
    *(closed(margin, damping) for margin in (5.0, 10.0, 15.0) for damping in (0.01, 0.1, 1.0, 10.0)),
    closed(5.0, 0.01, sweeps=24),
    closed(10.0, 1.0, sweeps=24),
    closed(10.0, 3.0, samples=25_000),
    closed(15.0, 10.0, samples=20_000),
    replace(MARGIN, first=closed(10.0, 1.0)),
    Way("bp", first=closed(10.0, 1.0)),
)

# the module ends inside: wanted features are reconstructed
INSIDE = (
    fr(**PUBLISHED),
    fr(strategy="greedy"),
    fr(strategy="greedy", damping=0.0),
    fr(strategy="greedy", damping=0.1),
    fr(strategy="greedy", solver="exact"),
    fr(),
    fr(rescale=True),
    MARGIN,
    fr(margin=10.0, rescale=True),
    fr(margin=10.0, refresh=1),
    closed(10.0, 1.0),
)

MODULES = {
    1: (("conv2", "fc1"), ("conv1", "conv2")),
    2: (("conv3", "fc2"), ("conv2", "fc1")),
    4: (("conv4", "fc2"), ("conv3", "fc1")),
}
"""Of each of the paper's tables whose data is there: the fully connected layers, and a module that ends inside."""


def settings(scale: str, seeds: int | None = None) -> GridStudy:
    """The study's settings at a scale.

    Args:
        scale: "smoke": scikit-learn's digits, one epoch, one seed; "reduced": the data sets of MODULES that are there, 3 seeds;
            "paper": 10 seeds. seeds: so many instead.

    Raises:
        ValueError: an unknown scale, or fewer than one seed.

    >>> [grid.baseline.holdout for grid in settings("smoke").grids]
    [0.1, 0.1]
    """
    from revprop.experiments.catalogue import table  # here: the catalogue lists this module

    if scale == "smoke":
        table(1, scale, seeds)  # refuses what is to be refused
        baseline = Baseline("digits", "digits", 5, batch_size=64, holdout=0.1)
        grid = PostTrainingGrid(baseline, epochs=1, seeds=tuple(range(seeds or 1)), fr=(), reduced="1 epoch")
        return GridStudy(_grids(grid, (("conv2", "fc2"), ("conv1", "fc1"))), "ablation")
    grids: list[PostTrainingGrid] = []
    for number, modules in MODULES.items():
        try:
            grid = table(number, "paper", seeds or (3 if scale == "reduced" else 10))
        except FileNotFoundError:
            continue
        grids += _grids(replace(grid, baseline=replace(grid.baseline, holdout=0.1)), modules)
    return GridStudy(tuple(grids), "ablation")


def _grids(grid: PostTrainingGrid, modules: tuple[tuple[str, str], tuple[str, str]]) -> tuple[PostTrainingGrid, ...]:
    published = Way("fr", {**PUBLISHED, "alpha": grid.alpha})
    return tuple(
        replace(grid, bp=True, fr=(), cells=(module,), ways=(published, *ways))
        for module, ways in zip(modules, (AT_THE_OUTPUT, INSIDE), strict=True)
    )
