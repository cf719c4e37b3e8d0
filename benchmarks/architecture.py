"""One architecture of the coverage page: how it is built, what it is fed, and seeded weights that look like trained ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Input = Callable[[int, torch.Generator], Tensor]

CALIBRATION = 16  # samples that set the statistics of batch norm


def numbers(*shape: int) -> Input:
    """Normally distributed values (n, *shape): images, sequences of vectors, plain vectors."""
    return lambda n, generator: torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def tokens(length: int, vocabulary: int = 64) -> Input:
    """Token indices (n, length)."""
    return lambda n, generator: torch.randint(vocabulary, (n, length), generator=generator)


def mask(length: int) -> Input:
    """An attention mask (n, length) of zeros and ones: every other sample is padded by a quarter of the length."""

    def make(n: int, generator: torch.Generator) -> Tensor:
        kept = torch.ones(n, length, dtype=torch.int64)
        kept[1::2, length - length // 4 :] = 0
        return kept

    return make


@dataclass(frozen=True)
class Architecture:
    """One architecture, as the page names it.

    Attributes:
        name, family, source: what it is called, what kind it is, whose definition it is.
        build: makes it, with random weights and nothing downloaded.
        inputs: makes each of its inputs, given the batch size and a generator.
        classes: whether its output is (n, classes), so that labels can be asked for.
        output: which of several outputs is reversed: a key, an index or an attribute; None where it returns one tensor.
        batch: samples reconstructed at once.
    """

    name: str
    family: str
    source: str
    build: Callable[[], nn.Module]
    inputs: tuple[Input, ...]
    classes: bool = True
    output: str | int | None = None
    batch: int = 2

    def example(self, n: int, seed: int) -> tuple[Tensor, ...]:
        """A batch of n samples."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(make(n, generator) for make in self.inputs)

    def model(self, seed: int = 0) -> nn.Module:
        """The network in float64 and eval mode, its weights a function of the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().double()
            perturb_constants(model, torch.Generator().manual_seed(seed))
            calibrate(model, self.example(CALIBRATION, seed + 1))
        return model.eval()


class Pick(nn.Module):
    """A network of several outputs as one that returns the one to be reversed."""

    def __init__(self, network: nn.Module, output: str | int) -> None:
        super().__init__()
        self.network = network
        self.output = output

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        return pick(self.network(first) if second is None else self.network(first, second), self.output)


def pick(results: object, output: str | int) -> Tensor:
    """One tensor out of a tuple, a mapping or a data class."""
    found = results[output] if isinstance(output, int) or isinstance(results, dict) else getattr(results, output)  # type: ignore[index]
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def perturb_constants(model: nn.Module, generator: torch.Generator) -> None:
    """Replaces what initialisation left constant: biases and heads of zeros, gains of ones, layer scales of 1e-6.

    Fresh networks of some families compute nothing of their input, or pass it through unchanged: trained ones do neither.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel() or parameter.min() != parameter.max():
            continue
        value = float(parameter.flatten()[0])
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if abs(value) >= 0.1:  # gains
            parameter.mul_(1 + 0.1 * noise)
        elif value == 0 and parameter.dim() < 2:  # biases
            parameter.copy_(0.1 * noise)
        elif value == 0:  # heads, embeddings of positions
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
        else:  # scales of residual branches
            parameter.copy_(0.2 * (1 + 0.1 * noise))


def calibrate(model: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Sets the statistics of batch norm from one batch, as training would."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    with torch.no_grad(), _momentum(norms):
        model.train()
        model(*example)


@contextmanager
def _momentum(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    yield
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
