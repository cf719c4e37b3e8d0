"""Baselines: one trained network per data set, architecture and seed, trained once and kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from revprop.datasets import Split, data_root, keeps_cache, load_data
from revprop.errors import near_matches
from revprop.networks import NETWORKS, load_network, load_weights
from revprop.recipe import Recipe
from revprop.runs import RunStore
from revprop.training import Training, accuracy_of, train_baseline

__all__ = [
    "Baseline",
    "Data",
    "baseline_row",
    "build_network",
    "find_weights",
    "load_baseline",
    "load_baseline_data",
    "load_split",
    "save_weights",
    "weights_name",
]


@dataclass(frozen=True)
class Baseline:
    """What a baseline is: a network trained on a data set by cross entropy.

    Attributes:
        network: a name, or ``package.module:factory``. data: a name or a path. epochs, batch_size, learning_rate: Adam's.
        seed: of the parameters and the shuffling.
        samples: train on so many of the training images, drawn once and for all seeds; None for all.
        holdout: keep this share of the training images out, drawn once, and measure on them instead of the test set: for
            choosing what must not be chosen on the test set.
        weights: a file of trained weights to use instead of training, its path from here or from the folder of data; then
            ``epochs`` and the others do not matter.
        mean, std: scale images to [0, 1] and by these per channel; None standardises each channel of each image.
        damage: a module's name, and the strength of the normal noise that its weights get after training, in standard
            deviations of each weight tensor: something to repair. Drawn from ``seed``.
        recipe: how to train where not by plain Adam.
    """

    network: str = "digits"
    data: str = "digits"
    epochs: int = 40
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0
    samples: int | None = None
    holdout: float = 0.0
    weights: str = ""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    damage: tuple[str, float] | None = None
    recipe: Recipe = Recipe()

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples: expected at least 1, or None for all, given {self.samples}")
        if not 0 <= self.holdout < 1:
            raise ValueError(
                f"holdout: expected a share of the training images from 0 to below 1, given {self.holdout}"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("give mean and std together, one number per channel")

    def settings(self) -> dict[str, Any]:
        """What names its row: the first six fields always, of the others those that are not as usual.

        >>> Baseline("mnist", "mnist", 20, holdout=0.1).settings()
        {'kind': 'baseline', 'network': 'mnist', 'data': 'mnist', 'epochs': 20, 'batch_size': 256,
         'learning_rate': 0.001, 'seed': 0, 'holdout': 0.1}
        """
        always = ("network", "data", "epochs", "batch_size", "learning_rate", "seed")
        return {"kind": "baseline", **{name: getattr(self, name) for name in always}, **self.unusual()}

    def unusual(self) -> dict[str, Any]:
        """Of the fields behind the first six, those that differ from their defaults."""
        found = {f.name: getattr(self, f.name) for f in fields(self)[6:] if getattr(self, f.name) != f.default}
        return found | ({"weights": weights_name(self.weights)} if self.weights else {})


def weights_name(path: str | Path) -> str:
    """A file of weights as results are filed under it: with a digest, since it may be replaced by another of its name.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return f"{path} ({hashlib.sha256(find_weights(path).read_bytes()).hexdigest()[:8]})"


def find_weights(path: str | Path) -> Path:
    """A file of weights, its path from here or from the folder of data.

    Raises:
        FileNotFoundError: there is no such file.
    """
    for found in (Path(path), data_root() / path):
        if found.is_file():
            return found
    raise FileNotFoundError(f"no weights file {path}")


