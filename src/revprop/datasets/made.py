"""Made images in the shape of well-known data sets: for trying a program out where the data is not at hand."""

from __future__ import annotations

import torch

from revprop.datasets.images import ImageData, Split
from revprop.errors import near_matches

__all__ = ["MADE", "load_made"]

MADE = {
    "mnist": (1, 28, 10),
    "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100),
    "tiny-imagenet": (3, 64, 200),
    "imagenette": (3, 224, 10),
    "imagewoof": (3, 224, 10),
}
"""By name: channels, height and width, classes."""


def load_made(name: str, train: int | None = None, test: int | None = None, seed: int = 0) -> Split:
    """Make images in the shape of a data set: each class has one smooth random picture, each image is it with noise.

    They can be learned, and say nothing about the data set they are named after.

    Args:
        name: whose shape and number of classes: a key of ``MADE``.
        train, test: how many images of each class; None: as many as let a network be tried in seconds.
        seed: of the pictures and the noise.

    Returns:
        images in turn of each class, named "made:" and the name.

    Raises:
        ValueError: an unknown name, or less than one image of a class.

    >>> load_made("cifar100").train
    ImageData('made:cifar100', 400 images of 3x32x32, 100 classes)
    """
    if name not in MADE:
        raise ValueError(near_matches(name, MADE, "made data set"))
    channels, size, classes = MADE[name]
    usual = (1, 1) if size > 64 else (4, 2) if classes > 10 else (40, 20)
    counts = (usual[0] if train is None else train, usual[1] if test is None else test)
    if min(counts) < 1:
        raise ValueError(f"expected at least 1 image of each class, got {counts[0]} to train and {counts[1]} to test")
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(classes, channels, 4, 4, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    parts = []
    for count in counts:
        labels = torch.arange(classes).repeat(count)
        noise = 0.2 * torch.randn(len(labels), channels, size, size, generator=generator)
        images = (255 * (pictures[labels] + noise).clamp(0, 1)).to(torch.uint8)
        parts.append(ImageData(f"made:{name}", images, labels, tuple(map(str, range(classes)))))
    return Split(*parts)
