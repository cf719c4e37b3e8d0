"""Beyond the paper: the fully connected layers by BP, FR as published, FR with a margin, closed form, and one after the other.

Options are those that :mod:`revprop.experiments.ablation` found best on held-out training images; nothing is chosen on a test set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from revprop.closed_form import ClosedForm
from revprop.experiments.ablation import MODULES
from revprop.experiments.baseline import Baseline
from revprop.experiments.grid_study import GridStudy, run
from revprop.experiments.post_training_grid import PostTrainingGrid, Reconstruct, Way

__all__ = ["CHOSEN", "Chosen", "run", "settings"]


@dataclass(frozen=True)
class Chosen:
    """What the ablation chose for one data set.

    Attributes:
        closed_form: for the closed form. alpha, margin: for FR.
    """

    closed_form: ClosedForm
    alpha: float
    margin: float

    def ways(self) -> tuple[Way, ...]:
        """FR with these options, closed form, and closed form followed by BP and by FR."""
        fr = Way("fr", {"alpha": self.alpha, "margin": self.margin})
        solve = Way("solve", {"closed_form": self.closed_form})
        return fr, solve, Way("bp", first=solve), replace(fr, first=solve)


CHOSEN = {
    1: Chosen(ClosedForm((5.0,), (0.01,), 24, 5_000, None), 0.1, 5.0),
    2: Chosen(ClosedForm((10.0,), (3.0,), 12, 5_000, 25_000), 0.5, 10.0),
    4: Chosen(ClosedForm((15.0,), (10.0,), 12, 5_000, 20_000), 0.9, 10.0),
}
"""By number of the paper's table: of the ablation's settings the best on held-out images, the fastest where several are within 0.2
points of it."""


def settings(scale: str, seeds: int | None = None) -> GridStudy:
    """The study's settings at a scale.

    Args:
        scale: "smoke": scikit-learn's digits, one epoch, one seed; "reduced": 3 seeds; "paper": 10 seeds; both on the data sets
            of CHOSEN that are there. seeds: so many instead.

    Raises:
        ValueError: an unknown scale, or fewer than one seed.

    >>> [way.method for way in settings("smoke").grids[0].ways]
    ['fr', 'fr', 'solve', 'bp', 'fr']
    """
    from revprop.experiments.catalogue import table  # here: the catalogue lists this module

    published = Way("fr", asdict(Reconstruct()))
    if scale == "smoke":
        table(1, scale, seeds)  # refuses what is to be refused
        grid = PostTrainingGrid(
            Baseline("digits", "digits", 10, batch_size=64),
            epochs=1,
            seeds=tuple(range(seeds or 1)),
            cells=(("conv2", "fc2"),),
            fr=(),
            ways=(published, *Chosen(ClosedForm((10.0,), (0.1,)), 0.5, 10.0).ways()),
            reduced="1 epoch",
        )
        return GridStudy((grid,))
    grids: list[PostTrainingGrid] = []
    for number, chosen in CHOSEN.items():
        try:
            grid = table(number, "paper", seeds or (3 if scale == "reduced" else 10))
        except FileNotFoundError:
            continue
        grids.append(replace(grid, bp=True, cells=MODULES[number][:1], ways=(published, *chosen.ways())))
    return GridStudy(tuple(grids))
