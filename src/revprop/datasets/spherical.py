"""The 12-bit patterns on a sphere (Shwartz-Ziv and Tishby, 2017): all 4,096 of them, and a rule that turning the sphere keeps."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["load_spherical", "made_spherical"]

BITS = 12


def load_spherical(path: str | Path) -> tuple[Tensor, Tensor]:
    """Load the patterns and the labels of the rule from an ``.npz`` file with ``x`` (4096, 12) and ``y`` (4096,).

    Returns:
        patterns (4096, 12), float32 of 0 and 1, no two alike; labels (4096,), int64 of 0 and 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or its arrays are others; the message says what was expected.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: np.asarray(file[name]) for name in ("x", "y")}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an .npz file with the arrays x and y, found none ({error})") from error
    x, y = found["x"], found["y"]
    if (
        x.shape != (2**BITS, BITS)
        or y.shape != (2**BITS,)
        or not np.isin(x, (0, 1)).all()
        or not np.isin(y, (0, 1)).all()
    ):
        given = f"{x.dtype} {x.shape} and {y.dtype} {y.shape}"
        raise ValueError(f"{path}: expected 0 and 1 as x (4096, 12) and y (4096,), found {given}")
    if len(np.unique(x, axis=0)) != 2**BITS:
        raise ValueError(f"{path}: expected every pattern of 12 bits once, found some twice")
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.int64))


def made_spherical() -> tuple[Tensor, Tensor]:
    """Make a set of that kind: bits are points at the corners of an icosahedron, and a pattern is 1 where the sum of its points,
    |sum_i x_i v_i|, is longer than half of all are, which turning the sphere keeps. Easier than the rule of the paper.

    Returns:
        as :func:`load_spherical`.

    >>> x, y = made_spherical()
    >>> tuple(x.shape), round(float(y.float().mean()), 2)
    ((4096, 12), 0.5)
    """
    golden = (1 + 5**0.5) / 2
    corners = torch.tensor(
        [[float(v) for v in np.roll([0.0, a, b * golden], turn)] for turn in range(3) for a in (-1, 1) for b in (-1, 1)]
    )
    numbers = torch.arange(2**BITS)
    patterns = (numbers[:, None] >> torch.arange(BITS) & 1).float()
    length = (patterns @ corners).norm(dim=1)
    return patterns, (length > length.median() + 1e-4).long()
