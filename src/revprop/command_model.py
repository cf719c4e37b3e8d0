"""What several commands take: the network, its weights and data. And where they print."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from revprop.datasets import ImageData, Split
from revprop.experiments.baseline import Baseline, Data, build_network, load_baseline, load_split, weights_name
from revprop.networks import load_weights

__all__ = ["Model", "console"]

console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Model:
    """What to run backwards, on which data."""

    network: str
    """A name, or package.module:factory."""
    data: str
    """A name (digits, mnist, cifar10-jpeg, ...) or the path of a file or folder."""
    weights: Path | None = None
    """A safetensors file or weights-only checkpoint. Without it a baseline is trained and kept in --out."""
    mean: tuple[float, ...] | None = None
    """Scale images to [0, 1], then by this mean and --std per channel; without it each image's channels are standardised."""
    std: tuple[float, ...] | None = None
    baseline_epochs: int = 20
    out: Path = Path("out/runs")
    """Folder for results; running again continues."""
    seed: int = 0
    device: str = "auto"

    @property
    def data_name(self) -> str:
        """The data as results are filed under: with its scaling, where it is not the usual one."""
        return self.data if self.mean is None else f"{self.data}, mean {self.mean}, std {self.std}"

    @property
    def weights_name(self) -> str:
        """The weights as results are filed under: with a digest, since a file may be replaced by another of its name."""
        return "" if self.weights is None else weights_name(self.weights)

    def split(self) -> Split:
        """The images as they are."""
        if (self.mean is None) != (self.std is None):
            raise ValueError("give --mean and --std together, one number per channel")
        return load_split(self.data, self.out)

    def scaled(self, images: ImageData) -> Tensor:
        """Images as the network takes them."""
        if self.mean is None or self.std is None:
            return images.standardised()
        return images.scaled(self.mean, self.std)

    def inputs(self, split: Split) -> Data:
        """All images as the network takes them."""
        train, test = split.train, split.test
        return Data((self.scaled(train), train.labels), (self.scaled(test), test.labels), train.classes)

    def trained(self, data: Callable[[], Data]) -> tuple[torch.nn.Module, float | None]:
        """The network with its weights, or a baseline trained on the data, and then its accuracy."""
        if self.weights is None:
            baseline = Baseline(self.network, self.data_name, self.baseline_epochs, seed=self.seed)
            model, accuracy, _ = load_baseline(baseline, data(), self.out, self.device, progress=True)
            return model, accuracy
        model = build_network(self.network, self.seed)
        load_weights(model, self.weights)
        return model.eval(), None

    def load(self) -> tuple[torch.nn.Module, Data, float | None]:
        """The trained network and its data."""
        data = self.inputs(self.split())
        model, accuracy = self.trained(lambda: data)
        return model, data, accuracy
