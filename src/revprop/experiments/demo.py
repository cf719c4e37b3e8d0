"""The demo: the whole main job on scikit-learn's digits, in about a minute on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revprop.experiments import diagnosis_run, post_training_grid
from revprop.experiments.baseline import Baseline, Data, load_baseline
from revprop.experiments.post_training_grid import PostTrainingGrid, Reconstruct
from revprop.graph import trace

__all__ = ["Demo", "run"]


@dataclass(frozen=True)
class Demo:
    """A small convolutional network on handwritten digits: train, diagnose, post-train every module by BP and by FR."""

    baseline: Baseline = Baseline("digits", "digits", epochs=40, batch_size=64)
    alpha: float = 0.5
    epochs: int = 10
    fr: Reconstruct = Reconstruct(strategy="global", rules="nearest")


def run(
    demo: Demo, folder: Path, device: str = "cpu", report: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Runs what has no row yet; the diagnosis's row first, then the post-training rows."""
    data = Data.load(demo.baseline.data)
    model, accuracy, _ = load_baseline(demo.baseline, data, folder, device, progress=True)
    report(f"baseline: {100 * accuracy:.2f} % of {len(data.test[1])} test digits right")
    graph = trace(model, data.train[0][:2])
    about = {
        "data": demo.baseline.data,
        "network": demo.baseline.network,
        "seed": demo.baseline.seed,
        "epochs": demo.baseline.epochs,
    }
    diagnosis = diagnosis_run.run(graph, data.test, about, folder)
    grid = PostTrainingGrid(demo.baseline, demo.alpha, demo.epochs, (demo.baseline.seed,), fr=(demo.fr,))
    return [diagnosis, *post_training_grid.run(grid, folder, device=device, report=report, workers=1)]
