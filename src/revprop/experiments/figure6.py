"""FR-PT Figure 6: one network saved after every epoch of its training, and what post-training makes of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

from revprop.datasets import data_root, find_data
from revprop.diagnosis import blocks
from revprop.experiments.baseline import Data, build_network, save_weights
from revprop.experiments.figure4 import Trained, at_scale
from revprop.experiments.post_training_grid import Reconstruct, post_training_row
from revprop.graph import trace
from revprop.networks import load_weights
from revprop.post_training import post_train
from revprop.runs import Row, RunStore
from revprop.sweep import SweepOptions, Task, silent, sweep
from revprop.training import Training, train_baseline

__all__ = ["Figure6", "StagePostTraining", "is_there", "post_train_stage", "run", "settings", "train_stage"]


@dataclass(frozen=True)
class Evolving:
    """A network that evolves, and the module of it that is post-trained at each stage.

    Attributes:
        trained: the network. start, stop: the layers between which the module lies. alpha: the share of FR's reconstruction
            loss. reduced: what differs from the published setting, in words, printed beside the figure.
    """

    trained: Trained = field(default_factory=lambda: Trained("cifar10", "cifar10-jpeg"))
    alpha: float = 0.1
    start: str = "conv1"
    stop: str = "fc1"
    reduced: str = "CIFAR-10 (JPEG images) in place of CIFAR-100"


@dataclass(frozen=True)
class Figure6:
    """The figure: networks, their stages, and how each is post-trained.

    Attributes:
        networks: a network whose data set is not on disk is left out, and said so.
        stages: the numbers of epochs after which the networks are post-trained. epochs: of post-training.
        seeds: of the post-trainings' shuffling.
    """

    networks: tuple[Evolving, ...] = (
        Evolving(),
        Evolving(Trained("cifar100", "cifar100"), alpha=0.7, reduced=""),
    )
    stages: tuple[int, ...] = tuple(range(1, 31))
    epochs: int = 10
    fr: Reconstruct = field(default_factory=Reconstruct)
    seeds: tuple[int, ...] = tuple(range(10))


@dataclass(frozen=True)
class StagePostTraining:
    """One task: a network after ``stage`` epochs, post-trained by "bp" or "fr"."""

    network: Evolving
    stage: int
    method: str
    epochs: int
    fr: Reconstruct
    seed: int

    def key(self) -> dict[str, Any]:
        """The settings of its row; those of FR alone are not BP's.

        >>> task = StagePostTraining(Evolving(), 3, "bp", 10, Reconstruct(), seed=1)
        >>> {k: v for k, v in task.key().items() if k in ("stage", "seed", "baseline_seed", "alpha")}
        {'baseline_seed': 0, 'stage': 3, 'seed': 1}
        """
        trained = {k: v for k, v in asdict(self.network.trained).items() if k != "seed"}
        module = {k: getattr(self.network, k) for k in ("start", "stop", "reduced")}
        way = {"alpha": self.network.alpha, **asdict(self.fr)} if self.method == "fr" else {}
        return {
            "kind": "figure6",
            **trained,
            "baseline_seed": self.network.trained.seed,
            **module,
            "stage": self.stage,
            "method": self.method,
            "epochs": self.epochs,
            **way,
            "seed": self.seed,
        }


SCALES = {
    "paper": Figure6(),
    "reduced": Figure6((Evolving(),), stages=(1, 2, 4, 7, 11, 16, 22, 30), seeds=(0, 1, 2)),
    "smoke": Figure6(
        (
            Evolving(
                Trained("digits", "digits", batch_size=64),
                alpha=0.5,
                reduced="scikit-learn's digits in place of CIFAR-100",
            ),
        ),
        stages=(1, 3, 9),
        seeds=(0, 1),
    ),
}


def settings(scale: str, seeds: int | None = None) -> Figure6:
    """The figure's settings at a scale.

    Args:
        scale: "smoke" (seconds, no data to download), "reduced" (8 stages, 3 seeds), or "paper" (30 stages, 10 seeds).
        seeds: so many seeds of the shuffling instead.

    Raises:
        ValueError: an unknown scale, or fewer than one seed.

    >>> len(settings("paper", seeds=5).stages)
    30
    """
    return at_scale(SCALES, scale, seeds)


def run(figure: Figure6, folder: Path, **how: Unpack[SweepOptions]) -> list[dict[str, Any]]:
    """Trains the networks through their stages and post-trains them at each; what has a row is not done again.

    Args:
        folder: where stages and rows are kept; running again continues.
        how: ``device``, ``report``, ``workers``, ``engine`` of :func:`revprop.sweep.sweep`.

    Returns:
        the rows, of kind "figure6": like those of the post-training grid, with the ``stage`` in their settings.

    Raises:
        SweepError: some runs failed.
    """
    tasks = []
    for network in figure.networks:
        if is_there(network.trained.data):
            tasks += _tasks(figure, network, folder, how.get("device", "auto"))
        else:
            how.get("report", silent)(
                f"left out: no data for {network.trained.data!r} in {data_root()}: set REVPROP_DATA to its folder"
            )
    rows = sweep(tasks, describe=_describe, **how)
    return [row for row in rows if row["settings"]["kind"] == "figure6"]


def _tasks(figure: Figure6, network: Evolving, folder: Path, device: str) -> list[Task]:
    """The epochs of the network's own training, one after the other, and behind each stage its post-trainings."""
    trained = network.trained
    epochs: list[Task] = []
    for epoch in range(1, max(figure.stages) + 1):
        before = epochs[-1] if epochs else None
        arguments = (trained, epoch, folder, device)
        name = f"{trained.network} on {trained.data}, epoch {epoch}"
        epochs.append(Task(name, folder / "stages", _stage(trained, epoch), train_stage, arguments, before))
    posts = []
    for stage in figure.stages:
        for seed in figure.seeds:
            for method in ("bp", "fr"):
                post = StagePostTraining(network, stage, method, figure.epochs, figure.fr, seed)
                name = f"{epochs[stage - 1].name}: {method.upper()}, seed {seed}"
                posts.append(
                    Task(name, folder / "rows", post.key(), post_train_stage, (post, folder, device), epochs[stage - 1])
                )
    return [*epochs, *posts]


