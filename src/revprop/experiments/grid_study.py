"""Several grids of post-trainings as one study and one sweep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from revprop.experiments.post_training_grid import PostTrainingGrid, fresh_caches, grid_tasks
from revprop.runs import Row
from revprop.sweep import SweepOptions, Task, silent, sweep

__all__ = ["GridStudy", "run"]


@dataclass(frozen=True)
class GridStudy:
    """Grids whose cells are run together.

    Attributes:
        name: kept in the settings of the rows, so that they are told from those of the tables; "" where they are the same.
        left_out: of data sets that are not there, what was looked for.
    """

    grids: tuple[PostTrainingGrid, ...]
    name: str = ""
    left_out: tuple[str, ...] = ()


def run(study: GridStudy, folder: Path, **how: Unpack[SweepOptions]) -> list[Row]:
    """Runs what has no row yet in one sweep, and returns all rows of the grids' cells, of kind "post-training".

    Args:
        folder: where baselines and rows are kept; running again continues. That of a table shares its baselines and, where
            the study has no name of its own, its rows.
        how: ``device``, ``report``, ``workers``, ``engine`` of :func:`revprop.sweep.sweep`.

    Raises:
        ValueError: cells that a network does not have, or data and networks that are unknown or do not fit.
        SweepError: some runs failed; all others are stored.
    """
    for why in study.left_out:
        how.get("report", silent)(f"left out: {why}")
    tasks: dict[str, Task] = {}
    with fresh_caches():
        for grid in study.grids:
            for task in grid_tasks(grid, folder.absolute(), how.get("device", "auto"), how.get("report", silent)):
                named = replace(task, name=f"{grid.baseline.network} on {grid.baseline.data}, {task.name}")
                if study.name and task.settings["kind"] == "post-training":
                    named = replace(named, settings={**task.settings, "study": study.name})
                tasks.setdefault(named.key, named)
        rows = sweep(list(tasks.values()), describe=_describe, **how)
    return [row for row in rows if row["settings"]["kind"] == "post-training"]


def _describe(task: Task, row: Row) -> str:
    # a baseline of given weights has an accuracy and no history
    return f"{task.name} {100 * (row['accuracy'] if 'accuracy' in row else row['history'][-1]['accuracy']):.2f} %"
