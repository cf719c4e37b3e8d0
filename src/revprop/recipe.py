"""How a baseline is trained where plain Adam is not what is wanted: optimizer, learning rates, penalty, changed images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revprop.errors import near_matches

__all__ = ["AUGMENTATIONS", "Recipe", "augmented", "flipped", "fused", "set_apart"]

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
AUGMENTATIONS = ("", "flips", "adjoint")
RISING = 0.3  # of a cycle


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Attributes:
        optimizer: "adam", or "sgd": gradient descent without momentum.
        rates: (epochs, learning rate): so many epochs with the first rate, so many with the next, ...; the last of them to the
            end. None: the one rate all along.
        one_cycle: the rate rises linearly from 0 in the first 30 % of the steps, and falls linearly to 0 in the others.
        l1: weight of the sum of the absolute values of all kernels and matrices in the loss.
        augmentation: "" for none; "flips" from left to right; "adjoint": all those of :func:`augmented`.
        precision: as fabric names it; "bf16-mixed" takes half of the time on a CPU that has the instructions.

    Raises:
        ValueError: an unknown optimizer or augmentation, a negative weight, rates beside a cycle.

    >>> [round(Recipe(one_cycle=True).rate(1.0, done, 10), 2) for done in (0, 1.5, 3, 6.5, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    >>> [Recipe(rates=((2, 0.1), (1, 0.01))).rate(1.0, done, 4) for done in (0, 1.9, 2, 3.5)]
    [0.1, 0.1, 0.01, 0.01]
    """

    optimizer: str = "adam"
    rates: tuple[tuple[int, float], ...] | None = None
    one_cycle: bool = False
    l1: float = 0.0
    augmentation: str = ""
    precision: str = "32-true"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(near_matches(self.optimizer, OPTIMIZERS, "optimizer"))
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(near_matches(self.augmentation, AUGMENTATIONS, "augmentation"))
        if self.l1 < 0:
            raise ValueError(f"l1: expected a weight of at least 0, given {self.l1}")
        if self.rates is not None and (self.one_cycle or not self.rates):
            raise ValueError("rates: expected at least one, and none beside a cycle")

    def optimizer_of(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """The optimizer of some parameters."""
        found = list(parameters)
        return OPTIMIZERS[self.optimizer](found, lr=rate, fused=fused(found))

    def rate(self, rate: float, done: float, epochs: int) -> float:
        """The learning rate of a step.

        Args:
            rate: the largest, or the one. done: epochs done before the step, with fractions. epochs: in all.
        """
        if self.one_cycle:
            share = done / max(epochs, 1)
            return rate * min(share / RISING, (1 - share) / (1 - RISING))
        if self.rates is None:
            return rate
        until = 0
        for count, value in self.rates:
            until += count
            if done < until:
                return value
        return self.rates[-1][1]

    def penalty(self, module: nn.Module) -> Tensor | None:
        """The penalty on a network's kernels; None where it has no weight."""
        if not self.l1:
            return None
        return self.l1 * torch.stack([p.abs().sum() for p in module.parameters() if p.dim() > 1]).sum()

    def augment(self, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
        """A batch as it is trained on, drawn from torch's generator; mean, std: by which its pixels in [0, 1] are scaled.

        Raises:
            ValueError: "adjoint" for images that are not scaled so.
        """
        if self.augmentation == "adjoint":
            if mean is None or std is None:
                raise ValueError(
                    "augmentation 'adjoint' changes pixels in [0, 1]: give the mean and std they are scaled by"
                )
            shift, scale = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
            return (augmented(images * scale + shift) - shift) / scale
        return flipped(images) if self.augmentation else images


def fused(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether torch has a kernel that steps all of these at once: several times faster for networks of small layers.

    >>> fused(list(nn.Linear(2, 3).parameters())), fused([])
    (True, False)
    """
    return bool(parameters) and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def set_apart(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], rate: float) -> None:
    """Gives some of an optimizer's parameters a group of their own, whose "rate" is not the others'.

    >>> layer = nn.Linear(1, 1)
    >>> optimizer = torch.optim.Adam(layer.parameters())
    >>> set_apart(optimizer, [layer.bias], 0.1)
    >>> [(len(group["params"]), group.get("rate")) for group in optimizer.param_groups]
    [(1, None), (1, 0.1)]
    """
    own, rest = list(parameters), optimizer.param_groups[0]
    apart = {id(p) for p in own}
    rest["params"] = [p for p in rest["params"] if id(p) not in apart]
    optimizer.add_param_group({"params": own, "rate": rate})


def flipped(images: Tensor) -> Tensor:
    """Each image (n, c, h, w) as it is or mirrored from left to right, at random.

    >>> flipped(torch.ones(2, 1, 3, 3)).shape
    torch.Size([2, 1, 3, 3])
    """
    return torch.where(_uniform(images, 0, 1) < 0.5, images.flip(3), images)


def augmented(images: Tensor) -> Tensor:
    """Images changed at random as in AdjointBackMapV2 section 4.1: mirrored; saturation times 0 to 2 (between an image and its
    grey one); contrast times 0.4 to 1.6; brightness plus -0.5 to 0.5; cut out at random after enlargement by an eighth.

    Args:
        images: (n, 3, h, w), pixels in [0, 1].

    >>> augmented(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    """
    n, _, height, width = images.shape
    x = flipped(images)
    grey = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    x = grey + _uniform(x, 0.0, 2.0) * (x - grey)
    mean = x.mean((2, 3), keepdim=True)
    x = mean + _uniform(x, 0.4, 1.6) * (x - mean) + _uniform(x, -0.5, 0.5)
    larger = nn.functional.interpolate(x, (height * 9 // 8, width * 9 // 8), mode="bilinear")
    rows, columns = (
        torch.randint(large - small + 1, (n, 1), device=x.device) + torch.arange(small, device=x.device)
        for large, small in zip(larger.shape[2:], (height, width), strict=True)
    )
    picked = larger[torch.arange(n, device=x.device).view(n, 1, 1), :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1)


def _uniform(images: Tensor, low: float, high: float) -> Tensor:
    """A number for each image, (n, 1, 1, 1)."""
    return low + (high - low) * torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)
