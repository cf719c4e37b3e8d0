"""Sweeps: hundreds of independent small runs on all cores of one machine, or on a cluster, with the same rows either way.

Each run stores its row by itself (:class:`revprop.runs.RunStore`), so whatever dies, a worker or the sweep, loses only
the runs it was at: the same sweep again runs what has no row yet.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from revprop.errors import near_matches
from revprop.runs import Row, RunStore
from revprop.workers import Here, Outcome, Processes, RayActors, Workers, count_cores

__all__ = ["ENGINES", "Failure", "SweepError", "SweepOptions", "Task", "silent", "sweep"]

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Task:
    """One run of a sweep.

    Attributes:
        name: for people; folder, settings: where its row is and what names it there (:meth:`RunStore.run`).
        function: one that can be imported, since workers do; ``function(*arguments)`` gives the result that is stored.
        arguments: anything that can be pickled.
        after: another task of the sweep, whose row this one needs.

    >>> task = Task("the twelfth", Path("runs"), {"n": 12}, dict, ([("half", 6)],))
    >>> task.key == f"runs/{RunStore(Path('runs')).key({'n': 12})}"
    True
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    function: Callable[..., Mapping[str, Any]]
    arguments: tuple[Any, ...] = ()
    after: Task | None = None

    @property
    def key(self) -> str:
        """The folder and the name of its row."""
        return f"{self.folder}/{RunStore(self.folder).key(self.settings)}"

    def row(self) -> Row | None:
        """Its row, or None where it is still to be run."""
        return RunStore(self.folder).get(self.settings)


def silent(line: str) -> None:
    """Says nothing of a finished run."""


class SweepOptions(TypedDict, total=False):
    """What an experiment hands on to :func:`sweep`, which says what each means."""

    device: str
    report: Callable[[str], None]
    workers: int | None
    engine: str


@dataclass(frozen=True)
class Failure:
    """A run without a row: why, in words; ``details`` holds the traceback where there is one."""

    task: Task
    message: str
    details: str = ""


class SweepError(RuntimeError):
    """Some runs of a sweep failed; all others are stored. ``failures`` holds one :class:`Failure` each."""

    def __init__(self, failures: Sequence[Failure], total: int) -> None:
        self.failures = tuple(failures)
        lines = [
            f"  {f.task.name}: {f.message}\n    settings: {json.dumps(dict(f.task.settings), default=str)}"
            for f in failures
        ]
        kept = total - len(failures)
        super().__init__(
            f"{len(failures)} of {total} runs failed; the other {kept} are stored, and the same command again runs the "
            "failed ones only:\n" + "\n".join(lines)
        )


def sweep(
    tasks: Sequence[Task],
    *,
    workers: int | None = None,
    engine: str = "local",
    device: str = "auto",
    report: Callable[[str], None] = silent,
    describe: Callable[[Task, Row], str] = lambda task, row: task.name,
    deaths: int = 3,
) -> list[Row]:
    """Run the tasks that have no row yet, and return the rows of all.

    A run that raises stops no other. A worker that dies (killed, out of memory) is replaced, and its run is tried again.

    Args:
        tasks: the runs, in the order they are wanted; two with the same row are one run.
        workers: how many at once. None: one per GPU where the device is one, else one per core. 1: in this process.
        engine: "local": spawned processes of this machine, one thread each; "ray": actors of a Ray cluster.
        device: what the tasks run on: it decides ``workers``, and that each worker sees one GPU.
        report: gets a line per finished run, with an estimate of the time left; a terminal gets a progress bar instead.
        describe: what to say of a finished run.
        deaths: a run whose workers die so many times has failed.

    Returns:
        one row per task, in the order given.

    Raises:
        SweepError: some runs failed: raised when all others are done.
        ValueError: an unknown engine, fewer than one worker, or a task that cannot be sent to a worker; nothing is run.
        ImportError: engine "ray" without Ray.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tasks = [Task(f"n={n}", Path(folder), {"n": n}, dict, ([("twice", 2 * n)],)) for n in range(3)]
    ...     rows = sweep(tasks, workers=1)
    >>> [row["twice"] for row in rows]
    [0, 2, 4]
    """
    if engine not in ENGINES:
        raise ValueError(near_matches(engine, ENGINES, "engine"))
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected at least 1, given {workers}")
    run = _Sweep(tasks, report, describe, deaths)
    if run.waiting:
        run.all(_workers(engine, workers, len(run.waiting), _gpus(device)))
    if run.failures:
        raise SweepError(run.failures, len(run.tasks))
    return [run.rows[task.key] for task in tasks]


def _gpus(device: str) -> list[str]:
    """What each worker may see, as CUDA_VISIBLE_DEVICES names it; "" where there is no choice; nothing for a CPU."""
    kind, _, index = device.partition(":")
    if kind == "mps" or (kind == "auto" and not torch.cuda.is_available() and torch.backends.mps.is_available()):
        return [""]
    if kind not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    if index or count == 1:  # a task that names its device by a number must see them all
        return [""]
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return given if len(given) == count else [str(i) for i in range(count)]


