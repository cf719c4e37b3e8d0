"""The data of the racecar study: a task by name, and what can be made of it: other labels, blurred or smaller images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from revprop.datasets import (
    ImageData,
    Split,
    data_root,
    find_data,
    load_n_mnist,
    load_spherical,
    made_spherical,
    motion_blurred,
)
from revprop.errors import near_matches
from revprop.experiments.baseline import Data, load_split

__all__ = ["CHANGES", "SPHERICAL", "find_task", "load_task"]

SPHERICAL = "spherical-12bit"
_FILES = {
    SPHERICAL: "mutual-information/spherical_12bit.npz",
    "n-mnist": "n-mnist/mnist-with-motion-blur.mat",
}
TRAINING_SHARE = 0.8  # of the patterns, as published: 3,277 of 4,096


def find_task(name: str) -> Path | None:
    """Tell where data of this name is, without reading it; None where there is none.

    Raises:
        ValueError: no such name.
    """
    if name in _FILES:
        path = data_root() / _FILES[name]
        return path if path.exists() else None
    return find_data(name)


def load_task(
    name: str, samples: int | None = None, test_samples: int | None = None, cache: Path | None = None
) -> Data:
    """Load a task: inputs in [0, 1], as the reverse pass of networks with ReLU needs them, and labels.

    Args:
        name: "spherical-12bit" or "made:spherical-12bit": 80 % of the patterns to train on, drawn once; "n-mnist"; or any
            images that :func:`revprop.datasets.load_data` knows. Behind it, after a comma and a blank, one of ``CHANGES``.
        samples, test_samples: so many of them, drawn once and for all seeds; None for all.
        cache: a folder that keeps the decoded images of archives.

    Raises:
        ValueError: an unknown name or change. FileNotFoundError: there is no such data.

    >>> a, b = load_task("made:spherical-12bit"), load_task("made:spherical-12bit, labels inverted")
    >>> tuple(a.train[0].shape), len(a.test[1]), bool((a.train[1] == 1 - b.train[1]).all())
    ((3277, 12), 819, True)
    """
    base, _, change = name.partition(", ")
    if change and change not in CHANGES:
        raise ValueError(near_matches(change, CHANGES, "change of a task"))
    if base.removeprefix("made:") == SPHERICAL:
        data = _patterns(base)
    else:
        split = load_n_mnist(_required(base)) if base == "n-mnist" else load_split(base, cache)
        data = _scaled(_IMAGES[change](split) if change in _IMAGES else split)
    data = Data(_some(data.train, samples), _some(data.test, test_samples), data.classes)
    return _LABELS[change](data) if change in _LABELS else data


def _required(name: str) -> Path:
    path = find_task(name)
    if path is None:
        raise FileNotFoundError(
            f"no data for {name!r}: looked in {data_root()} for {_FILES[name]}: set REVPROP_DATA to the folder that holds it"
        )
    return path


def _patterns(name: str) -> Data:
    x, y = load_spherical(_required(name)) if name == SPHERICAL else made_spherical()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[: round(TRAINING_SHARE * len(y))], order[round(TRAINING_SHARE * len(y)) :]
    return Data((x[train], y[train]), (x[test], y[test]), ("0", "1"))


def _scaled(split: Split) -> Data:
    train, test = ((part.images.float() / 255, part.labels) for part in (split.train, split.test))
    return Data(train, test, split.train.classes)


def _some(part: tuple[Tensor, Tensor], count: int | None) -> tuple[Tensor, Tensor]:
    if count is None or count >= len(part[1]):
        return part
    order = torch.randperm(len(part[1]), generator=torch.Generator().manual_seed(0))[:count]
    return part[0][order], part[1][order]


def _inverted(data: Data) -> Data:
    last = len(data.classes) - 1
    return replace(data, train=(data.train[0], last - data.train[1]), test=(data.test[0], last - data.test[1]))


def _blurred(split: Split) -> Split:
    return Split(motion_blurred(split.train), motion_blurred(split.test))


def _halved(split: Split) -> Split:
    def smaller(part: ImageData) -> ImageData:
        images = [torch.nn.functional.avg_pool2d(x.float(), 2).round().to(torch.uint8) for x in part.images.split(4096)]
        return replace(part, images=torch.cat(images))

    return Split(smaller(split.train), smaller(split.test))


_IMAGES: dict[str, Callable[[Split], Split]] = {"motion blur": _blurred, "halved": _halved}
_LABELS: dict[str, Callable[[Data], Data]] = {"labels inverted": _inverted}
CHANGES = (*_LABELS, *_IMAGES)
"""What a task can be changed by: the order of its classes turned round; images blurred by a motion of 5 pixels at 15 degrees, a
stand-in for n-MNIST; images of half the height and width."""
