"""AdjointBackMapV2 section 4: three networks, and how truly every unit of every layer is its effective hypersurface.

Tables 3 and 4 and Figures 6 to 11 are made of the same rows, one per network and layer. Every unit is looked at by
:func:`revprop.completeness`, whose sums are those of the network itself, so that hardly anything is rounded differently; and
random units by the explicit dot products ``<x, h> + sum <b, h_b>`` of :func:`revprop.hypersurface`, as the paper's numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from revprop.adjoint import hypersurface, relative_error
from revprop.completeness import completeness
from revprop.datasets import data_root, find_data
from revprop.errors import near_matches
from revprop.experiments.baseline import Baseline, Data, baseline_row, build_network, load_baseline, load_baseline_data
from revprop.folding import fold
from revprop.graph import Graph, trace
from revprop.heads import head_of
from revprop.recipe import Recipe
from revprop.runs import Row, RunStore
from revprop.sweep import SweepOptions, Task, silent, sweep

__all__ = [
    "NETWORKS",
    "AdjointStudy",
    "explained_layers",
    "figure",
    "measure_all",
    "measure_layer",
    "run",
    "table",
    "train",
]

NETWORKS = ("vgg7", "resnet20-wide", "resnet20-fixup")
STAND_INS = {"cifar10": ("cifar10-jpeg", "JPEG images")}
DATA = {3: "cifar10", 4: "cifar100"}
WAYS = ("folded", "unfolded")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # by which images are scaled for the Fixup network
TOLERANCE = 0.01  # of Tables 3 and 4
EDGE, BINS = 1e-4, 40  # of Figures 6 to 11
RATES = {
    ("vgg7", "cifar10"): ((300, 0.01), (100, 0.002), (101, 0.0005)),
    ("vgg7", "cifar100"): ((500, 0.01), (100, 0.002), (101, 0.0005)),
    ("resnet20-wide", "cifar10"): ((100, 0.01), (50, 0.001), (51, 0.0002)),
    ("resnet20-wide", "cifar100"): ((100, 0.01), (50, 0.001), (51, 0.0002)),
    ("resnet20-fixup", "cifar10"): ((80, 0.002), (40, 0.001), (31, 0.0005)),
    ("resnet20-fixup", "cifar100"): ((40, 0.002), (40, 0.001), (41, 0.0005)),
}
"""Epochs and their learning rates: Tables 1 and 2 of the paper."""
L1 = 1e-5  # the weight of the penalty, which the paper does not tell
SHORT = {"vgg7": (6, 2e-3, 50_000), "resnet20-wide": (3, 2e-3, 40_000), "resnet20-fixup": (4, 1e-3, 40_000)}
"""Epochs, the highest learning rate, and at most so many training images of a short training: a quarter of an hour of one core."""


@dataclass(frozen=True)
class AdjointStudy:
    """What is trained and measured.

    Attributes:
        baselines: the networks. measured: whether they are measured or only trained.
        images: so many test images, from the first on, of which every unit is looked at. images64: the same in double precision.
        explained: so many of them of which ``units`` random units of every layer are explained one by one.
        ways: "folded", as in the paper: batch norm and multipliers are folded first; "unfolded": the network as it was trained.
        reduced: what differs from the published setting, in words. left_out: what was looked for and is not there.
    """

    baselines: tuple[Baseline, ...]
    measured: bool = True
    images: int = 10_000
    images64: int = 1_000
    explained: int = 100
    units: int = 100
    ways: tuple[str, ...] = ("folded",)
    reduced: str = ""
    left_out: tuple[str, ...] = ()


def train(scale: str, seeds: int | None = None) -> AdjointStudy:
    """The settings of the trainings (Tables 1 and 2) at a scale: "smoke", "reduced" or "paper"; on the data sets that are there.

    Args:
        seeds: so many networks of each kind.

    Raises:
        ValueError: an unknown scale, or fewer than one seed. FileNotFoundError: no data set is there.

    >>> [(b.network, b.data) for b in train("smoke").baselines][:2]
    [('vgg7', 'made:cifar10'), ('resnet20-wide', 'made:cifar10')]
    """
    found, missing = [], []
    for data in ("cifar10", "cifar100"):
        try:
            found.append(_study(data, scale, seeds))
        except FileNotFoundError as error:
            missing.append(str(error))
    if not found:
        raise FileNotFoundError("; ".join(missing))
    baselines = tuple(baseline for study in found for baseline in study.baselines)
    return replace(found[0], baselines=baselines, measured=False, left_out=tuple(missing))


def table(
    number: int, scale: str, seeds: int | None = None, data: str | None = None, ways: Sequence[str] = ("folded",)
) -> AdjointStudy:
    """The settings of Table 3 (CIFAR-10) or 4 (CIFAR-100) at a scale.

    Args:
        data: another data set, by name or path. ways: some of "folded" and "unfolded". Others: as for :func:`train`.

    Raises:
        ValueError: an unknown scale or way, or fewer than one seed. FileNotFoundError: the data set is not there.

    >>> table(4, "smoke").baselines[0].data
    'made:cifar100'
    """
    for way in ways:
        if way not in WAYS:
            raise ValueError(near_matches(way, WAYS, "way"))
    return replace(_study(DATA[number], scale, seeds, data), ways=tuple(ways))


def figure(number: int, scale: str, seeds: int | None = None, data: str | None = None) -> AdjointStudy:
    """The settings of one of Figures 6 to 11 at a scale: the rows of one network of Table 3 or 4. Args, raises: as for them.

    >>> [b.network for b in figure(7, "smoke").baselines]
    ['resnet20-wide']
    """
    study = _study(DATA[3 if number < 9 else 4], scale, seeds, data)
    return replace(study, baselines=tuple(b for b in study.baselines if b.network == NETWORKS[number % 3]))


def _study(data: str, scale: str, seeds: int | None, given: str | None = None) -> AdjointStudy:
    from revprop.experiments.catalogue import check_scale  # here: the catalogue lists this module

    check_scale(scale, seeds)
    if given is not None:
        where, words = given, ""
    elif scale == "smoke":
        where, words = f"made:{data}", "made images of the right shape"
    else:
        where, words = _at_hand(data)
    baselines = tuple(
        _baseline(network, data, where, scale, seed) for network in NETWORKS for seed in range(seeds or 1)
    )
    if scale == "paper":
        return AdjointStudy(baselines, reduced=words)
    if scale == "smoke":
        return AdjointStudy(
            baselines, images=8, images64=4, explained=2, units=6, reduced=f"{words}, 1 epoch".lstrip(", ")
        )
    lasted = "networks trained for 3 to 6 epochs by Adam in mixed precision, ResNets on 40,000 images"
    return AdjointStudy(
        baselines, images64=500, explained=20, reduced=", ".join(part for part in (words, lasted) if part)
    )


def _baseline(network: str, data: str, where: str, scale: str, seed: int) -> Baseline:
    fixup = network == "resnet20-fixup"
    made = Baseline(
        network, where, seed=seed, mean=MEAN if fixup else (0.0, 0.0, 0.0), std=STD if fixup else (1.0, 1.0, 1.0)
    )
    if scale == "paper":
        rates = RATES[network, data]
        recipe = Recipe("sgd", rates, l1=L1, augmentation="adjoint")
        epochs = sum(count for count, _ in rates)
        return replace(made, epochs=epochs, batch_size=100, learning_rate=rates[0][1], samples=45_000, recipe=recipe)
    if scale == "reduced":
        epochs, rate, samples = SHORT[network]
        recipe = Recipe(one_cycle=True, augmentation="flips", precision="bf16-mixed")
        return replace(made, epochs=epochs, batch_size=100, learning_rate=rate, samples=samples, recipe=recipe)
    return replace(made, epochs=1, batch_size=32, samples=64, recipe=Recipe(one_cycle=True))


def _at_hand(data: str) -> tuple[str, str]:
    """The data set or its stand-in, and the words for it."""
    for name, words in ((data, ""), *([STAND_INS[data]] if data in STAND_INS else [])):
        if find_data(name) is not None:
            return name, words
    raise FileNotFoundError(
        f"no data for {data!r} in {data_root()}: set REVPROP_DATA to the folder that holds it (docs/data.md says in which form); "
        "--scale smoke needs none"
    )


def run(study: AdjointStudy, folder: Path, **how: Unpack[SweepOptions]) -> list[Row]:
    """Trains what is not trained yet and measures what has no row yet.

    Args:
        folder: where networks and rows are kept; running again continues. Tables and figures share both.
        how: ``device``, ``report``, ``workers``, ``engine`` of :func:`revprop.sweep.sweep`.

    Returns:
        rows of kind "baseline" where the networks are only trained; else of kind "adjoint", one per network and layer: what
        :func:`measure_all` found of the layer under "all" and "all64", what :func:`measure_layer` found under "explicit" and
        "explicit64", its place in the network, the largest disagreement of the two, and the network's accuracy.

    Raises:
        SweepError: some runs failed; all others are stored.
    """
    for why in study.left_out:
        how.get("report", silent)(f"left out: {why}")
    _prepared.cache_clear()
    folder = folder.absolute()
    tasks: list[Task] = []
    for baseline in study.baselines:
        name = f"{baseline.network} on {baseline.data}"
        train = Task(
            name, folder / "baselines", baseline.settings(), _trained, (baseline, folder, how.get("device", "auto"))
        )
        tasks.append(train)
        for way in study.ways if study.measured else ():
            tasks += _measurements(replace(study, ways=(way,)), baseline, folder, train)
    rows = sweep(tasks, describe=_describe, **how)
    wanted = "adjoint" if study.measured else "baseline"
    return [row for row in rows if row["settings"]["kind"] == wanted]


def _measurements(study: AdjointStudy, baseline: Baseline, folder: Path, train: Task) -> list[Task]:
    """All layers at once, then layer by layer."""
    name = train.name if study.ways == ("folded",) else f"{train.name}, {study.ways[0]}"
    key = _key(study, baseline)
    arguments = (study, baseline, folder)
    whole = Task(f"{name}, all units", folder / "wholes", key, measure_all, arguments, train)
    found = [whole]
    for layer in explained_layers(build_network(baseline.network, 0)):
        of_layer = {**key, "kind": "adjoint", "layer": layer, "explained": [study.explained, study.units]}
        task = Task(f"{name}, {layer}", folder / "rows", of_layer, measure_layer, (*arguments, layer), whole)
        found.append(task)
    return found


def _describe(task: Task, row: Row) -> str:
    if row["settings"]["kind"] == "adjoint":
        return f"{task.name}: {100 * row['explicit']['within'] / row['explicit']['units']:.4f} % of units within 1 %"
    return f"{task.name}: {100 * row['accuracy']:.2f} %" if "accuracy" in row else task.name


def _key(study: AdjointStudy, baseline: Baseline) -> dict[str, Any]:
    trained = {name: value for name, value in baseline.settings().items() if name not in ("kind", "seed")}
    about = {"images": [study.images, study.images64], "way": study.ways[0], "reduced": study.reduced}
    return {"kind": "adjoint-whole", **trained, "baseline_seed": baseline.seed, **about}


def _trained(baseline: Baseline, folder: Path, device: str) -> dict[str, Any]:
    data = load_baseline_data(baseline, folder / "cache")
    return baseline_row(baseline, data, folder, device)


def explained_layers(model: nn.Module) -> list[str]:
    """The layers of Tables 3 and 4: every convolution but the first, and the fully connected layers, in forward order.

    >>> explained_layers(build_network("vgg7", 0))
    ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc']
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return names[1:]