def _workers(engine: str, asked: int | None, runs: int, gpus: Sequence[str]) -> Workers:
    if engine == "ray":
        return RayActors(asked, gpu=bool(gpus))
    count = asked or len(gpus) or count_cores()
    # one run of many cores' sweep is no reason for other numbers: this process is for those who ask for one worker
    return Here() if count == 1 else Processes(min(count, runs), [] if gpus == [""] else gpus)


class _Sweep:
    """What of a sweep is finished, waiting, running and failed; tasks go by the keys of their rows."""

    def __init__(
        self,
        tasks: Sequence[Task],
        report: Callable[[str], None],
        describe: Callable[[Task, Row], str],
        deaths: int,
    ) -> None:
        self.tasks = {task.key: task for task in tasks}
        self.rows = {key: row for key, task in self.tasks.items() if (row := task.row()) is not None}
        self.waiting = [key for key in self.tasks if key not in self.rows]
        self.failures: list[Failure] = []
        self.describe, self.most_deaths = describe, deaths
        self._deaths: dict[str, int] = {}
        self._jobs = {key: _job(self.tasks[key]) for key in self.waiting}
        self.progress = _Progress(len(self.tasks), len(self.rows), report)

    def all(self, workers: Workers) -> None:
        """Runs what is waiting, as much at once as there are workers."""
        running: set[str] = set()
        try:
            with self.progress:
                while True:
                    while workers.free() and (key := self._next()) is not None:
                        running.add(key)
                        workers.submit(key, self._jobs[key])
                    if not running:
                        break
                    for key, outcome in workers.wait():
                        running.remove(key)
                        self._settle(key, outcome, workers.free() + len(running))
        finally:
            workers.close()
        for task in (self.tasks[key] for key in self.waiting):
            assert task.after is not None
            self.failures.append(Failure(task, f"not started, since it needs {task.after.name}"))

    def _next(self) -> str | None:
        for i, key in enumerate(self.waiting):
            needed = self.tasks[key].after
            if needed is None or needed.key in self.rows or (needed.key not in self.tasks and needed.row() is not None):
                return self.waiting.pop(i)
        return None

    def _settle(self, key: str, outcome: Outcome, workers: int) -> None:
        task = self.tasks[key]
        row = task.row()  # also of one whose worker died behind it
        if row is not None:
            self.rows[key] = row
            self.progress.finished(self.describe(task, row), outcome.seconds, workers)
            return
        deaths = self._deaths[key] = self._deaths.get(key, 0) + (outcome.kind == "died")
        if outcome.kind == "lost" or (outcome.kind == "died" and deaths < self.most_deaths):
            self.waiting.append(key)
            self.progress.note(f"{task.name}: {outcome.message}; it is tried again")
            return
        message = outcome.message
        if outcome.kind == "finished":
            message = f"it ended without a row in {task.folder}: is that one folder for all workers?"
        elif outcome.kind == "died":
            message = f"its worker died {deaths} times; the last time: {message}"
        self.failures.append(Failure(task, message, outcome.details))
        self.progress.note(f"{task.name} failed: {message}")


def _store(
    folder: Path,
    settings: Mapping[str, Any],
    function: Callable[..., Mapping[str, Any]],
    arguments: tuple[Any, ...],
) -> None:
    """What a worker runs."""
    RunStore(folder).run(settings, lambda _: function(*arguments))


def _job(task: Task) -> bytes:
    try:
        return pickle.dumps((_store, (task.folder, task.settings, task.function, task.arguments)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{task.name}: cannot be sent to a worker ({error}): give a function that can be imported, not one defined "
            "inside another, and arguments that can be pickled"
        ) from error


class _Progress:
    """How far a sweep is, and about how long it will take: a bar on a terminal, else a line per run."""

    def __init__(self, total: int, before: int, report: Callable[[str], None]) -> None:
        console = Console(stderr=True)
        self._total, self._done, self._before, self._report = total, before, before, report
        self._seconds: list[float] = []
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, completed=before, left="")

    def __enter__(self) -> None:
        if self._before:
            self.note(f"{self._before} of {self._total} runs were finished before")
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def finished(self, line: str, seconds: float, workers: int) -> None:
        self._done += 1
        self._seconds.append(seconds)
        to_come = self._total - self._done
        mean = sum(self._seconds) / len(self._seconds)
        left = f"about {_duration(mean * to_come / min(workers, to_come))} left" if to_come else ""
        self._bar.update(self._task, completed=self._done, description=line, left=left)
        if self._bar.disable:
            self._report(f"{self._done}/{self._total} {line}" + (f"; {left}" if left else ""))

    def note(self, line: str) -> None:
        if self._bar.disable:
            self._report(line)
        else:
            self._bar.console.print(line)


def _duration(seconds: float) -> str:
    """
    >>> _duration(0.4), _duration(100), _duration(5000)
    ('1 s', '2 min', '1.4 h')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
