"""Figures 10 to 13 of the racecar paper: what networks trained with and without the penalty make of a style (section 5.4).

The same images, layers and steps through each network; the losses are weighed by what they are between the two images
themselves, so that a network of larger features is not weighed otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from revprop.datasets import data_root, find_data
from revprop.datasets.pictures import load_picture
from revprop.errors import near_matches
from revprop.experiments.baseline import Baseline
from revprop.experiments.racecar_networks import PhaseOne, convolutions, load_phase_one, train_phase_one
from revprop.experiments.reconstruction_quality import IMAGENET_MEAN, IMAGENET_STD
from revprop.graph import Graph, trace
from revprop.recipe import Recipe
from revprop.runs import Row, RunStore
from revprop.stylisation import content_loss, style_loss, stylise
from revprop.sweep import SweepOptions, Task, sweep

__all__ = ["FIGURES", "StylisationStudy", "figure", "loss_layers", "picture", "run", "stylise_pair"]

ARCHIVE = "images/imagenet_samples.tar.gz"
LOW = 4  # by which the low resolution of Figure 12 is lower: the paper does not say
STYLE = 100.0  # delta over eta, on losses weighed by what they are between the two images


@dataclass(frozen=True)
class _Figure:
    """Its pairs of pictures (content, style); those where no archive is at hand; whether the style alone is minimised."""

    pairs: tuple[tuple[str, str], ...]
    without_archive: tuple[tuple[str, str], ...]
    style_only: bool = False


FIGURES = {
    10: _Figure((("boathouse", "chain_saw"), ("tench", "electric_ray")), (("china", "flower"), ("flower", "china"))),
    11: _Figure((("shape:square", "shape:disc"),), (("shape:square", "shape:disc"),), style_only=True),
    12: _Figure((("low:agama", "agama"),), (("low:china", "china"),)),
    13: _Figure((("golf_ball", "parachute"),), (("flower", "china"),)),
}
"""Figure 10: a scene with another's texture, an animal with another's pattern. 11: two shapes of one colour. 12: a picture of low
resolution, with its own of high resolution. 13: a thing with its reflection (the paper: a horse with its shadow), and stripes."""

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and deviation: pixels in [0, 1], which ReLU can give back


@dataclass(frozen=True)
class StylisationStudy:
    """What is stylised, and through which networks.

    Attributes:
        figure: which of the paper's. networks: those compared. pairs: pictures (content, style) as :func:`picture` takes them.
        size: of the pictures, in pixels. steps: of L-BFGS.
        style: delta over eta, on losses weighed by what they are between the two pictures. style_only: eta is 0.
        reduced: what differs from the published setting, in words.
    """

    figure: int
    networks: tuple[PhaseOne, ...]
    pairs: tuple[tuple[str, str], ...]
    size: int = 224
    steps: int = 500
    style: float = STYLE
    style_only: bool = False
    reduced: str = ""


def figure(
    number: int,
    scale: str,
    seeds: int | None = None,
    data: str | None = None,
    network: str | None = None,
    weights: Sequence[str] | None = None,
) -> StylisationStudy:
    """The settings of one of Figures 10 to 13 at a scale.

    Args:
        scale: "paper": VGG19 (Table 16), trained as Table 15 says on images that ``data`` names, or with ``weights``; pictures of
            224 pixels. "reduced": a network of eight convolutions, trained here on ten classes of Tiny ImageNet; pictures of 128
            pixels. "smoke": the same network on made images for one epoch, pictures of 32 pixels, 5 steps: no data is needed.
        seeds: so many networks of each kind. data: another data set to train on, by name or path.
        network: another one, by name or ``package.module:factory``.
        weights: files of trained weights for it, compared under their names; the network then takes images scaled by the mean and
            standard deviation of ImageNet.

    Raises:
        ValueError: an unknown scale, fewer than one seed; seeds or data beside weights. FileNotFoundError: no data, no weights.

    >>> study = figure(11, "smoke")
    >>> [n.way for n in study.networks], study.pairs, study.style_only
    (['Std', 'RR'], (('shape:square', 'shape:disc'),), True)
    """
    from revprop.experiments.catalogue import check_scale  # here: the catalogue lists this module

    check_scale(scale, seeds)
    of_figure = FIGURES[number]
    archive = scale != "smoke" and (data_root() / ARCHIVE).is_file()
    study = StylisationStudy(
        number, (), of_figure.pairs if archive else of_figure.without_archive, style_only=of_figure.style_only
    )
    others = [] if number == 11 else ["photographs at hand" if archive else "scikit-learn's photographs"]
    if scale != "paper":
        size, steps = (32, 5) if scale == "smoke" else (128, 200)
        study = replace(study, size=size, steps=steps)
        others.append(f"{size} pixels")
    if weights is not None:
        if seeds is not None or data is not None:
            raise ValueError("seeds, data: are for networks that are trained here; leave them out beside weights")
        networks, words = _given(network or VGG19, weights), "weights as given"
    else:
        networks, words = _trained(scale, range(seeds or 1), data, network)
    return replace(study, networks=networks, reduced=", ".join(part for part in (words, *others) if part))


VGG19 = "revprop.networks.racecar:vgg19"
TABLE_15 = Recipe("sgd", ((7, 0.01), (3, 0.001), (5, 0.0001), (21, 0.00001)), augmentation="flips")
"""The learning rates of Table 15, by epoch; which optimizer the paper does not say."""


def _given(network: str, weights: Sequence[str]) -> tuple[PhaseOne, ...]:
    if not weights:
        raise ValueError("weights: expected at least one file")
    names = [Path(file).stem for file in weights]
    if len(set(names)) < len(names):
        raise ValueError(f"weights: expected files of different names, under which they are compared; given {names}")
    return tuple(
        PhaseOne(Baseline(network, "", weights=file, mean=IMAGENET_MEAN, std=IMAGENET_STD), name)
        for name, file in zip(names, weights, strict=True)
    )


def _trained(
    scale: str, seeds: Sequence[int], data: str | None, network: str | None
) -> tuple[tuple[PhaseOne, ...], str]:
    """Std and RR of each seed, and in words how they differ from the paper's."""
    if scale == "paper":
        if data is None:
            raise FileNotFoundError(
                "the paper's VGG19 networks are trained on ImageNet, which has no name here: give --data, the path of images in "
                "class folders, or --weights of networks that are trained; --scale smoke needs none"
            )
        baseline = Baseline(
            network or VGG19, data, 36, batch_size=24, learning_rate=0.01, recipe=TABLE_15, mean=ZERO, std=ONE
        )
        weight, alone, words = 1e-10, 6, ""
    elif scale == "reduced":
        if data is None and find_data("tinyimagenet10") is None:
            raise FileNotFoundError(
                f"no data for 'tinyimagenet10' in {data_root()}: set REVPROP_DATA to the folder that holds it (docs/data.md says "
                "in which form), or give --data; --scale smoke needs none"
            )
        recipe = Recipe(one_cycle=True, augmentation="flips")
        baseline = Baseline(
            network or "vgg-small", data or "tinyimagenet10", 15, batch_size=50, recipe=recipe, mean=ZERO, std=ONE
        )
        weight, alone = 5e-8, 3  # larger ones (1e-7, 1e-6) kept it from learning
        words = "eight convolutions trained on ten classes of Tiny ImageNet for 15 epochs in place of VGG19 on ImageNet"
        words = words if data is None and network is None else f"{baseline.network} trained on {baseline.data}"
    else:
        baseline = Baseline(
            network or "vgg-small", data or "made:cifar10", 1, batch_size=32, samples=64, mean=ZERO, std=ONE
        )
        weight, alone = 5e-8, 0
        words = "eight convolutions trained on made images for 1 epoch"
    ways = (("Std", 0.0, 0), ("RR", weight, alone))
    return tuple(
        PhaseOne(replace(baseline, seed=seed), way, value, alone=first) for seed in seeds for way, value, first in ways
    ), words


