"""Labelled images: the digits that come with scikit-learn, and the standard forms of image data on disk.

Every loader returns a :class:`Split` or fails with an error that names the file and what was expected in it; nothing is
returned half-loaded, nothing is unpacked to disk, and no pickle runs code.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import math
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from revprop.errors import near_matches

__all__ = [
    "ImageData",
    "Split",
    "data_root",
    "load_cifar",
    "load_data",
    "load_digits",
    "load_idx_folder",
    "load_image_folder",
    "load_npz",
    "read_idx",
]


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

        Raises:
            IndexError: an index is not in 0 .. n - 1.

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

        >>> [tuple(t.shape) for t in load_digits(test_share=0.2).test.tensors()]
        [(360, 1, 8, 8), (360,)]
        """
        return self.standardised(), self.labels


@dataclass(frozen=True, eq=False)
class Split:
    """Training and test images of the same classes and the same size, neither empty.

    Raises:
        ValueError: a part is empty, or classes or sizes differ.

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


def load_digits(test_share: float = 0.25, seed: int = 0) -> Split:
    """Load scikit-learn's 1,797 grey 8x8 digits, split at random with each class in proportion. Needs no file.

    The values 0 to 16 are kept as 0, 15, ..., 240: exactly proportional, so standardised images do not change.

    Args:
        test_share: share of the images that go to the test part, between 0 and 1.
        seed: seed of the split.

    Raises:
        ValueError: ``test_share`` is not between 0 and 1, or so near that a part lacks a class.

    >>> len(load_digits(test_share=0.5).train)
    898
    """
    if not 0 < test_share < 1:
        raise ValueError(f"expected a test share between 0 and 1, got {test_share}")
    source = importlib.import_module("sklearn.datasets").load_digits()
    split = importlib.import_module("sklearn.model_selection").train_test_split
    labels = torch.from_numpy(source.target.astype(np.int64))
    images = torch.from_numpy((source.images * 15).astype(np.uint8)).unsqueeze(1)
    everything = ImageData("digits", images, labels, tuple(map(str, range(10))))
    train, test = split(np.arange(len(labels)), test_size=test_share, random_state=seed, stratify=source.target)
    return Split(everything.subset(np.sort(train).tolist()), everything.subset(np.sort(test).tolist()))


_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}
_IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read_idx(path: str | Path) -> npt.NDArray[Any]:
    """Read one IDX file, MNIST's form, plain or gzip: two zero bytes, type, rank, big-endian sizes, then the values.

    Args:
        path: the file; gzip is recognised by content.

    Returns:
        the array, in the machine's own byte order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: cut off, damaged, little-endian, of unknown type, or longer or shorter than its header says.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9])), file.flush()
    ...     read_idx(file.name)
    array([7, 9], dtype=uint8)
    """
    path = Path(path)
    with _blame_damage(path), _open_plain(path) as file:
        data = file.read()
    if len(data) < 4:
        raise ValueError(f"{path}: expected an IDX header of at least 4 bytes, got {len(data)}: the file is cut off")
    if data[:2] != b"\0\0" and data[2:4] == b"\0\0" and data[1] in _IDX_TYPES:
        raise ValueError(f"{path}: the IDX header is little-endian ({data[:4].hex()}); expected big-endian: convert it")
    if data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise ValueError(f"{path}: expected an IDX header, 0000 and a type 08 to 0e, got {data[:4].hex()}")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise ValueError(f"{path}: expected {data[3]} sizes after the IDX header, got {len(data) - 4} bytes: cut off")
    big, little = (np.frombuffer(data[4:start], order).tolist() for order in (">u4", "<u4"))
    kind = np.dtype(_IDX_TYPES[data[2]])
    if len(data) - start != math.prod(big) * kind.itemsize:
        if big and len(data) - start == math.prod(little) * kind.itemsize:
            raise ValueError(f"{path}: the sizes in the IDX header are little-endian; expected big-endian: convert it")
        shape = "x".join(map(str, big))
        wanted = f"{math.prod(big) * kind.itemsize} bytes ({shape} {kind.name})"
        raise ValueError(f"{path}: expected {wanted} after the IDX header, got {len(data) - start}")
    return np.frombuffer(data, kind.newbyteorder(">"), offset=start).reshape(big).astype(kind)


def load_idx_folder(folder: str | Path) -> Split:
    """Load MNIST or a set in its form: a folder with its four IDX files, under the usual names, plain or ``.gz``.

    Args:
        folder: holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k-...`` files.

    Returns:
        images of one channel; the classes are named "0", "1", ...

    Raises:
        FileNotFoundError: files are missing (all are named).
        ValueError: a file is damaged, or images and labels do not fit each other.

    >>> load_idx_folder("no-such-folder")
    Traceback (most recent call last):
    FileNotFoundError: no-such-folder: no such file or folder
    """
    folder = Path(folder)
    _require_path(folder)
    paths = {name: folder / f"{name}.gz" for name in _IDX_NAMES}
    paths |= {name: folder / name for name in _IDX_NAMES if (folder / name).is_file()}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: no {', '.join(missing)}, with or without .gz")
    arrays = [read_idx(paths[name]) for name in _IDX_NAMES]
    for array, name, rank in zip(arrays, _IDX_NAMES, (3, 1, 3, 1), strict=True):
        if array.ndim != rank or array.dtype != np.uint8:
            raise ValueError(f"{paths[name]}: expected uint8 with {rank} sizes, got {array.dtype} with {array.ndim}")
    return _assemble(_name(folder), (arrays[0][:, None], arrays[1], arrays[2][:, None], arrays[3]))


# Per variant: label bytes of a binary record (CIFAR-100: the coarse label, then the fine one), the key of the labels in
# a Python batch, the training batches, the test batch, and the file of class names beside Python and binary batches.
_CIFAR = {
    10: (1, "labels", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "batches.meta.txt"),
    100: (2, "fine_labels", ("train",), "test", "meta", "fine_label_names.txt"),
}


def load_cifar(path: str | Path, variant: int = 10) -> Split:
    """Load CIFAR-10 or CIFAR-100 (fine labels) from Python batches or the binary version, unpacked or as ``.tar.gz``.

    The Python batches are pickles; they are read by an unpickler that knows byte arrays and plain containers only, and
    runs no code that a file brings along.

    Args:
        path: the archive, or a folder with the batches, at most three levels above them.
        variant: 10 or 100.

    Returns:
        images of 3x32x32; classes named as in the files, "0", "1", ... where these lack the names.

    Raises:
        FileNotFoundError: no file or folder, or batches are missing (they are named).
        ValueError: a batch is damaged or holds anything else than images and labels, or batches lie in several folders.

    >>> load_cifar("no-such-folder", variant=100)
    Traceback (most recent call last):
    FileNotFoundError: no-such-folder: no such file or folder
    """
    if variant not in _CIFAR:
        raise ValueError(f"expected variant 10 or 100, got {variant}")
    path = Path(path)
    _, _, train, test, python_names, binary_names = _CIFAR[variant]
    wanted = {*train, test, *(f"{batch}.bin" for batch in (*train, test)), python_names, binary_names}
    found = {name: read() for name, read in _walk(path) if read is not None and name.name in wanted}
    folders = {name.parent for name in found}
    if len(folders) > 1:
        raise ValueError(
            f"{path}: batches lie in {len(folders)} folders, {sorted(map(str, folders))}: name one of them"
        )
    contents = {name.name: content for name, content in found.items()}
    lacking = {end: [f"{b}{end}" for b in (*train, test) if f"{b}{end}" not in contents] for end in ("", ".bin")}
    end = min(lacking, key=lambda end: len(lacking[end]))
    if lacking[end]:
        raise FileNotFoundError(f"{path}: expected the batches of CIFAR-{variant}, lacking {', '.join(lacking[end])}")
    read_batch = _read_binary_batch if end else _read_python_batch
    batches = [read_batch(contents[b + end], f"{path}: {b}{end}", variant) for b in (*train, test)]
    classes: Sequence[str] = ()
    if end and binary_names in contents:
        classes = contents[binary_names].decode("latin1").split()
    elif not end and python_names in contents:
        key = "label_names" if variant == 10 else "fine_label_names"
        given = _unpickle(contents[python_names], f"{path}: {python_names}").get(key)
        if not isinstance(given, list) or not all(isinstance(name, str | bytes) for name in given):
            raise ValueError(f"{path}: {python_names}: expected {key!r} as a list of names")
        classes = [name.decode("latin1") if isinstance(name, bytes) else name for name in given]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches[:-1], strict=True))
    return _assemble(f"cifar{variant}", (images, labels, *batches[-1]), classes)


def _read_binary_batch(content: bytes, where: str, variant: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    label_bytes = _CIFAR[variant][0]
    record = label_bytes + 3072
    if not content or len(content) % record:
        raise ValueError(f"{where}: expected a whole number of {record}-byte records, got {len(content)} bytes")
    table = np.frombuffer(content, np.uint8).reshape(-1, record)
    return table[:, label_bytes:].reshape(-1, 3, 32, 32), table[:, label_bytes - 1]


def _read_python_batch(content: bytes, where: str, variant: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    batch, key = _unpickle(content, where), _CIFAR[variant][1]
    images, labels = batch.get("data"), batch.get(key)
    if not isinstance(images, _PickledBytes) or images.array.ndim != 2 or images.array.shape[1] != 3072:
        raise ValueError(f"{where}: expected 'data' as uint8 of shape (n, 3072)")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < variant for label in labels):
        raise ValueError(f"{where}: expected {key!r} as a list of integers from 0 to {variant - 1}")
    if len(labels) != len(images.array):
        raise ValueError(f"{where}: expected as many labels as images, got {len(labels)} and {len(images.array)}")
    return images.array.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


class _PickledBytes:
    """Stands for ``numpy.ndarray`` in a pickle: a real one, filled with a state that lies about its type, is unsafe."""

    def __init__(self, *_: object) -> None:
        self.array: npt.NDArray[Any] = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        if not isinstance(kind, _PickledType) or kind.code != "u1":
            raise ValueError(f"an array of type {getattr(kind, 'code', kind)!r} where only uint8 is expected")
        values = np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else bytes(raw), np.uint8)
        self.array = values.reshape(shape, order="F" if fortran else "C")


class _PickledType:
    """Stands for ``numpy.dtype`` in a pickle."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and the like mean nothing for bytes."""


