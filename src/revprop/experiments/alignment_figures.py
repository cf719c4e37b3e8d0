"""Feature alignment's Figures 6 to 16 and Table 2: which models, on which data sets; :mod:`alignment_images` runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from revprop.alignment import Sizes
from revprop.datasets import data_root, find_data
from revprop.experiments import alignment_images
from revprop.experiments.alignment_images import SHORT, AlignmentImages
from revprop.experiments.baseline import Baseline
from revprop.runs import Row
from revprop.sweep import SweepOptions, silent

__all__ = ["FIGURES", "AlignmentFigure", "on", "run", "settings"]

COMPARED = ("ae", "vae", "gan", "vfa", "vfa-gan")
SAMPLED = ("vae", "gan", "vfa", "vfa-gan")
ALL = ("mnist", "cifar10", "celeba", "stl10")
FIGURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "figure6": (("mnist",), ("vfa",)),
    "figure7": (("mnist",), COMPARED),
    "figure8": (("mnist",), ("vfa-gan",)),
    "figure9": (("celeba",), COMPARED),
    "figure10": (("celeba",), ("vfa-gan",)),
    "figure11": (("cifar10",), COMPARED),
    "figure12": (("cifar10",), ("vfa-gan",)),
    "figure13": (("stl10",), COMPARED),
    "figure14": (("stl10",), ("vfa-gan",)),
    "figure15": (ALL, COMPARED),
    "figure16": (ALL, ("local",)),
    "table2": (ALL, SAMPLED),
}
"""By name: data sets and models. Figure 6 is of two latent variables; all others share their rows."""
AVERAGED = ("figure15", "table2")  # over three runs; the others show pictures of one


@dataclass(frozen=True)
class _On:
    """A data set of the paper: names to look for, and what to say of each; the network that judges images; a data set of that
    shape to try a program out; the weight of the perceptual loss where the paper gives another; what else to train on; how many
    epochs a reduced run has, more where images are few."""

    names: dict[str, str]
    judge: str
    made: str
    perceptual: float | None = None
    training: str = ""
    epochs: int = 10


DATA = {
    "cifar10": _On({"cifar10": "", "cifar10-jpeg": "JPEG images"}, "cifar10", "made:cifar10", 0.0),
    "celeba": _On(
        {"celeba": "", "celeba64": "a thousand faces"}, "tiny-imagenet", "made:tiny-imagenet", 1.0, epochs=50
    ),
    "stl10": _On({"stl10": ""}, "tiny-imagenet", "made:tiny-imagenet", training="stl10-unlabelled"),
}


@dataclass(frozen=True)
class AlignmentFigure:
    """A figure or table: a study for each data set that is at hand, and the names of the others."""

    studies: tuple[AlignmentImages, ...]
    left_out: tuple[str, ...] = ()


def settings(name: str, scale: str, seeds: int | None = None) -> AlignmentFigure:
    """The settings of "figure6" to "figure16", or "table2", at a scale.

    Args:
        scale: as for :func:`on`. seeds: so many runs of each model; else three where they are averaged, one where pictures are
            looked at.

    Raises:
        ValueError: an unknown scale, or fewer than one seed. FileNotFoundError: none of the data sets is at hand.

    >>> settings("figure6", "smoke").studies[0].sizes.latent
    2
    """
    from revprop.experiments.catalogue import check_scale  # here: the catalogue lists this module

    check_scale(scale, seeds)
    data, models = FIGURES[name]
    count = seeds or (3 if name in AVERAGED and scale != "smoke" else 1)
    found, lacking = [], []
    for each in data:
        try:
            found.append(replace(on(each, scale), models=models, seeds=tuple(range(count))))
        except FileNotFoundError as error:
            if len(data) == 1:
                raise
            lacking.append(str(error))
    if not found:
        raise FileNotFoundError("; ".join(lacking))
    if name == "figure6":
        found = [replace(study, sizes=replace(study.sizes, latent=2)) for study in found]
    return AlignmentFigure(tuple(found), tuple(lacking))


def on(data: str, scale: str) -> AlignmentImages:
    """Every model on one of the paper's data sets, for one run each.

    Args:
        data: "mnist", "cifar10", "celeba" or "stl10". scale: "paper": the paper's networks, all images; "reduced": an eighth of
            the hidden neurons, half of the channels, three times the learning rate (generators ten times), at most 10,000 images;
            "smoke": tiny networks on made images.

    Raises:
        FileNotFoundError: the data set is not at hand.

    >>> on("cifar10", "smoke").classifier.data
    'made:cifar10'
    """
    if data == "mnist":
        return alignment_images.settings(scale, 1)
    here = DATA[data]
    shape = Sizes.paper(data)
    found = here.made if scale == "smoke" else _at_hand(here)
    channels = shape.shape[0]
    black, white = (0.0,) * channels, (1.0,) * channels
    judge = Baseline(here.judge, found, 1 if scale == "smoke" else 20, mean=black, std=white)
    sizes = replace(shape, classes=2 if data == "celeba" and scale != "smoke" else shape.classes)
    if scale == "smoke":
        # made images of this shape have more classes than the paper's data; none is asked for
        sizes = replace(sizes, hidden=16, width=2, latent=4, refiner=2, classes=10 if data == "cifar10" else 0)
        judge = replace(judge, batch_size=64, samples=100)
        small = AlignmentImages(judge, sizes, learning_rate=1e-3, epochs=1, samples=64, images=20)
        return replace(small, seeds=(0,), reduced="made images, tiny networks", perceptual=here.perceptual)
    training = here.training if here.training and scale == "paper" else ""
    study = AlignmentImages(judge, sizes, seeds=(0,), perceptual=here.perceptual, training=training)
    if scale == "paper":
        return replace(study, samples=200_000, reduced=here.names[found])
    sizes = replace(sizes, hidden=sizes.hidden // 8, width=16, refiner=16, normalised=True)
    words = [
        here.names[found],
        "the labelled images instead of the unlabelled" if here.training else "",
        f"{sizes.hidden} hidden neurons, 16 channels, a learning rate of 0.0003, {here.epochs} epochs of at most 10,000 images",
        "at most 1,000 images measured",
    ]
    said = ", ".join(word for word in words if word)
    return replace(study, sizes=sizes, epochs=here.epochs, samples=10_000, images=1000, reduced=said, **SHORT)


def _at_hand(here: _On) -> str:
    for name in here.names:
        if find_data(name) is not None:
            return name
    names = " nor ".join(map(repr, here.names))
    raise FileNotFoundError(
        f"no data for {names} in {data_root()}: set REVPROP_DATA to the folder that holds it (docs/data.md says in which form); "
        "--scale smoke needs none"
    )


def run(figure: AlignmentFigure, folder: Path, **how: Unpack[SweepOptions]) -> list[Row]:
    """Runs what has no row yet, data set by data set; says which are left out.

    Returns:
        rows of kind "alignment-images".

    Raises:
        SweepError: some runs failed; all others are stored.
    """
    for lacking in figure.left_out:
        how.get("report", silent)(f"left out: {lacking}")
    rows: list[Row] = []
    for study in figure.studies:
        rows += alignment_images.run(study, folder, **how)
    return rows
