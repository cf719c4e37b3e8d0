"""The two-phase study of the racecar paper: a network is trained for task A in one of several ways, then plainly for A or B.

Phase I ("A") trains with the way's penalty; phase II goes on without it, for the same task ("AA") or another one ("AB"). "B" is
the other task from scratch. One row for each phase, way and seed; AA and AB go on from one network, trained once and kept.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from revprop.errors import near_matches
from revprop.experiments.baseline import Data, build_network, save_weights
from revprop.experiments.racecar_data import load_task
from revprop.experiments.racecar_measures import in_bytes, observed_epochs, plane_of, plane_rows, reconstruction
from revprop.graph import Graph, trace
from revprop.networks import load_weights
from revprop.orthogonality import Orthogonality
from revprop.racecar import Racecar
from revprop.recipe import Recipe
from revprop.runs import Row, RunStore
from revprop.sweep import SweepOptions, Task, sweep
from revprop.training import Epoch, Training, accuracy_of, fit

__all__ = ["PHASES", "PhaseOneWay", "RacecarStudy", "Schedule", "phase_settings", "run", "tasks", "train_phase"]

PHASES = ("A", "AA", "AB", "B")
MEASURED = 1_000  # test inputs that the reverse pass gives back


@dataclass(frozen=True)
class PhaseOneWay:
    """One way to train in phase I.

    Attributes:
        name: as tables show it. layers: the first so many learned layers are in the reverse pass; 0: there is none.
        weight: of the penalty (the authors' half of the sum of squares); a tuple: one number for each of these layers.
        share: of each batch that is constrained. orthogonality: weight of SRIP, the comparison method; 0: without.

    >>> PhaseOneWay("RR", layers=3, weight=1e-5).name
    'RR'
    """

    name: str
    layers: int = 0
    weight: float | tuple[float, ...] = 0.0
    share: float = 1.0
    orthogonality: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a phase trains: epochs, Adam's learning rate, or what the recipe says."""

    epochs: int
    learning_rate: float
    recipe: Recipe = Recipe()


@dataclass(frozen=True)
class RacecarStudy:
    """What is trained and measured.

    Attributes:
        experiment: "bits", "mnist" or "cifar": whose published numbers stand beside it.
        network, source, target: names of the network and of tasks A and B (:func:`~revprop.experiments.racecar_data.load_task`).
        layers: so many layers, from the first on, are in the reverse pass that is measured, whatever way trained the network.
        ways: of phase I; the first is also the one that trains B from scratch. seeds: of everything but the choice of data.
        phases: those wanted; phase I is trained whenever phase II needs it.
        schedules: one for each of the four phases, in their order.
        batch_size, passes: as for :class:`revprop.training.Training`: an epoch is so many passes through the data.
        samples, test_samples: so many to train and to measure on; None for all.
        new_head: the module that task B begins afresh; "" for none.
        measure_every: epochs. planes: whether to measure the information in every layer.
        pictures: so many test inputs, and what the reverse pass makes of them, are kept of phase I with the first seed.
        reduced: what differs from the published setting, in words.

    Raises:
        ValueError: an unknown phase, or not one schedule for each.
    """

    experiment: str
    network: str
    source: str
    target: str
    layers: int
    ways: tuple[PhaseOneWay, ...]
    schedules: tuple[Schedule, ...]
    seeds: tuple[int, ...] = (0,)
    phases: tuple[str, ...] = PHASES
    batch_size: int = 64
    passes: int = 1
    samples: int | None = None
    test_samples: int | None = None
    new_head: str = ""
    measure_every: int = 1
    planes: bool = False
    pictures: int = 0
    reduced: str = ""

    def __post_init__(self) -> None:
        for phase in self.phases:
            if phase not in PHASES:
                raise ValueError(near_matches(phase, PHASES, "phase"))
        if len(self.schedules) != len(PHASES):
            raise ValueError(f"schedules: expected one for each of {', '.join(PHASES)}, given {len(self.schedules)}")

    def schedule(self, phase: str) -> Schedule:
        """That of a phase."""
        return self.schedules[PHASES.index(phase)]


@dataclass(frozen=True)
class _Run:
    """One phase of one way and seed, and where it is kept."""

    study: RacecarStudy
    phase: str
    way: PhaseOneWay
    seed: int
    folder: Path
    device: str = "auto"

    @property
    def settings(self) -> dict[str, Any]:
        return phase_settings(self.study, self.phase, self.way, self.seed)

    @property
    def weights(self) -> Path:
        return self.folder / "weights" / f"{RunStore(self.folder).key(self.settings)}.safetensors"

    @property
    def data(self) -> Data:
        study = self.study
        name = study.source if self.phase in ("A", "AA") else study.target
        return _data(name, study.samples, study.test_samples, self.folder)


def phase_settings(study: RacecarStudy, phase: str, way: PhaseOneWay, seed: int) -> dict[str, Any]:
    """What names the row of one phase: all that its numbers depend on, with phase I's own settings where it goes on from there.

    >>> study = RacecarStudy("bits", "racecar-bits", "a", "b", 6, (PhaseOneWay("Std"),), (Schedule(1, 0.1),) * 4)
    >>> phase_settings(study, "AB", study.ways[0], 3)["first"]["phase"]
    'A'
    """
    schedule = study.schedule(phase)
    found = {
        "kind": "racecar",
        "experiment": study.experiment,
        "phase": phase,
        "way": way.name,
        "network": study.network,
        "data": study.source if phase in ("A", "AA") else study.target,
        "seed": seed,
        "epochs": schedule.epochs,
        "learning_rate": schedule.learning_rate,
        "batch_size": study.batch_size,
        "reduced": study.reduced,
        "samples": [study.samples, study.test_samples],
        "measured": [study.layers, study.measure_every, study.planes, study.pictures],
    }
    if schedule.recipe != Recipe():
        found["recipe"] = asdict(schedule.recipe)
    if study.passes != 1:
        found["passes"] = study.passes
    if phase == "A":
        found["penalty"] = {name: value for name, value in asdict(way).items() if name != "name"}
    if phase in ("AA", "AB"):
        found["first"] = phase_settings(study, "A", way, seed)
    if phase == "AB" and study.new_head:
        found["new_head"] = study.new_head
    return found


def run(study: RacecarStudy, folder: Path, **how: Unpack[SweepOptions]) -> list[Row]:
    """Trains what has no row yet and returns the rows of all phases that are wanted.

    Args:
        folder: where networks and rows are kept; running again continues. Tables and figures share both.
        how: ``device``, ``report``, ``workers``, ``engine`` of :func:`revprop.sweep.sweep`.

    Returns:
        rows of kind "racecar": accuracy on the test part, ``error`` (the relative error of the input that the reverse pass gives
        back), ``seconds`` of training, the history; ``information`` and ``pictures`` where the study wants them.

    Raises:
        SweepError: some runs failed; all others are stored.
    """
    _data.cache_clear()  # files may have changed
    try:
        found = tasks(study, folder.absolute(), how.get("device", "auto"))
        rows = sweep(found, describe=_describe, **how)
    finally:
        _data.cache_clear()
    return [row for row in rows if row["settings"]["phase"] in study.phases]


def tasks(study: RacecarStudy, folder: Path, device: str = "auto") -> list[Task]:
    """The study as tasks of a sweep, seed by seed: phase I of every way, then what goes on from it."""
    found = []
    for seed in study.seeds:
        for way in study.ways:
            first: Task | None = None
            if set(study.phases) & {"A", "AA", "AB"}:
                first = _task(_Run(study, "A", way, seed, folder, device), None)
                found.append(first)
            for phase in ("AA", "AB"):
                if phase in study.phases:
                    found.append(_task(_Run(study, phase, way, seed, folder, device), first))
        if "B" in study.phases:
            found.append(_task(_Run(study, "B", study.ways[0], seed, folder, device), None))
    return found


def _task(one: _Run, after: Task | None) -> Task:
    name = f"seed {one.seed}: {one.way.name} {one.phase}"
    return Task(name, one.folder / "rows", one.settings, train_phase, (one,), after)


def _describe(task: Task, row: Row) -> str:
    return f"{task.name} {100 * row['accuracy']:.2f} %, input given back within {100 * row['error']:.0f} %, {row['seconds']:.0f} s"


@lru_cache(maxsize=2)  # tasks A and B: a worker goes from one to the other
def _data(name: str, samples: int | None, test_samples: int | None, folder: Path) -> Data:
    return load_task(name, samples, test_samples, folder / "cache")


def train_phase(one: _Run) -> dict[str, Any]:
    """Trains one phase from its start, or from where an interrupted run left it, and measures what came out: its row."""
    study, schedule, data = one.study, one.study.schedule(one.phase), one.data
    checkpoint = one.weights.with_suffix("")
    training = Training(
        schedule.epochs,
        study.batch_size,
        schedule.learning_rate,
        one.seed,
        one.device,
        schedule.recipe.precision,
        checkpoint=checkpoint,
        recipe=schedule.recipe,
        passes=study.passes,
        measure_every=study.measure_every,
    )
    model = _started(one, data).to(training.fabric().device)
    graph = trace(model, data.train[0][:2].to(next(model.parameters()).device))
    penalised = _Penalised(one.way if one.phase == "A" else PhaseOneWay("plain"), graph, one.seed)
    chosen = observed_epochs(schedule.epochs) if study.planes else frozenset[int]()

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if not model.training:
            module.train()
        outputs, penalty = penalised(module, schedule.recipe.augment(batch[0], (0.0,), (1.0,)))
        task = nn.functional.cross_entropy(outputs, batch[1])
        return {"loss": task} if penalty is None else {"loss": task + penalty, "task": task, "penalty": penalty}

    def evaluate() -> float:
        model.eval()
        return accuracy_of(model, zip(data.test[0].split(500), data.test[1].split(500), strict=True))

    def observe(epoch: int) -> Mapping[str, float]:
        model.eval()
        return plane_of(graph, data) if epoch in chosen else {}

    identity = json.loads(json.dumps(one.settings))
    history = fit(
        model, data.train, loss, training, evaluate, identity, f"{one.way.name} {one.phase}", penalised.begin, observe
    )
    model.cpu().eval()
    row = _row(one, graph, data, history.history)
    if one.phase == "A":
        save_weights(model, one.weights)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return row


def _started(one: _Run, data: Data) -> nn.Module:
    """The network that a phase begins with."""
    model = build_network(one.study.network, one.seed, len(data.classes))
    if one.phase in ("A", "B"):
        return model
    before = replace(one, phase="A")
    trained = build_network(one.study.network, one.seed, len(before.data.classes))
    load_weights(trained, before.weights)
    if one.phase == "AB" and one.study.new_head:
        setattr(trained, one.study.new_head, model.get_submodule(one.study.new_head))
    return trained


class _Penalised:
    """The outputs of a network for a batch, and the penalty of a way; None where it has none."""

    def __init__(self, way: PhaseOneWay, graph: Graph, seed: int) -> None:
        self.way, self.graph, self.seed = way, graph, seed
        self.penalty: Racecar | Orthogonality | None = None

    def begin(self, epoch: int) -> None:
        """Draws (of a share, of power iteration's vectors) are by the epoch: one that is continued draws as one that was not."""
        seed = 1_000_003 * self.seed + epoch
        way = self.way
        if way.layers and (self.penalty is None or way.share < 1):
            self.penalty = Racecar(self.graph, layers=way.layers, weight=way.weight, share=way.share, seed=seed)
        elif way.orthogonality:
            self.penalty = Orthogonality(self.graph.model, weight=way.orthogonality, seed=seed)

    def __call__(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.penalty, Racecar):
            return self.penalty.with_output(x)
        return module(x), None if self.penalty is None else self.penalty()


def _row(one: _Run, graph: Graph, data: Data, history: list[Epoch]) -> dict[str, Any]:
    study = one.study
    error, original, regenerated = reconstruction(graph, data.test[0][:MEASURED], study.layers)
    wanted = study.pictures if one.phase == "A" and one.seed == study.seeds[0] else 0
    epochs = [{"epoch": e.epoch, "accuracy": e.accuracy, "seconds": e.seconds, **e.losses} for e in history]
    return {
        "accuracy": history[-1].accuracy,
        "error": error if math.isfinite(error) else None,
        "seconds": sum(e.seconds for e in history),
        "parameters": sum(p.numel() for p in graph.model.parameters()),
        "history": epochs,
        **({"information": plane_rows(history)} if study.planes else {}),
        **({"pictures": in_bytes(original[:wanted], regenerated[:wanted])} if wanted else {}),
    }
