"""What keeps an aligned encoder convergent: weights within a bound, and a start from orthogonal ones."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["WEIGHT_BOUND", "clamp_weights", "orthogonal_weights"]

WEIGHT_BOUND = math.sqrt(2.0)
"""Equation 9 of the paper: with ``w^2 < 2`` the steps of one weight converge (Equation 19)."""


@torch.no_grad()
def clamp_weights(module: nn.Module, bound: float = WEIGHT_BOUND) -> None:
    """Puts every weight back within ``[-bound, bound]``, in place: kernels and matrices, not biases or gains.

    Equation 9 of the paper: for one weight what makes ``r <- r - w (w r - z)`` converge. For a matrix it is
    necessary, not sufficient: what counts there is the largest singular value, which this does not bound.

    Args:
        module: whose parameters of two and more dimensions are clamped. bound: the largest absolute value.

    Raises:
        ValueError: a bound that is not positive.

    >>> layer = nn.Linear(1, 1)
    >>> _ = layer.weight.data.fill_(3.0)
    >>> clamp_weights(layer)
    >>> round(layer.weight.item(), 4)
    1.4142
    """
    if not bound > 0:
        raise ValueError(f"bound: expected a positive number, given {bound}")
    weights: list[torch.Tensor] = [p for p in module.parameters() if p.dim() > 1]
    if weights:
        torch._foreach_clamp_min_(weights, -bound)
        torch._foreach_clamp_max_(weights, bound)


@torch.no_grad()
def orthogonal_weights(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Gives every kernel and matrix orthonormal rows or columns (Saxe et al., 2014), in place; biases stay as they are.

    Biases are better not all zero where encoders start from zeros: then every pre-activation of a start at zero is zero, and
    all gates of a network of ReLUs are shut.

    Args:
        generator: what the matrices are drawn from; torch's own where not given.

    >>> layer = nn.Linear(5, 3)
    >>> orthogonal_weights(layer, torch.Generator().manual_seed(0))
    >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(3), atol=1e-5)
    True
    """
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.orthogonal_(parameter, generator=generator)
