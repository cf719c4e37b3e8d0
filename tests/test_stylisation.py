"""Style transfer: losses against their formulas written out, what the search reaches, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import revprop
from revprop.errors import NonFiniteError
from revprop.stylisation import content_loss, gram, style_loss, stylise


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    return net.double()


def images(number: int = 2, size: int = 12, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(1, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(number)]


def written_out(a: Tensor, g: Tensor) -> tuple[float, float]:
    """Eq. 3 and E_t of Eq. 4 for features (filters, positions), loop by loop."""
    filters, positions = a.shape
    content = 0.0
    for m in range(filters):
        for n in range(positions):
            content += float(a[m, n] - g[m, n]) ** 2 / 2
    style = 0.0
    for m in range(filters):
        for n in range(filters):
            of_a = sum(float(a[m, f] * a[n, f]) for f in range(positions))
            of_g = sum(float(g[m, f] * g[n, f]) for f in range(positions))
            style += (of_a - of_g) ** 2 / (4 * filters**2 * positions**2)
    return content, style


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_losses_are_those_written_out(layers: int, filters: int, height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, layers, 1, filters, height, width, generator=generator, dtype=torch.float64)
    recorded, generated = ({f"conv{t}": value for t, value in enumerate(part)} for part in drawn)
    weights = {f"conv{t}": 0.5 + t for t in range(layers)}
    flat = [
        (recorded[name].reshape(filters, height * width), generated[name].reshape(filters, height * width))
        for name in recorded
    ]
    expected = sum(weights[name] * written_out(*pair)[1] for name, pair in zip(recorded, flat, strict=True))
    assert float(style_loss(recorded, generated, weights)) == pytest.approx(expected, rel=1e-12)
    even = sum(written_out(*pair)[1] for pair in flat) / layers
    assert float(style_loss(recorded, generated)) == pytest.approx(even, rel=1e-12)
    assert float(content_loss(recorded["conv0"], generated["conv0"])) == pytest.approx(
        written_out(*flat[0])[0], rel=1e-12
    )


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, g, h = torch.randn(4, 1, 3, 2, 2, generator=generator, dtype=torch.float64)
    g, h = g.requires_grad_(), h.requires_grad_()
    assert torch.autograd.gradcheck(lambda g: content_loss(a, g), (g,))
    assert torch.autograd.gradcheck(gram, (g,))
    assert torch.autograd.gradcheck(lambda g, h: style_loss({"1": a, "2": b}, {"1": g, "2": h}), (g, h))


def test_the_same_gram_matrix_is_the_same_style() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 4, 3, 5, generator=generator, dtype=torch.float64)
    shuffled = a.flatten(2)[..., torch.randperm(15, generator=generator)].view_as(a)
    torch.testing.assert_close(gram(shuffled), gram(a), rtol=0, atol=1e-12)
    assert float(style_loss({"1": a}, {"1": shuffled})) < 1e-24
    # an image four times as large, of the same pattern
    assert float(style_loss({"1": a}, {"1": a.repeat(1, 1, 2, 2)})) < 1e-24
    assert float(content_loss(a, shuffled)) > 1.0


def test_a_layer_without_positions_has_one() -> None:
    a = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(gram(a), torch.tensor([[[1.0, 2.0], [2.0, 4.0]]]))


@pytest.mark.parametrize("start", ["content", "noise"])
def test_the_search_lowers_what_it_minimises(start: str) -> None:
    net, (content, style) = network(), images()
    found = stylise(net, content, style, {"3": 1.0}, ["1", "4"], style_weight=1e6, steps=60, start=start)
    first = found.history[0][0] + 1e6 * found.history[0][1]
    assert found.content + 1e6 * found.style < 0.3 * first
    # what is reported is what the formulas give for the image
    features = dict(zip("134", _features(net, found.image), strict=True))
    of_content = dict(zip("134", _features(net, content), strict=True))
    of_style = dict(zip("134", _features(net, style), strict=True))
    assert found.content == pytest.approx(float(content_loss(of_content["3"], features["3"])))
    expected = style_loss(*({k: values[k] for k in "14"} for values in (of_style, features)))
    assert found.style == pytest.approx(float(expected))


def _features(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    found = []
    with torch.no_grad():
        for i, module in enumerate(net):
            x = module(x)
            if i in (1, 3, 4):
                found.append(x.clone())
    return found


def test_content_alone_is_found_again_and_style_alone_needs_no_content() -> None:
    net, (content, style) = network(), images()
    found = stylise(net, content, style, ["input"], [], style_weight=0, start="noise", steps=30)
    torch.testing.assert_close(found.image, content, rtol=0, atol=1e-6)
    assert found.style == 0.0
    found = stylise(net, content, style, [], ["0"], content_weight=0, steps=100)
    assert found.style < 1e-3 * found.history[0][1]
    same = stylise(net, content, content, ["3"], ["0"])
    assert torch.equal(same.image, content)
    assert (same.content, same.style) == (0.0, 0.0)


def test_same_seed_same_image_and_the_model_is_as_it_was() -> None:
    net, (content, style) = network().train(), images()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    runs = [stylise(net, content, style, ["3"], ["1"], steps=5, start="noise", seed=s).image for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_images_of_two_sizes_and_a_graph() -> None:
    net, (content,), (style,) = network(), images(1), images(1, size=20)
    graph = revprop.trace(net, content)
    by_graph = revprop.stylise(graph, content, style, "3", "1", steps=10)
    by_model = revprop.stylise(net, content, style, ["3"], {"1": 1.0}, steps=10)
    assert torch.equal(by_graph.image, by_model.image)
    assert by_graph.style < by_graph.history[0][1]


def test_what_is_refused() -> None:
    net, (content, style) = network(), images()
    with pytest.raises(ValueError, match="unknown layer '33'; did you mean '3'"):
        stylise(net, content, style, ["33"], ["1"])
    with pytest.raises(ValueError, match="unknown layer 'conv'; known: 'input', '0'"):
        stylise(net, content, style, ["3"], ["conv"])
    with pytest.raises(ValueError, match="layer '1' has no slope"):
        stylise(nn.Sequential(nn.Conv2d(3, 2, 3), Steps()).double(), content, style, ["0"], ["1"])
    with pytest.raises(ValueError, match="unknown start 'nois'; did you mean 'noise'"):
        stylise(net, content, style, ["3"], ["1"], start="nois")
    with pytest.raises(ValueError, match="style_layers: expected at least one layer"):
        stylise(net, content, style, ["3"], [])
    with pytest.raises(ValueError, match=r"given -1\.0 for '1'"):
        stylise(net, content, style, ["3"], {"1": -1.0})
    with pytest.raises(ValueError, match="content: expected one image"):
        stylise(net, torch.cat([content, style]), style, ["3"], ["1"])
    with pytest.raises(ValueError, match="style: expected one image"):
        stylise(net, content, style.long(), ["3"], ["1"])
    with pytest.raises(ValueError, match="at least one of them positive"):
        stylise(net, content, style, ["3"], ["1"], 0.0, 0.0)
    with pytest.raises(ValueError, match="style_weight: expected a number of at least 0; given nan"):
        stylise(net, content, style, ["3"], ["1"], style_weight=float("nan"))
    with pytest.raises(ValueError, match="steps: expected at least 1; given 0"):
        stylise(net, content, style, ["3"], ["1"], steps=0)
    with pytest.raises(ValueError, match="lr: expected a positive number; given 0"):
        stylise(net, content, style, ["3"], ["1"], lr=0.0)
    with pytest.raises(NonFiniteError, match="style holds 1 of 432 values"):
        stylise(
            net,
            content,
            style.clone().index_fill_(3, torch.tensor([0]), 1.0).masked_fill(_one(style), torch.nan),
            "3",
            "1",
        )
    with torch.no_grad():
        net[3].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="look for NaN in the network's weights"):
        stylise(net, content, style, ["3"], ["1"])


class Steps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sign()


def _one(image: Tensor) -> Tensor:
    mask = torch.zeros_like(image, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    return mask


def test_losses_refuse_what_cannot_be_compared() -> None:
    a = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="features of one shape"):
        content_loss(a, a[..., :2])
    with pytest.raises(ValueError, match="expected features"):
        gram(torch.zeros(3))
    with pytest.raises(ValueError, match="expected the layers of recorded"):
        style_loss({"1": a}, {"2": a})
    with pytest.raises(ValueError, match="weights: expected the layers"):
        style_loss({"1": a}, {"1": a}, {})
    with pytest.raises(ValueError, match="images and filters"):
        style_loss({"1": a}, {"1": a[:, :1]})
    with pytest.raises(ValueError, match="at least one layer"):
        style_loss({}, {})
