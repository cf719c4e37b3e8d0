"""FR-PT Figure 7: the CIFAR-10 network with channels that grow (5, 10, 15) against the same with channels that shrink."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from revprop.experiments.grid_study import run_grids
from revprop.experiments.post_training_grid import PostTrainingGrid
from revprop.runs import Row

__all__ = ["Figure7", "run", "settings"]


@dataclass(frozen=True)
class Figure7:
    """The figure: the grid of FR-PT's Table 2 with its own network, and with the reversed one."""

    growing: PostTrainingGrid
    shrinking: PostTrainingGrid


def settings(scale: str, seeds: int | None = None) -> Figure7:
    """The figure's settings at a scale: those of FR-PT's Table 2, for both networks.

    Args:
        scale: "smoke", "reduced" or "paper". seeds: so many baselines of each network instead.

    Raises:
        ValueError: an unknown scale, or fewer than one seed. FileNotFoundError: CIFAR-10 is not there, in any form.

    >>> settings("smoke").shrinking.baseline.network
    'cifar10-reversed'
    """
    from revprop.experiments.catalogue import table  # here: the catalogue lists this module

    growing = table(2, scale, seeds)
    return Figure7(growing, replace(growing, baseline=replace(growing.baseline, network="cifar10-reversed")))


def run(
    figure: Figure7,
    folder: Path,
    device: str = "auto",
    report: Callable[[str], None] = lambda line: None,
    workers: int | None = None,
    engine: str = "local",
) -> list[Row]:
    """Runs the cells of both networks that have no row yet, and returns all rows, of kind "post-training".

    Args:
        folder: where baselines and rows are kept; running again continues. That of Table 2 has half of the rows.
        report: gets one line per finished run. workers, engine: as for :func:`revprop.sweep.sweep`.

    Raises:
        SweepError: some runs failed.
    """
    return run_grids((figure.growing, figure.shrinking), folder, device, report, workers, engine)
