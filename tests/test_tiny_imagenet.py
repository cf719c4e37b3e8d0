"""Tiny ImageNet in the form it is handed out in, and Imagenette and Imagewoof from their folders, on made files."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from revprop.datasets import load_data, load_made, load_tiny_imagenet

CLASSES = ("n01443537", "n01629819", "n02056570")


def picture(path: Path, value: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path, quality=100)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-imagenet-200"
    lines = []
    for c, name in enumerate(CLASSES):
        for i in range(2):
            picture(folder / "train" / name / "images" / f"{name}_{i}.JPEG", 80 * c)
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t7\t7\n")
        picture(folder / "val" / "images" / f"val_{2 - c}.JPEG", 80 * c, mode="L" if c == 1 else "RGB")
        lines.append(f"val_{2 - c}.JPEG\t{name}\t0\t0\t7\t7\n")
        picture(folder / "test" / "images" / f"test_{c}.JPEG", 255)
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(reversed(CLASSES)))
    return folder


@pytest.mark.parametrize("form", ["folder", "archive", "name"])
def test_tiny_imagenet(tiny: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    spec = str(tiny)
    if form == "archive":
        spec = f"{tiny}.tar.gz"
        with tarfile.open(spec, "w:gz") as archive:
            archive.add(tiny, "tiny-imagenet-200")
    elif form == "name":
        monkeypatch.setenv("REVPROP_DATA", str(tiny.parent))
        spec = "tiny-imagenet"
    split = load_data(spec)
    assert split.train.name == ("tiny-imagenet" if form == "name" else "tiny-imagenet-200")
    assert split.train.classes == CLASSES
    assert split.train.images.shape == (6, 3, 8, 8)
    for part in (split.train, split.test):
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            assert abs(int(image[0, 4, 4]) - 80 * label) <= 2
    assert split.test.labels.tolist() == [2, 1, 0]  # by the names of the files
    assert int(split.test.images[1, 2, 4, 4]) in range(77, 84)  # grey became RGB


def test_damaged_tiny_imagenet(tiny: Path) -> None:
    labels = tiny / "val" / "val_annotations.txt"
    text = labels.read_text()
    labels.write_text("".join(text.splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match=r"val_annotations.txt names no class for 1 images, such as val_0.JPEG"):
        load_tiny_imagenet(tiny)
    labels.write_text(text.replace(CLASSES[0], "n99999999"))
    with pytest.raises(ValueError, match=r"the same classes in train and val; in one of them only: .*n99999999"):
        load_tiny_imagenet(tiny)
    labels.unlink()
    with pytest.raises(ValueError, match=r"expected train/CLASS/images/FILE, val/images/FILE and val/val_ann"):
        load_tiny_imagenet(tiny)
    labels.write_text(text)
    picture(tiny / "val" / "images" / "val_0.JPEG", 3, (9, 8))
    with pytest.raises(ValueError, match=r"expected images of one size, but val.images.val_0.JPEG has \(3, 8, 9\)"):
        load_tiny_imagenet(tiny)
    (tiny / "val" / "images" / "val_0.JPEG").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"val_0.JPEG: cannot be decoded"):
        load_tiny_imagenet(tiny)


@pytest.mark.parametrize("place", ["imagenette2-160", "images/imagenette2", "imagenette2-320.tgz"])
def test_imagenette_at_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    folder = tmp_path / place.removesuffix(".tgz")
    for part in ("train", "val"):
        for c, name in enumerate(CLASSES):
            picture(folder / part / name / "one.JPEG", 80 * c, (30 + c, 20))
    if place.endswith(".tgz"):
        with tarfile.open(tmp_path / place, "w:gz") as archive:
            archive.add(folder, folder.name)
        folder.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    split = load_data("imagenette")
    assert split.test.images.shape == (3, 3, 224, 224)
    assert split.test.labels.tolist() == [0, 1, 2]
    assert load_data("imagenette", 32).train.images.shape == (3, 3, 32, 32)
    with pytest.raises(
        FileNotFoundError, match=r"no data for 'imagewoof': looked in .* for imagewoof2, images/imagewoof2"
    ):
        load_data("imagewoof")


def test_made_images_can_be_learned_and_are_the_same_each_time() -> None:
    split = load_made("mnist", train=20, test=10)
    assert (split.train.images.shape, split.test.images.shape) == ((200, 1, 28, 28), (100, 1, 28, 28))
    means = np.stack([split.train.images[split.train.labels == c].double().mean(0).numpy().ravel() for c in range(10)])
    flat = split.test.images.double().flatten(1).numpy()
    nearest = ((flat[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    assert (nearest == split.test.labels.numpy()).mean() > 0.95
    assert bool((load_made("mnist", train=20, test=10).test.images == split.test.images).all())
    assert bool((load_made("mnist", train=20, test=10, seed=1).test.images != split.test.images).any())
    assert load_data("made:imagewoof").train.images.shape == (10, 3, 224, 224)
    with pytest.raises(ValueError, match="unknown made data set 'minst'; did you mean 'mnist'"):
        load_data("made:minst")
    with pytest.raises(ValueError, match="expected at least 1 image of each class, got 0 to train"):
        load_made("mnist", train=0)
    with pytest.raises(ValueError, match="unknown data set 'imagenete'; did you mean 'imagenette'"):
        load_data("imagenete")
