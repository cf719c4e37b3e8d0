"""JPEG and PNG files in class folders, from a folder or a tar archive."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from revprop.datasets.array_files import NPZ_KEYS
from revprop.datasets.files import name_data, read_npz, walk_files
from revprop.datasets.images import Split, assemble_split

__all__ = ["PARTS", "SUFFIXES", "decode_image", "load_image_folder"]


SUFFIXES = (".jpg", ".jpeg", ".png")


PARTS = ("train", "val", "test")


def load_image_folder(path: str | Path, size: int | None = None, cache: str | Path | None = None) -> Split:
    """Load JPEG and PNG files laid out as ``{train, val or test}/CLASS/FILE``: a folder, ``.tar`` or ``.tar.gz``.

    The test part is ``test`` where there is one, else ``val``. Greyscale images become RGB. Images come in the order of
    their names from a folder, in the archive's order from an archive. Names that begin with a dot are left out.

    Args:
        path: the folder or archive, with or without one leading folder.
        size: height and width in pixels: the largest central square is cut out and resized. None keeps the size.
        cache: for an archive, an ``.npz`` file that keeps the decoded images. It is used while the archive's size and
            time of change and the ``size`` asked for are the same, and written anew otherwise.

    Returns:
        images of 3 channels; the classes are the folders' names, sorted.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a part is missing, a class folder has no image, an image cannot be decoded, sizes differ without
            ``size``, training and test classes differ, the archive is damaged, or ``cache`` is another kind of file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for part in ("train/cat", "train/dog", "val/cat", "val/dog"):
    ...         Path(folder, part).mkdir(parents=True)
    ...         Image.new("L", (6, 4)).save(Path(folder, part, "1.png"))
    ...     load_image_folder(folder).test.images.shape
    torch.Size([2, 3, 4, 6])
    """
    source = Path(path)
    if size is not None and size < 1:
        raise ValueError(f"expected a size of at least 1 pixel, got {size}")
    if cache is None:
        return _decode_all(source, size)
    if not source.is_file():
        raise ValueError(
            f"a cache is kept for archives only, since a folder does not tell what changed in it: got {source}"
        )
    cache, stat = Path(cache), source.stat()
    state = json.dumps([stat.st_size, stat.st_mtime_ns, size])
    if cache.exists():
        kept = read_npz(cache)
        if "source" not in kept:
            raise ValueError(f"{cache}: expected a cache of decoded images; it is another file and is left as it is")
        if str(kept["source"]) == state:
            return assemble_split(name_data(source), [kept[key] for key in NPZ_KEYS], kept["classes"])
    split = _decode_all(source, size)
    tensors = (split.train.images, split.train.labels, split.test.images, split.test.labels)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in zip(NPZ_KEYS, tensors, strict=True)}
    written = cache.with_name(f".{cache.name}.{os.getpid()}")  # so that a killed process leaves no half cache behind
    try:
        with written.open("wb") as file:
            np.savez(file, source=np.array(state), classes=np.array(split.train.classes), **arrays)
        written.replace(cache)
    finally:
        written.unlink(missing_ok=True)
    return split


def _decode_all(source: Path, size: int | None) -> Split:
    pixels: dict[str, bytearray] = {part: bytearray() for part in PARTS}
    labels: dict[str, list[str]] = {part: [] for part in PARTS}
    folders: dict[str, set[str]] = {part: set() for part in PARTS}
    roots: set[tuple[str, ...]] = set()
    first: tuple[PurePosixPath, tuple[int, ...]] | None = None
    for name, read in walk_files(source):
        at = next((i for i, step in enumerate(name.parts[:2]) if step in PARTS), None)
        inner = () if at is None else name.parts[at + 1 :]
        if not inner or any(step.startswith(".") for step in name.parts) or (len(inner) == 1 and read is not None):
            continue
        part = name.parts[at or 0]
        roots.add(name.parts[: at or 0])
        folders[part].add(inner[0])
        if read is None or len(inner) != 2 or name.suffix.lower() not in SUFFIXES:
            continue
        image = decode_image(read(), f"{source}: {name}", size)
        first = first or (name, image.shape)
        if image.shape != first[1]:
            sizes = [f"{file} has {shape[1]}x{shape[2]}" for file, shape in (first, (name, image.shape))]
            raise ValueError(f"{source}: expected images of one size, but {' and '.join(sizes)} pixels: give a size")
        pixels[part] += image.tobytes()
        labels[part].append(inner[0])
    if len(roots) > 1:
        raise ValueError(f"{source}: train, val or test lie in {len(roots)} folders, {sorted(roots)}: name one of them")
    test = "test" if folders["test"] else "val"
    if first is None or not folders["train"] or not folders[test]:
        raise ValueError(f"{source}: expected images as train/CLASS/FILE and as test/CLASS/FILE or val/CLASS/FILE")
    arrays: list[npt.NDArray[Any]] = []
    for part in ("train", test):
        empty = sorted(folders[part] - set(labels[part]))
        if empty:
            raise ValueError(
                f"{source}: no {', '.join(SUFFIXES)} image in class folder {part}/{f', {part}/'.join(empty)}"
            )
        if folders[part] != folders["train"]:
            odd = sorted(folders[part] ^ folders["train"])
            raise ValueError(f"{source}: expected the same classes in train and {part}; in one of them only: {odd}")
        # A bytearray is writable, so the tensor shares its memory instead of copying it.
        arrays.append(np.frombuffer(pixels[part], np.uint8).reshape(-1, *first[1]))
        arrays.append(np.searchsorted(sorted(folders[part]), labels[part]))
    return assemble_split(name_data(source), arrays, sorted(folders["train"]))


def decode_image(content: bytes, where: str, size: int | None) -> npt.NDArray[Any]:
    """Decode a JPEG or PNG file to (3, h, w), 0 to 255; cut to a square of ``size`` where one is given.

    Raises:
        ValueError: it cannot be decoded, or has more than 8 bits per channel; ``where`` is named.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            image.load()
            mode, rgb = image.mode, image.convert("RGB")
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise ValueError(f"{where}: cannot be decoded as JPEG or PNG ({error}): replace or remove it") from error
    if mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):  # the rest would be clipped, not scaled
        raise ValueError(f"{where}: expected 8 bits per channel, got Pillow's mode {mode}: convert it")
    if size is not None:
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1)