def _view_buffer(raw: bytes, kind: object, shape: tuple[int, ...], order: str) -> _PickledBytes:
    made = _PickledBytes()
    made.__setstate__((1, shape, kind, order == "F", raw))
    return made


class _BatchUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known: dict[str, Any] = {
            "numpy.ndarray": _PickledBytes,
            "numpy.multiarray._reconstruct": _PickledBytes,
            "numpy.numeric._frombuffer": _view_buffer,
            "numpy.dtype": _PickledType,
            "_codecs.encode": lambda text, _: text.encode("latin1"),  # how Python 3 writes bytes for Python 2
        }
        # NumPy 2 renamed its core package.
        full = f"{module}.{name}".replace("numpy._core.", "numpy.").replace("numpy.core.", "numpy.")
        if full not in known:
            raise ValueError(f"it asks for {module}.{name}, which no CIFAR batch needs: it is refused, and was not run")
        return known[full]


def _unpickle(content: bytes, where: str) -> dict[str, Any]:
    try:
        loaded = _BatchUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{where}: expected a whole CIFAR batch, but {error or type(error).__name__}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{where}: expected a dictionary, got a {type(loaded).__name__}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in loaded.items()}


_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: str | Path) -> Split:
    """Load a NumPy archive of ``x_train``, ``y_train``, ``x_test``, ``y_test`` and, if it is there, ``classes``.

    Args:
        path: the ``.npz`` file. Images: uint8, (n, h, w), (n, h, w, c) or (n, c, h, w) with c = 1 or 3. Labels: whole
            numbers, (n,) or (n, 1). Classes: strings; "0", "1", ... where they are not given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, arrays missing, of another type or shape, or pickled objects.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".npz") as file:
    ...     x, y = np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1])
    ...     np.savez(file, x_train=x, y_train=y, x_test=x, y_test=y)
    ...     load_npz(file.name).train.images.shape
    torch.Size([2, 3, 8, 8])
    """
    path = Path(path)
    arrays = _read_npz(path)
    missing = [key for key in _NPZ_KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path}: expected the arrays {', '.join(_NPZ_KEYS)}; lacking {', '.join(missing)}")
    for key in ("x_train", "x_test"):
        array = arrays[key] = arrays[key][:, None] if arrays[key].ndim == 3 else arrays[key]
        first, last = array.ndim == 4 and array.shape[1] in (1, 3), array.ndim == 4 and array.shape[3] in (1, 3)
        if array.dtype != np.uint8 or first == last:
            wanted = "uint8 of shape (n, h, w), (n, h, w, c) or (n, c, h, w), with 1 or 3 channels at one end only"
            raise ValueError(f"{path}: expected {key} as {wanted}, got {array.dtype} of shape {array.shape}")
        arrays[key] = array.transpose(0, 3, 1, 2) if last else array
    for key in ("y_train", "y_test"):
        array = arrays[key][:, 0] if arrays[key].ndim == 2 and arrays[key].shape[1] == 1 else arrays[key]
        if array.dtype.kind not in "iu" or array.ndim != 1:
            given = f"{array.dtype} of shape {array.shape}"
            raise ValueError(f"{path}: expected {key} as integers of shape (n,), got {given}")
        arrays[key] = array
    return _assemble(_name(path), [arrays[key] for key in _NPZ_KEYS], arrays.get("classes", ()))


