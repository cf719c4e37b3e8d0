"""Style transfer (Gatys et al., 2016) through any traced network: an image with the content of one and the style of another.

What comes out depends on what the network's features hold, which is what the racecar paper uses it for (section 5.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revprop.errors import NonFiniteError, near_matches, require_finite
from revprop.graph import Graph, trace

__all__ = ["Layers", "Stylisation", "content_loss", "gram", "style_loss", "stylise"]

Layers = str | Sequence[str] | Mapping[str, float]
"""Layer names, of equal weights that sum to 1; or the weights by name."""
STARTS = ("content", "noise")
MEMORY = 20  # steps that L-BFGS remembers


@dataclass(frozen=True)
class Stylisation:
    """What :func:`stylise` found.

    Attributes:
        image: of the content's shape. content, style: its two losses (Eq. 3 and 4), without eta and delta.
        history: the same two of every image tried, the first being the start.
    """

    image: Tensor
    content: float
    style: float
    history: list[tuple[float, float]]


def content_loss(recorded: Tensor, generated: Tensor) -> Tensor:
    """Half the sum of squares ``1/2 sum_mn (F^p_mn - F^g_mn)^2``: Eq. 3 of the racecar paper, for one layer.

    Args:
        recorded, generated: the layer's features of the content and of the generated image, of one shape.

    Returns:
        a scalar.

    Raises:
        ValueError: two shapes.

    >>> content_loss(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]]))
    tensor(2.5000)
    """
    if recorded.shape != generated.shape:
        given = f"{tuple(recorded.shape)} and {tuple(generated.shape)}"
        raise ValueError(f"content_loss compares features of one shape; given {given}: resize one of the images")
    return (recorded - generated).square().sum() / 2


def gram(features: Tensor) -> Tensor:
    """``G_mn = sum_f F_mf F_nf``, the products of every two filters summed over all positions f (Eq. 4 of the racecar paper).

    Args:
        features: (n, filters, ...); without more dimensions there is one position.

    Returns:
        (n, filters, filters).

    Raises:
        ValueError: fewer than two dimensions.

    >>> gram(torch.tensor([[[1.0, 2.0], [0.0, 3.0]]]))
    tensor([[[5., 6.],
             [6., 9.]]])
    """
    if features.dim() < 2:
        raise ValueError(f"gram: expected features (n, filters, ...); given {tuple(features.shape)}")
    flat = features.flatten(2) if features.dim() > 2 else features[..., None]
    return flat @ flat.mT


def style_loss(
    recorded: Mapping[str, Tensor], generated: Mapping[str, Tensor], weights: Mapping[str, float] | None = None
) -> Tensor:
    """``sum_t w_t / (4 N_t^2 M_t^2) sum_mn (G^a_mn - G^g_mn)^2``: Eq. 4 of the racecar paper.

    G is the Gram matrix of layer t, N_t its number of filters and M_t of positions. Where the two images differ in size, each
    Gram matrix is divided by its own number of positions, which for equal sizes is Eq. 4.

    Args:
        recorded, generated: features (n, filters, ...) by layer, of the style image and of the generated one.
        weights: w_t by layer; where not given, one over the number of layers each.

    Returns:
        a scalar.

    Raises:
        ValueError: no layer, other layers in one than in the other, or another number of images or filters.

    >>> style_loss({"conv": torch.tensor([[[1.0, 1.0]]])}, {"conv": torch.tensor([[[1.0, -1.0]]])})
    tensor(0.)
    >>> style_loss({"conv": torch.tensor([[[1.0, 1.0]]])}, {"conv": torch.tensor([[[3.0, 1.0]]])})
    tensor(4.)
    """
    weights = _weights(tuple(recorded), "recorded") if weights is None else weights
    for name, known in (("generated", generated), ("weights", weights)):
        if set(known) != set(recorded):
            raise ValueError(f"{name}: expected the layers of recorded, {list(recorded)}; given {list(known)}")
    return _style_from({name: _per_position(value) for name, value in recorded.items()}, generated, weights)


def stylise(
    model: nn.Module | Graph,
    content: Tensor,
    style: Tensor,
    content_layers: Layers,
    style_layers: Layers,
    content_weight: float = 1.0,
    style_weight: float = 1e3,
    steps: int = 200,
    lr: float = 1.0,
    start: str = "content",
    seed: int = 0,
) -> Stylisation:
    """Searches the image with the content of one and the style of another: the least ``eta L_content + delta L_style``.

    The losses are :func:`content_loss`, summed over layers, and :func:`style_loss` (appendix A.5 of the racecar paper, Eq. 3 and
    4, after Gatys et al. 2016). The search is L-BFGS with a line search, on the losses divided by what they are at the start. The
    model runs in eval mode and stays as it is.

    Args:
        model: any network of one image that can be traced, or its graph.
        content: (1, c, h, w), as the network takes it; any shape (1, ...) that it takes. style: the same; its size may differ where
            the network takes both.
        content_layers, style_layers: names out of ``revprop.trace(model, content).layers``, their weights equal and of sum 1; or
            the weights by name. May be empty where their loss has no weight.
        content_weight, style_weight: eta and delta. Style alone (``content_weight=0``) is how the paper tests whether features keep
            the shapes of an image.
        steps: of L-BFGS, each a forward and a backward pass or a few. lr: how much of its step is tried first.
        start: "content", or "noise": normal, with each channel's mean and deviation in the content image.
        seed: of the noise.

    Returns:
        a :class:`Stylisation`; its image is not clipped to the range of images.

    Raises:
        ValueError: unknown layers or start (with the near matches), layers without a slope, an image that is not one or not as
            the network takes it, negative or no weights, no steps.
        NonFiniteError: NaN or infinity in an image, or in the losses.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> photograph, painting = torch.rand(2, 1, 3, 16, 16)
    >>> found = stylise(net, photograph, painting, ["2"], ["0", "1"], style_weight=1e4, steps=20)
    >>> found.image.shape, found.style < found.history[0][1]
    (torch.Size([1, 3, 16, 16]), True)
    """
    wanted = {
        "content": _weights(content_layers, "content_layers") if content_weight else {},
        "style": _weights(style_layers, "style_layers") if style_weight else {},
    }
    _check(content, style, {"content_weight": content_weight, "style_weight": style_weight}, steps, lr, start)
    graph = model if isinstance(model, Graph) else trace(model, content)
    of_style = graph if style.shape == content.shape else trace(graph.model, style)
    layers = list(dict.fromkeys([*wanted["content"], *wanted["style"]]))
    for name in layers:
        if graph.node(name) not in graph.movable:
            raise ValueError(f"layer {name!r} has no slope in the image: choose others of {', '.join(graph.layers)}")
    features = _features(graph, layers)
    with torch.no_grad():
        own = features(graph.check_input(content)[0])
        contents = {name: own[name] for name in wanted["content"]}
        recorded = _features(of_style, list(wanted["style"]))(of_style.check_input(style)[0])
        grams = {name: _per_position(value) for name, value in recorded.items()}

    def losses(image: Tensor) -> tuple[Tensor, Tensor]:
        generated = features(image)
        parts = [weight * content_loss(contents[name], generated[name]) for name, weight in wanted["content"].items()]
        return sum(parts, image.new_zeros(())), _style_from(grams, generated, wanted["style"])

    image, history = _search(losses, _begin(content, start, seed), content_weight, style_weight, steps, lr)
    with torch.no_grad():
        found = [float(value) for value in losses(image)]
    return Stylisation(image, found[0], found[1], history)


def _search(
    losses: Callable[[Tensor], tuple[Tensor, Tensor]], image: Tensor, eta: float, delta: float, steps: int, lr: float
) -> tuple[Tensor, list[tuple[float, float]]]:
    """L-BFGS from an image: the least weighted sum of the losses, and both of every image tried."""
    image = image.detach().clone().requires_grad_()
    history: list[tuple[float, float]] = []
    scale = 1.0

    def closure() -> float:
        nonlocal scale
        content, style = losses(image)
        total = eta * content + delta * style
        found, value = (float(content.detach()), float(style.detach())), float(total.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the losses became {found[0]} (content) and {found[1]} (style) at the {len(history) + 1}. image tried; "
                f"lower lr ({lr}), or look for NaN in the network's weights"
            )
        if not history:  # so that tolerances mean the same for every network
            scale = value or 1.0
        history.append(found)
        (image.grad,) = torch.autograd.grad(total / scale, image)
        return value / scale

    optimizer = torch.optim.LBFGS(
        [image],
        lr,
        max_iter=steps,
        max_eval=25 * steps,
        tolerance_grad=0.0,
        history_size=MEMORY,
        line_search_fn="strong_wolfe",
    )
    with torch.enable_grad():
        optimizer.step(closure)
    return image.detach(), history


def _begin(content: Tensor, start: str, seed: int) -> Tensor:
    if start == "content":
        return content
    positions = tuple(range(2, content.dim()))
    mean = content.mean(positions, keepdim=True)
    noise = torch.randn(content.shape, generator=torch.Generator().manual_seed(seed), dtype=content.dtype)
    deviation = (content - mean).square().mean(positions, keepdim=True).sqrt()
    return mean + deviation * noise.to(content.device)


def _features(graph: Graph, layers: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
    """The layers' features as a function of the image alone: parameters are constants."""
    segment = graph.segment(graph.inputs, tuple(graph.node(name) for name in layers))
    constants = {name: graph.tensor(name).detach() for name in segment.constants}
    return lambda image: dict(zip(layers, segment(image, parameters=constants), strict=True))


