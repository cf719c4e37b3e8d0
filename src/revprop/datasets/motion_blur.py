"""Digits blurred as by a moving camera: n-MNIST's own file (Basu et al., 2017), and a stand-in made from sharp images."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from revprop.datasets.images import ImageData, Split, assemble_split

__all__ = ["load_n_mnist", "motion_blurred", "motion_kernel"]


def motion_kernel(length: float = 5, angle: float = 15) -> Tensor:
    """The filter of a linear motion, as MATLAB's ``fspecial('motion', length, angle)`` makes it.

    A pixel weighs 1 minus its distance to the line through the centre, or to the line's end where it is at least as far out as
    that (though beside it), and nothing where that is 1 or more.

    Args:
        length: in pixels, at least 1. angle: in degrees, counter-clockwise from the horizontal.

    Returns:
        (odd, odd), float64, of sum 1, the same when turned by half a turn.

    Raises:
        ValueError: a length below 1.

    >>> motion_kernel(5, 0)
    tensor([[0.2000, 0.2000, 0.2000, 0.2000, 0.2000]], dtype=torch.float64)
    >>> tuple(motion_kernel(5, 15).shape)
    (3, 5)
    """
    if length < 1:
        raise ValueError(f"length: expected at least 1 pixel, given {length}")
    half, turn = (length - 1) / 2, math.radians(angle)
    cosine, sine = math.cos(turn), math.sin(turn)
    tiny = 1e-9  # a pixel at a distance of exactly 1 weighs nothing: it needs no row or column
    across, up = (int(half * abs(part) + 1 - tiny) for part in (cosine, sine))
    y, x = torch.meshgrid(
        torch.arange(up, -up - 1, -1, dtype=torch.float64),  # the first row is the highest
        torch.arange(-across, across + 1, dtype=torch.float64),
        indexing="ij",
    )
    along, aside = x * cosine + y * sine, y * cosine - x * sine
    beyond = torch.where(x.square() + y.square() >= half**2, along.abs() - half, 0.0)
    weight = (1 - (aside.square() + beyond.square()).sqrt()).clamp(min=0)
    return weight / weight.sum()


def motion_blurred(data: ImageData, length: float = 5, angle: float = 15) -> ImageData:
    """Blur images by a linear motion; outside of them everything is black. A stand-in for n-MNIST, which is documented as MNIST
    blurred by 5 pixels at 15 degrees.

    Args:
        data: images. length, angle: as for :func:`motion_kernel`.

    Returns:
        the same images, blurred and rounded to whole numbers, under the same name.

    >>> from revprop.datasets.made import load_made
    >>> sharp = load_made("mnist").test
    >>> motion_blurred(sharp).images.shape == sharp.images.shape
    True
    """
    kernel = motion_kernel(length, angle).float()
    channels = data.images.shape[1]
    weight = kernel.expand(channels, 1, *kernel.shape)
    padding = (kernel.shape[0] // 2, kernel.shape[1] // 2)
    parts = [
        torch.conv2d(part.float(), weight, padding=padding, groups=channels).round().clamp(0, 255).to(torch.uint8)
        for part in data.images.split(4096)
    ]
    return replace(data, images=torch.cat(parts) if parts else data.images)


def load_n_mnist(path: str | Path) -> Split:
    """Load n-MNIST as it is published: a MATLAB file with ``train_x`` (60000, 784), ``train_y`` (60000, 10) and the same of
    ``test``.

    Returns:
        images of 1x28x28, row by row; labels where the one-hot rows have their 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file; the message says what was expected.
    """
    from scipy.io import loadmat, matlab  # here: only those who have the file need it

    try:
        found = loadmat(str(path))
    except (ValueError, NotImplementedError, TypeError, matlab.MatReadError) as error:
        raise ValueError(f"{path}: expected a MATLAB file, found none that can be read ({error})") from error
    arrays = []
    for part in ("train", "test"):
        x, y = (np.asarray(found.get(f"{part}_{name}", np.empty(0))) for name in ("x", "y"))
        if x.ndim != 2 or x.shape[1] != 784 or x.dtype != np.uint8 or y.shape != (len(x), 10):
            given = f"{x.dtype} {x.shape} and {y.shape}"
            raise ValueError(f"{path}: expected {part}_x as uint8 (n, 784) and {part}_y as (n, 10), found {given}")
        arrays += [x.reshape(-1, 1, 28, 28), y.argmax(1)]
    return assemble_split("n-mnist", arrays)
