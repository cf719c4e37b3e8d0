"""What the training loop asks of these models."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Trainable"]


class Trainable(Protocol):
    """A model that says itself what each of its optimizers minimises. Every model of this package is one."""

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each optimizer, by the name of the part: "encoder", "generator", "discriminator"."""

    def losses(
        self, batch: tuple[Tensor, ...], generator: torch.Generator | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """For each part its terms, scalars by name, of which "loss" is minimised; all of them at the parameters as they are.

        Args:
            batch: images (n, ...), then their labels (n,) where a model looks at them. generator: of all that is drawn; torch's
                own where not given.
        """

    def constrain(self) -> None:
        """Puts the parameters back where they may be; called before each batch."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """Images as the model gives them back."""
