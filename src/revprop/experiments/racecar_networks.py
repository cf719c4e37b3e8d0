"""Networks trained with and without the racecar penalty on their convolutions (phase I), to look at what their features hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revprop.experiments.baseline import Baseline, build_network, find_weights, load_baseline_data, save_weights
from revprop.networks import load_weights
from revprop.racecar import Racecar
from revprop.runs import RunStore
from revprop.training import Epoch, Training, accuracy_of, fit

__all__ = ["PhaseOne", "convolutions", "load_phase_one", "train_phase_one"]

LOOKED_AT = 256  # test images of which the regenerated input is compared
TOP = 5


@dataclass(frozen=True)
class PhaseOne:
    """A network of phase I.

    Attributes:
        baseline: the network, its data and how it is trained; or its weights.
        way: what to call it: "Std" or "RR", or the name of a file of weights.
        weight: lambda of every convolution, on half the sum of squares; 0 for none. share: of each batch that is constrained.
        alone: so many epochs first without the penalty: with the same seed, those of Std.
    """

    baseline: Baseline
    way: str = "Std"
    weight: float = 0.0
    share: float = 1.0
    alone: int = 0

    def settings(self) -> dict[str, Any]:
        """What names its row.

        >>> network = PhaseOne(Baseline("vgg-small", "made:cifar10", 1), "RR", 1e-6)
        >>> {k: network.settings()[k] for k in ("kind", "way", "weight", "share", "alone")}
        {'kind': 'racecar-network', 'way': 'RR', 'weight': 1e-06, 'share': 1.0, 'alone': 0}
        """
        own = {name: getattr(self, name) for name in ("way", "weight", "share", "alone")}
        return {**self.baseline.settings(), "kind": "racecar-network", **own}


def convolutions(model: nn.Module) -> list[str]:
    """The convolutions of a network, by name, in the order in which they are registered.

    >>> convolutions(build_network("mnist-lenet", 0))
    ['conv1', 'conv2']
    """
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def train_phase_one(network: PhaseOne, folder: Path, device: str = "auto") -> dict[str, Any]:
    """Trains a network and keeps its weights in ``folder``: its row's contents.

    Returns:
        ``accuracy`` and ``top5`` of the test images in [0, 1]; ``regenerated``, the mean over test images of
        ``|I - I'| / |I|`` with I' what the reverse pass gives; ``seconds``, of a step; ``parameters``; ``history``. Of weights that
        were given only the parameters, the others None.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite.
    """
    baseline = network.baseline
    if baseline.weights:
        model = build_network(baseline.network, baseline.seed)
        load_weights(model, find_weights(baseline.weights))
        save_weights(model, _weights(network, folder))
        measured = dict.fromkeys(("accuracy", "top5", "regenerated", "seconds"))
        return {**measured, "parameters": _size(model), "history": []}
    data = load_baseline_data(baseline, folder / "cache")
    model = build_network(baseline.network, baseline.seed, len(data.classes))
    mirror = Racecar(
        model,
        data.train[0][:2],
        layers=convolutions(model),
        weight=network.weight,
        share=network.share,
        seed=baseline.seed,
    )
    weights = _weights(network, folder)
    training = Training(
        baseline.epochs,
        baseline.batch_size,
        baseline.learning_rate,
        baseline.seed,
        device,
        checkpoint=weights.with_suffix(""),
        recipe=baseline.recipe,
    )
    loss = _Loss(network, mirror)

    def evaluate() -> float:
        model.eval()
        return accuracy_of(model, zip(data.test[0].split(256), data.test[1].split(256), strict=True))

    identity = json.loads(json.dumps(network.settings(), default=asdict))
    history = fit(model, data.train, loss, training, evaluate, identity, network.way, loss.begin).history
    model.cpu().eval()
    save_weights(model, weights)
    steps = -(-len(data.train[1]) // baseline.batch_size)
    penalised = [epoch for epoch in history if epoch.epoch > network.alone] or history
    return {
        "accuracy": history[-1].accuracy,
        "top5": _top5(model, *data.test),
        "regenerated": _regenerated(mirror, data.test[0][:LOOKED_AT]),
        "seconds": sum(epoch.seconds for epoch in penalised) / len(penalised) / steps,
        "parameters": _size(model),
        "history": [_flat(epoch) for epoch in history],
    }


def load_phase_one(network: PhaseOne, folder: Path, classes: int | None = None) -> nn.Module:
    """The trained network, in eval mode.

    Raises:
        FileNotFoundError: it is not trained yet.
    """
    weights = _weights(network, folder)
    if classes is None and not network.baseline.weights:
        classes = len(load_baseline_data(network.baseline, folder / "cache").classes)
    model = build_network(network.baseline.network, network.baseline.seed, classes)
    load_weights(model, weights)
    return model.eval()


class _Loss:
    """Cross entropy, and behind the first epochs the penalty."""

    def __init__(self, network: PhaseOne, mirror: Racecar) -> None:
        self.network, self.mirror, self.epoch = network, mirror, 0

    def begin(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        module.train()
        baseline = self.network.baseline
        x, y = baseline.recipe.augment(batch[0], baseline.mean, baseline.std), batch[1]
        if not self.network.weight or self.epoch <= self.network.alone:
            loss = F.cross_entropy(module(x), y)
            return {"loss": loss, "classification": loss, "penalty": torch.zeros_like(loss)}
        output, penalty = self.mirror.with_output(x)
        loss = F.cross_entropy(output, y)
        return {"loss": loss + penalty, "classification": loss, "penalty": penalty}


def _weights(network: PhaseOne, folder: Path) -> Path:
    return folder / "networks" / f"{RunStore(folder).key(network.settings())}.safetensors"


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def _batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(part) for part in x.split(64)])


def _top5(model: nn.Module, x: Tensor, y: Tensor) -> float:
    outputs = _batches(model, x)
    best = outputs.topk(min(TOP, outputs.shape[1])).indices
    return float((best == y[:, None]).any(1).float().mean())


def _regenerated(mirror: Racecar, x: Tensor) -> float:
    back = _batches(lambda part: mirror.regenerate(part)["input"], x)
    return float(((back - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).mean())


def _flat(epoch: Epoch) -> dict[str, Any]:
    return {"epoch": epoch.epoch, "accuracy": epoch.accuracy, "seconds": epoch.seconds, **epoch.losses}
