"""STL-10 in its binary form: images and labels as bytes, each channel column by column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from revprop.datasets.files import walk_files
from revprop.datasets.images import Split, assemble_split

__all__ = ["STL10_NAMES", "load_stl10"]

STL10_NAMES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
UNLABELLED, CLASSES = "unlabeled_X.bin", "class_names.txt"
SIDE = 96
AT_ONCE = 1000  # images resized at a time

Bytes = npt.NDArray[np.uint8]


def load_stl10(path: str | Path, size: int | None = None, unlabelled: bool = False) -> Split:
    """Load ``train_X.bin``, ``train_y.bin``, ``test_X.bin`` and ``test_y.bin``, a folder or ``.tar.gz``.

    Args:
        path: the folder ``stl10_binary``, or the archive of it.
        size: height and width in pixels, resized with smoothing; None keeps 96.
        unlabelled: train on the images of ``unlabeled_X.bin`` (2.8 GB) instead. They have no labels, so there is one class then,
            "image", for the test part, too.

    Returns:
        images of 3 channels; classes as in ``class_names.txt``, "0", "1", ... without it.

    Raises:
        FileNotFoundError: there is no such file or folder, or files are missing (they are named).
        ValueError: a file is cut off or damaged, images and labels are not equally many, a label is not 1 to 10, a size below 1.

    >>> load_stl10("no-such-folder")
    Traceback (most recent call last):
    FileNotFoundError: no-such-folder: no such file or folder
    """
    source = Path(path)
    if size is not None and size < 1:
        raise ValueError(f"expected a size of at least 1 pixel, got {size}")
    wanted = (UNLABELLED, "test_X.bin") if unlabelled else STL10_NAMES
    found: dict[str, bytes] = {}
    for name, read in walk_files(source):
        if read is not None and name.name in (*wanted, CLASSES):
            found[name.name] = read()
    lacking = [name for name in wanted if name not in found]
    if lacking:
        raise FileNotFoundError(f"{source}: expected the files of STL-10, lacking {', '.join(lacking)}")
    images = {name: _images(found.pop(name), f"{source}: {name}", size) for name in wanted if name.endswith("_X.bin")}
    if unlabelled:
        arrays = [part for name in wanted for part in (images[name], np.zeros(len(images[name]), np.uint8))]
        return assemble_split("stl10-unlabelled", arrays, ["image"])
    arrays = []
    for part in ("train", "test"):
        pixels = images[f"{part}_X.bin"]
        arrays += [pixels, _labels(found[f"{part}_y.bin"], f"{source}: {part}_y.bin", len(pixels))]
    names = found.get(CLASSES, b"").decode("utf-8", "replace").split()
    return assemble_split("stl10", arrays, names or list(map(str, range(10))))


def _images(content: bytes, where: str, size: int | None) -> Bytes:
    each = 3 * SIDE * SIDE
    if not content or len(content) % each:
        raise ValueError(f"{where}: expected a whole number of images of {each:,} bytes, got {len(content):,} bytes")
    images = np.frombuffer(content, np.uint8).reshape(-1, 3, SIDE, SIDE).transpose(0, 1, 3, 2)
    if size is None or size == SIDE:
        return np.ascontiguousarray(images)
    resized = np.empty((len(images), 3, size, size), np.uint8)
    for begin in range(0, len(images), AT_ONCE):
        part = torch.from_numpy(images[begin : begin + AT_ONCE].astype(np.float32))
        smaller = torch.nn.functional.interpolate(part, (size, size), mode="bilinear", antialias=True)
        resized[begin : begin + AT_ONCE] = smaller.round().clamp(0, 255).to(torch.uint8).numpy()
    return resized


def _labels(content: bytes, where: str, count: int) -> Bytes:
    labels = np.frombuffer(content, np.uint8)
    if len(labels) != count:
        raise ValueError(f"{where}: expected as many labels as images, {count}, got {len(labels)}")
    if labels.min() < 1 or labels.max() > 10:
        raise ValueError(f"{where}: expected labels from 1 to 10, got {labels.min()} to {labels.max()}")
    return labels - np.uint8(1)