_SUFFIXES = (".jpg", ".jpeg", ".png")
_PARTS = ("train", "val", "test")


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
        kept = _read_npz(cache)
        if "source" not in kept:
            raise ValueError(f"{cache}: expected a cache of decoded images; it is another file and is left as it is")
        if str(kept["source"]) == state:
            return _assemble(_name(source), [kept[key] for key in _NPZ_KEYS], kept["classes"])
    split = _decode_all(source, size)
    tensors = (split.train.images, split.train.labels, split.test.images, split.test.labels)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in zip(_NPZ_KEYS, tensors, strict=True)}
    written = cache.with_name(f".{cache.name}.{os.getpid()}")  # so that a killed process leaves no half cache behind
    try:
        with written.open("wb") as file:
            np.savez(file, source=np.array(state), classes=np.array(split.train.classes), **arrays)
        written.replace(cache)
    finally:
        written.unlink(missing_ok=True)
    return split


def _decode_all(source: Path, size: int | None) -> Split:
    pixels: dict[str, bytearray] = {part: bytearray() for part in _PARTS}
    labels: dict[str, list[str]] = {part: [] for part in _PARTS}
    folders: dict[str, set[str]] = {part: set() for part in _PARTS}
    roots: set[tuple[str, ...]] = set()
    first: tuple[PurePosixPath, tuple[int, ...]] | None = None
    for name, read in _walk(source):
        at = next((i for i, step in enumerate(name.parts[:2]) if step in _PARTS), None)
        inner = () if at is None else name.parts[at + 1 :]
        if not inner or any(step.startswith(".") for step in name.parts) or (len(inner) == 1 and read is not None):
            continue
        part = name.parts[at or 0]
        roots.add(name.parts[: at or 0])
        folders[part].add(inner[0])
        if read is None or len(inner) != 2 or name.suffix.lower() not in _SUFFIXES:
            continue
        image = _decode(read(), f"{source}: {name}", size)
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
                f"{source}: no {', '.join(_SUFFIXES)} image in class folder {part}/{f', {part}/'.join(empty)}"
            )
        if folders[part] != folders["train"]:
            odd = sorted(folders[part] ^ folders["train"])
            raise ValueError(f"{source}: expected the same classes in train and {part}; in one of them only: {odd}")
        # A bytearray is writable, so the tensor shares its memory instead of copying it.
        arrays.append(np.frombuffer(pixels[part], np.uint8).reshape(-1, *first[1]))
        arrays.append(np.searchsorted(sorted(folders[part]), labels[part]))
    return _assemble(_name(source), arrays, sorted(folders["train"]))


