"""How true and how near reconstructed features are: the two tables of first figures in the design notes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revprop.datasets import load_data
from revprop.diagnosis import blocks, diagnose
from revprop.experiments.baseline import Baseline, Data, build_network, load_baseline
from revprop.graph import Graph, trace
from revprop.networks import load_weights
from revprop.runs import RunStore
from revprop.settings import Settings

__all__ = ["CIFAR10", "RESNET20", "ReconstructionQuality", "other_labels", "run"]


@dataclass(frozen=True)
class ReconstructionQuality:
    """One table: a trained network, the layers, the ways to reconstruct, the labels wanted.

    Attributes:
        network, data: names; weights: a checkpoint, or empty for a baseline trained here for ``epochs``.
        samples: so many of the training set ("train") or of the test set ("test").
        layers: names; empty for the input and the network's blocks.
        wanted: "true" labels, or "other": a random other label for each sample.
    """

    network: str
    data: str
    weights: str = ""
    epochs: int = 40
    samples: int = 1000
    split: str = "test"
    layers: tuple[str, ...] = ()
    ways: tuple[Settings, ...] = (Settings(),)
    wanted: tuple[str, ...] = ("true",)
    seed: int = 0


GREEDY = Settings(strategy="greedy")
CIFAR10 = ReconstructionQuality(
    "cifar10",
    "cifar10-jpeg",
    samples=4000,
    split="train",
    ways=(replace(GREEDY, rules="paper"), replace(GREEDY, damping=0.0), GREEDY, Settings()),
)
RESNET20 = ReconstructionQuality(
    "resnet20",
    "cifar10-lossless",
    weights="checkpoints/cifar10_resnet20.safetensors",
    samples=400,
    layers=("layer3.1.conv1", "layer2.2", "layer2.1.conv1", "layer1.2", "layer1.1.conv1", "conv1"),
    ways=(GREEDY, replace(GREEDY, damping=0.001), Settings()),
    wanted=("true", "other"),
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def other_labels(labels: Tensor, classes: int, seed: int) -> Tensor:
    """A random label other than the true one for each sample.

    >>> bool((other_labels(torch.zeros(100).long(), 10, seed=0) != 0).all())
    True
    """
    generator = torch.Generator().manual_seed(seed)
    return (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes


def run(
    settings: ReconstructionQuality,
    folder: Path,
    data_root: Path,
    device: str = "auto",
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row per (way, wanted labels, layer): share of labels reached, deviation, seconds; finished rows are kept."""
    graph, x, labels, accuracy = _network(settings, folder, data_root, device)
    store = RunStore(folder / "rows")
    layers = settings.layers or ("input", *blocks(graph))
    found = []
    for wanted in settings.wanted:
        goal = labels if wanted == "true" else other_labels(labels, graph.shape(graph.output)[-1], settings.seed)
        for way in settings.ways:
            key = {
                "kind": "reconstruction",
                **{k: v for k, v in asdict(settings).items() if k not in ("ways", "wanted", "layers")},
                "way": asdict(way),
                "wanted": wanted,
                "layers": list(layers),
            }

            def measure(_: object, way: Settings = way, goal: Tensor = goal) -> dict[str, Any]:
                began = time.perf_counter()
                result = diagnose(graph, zip(x.split(256), goal.split(256), strict=True), layers, way)
                seconds = time.perf_counter() - began
                wrong = bool(result.wrong.any())
                return {
                    "accuracy": accuracy,
                    "seconds": seconds,
                    "layers": [
                        {
                            "layer": d.layer,
                            "reached": float(d.reached.double().mean()),
                            "deviation": float(d.deviation.double().mean()),
                            "deviation_wrong": float(d.deviation[result.wrong].double().mean()) if wrong else 0.0,
                            "steps": float(d.steps[result.wrong].double().mean())
                            if wrong and d.steps is not None
                            else None,
                            "most_steps": None if d.steps is None else int(d.steps.max()),
                        }
                        for d in result.layers
                    ],
                }

            row = store.run(key, measure)
            found.append(row)
            name = f"{way.strategy}, {way.rules}" + (f", damping {way.damping:g}" if way.strategy == "greedy" else "")
            report(
                f"{wanted} labels, {name}: "
                + ", ".join(f"{d['layer']} {100 * d['reached']:.1f} % / {d['deviation']:.4f}" for d in row["layers"])
            )
    return found


def _network(
    settings: ReconstructionQuality, folder: Path, data_root: Path, device: str
) -> tuple[Graph, Tensor, Tensor, float]:
    if settings.weights:
        model = build_network(settings.network, settings.seed)
        load_weights(model, data_root / settings.weights)
        images = getattr(load_data(settings.data), settings.split)
        x, labels = images.scaled(IMAGENET_MEAN, IMAGENET_STD)[: settings.samples], images.labels[: settings.samples]
    else:
        data = Data.load(settings.data, cache=folder)
        model, _, _ = load_baseline(
            Baseline(settings.network, settings.data, settings.epochs, seed=settings.seed),
            data,
            folder,
            device,
            progress=True,
        )
        x, labels = (part[: settings.samples] for part in getattr(data, settings.split))
    graph = trace(model.eval(), x[:2])
    with torch.no_grad():
        right = sum(int((graph(a).argmax(1) == b).sum()) for a, b in zip(x.split(256), labels.split(256), strict=True))
    return graph, x, labels, right / len(labels)
