"""The tasks of the racecar study: motion blur as MATLAB makes it, n-MNIST's file, the 12-bit patterns, changed tasks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.io import savemat

from revprop.datasets import ImageData, load_n_mnist, load_spherical, made_spherical, motion_blurred
from revprop.datasets.motion_blur import motion_kernel
from revprop.experiments import racecar_data
from revprop.experiments.racecar_data import find_task, load_task


def matlab_motion(length: int, angle: float) -> np.ndarray:
    """What the documentation of fspecial says it does, step by step; for angles from 0 to below 90 degrees."""
    half, turn = (length - 1) / 2, math.radians(angle)
    columns = math.floor(half * math.cos(turn) + 1 - 1e-9) + 1
    rows = math.floor(half * math.sin(turn) + 1 - 1e-9) + 1
    quarter = np.zeros((rows, columns))
    for y in range(rows):
        for x in range(columns):
            distance = y * math.cos(turn) - x * math.sin(turn)
            if math.hypot(x, y) >= half and abs(distance) <= 1:
                rest = half - abs((x + distance * math.sin(turn)) / math.cos(turn))
                distance = math.hypot(distance, rest)
            quarter[y, x] = max(0.0, 1 - abs(distance))
    whole = np.zeros((2 * rows - 1, 2 * columns - 1))
    whole[:rows, :columns] = quarter[::-1, ::-1]
    whole[rows - 1 :, columns - 1 :] = quarter
    return np.flipud(whole) / whole.sum()


@pytest.mark.parametrize("length", [3, 5, 6, 9])
@pytest.mark.parametrize("angle", [0, 15, 30, 45, 75])
def test_the_filter_is_matlabs(length: int, angle: float) -> None:
    kernel = motion_kernel(length, angle)
    expected = matlab_motion(length, angle)
    assert kernel.shape == expected.shape
    torch.testing.assert_close(kernel, torch.from_numpy(expected.copy()), rtol=0, atol=1e-9)
    assert torch.equal(kernel, kernel.flip(0, 1))


def test_a_motion_turned_by_a_quarter_is_the_filter_turned() -> None:
    torch.testing.assert_close(motion_kernel(5, 105), motion_kernel(5, 15).rot90(1), rtol=0, atol=1e-12)
    assert motion_kernel(1).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="at least 1 pixel, given 0"):
        motion_kernel(0)


def test_images_are_blurred_one_by_one_and_black_outside() -> None:
    images = torch.randint(0, 256, (5, 2, 9, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = ImageData("noise", images, torch.arange(5), tuple("abcde"))
    found = motion_blurred(data)
    weights = matlab_motion(5, 15)
    for image, blurred in zip(images.flatten(0, 1), found.images.flatten(0, 1), strict=True):
        expected = ndimage.correlate(image.numpy().astype(float), weights, mode="constant")
        assert np.abs(blurred.numpy() - expected).max() <= 0.5 + 1e-3  # rounded
    assert torch.equal(found.labels, data.labels)
    assert len(motion_blurred(data.subset([]))) == 0


def test_n_mnist_is_read_row_by_row(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x = {part: draw.integers(0, 256, (n, 784), dtype=np.uint8) for part, n in (("train", 12), ("test", 11))}
    y = {part: draw.permutation(10)[np.arange(len(rows)) % 10] for part, rows in x.items()}
    arrays = {f"{part}_x": x[part] for part in x} | {f"{part}_y": np.eye(10)[y[part]] for part in x}
    savemat(tmp_path / "blurred.mat", arrays)
    split = load_n_mnist(tmp_path / "blurred.mat")
    for part, data in (("train", split.train), ("test", split.test)):
        assert data.images.shape == (len(x[part]), 1, 28, 28)
        assert int(data.images[3, 0, 2, 5]) == x[part][3, 2 * 28 + 5]
        assert data.labels.tolist() == y[part].tolist()
    savemat(tmp_path / "other.mat", {"train_x": np.zeros((3, 10))})
    with pytest.raises(ValueError, match=r"expected train_x as uint8 \(n, 784\)"):
        load_n_mnist(tmp_path / "other.mat")
    (tmp_path / "text.mat").write_text("not a MATLAB file")
    with pytest.raises(ValueError, match="expected a MATLAB file"):
        load_n_mnist(tmp_path / "text.mat")


def test_the_patterns_are_all_there_once(tmp_path: Path) -> None:
    x, y = made_spherical()
    np.savez(tmp_path / "bits.npz", x=x.numpy().astype(np.uint8), y=y.numpy().astype(np.uint8))
    again = load_spherical(tmp_path / "bits.npz")
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], y)
    assert len(x.unique(dim=0)) == 4096
    np.savez(tmp_path / "twice.npz", x=np.zeros((4096, 12), np.uint8), y=y.numpy())
    for name, content in (("twice", "some twice"), ("short", "expected 0 and 1"), ("none", "the arrays x and y")):
        if name == "short":
            np.savez(tmp_path / "short.npz", x=x[:5].numpy(), y=y[:5].numpy())
        if name == "none":
            (tmp_path / "none.npz").write_bytes(b"PK nothing")
        with pytest.raises(ValueError, match=content):
            load_spherical(tmp_path / f"{name}.npz")


def test_changed_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sharp, blurred = load_task("made:mnist", 50, 20), load_task("made:mnist, motion blur", 50, 20)
    assert sharp.train[0].shape == (50, 1, 28, 28)
    assert 0 <= float(sharp.train[0].min()) < float(sharp.train[0].max()) <= 1
    assert torch.equal(sharp.train[1], blurred.train[1])
    assert 0 < float((sharp.train[0] - blurred.train[0]).abs().mean()) < 0.2
    small, whole = load_task("made:cifar10, halved", 8), load_task("made:cifar10", 8)
    expected = torch.nn.functional.avg_pool2d(whole.train[0], 2)
    assert float((small.train[0] - expected).abs().max()) <= 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match="did you mean 'motion blur'"):
        load_task("made:mnist, motion blurr")
    monkeypatch.setenv("REVPROP_DATA", str(tmp_path))
    assert find_task(racecar_data.SPHERICAL) is None
    with pytest.raises(FileNotFoundError, match=r"spherical_12bit\.npz"):
        load_task(racecar_data.SPHERICAL)
