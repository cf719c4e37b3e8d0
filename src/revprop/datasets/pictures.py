"""Single pictures by name or path: what is stylised, and whose style is taken."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from revprop.datasets.files import walk_files
from revprop.datasets.image_folder import SUFFIXES, decode_image
from revprop.errors import near_matches

__all__ = ["load_picture"]

SAMPLES = ("china", "flower")  # which scikit-learn brings along


def load_picture(spec: str | Path, size: int, archive: Path | None = None) -> Tensor:
    """Load the largest central square of one picture.

    Args:
        spec: "china" or "flower", photographs that come with scikit-learn; the path of a JPEG or PNG file; or, where an archive
            is given, a file in it by the end of its name without suffix ("tench" for ``n01440764_tench.JPEG``).
        size: height and width in pixels, to which the square is resized.
        archive: a folder or tar archive of pictures.

    Returns:
        (3, size, size), uint8.

    Raises:
        ValueError: no such picture in the archive (the near matches are given), it cannot be decoded, or a size below 1.
        FileNotFoundError: no such file.

    >>> load_picture("china", 32).shape
    torch.Size([3, 32, 32])
    """
    if size < 1:
        raise ValueError(f"expected a size of at least 1 pixel, got {size}")
    if spec in SAMPLES:
        content = importlib.resources.files("sklearn.datasets.images").joinpath(f"{spec}.jpg").read_bytes()
        return _decoded(content, str(spec), size)
    path = Path(spec)
    if path.suffix.lower() in SUFFIXES or archive is None:
        if not path.is_file():
            raise FileNotFoundError(f"no picture {path}: give {' or '.join(map(repr, SAMPLES))}, or a file's path")
        return _decoded(path.read_bytes(), str(path), size)
    known = list(SAMPLES)
    found: Tensor | None = None
    for name, read in walk_files(archive):
        if read is None or name.suffix.lower() not in SUFFIXES:
            continue
        known.append(name.stem.partition("_")[2] or name.stem)
        if found is None and (name.stem == spec or name.stem.endswith(f"_{spec}")):
            found = _decoded(read(), f"{archive}: {name}", size)
    if found is None:
        raise ValueError(f"{near_matches(str(spec), known, f'picture in {archive}')} (Or give the path of a file.)")
    return found


def _decoded(content: bytes, where: str, size: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(decode_image(content, where, size)))
