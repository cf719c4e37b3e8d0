"""FR-PT Tables 1-6: every module (lS, lR) post-trained by BP and by FR from one baseline per seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from revprop.diagnosis import blocks
from revprop.experiments.baseline import Baseline, Data, _flat, load_baseline
from revprop.graph import trace
from revprop.post_training import PostTraining, post_train
from revprop.runs import RunStore

__all__ = ["PostTrainingGrid", "Reconstruct", "pairs", "post_training_row", "run"]


@dataclass(frozen=True)
class Reconstruct:
    """The options of reconstruction that an FR cell uses; the published ones are greedy with the paper's rules."""

    embedding: str = "nearest"
    strategy: str = "greedy"
    rules: str = "paper"
    damping: float = 0.01
    margin: float = 0.0


@dataclass(frozen=True)
class PostTrainingGrid:
    """One table: a baseline, the modules to train, the methods, the seeds.

    Attributes:
        baseline: what everything starts from; its seed is replaced by each of ``seeds``.
        alpha: the share of the reconstruction loss. epochs: of post-training.
        cells: (start, stop) layer names; None for every pair of the network's blocks.
        bp: whether to run the BP cells. fr: the reconstruction options of the FR cells, one set of cells each.
        reduced: what a reduced run reduces, in words, printed in its table.
    """

    baseline: Baseline = field(default_factory=Baseline)
    alpha: float = 0.1
    epochs: int = 10
    seeds: tuple[int, ...] = (0,)
    cells: tuple[tuple[str, str], ...] | None = None
    bp: bool = True
    fr: tuple[Reconstruct, ...] = (Reconstruct(),)
    reduced: str = ""


def pairs(layers: Sequence[str]) -> Iterator[tuple[int, int, str, str]]:
    """All (lS, lR) with lS < lR in the order of the paper's tables: lR first, with the names of the two layers.

    >>> [(s, r) for s, r, *_ in pairs(["conv1", "fc1"])]
    [(0, 1), (0, 2), (1, 2)]
    """
    names = ["input", *layers]
    for stop in range(1, len(names)):
        for start in range(stop):
            yield start, stop, names[start], names[stop]


def run(
    grid: PostTrainingGrid, folder: Path, device: str = "auto", report: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Runs the grid's cells that have no row yet, and returns all its rows.

    Args:
        folder: where baselines and rows are kept; running again continues.
        report: gets one line per finished cell.
    """
    store = RunStore(folder / "rows")
    data = Data.load(grid.baseline.data, cache=folder / "cache.npz")
    found = []
    for seed in grid.seeds:
        baseline = Baseline(**{**asdict(grid.baseline), "seed": seed})
        model, accuracy, _ = load_baseline(baseline, data, folder, device, progress=True)
        report(f"seed {seed}: baseline {100 * accuracy:.2f} % on the test set")
        graph = trace(model, data.train[0][:2])
        layers = blocks(graph)
        chosen = [p for p in pairs(layers) if grid.cells is None or p[2:] in grid.cells]
        strange = sorted(set(grid.cells or ()) - {p[2:] for p in chosen})
        if strange:
            raise ValueError(f"cells: {strange} are not (start, stop) in forward order of input, {', '.join(layers)}")
        total, done = len(chosen) * (int(grid.bp) + len(grid.fr)), 0
        for l_start, l_stop, start, stop in chosen:
            options: list[tuple[str, Reconstruct | None]] = [("bp", None)] if grid.bp else []
            for method, reconstruct in [*options, *(("fr", r) for r in grid.fr)]:
                settings = {
                    "kind": "post-training",
                    "data": baseline.data,
                    "network": baseline.network,
                    "start": start,
                    "stop": stop,
                    "method": method,
                    "epochs": grid.epochs,
                    "seed": seed,
                    "reduced": grid.reduced,
                    "baseline_epochs": baseline.epochs,
                    "batch_size": baseline.batch_size,
                    **({"alpha": grid.alpha, **asdict(reconstruct)} if reconstruct is not None else {}),
                }

                train = partial(
                    post_train,
                    graph,
                    data.train,
                    start,
                    stop,
                    method=method,  # type: ignore[arg-type]
                    alpha=grid.alpha,
                    epochs=grid.epochs,
                    validation=data.test,
                    seed=seed,
                    device=device,
                    batch_size=baseline.batch_size,
                    **(asdict(reconstruct) if reconstruct else {}),
                )
                row = store.run(settings, partial(_run_cell, train, l_start, l_stop))
                found.append(row)
                done += 1
                last = row["history"][-1]
                report(
                    f"seed {seed}, {done}/{total}: {method.upper()} ({l_start}, {l_stop}) {100 * last['accuracy']:.2f} % "
                    f"after {last['epoch']} epochs, {row['seconds']:.1f} s"
                )
    return found


def post_training_row(result: PostTraining, l_start: int, l_stop: int) -> dict[str, Any]:
    """What is stored of one post-training, (lS, lR) being the numbers of its layers."""
    return {
        "l_start": l_start,
        "l_stop": l_stop,
        "parameters": result.parameters,
        "peak_memory_bytes": result.peak_memory,
        "seconds": result.seconds,
        "target_seconds": result.target_seconds,
        "baseline_accuracy": result.history[0].accuracy,
        "history": [_flat(asdict(e)) for e in result.history],
    }


def _run_cell(train: Callable[[], PostTraining], l_start: int, l_stop: int, _: object) -> dict[str, Any]:
    return post_training_row(train(), l_start, l_stop)