def run(study: StylisationStudy, folder: Path, **how: Unpack[SweepOptions]) -> list[Row]:
    """Trains what is not trained yet, and stylises what has no row yet.

    Args:
        folder: where networks (``networks``), rows (``rows``) and pictures (``pictures``) are kept; running again continues.
        how: ``device``, ``report``, ``workers``, ``engine`` of :func:`revprop.sweep.sweep`.

    Returns:
        the rows, of kind "stylisation", one per network and pair: see :func:`stylise_pair`.

    Raises:
        SweepError: some runs failed; all others are stored.
    """
    folder = folder.absolute()
    tasks: list[Task] = []
    for network in study.networks:
        name = f"{network.way}, {network.baseline.network}, seed {network.baseline.seed}"
        train = Task(
            name, folder / "networks", network.settings(), train_phase_one, (network, folder, how.get("device", "auto"))
        )
        tasks.append(train)
        for content, style in study.pairs:
            settings = _settings(study, network, content, style)
            arguments = (study, network, content, style, folder)
            what = f"figure {study.figure}: {content} in the style of {style}, {name}"
            tasks.append(Task(what, folder / "rows", settings, stylise_pair, arguments, train))
    rows = sweep(tasks, describe=_describe, **how)
    return [row for row in rows if row["settings"]["kind"] == "stylisation"]