@dataclass(frozen=True)
class Data:
    """Inputs and labels ready for a network: train and test, and the names of the classes."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]

    @staticmethod
    def load(spec: str, cache: Path | None = None) -> Data:
        """A data set with each channel of each image at zero mean and unit variance (FR-PT section 4)."""
        split = load_split(spec, cache)
        return Data(split.train.tensors(), split.test.tensors(), split.train.classes)


def load_baseline_data(baseline: Baseline, cache: Path | None = None) -> Data:
    """The data that a baseline is trained and measured on: its part of the training images, scaled as it says.

    Args:
        cache: a folder that keeps the decoded images of archives.

    Raises:
        ValueError: ``holdout`` leaves nothing to train on or to measure on. And all that loading raises.

    >>> data = load_baseline_data(Baseline(samples=500, holdout=0.2))
    >>> len(data.train[1]), len(data.test[1])
    (500, 269)
    """
    split = load_split(baseline.data, cache)
    train, test = split.train, split.test
    if baseline.samples is not None or baseline.holdout:
        # one draw for all seeds: what differs between them is the training, not the data
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        held = round(baseline.holdout * len(train))
        if held == len(train) or (baseline.holdout and not held):
            raise ValueError(f"holdout: {baseline.holdout} of {len(train)} training images leaves one part empty")
        order, kept_out = order[: len(train) - held], order[len(train) - held :]
        test = train.subset(kept_out) if held else test
        train = train.subset(order[: baseline.samples])
    if baseline.mean is None or baseline.std is None:
        return Data(train.tensors(), test.tensors(), train.classes)
    inputs = [part.scaled(baseline.mean, baseline.std) for part in (train, test)]
    return Data((inputs[0], train.labels), (inputs[1], test.labels), train.classes)


def load_split(spec: str, cache: Path | None) -> Split:
    """The images of a data set as they are; ``cache`` is a folder that keeps the decoded images of archives."""
    archive = spec.endswith((".tar", ".tar.gz", ".tgz")) or spec in ("cifar10-jpeg", "tinyimagenet10")
    if archive and cache is not None and keeps_cache(spec):
        cache.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(spec.encode()).hexdigest()[:8]
        return load_data(spec, cache=cache / f"images-{digest}.npz")
    return load_data(spec)


def build_network(spec: str, seed: int, classes: int | None = None) -> nn.Module:
    """A network by name or ``package.module:factory``, its parameters drawn from the seed.

    ``classes`` is for networks by name, which can be built for any number; a factory of one's own knows its own.
    """
    if spec in NETWORKS:
        return NETWORKS[spec](seed=seed) if classes is None else NETWORKS[spec](classes=classes, seed=seed)
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
    row = store.run(baseline.settings(), lambda _: baseline_row(baseline, data, folder, device, progress))
    model = build_network(baseline.network, baseline.seed, len(data.classes))
    load_weights(model, _weights(baseline, folder))
    return model.cpu().eval(), float(row["accuracy"]), row


def baseline_row(
    baseline: Baseline, data: Data, folder: Path, device: str = "auto", progress: bool = False
) -> dict[str, Any]:
    """Trains the baseline and keeps its weights in ``folder``: its row's contents. :func:`load_baseline` stores them."""
    model = build_network(baseline.network, baseline.seed, len(data.classes))
    weights = _weights(baseline, folder)
    if baseline.weights:
        load_weights(model, find_weights(baseline.weights))
        model.eval()
        accuracy: float | None = _accuracy(model, data)
        history: list[dict[str, Any]] = []
    else:
        training = Training(
            baseline.epochs,
            baseline.batch_size,
            baseline.learning_rate,
            baseline.seed,
            device,
            baseline.recipe.precision,
            checkpoint=weights.with_suffix(""),
            progress=progress,
            recipe=baseline.recipe,
        )
        augment = partial(baseline.recipe.augment, mean=baseline.mean, std=baseline.std)
        identity = json.loads(json.dumps(baseline.settings(), default=asdict))
        epochs = train_baseline(model, data.train, data.test, training, identity, augment=augment)
        accuracy, history = epochs[-1].accuracy, [_flat(asdict(e)) for e in epochs]
    found = {"accuracy": accuracy, "parameters": sum(p.numel() for p in model.parameters()), "history": history}
    if baseline.damage is not None:
        _damage(model.cpu(), *baseline.damage, baseline.seed)
        found |= {"accuracy": _accuracy(model, data), "accuracy_before_damage": accuracy}
    save_weights(model, weights)
    return found


def _accuracy(model: nn.Module, data: Data) -> float:
    return accuracy_of(model, zip(data.test[0].split(2048), data.test[1].split(2048), strict=True))


def _damage(model: nn.Module, module: str, strength: float, seed: int) -> None:
    """Adds normal noise to the weights of a module, all but norms and biases."""
    names = [name for name, _ in model.named_modules() if name]
    if module not in names:
        raise ValueError(near_matches(module, names, "module to damage"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.get_submodule(module).parameters():
            if weight.dim() > 1:
                weight.add_(strength * weight.std() * torch.randn(weight.shape, generator=generator).to(weight))


def _weights(baseline: Baseline, folder: Path) -> Path:
    return folder / "baselines" / f"{RunStore(folder).key(baseline.settings())}.safetensors"


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a state dict as safetensors, in one step; a tensor that two modules share is written for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}, path.with_suffix(".part")
    )
    path.with_suffix(".part").replace(path)


def _flat(epoch: dict[str, Any]) -> dict[str, Any]:
    losses, observed = epoch.pop("losses"), epoch.pop("observed")
    return {
        **epoch,
        **observed,
        "loss": losses.get("loss"),
        "classification_loss": losses.get("classification"),
        "reconstruction_loss": losses.get("reconstruction"),
    }