@lru_cache(maxsize=1)
def _prepared(study: AdjointStudy, baseline: Baseline, folder: Path) -> tuple[Graph, Data, float]:
    """The network as it is measured, its data and its test accuracy."""
    data = load_baseline_data(replace(baseline, samples=1), folder / "cache")
    model, accuracy, _ = load_baseline(baseline, data, folder)
    example = data.test[0][:2]
    return trace(fold(model, example) if study.ways == ("folded",) else model, example), data, accuracy


def measure_all(study: AdjointStudy, baseline: Baseline, folder: Path) -> dict[str, Any]:
    """Every unit of every layer, over all images: per layer what :func:`_found` says, in single and in double precision.

    Returns:
        "layers": by name "all" and "all64"; "accuracy" of the network.
    """
    graph, data, accuracy = _prepared(study, baseline, folder)
    names = explained_layers(graph.model)
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for part, float64, images in (("all", False, study.images), ("all64", True, study.images64)):
        for x in data.test[0][:images].split(50):
            for name, layer in completeness(graph, x, names, "front", float64=float64).items():
                found[name][part] = _joined(found[name].get(part), _found(layer.value, layer.reconstructed))
    return {"layers": found, "accuracy": accuracy}


def measure_layer(study: AdjointStudy, baseline: Baseline, folder: Path, layer: str) -> dict[str, Any]:
    """Random units of a layer, explained one by one, for some images; and what :func:`measure_all` found of the layer."""
    graph, data, accuracy = _prepared(study, baseline, folder)
    whole = RunStore(folder / "wholes").get(_key(study, baseline))
    if whole is None:
        raise ValueError(f"{layer}: nothing measured of the whole network yet")
    shape = head_of(graph, layer, "front").shape
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    apart = 0.0
    for x in data.test[0][: study.explained].split(1):
        drawn = torch.stack([torch.randint(size, (study.units,), generator=generator) for size in shape], 1)
        units = [tuple(unit) for unit in drawn.tolist()]
        for part, float64 in (("explicit", False), ("explicit64", True)):
            h = hypersurface(graph, x, layer, units, "front", float64=float64)
            found[part] = _joined(found.get(part), _found(h.value, h.reconstructed))
            if not float64:
                all_units = completeness(graph, x, [layer], "front")[layer]
                same = all_units.reconstructed[(slice(None), *drawn.T)]
                size = float(all_units.value.abs().max())
                apart = max(apart, float((same - h.reconstructed).abs().max()) / size if size else 0.0)
    place = explained_layers(graph.model).index(layer) + 1
    return {
        "place": place,
        "shape": list(shape),
        "accuracy": accuracy,
        **whole["layers"][layer],
        **found,
        "apart": apart,
    }


