"""What the tests of training and of experiments share: small networks, their data, and how to kill a run."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from revprop.experiments.baseline import Data
from revprop.networks import NETWORKS
from revprop.training import Training, fit


@functools.cache
def digits() -> Data:
    """300 training and 120 test images of scikit-learn's digits, standardised."""
    data = Data.load("digits")
    return Data((data.train[0][:300], data.train[1][:300]), (data.test[0][:120], data.test[1][:120]), data.classes)


@functools.cache
def _digits_weights() -> dict[str, Tensor]:
    model = NETWORKS["digits"](seed=0)

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(module(batch[0]), batch[1])}

    fit(model, digits().train, loss, Training(epochs=12, batch_size=16, device="cpu"))
    return model.state_dict()


def digits_network() -> nn.Module:
    """The digits network, trained a little: right on about nine digits of ten."""
    model = NETWORKS["digits"](seed=0)
    model.load_state_dict(_digits_weights())
    return model.eval()


class Block(nn.Module):
    """Two convolutions with batch norm around which the input goes, through a convolution of its own."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out)
        self.down = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(a)) + self.down(x))


class Residual(nn.Module):
    """(n, 2, 6, 6) -> (n, 4): a stem, two residual blocks, dropout, a linear map; running statistics that matter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(2, 4, 3)
            self.block1 = Block(4, 6)
            self.block2 = Block(6, 6)
            self.dropout = nn.Dropout(0.3)
            self.head = nn.Linear(6, 4)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr,operator]
                    module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr,operator]

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(torch.tanh(self.stem(x))))
        return self.head(self.dropout(x.mean((2, 3))))


class Tied(nn.Module):
    """(n, 1, 8, 8) -> (n, 10), with batch norm and two linear maps that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12))
        self.second, self.third = nn.Linear(12, 12), nn.Linear(12, 12)
        self.third.weight = self.second.weight
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))))


def residual_data(n: int = 60, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and labels for the residual network."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 4, (n,), generator=generator)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """The names of what differs in any bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# -- runs that are killed --------------------------------------------------------------------------


def run_and_kill(function: Callable[..., None], arguments: tuple[Any, ...], started: Path, after: float) -> bool:
    """Runs a function in a process of its own and kills it (SIGKILL) some seconds after the file ``started`` appeared.

    ``after`` may be infinite, for a run to its end. Returns whether the process was killed before it ended.
    """
    # a server that has imported everything once; each process is forked from it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_cases", "revprop.experiments.demo", "sklearn.model_selection"])
    process = context.Process(target=function, args=arguments)
    process.start()
    try:
        while not started.exists() and process.is_alive():
            time.sleep(0.002)
        process.join(None if after == float("inf") else after)
    finally:
        killed = process.is_alive()
        process.kill()
        process.join()
    assert killed or process.exitcode == 0, f"the process failed by itself: exit code {process.exitcode}"
    return killed
