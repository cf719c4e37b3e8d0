"""Labelled images in memory, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["ImageData", "Split", "assemble_split"]


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Images of one size with one label each. May hold no image at all (an empty subset).

    Args:
        name: what to call the data in tables.
        images: (n, c, h, w), uint8, 0 to 255.
        labels: (n,), int64, indices into ``classes``.
        classes: the names of the classes.

    Raises:
        ValueError: a wrong dtype or shape, a label out of range, or no classes.

    >>> data = ImageData("two", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ("even", "odd"))
    >>> data, len(data)
    (ImageData('two', 2 images of 1x4x4, 2 classes), 2)
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
            given = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"{self.name}: expected images as torch.uint8 of shape (n, c, h, w), got {given}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            given = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(f"{self.name}: expected labels as torch.int64 of shape ({len(images)},), got {given}")
        if not self.classes:
            raise ValueError(f"{self.name}: expected the names of at least one class, got none")
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= len(self.classes)):
            given = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"{self.name}: expected labels from 0 to {len(self.classes) - 1}, got {given}")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"{type(self).__name__}({self.name!r}, {len(self)} images of {shape}, {len(self.classes)} classes)"

    def subset(self, indices: Sequence[int] | Tensor) -> ImageData:
        """Copy the images at ``indices``, in that order, with their labels.

        Args:
            indices: (m,), whole numbers from 0 to n - 1; may be empty, may repeat.

        Returns:
            the m images, of the same name and classes.

        Raises:
            IndexError: an index is not in 0 .. n - 1.

        >>> from revprop.datasets import load_digits
        >>> load_digits().test.subset([0, 5]).labels.shape
        torch.Size([2])
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if len(chosen) and (int(chosen.min()) < 0 or int(chosen.max()) >= len(self)):
            given = f"{int(chosen.min())} to {int(chosen.max())}"
            raise IndexError(f"{self.name}: expected indices from 0 to {len(self) - 1}, got {given}")
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def standardised(self, dtype: torch.dtype = torch.float32, chunk: int | None = None) -> Tensor:
        """Give each channel of each image zero mean and unit (population) variance: FR-PT's "instance normalisation".

        A constant channel becomes zeros. Statistics are computed in float64.

        Args:
            dtype: the floating-point type of the result.
            chunk: images to convert at once; None takes as many as 128 MiB of float64 hold.

        Returns:
            (n, c, h, w).

        Raises:
            ValueError: ``dtype`` is not a floating-point type, or ``chunk`` is less than 1.

        >>> from revprop.datasets import load_digits
        >>> x = load_digits().test.standardised(torch.float64)
        >>> bool(x.mean(dim=(2, 3)).abs().max() < 1e-12)
        True
        """
        out = torch.empty(self.images.shape, dtype=_require_float(dtype))
        chunk = max(1, 2**24 // math.prod(self.images.shape[1:])) if chunk is None else chunk
        if chunk < 1:
            raise ValueError(f"expected a chunk of at least 1 image, got {chunk}")
        for begin in range(0, len(self), chunk):
            part = self.images[begin : begin + chunk].double()
            part -= part.mean(dim=(2, 3), keepdim=True)
            deviation = part.square().mean(dim=(2, 3), keepdim=True).sqrt()
            # Pixels are whole numbers, so a constant channel is exactly zero by now, and stays so.
            out[begin : begin + chunk] = part / deviation.where(deviation > 0, 1.0)
        return out

    def scaled(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        """Scale to [0, 1], subtract ``mean`` and divide by ``std``, channel by channel.

        Args:
            mean: one number per channel, in units of the [0, 1] image.
            std: one positive number per channel, in the same units.
            dtype: the floating-point type of the result.

        Returns:
            (n, c, h, w).

        Raises:
            ValueError: not one number per channel, a ``std`` that is not positive, or no floating-point ``dtype``.

        >>> from revprop.datasets import load_digits
        >>> load_digits().test.scaled([0.5], [0.5]).min()
        tensor(-1.)
        """
        channels = self.images.shape[1]
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"expected {channels} means and standard deviations, got {len(mean)} and {len(std)}")
        if not all(map(math.isfinite, mean)) or not all(math.isfinite(s) and s > 0 for s in std):
            raise ValueError(f"expected finite means and positive standard deviations, got {mean} and {std}")
        shift, scale = (torch.tensor(list(v), dtype=_require_float(dtype)).view(-1, 1, 1) for v in (mean, std))
        return self.images.to(dtype).div_(255).sub_(shift).div_(scale)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return ``(standardised(), labels)``: what a training loop takes.

        >>> from revprop.datasets import load_digits
        >>> [tuple(t.shape) for t in load_digits(test_share=0.2).test.tensors()]
        [(360, 1, 8, 8), (360,)]
        """
        return self.standardised(), self.labels


@dataclass(frozen=True, eq=False)
class Split:
    """Training and test images of the same classes and the same size, neither empty.

    Raises:
        ValueError: a part is empty, or classes or sizes differ.

    >>> from revprop.datasets import load_digits
    >>> load_digits().test
    ImageData('digits', 450 images of 1x8x8, 10 classes)
    """

    train: ImageData
    test: ImageData

    def __post_init__(self) -> None:
        name = self.train.name
        for part, data in (("training", self.train), ("test", self.test)):
            if not len(data):
                raise ValueError(f"{name}: expected at least one {part} image, got none")
        if self.train.classes != self.test.classes:
            odd = sorted(set(self.train.classes) ^ set(self.test.classes))
            raise ValueError(f"{name}: expected the same classes for training and test; in one of them only: {odd}")
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            sizes = [tuple(data.images.shape[1:]) for data in (self.train, self.test)]
            raise ValueError(f"{name}: expected training and test images of one size, got {sizes[0]} and {sizes[1]}")


def assemble_split(
    name: str, arrays: Sequence[npt.NDArray[Any]], classes: Sequence[str] | npt.NDArray[Any] = ()
) -> Split:
    """Make a split of training images (n, c, h, w) and labels (n,) and the same for testing.

    Classes without names are named by their numbers.
    """
    highest = max(int(labels.max(initial=0)) for labels in (arrays[1], arrays[3]))
    if highest >= 2**20:  # no labels, then; and naming so many classes would take all memory
        raise ValueError(f"{name}: expected labels that count classes from 0, got {highest}")
    names = tuple(map(str, classes)) or tuple(map(str, range(highest + 1)))
    train, test = (
        ImageData(name, torch.from_numpy(np.require(x, requirements=["C", "W"])), torch.from_numpy(y), names)
        for x, y in ((arrays[0], arrays[1].astype(np.int64)), (arrays[2], arrays[3].astype(np.int64)))
    )
    return Split(train, test)


def _require_float(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        raise ValueError(f"expected a floating-point dtype, got {dtype}")
    return dtype
