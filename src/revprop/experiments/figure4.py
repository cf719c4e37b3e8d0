"""FR-PT Figure 4: where the features of one network depart from the wanted ones at three stages of its training."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from torch import Tensor, nn

from revprop.diagnosis import blocks, diagnose
from revprop.errors import near_matches
from revprop.experiments.baseline import Data, build_network, save_weights
from revprop.graph import trace
from revprop.networks import load_weights
from revprop.runs import Row, RunStore
from revprop.settings import Settings
from revprop.sweep import SweepOptions, Task, sweep
from revprop.training import Training, accuracy_of, train_baseline

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Figure = TypeVar("Figure", bound=DataclassInstance)

__all__ = ["Figure4", "Trained", "at_scale", "discrepancy", "is_checked", "run", "settings", "train_to_stages"]

PUBLISHED = Settings(strategy="greedy", rules="paper")


@dataclass(frozen=True)
class Trained:
    """The network that evolves: its name, its data, and Adam's settings; ``seed`` of its parameters and the shuffling."""

    network: str = "mnist"
    data: str = "mnist"
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Figure4:
    """The figure: networks, the stages to stop at, the ways to reconstruct.

    Attributes:
        trained: the network; its seed is replaced by each of ``seeds``.
        stages: test accuracies in [0, 1], increasing; a stage is the network after the first step at which its own is at
            least that. 0 is the untrained network.
        epochs: of training at most; it ends where the last stage is reached.
        samples: so many of the test set, from its beginning, are looked at.
        ways: how to reconstruct; the published way is greedy with the paper's rules.
        reduced: what a reduced run reduces, in words, printed beside the figure.
    """

    trained: Trained = field(default_factory=Trained)
    stages: tuple[float, ...] = (0.0, 0.5894, 0.9675)
    epochs: int = 40
    samples: int = 10_000
    ways: tuple[Settings, ...] = (PUBLISHED, Settings())
    seeds: tuple[int, ...] = (0,)
    reduced: str = ""


SCALES = {
    "paper": Figure4(),
    "reduced": Figure4(samples=1000, reduced="the first 1,000 test samples"),
    "smoke": Figure4(
        Trained("digits", "digits", batch_size=64),
        stages=(0.0, 0.5894, 0.9),
        samples=100,
        reduced="scikit-learn's digits for MNIST, 100 test samples",
    ),
}


def settings(scale: str, seeds: int | None = None) -> Figure4:
    """The figure's settings at a scale.

    Args:
        scale: "smoke" (seconds, no data to download), "reduced", or "paper" (the published setting).
        seeds: so many networks; 1, as published, where not given.

    Raises:
        ValueError: an unknown scale, or fewer than one seed.

    >>> settings("smoke", seeds=2).seeds
    (0, 1)
    """
    return at_scale(SCALES, scale, seeds)


def at_scale(scales: Mapping[str, Figure], scale: str, seeds: int | None) -> Figure:
    """The settings of that name, with seeds 0, 1, ... in place of their own where ``seeds`` says how many.

    Raises:
        ValueError: an unknown scale, or fewer than one seed.

    >>> at_scale(SCALES, "papr", None)
    Traceback (most recent call last):
    ValueError: unknown scale 'papr'; did you mean 'paper'?
    """
    if scale not in scales:
        raise ValueError(near_matches(scale, scales, "scale"))
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds: expected at least 1, given {seeds}")
    return scales[scale] if seeds is None else replace(scales[scale], seeds=tuple(range(seeds)))


def run(figure: Figure4, folder: Path, **how: Unpack[SweepOptions]) -> list[dict[str, Any]]:
    """Trains the networks to their stages and reconstructs their features; what has a row is not done again.

    Args:
        folder: where networks and rows are kept; running again continues.
        how: ``device``, ``report``, ``workers``, ``engine`` of :func:`revprop.sweep.sweep`.

    Returns:
        the rows, of kind "figure4": per seed, stage and way the test ``accuracy``, the ``step``, and per layer ``maps``
        (mean |recorded - wanted| of each feature over the samples), ``discrepancy`` (its mean), ``deviation`` (mean of
        |wanted - recorded| / |recorded|) and ``deviation_wrong`` (over the samples the network gets wrong; None where it
        gets all right).

    Raises:
        SweepError: a stage is not reached within the epochs, or another run failed.
    """
    tasks = []
    for seed in figure.seeds:
        trained = replace(figure.trained, seed=seed)
        training = _training(trained, figure.stages)
        name = f"{trained.network} with seed {seed}"
        arguments = (trained, figure.stages, figure.epochs, folder, how.get("device", "auto"))
        train = Task(name, folder / "stages", training, train_to_stages, arguments)
        tasks.append(train)
        for stage in figure.stages:
            for way in figure.ways:
                about = {"stage": stage, "samples": figure.samples, "way": asdict(way), "reduced": figure.reduced}
                what = f"{name} at {100 * stage:g} %, {way}"
                looked = (trained, figure.stages, stage, figure.samples, way, folder)
                key = {**training, "kind": "figure4", **about}
                tasks.append(Task(what, folder / "rows", key, discrepancy, looked, after=train))
    rows = sweep(tasks, describe=_describe, **how)
    return [row for row in rows if row["settings"]["kind"] == "figure4"]


