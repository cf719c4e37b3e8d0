"""The figures of information planes and of singular vectors: what they draw, on which scale, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from torch import nn

import revprop
from revprop.report import figure_to_svg, information_planes, spectrum_pictures

Row = dict[str, Any]


def row(layer: str, epoch: int, x: float, y: float) -> Row:
    return {"layer": layer, "epoch": epoch, "input_bits": x, "label_bits": y}


def points(figure: Figure, panel: int) -> list[tuple[float, float, float]]:
    """(I(X; L), I(L; Y), epoch as coloured) of a panel's points."""
    found = []
    for drawn in figure.axes[panel].collections:
        assert isinstance(drawn, PathCollection)
        offsets, colours = np.asarray(drawn.get_offsets()), np.asarray(drawn.get_array())
        found += [(*map(float, at), float(colour)) for at, colour in zip(offsets, colours, strict=True)]
    return sorted(found)


def test_a_plane_is_drawn_point_by_point() -> None:
    x = torch.tensor([[i >> k & 1 for k in range(4)] for i in range(16)]).float()
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    plane = revprop.information_plane(net, x, x[:, 0])
    with torch.no_grad():
        net[0].weight.mul_(3)
    plane = plane + revprop.information_plane(net, x, x[:, 0], epoch=5)
    figure = information_planes({"one": plane.rows(), "other": plane.rows()[:2]}, plane.label_information)
    wanted = sorted((p.input_bits, p.label_bits, p.epoch) for p in plane.points)
    np.testing.assert_allclose(points(figure, 0), wanted)
    assert len(points(figure, 1)) == 2
    assert [axes.get_title() for axes in figure.axes[:2]] == ["one", "other"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1", "output", "I(X; Y)"]
    assert {drawn.norm.vmax for axes in figure.axes[:2] for drawn in axes.collections} == {5}
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert "bits" in figure.get_supxlabel()
    assert "bits" in figure.get_supylabel()
    assert figure_to_svg(figure) == figure_to_svg(figure)


def test_many_epochs_are_spread_by_their_logarithm() -> None:
    rows = [row("fc", epoch, 1.0, 0.5) for epoch in (0, 1, 10, 1000)]
    figure = information_planes({"Std": rows})
    assert [colour for *_, colour in points(figure, 0)] == [1, 2, 11, 1001]
    norm = figure.axes[0].collections[0].norm
    assert float(norm(11)) > 0.3  # a hundredth of the way
    labels = [text.get_text() for text in figure.axes[-1].get_yticklabels()]
    assert {"0", "10", "100", "1,000"} <= set(labels)
    later = information_planes({"Std": rows[1:]})
    assert [colour for *_, colour in points(later, 0)] == [1, 10, 1000]


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (4, (1, 4)), (5, (2, 3)), (7, (2, 4))])
def test_any_number_of_models(count: int, shape: tuple[int, int]) -> None:
    figure = information_planes({str(i): [row("fc", 0, 0.0, 0.0), row("fc", 0, 2.0, 1.0)] for i in range(count)})
    assert figure.axes[0].get_gridspec().get_geometry() == shape
    assert not list(figure.axes[0].lines)  # of several runs nothing is joined
    assert str(figure.get_label()).count("fc from I(X; L) 1.00, I(L; Y) 0.50 at epoch 0") == count


def test_planes_without_points_are_refused() -> None:
    with pytest.raises(ValueError, match="no point to draw"):
        information_planes({"Std": []})
    figure = information_planes({"Std": [row("fc", 0, 0.0, 0.0)], "RR": []})
    assert points(figure, 1) == []


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((1, 4, 4), (4, 4)), ((3, 4, 4), (4, 4, 3)), ((2, 4, 4), (4, 4)), ((6, 5), (6, 5)), ((7,), (1, 7))],
)
def test_vectors_are_drawn_in_the_shape_of_the_data(size: tuple[int, ...], drawn: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    vectors, data = generator.standard_normal((10, int(np.prod(size)))), generator.random((3, *size))
    figure = spectrum_pictures(np.arange(10, 0, -1), vectors, data, np.full(10, 0.05), title="fc1")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [np.asarray(image.get_array()).shape for image in images] == [drawn] * 13
    first = vectors[0].reshape(size)
    if drawn == (4, 4):
        np.testing.assert_allclose(images[0].get_array(), first.mean(0))
        assert images[0].norm.vmin == -images[0].norm.vmax
    if len(drawn) == 3:  # zero is grey
        np.testing.assert_allclose(images[0].get_array(), np.moveaxis(0.5 + first / np.abs(first).max() / 2, 0, -1))
    assert [axes.get_title() for axes in figure.axes if axes.images][:2] == ["10.0; 5.0 %", "9.00; 5.0 %"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), np.arange(10, 0, -1))
    assert figure.get_label() == (
        "fc1: 10 singular values from 10 to 1. The leading 10 right vectors hold 50.0 % of the data; drawn beside 3 samples."
    )
    assert figure_to_svg(figure) == figure_to_svg(figure)


def test_so_many_at_most() -> None:
    figure = spectrum_pictures(np.ones(40), np.eye(40), np.ones((40, 40)), most=8)
    assert sum(bool(axes.images) for axes in figure.axes) == 16


def test_pictures_of_a_layer() -> None:
    found = revprop.spectrum(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 6, 6), "output", k=3)
    figure = spectrum_pictures(found.values, found.right, torch.rand(4, 1, 6, 6))
    assert "3 singular values from" in str(figure.get_label())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], np.zeros((0, 4)), np.ones((1, 4))), "at least one; given 0 values"),
        (([1.0], np.eye(2), np.ones((1, 2))), "given 1 values, 2 vectors"),
        (([1.0], np.ones((1, 2)), np.ones((1, 2)), [0.1, 0.2]), "1 vectors and 2 shares"),
        (([1.0], np.ones((1, 4)), np.ones((1, 5))), r"given \(5,\) and \(4,\)"),
        (([1.0], np.ones((1, 4)), np.ones(4)), "expected samples"),
        (([1.0], np.ones((1, 4)), np.ones((0, 4))), "expected samples"),
    ],
)
def test_pictures_that_cannot_be_drawn(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spectrum_pictures(*arguments)
