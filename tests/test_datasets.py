"""Every form of image data on disk, written small by the tests themselves: values, and what damaged files are told."""

from __future__ import annotations

import gzip
import os
import pickle
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from revprop.datasets import (
    ImageData,
    Split,
    data_root,
    load_cifar,
    load_data,
    load_digits,
    load_idx_folder,
    load_image_folder,
    load_npz,
    read_idx,
)

DATA = Path(os.environ.get("REVPROP_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
RNG = np.random.default_rng(0)


def make(images: np.ndarray, labels: list[int], classes: tuple[str, ...] = ("a", "b")) -> ImageData:
    return ImageData("toy", torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64), classes)


def random_pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


# --- ImageData and Split -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    chunk=st.none() | st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    constant=st.integers(0, 255),
)
def test_standardised_matches_float64_reference(
    shape: tuple[int, int, int, int], chunk: int | None, seed: int, constant: int
) -> None:
    images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    images[:, 0] = constant
    result = make(images, [0] * shape[0]).standardised(torch.float64, chunk).numpy()
    expected = np.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            channel = images[i, j].astype(np.float64)
            if channel.min() < channel.max():
                expected[i, j] = (channel - channel.mean()) / channel.std()
                assert abs(result[i, j].mean()) < 1e-12
                assert abs(result[i, j].var() - 1) < 1e-12
    np.testing.assert_allclose(result, expected, atol=1e-12)
    assert result.shape == shape
    assert (result[:, 0] == 0).all()


