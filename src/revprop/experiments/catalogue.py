"""Every experiment by name: what ``revprop reproduce`` runs, at three scales; and the same study of a network of one's own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from revprop.datasets import data_root, find_data
from revprop.errors import near_matches
from revprop.experiments import post_training_grid, reconstruction_quality
from revprop.experiments.baseline import Baseline
from revprop.experiments.post_training_grid import PostTrainingGrid, Reconstruct, Way
from revprop.post_training import METHODS
from revprop.runs import Row
from revprop.sweep import SweepOptions, silent

__all__ = ["CATALOGUE", "SCALES", "WAYS", "Experiment", "check_scale", "chosen_ways", "settings_of", "study", "table"]

SCALES = ("smoke", "reduced", "paper")
IMAGES_OF_224 = ("imagenette", "imagewoof")
FEWER_SAMPLES, FEWER_EPOCHS, FEWER_SEEDS = 5000, 5, 3

PUBLISHED = Way("fr", asdict(Reconstruct()))
WAYS = {
    "bp": Way("bp"),
    "fr-paper": PUBLISHED,
    "fr": Way("fr", asdict(Reconstruct(strategy="global", rules="nearest"))),
    **({"solve": Way("solve")} if "solve" in METHODS else {}),
}
"""Ways to post-train by name: back-propagation, the published method, towards the nearest features, in closed form."""


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        settings: called with a scale and a number of seeds (None for the scale's own); with ``data`` and ``ways`` where it
            takes them. run: called with the settings, a folder, and the keywords of :class:`revprop.sweep.SweepOptions`.
    """

    settings: Callable[..., Any]
    run: Callable[..., list[Row]]


@dataclass(frozen=True)
class _Table:
    """What the paper says of one of its tables, and what to use where its data set is not at hand."""

    data: str
    alpha: float
    baseline_epochs: int = 40
    stand_in: tuple[str, str] | None = None


_TABLES = {
    1: _Table("mnist", 0.1, 20),
    2: _Table("cifar10", 0.1, 40, ("cifar10-jpeg", "JPEG images")),
    3: _Table("cifar100", 0.7),
    4: _Table("tiny-imagenet", 0.7, 40, ("tinyimagenet10", "ten classes")),
    5: _Table("imagenette", 0.3),
    6: _Table("imagewoof", 0.1),
}
"""FR-PT Tables 1 to 6; the networks have the data sets' names. How long its baselines are trained the paper does not say."""


def table(
    number: int, scale: str, seeds: int | None = None, data: str | None = None, ways: Sequence[str] = ("bp", "fr-paper")
) -> PostTrainingGrid:
    """The settings of one of FR-PT's Tables 1 to 6.

    Args:
        scale: "paper": as published, 10 runs; "reduced": fewer runs, training images and epochs; "smoke": made images of
            the right shape, one epoch, one run and at most six modules: no data is needed.
        seeds: so many runs instead. data: another data set, by name or path, for this table's network.
        ways: names in ``WAYS``.

    Raises:
        ValueError: an unknown scale or way, or fewer than one seed.
        FileNotFoundError: neither the data set nor its stand-in is there.

    >>> grid = table(5, "smoke")
    >>> grid.baseline.network, grid.baseline.data, grid.alpha, grid.reduced
    ('imagenette', 'made:imagenette', 0.3, 'made images of the right shape, 1 epoch, 3 of 28 modules')
    """
    check_scale(scale, seeds)
    paper = _TABLES[number]
    chosen = chosen_ways(ways)
    bp, others = WAYS["bp"] in chosen, tuple(way for way in chosen if way != WAYS["bp"])
    grid = PostTrainingGrid(
        Baseline(paper.data, paper.data, paper.baseline_epochs), paper.alpha, 10, bp=bp, fr=(), ways=others
    )
    if scale == "smoke":
        cells, what = _few_cells(paper.data)
        baseline = replace(
            grid.baseline,
            data=data or f"made:{paper.data}",
            epochs=1 if paper.data in IMAGES_OF_224 else 2,
            batch_size=32,
        )
        made = "made images of the right shape, " if data is None else ""
        return replace(
            grid, baseline=baseline, epochs=1, seeds=_seeds(seeds, 1), cells=cells, reduced=f"{made}1 epoch{what}"
        )
    where, said = (data, "") if data is not None else _at_hand(number, paper)
    cells = None
    if where == "tinyimagenet10":  # the modules in which the paper's FR is ahead on the whole data set
        names = _layers(paper.data)
        cells = tuple((start, stop) for _, r, start, stop in post_training_grid.pairs(names[1:]) if r >= 4)
        said += ", the 15 modules of 21 that end at layers 4 to 6"
    grid = replace(
        grid, baseline=replace(grid.baseline, data=where), cells=cells, reduced=said, seeds=_seeds(seeds, 10)
    )
    return grid if scale == "paper" else _reduce(grid, seeds)