def _decode(content: bytes, where: str, size: int | None) -> npt.NDArray[Any]:
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


_CIFAR10_FILES = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar-10-batches-bin", "cifar-10-binary.tar.gz")
_CIFAR100_FILES = ("cifar-100-python", "cifar-100-python.tar.gz", "cifar-100-binary", "cifar-100-binary.tar.gz")
_PLACES: dict[str, tuple[str, ...]] = {
    "mnist": ("mnist", "MNIST/raw"),
    "cifar10": tuple(place for name in _CIFAR10_FILES for place in (name, f"cifar10/{name}")),
    "cifar100": tuple(place for name in _CIFAR100_FILES for place in (name, f"cifar100/{name}")),
    "cifar10-jpeg": ("cifar10/cifar10_jpeg.tar.gz",),
    "cifar10-lossless": ("cifar10/cifar10_lossless_subset.npz",),
    "tinyimagenet10": ("images/tinyimagenet10.tar.gz",),
}
_DOWNLOADS = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def data_root() -> Path:
    """Tell where named data is looked for: the folder ``REVPROP_DATA`` names, else ``../shared/data``.

    >>> import unittest.mock
    >>> with unittest.mock.patch.dict(os.environ, REVPROP_DATA="images"):
    ...     data_root().name
    'images'
    """
    given = os.environ.get("REVPROP_DATA")
    return Path(given) if given else Path.cwd().parent / "shared" / "data"


