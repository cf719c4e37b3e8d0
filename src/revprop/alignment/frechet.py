"""The Frechet distance between two sets of features, as normal distributions."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from revprop.errors import require_finite

__all__ = ["frechet_distance", "image_distance"]


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


@torch.no_grad()
def image_distance(network: Callable[[Tensor], Tensor], real: Tensor, made: Tensor, batch: int = 256) -> float:
    """:func:`frechet_distance` of two sets of images in a network's features, batch by batch, by torchmetrics where it is
    installed (the extra "metrics"): only sums are kept then, however many images there are. Else by :func:`frechet_distance`.

    Both give the same number. The FID is what it gives for the features of Inception, such as torchmetrics'
    ``NoTrainInceptionV3("inception-v3-compat", ["2048"], PATH)`` with torch-fidelity and its weights at hand (uint8 images).

    Args:
        network: images to features, (n, ...) -> (n, features), in eval mode; features of more dimensions are flattened.
        real, made: images as the network takes them; at least 2 each.

    Raises:
        ValueError: too few images, or a batch below 1. NonFiniteError: features that are not finite.

    >>> x = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> round(image_distance(nn.Flatten(), x, x + 1), 3)
    16.0
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, given {batch}")
    for name, images in (("real", real), ("made", made)):
        if len(images) < 2:
            raise ValueError(f"{name}: expected at least 2 images, given {len(images)}")
    features = _Features(network, real[:1])
    try:
        found = importlib.import_module("torchmetrics.image.fid")
    except ImportError:
        sets = [torch.cat([features(part) for part in images.split(batch)]) for images in (real, made)]
        return frechet_distance(*sets)
    metric = found.FrechetInceptionDistance(features).to(real.device)
    for images, is_real in ((real, True), (made, False)):
        for part in images.split(batch):
            metric.update(part, real=is_real)
    return max(float(metric.compute()), 0.0)


class _Features(nn.Module):
    """A network as torchmetrics asks for one: with the number of its features, in double precision."""

    def __init__(self, network: Callable[[Tensor], Tensor], example: Tensor) -> None:
        super().__init__()
        self.network = network
        self.num_features = self(example).shape[1]

    def forward(self, x: Tensor) -> Tensor:
        features = self.network(x).flatten(1).double()
        require_finite(features, "features")
        return features
