"""The Frechet distance between two sets of features, as normal distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from revprop.errors import require_finite

__all__ = ["frechet_distance"]


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)``, means and covariances of features (Equation 10).

    The root is that of a symmetric matrix, by its eigenvalues, in double precision: real, and never negative for sets with few
    samples, whose covariances are singular. It is the FID where features are those of Inception's last pooling layer; with any
    others it is not, and to be named after them. It is biased upwards the more the fewer samples there are: compare only
    distances between equally many, beside the one between two sets of real ones.

    Args:
        first, second: (n, features), n at least 2 each.

    Raises:
        ValueError: other shapes, or too few samples. NonFiniteError: NaN or infinity.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> round(frechet_distance(x, x + torch.tensor([2.0, 0.0, 0.0])), 3), round(frechet_distance(x, x), 6) + 0.0
    (4.0, 0.0)
    """
    for name, features in (("first", first), ("second", second)):
        if features.dim() != 2 or len(features) < 2 or features.shape[1] != first.shape[-1]:
            raise ValueError(
                f"{name}: expected features (n, {first.shape[-1]}) of at least 2 samples, given {tuple(features.shape)}"
            )
        require_finite(features, name)
    one, two = first.double(), second.double()
    a, b = (torch.atleast_2d(features.T.cov()) for features in (one, two))
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    middle = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    distance = (one.mean(0) - two.mean(0)).square().sum() + a.trace() + b.trace() - 2 * middle
    return max(float(distance), 0.0)