def load_data(
    spec: str | Path, size: int | None = None, *, cache: str | Path | None = None, download: bool = False
) -> Split:
    """Load labelled images by name, or from a file or folder whose form is recognised by its content.

    Args:
        spec: "digits", "mnist", "cifar10", "cifar100", "cifar10-jpeg", "cifar10-lossless" or "tinyimagenet10" (all but
            the first under :func:`data_root`); or a path: a folder or archive of IDX files, CIFAR batches or images in
            class folders, or an ``.npz`` file. A name goes before a path: write ``./mnist`` for a folder of that name.
        size: as for :func:`load_image_folder`; images in class folders only.
        cache: as for :func:`load_image_folder`; archives of images in class folders only.
        download: get "mnist", "cifar10" or "cifar100" through torchvision where they are not there yet.

    Raises:
        ValueError: an unknown name (near matches are given), a form that is not recognised, damaged data, or an option
            that does not apply.
        FileNotFoundError: a known name or a path without data.
        ImportError: ``download`` without torchvision.

    >>> load_data("digits").train
    ImageData('digits', 1347 images of 1x8x8, 10 classes)
    """
    if spec == "digits":
        _refuse_options("digits", size, cache)
        return load_digits()
    if not isinstance(spec, str) or spec not in _PLACES:
        path = Path(spec)
        if path.exists() or isinstance(spec, Path) or path.name != spec or path.suffix:
            return _load_path(path, size, cache)
        raise ValueError(
            f"{near_matches(spec, ['digits', *_PLACES], 'data set')}; or give the path of a file or folder"
        )
    root = data_root()
    found = next((root / place for place in _PLACES[spec] if (root / place).exists()), None)
    if found is None and download:
        _download(spec, root)
        found = next((root / place for place in _PLACES[spec] if (root / place).exists()), None)
    if found is None:
        remedy = "set REVPROP_DATA to the folder that holds it, or give its path"
        remedy += ", or download=True" if spec in _DOWNLOADS else ""
        raise FileNotFoundError(f"no data for {spec!r}: looked in {root} for {', '.join(_PLACES[spec])}: {remedy}")
    split = _load_path(found, size, cache)
    return Split(replace(split.train, name=spec), replace(split.test, name=spec))


def _load_path(path: Path, size: int | None, cache: str | Path | None) -> Split:
    if path.is_file() and zipfile.is_zipfile(path):
        _refuse_options(str(path), size, cache)
        return load_npz(path)
    forms: set[tuple[str, PurePosixPath]] = set()
    for name, read in _walk(path):
        forms |= set() if read is None else _recognise(name)
        if forms and path.is_file():  # an archive holds one data set, and reading on would unpack all of it
            break
    if len(forms) != 1:
        expected = (
            "IDX files, CIFAR batches, an .npz archive, or train/CLASS/FILE with test/CLASS/FILE or val/CLASS/FILE"
        )
        given = ", ".join(sorted(f"{form} in {path / folder}" for form, folder in forms)) or "none of them"
        raise ValueError(f"{path}: expected one of {expected}; found {given}")
    form, folder = forms.pop()
    where = path / folder if path.is_dir() else path
    if form == "images":
        return load_image_folder(where, size, cache)
    _refuse_options(str(path), size, cache)
    if form == "IDX" and path.is_dir():
        return load_idx_folder(where)
    if form == "IDX":
        raise ValueError(f"{path}: expected IDX files in a folder, got them in an archive: unpack it")
    return load_cifar(where, 100 if form == "CIFAR-100" else 10)


