"""``revprop explain``: its text and page, the unit it picks, its figures, and what wrong input gets."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import revprop
from revprop import cli
from revprop.datasets import load_digits
from revprop.experiments import explanation
from revprop.networks import NETWORKS
from revprop.report import explanation as page
from revprop.report.figures import figure_to_svg
from revprop.report.hypersurface_figures import (
    channel_maps,
    feature_maps,
    hypersurface_bars,
    hypersurface_maps,
    share_bars,
)

DIGITS = ["--network", "digits", "--data", "digits", "--device", "cpu", "--out", "o"]
VECTORS = """
from torch import nn


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU6(), nn.Linear(8, 2))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``revprop explain`` in a folder with weights for the digits: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.save(NETWORKS["digits"](seed=0).state_dict(), "weights.pt")

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["explain", *arguments])
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


@pytest.fixture(scope="module")
def graph() -> revprop.Graph:
    return revprop.trace(NETWORKS["digits"](seed=0).eval(), torch.zeros(2, 1, 8, 8))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return load_digits().test.subset([4]).standardised()


def test_the_predicted_class_of_an_image(run: Any, graph: revprop.Graph, x: torch.Tensor) -> None:
    code, out, err = run(*DIGITS, "--weights", "weights.pt", "--image", "4")
    assert (code, err) == (0, "")
    with torch.no_grad():
        unit = int(graph(x).argmax())
    label = int(load_digits().test.labels[4])
    found = revprop.hypersurface(graph, x, unit=unit)
    first, *text, last = out.splitlines()
    assert first == f"unit {unit} of output ({unit}), image 4 of digits, labelled {label}"
    assert "\n".join(text) == str(found)
    assert last == f"page: o/explain-output-unit-{unit}-4.html"
    html = Path(last.removeprefix("page: ")).read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|<script|<link", html)  # nothing is fetched
    assert f"<h1>Unit {unit} of output (“{unit}”), explained</h1>" in html
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    assert html.count("<img") == len(images) == 3
    for image in images:
        assert ElementTree.fromstring(base64.b64decode(image)).tag == "{http://www.w3.org/2000/svg}svg"
    for name, value in found.bias_contributions.items():
        shown = f"{float(value[0]):.4g}"
        assert re.search(rf"{re.escape(name.removesuffix('.bias'))}</th>\s*<td[^>]*>{re.escape(shown)}<", html), name
    assert "conv1.1:tanh, conv2.1:tanh, fc1.1:tanh" in html


def test_a_unit_of_a_layer_in_double_precision(run: Any, graph: revprop.Graph, x: torch.Tensor) -> None:
    options = ("--weights", "weights.pt", "--image", "4", "--layer", "conv1.0", "--unit", "2", "1", "3", "--float64")
    code, out, _ = run(*DIGITS, *options)
    assert code == 0
    found = revprop.hypersurface(graph, x, "conv1.0", (2, 1, 3), float64=True)
    assert out.startswith("channel 2, row 1, column 3 of conv1.0, image 4 of digits")
    assert str(found) in out
    assert "nothing held" in out
    html = Path("o/explain-conv1.0-unit-2-1-3-4.html").read_text(encoding="utf-8")
    assert "(double precision)" in html or "to the last digit what the network computes" in html


def test_an_image_file_takes_the_form_of_the_data(run: Any) -> None:
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 255, (30, 50, 3), dtype=np.uint8)).save("photo.png")
    code, out, err = run(
        *DIGITS, "--weights", "weights.pt", "--image", "photo.png", "--mode", "RM1", "--layer", "conv1.0"
    )
    assert (code, err) == (0, "")
    assert re.match(r"channel \d of conv1\.0, summed over all positions, before its bias, photo\.png\n", out)
    Path("broken.png").write_bytes(b"no image")
    code, _, err = run(*DIGITS, "--weights", "weights.pt", "--image", "broken.png")
    assert (code, err.startswith("revprop: broken.png: cannot be decoded")) == (2, True)


