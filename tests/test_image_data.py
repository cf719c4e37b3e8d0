"""Labelled images in memory: standardised against a float64 reference, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revprop.datasets import ImageData, Split

RNG = np.random.default_rng(0)


def make(images: np.ndarray, labels: list[int], classes: tuple[str, ...] = ("a", "b")) -> ImageData:
    return ImageData("toy", torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64), classes)


def random_pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


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