def study(
    baseline: Baseline,
    scale: str = "reduced",
    seeds: int | None = None,
    epochs: int | None = None,
    alpha: float = 0.1,
    ways: Sequence[str] = ("bp", "fr"),
    cells: Sequence[tuple[str, str]] | None = None,
) -> PostTrainingGrid:
    """The same grid for any network and data.

    Args:
        baseline: the network, the data, and the weights or how to train. scale: "paper" for 10 runs of 10 epochs on all
            training images; "reduced" for 3 of 5 epochs on 5,000; "smoke" for one of one epoch on 500.
        seeds, epochs: so many instead. ways: names in ``WAYS``. cells: (start, stop); None for every pair of blocks.

    Raises:
        ValueError: an unknown scale or way, or fewer than one seed.

    >>> study(Baseline("digits", "digits"), "smoke").reduced
    'at most 500 training images, 1 epoch'
    """
    check_scale(scale, seeds)
    chosen = chosen_ways(ways)
    others = tuple(way for way in chosen if way != WAYS["bp"])
    grid = PostTrainingGrid(
        baseline,
        alpha,
        10 if epochs is None else epochs,
        seeds=_seeds(seeds, 10),
        cells=None if cells is None else tuple(cells),
        bp=WAYS["bp"] in chosen,
        fr=(),
        ways=others,
    )
    if scale == "paper":
        return grid
    if scale == "reduced":
        return _reduce(grid, seeds, epochs)
    return _reduce(grid, seeds or 1, 1 if epochs is None else epochs, samples=500)


def chosen_ways(names: Sequence[str]) -> list[Way]:
    """The ways of these names.

    Raises:
        ValueError: an unknown name, or none.

    >>> [way.method for way in chosen_ways(["bp", "fr"])]
    ['bp', 'fr']
    """
    if not names:
        raise ValueError(f"ways: expected at least one of {', '.join(WAYS)}")
    for name in names:
        if name not in WAYS:
            raise ValueError(near_matches(name, WAYS, "way"))
    return [WAYS[name] for name in names]


def settings_of(name: str, scale: str, seeds: int | None = None, **others: Any) -> Any:
    """The settings of the experiment of this name.

    Args:
        others: options that not every experiment has ("data", "ways"); None: not given.

    Raises:
        ValueError: an unknown name, or an option that this experiment does not have. And what its settings raise.

    >>> settings_of("fr-pt/table1", "smoke", seeds=2).seeds
    (0, 1)
    """
    if name not in CATALOGUE:
        raise ValueError(near_matches(name, CATALOGUE, "experiment"))
    function = CATALOGUE[name].settings
    given = {option: value for option, value in others.items() if value is not None}
    unknown = [option for option in given if option not in inspect.signature(function).parameters]
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}: leave it out")
    return function(scale, seeds, **given)


def check_scale(scale: str, seeds: int | None) -> None:
    """Refuses a scale that is none of SCALES, and fewer than one seed.

    Raises:
        ValueError: either of these.

    >>> check_scale("reduced", 3)
    """
    if scale not in SCALES:
        raise ValueError(near_matches(scale, SCALES, "scale"))
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds: expected at least 1, given {seeds}")


def _seeds(given: int | None, usual: int) -> tuple[int, ...]:
    return tuple(range(usual if given is None else given))


def _reduce(
    grid: PostTrainingGrid, seeds: int | None, epochs: int | None = None, samples: int = FEWER_SAMPLES
) -> PostTrainingGrid:
    """Fewer runs, training images and epochs; the number of runs shows in a table anyhow."""
    epochs = FEWER_EPOCHS if epochs is None else epochs
    words = [grid.reduced, f"at most {samples:,} training images", f"{epochs} epoch{'s' if epochs > 1 else ''}"]
    return replace(
        grid,
        baseline=replace(grid.baseline, samples=samples),
        epochs=epochs,
        seeds=_seeds(seeds, FEWER_SEEDS),
        reduced=", ".join(word for word in words if word),
    )


def _few_cells(network: str) -> tuple[tuple[tuple[str, str], ...] | None, str]:
    """At most six modules of a network of the paper: layer by layer, but of the large ones not the costly first."""
    layers = _layers(network)
    blocks = len(layers) - 1
    if blocks * (blocks + 1) // 2 <= 6:
        return None, ""
    few = [(1, 2), (blocks - 2, blocks - 1), (blocks - 1, blocks)]
    few = few if blocks > 6 else [(0, 1), *few]
    return tuple((layers[s], layers[r]) for s, r in few), f", {len(few)} of {blocks * (blocks + 1) // 2} modules"


