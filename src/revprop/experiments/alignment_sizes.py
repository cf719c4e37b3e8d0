"""Feature alignment, Tables 3 to 6: parameters, and the time that a sample takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from revprop.alignment import AlignmentSettings, FeatureAlignedGAN, Sizes, VariationalFeatureAligned, paper_model
from revprop.hardware import clock
from revprop.runs import Row
from revprop.sweep import SweepOptions, Task, sweep
from revprop.training import Training

__all__ = ["DATA", "AlignmentSizes", "measure", "run", "table"]

DATA = {3: "mnist", 4: "celeba", 5: "cifar10", 6: "stl10"}
MODELS = ("vae", "gan", "vfa", "vfa-gan")


@dataclass(frozen=True)
class AlignmentSizes:
    """What is counted and timed.

    Attributes:
        number: of the table. batches: so many samples at once. repeats: medians are over so many. hidden: another size of the
            hidden layer than published, 0 for that. reduced: what differs from the published setting.
    """

    number: int
    batches: tuple[int, ...] = (1, 128)
    repeats: int = 15
    hidden: int = 0
    reduced: str = ""


def table(number: int, scale: str, seeds: int | None = None) -> AlignmentSizes:
    """The settings of one of Tables 3 to 6: the paper's networks, but for "smoke", whose hidden layers have 64 neurons.

    Raises:
        ValueError: an unknown scale, or more than one seed.

    >>> table(3, "smoke").hidden
    64
    """
    from revprop.experiments.catalogue import check_scale  # here: the catalogue lists this module

    check_scale(scale, seeds)
    if seeds not in (None, 1):
        raise ValueError(f"seeds: sizes and times are those of one network of each kind, given {seeds}")
    if scale == "smoke":
        return AlignmentSizes(number, (1, 4), 3, 64, "64 hidden neurons")
    return AlignmentSizes(number, repeats=5 if scale == "reduced" else 15)


def measure(study: AlignmentSizes, device: str) -> dict[str, Any]:
    """Counts the parameters that sampling needs, and times samples, the models in turn.

    Returns:
        "models": by name "parameters" and "seconds" per sample, by the number of samples at once. "vfa, affine": VFA as what one
        step from zeros is, one product of matrices (:meth:`revprop.FeatureAligned.decoder`). Also "device".
    """
    sizes = Sizes.paper(DATA[study.number])
    sizes = sizes if not study.hidden else Sizes(sizes.shape, study.hidden, latent=sizes.latent, classes=sizes.classes)
    place = Training(device=device).fabric().device
    settings = AlignmentSettings.published_code()
    samplers: dict[str, tuple[int, Callable[[int], Tensor]]] = {}
    for name in MODELS:
        model = paper_model(name, sizes, settings, orthogonal=False).eval().to(place)
        if isinstance(model, FeatureAlignedGAN):
            parts: list[nn.Module] = [model.encoder, model.generator]
        else:
            parts = [model.get_submodule("generator")] if name == "gan" else [model]
        count = sum(p.numel() for part in parts for p in part.parameters())
        samplers[name] = count, cast("Any", model).sample
        if isinstance(model, VariationalFeatureAligned):
            decoder = model.aligned.decoder()
            size = sum(b.numel() for b in decoder.buffers())
            samplers["vfa, affine"] = size, partial(model.sample, decoder=decoder)
    now = clock(place)
    seconds: dict[str, dict[str, float]] = {name: {} for name in samplers}
    for n in study.batches:
        times: dict[str, list[float]] = {name: [] for name in samplers}
        for repeat in range(study.repeats + 1):
            for name, (_, sample) in samplers.items():
                began = now()
                with torch.no_grad():
                    sample(n)
                if place.type == "cuda":
                    torch.cuda.synchronize(place)
                if repeat:  # the first warms up
                    times[name].append((now() - began) / n)
        for name, values in times.items():
            seconds[name][str(n)] = statistics.median(values)
    return {
        "models": {name: {"parameters": samplers[name][0], "seconds": seconds[name]} for name in samplers},
        "device": torch.cuda.get_device_name(place)
        if place.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "measured": time.strftime("%Y-%m-%d"),
    }


def run(study: AlignmentSizes, folder: Path, **how: Unpack[SweepOptions]) -> list[Row]:
    """Measures where there is no row yet.

    Returns:
        one row of kind "alignment-sizes", as :func:`measure` says.

    Raises:
        SweepError: it failed.
    """
    device = how.get("device", "auto")
    about = {"hidden": study.hidden, "batches": list(study.batches), "repeats": study.repeats, "reduced": study.reduced}
    key = {"kind": "alignment-sizes", "table": study.number, "data": DATA[study.number], "device": device, **about}
    task = Task(f"table {study.number}", folder.absolute() / "rows", key, measure, (study, device))
    how["workers"] = 1  # it is one task
    return sweep([task], describe=lambda task, row: task.name, **how)
