"""CelebA: faces in one folder, and a list of their attributes, of which one is the label."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from revprop.datasets.files import name_data, walk_files
from revprop.datasets.image_folder import SUFFIXES, decode_image
from revprop.datasets.images import Split, assemble_split
from revprop.errors import near_matches

__all__ = ["ATTRIBUTES", "load_celeba"]

ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv", "attributes.csv")
PARTITION = ("list_eval_partition.txt", "list_eval_partition.csv")
EVERY = 5  # the test part without a partition


def load_celeba(path: str | Path, size: int | None = None, attribute: str = "smiling") -> Split:
    """Load images and ``list_attr_celeba.txt``, as CelebA comes, or a table ``attributes.csv`` of the same kind.

    Where ``list_eval_partition.txt`` is there, its part 0 is trained on and its part 2 tested on; else every fifth image, in the
    order of their names, is of the test part.

    Args:
        path: a folder, or a tar archive of it.
        size: height and width in pixels: the largest central square is cut out and resized. None keeps the size.
        attribute: the label, of class "no" or "yes"; upper and lower case are the same.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no list of attributes, or no such attribute in it; an image that is not in the lists, cannot be decoded, or
            is of another size than the first; no images; a damaged archive.

    >>> load_celeba("no-such-folder")
    Traceback (most recent call last):
    FileNotFoundError: no-such-folder: no such file or folder
    """
    source = Path(path)
    if size is not None and size < 1:
        raise ValueError(f"expected a size of at least 1 pixel, got {size}")
    images: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = {}
    lists: dict[str, str] = {}
    for name, read in walk_files(source):
        if read is None or any(step.startswith(".") for step in name.parts):
            continue
        if name.name in (*ATTRIBUTES, *PARTITION):
            lists[name.name] = read().decode("utf-8", "replace")
        elif name.suffix.lower() in SUFFIXES:
            images[name.name] = decode_image(read(), f"{source}: {name}", size)
    listed = [name for name in ATTRIBUTES if name in lists]
    if not listed or not images:
        raise ValueError(f"{source}: expected images, and a list of attributes: {' or '.join(ATTRIBUTES)}")
    labels = _labels(lists[listed[0]], attribute, f"{source}: {listed[0]}")
    first = next(iter(images))
    for other, image in images.items():
        if image.shape != images[first].shape:
            sizes = " and ".join(
                f"{file} has {images[file].shape[1]}x{images[file].shape[2]}" for file in (first, other)
            )
            raise ValueError(f"{source}: expected images of one size, but {sizes} pixels: give a size")
    names = sorted(images)
    lacking = [file for file in names if file not in labels]
    if lacking:
        raise ValueError(f"{source}: {listed[0]} lacks {len(lacking)} of {len(names)} images, such as {lacking[0]}")
    found = next((lists[name] for name in PARTITION if name in lists), None)
    parts = _partition(found) if found is not None else {name: 2 * (i % EVERY == 0) for i, name in enumerate(names)}
    arrays = []
    for part in (0, 2):
        chosen = [name for name in names if parts.get(name) == part]
        if not chosen:
            raise ValueError(f"{source}: no image is in part {part} (0: training, 2: test) of {len(names)} images")
        arrays += [np.stack([images[name] for name in chosen]), np.array([labels[name] for name in chosen])]
    return assemble_split(name_data(source), arrays, ["no", "yes"])


def _table(text: str) -> list[list[str]]:
    return [re.split(r"[,\s]+", line.strip()) for line in text.splitlines() if line.strip()]


def _labels(text: str, attribute: str, where: str) -> dict[str, int]:
    """Of each file whether it has the attribute: 1 is yes, 0 and -1 are no."""
    lines = _table(text)
    lines = lines[1:] if lines and len(lines[0]) == 1 else lines  # CelebA's own list says first how many there are
    if len(lines) < 2:
        raise ValueError(f"{where}: expected a line of names and one for each image, got {len(lines)} lines")
    width = len(lines[1])
    names = [name.casefold() for name in lines[0][len(lines[0]) - (width - 1) :]]  # the files' column may have no name
    if attribute.casefold() not in names:
        raise ValueError(near_matches(attribute, names, f"attribute in {where}"))
    at = 1 + names.index(attribute.casefold())
    wrong = [line for line in lines[1:] if len(line) != width or line[at] not in ("0", "1", "-1")]
    if wrong:
        raise ValueError(f"{where}: expected a file and {width - 1} times 0, 1 or -1, got {' '.join(wrong[0])!r}")
    return {line[0]: int(line[at] == "1") for line in lines[1:]}


def _partition(text: str) -> dict[str, int]:
    return {line[0]: int(line[1]) for line in _table(text) if len(line) == 2 and line[1].isdigit()}
