"""STL-10 in its binary form and CelebA in its folders, on made files, and the thousand faces where they are at hand."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from revprop.datasets import data_root, load_celeba, load_data, load_stl10
from revprop.experiments.baseline import load_split

CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
REAL = data_root() / "images" / "celeba64.tar.gz"  # by the environment as the tests were started


@pytest.fixture
def stl10(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    draw = np.random.default_rng(0)
    made = {}
    for part, count in (("train", 20), ("test", 10), ("unlabeled", 3)):
        images = draw.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        (folder / f"{part}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())  # column by column
        made[part] = images
        if part != "unlabeled":
            (folder / f"{part}_y.bin").write_bytes(bytes(1 + i % 10 for i in range(count)))
    (folder / "class_names.txt").write_text("\n".join(CLASSES) + "\n")
    return folder, made


@pytest.mark.parametrize("form", ["folder", "above", "archive"])
def test_stl10(stl10: tuple[Path, dict[str, np.ndarray]], form: str) -> None:
    folder, made = stl10
    path = folder if form == "folder" else folder.parent
    if form == "archive":
        path = folder.with_name("stl10_binary.tar.gz")
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, "stl10_binary")
    split = load_data(path)
    np.testing.assert_array_equal(split.train.images, made["train"])
    np.testing.assert_array_equal(split.test.images, made["test"])
    assert split.train.labels.tolist() == [i % 10 for i in range(20)]
    assert split.train.classes == CLASSES


def test_stl10_by_name_is_64_pixels_wide(
    stl10: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = stl10
    monkeypatch.setenv("REVPROP_DATA", str(folder.parent))
    split = load_data("stl10")
    assert split.train.images.shape == (20, 3, 64, 64)
    expected = np.asarray(Image.fromarray(made["train"][4, 1]).resize((64, 64), Image.Resampling.BILINEAR))
    assert np.abs(split.train.images[4, 1].numpy().astype(int) - expected).max() <= 1
    alone = load_data("stl10-unlabelled", size=96)
    np.testing.assert_array_equal(alone.train.images, made["unlabeled"])
    np.testing.assert_array_equal(alone.test.images, made["test"])
    assert (alone.train.classes, alone.train.name) == (("image",), "stl10-unlabelled")
    with pytest.raises(ValueError, match="size of at least 1"):
        load_stl10(folder, 0)


def test_damaged_stl10(stl10: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, _ = stl10
    (folder / "class_names.txt").unlink()
    assert load_stl10(folder).train.classes == tuple(map(str, range(10)))
    labels = (folder / "train_y.bin").read_bytes()
    (folder / "train_y.bin").write_bytes(bytes([0, *labels[1:]]))
    with pytest.raises(ValueError, match=r"train_y\.bin: expected labels from 1 to 10, got 0 to 10"):
        load_stl10(folder)
    (folder / "train_y.bin").write_bytes(labels[1:])
    with pytest.raises(ValueError, match=r"train_y\.bin: expected as many labels as images, 20, got 19"):
        load_stl10(folder)
    images = (folder / "test_X.bin").read_bytes()
    (folder / "test_X.bin").write_bytes(images[:-1])
    with pytest.raises(
        ValueError, match=r"test_X\.bin: expected a whole number of images of 27,648 bytes, got 276,479"
    ):
        load_stl10(folder)
    (folder / "test_X.bin").unlink()
    (folder / "unlabeled_X.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacking test_X\.bin$"):
        load_stl10(folder)
    with pytest.raises(FileNotFoundError, match=r"lacking unlabeled_X\.bin, test_X\.bin$"):
        load_stl10(folder, unlabelled=True)


def write_faces(folder: Path, count: int, size: tuple[int, int] = (6, 6)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (20 * i, 0, 255)).save(folder / f"{i:06}.png")


def test_celeba_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "celeba"
    write_faces(folder / "img_align_celeba", 6, size=(4, 6))
    lines = [f"{i:06}.png {1 if i % 2 else -1:2d} -1" for i in range(6)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(["6", "Smiling Young", *lines]) + "\n")
    (folder / "list_eval_partition.txt").write_text("".join(f"{i:06}.png {i // 2}\n" for i in range(6)))
    split = load_data(folder)
    assert split.train.images[:, 0, 0, 0].tolist() == [0, 20]
    assert split.test.images[:, 0, 0, 0].tolist() == [80, 100]
    assert split.train.images.shape == (2, 3, 6, 4)
    assert (split.test.labels.tolist(), split.test.classes) == ([0, 1], ("no", "yes"))
    assert load_celeba(folder, attribute="YOUNG").test.labels.tolist() == [0, 0]
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    assert load_data("celeba").train.images.shape == (2, 3, 64, 64)
    with pytest.raises(
        ValueError, match=r"unknown attribute in .*list_attr_celeba\.txt 'smilin'; did you mean 'smiling'"
    ):
        load_celeba(folder, attribute="smilin")


def test_faces_with_a_table_of_flags(tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    write_faces(folder, 11)
    table = "file,beard,smiling\n" + "".join(f"{i:06}.png,1,{i // 5 % 2}\n" for i in range(11))
    (folder / "attributes.csv").write_text(table)
    path = tmp_path / "faces.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(folder, "faces")
    split = load_data(path)
    assert split.test.images[:, 0, 0, 0].tolist() == [0, 100, 200]  # every fifth
    assert split.test.labels.tolist() == [0, 1, 0]
    assert len(split.train) == 8
    assert len(load_split(str(path), tmp_path / "cache").train) == 8  # as commands load it: with a place for a cache
    (folder / "attributes.csv").write_text(table.replace("000010.png,1,0\n", ""))
    with pytest.raises(ValueError, match=r"attributes\.csv lacks 1 of 11 images, such as 000010\.png"):
        load_celeba(folder)
    (folder / "attributes.csv").write_text(table.replace("000010.png,1,0", "000010.png,1,2"))
    with pytest.raises(ValueError, match=r"expected a file and 2 times 0, 1 or -1, got '000010\.png 1 2'"):
        load_celeba(folder)
    (folder / "attributes.csv").write_text("file,smiling\n")
    with pytest.raises(ValueError, match="a line of names and one for each image, got 1 lines"):
        load_celeba(folder)
    (folder / "attributes.csv").write_text(table)
    Image.new("RGB", (5, 6)).save(folder / "000003.png")
    with pytest.raises(ValueError, match=r"000000\.png has 6x6 and 000003\.png has 6x5 pixels: give a size"):
        load_celeba(folder)
    assert load_celeba(folder, size=4).train.images.shape == (8, 3, 4, 4)
    with pytest.raises(ValueError, match="size of at least 1"):
        load_celeba(folder, size=0)
    (folder / "attributes.csv").unlink()
    with pytest.raises(ValueError, match="expected images, and a list of attributes"):
        load_celeba(folder)


def test_a_thousand_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    if not REAL.exists():
        pytest.skip("no images/celeba64.tar.gz in the data folder: set REVPROP_DATA")
    monkeypatch.setenv("REVPROP_DATA", str(REAL.parents[1]))
    split = load_data("celeba64")
    assert (len(split.train), len(split.test), tuple(split.train.images.shape[1:])) == (800, 200, (3, 64, 64))
    assert 350 < int(split.train.labels.sum()) < 450  # half of the thousand smile