def _settings(study: StylisationStudy, network: PhaseOne, content: str, style: str) -> dict[str, Any]:
    names = ("figure", "size", "steps", "style_only", "reduced")
    own = {name: getattr(study, name) for name in names}
    return {
        **network.settings(),
        "kind": "stylisation",
        "content": content,
        "style": style,
        "delta": study.style,
        **own,
    }


def _describe(task: Task, row: Row) -> str:
    if row["settings"]["kind"] == "stylisation":
        return f"{task.name}: {100 * row['style'][1]:.1f} % of the style loss is left"
    return f"{task.name}: {100 * row['accuracy']:.2f} %" if row["accuracy"] is not None else task.name


def stylise_pair(study: StylisationStudy, network: PhaseOne, content: str, style: str, folder: Path) -> dict[str, Any]:
    """One picture in the style of another, through one network.

    Returns:
        ``content`` and ``style``: the losses at the start and at the end, over what they are between the two pictures;
        ``history``, the same of all images tried; ``change``: mean |result - content| of pixels in [0, 1]; ``error``: of a content
        of low resolution, mean |. - the high one| of the content and of the result, else None; ``pictures``: the file that keeps
        the three, under ``folder``; ``network``: what is known of it.
    """
    row = RunStore(folder / "networks").get(network.settings())
    if row is None:
        raise ValueError(f"{network.way} is not trained yet: run the experiment, which does that first")
    model = load_phase_one(network, folder)
    pixels = [picture(spec, study.size) for spec in (content, style)]
    scales = [_scale(network.baseline, value) for value in pixels]
    x, a = ((value[None] - mean) / std for value, (mean, std) in zip(pixels, scales, strict=True))
    graph = trace(model, x)
    content_layers, style_layers = loss_layers(graph)
    features = [_features(graph, value, [*content_layers, *style_layers]) for value in (x, a)]
    apart = [
        sum(float(content_loss(features[0][name], features[1][name])) for name in content_layers) / len(content_layers),
        float(style_loss(_only(features[1], style_layers), _only(features[0], style_layers))),
    ]
    eta, delta = 1 / (apart[0] or 1.0), 1 / (apart[1] or 1.0)
    found = stylise(
        graph,
        x,
        a,
        content_layers,
        style_layers,
        0.0 if study.style_only else eta,
        delta * (1.0 if study.style_only else study.style),
        study.steps,
        seed=network.baseline.seed,
    )
    mean, std = scales[0]
    image = (found.image[0] * std + mean).clamp(0, 1)
    name = f"pictures/{RunStore(folder).key(_settings(study, network, content, style))}.npz"
    _keep(folder / name, {"content": pixels[0], "style": pixels[1], "image": image})
    history = [[eta * c, delta * s] for c, s in found.history]
    error = None
    if content.startswith("low:"):
        error = [_apart(value, picture(content.removeprefix("low:"), study.size)) for value in (pixels[0], image)]
    return {
        "content": [history[0][0], eta * found.content],
        "style": [history[0][1], delta * found.style],
        "history": history,
        "change": _apart(image, pixels[0]),
        "error": error,
        "pictures": name,
        "network": {key: row[key] for key in ("accuracy", "top5", "regenerated", "seconds", "parameters")},
    }


