"""FR-PT Tables 1-6: every module (lS, lR) post-trained by BP, by FR and by other ways from one baseline per seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

from revprop.diagnosis import blocks
from revprop.errors import near_matches
from revprop.experiments.baseline import (
    Baseline,
    Data,
    _flat,
    baseline_row,
    build_network,
    load_baseline,
    load_baseline_data,
)
from revprop.graph import Graph, trace
from revprop.post_training import METHODS, PostTraining, module_parameters, post_train
from revprop.runs import Row
from revprop.sweep import SweepOptions, Task, silent, sweep

__all__ = ["PostTrainingGrid", "Reconstruct", "Way", "fresh_caches", "grid_tasks", "pairs", "post_training_row", "run"]


@dataclass(frozen=True)
class Reconstruct:
    """The options of reconstruction that an FR cell uses; the published ones are greedy with the paper's rules."""

    embedding: str = "nearest"
    strategy: str = "greedy"
    rules: str = "paper"
    damping: float = 0.01
    margin: float = 0.0


@dataclass(frozen=True)
class Way:
    """One way to post-train a module.

    Attributes:
        method: as :func:`revprop.post_train` names it. options: its keywords; what is not named is as it is there, but for
            "fr" the share of the reconstruction loss, alpha, is the grid's.
        first: another way that trains the module before this one goes on from there.

    >>> Way("fr", {"strategy": "greedy", "margin": 0.5}).settings(alpha=0.1)
    {'method': 'fr', 'alpha': 0.1, 'embedding': 'nearest', 'strategy': 'greedy', 'rules': 'nearest', 'damping': 0.01,
     'margin': 0.5}
    >>> Way("bp", {"learning_rate": 0.01}).settings(alpha=0.1)
    {'method': 'bp', 'learning_rate': 0.01}
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    first: Way | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(near_matches(self.method, METHODS, "method"))
        for name in self.options:
            if name not in _options():
                raise ValueError(near_matches(name, _options(), "option of post_train"))

    def keywords(self, alpha: float) -> dict[str, Any]:
        """What it gives to post_train beside the module, the data and the epochs."""
        return {"method": self.method, **({"alpha": alpha} if self.method == "fr" else {}), **self.options}

    def settings(self, alpha: float) -> dict[str, Any]:
        """What names its rows: the method, for "fr" how it reconstructs, for "solve" what it goes by, and every other option
        that is not as usual."""
        given, usual = self.keywords(alpha), _options()
        always = {"fr": ("alpha", *asdict(Reconstruct())), "solve": ("closed_form",)}.get(self.method, ())
        found = {"method": self.method, **{name: given.get(name, usual[name]) for name in always}}
        found |= {name: value for name, value in given.items() if name not in found and value != usual[name]}
        return found | ({} if self.first is None else {"first": self.first.settings(alpha)})


@lru_cache(maxsize=1)
def _options() -> dict[str, Any]:
    """The options of post_train that a way may have, with their defaults; the grid itself gives the others."""
    grid = ("method", "epochs", "validation", "batch_size", "seed", "device", "checkpoint", "memory_budget", "progress")
    parameters = inspect.signature(post_train).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in grid}


@dataclass(frozen=True)
class PostTrainingGrid:
    """One table: a baseline, the modules to train, the methods, the seeds.

    Attributes:
        baseline: what everything starts from; its seed is replaced by each of ``seeds``.
        alpha: the share of the reconstruction loss. epochs: of post-training.
        cells: (start, stop) layer names, also of layers inside of blocks; None for every pair of the network's blocks.
        bp: whether to run the BP cells. fr: the reconstruction options of the FR cells, one set of cells each.
        ways: further ways to train each module.
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
    ways: tuple[Way, ...] = ()

    def all_ways(self) -> list[Way]:
        """BP, FR and the further ones, in this order."""
        return [*([Way("bp")] if self.bp else []), *(Way("fr", asdict(r)) for r in self.fr), *self.ways]

    def cell_settings(self, seed: int, start: str, stop: str, way: Way) -> dict[str, Any]:
        """What names the row of one cell."""
        baseline = self.baseline
        rate = {} if baseline.learning_rate == 1e-3 else {"baseline_learning_rate": baseline.learning_rate}
        return {
            "kind": "post-training",
            "data": baseline.data,
            "network": baseline.network,
            "start": start,
            "stop": stop,
            "epochs": self.epochs,
            "seed": seed,
            "reduced": self.reduced,
            "baseline_epochs": baseline.epochs,
            "batch_size": baseline.batch_size,
            **rate,
            **baseline.unusual(),
            **way.settings(self.alpha),
        }


def pairs(layers: Sequence[str]) -> Iterator[tuple[int, int, str, str]]:
    """All (lS, lR) with lS < lR in the order of the paper's tables: lR first, with the names of the two layers.

    >>> [(s, r) for s, r, *_ in pairs(["conv1", "fc1"])]
    [(0, 1), (0, 2), (1, 2)]
    """
    names = ["input", *layers]
    for stop in range(1, len(names)):
        for start in range(stop):
            yield start, stop, names[start], names[stop]