def test_standardised_dtype_and_errors() -> None:
    data = make(random_pixels(3, 2, 4, 4), [0, 1, 0])
    assert data.standardised().dtype == torch.float32
    torch.testing.assert_close(data.standardised().double(), data.standardised(torch.float64), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch\.int32"):
        data.standardised(torch.int32)
    with pytest.raises(ValueError, match="chunk of at least 1 image, got 0"):
        data.standardised(chunk=0)


def test_scaled_values_and_errors() -> None:
    data = make(np.array([[[[0, 255]], [[51, 102]]]], np.uint8), [1])
    expected = torch.tensor([[[[-0.5, 0.5]], [[0.0, 0.4]]]])
    torch.testing.assert_close(data.scaled([0.5, 0.2], [1.0, 0.5]), expected)
    with pytest.raises(ValueError, match="expected 2 means and standard deviations, got 3 and 2"):
        data.scaled([0, 0, 0], [1, 1])
    with pytest.raises(ValueError, match="positive standard deviations"):
        data.scaled([0, 0], [1, 0])


def test_subset_and_tensors() -> None:
    data = make(random_pixels(4, 1, 2, 2), [0, 1, 0, 1])
    part = data.subset([3, 0])
    assert (len(part), part.labels.tolist()) == (2, [1, 0])
    assert torch.equal(part.images, data.images[[3, 0]])
    assert len(data.subset([])) == 0
    with pytest.raises(IndexError, match="indices from 0 to 3, got 0 to 4"):
        data.subset(torch.tensor([0, 4]))
    images, labels = data.tensors()
    assert torch.equal(images, data.standardised())
    assert torch.equal(labels, data.labels)


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), ("a",), r"torch\.uint8.*got torch\.float32"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2, dtype=torch.int64), ("a",), r"\(n, c, h, w\), got .*\(2, 4, 4\)"),
        (torch.zeros(2, 0, 4, 4).byte(), torch.zeros(2, dtype=torch.int64), ("a",), r"got .*\(2, 0, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2, dtype=torch.int32), ("a",), r"torch\.int64.*got torch\.int32"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(3, dtype=torch.int64), ("a",), r"shape \(2,\), got .*\(3,\)"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([0, 1]), ("a",), "labels from 0 to 0, got 0 to 1"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([-1, 0]), ("a",), "labels from 0 to 0, got -1 to 0"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([0, 0]), (), "at least one class"),
    ],
)
def test_image_data_refuses(images: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageData("toy", images, labels, classes)


def test_split_refuses_parts_that_do_not_fit() -> None:
    data = make(random_pixels(2, 1, 4, 4), [0, 1])
    with pytest.raises(ValueError, match="at least one test image, got none"):
        Split(data, data.subset([]))
    with pytest.raises(ValueError, match=r"one of them only: \['b', 'c'\]"):
        Split(data, make(random_pixels(1, 1, 4, 4), [0], ("a", "c")))
    with pytest.raises(ValueError, match=r"one size, got \(1, 4, 4\) and \(1, 5, 4\)"):
        Split(data, make(random_pixels(1, 1, 5, 4), [0]))


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


# --- IDX -----------------------------------------------------------------------------------------------------------


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
        (gzip.compress(GOOD)[:-9], "cut off"),
        (gzip.compress(GOOD)[:-8] + bytes(8), "damaged"),
        (gzip.compress(GOOD)[:10] + b"\xff" * 20, "damaged"),
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


# --- CIFAR ---------------------------------------------------------------------------------------------------------


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


# --- npz -----------------------------------------------------------------------------------------------------------


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


# --- Image folders -------------------------------------------------------------------------------------------------


def write_image_folder(folder: Path, test: str = "val", size: tuple[int, int] = (4, 6)) -> dict[str, np.ndarray]:
    """Write {train, test}/{cat, dog}/{1, 2}.png of height x width pixels; return the pixels by path, (h, w, 3)."""
    written = {}
    for part in ("train", test):
        for name in ("cat/1.png", "cat/2.PNG", "dog/1.png"):
            path = folder / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            written[f"{part}/{name}"] = random_pixels(*size, 3)
            Image.fromarray(written[f"{part}/{name}"]).save(path)
    return written


@pytest.mark.parametrize("form", ["folder", "above", ".tar", ".tar.gz"])
@pytest.mark.parametrize("test", ["val", "test"])
def test_load_image_folder(tmp_path: Path, form: str, test: str) -> None:
    written = write_image_folder(tmp_path / "top" / "set", test)
    source = tmp_path / "top" / "set" if form == "folder" else tmp_path / "top"
    if form.startswith("."):
        source = pack(tmp_path / "top" / "set", tmp_path / f"set{form}")
    for split in (load_image_folder(source), load_data(source)):
        assert split.train.classes == ("cat", "dog")
        assert sorted(split.train.labels.tolist()) == [0, 0, 1]
        for part, data in (("train", split.train), (test, split.test)):
            found = sorted(zip(data.labels.tolist(), data.images.permute(0, 2, 3, 1).numpy().tolist(), strict=True))
            expected = [(int("dog" in k), v.tolist()) for k, v in written.items() if k.startswith(part)]
            assert found == sorted(expected)


def test_load_image_folder_converts_and_resizes(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "set", size=(8, 8))
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "set/train/cat/1.png")
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / "set/train/cat/3.jpg", quality=95)
    (tmp_path / "set/train/cat/._3.jpg").write_bytes(b"no image: what macOS leaves in archives")
    split = load_image_folder(tmp_path / "set")
    np.testing.assert_array_equal(split.train.images[0], np.stack([grey] * 3))
    assert (split.train.images[2, :, 4, 4] - torch.tensor([200, 100, 50])).abs().max() < 4
    # A 4x8 image of two halves, cut to its central 4x4 square, is half of each; size 4 does not resample it.
    halves = np.zeros((4, 8, 3), np.uint8)
    halves[:, 4:] = 255
    Image.fromarray(halves).save(tmp_path / "set/train/dog/1.png")
    small = load_image_folder(tmp_path / "set", size=4)
    assert small.train.images.shape == (4, 3, 4, 4)
    np.testing.assert_array_equal(small.train.images[3, 0], [[0, 0, 255, 255]] * 4)
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        load_image_folder(tmp_path / "set", size=0)