def picture(spec: str, size: int) -> Tensor:
    """A picture (3, size, size), pixels in [0, 1].

    Args:
        spec: "shape:square" or "shape:disc", of one area, dark on a light ground; "low:" and a name: at a quarter of the
            resolution, enlarged again; or a name or path as :func:`revprop.datasets.pictures.load_picture` takes it.

    Raises:
        ValueError: an unknown shape. And what loading raises.

    >>> float(picture("shape:square", 64).mean() - picture("shape:disc", 64).mean()) < 0.01
    True
    """
    kind, _, name = spec.partition(":")
    if kind == "shape":
        return _shape(name, size)
    if kind == "low":
        small = F.interpolate(picture(name, size)[None], size=max(1, size // LOW), mode="area")
        return F.interpolate(small, size=size, mode="bilinear")[0].clamp(0, 1)
    archive = data_root() / ARCHIVE
    return load_picture(spec, size, archive if archive.is_file() else None).float() / 255


def _shape(name: str, size: int) -> Tensor:
    at = (torch.arange(size) + 0.5) / size - 0.5
    y, x = torch.meshgrid(at, at, indexing="ij")
    inside = {"square": torch.maximum(x.abs(), y.abs()) < 0.25, "disc": (x**2 + y**2) < 0.25 / torch.pi}
    if name not in inside:
        raise ValueError(near_matches(name, inside, "shape"))
    colours = torch.tensor([[0.9, 0.85, 0.7], [0.15, 0.3, 0.6]])  # ground and object
    return colours[inside[name].long()].permute(2, 0, 1).contiguous()


def loss_layers(graph: Graph) -> tuple[list[str], list[str]]:
    """The layers of the losses as Gatys et al. chose them in VGG19, in any convolutional network.

    Style: the first convolution of each size of feature maps. Content: the second one of the last but one size (conv4_2 in VGG19),
    or what comes nearest. Behind the activation, where that is a module.

    Raises:
        ValueError: no convolution.

    >>> from revprop.networks.vgg import vgg_small
    >>> loss_layers(trace(vgg_small(seed=0), torch.zeros(1, 3, 32, 32)))
    (['conv6.1'], ['conv1.1', 'conv3.1', 'conv5.1', 'conv7.1'])
    """
    names = [name for name in convolutions(graph.model) if name in graph.layers]
    if not names:
        raise ValueError("no convolution among the layers: stylisation compares feature maps")
    sizes: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        sizes.setdefault(graph.shape(graph.node(name))[1:], []).append(_behind_activation(graph, name))
    groups = list(sizes.values())
    return [groups[-2:][0][:2][-1]], [group[0] for group in groups]


def _behind_activation(graph: Graph, name: str) -> str:
    """The next layer, where it is an operator's module that reads this one and changes no shape; else the layer itself."""
    node = graph.node(name)
    for other in graph.layers:
        there = graph.node(other)
        module = dict(graph.model.named_modules()).get(other)
        activation = module is not None and not any(module.children()) and not any(True for _ in module.parameters())
        if activation and node in there.all_input_nodes and graph.shape(there) == graph.shape(node):
            return other
    return name


def _features(graph: Graph, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        values = graph.segment(graph.inputs, tuple(graph.node(name) for name in layers))(x)
    return dict(zip(layers, values, strict=True))


def _only(features: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    return {name: features[name] for name in layers}


def _scale(baseline: Baseline, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation by which a picture is scaled: those of the network, or the picture's own where it has none."""
    if baseline.mean is not None and baseline.std is not None:
        return torch.tensor(baseline.mean).view(-1, 1, 1), torch.tensor(baseline.std).view(-1, 1, 1)
    deviation = pixels.std((1, 2), correction=0, keepdim=True)
    return pixels.mean((1, 2), keepdim=True), deviation.where(deviation > 0, 1.0)


def _apart(image: Tensor, other: Tensor) -> float:
    return float((image - other).abs().mean())


def _keep(path: Path, pictures: Mapping[str, Tensor]) -> None:
    """Writes pictures as bytes (rows, columns, 3), in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        name: (255 * value).round().to(torch.uint8).permute(1, 2, 0).numpy() for name, value in pictures.items()
    }
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    part.replace(path)
