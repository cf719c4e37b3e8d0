"""Tiny ImageNet as it is handed out: class folders to train on, and one folder with a list of labels to test on."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np

from revprop.datasets.files import name_data, walk_files
from revprop.datasets.image_folder import SUFFIXES, decode_image
from revprop.datasets.images import Split, assemble_split

__all__ = ["load_tiny_imagenet"]

LABELS = "val_annotations.txt"


def load_tiny_imagenet(path: str | Path) -> Split:
    """Load ``train/CLASS/images/FILE``, ``val/images/FILE`` and ``val/val_annotations.txt``; the test part is ``val``.

    The images of ``test`` have no published labels and are not read. Greyscale images become RGB.

    Args:
        path: the folder ``tiny-imagenet-200``, or a tar archive of it.

    Returns:
        images of 3 channels; the classes are the folders' names (WordNet numbers), sorted.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a part or the list of labels is missing, an image is not in the list or cannot be decoded, sizes
            differ, a class has no image in one of the parts, or the archive is damaged.

    >>> load_tiny_imagenet("no-such-folder")
    Traceback (most recent call last):
    FileNotFoundError: no-such-folder: no such file or folder
    """
    source = Path(path)
    pixels: dict[str, list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]] = {"train": [], "val": []}
    owners: dict[str, list[str]] = {"train": [], "val": []}  # the class of a training image, the file of a test image
    listed: dict[str, str] = {}
    for name, read in walk_files(source):
        found = _place(name)
        if found is None or read is None:
            continue
        part, owner = found
        if part == LABELS:
            lines = (line.split("\t") for line in read().decode("utf-8", "replace").splitlines() if line.strip())
            listed |= {line[0]: line[1] for line in lines if len(line) > 1}
            continue
        image = decode_image(read(), f"{source}: {name}", None)
        first = (pixels["train"] or pixels["val"] or [image])[0]
        if image.shape != first.shape:
            raise ValueError(f"{source}: expected images of one size, but {name} has {image.shape}, not {first.shape}")
        pixels[part].append(image)
        owners[part].append(owner)
    if not pixels["train"] or not pixels["val"] or not listed:
        raise ValueError(f"{source}: expected train/CLASS/images/FILE, val/images/FILE and val/{LABELS}")
    lacking = sorted(set(owners["val"]) - set(listed))
    if lacking:
        raise ValueError(f"{source}: val/{LABELS} names no class for {len(lacking)} images, such as {lacking[0]}")
    labels = {"train": owners["train"], "val": [listed[file] for file in owners["val"]]}
    classes = sorted(set(labels["train"]))
    if set(labels["val"]) != set(classes):
        odd = sorted(set(labels["val"]) ^ set(classes))
        raise ValueError(f"{source}: expected the same classes in train and val; in one of them only: {odd}")
    arrays = [array for part in pixels for array in (np.stack(pixels[part]), np.searchsorted(classes, labels[part]))]
    return assemble_split(name_data(source), arrays, classes)


def _place(name: PurePosixPath) -> tuple[str, str] | None:
    """Which part a file belongs to, and its class or its own name."""
    steps = name.parts[-4:]
    if any(step.startswith(".") for step in steps):
        return None
    if steps[-2:] == ("val", LABELS):
        return LABELS, ""
    if name.suffix.lower() not in SUFFIXES:
        return None
    if len(steps) == 4 and steps[0] == "train" and steps[2] == "images":
        return "train", steps[1]
    return ("val", name.name) if steps[-3:-1] == ("val", "images") else None
