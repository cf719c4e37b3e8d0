"""One post-training of one network, as a stored row, with its checkpoints and trained weights kept."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from revprop.diagnosis import blocks
from revprop.experiments.baseline import Data, save_weights
from revprop.experiments.post_training_grid import Way, post_training_row
from revprop.graph import trace
from revprop.post_training import post_train
from revprop.runs import RunStore

__all__ = ["PostTrainingRun", "run"]


@dataclass(frozen=True)
class PostTrainingRun:
    """The settings of one run; ``weights`` empty for a baseline trained for ``baseline_epochs``."""

    network: str
    data: str
    weights: str
    baseline_epochs: int
    start: str
    stop: str
    way: Way
    alpha: float
    epochs: int
    seed: int = 0

    def key(self) -> dict[str, Any]:
        """What names its row."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("way", "alpha")}
        return {"kind": "post-training", **own, "reduced": "", **self.way.settings(self.alpha)}


def run(settings: PostTrainingRun, model: nn.Module, data: Data, folder: Path, device: str = "auto") -> dict[str, Any]:
    """Post-trains, or returns the stored row of the same settings; an interrupted run continues from its last epoch."""
    store = RunStore(folder / "rows")
    key = settings.key()
    name = store.key(key)

    def train(_: object) -> dict[str, Any]:
        graph = trace(model, data.train[0][:2])
        names = ["input", *blocks(graph)]
        result = post_train(
            graph,
            data.train,
            settings.start,
            settings.stop,
            epochs=settings.epochs,
            validation=data.test,
            seed=settings.seed,
            device=device,
            checkpoint=folder / "checkpoints" / name,
            progress=True,
            **settings.way.keywords(settings.alpha),
        )
        weights = (
            folder
            / f"{settings.network.replace(':', '.')}-{settings.way.method}-{settings.start}-{settings.stop}-{name}.safetensors"
        )
        save_weights(result.model, weights)
        l_start = names.index(settings.start) if settings.start in names else 0
        l_stop = names.index(settings.stop) if settings.stop in names else len(names) - 1
        return {**post_training_row(result, l_start, l_stop), "weights": str(weights)}

    return store.run(key, train)
