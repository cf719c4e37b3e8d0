"""Images in class folders and archives, written small by the tests: values, damage, and the cache."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from revprop.datasets import load_data, load_image_folder

RNG = np.random.default_rng(0)


def random_pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def pack(folder: Path, archive: Path, leading: str | None = None) -> Path:
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as tar:
        tar.add(folder, folder.name if leading is None else leading)
    return archive


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
