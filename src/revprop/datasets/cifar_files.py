"""CIFAR-10 and CIFAR-100 from their Python batches, read without running what a pickle asks for, or binary batches."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from revprop.datasets.files import walk_files
from revprop.datasets.images import Split, assemble_split

__all__ = ["CIFAR", "load_cifar"]


# Per variant: label bytes of a binary record (CIFAR-100: the coarse label, then the fine one), the key of the labels in
# a Python batch, the training batches, the test batch, and the file of class names beside Python and binary batches.
CIFAR = {
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
    if variant not in CIFAR:
        raise ValueError(f"expected variant 10 or 100, got {variant}")
    path = Path(path)
    _, _, train, test, python_names, binary_names = CIFAR[variant]
    wanted = {*train, test, *(f"{batch}.bin" for batch in (*train, test)), python_names, binary_names}
    found = {name: read() for name, read in walk_files(path) if read is not None and name.name in wanted}
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
    return assemble_split(f"cifar{variant}", (images, labels, *batches[-1]), classes)


def _read_binary_batch(content: bytes, where: str, variant: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    label_bytes = CIFAR[variant][0]
    record = label_bytes + 3072
    if not content or len(content) % record:
        raise ValueError(f"{where}: expected a whole number of {record}-byte records, got {len(content)} bytes")
    table = np.frombuffer(content, np.uint8).reshape(-1, record)
    return table[:, label_bytes:].reshape(-1, 3, 32, 32), table[:, label_bytes - 1]


def _read_python_batch(content: bytes, where: str, variant: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    batch, key = _unpickle(content, where), CIFAR[variant][1]
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
