"""Data sets by name and by path, and the real ones where they are present."""

from __future__ import annotations

import gzip
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from revprop.datasets import data_root, load_data, load_digits

DATA = Path(os.environ.get("REVPROP_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


RNG = np.random.default_rng(0)


def random_pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def test_load_digits() -> None:
    split, again, other = load_digits(seed=1), load_digits(seed=1), load_digits(seed=2)
    assert (len(split.train), len(split.test), split.train.images.shape[1:]) == (1347, 450, (1, 8, 8))
    assert torch.equal(split.train.images, again.train.images)
    assert not torch.equal(split.train.labels, other.train.labels)
    assert split.train.images.max() == 240
    assert (split.train.images % 15 == 0).all()
    share = split.test.labels.bincount() / (split.test.labels.bincount() + split.train.labels.bincount())
    assert (share - 0.25).abs().max() < 0.01  # stratified
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        load_digits(test_share=1.5)


def idx_bytes(array: np.ndarray, code: int = 8) -> bytes:
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_idx_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    train, test = random_pixels(4, 5, 5), random_pixels(2, 5, 5)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(train)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([0, 1, 2, 0], np.uint8)))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(test))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.array([2, 1], np.uint8))))
    return train, test


def write_cifar(folder: Path, variant: int, binary: bool, protocol: int = 2) -> tuple[np.ndarray, list[int]]:
    folder.mkdir(parents=True)
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if variant == 10 else ["train", "test"]
    pixels, labels = random_pixels(len(batches), 2, 3072), [[i, i + 1] for i in range(len(batches))]
    for name, images, fine in zip(batches, pixels, labels, strict=True):
        if binary:
            coarse = [] if variant == 10 else [np.full((2, 1), 9, np.uint8)]
            table = np.concatenate([*coarse, np.array(fine, np.uint8)[:, None], images], axis=1)
            (folder / f"{name}.bin").write_bytes(table.tobytes())
        else:
            key = b"labels" if variant == 10 else b"fine_labels"
            (folder / name).write_bytes(pickle.dumps({b"data": images, key: fine}, protocol=protocol))
    names = [f"class{i}" for i in range(variant)]
    if binary:
        (folder / ("batches.meta.txt" if variant == 10 else "fine_label_names.txt")).write_text("\n".join(names))
    else:
        key_names = "label_names" if variant == 10 else "fine_label_names"
        (folder / ("batches.meta" if variant == 10 else "meta")).write_bytes(pickle.dumps({key_names: names}))
    return pixels.reshape(-1, 3, 32, 32), [label for pair in labels for label in pair]


def test_load_data_by_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    assert data_root() == tmp_path
    train, _ = write_idx_folder(tmp_path / "mnist")
    write_cifar(tmp_path / "cifar10" / "cifar-10-batches-py", 10, binary=False)
    assert load_data("digits").train.name == "digits"
    np.testing.assert_array_equal(load_data("mnist").train.images[:, 0], train)
    assert (load_data("cifar10").train.name, len(load_data("cifar10").train)) == ("cifar10", 10)
    monkeypatch.chdir(tmp_path)
    assert len(load_data("./mnist").train) == 4
    assert len(load_data("cifar10/").train) == 10  # found below the folder given
    with pytest.raises(ValueError, match=r"found CIFAR-10 in .*/cifar10/cifar-10-batches-py, IDX in .*/mnist"):
        load_data(tmp_path)
    monkeypatch.delenv("REVPROP_DATA")
    assert data_root() == tmp_path.parent / "shared" / "data"


def test_load_data_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"unknown data set 'mnits'; did you mean 'mnist'.*path"):
        load_data("mnits")
    with pytest.raises(FileNotFoundError, match=r"no data for 'mnist': looked in .* set REVPROP_DATA .*download=True"):
        load_data("mnist")
    with pytest.raises(FileNotFoundError, match=r"no data for 'tinyimagenet10'.*give its path$"):
        load_data("tinyimagenet10")
    for absent in (str(tmp_path / "absent"), tmp_path / "absent", "absent.npz"):
        with pytest.raises(FileNotFoundError, match=r"absent.*: no such file or folder"):
            load_data(absent)
    with pytest.raises(ValueError, match=r"expected one of IDX files, CIFAR batches.*found none of them"):
        load_data(tmp_path)
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(ValueError, match=r"notes\.txt: the file is damaged or of another kind"):
        load_data(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="size and cache apply to images in class folders only"):
        load_data("digits", size=8)
    write_idx_folder(tmp_path / "mnist")
    with pytest.raises(ValueError, match="size and cache apply to images in class folders only"):
        load_data("mnist", size=8)


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match="download=True needs torchvision: pip install"):
        load_data("mnist", download=True)
    with pytest.raises(ValueError, match="'tinyimagenet10' cannot be downloaded; 'mnist', 'cifar10', 'cifar100' can"):
        load_data("tinyimagenet10", download=True)

    def put(root: str, download: bool) -> None:
        assert download
        write_idx_folder(Path(root) / "MNIST" / "raw")  # where torchvision's class puts it

    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(MNIST=put))
    assert len(load_data("mnist", download=True).train) == 4
    assert len(load_data("mnist", download=True).train) == 4  # there by now: not downloaded again


REAL = [
    pytest.param("mnist", 60_000, 10_000, (1, 28, 28), "mnist"),
    pytest.param("cifar10-lossless", 5_329, 1_000, (3, 32, 32), "cifar10/cifar10_lossless_subset.npz"),
    pytest.param("tinyimagenet10", 5_000, 500, (3, 64, 64), "images/tinyimagenet10.tar.gz"),
    pytest.param("cifar10-jpeg", 50_000, 10_000, (3, 32, 32), "cifar10/cifar10_jpeg.tar.gz", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "train", "test", "shape", "place"), REAL)
def test_real_data(
    name: str, train: int, test: int, shape: tuple[int, ...], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (DATA / place).exists():
        pytest.skip(f"no {place} in the data folder: set REVPROP_DATA")
    monkeypatch.setenv("REVPROP_DATA", str(DATA))
    split = load_data(name)
    assert (len(split.train), len(split.test), tuple(split.train.images.shape[1:])) == (train, test, shape)
    assert (len(split.train.classes), split.train.name) == (10, name)
    if name != "tinyimagenet10":  # the first labels of the original test sets, in their order
        first = [7, 2, 1, 0] if name == "mnist" else [3, 8, 8, 0]
        assert split.test.labels[:4].tolist() == first
