"""Image data as arrays on disk: IDX (MNIST's form) and NumPy archives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from revprop.datasets.files import blame_damage, name_data, open_plain, read_npz, require_path
from revprop.datasets.images import Split, assemble_split

__all__ = ["IDX_NAMES", "NPZ_KEYS", "load_idx_folder", "load_npz", "read_idx"]


_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}


IDX_NAMES = (
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
    with blame_damage(path), open_plain(path) as file:
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
    require_path(folder)
    paths = {name: folder / f"{name}.gz" for name in IDX_NAMES}
    paths |= {name: folder / name for name in IDX_NAMES if (folder / name).is_file()}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: no {', '.join(missing)}, with or without .gz")
    arrays = [read_idx(paths[name]) for name in IDX_NAMES]
    for array, name, rank in zip(arrays, IDX_NAMES, (3, 1, 3, 1), strict=True):
        if array.ndim != rank or array.dtype != np.uint8:
            raise ValueError(f"{paths[name]}: expected uint8 with {rank} sizes, got {array.dtype} with {array.ndim}")
    return assemble_split(name_data(folder), (arrays[0][:, None], arrays[1], arrays[2][:, None], arrays[3]))


NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: str | Path) -> Split:
    """Load a NumPy archive of ``x_train``, ``y_train``, ``x_test``, ``y_test`` and, if it is there, ``classes``.

    Args:
        path: the ``.npz`` file. Images: uint8, (n, h, w), (n, h, w, c) or (n, c, h, w) with c = 1 or 3. Labels: whole
            numbers, (n,) or (n, 1). Classes: strings; "0", "1", ... where they are not given.

    Returns:
        images of 1 or 3 channels, named after the file.

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
    arrays = read_npz(path)
    missing = [key for key in NPZ_KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path}: expected the arrays {', '.join(NPZ_KEYS)}; lacking {', '.join(missing)}")
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
    return assemble_split(name_data(path), [arrays[key] for key in NPZ_KEYS], arrays.get("classes", ()))