def _found(value: Tensor, reconstructed: Tensor) -> dict[str, Any]:
    """What is kept of some units: how many; ``within``: with a relative error (Eq. 16) of at most 1 %; ``zeros``: whose value is
    exactly 0; ``error``: the largest |reconstructed - value|; ``size``: the largest |value|; ``histogram``: how many lie in each of
    40 equal parts of relative errors from -1e-4 to 1e-4, ``below`` and ``above`` them."""
    error = relative_error(value, reconstructed).double().flatten()
    edges = torch.arange(-BINS // 2, BINS // 2 + 1, dtype=torch.float64) * (2 * EDGE / BINS)
    places = torch.bucketize(error.clamp(-1.0, 1.0), edges)  # 0: at or below the first edge
    counts = torch.bincount(places, minlength=BINS + 2).tolist()
    return {
        "units": value.numel(),
        "within": int((error.abs() <= TOLERANCE).sum()),
        "zeros": int((value == 0).sum()),
        "error": float((reconstructed - value).abs().max()),
        "size": float(value.abs().max()),
        "histogram": counts[1:-1],
        "below": counts[0],
        "above": counts[-1],
    }


def _joined(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the units of both."""
    if before is None:
        return now
    joined = {name: before[name] + now[name] for name in ("units", "within", "zeros", "below", "above")}
    largest = {name: max(before[name], now[name]) for name in ("error", "size")}
    return {
        **joined,
        **largest,
        "histogram": [a + b for a, b in zip(before["histogram"], now["histogram"], strict=True)],
    }