def _per_position(features: Tensor) -> Tensor:
    """The Gram matrix over the number of positions."""
    return gram(features) / math.prod(features.shape[2:])


def _style_from(grams: Mapping[str, Tensor], generated: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    parts = []
    for name, weight in weights.items():
        own = _per_position(generated[name])
        if own.shape != grams[name].shape:
            given = f"{tuple(grams[name].shape[:2])} and {tuple(own.shape[:2])}"
            raise ValueError(f"{name}: expected as many images and filters of both; given (images, filters) {given}")
        parts.append(weight * (grams[name] - own).square().sum() / (4 * own.shape[1] ** 2))
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _weights(layers: Layers, name: str) -> dict[str, float]:
    """The weight of each layer."""
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    if not names:
        raise ValueError(f"{name}: expected at least one layer")
    found = dict(layers) if isinstance(layers, Mapping) else {layer: 1 / len(set(names)) for layer in names}
    for layer, weight in found.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name}: expected weights of at least 0; given {weight} for {layer!r}")
    return found


def _check(content: Tensor, style: Tensor, weights: Mapping[str, float], steps: int, lr: float, start: str) -> None:
    for name, value in (("content", content), ("style", style)):
        if value.dim() < 2 or len(value) != 1 or not value.is_floating_point():
            given = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"{name}: expected one image (1, c, ...) of floating point numbers; given {given}")
        require_finite(value, name)
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name}: expected a number of at least 0; given {weight}")
    if not any(weights.values()):
        raise ValueError("content_weight, style_weight: expected at least one of them positive; given 0 and 0")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1; given {steps}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: expected a positive number; given {lr}")
    if start not in STARTS:
        raise ValueError(near_matches(start, STARTS, "start"))