def is_checked(step: int) -> bool:
    """Whether the accuracy is measured after this training step: each of the first 64, then ever fewer, 3 % apart at most.

    >>> [step for step in range(120, 150) if is_checked(step)]
    [120, 122, 124, 126, 128, 132, 136, 140, 144, 148]
    """
    return step % (1 << max(0, step.bit_length() - 6)) == 0


def train_to_stages(
    trained: Trained, stages: Sequence[float], epochs: int, folder: Path, device: str = "auto"
) -> dict[str, Any]:
    """Trains a network until its test accuracy has passed each of the stages, and keeps it as it then was.

    Args:
        stages: accuracies in [0, 1], increasing. epochs: of training at most.
        folder: that of the experiment.

    Returns:
        ``reached``, one entry per stage: the ``step`` after which it was passed, the same in epochs, the ``accuracy``.

    Raises:
        ValueError: a stage that is not reached within the epochs.
    """
    data = Data.load(trained.data, cache=folder)
    model = build_network(trained.network, trained.seed, len(data.classes))
    per_epoch = -(-len(data.train[1]) // trained.batch_size)
    steps = itertools.count()
    found: list[dict[str, Any]] = []

    def look() -> None:
        step = next(steps)
        if not is_checked(step):
            return
        model.eval()
        accuracy = accuracy_of(model, zip(data.test[0].split(2048), data.test[1].split(2048), strict=True))
        model.train()
        while accuracy >= stages[len(found)]:
            save_weights(model, _weights(trained, stages, len(found), folder))
            found.append({"step": step, "epoch": step / per_epoch, "accuracy": accuracy})
            if len(found) == len(stages):
                raise _AllReachedError

    training = Training(epochs, trained.batch_size, trained.learning_rate, trained.seed, device)
    with contextlib.suppress(_AllReachedError):
        history = train_baseline(_Watched(model, look), data.train, data.test, training)
        raise ValueError(
            f"{trained.network} on {trained.data} does not reach a test accuracy of {stages[len(found)]} within {epochs} "
            f"epochs (it ends at {history[-1].accuracy}): give a lower stage or more epochs"
        )
    return {"reached": found}


def discrepancy(
    trained: Trained, stages: Sequence[float], stage: float, samples: int, way: Settings, folder: Path
) -> dict[str, Any]:
    """Reconstructs the features of a network at one of the stages that :func:`train_to_stages` trained it to.

    Returns:
        what a row of :func:`run` holds.
    """
    number = list(stages).index(stage)
    training = RunStore(folder / "stages").get(_training(trained, stages))
    assert training is not None
    data = Data.load(trained.data, cache=folder)
    x, labels = (part[:samples] for part in data.test)
    model = build_network(trained.network, trained.seed, len(data.classes))
    load_weights(model, _weights(trained, stages, number, folder))
    graph = trace(model.eval(), x[:2])
    result = diagnose(graph, zip(x.split(256), labels.split(256), strict=True), ("input", *blocks(graph)), way)
    wrong = result.wrong
    return {
        **training["reached"][number],
        "wrong": int(wrong.sum()),
        "layers": [
            {
                "layer": d.layer,
                "discrepancy": float(d.maps.mean()),
                "deviation": float(d.deviation.double().mean()),
                "deviation_wrong": float(d.deviation[wrong].double().mean()) if wrong.any() else None,
                "reached": float(d.reached.double().mean()),
                "maps": d.maps.float(),
            }
            for d in result.layers
        ],
    }


def _training(trained: Trained, stages: Sequence[float]) -> dict[str, Any]:
    return {"kind": "figure4-training", **asdict(trained), "stages": list(stages)}


def _weights(trained: Trained, stages: Sequence[float], number: int, folder: Path) -> Path:
    return folder / "stages" / RunStore(folder).key(_training(trained, stages)) / f"{number}.safetensors"


def _describe(task: Task, row: Row) -> str:
    if row["settings"]["kind"] != "figure4":
        return f"{task.name}: stages after steps {', '.join(str(r['step']) for r in row['reached'])}"
    found = ", ".join(f"{layer['layer']} {layer['discrepancy']:.4f}" for layer in row["layers"])
    return f"step {row['step']}, {100 * row['accuracy']:.2f} % right, {row['settings']['way']['strategy']}: {found}"


class _AllReachedError(Exception):
    """Ends the training: there is no stage left to reach."""


class _Watched(nn.Module):
    """A network that calls ``look()`` before each of its training steps."""

    def __init__(self, model: nn.Module, look: Callable[[], None]) -> None:
        super().__init__()
        self.model, self.look = model, look

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.look()
        return self.model(images)
