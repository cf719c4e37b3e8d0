"""Baselines: one trained network per data set, architecture and seed, trained once and kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from revprop.datasets import load_data
from revprop.networks import NETWORKS, load_network, load_weights
from revprop.runs import RunStore
from revprop.training import Training, train_baseline

__all__ = ["Baseline", "Data", "build_network", "load_baseline", "save_weights"]


@dataclass(frozen=True)
class Baseline:
    """What a baseline is: a network trained on a data set by cross entropy.

    Attributes:
        network: a name, or ``package.module:factory``. data: a name or a path. epochs, batch_size, learning_rate: Adam's.
        seed: of the parameters and the shuffling.
    """

    network: str = "digits"
    data: str = "digits"
    epochs: int = 40
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Inputs and labels ready for a network: train and test, and the names of the classes."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]

    @staticmethod
    def load(spec: str, cache: Path | None = None) -> Data:
        """A data set with each channel of each image at zero mean and unit variance (FR-PT section 4)."""
        archive = spec.endswith((".tar", ".tar.gz", ".tgz")) or spec in ("cifar10-jpeg", "tinyimagenet10")
        if archive and cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
        split = load_data(spec, cache=cache) if archive and cache is not None else load_data(spec)
        return Data(split.train.tensors(), split.test.tensors(), split.train.classes)


def build_network(spec: str, seed: int) -> nn.Module:
    """A network by name or ``package.module:factory``, its parameters drawn from the seed."""
    if spec in NETWORKS:
        return NETWORKS[spec](seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load_network(spec)


def load_baseline(
    baseline: Baseline, data: Data, folder: Path, device: str = "auto", progress: bool = False
) -> tuple[nn.Module, float, dict[str, Any]]:
    """The trained baseline: from ``folder`` where it is, else trained now and kept there.

    Returns:
        the network in eval mode, its test accuracy in [0, 1], and its row.
    """
    store = RunStore(folder / "baselines")
    settings = {"kind": "baseline", **asdict(baseline)}
    weights = folder / "baselines" / f"{store.key(settings)}.safetensors"
    model = build_network(baseline.network, baseline.seed)

    def train(_: object) -> dict[str, Any]:
        training = Training(
            baseline.epochs,
            baseline.batch_size,
            baseline.learning_rate,
            baseline.seed,
            device,
            checkpoint=folder / "baselines" / store.key(settings),
            progress=progress,
        )
        history = train_baseline(model, data.train, data.test, training, settings)
        save_weights(model, weights)
        return {
            "accuracy": history[-1].accuracy,
            "parameters": sum(p.numel() for p in model.parameters()),
            "history": [_flat(asdict(e)) for e in history],
        }

    row = store.run(settings, train)
    load_weights(model, weights)
    return model.cpu().eval(), float(row["accuracy"]), row


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a state dict as safetensors, in one step; a tensor that two modules share is written for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}, path.with_suffix(".part")
    )
    path.with_suffix(".part").replace(path)


def _flat(epoch: dict[str, Any]) -> dict[str, Any]:
    losses = epoch.pop("losses")
    return {
        **epoch,
        "loss": losses.get("loss"),
        "classification_loss": losses.get("classification"),
        "reconstruction_loss": losses.get("reconstruction"),
    }
