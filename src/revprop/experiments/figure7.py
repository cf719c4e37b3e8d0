"""FR-PT Figure 7: the CIFAR-10 network with channels that grow (5, 10, 15) against the same with channels that shrink."""

from __future__ import annotations

from dataclasses import replace

from revprop.experiments.grid_study import GridStudy, run

__all__ = ["run", "settings"]


def settings(scale: str, seeds: int | None = None) -> GridStudy:
    """The figure's settings at a scale: the grid of FR-PT's Table 2 with its own network, whose rows it shares,
    and with the reversed one.

    Args:
        scale: "smoke", "reduced" or "paper". seeds: so many baselines of each network instead.

    Raises:
        ValueError: an unknown scale, or fewer than one seed. FileNotFoundError: CIFAR-10 is not there, in any form.

    >>> [grid.baseline.network for grid in settings("smoke").grids]
    ['cifar10', 'cifar10-reversed']
    """
    from revprop.experiments.catalogue import table  # here: the catalogue lists this module

    growing = table(2, scale, seeds)
    return GridStudy((growing, replace(growing, baseline=replace(growing.baseline, network="cifar10-reversed"))))