def _layers(network: str) -> list[str]:
    """The input and the blocks of a network of the paper."""
    convolutions = {"mnist": 2, "cifar10": 3, "cifar100": 3, "tiny-imagenet": 4}.get(network, 5)
    return ["input", *(f"conv{i + 1}" for i in range(convolutions)), "fc1", *(["fc2"] if network != "mnist" else [])]


def _at_hand(number: int, paper: _Table) -> tuple[str, str]:
    """The table's data set, or its stand-in where only that is there, with the words for it."""
    if find_data(paper.data) is not None:
        return paper.data, ""
    if paper.stand_in is not None and find_data(paper.stand_in[0]) is not None:
        return paper.stand_in
    names = " nor ".join(repr(name) for name in (paper.data, *(paper.stand_in or ())[:1]))
    raise FileNotFoundError(
        f"fr-pt/table{number}: no data for {names} in {data_root()}: set REVPROP_DATA to the folder that holds it "
        "(docs/data.md says in which form), or give --data; --scale smoke needs none"
    )


def _quality(
    paper: reconstruction_quality.ReconstructionQuality, scale: str, seeds: int | None = None
) -> reconstruction_quality.ReconstructionQuality:
    check_scale(scale, seeds)
    if seeds not in (None, 1):
        raise ValueError(f"seeds: this experiment is one run of one network, given {seeds}")
    if scale == "smoke":
        return replace(paper, network="digits", data="digits", weights="", epochs=10, samples=50, layers=())
    return replace(paper, samples=max(50, paper.samples // 10)) if scale == "reduced" else paper


def _run_quality(
    settings: reconstruction_quality.ReconstructionQuality, folder: Path, **how: Unpack[SweepOptions]
) -> list[Row]:
    """Each of its few runs uses the network and the reconstructions of one process: there is nothing to spread."""
    device, report = how.get("device", "auto"), how.get("report", silent)
    return reconstruction_quality.run(settings, folder, data_root(), device, report)


def _collect() -> Mapping[str, Experiment]:
    found = {
        f"fr-pt/table{number}": Experiment(partial(table, number), post_training_grid.run) for number in sorted(_TABLES)
    }
    for name in ("figure4", "figure5", "figure6", "figure7", "ablation", "beyond"):
        if importlib.util.find_spec(f"revprop.experiments.{name}") is not None:
            module = importlib.import_module(f"revprop.experiments.{name}")
            found[f"fr-pt/{name}"] = Experiment(module.settings, module.run)
    repair = importlib.import_module("revprop.experiments.repair")  # not at the top: it takes the scales from here
    found["any-network/repair"] = Experiment(repair.settings, repair.run)
    maps = importlib.import_module("revprop.experiments.adjoint_maps")  # as well
    found["adjoint/train"] = Experiment(maps.train, maps.run)
    for number in (3, 4):
        found[f"adjoint/table{number}"] = Experiment(partial(maps.table, number), maps.run)
    for number in range(6, 12):
        found[f"adjoint/figure{number}"] = Experiment(partial(maps.figure, number), maps.run)
    racecar = importlib.import_module("revprop.experiments.racecar_tables")  # as well
    study = importlib.import_module("revprop.experiments.racecar_study")
    for number in racecar.TABLES:
        found[f"racecar/table{number}"] = Experiment(partial(racecar.table, number), study.run)
    for number in racecar.FIGURES:
        found[f"racecar/figure{number}"] = Experiment(partial(racecar.figure, number), study.run)
    smoke = importlib.import_module("revprop.experiments.smoke_transfer")  # as well
    for name in smoke.PARTS:
        found[f"racecar/{name}"] = Experiment(partial(smoke.figure, name), smoke.run)
    pictures = importlib.import_module("revprop.experiments.stylisation")  # as well
    for number in pictures.FIGURES:
        found[f"racecar/figure{number}"] = Experiment(partial(pictures.figure, number), pictures.run)
    for name, file in (("figure2", "alignment_figure2"), ("mnist", "alignment_images")):
        module = importlib.import_module(f"revprop.experiments.{file}")
        found[f"alignment/{name}"] = Experiment(module.settings, module.run)
    images = importlib.import_module("revprop.experiments.alignment_figures")
    for name in images.FIGURES:
        found[f"alignment/{name}"] = Experiment(partial(images.settings, name), images.run)
    sizes = importlib.import_module("revprop.experiments.alignment_sizes")
    for number in sizes.DATA:
        found[f"alignment/table{number}"] = Experiment(partial(sizes.table, number), sizes.run)
    for name, paper in (("cifar10", reconstruction_quality.CIFAR10), ("resnet20", reconstruction_quality.RESNET20)):
        found[f"design/{name}"] = Experiment(partial(_quality, paper), _run_quality)
    return found


CATALOGUE = _collect()
"""Every experiment by name."""
