"""IDX files and NumPy archives, written small by the tests: values, and what damaged files are told."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from revprop.datasets import load_data, load_idx_folder, load_npz, read_idx

RNG = np.random.default_rng(0)


def random_pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array: np.ndarray, code: int = 8) -> bytes:
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize(("code", "kind"), [(8, "u1"), (9, "i1"), (11, "i2"), (12, "i4"), (13, "f4"), (14, "f8")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_read_idx_values(tmp_path: Path, code: int, kind: str, pack: Callable[[bytes], bytes]) -> None:
    array = np.arange(-5, 7).reshape(3, 4).astype(kind)
    (tmp_path / "a").write_bytes(pack(idx_bytes(array, code)))
    result = read_idx(tmp_path / "a")
    assert result.dtype == np.dtype(kind)
    np.testing.assert_array_equal(result, array)


GOOD = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:2], "header of at least 4 bytes, got 2"),
        (GOOD[:7], "2 sizes after the IDX header, got 3 bytes"),
        (GOOD[:-1], r"expected 12 bytes \(3x4 uint8\) after the IDX header, got 11"),
        (GOOD + b"x", r"expected 12 bytes \(3x4 uint8\) after the IDX header, got 13"),
        (GOOD[3::-1] + GOOD[4:], "header is little-endian"),
        (GOOD[:4] + np.array([3, 4], "<u4").tobytes() + GOOD[12:], "sizes in the IDX header are little-endian"),
        (b"\0\0\x07\1" + GOOD[4:], "type 08 to 0e, got 00000701"),
        (b"PNG!", "expected an IDX header"),
        (gzip.compress(GOOD, mtime=0)[:-9], "cut off"),
        (gzip.compress(GOOD, mtime=0)[:-8] + bytes(8), "damaged"),
        (gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 20, "damaged"),
    ],
)
def test_read_idx_names_the_file_and_the_fault(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(ValueError, match=f"images.*{message}"):
        read_idx(tmp_path / "images")


def write_idx_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    train, test = random_pixels(4, 5, 5), random_pixels(2, 5, 5)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(train)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([0, 1, 2, 0], np.uint8)))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(test))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.array([2, 1], np.uint8))))
    return train, test


def test_load_idx_folder(tmp_path: Path) -> None:
    train, test = write_idx_folder(tmp_path / "set")
    split = load_idx_folder(tmp_path / "set")
    np.testing.assert_array_equal(split.train.images[:, 0], train)
    np.testing.assert_array_equal(split.test.images[:, 0], test)
    assert (split.test.labels.tolist(), split.test.classes, split.test.name) == ([2, 1], ("0", "1", "2"), "set")
    (tmp_path / "set" / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(ValueError, match=r"labels as torch\.int64 of shape \(4,\), got .*\(3,\)"):
        load_idx_folder(tmp_path / "set")
    (tmp_path / "set" / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros((4, 1), np.uint8)))
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte: expected uint8 with 1 sizes, got uint8 with 2"):
        load_idx_folder(tmp_path / "set")
    (tmp_path / "set" / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="no train-labels-idx1-ubyte, with or without"):
        load_idx_folder(tmp_path / "set")


def pack(folder: Path, archive: Path, leading: str | None = None) -> Path:
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as tar:
        tar.add(folder, folder.name if leading is None else leading)
    return archive


@pytest.mark.parametrize(
    ("axes", "channels"), [((0, 2, 3, 1), 3), ((0, 1, 2, 3), 3), ((0, 2, 3, 1), 1), ((0, 1, 2, 3), 1), (None, 1)]
)
def test_load_npz(tmp_path: Path, axes: tuple[int, ...] | None, channels: int) -> None:
    train, test = random_pixels(3, channels, 4, 5), random_pixels(2, channels, 4, 5)
    x_train, x_test = (x[:, 0] if axes is None else x.transpose(axes) for x in (train, test))
    labels = {"y_train": np.array([[0], [2], [1]], np.uint8), "y_test": np.array([1, 0])}
    np.savez(tmp_path / "set.npz", x_train=x_train, x_test=x_test, y_train=labels["y_train"], y_test=labels["y_test"])
    split = load_npz(tmp_path / "set.npz")
    np.testing.assert_array_equal(split.train.images, train)
    np.testing.assert_array_equal(split.test.images, test)
    assert (split.train.labels.tolist(), split.train.classes, split.train.name) == ([0, 2, 1], ("0", "1", "2"), "set")
    assert torch.equal(load_data(str(tmp_path / "set.npz")).test.images, split.test.images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((2, 4, 4, 3))}, "x_train as uint8 .*got float64"),
        ({"x_test": np.zeros((2, 4, 4, 2), np.uint8)}, r"x_test as uint8 .*got uint8 of shape \(2, 4, 4, 2\)"),
        ({"x_test": np.zeros((2, 3, 4, 3), np.uint8)}, "at one end only"),
        ({"y_train": np.array([0.0, 1.0])}, "y_train as integers .*got float64"),
        ({"y_train": np.array([0, 2])}, "labels from 0 to 1, got 0 to 2"),
        ({"y_train": np.array([0, 2**40]), "classes": np.array([], str)}, "labels that count classes from 0"),
        ({"y_test": np.array([0])}, r"shape \(2,\), got .*\(1,\)"),
        ({"x_train": np.zeros((0, 4, 4), np.uint8), "y_train": np.zeros(0, int)}, "one training image"),
        ({"y_test": np.array([0, None])}, r"bad\.npz: expected an \.npz archive of plain arrays"),
    ],
)
def test_load_npz_refuses(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    images, labels = random_pixels(2, 4, 4), np.array([0, 1])
    good = {"x_train": images, "x_test": images, "y_train": labels, "y_test": labels, "classes": np.array(["a", "b"])}
    np.savez(tmp_path / "bad.npz", **(good | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        load_npz(tmp_path / "bad.npz")


def test_load_npz_refuses_other_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "part.npz", x_train=np.zeros(2))
    with pytest.raises(ValueError, match=r"part\.npz: .*lacking y_train, x_test, y_test"):
        load_npz(tmp_path / "part.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "part.npz").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.npz: "):
        load_npz(tmp_path / "cut.npz")
    np.save(tmp_path / "one.npy", np.zeros(2))
    with pytest.raises(ValueError, match=r"one\.npy: expected an \.npz archive"):
        load_npz(tmp_path / "one.npy")