def _recognise(name: PurePosixPath) -> set[tuple[str, PurePosixPath]]:
    """Tell of what form a file of this name is part, and in which folder: no answer, or one."""
    at = next((i for i, step in enumerate(name.parts[:2]) if step in _PARTS), None)
    if at is not None and len(name.parts) == at + 3 and name.suffix.lower() in _SUFFIXES:
        return {("images", PurePosixPath(*name.parts[:at]))}
    if name.name.removesuffix(".gz") in _IDX_NAMES:
        return {("IDX", name.parent)}
    variants = (
        v for v, (_, _, train, test, _, _) in _CIFAR.items() if name.name.removesuffix(".bin") in (*train, test)
    )
    return {(f"CIFAR-{variant}", name.parent) for variant in variants}


def _refuse_options(what: str, size: int | None, cache: str | Path | None) -> None:
    if size is not None or cache is not None:
        raise ValueError(f"{what}: size and cache apply to images in class folders only; leave them out")


def _download(name: str, root: Path) -> None:
    if name not in _DOWNLOADS:
        raise ValueError(f"{name!r} cannot be downloaded; {', '.join(map(repr, _DOWNLOADS))} can")
    try:
        torchvision = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise ImportError("download=True needs torchvision: pip install 'revprop[vision]'") from error
    getattr(torchvision, _DOWNLOADS[name])(str(root), download=True)


def _assemble(name: str, arrays: Sequence[npt.NDArray[Any]], classes: Sequence[str] | npt.NDArray[Any] = ()) -> Split:
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


def _name(path: Path) -> str:
    return path.resolve().name.split(".")[0]


def _read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    _require_path(path)
    with _blame_damage(path):
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive}
        except (ValueError, TypeError, AttributeError) as error:  # pickles, bad headers, and what is no archive at all
            raise ValueError(f"{path}: expected an .npz archive of plain arrays ({error})") from error


def _walk(source: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes] | None]]:
    """Yield each file of a folder (four levels deep) or tar archive with what reads it, and each folder with None.

    An archive is read in one pass: read a file before going on to the next.
    """
    _require_path(source)
    if source.is_dir():
        for path in sorted(path for depth in range(1, 5) for path in source.glob("/".join("*" * depth))):
            yield PurePosixPath(path.relative_to(source).as_posix()), None if path.is_dir() else path.read_bytes
        return
    with _blame_damage(source), _open_plain(source) as file:
        watched = _TailReader(file)
        with tarfile.open(fileobj=cast(IO[bytes], watched), mode="r|") as archive:
            for member in archive:

                def read(member: tarfile.TarInfo = member) -> bytes:
                    with _blame_damage(source):
                        content = archive.extractfile(member)
                        return content.read() if content is not None else b""

                if member.isfile() or member.isdir():
                    yield PurePosixPath(member.name), read if member.isfile() else None
            while watched.read(2**20):  # to the end, where gzip checks its sum
                pass
        # Where one member ends, tarfile takes a cut for the end; a whole archive ends in zeros.
        if watched.tail.strip(b"\0") or len(watched.tail) < 1024:
            raise ValueError(f"{source}: the archive is cut off (no end-of-archive mark): get it again")


class _TailReader:
    """A file that remembers the last 1,024 bytes read, the size of the end-of-archive mark."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.tail = file, b""

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.tail = (self.tail + content)[-1024:]
        return content


def _open_plain(path: Path) -> IO[bytes]:
    _require_path(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if zipped else path.open("rb")


def _require_path(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")


@contextmanager
def _blame_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise ValueError(f"{path}: the file is cut off ({error}): get it again") from error
    except (gzip.BadGzipFile, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: the file is damaged or of another kind ({error}): get it again") from error


def _require_float(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        raise ValueError(f"expected a floating-point dtype, got {dtype}")
    return dtype
