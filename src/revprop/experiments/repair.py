"""One damaged block of networks that are no chain: the last residual block of ResNet-20, an encoder block of a transformer."""

from __future__ import annotations

from dataclasses import replace

from revprop.closed_form import ClosedForm
from revprop.datasets import data_root, find_data
from revprop.experiments.baseline import Baseline
from revprop.experiments.grid_study import GridStudy, run
from revprop.experiments.post_training_grid import PostTrainingGrid, Way
from revprop.experiments.reconstruction_quality import IMAGENET_MEAN, IMAGENET_STD, RESNET20

__all__ = ["WAYS", "run", "settings"]

WAYS = (
    Way("fr"),
    Way("fr", {"alpha": 0.5, "margin": 10.0}),
    Way("fr", {"strategy": "greedy", "refine": 4}),
    Way("solve", {"closed_form": ClosedForm((10.0,), (1.0,), sweeps=4)}),
)
"""Beside BP: towards the nearest features; the same with a margin, as the ablation chose it for CIFAR-10; greedy, refined in four
sweeps; in closed form."""

RESNET = PostTrainingGrid(
    Baseline(
        "resnet20",
        RESNET20.data,
        weights=RESNET20.weights,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        damage=("layer3.2", 2.0),
    ),
    cells=(("layer3.1", "layer3.2"),),
    fr=(),
    ways=WAYS,
)
VIT = PostTrainingGrid(
    Baseline("vit-mnist", "mnist", 20, batch_size=64, damage=("blocks.2", 2.0)),
    cells=(("blocks.1", "blocks.2"),),
    fr=(),
    ways=WAYS,
)


def settings(scale: str, seeds: int | None = None) -> GridStudy:
    """The study's settings at a scale.

    Args:
        scale: "smoke": made images, networks trained for one epoch, one of post-training, one seed; "reduced": 3 seeds, 5
            epochs, 2,000 training images, the transformer itself trained on these for 10 epochs; "paper": 10 seeds of 10 epochs
            on all images. Of the last two the network whose data and weights are there. The block that is trained has normal
            noise on its weights, twice as strong as they are, drawn from the seed: something to repair. seeds: so many instead.

    Raises:
        ValueError: an unknown scale, or fewer than one seed. FileNotFoundError: the data of neither network is there.

    >>> [(grid.baseline.network, grid.cells) for grid in settings("smoke").grids]
    [('resnet20', (('layer3.1', 'layer3.2'),)), ('vit-mnist', (('blocks.1', 'blocks.2'),))]
    """
    from revprop.experiments.catalogue import check_scale  # here: the catalogue lists this module

    check_scale(scale, seeds)
    count = seeds or {"smoke": 1, "reduced": 3, "paper": 10}[scale]
    grids = [replace(grid, seeds=tuple(range(count))) for grid in (RESNET, VIT)]
    if scale == "smoke":
        return GridStudy(tuple(_made(grid) for grid in grids))
    missing = [*_missing(RESNET.baseline), *_missing(VIT.baseline)]
    there = [grid for grid in grids if not _missing(grid.baseline)]
    if not there:
        raise FileNotFoundError(
            f"any-network/repair: {'; '.join(missing)}: set REVPROP_DATA to the folder that holds them; --scale smoke needs none"
        )
    if scale == "reduced":
        there = [_fewer(grid) for grid in there]
    return GridStudy(tuple(there), left_out=tuple(missing))


def _missing(baseline: Baseline) -> list[str]:
    """What a baseline needs and is not there, in words."""
    found = [] if find_data(baseline.data) is not None else [f"no data for {baseline.data!r} in {data_root()}"]
    if baseline.weights and not (data_root() / baseline.weights).is_file():
        found.append(f"no weights {baseline.weights} in {data_root()}")
    return found


def _made(grid: PostTrainingGrid) -> PostTrainingGrid:
    shape = grid.baseline.data.partition("-")[0]
    whole = grid.baseline
    baseline = Baseline(whole.network, f"made:{shape}", 1, batch_size=64, samples=128, damage=whole.damage)
    return replace(grid, baseline=baseline, epochs=1, reduced="made images of the right shape, 128 of them, 1 epoch")


def _fewer(grid: PostTrainingGrid) -> PostTrainingGrid:
    if grid.baseline.weights:
        return replace(
            grid, baseline=replace(grid.baseline, samples=2000), epochs=5, reduced="2,000 training images, 5 epochs"
        )
    baseline = replace(grid.baseline, samples=2000, batch_size=32, epochs=10)
    words = "2,000 training images, network trained on these for 10 epochs, 5 epochs"
    return replace(grid, baseline=baseline, epochs=5, reduced=words)
