"""One post-training of one network, as a stored row, with its checkpoints and trained weights kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from revprop.diagnosis import blocks
from revprop.experiments.baseline import Data, save_weights
from revprop.experiments.post_training_grid import Reconstruct, post_training_row
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
    method: str
    alpha: float
    epochs: int
    way: Reconstruct
    seed: int = 0


def run(settings: PostTrainingRun, model: nn.Module, data: Data, folder: Path, device: str = "auto") -> dict[str, Any]:
    """Post-trains, or returns the stored row of the same settings; an interrupted run continues from its last epoch."""
    store = RunStore(folder / "rows")
    flat = {k: v for k, v in asdict(settings).items() if k != "way"}
    key = {"kind": "post-training", **flat, "reduced": "", **(asdict(settings.way) if settings.method == "fr" else {})}
    if settings.method == "bp":
        key.pop("alpha")
    name = store.key(key)

    def train(_: object) -> dict[str, Any]:
        graph = trace(model, data.train[0][:2])
        names = ["input", *blocks(graph)]
        result = post_train(
            graph,
            data.train,
            settings.start,
            settings.stop,
            method=settings.method,  # type: ignore[arg-type]
            alpha=settings.alpha,
            epochs=settings.epochs,
            validation=data.test,
            seed=settings.seed,
            device=device,
            checkpoint=folder / "checkpoints" / name,
            progress=True,
            **(asdict(settings.way) if settings.method == "fr" else {}),
        )
        weights = (
            folder
            / f"{settings.network.replace(':', '.')}-{settings.method}-{settings.start}-{settings.stop}-{name}.safetensors"
        )
        save_weights(result.model, weights)
        l_start = names.index(settings.start) if settings.start in names else 0
        l_stop = names.index(settings.stop) if settings.stop in names else len(names) - 1
        return {**post_training_row(result, l_start, l_stop), "weights": str(weights)}

    return store.run(key, train)
