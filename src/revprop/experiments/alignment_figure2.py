"""Feature alignment, Figure 2: y = sin(3 pi x) approximated, and x asked back of the approximation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from revprop.alignment import FeatureAligned, half_squares
from revprop.experiments.alignment_training import train_generative
from revprop.networks.fr_pt import seed_parameters
from revprop.runs import Row
from revprop.sweep import SweepOptions, Task, sweep
from revprop.training import Training

__all__ = ["WAYS", "Figure2", "SineNetwork", "measure", "run", "settings"]

WAYS = ("without alignment", "aligned, no latent neuron", "aligned, a latent neuron")
POINTS, SHOWN = 1024, 201
SMALL_STEP = 0.01  # of the many steps, where one is not enough
MANY = 200


@dataclass(frozen=True)
class Figure2:
    """The toy.

    Attributes:
        hidden: neurons in each of the two hidden layers (published: 1024). epochs: each of eight batches of 128 points in [-1, 1].
        alpha: the weight of f in the inner loss (Equation 3). seeds: of parameters and shuffling.
    """

    hidden: int = 1024
    epochs: int = 300
    learning_rate: float = 1e-3
    alpha: float = 0.01
    seeds: tuple[int, ...] = (0, 1, 2)
    reduced: str = ""


def settings(scale: str, seeds: int | None = None) -> Figure2:
    """The toy's settings at a scale: "paper": as published; "reduced": 256 hidden neurons; "smoke": 32, and few epochs.

    Args:
        seeds: so many networks of each kind.

    Raises:
        ValueError: an unknown scale, or fewer than one seed.

    >>> settings("smoke").seeds
    (0,)
    """
    from revprop.experiments.catalogue import check_scale  # here: the catalogue lists this module

    check_scale(scale, seeds)
    chosen = tuple(range(seeds or (1 if scale == "smoke" else 3)))
    if scale == "paper":
        return Figure2(seeds=chosen)
    if scale == "reduced":
        return Figure2(256, seeds=chosen, reduced="256 hidden neurons instead of 1,024")
    return Figure2(32, 40, seeds=chosen, reduced="32 hidden neurons instead of 1,024, 40 epochs")


class SineNetwork(nn.Module):
    """Two hidden layers, and one output f or two, f and the latent l; trained towards ``1/2 |y - f|^2``, and, where it is aligned,
    ``1/2 |x - r|^2`` (Equation 4), r being one step from zero down ``|l - l_x|^2 + alpha |f - f_x|^2`` (Equation 3).

    Args:
        way: one of WAYS. hidden: neurons in a layer. alpha: the weight of f; without a latent neuron there is nothing to weigh it
            against, and the inner loss is ``1/2 |f - f_x|^2``. seed: of the parameters.
    """

    def __init__(self, way: str, hidden: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.aligns = way != WAYS[0]
        latent = way == WAYS[2]
        with seed_parameters(seed):
            layers = [nn.Linear(1, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU()]
            module = nn.Sequential(*layers, nn.Linear(hidden, 1 + latent))
        weights = torch.tensor([2 * alpha, 2.0]) if latent else None
        self.aligned = FeatureAligned(module, (1,), weights=weights)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1) -> (n, 1) or (n, 2): f first."""
        return self.aligned(x)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer's parameters: "network"."""
        return {"network": list(self.parameters())}

    def losses(
        self, batch: tuple[Tensor, ...], generator: torch.Generator | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """ "fit", and where it is aligned "alignment"; "loss" is their sum."""
        x, y = batch
        z, found = self.aligned.encode(x)
        terms = {"fit": half_squares(y - z[:, :1])}
        if self.aligns:
            terms["alignment"] = half_squares(x - self.aligned.steps_towards(z, found, generator))
        return {"network": {"loss": torch.stack(list(terms.values())).sum(), **terms}}

    def constrain(self) -> None:
        """Puts the weights back within the bound, where it is aligned."""
        if self.aligns:
            self.aligned.constrain()

    def reconstruct(self, x: Tensor) -> Tensor:
        """x as the network's outputs give it back."""
        return self.aligned.reconstruct(x)


def measure(toy: Figure2, way: str, seed: int, device: str) -> dict[str, Any]:
    """Trains one network, and asks it for x.

    Returns:
        "x", "f", "recovered" (by one step), "recovered_many" (by 200 of a hundredth), each at 201 points; the mean absolute errors
        "fit" (f against y), "error" and "error_many" (recovered against x), "value" (sin of what is recovered against y).
    """
    x = torch.linspace(-1, 1, POINTS)[:, None]
    y = torch.sin(3 * math.pi * x)
    network = SineNetwork(way, toy.hidden, toy.alpha, seed)
    training = Training(toy.epochs, 128, toy.learning_rate, seed, device)
    history = train_generative(network, (x, y), training)
    network.cpu()
    shown = torch.linspace(-1, 1, SHOWN)[:, None]
    aligned = network.aligned
    many = FeatureAligned(aligned.module, (1,), MANY, SMALL_STEP, weights=aligned.weights)
    with torch.no_grad():
        z = aligned(shown)
        recovered, recovered_many = aligned.invert(z), many.invert(z)
    truth = torch.sin(3 * math.pi * shown)
    errors = {
        "fit": z[:, :1] - truth,
        "error": recovered - shown,
        "error_many": recovered_many - shown,
        "value": torch.sin(3 * math.pi * recovered) - truth,
    }
    curves = {"x": shown, "f": z[:, :1], "recovered": recovered, "recovered_many": recovered_many}
    return {
        **{name: [round(v, 5) for v in value.flatten().tolist()] for name, value in curves.items()},
        **{name: float(value.abs().mean()) for name, value in errors.items()},
        "losses": history[-1].losses,
    }


def run(toy: Figure2, folder: Path, **how: Unpack[SweepOptions]) -> list[Row]:
    """Runs what has no row yet: each way with each seed.

    Returns:
        rows of kind "alignment-figure2", as :func:`measure` says.

    Raises:
        SweepError: some runs failed; all others are stored.
    """
    about = {name: value for name, value in asdict(toy).items() if name != "seeds"}
    tasks = [
        Task(
            f"{way}, seed {seed}",
            folder.absolute() / "rows",
            {"kind": "alignment-figure2", "way": way, "seed": seed, **about},
            measure,
            (toy, way, seed, how.get("device", "auto")),
        )
        for way in WAYS
        for seed in toy.seeds
    ]
    return sweep(tasks, describe=_describe, **how)


def _describe(task: Task, row: Row) -> str:
    return f"{task.name}: x recovered within {row['error']:.3f}, f within {row['fit']:.3f} on average"
