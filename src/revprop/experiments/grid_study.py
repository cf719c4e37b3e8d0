"""Several grids of post-trainings as one study and one sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from revprop.experiments.post_training_grid import PostTrainingGrid, grid_tasks
from revprop.runs import Row
from revprop.sweep import Task, sweep

__all__ = ["GridStudy", "run", "run_grids"]


@dataclass(frozen=True)
class GridStudy:
    """Grids whose cells are run together.

    Attributes:
        name: kept in the settings of the rows, so that they are told from those of the tables; "" where they are the same.
    """

    grids: tuple[PostTrainingGrid, ...]
    name: str = ""


def run(
    study: GridStudy,
    folder: Path,
    device: str = "auto",
    report: Callable[[str], None] = lambda line: None,
    workers: int | None = None,
    engine: str = "local",
) -> list[Row]:
    """Runs what has no row yet, and returns all rows of the grids' cells.

    Args:
        folder: where baselines and rows are kept; running again continues.
        report: gets one line per finished run. workers, engine: as for :func:`revprop.sweep.sweep`.

    Raises:
        SweepError: some runs failed; all others are stored.
    """
    return run_grids(study.grids, folder, device, report, workers, engine, study.name)


def run_grids(
    grids: Sequence[PostTrainingGrid],
    folder: Path,
    device: str,
    report: Callable[[str], None],
    workers: int | None,
    engine: str,
    study: str = "",
) -> list[Row]:
    """Runs the cells of several grids in one sweep, and returns their rows.

    Args:
        study: where given, kept in the settings of the rows, so that they are told from those of the tables.
    """
    tasks: dict[str, Task] = {}
    for grid in grids:
        for task in grid_tasks(grid, folder, device):
            named = replace(task, name=f"{grid.baseline.network} on {grid.baseline.data}, {task.name}")
            if study and task.settings["kind"] == "post-training":
                named = replace(named, settings={**task.settings, "study": study})
            tasks.setdefault(named.key, named)
    rows = sweep(list(tasks.values()), workers=workers, engine=engine, device=device, report=report, describe=_describe)
    return [row for row in rows if row["settings"]["kind"] == "post-training"]


def _describe(task: Task, row: Row) -> str:
    return f"{task.name} {100 * row.get('accuracy', row.get('history', [{}])[-1].get('accuracy')):.2f} %"
