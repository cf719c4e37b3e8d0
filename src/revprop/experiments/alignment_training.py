"""One way to train feature alignment's models and what they are compared with: the loop of :mod:`revprop.training`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from revprop.alignment import Trainable
from revprop.recipe import Recipe, fused
from revprop.training import Epoch, Training, fit

__all__ = ["AdamWith", "generator_rates", "train_generative"]


@dataclass(frozen=True)
class AdamWith(Recipe):
    """A recipe by Adam with averages of its own.

    >>> AdamWith(betas=(0.5, 0.999)).optimizer_of(nn.Linear(1, 1).parameters(), 0.1).defaults["betas"]
    (0.5, 0.999)
    """

    betas: tuple[float, float] = (0.9, 0.999)

    def optimizer_of(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """Adam, with these averages."""
        found = list(parameters)
        return torch.optim.Adam(found, lr=rate, betas=self.betas, fused=fused(found))


def generator_rates(model: nn.Module, rate: float) -> dict[str, float]:
    """A learning rate of its own for the generator, where the model has one and the rate is not 0: what contends with a
    discriminator may need larger steps.

    >>> from revprop.alignment import GAN, AutoEncoder
    >>> generator_rates(GAN(nn.Linear(2, 4), nn.Linear(4, 1), 2), 1e-3)
    {'generator': 0.001}
    >>> generator_rates(AutoEncoder(nn.Linear(4, 2), nn.Linear(2, 4)), 1e-3)
    {}
    """
    return {"generator": rate} if rate and "generator" in cast("Trainable", model).parts() else {}


def train_generative(
    model: nn.Module,
    data: tuple[Tensor, ...],
    training: Training,
    identity: Mapping[str, Any] | None = None,
    before_epoch: Callable[[int], None] | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[Epoch]:
    """Trains a model that says itself what each of its parts minimises, in place, on shuffled batches.

    Before each batch the weights are put back within their bound; then all parts are stepped at once. All that is drawn comes
    from ``training.seed`` and the epoch's number, so a run that was killed continues to the same numbers.

    Args:
        model: a :class:`revprop.alignment.Trainable`. data: images, labels behind them where the model looks at them.
        training: epochs, batch size, learning rate, checkpoint, ...; identity: what a checkpoint belongs to.
        before_epoch: called with the number of each epoch as it begins.
        rates: learning rates of parts, where they are others than the training's.

    Returns:
        The history. Losses are named "encoder reconstruction", "generator adversarial", ...; "loss" is the sum of all parts'.

    Raises:
        TrainingDivergedError: a loss that is not finite; says step and terms. ValueError: a checkpoint of other settings.

    >>> from revprop.alignment import FeatureAligned
    >>> encoder = FeatureAligned(nn.Linear(3, 2), (3,))
    >>> history = train_generative(encoder, (torch.randn(64, 3),), Training(epochs=2, device="cpu"))
    >>> sorted(history[-1].losses)
    ['encoder', 'loss']
    """
    trainable = cast("Trainable", model)
    parts = trainable.parts()

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        model.train()
        trainable.constrain()
        found = trainable.losses(batch)
        named = {
            part if term == "loss" else f"{part} {term}": value for part in parts for term, value in found[part].items()
        }
        return {"loss": torch.stack([found[part]["loss"].detach() for part in parts]).sum(), **named}

    about = {**(identity or {}), "rates": dict(rates)} if rates else identity
    history = fit(model, data, loss, training, None, about, "training", before_epoch, parts=parts, rates=rates).history
    trainable.constrain()
    model.eval()
    return history