def save_deep(path: Path) -> None:
    Image.fromarray(np.full((4, 6), 1000, np.uint16)).save(path)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "sizes": (
        lambda p: Image.new("L", (5, 4)).save(p / "val/dog/1.png"),
        r"cat/1\.png has 4x6 and .*dog/1\.png has 4x5",
    ),
    "empty class": (lambda p: (p / "train/emu").mkdir(), "image in class folder train/emu"),
    "no class agrees": (lambda p: (p / "val/dog").rename(p / "val/emu"), r"train and val; .*\['dog', 'emu'\]"),
    "no test": (lambda p: (p / "val").rename(p / "other"), "and as test/CLASS/FILE or val/CLASS/FILE"),
    "no train": (lambda p: (p / "train").rename(p / "other"), "expected images as train/CLASS/FILE"),
    "no image": (lambda p: (p / "train/dog/1.png").write_bytes(b"junk"), r"train/dog/1\.png: cannot be decoded"),
    "cut image": (
        lambda p: (p / "train/dog/1.png").write_bytes((p / "train/dog/1.png").read_bytes()[:60]),
        r"train/dog/1\.png: cannot be decoded",
    ),
    "16 bits": (lambda p: save_deep(p / "train/dog/1.png"), r"train/dog/1\.png: expected 8 bits per channel"),
    "two sets": (lambda p: write_image_folder(p / "more"), "lie in 2 folders"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("packed", [True, False])
def test_load_image_folder_names_the_fault(tmp_path: Path, fault: str, packed: bool) -> None:
    write_image_folder(tmp_path / "set")
    spoil, message = FAULTS[fault]
    spoil(tmp_path / "set")
    source = pack(tmp_path / "set", tmp_path / "set.tar", ".") if packed else tmp_path / "set"
    with pytest.raises(ValueError, match=rf"set(\.tar)?: .*{message}"):
        load_image_folder(source)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_cut_archives_are_never_half_loaded(tmp_path: Path, ending: str) -> None:
    write_image_folder(tmp_path / "set")
    whole = pack(tmp_path / "set", tmp_path / f"set{ending}").read_bytes()
    content = 512 * (-(-len(whole) // 512) - 2) if ending == ".tar" else len(whole)
    for kept in range(1, content, 512 if ending == ".tar" else 97):
        for cut in (kept, kept - kept % 512 or 1):  # anywhere, and exactly between blocks
            (tmp_path / f"cut{ending}").write_bytes(whole[:cut])
            if ending == ".tar" and not any(whole[max(0, cut - 1024) : cut]) and cut > 1024:
                continue  # only padding after the mark is cut off: whole
            with pytest.raises(ValueError, match=f"cut{ending}"):
                load_image_folder(tmp_path / f"cut{ending}")


def test_image_folder_cache(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "set")
    archive, cache = pack(tmp_path / "set", tmp_path / "set.tar"), tmp_path / "cache.npz"
    first = load_image_folder(archive, cache=cache)
    stamp = cache.stat().st_mtime_ns
    again = load_data(archive, cache=cache)
    assert cache.stat().st_mtime_ns == stamp
    assert torch.equal(again.train.images, first.train.images)
    assert torch.equal(again.test.labels, first.test.labels)
    assert (again.train.classes, again.train.name) == (("cat", "dog"), "set")
    assert load_image_folder(archive, size=2, cache=cache).train.images.shape[2:] == (2, 2)  # another size: made anew
    write_image_folder(tmp_path / "set", size=(3, 3))
    pack(tmp_path / "set", archive)
    os.utime(archive, ns=(1, 1))  # another archive of the same name: made anew
    assert load_image_folder(archive, cache=cache).train.images.shape[2:] == (3, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.npz", "set", "set.tar"]  # nothing temporary left
    np.savez(cache, mine=np.zeros(2))
    with pytest.raises(ValueError, match=r"cache\.npz: expected a cache of decoded images; it is another file"):
        load_image_folder(archive, cache=cache)
    assert np.load(cache)["mine"].shape == (2,)
    with pytest.raises(ValueError, match="kept for archives only"):
        load_image_folder(tmp_path / "set", cache=cache)


# --- load_data -----------------------------------------------------------------------------------------------------


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
