"""CIFAR batches in every form, written small by the tests: values, and what damaged or hostile files are told."""

from __future__ import annotations

import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from revprop.datasets import load_cifar, load_data

RNG = np.random.default_rng(0)


def random_pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


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


def pack(folder: Path, archive: Path, leading: str | None = None) -> Path:
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as tar:
        tar.add(folder, folder.name if leading is None else leading)
    return archive


@pytest.mark.parametrize("variant", [10, 100])
@pytest.mark.parametrize(("binary", "protocol"), [(True, 0), (False, 2), (False, 4), (False, 5)])
@pytest.mark.parametrize("packed", [True, False])
def test_load_cifar(tmp_path: Path, variant: int, binary: bool, protocol: int, packed: bool) -> None:
    pixels, labels = write_cifar(tmp_path / "batches", variant, binary, protocol)
    path = pack(tmp_path / "batches", tmp_path / "cifar.tar.gz") if packed else tmp_path / "batches"
    for split in (load_cifar(path, variant), load_data(path)):
        np.testing.assert_array_equal(torch.cat([split.train.images, split.test.images]), pixels)
        assert [*split.train.labels.tolist(), *split.test.labels.tolist()] == labels
        assert split.train.classes == tuple(f"class{i}" for i in range(variant))
        assert (len(split.test), split.test.name) == (2, f"cifar{variant}")


class Attack:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Attack()), r"it asks for posix\.system, .* refused"),
        (pickle.dumps({"data": random_pixels(2, 3072), "labels": [0, 1]})[:3000], "expected a whole CIFAR batch"),
        (pickle.dumps([1, 2]), "expected a dictionary, got a list"),
        (pickle.dumps({"labels": [0]}), "'data' as uint8 of shape"),
        (pickle.dumps({"data": random_pixels(2, 3071), "labels": [0, 1]}), "'data' as uint8 of shape"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]}), "type 'f8' where only uint8"),
        (pickle.dumps({"data": random_pixels(2, 3072), "labels": [0, 10]}), "integers from 0 to 9"),
        (pickle.dumps({"data": random_pixels(2, 3072), "labels": [0]}), "as many labels as images, got 1 and 2"),
    ],
)
def test_load_cifar_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "c", 10, binary=False)
    (tmp_path / "c" / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_3: .*{message}"):
        load_cifar(tmp_path / "c")
    assert not Path("hacked").exists()


def test_load_cifar_missing_and_cut_batches(tmp_path: Path) -> None:
    write_cifar(tmp_path / "c", 10, binary=True)
    whole = (tmp_path / "c" / "data_batch_2.bin").read_bytes()
    (tmp_path / "c" / "data_batch_2.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: expected a whole number of 3073-byte records, got 6145"):
        load_cifar(tmp_path / "c")
    (tmp_path / "c" / "data_batch_2.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10, lacking data_batch_2\.bin$"):
        load_cifar(tmp_path / "c")
    write_cifar(tmp_path / "more" / "a", 10, binary=False)
    write_cifar(tmp_path / "more" / "b", 10, binary=False)
    with pytest.raises(ValueError, match=r"batches lie in 2 folders, \['a', 'b'\]: name one of them"):
        load_cifar(tmp_path / "more")
    with pytest.raises(ValueError, match="variant 10 or 100, got 20"):
        load_cifar(tmp_path / "c", 20)