def _describe(task: Task, row: Row) -> str:
    if row["settings"]["kind"] != "figure6":
        return f"{task.name}: {100 * row['accuracy']:.2f} %"
    return f"{task.name} {100 * row['history'][-1]['accuracy']:.2f} % (before {100 * row['baseline_accuracy']:.2f} %)"


def is_there(data: str) -> bool:
    """Whether a data set is on disk; true also of what needs no disk, and of a path, of which loading tells.

    >>> is_there("digits")
    True
    """
    try:
        return find_data(data) is not None
    except ValueError:
        return True


def train_stage(trained: Trained, epoch: int, folder: Path, device: str = "auto") -> dict[str, Any]:
    """Trains a network from its last epoch to the next, from a checkpoint, and keeps its weights as they then are."""
    data = _data(trained.data, folder)
    model = build_network(trained.network, trained.seed, len(data.classes))
    identity = _stage(trained, 0)
    checkpoint = _weights(trained, 0, folder).with_suffix("")
    training = Training(epoch, trained.batch_size, trained.learning_rate, trained.seed, device, checkpoint=checkpoint)
    history = train_baseline(model, data.train, data.test, training, identity)
    save_weights(model, _weights(trained, epoch, folder))
    return {"accuracy": history[-1].accuracy}


def post_train_stage(post: StagePostTraining, folder: Path, device: str = "auto") -> dict[str, Any]:
    """Post-trains a network as it was after the stage's epoch of :func:`train_stage`: what a row of :func:`run` holds."""
    network, trained = post.network, post.network.trained
    data = _data(trained.data, folder)
    model = build_network(trained.network, trained.seed, len(data.classes))
    load_weights(model, _weights(trained, post.stage, folder))
    graph = trace(model.eval(), data.train[0][:2])
    result = post_train(
        graph,
        data.train,
        network.start,
        network.stop,
        method=post.method,  # type: ignore[arg-type]
        alpha=network.alpha,
        epochs=post.epochs,
        validation=data.test,
        batch_size=trained.batch_size,
        learning_rate=trained.learning_rate,
        seed=post.seed,
        device=device,
        **(asdict(post.fr) if post.method == "fr" else {}),
    )
    layers = ["input", *blocks(graph)]
    return post_training_row(result, layers.index(network.start), layers.index(network.stop))


@lru_cache(maxsize=1)
def _data(spec: str, folder: Path) -> Data:
    return Data.load(spec, cache=folder / "cache" / f"{Path(spec).name}.npz")  # one per data set


def _stage(trained: Trained, epoch: int) -> dict[str, Any]:
    return {"kind": "stage", **asdict(trained), "stage": epoch}


def _weights(trained: Trained, epoch: int, folder: Path) -> Path:
    return folder / "stages" / f"{RunStore(folder).key(_stage(trained, epoch))}.safetensors"