def test_vectors_and_three_channels(run: Any) -> None:
    module = "vectors_of_ones_own"
    Path(f"{module}.py").write_text(VECTORS)
    draw = np.random.default_rng(0)
    y = np.arange(8) % 2
    for name, shape in (("vectors", (8, 1, 12)), ("colours", (8, 2, 2, 3))):
        x = draw.integers(0, 255, shape, dtype=np.uint8)
        np.savez(f"{name}.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        options = ["--network", f"{module}:network", "--data", f"{name}.npz", "--baseline-epochs", "1"]
        code, out, err = run(*options, "--device", "cpu", "--out", name)
        assert (code, err) == (0, "")
        html = Path(out.splitlines()[-1].removeprefix("page: ")).read_text(encoding="utf-8")
        assert ("By entry (12 of them)" in html) == (name == "vectors")
        assert ("By channel (red, green, blue)" in html) == (name == "colours")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "conv9"], "unknown layer 'conv9'; did you mean 'conv"),
        (["--maps", "conv9"], "unknown layer 'conv9'; did you mean 'conv"),
        (["--unit", "10"], "unit: expected an index within (10,) (unit); given (10,)"),
        (["--unit", "1", "2"], "unit: expected an index within (10,) (unit); given (1, 2)"),
        (["--mode", "RM9"], "unknown mode 'RM9'; did you mean 'RM"),
        (["--mode", "RM2"], "mode RM2 is of one convolution, and layer 'output' has 0 of them"),
        (["--image", "450"], "image: expected a number from 0 to 449, or a file, given 450"),
        (["--image", "no.png"], "image: expected a number or a JPEG or PNG file, and there is no file no.png"),
        (["--mean", "0.5"], "give --mean and --std together"),
    ],
)
def test_what_wrong_input_gets(run: Any, options: list[str], message: str) -> None:
    code, out, err = run(*DIGITS, "--weights", "weights.pt", *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"revprop: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("mode", ["unit", "RM1", "RM2", "RM3", "RM4"])
def test_the_unit_where_none_is_given_is_the_largest(graph: revprop.Graph, x: torch.Tensor, mode: str) -> None:
    unit = explanation.largest_unit(graph, x, "conv2.0", mode)
    values = revprop.hypersurface(graph, x, "conv2.0", mode=mode).value[0]
    if mode in ("RM3", "RM4"):  # the largest slice of the largest channel (at one position)
        out, channel, *position = unit
        assert int(values[(out, slice(None), *position)].argmax()) == channel
        assert (out, *position) == explanation.largest_unit(graph, x, "conv2.0", "RM1" if mode == "RM3" else "RM2")
    else:
        assert float(values[unit]) == pytest.approx(float(values.max()), rel=1e-5)


def test_a_row_adds_up_and_its_features_are_the_networks(graph: revprop.Graph, x: torch.Tensor) -> None:
    row = explanation.run(graph, x, unit=(3,))
    assert row["maps"] == "conv2"
    with torch.no_grad():
        torch.testing.assert_close(row["original"][None], graph.model.conv2(graph.model.conv1(x)))
        assert row["value"] == pytest.approx(float(graph(x)[0, 3]), rel=1e-4)
    torch.testing.assert_close(row["features"], row["original"])
    torch.testing.assert_close(row["contributions"], row["x"] * row["h"])
    assert row["input"] == pytest.approx(float(row["contributions"].sum()), rel=1e-4)
    assert row["input"] + sum(value for *_, value in row["shares"]) == pytest.approx(row["value"], rel=1e-4)
    assert [module for _, module, *_ in row["shares"]] == ["conv1.0", "conv2.0", "fc1.0", "fc2.0"]


def test_constants_have_an_owner_and_a_kind() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU6(), nn.Flatten(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        net[1].running_mean.fill_(0.5)
        net[1].bias.copy_(torch.tensor([1.0, 20.0]))  # the second channel is cut at 6
    x = torch.ones(1, 1, 4, 4)
    row = explanation.run(revprop.trace(net, torch.cat([x, x])), x, unit=(0,))
    kinds = {(module, kind) for _, module, kind, _ in row["shares"]}
    assert kinds == {
        ("0", "biases"),
        ("1", "running means"),
        ("1", "biases"),
        ("2", "constants of operators"),
        ("4", "biases"),
    }
    groups = page.grouped(row["shares"])
    assert list(groups) == ["0", "1", "2", "4"]
    total = row["input"] + sum(sum(parts.values()) for parts in groups.values())
    assert total == pytest.approx(row["value"], rel=1e-4)


def test_figures_share_scales_where_they_are_compared() -> None:
    draw = np.random.default_rng(0)
    x, h = draw.standard_normal((2, 3, 20, 16))
    norms = [axes.images[0].norm for axes in channel_maps(x, h).axes if axes.images]
    assert len(norms) == 9
    for row in (norms[:3], norms[3:6], norms[6:]):
        assert {(n.vmin, n.vmax) for n in row} == {(-row[0].vmax, row[0].vmax)}
    panels = [axes.images[0] for axes in hypersurface_maps(np.zeros((20, 16, 3)), x, h).axes if axes.images]
    assert [np.asarray(p.get_array()).shape[:2] for p in panels] == [(20, 16), (20, 16), (20, 16), (7, 6)]
    for panel in panels[2:]:  # contributions, and these by patches: what the whole image contributes
        assert float(panel.get_array().sum()) == pytest.approx(float((x * h).sum()))
    features = draw.standard_normal((40, 8, 8))
    first, second, third, last = (
        axes.images[0] for axes in feature_maps(features, features + 1e-6).axes if axes.images
    )
    assert first.norm.vmax == second.norm.vmax == third.norm.vmax == -first.norm.vmin
    assert last.norm.vmax == pytest.approx(1e-6)
    assert np.nanmax(np.abs(third.get_array() / third.norm.vmax)) < 1e-6


@pytest.mark.parametrize(
    ("shape", "maps", "enlarged"),
    [
        ((1, 4, 4), (1, 4, 4), 64),
        ((96, 5, 3), (96, 5, 3), 36),
        ((130, 2, 2), (96, 2, 2), 256),
        ((7, 40), (1, 7, 40), 1),
        ((50,), (1, 1, 50), 1),
        ((50, 1, 1), (1, 1, 50), 1),
    ],
)
def test_features_of_any_shape_are_drawn(shape: tuple[int, ...], maps: tuple[int, ...], enlarged: int) -> None:
    figure = feature_maps(np.zeros(shape), np.ones(shape))
    assert "which is 1 at most" in figure_to_svg(figure)
    drawn = np.ma.masked_invalid(figure.axes[1].images[0].get_array())
    assert drawn.count() == np.prod(maps) * enlarged
    assert (drawn.min(), drawn.max()) == (1.0, 1.0)


def test_figures_refuse_what_they_cannot_draw() -> None:
    with pytest.raises(ValueError, match="no contribution to draw"):
        share_bars({}, ("sum", 0.0))
    with pytest.raises(ValueError, match="were expected, not"):
        hypersurface_maps(np.zeros((4, 4)), np.zeros((1, 4, 4)), np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match="to be compared with such"):
        feature_maps(np.zeros((2, 4, 4)), np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match="was expected"):
        feature_maps(np.zeros((0, 4, 4)), np.zeros((0, 4, 4)))
    assert "from 0 to 0" in str(hypersurface_bars(np.zeros(3), np.zeros(3)).get_label())