def run(grid: PostTrainingGrid, folder: Path, **how: Unpack[SweepOptions]) -> list[Row]:
    """Runs the grid's baselines and cells that have no row yet, and returns the rows of all its cells.

    Args:
        folder: where baselines and rows are kept; running again continues.
        how: ``device``, ``report``, ``workers``, ``engine`` of :func:`revprop.sweep.sweep`.

    Raises:
        ValueError: cells that the network does not have, or data and networks that are unknown or do not fit.
        SweepError: some runs failed; all others are stored.
    """
    with fresh_caches():
        tasks = grid_tasks(
            grid, folder.absolute(), how.get("device", "auto"), how.get("report", silent)
        )  # workers of a cluster may start in another folder
        rows = sweep(tasks, describe=_describe, **how)
    return rows[len(grid.seeds) :]


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Nothing that was read before is used inside, since files may have changed, and nothing read inside is kept."""

    def clear() -> None:
        for cached in (_data, _start):
            cached.cache_clear()

    clear()
    try:
        yield
    finally:
        clear()


def grid_tasks(
    grid: PostTrainingGrid, folder: Path, device: str = "auto", report: Callable[[str], None] = lambda line: None
) -> list[Task]:
    """The grid as tasks: one baseline for each seed, then all cells, seed by seed.

    Args:
        report: gets a line for each pair of blocks that is left out, since nothing between them can be trained.

    Raises:
        ValueError: cells that the network does not have, or that have nothing to train.
    """
    data = _data(_source(grid.baseline), folder)
    graph = trace(build_network(grid.baseline.network, 0, len(data.classes)).eval(), data.train[0][:2])
    chosen = _modules(graph, grid.cells, report)
    baselines, cells = [], []
    for seed in grid.seeds:
        baseline = replace(grid.baseline, seed=seed)
        place = folder / "baselines"
        first = Task(f"seed {seed}: baseline", place, baseline.settings(), _train_baseline, (baseline, folder, device))
        baselines.append(first)
        for l_start, l_stop, start, stop in chosen:
            for way in grid.all_ways():
                settings = grid.cell_settings(seed, start, stop, way)
                name = f"seed {seed}: {way.method.upper()} ({l_start}, {l_stop})"
                arguments = (baseline, folder, device, (l_start, l_stop, start, stop), way, grid.alpha, grid.epochs)
                cells.append(Task(name, folder / "rows", settings, _train_cell, arguments, after=first))
    return [*baselines, *cells]


def _modules(
    graph: Graph, cells: Sequence[tuple[str, str]] | None, report: Callable[[str], None]
) -> list[tuple[int, int, str, str]]:
    """The modules to train: those asked for, or all that can be, with the numbers of their layers.

    Layers are the network's blocks; where cells name layers inside of these, all that lie no deeper."""
    layers = blocks(graph)
    named = {name for cell in cells or () for name in cell if name in graph.layers} - {"input", *layers}
    if named:
        deepest = max(name.count(".") for name in named)
        layers = tuple(n for n in graph.layers if n not in ("input", "output") and n.count(".") <= deepest)
    chosen = [p for p in pairs(layers) if cells is None or p[2:] in cells]
    strange = sorted(set(cells or ()) - {p[2:] for p in chosen})
    if strange:
        raise ValueError(f"cells: {strange} are not (start, stop) in forward order of input, {', '.join(layers)}")
    able = []
    for l_start, l_stop, start, stop in chosen:
        try:
            module_parameters(graph, start, stop)
        except ValueError as error:
            if cells is not None:
                raise
            report(f"({l_start}, {l_stop}) is left out: {error}")
        else:
            able.append((l_start, l_stop, start, stop))
    return able


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


def _source(baseline: Baseline) -> Baseline:
    """A baseline with nothing but what its data depends on."""
    usual = Baseline()
    return replace(
        baseline,
        network=usual.network,
        epochs=usual.epochs,
        batch_size=usual.batch_size,
        learning_rate=usual.learning_rate,
        seed=usual.seed,
        weights=usual.weights,
        damage=usual.damage,
    )


@lru_cache(maxsize=1)  # one data set, few baselines: a worker goes through the cells of one after the other
def _data(source: Baseline, folder: Path) -> Data:
    return load_baseline_data(source, cache=folder)


@lru_cache(maxsize=2)
def _start(baseline: Baseline, folder: Path, device: str) -> Graph:
    data = _data(_source(baseline), folder)
    model, _, _ = load_baseline(baseline, data, folder, device)
    return trace(model, data.train[0][:2])


def _train_baseline(baseline: Baseline, folder: Path, device: str) -> dict[str, Any]:
    return baseline_row(baseline, _data(_source(baseline), folder), folder, device)


def _train_cell(
    baseline: Baseline,
    folder: Path,
    device: str,
    module: tuple[int, int, str, str],
    way: Way,
    alpha: float,
    epochs: int,
) -> dict[str, Any]:
    data, graph = _data(_source(baseline), folder), _start(baseline, folder, device)
    l_start, l_stop, start, stop = module

    def train(graph: Graph, way: Way) -> PostTraining:
        return post_train(
            graph,
            data.train,
            start,
            stop,
            epochs=epochs,
            validation=data.test,
            seed=baseline.seed,
            device=device,
            batch_size=baseline.batch_size,
            **way.keywords(alpha),
        )

    if way.first is None:
        return post_training_row(train(graph, way), l_start, l_stop)
    first = train(graph, way.first)
    second = train(trace(first.model.cpu(), data.train[0][:2]), replace(way, first=None))
    row, before = (post_training_row(result, l_start, l_stop) for result in (second, first))
    return {**row, "baseline_accuracy": before["baseline_accuracy"], "first": before}


def _describe(task: Task, row: Row) -> str:
    if row["settings"]["kind"] == "baseline":
        return f"{task.name} {100 * row['accuracy']:.2f} %"
    last = row["history"][-1]
    unit = "sweeps" if row["settings"]["method"] == "solve" else "epochs"
    return f"{task.name} {100 * last['accuracy']:.2f} % after {last['epoch']} {unit}, {row['seconds']:.1f} s"
