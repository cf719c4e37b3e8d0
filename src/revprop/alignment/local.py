"""Feature alignment layer by layer (Algorithms 2 and 3): no gradient passes from one layer to another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revprop.alignment.encoder import FeatureAligned, Output, half_squares

__all__ = ["ARCSINH", "LocalFeatureAligned"]

Bijection = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
ARCSINH: Bijection = (torch.asinh, torch.sinh)
"""An activation and its inverse: the inverse hyperbolic sine, which loses nothing."""


class LocalFeatureAligned(nn.Module):
    """A chain of layers, each trained by itself to give its own input back from its own output.

    ``forward`` computes ``z_l = E_l(x_l)``, ``x_(l+1) = activation(z_l)``, with no activation behind the last layer. Each layer
    minimises ``1/2 |x_l - r_l|^2``, ``r_l`` being its own inversion of z_l (:class:`FeatureAligned`), and x_(l+1) is passed on
    detached (Algorithm 2). ``invert`` walks back: the steps of a layer, then the inverse of the activation in front of it
    (Algorithm 3). What is alive at a time in training is one layer's.

    Args:
        layers: each without its activation. input_shape: of one example. activation: with its inverse. output: what the image goes
            through at the end of ``invert``: None, "sigmoid" or "tanh". options: those of :class:`FeatureAligned`, for each layer.

    Raises:
        ValueError: no layers. And what :class:`FeatureAligned` raises.

    >>> model = LocalFeatureAligned([nn.Linear(6, 4), nn.Linear(4, 2)], (6,))
    >>> model.reconstruct(torch.randn(3, 6)).shape
    torch.Size([3, 6])
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        input_shape: Sequence[int],
        activation: Bijection = ARCSINH,
        output: Output | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers: expected at least one, given none")
        self.activation = activation
        aligned: list[FeatureAligned] = []
        like = next((p for layer in layers for p in layer.parameters()), torch.zeros(()))
        x = torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)
        for layer in layers:
            aligned.append(FeatureAligned(layer, x.shape[1:], output=None if aligned else output, **options))
            with torch.no_grad():
                x = layer(x)
        self.layers = nn.ModuleList(aligned)

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's output."""
        for index in range(len(self.layers)):
            x = self._layer(index)(x if index == 0 else self.activation[0](x))
        return x

    def invert(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The input that z stands for, layer by layer from the last (Algorithm 3)."""
        for index in reversed(range(len(self.layers))):
            z = self._layer(index).invert(z, generator)
            if index:
                z = self.activation[1](z)
        return z

    def reconstruct(self, x: Tensor) -> Tensor:
        """``invert`` of what the last layer says."""
        with torch.no_grad():
            return self.invert(self(x))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer's parameters: "encoder"."""
        return {"encoder": list(self.parameters())}

    def losses(
        self, batch: tuple[Tensor, ...], generator: torch.Generator | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """ "layer 1", "layer 2", ..., each of which depends on its own layer alone, and their sum "loss"."""
        x, terms = batch[0], {}
        for index in range(len(self.layers)):
            layer = self._layer(index)
            x = (x if index == 0 else self.activation[0](x)).detach()
            z, found = layer.encode(x)
            terms[f"layer {index + 1}"] = half_squares(x - layer.steps_towards(z, found, generator))
            x = z
        return {"encoder": {"loss": torch.stack(list(terms.values())).sum(), **terms}}

    def constrain(self) -> None:
        """Puts the weights of every layer back within the bound."""
        for index in range(len(self.layers)):
            self._layer(index).constrain()

    def _layer(self, index: int) -> FeatureAligned:
        layer = self.layers[index]
        assert isinstance(layer, FeatureAligned)
        return layer
