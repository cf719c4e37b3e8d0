"""Racecar section 5.3: a GAN that enlarges simulated smoke, with and without the penalty, and two auto-encoders started from it.

Phase I (task A) trains the generator and the discriminator of Table 13 for 4x super-resolution of simulated plumes, Std without
and RR with the penalty over all six layers of the generator. Phase II trains auto-encoders of the same six layers: of the same
plumes (B1) and of smoke of another kind in colour (B2), started from Std's layers, from RR's, or from scratch. The paper's B2 is
captured smoke, which is not at hand: here it is simulated smoke that is blown past an obstacle, in three channels, so that as in
the paper five of the six layers fit.

What the paper does not say is chosen: the generator minimises the mean squared error plus ``ADVERSARIAL`` times the usual
non-saturating term; the penalty is Racecar's mean (with lambda = 0.1 of Table 14 the sums of the published code would outweigh
the task a hundred thousand times); whole simulations are held out, as many as leave 10 % for training at paper scale.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from revprop.datasets.smoke import load_smoke, made_smoke
from revprop.networks.smoke import (
    SmokeGenerator,
    reuse_layers,
    smoke_autoencoder,
    smoke_discriminator,
    smoke_generator,
)
from revprop.racecar import Racecar
from revprop.runs import Row, RunStore
from revprop.sweep import SweepOptions, Task, sweep
from revprop.training import Epoch, Training, fit

__all__ = ["MODELS", "PARTS", "SmokeTransfer", "figure", "run", "table", "train_autoencoder", "train_gan"]

ADVERSARIAL = 1e-3  # weight of what fools the discriminator, beside the mean squared error
LAMBDA = 0.1  # Table 14
KINDS = {"A": "plume", "B1": "plume", "B2": "obstacle"}
PARTS = {"table6": ("A", "B1", "B2"), "figure8": ("A",), "figure9": ("A", "B1", "B2")}
PARTS |= {"figure18": ("A", "B1"), "figure19": ("A", "B1"), "figure20": ("A", "B2"), "figure21": ("A", "B2")}
MODELS = {"A": ("std", "rr"), "B1": ("std", "rr", "scratch"), "B2": ("std", "rr", "scratch")}
SHOWN = 2  # test images kept as pictures


@dataclass(frozen=True)
class SmokeTransfer:
    """What is trained, and on what.

    Attributes:
        seeds: one run each, of everything. parts: some of "A", "B1" and "B2"; B1 and B2 need A.
        made: blobs of the right shape instead of simulations. size: of their images in pixels.
        simulations, frames: so many of each kind, so many frames of each. training: so many simulations are trained on, the
            first ones; the others are tested on.
        width, judge_width: share of the published channels, of the generator and of the discriminator.
        epochs: of phase I, and of phase II. batch_size: of both. learning_rates: Adam's in phase I of the generator and of the
            discriminator, and in phase II.
        mixed: whether to compute in bfloat16 where that is safe. reduced: what differs from the published setting, in words.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    parts: tuple[str, ...] = ("A", "B1", "B2")
    made: bool = False
    size: int = 64
    simulations: int = 20
    frames: int = 120
    training: int = 2
    width: float = 1.0
    judge_width: float = 1.0
    epochs: tuple[int, int] = (40_000, 1_000)
    batch_size: int = 64
    learning_rates: tuple[float, float, float] = (2e-4, 2e-4, 2e-4)
    mixed: bool = False
    reduced: str = ""


_SCALES = {
    "paper": SmokeTransfer(reduced="smoke simulated by PhiFlow instead of mantaflow"),
    "reduced": SmokeTransfer(
        simulations=8,
        frames=40,
        training=4,
        width=0.25,
        judge_width=0.125,
        epochs=(30, 20),
        batch_size=16,
        learning_rates=(1e-3, 2e-4, 2e-4),
        mixed=True,
        reduced="smoke simulated by PhiFlow instead of mantaflow, 8 simulations of 40 frames of which 4 are trained on, a quarter "
        "of the generator's channels and an eighth of the discriminator's, batches of 16, 30 epochs of phase I (the generator's "
        "at a rate of 0.001) and 20 of phase II, bfloat16",
    ),
    "smoke": SmokeTransfer(
        seeds=(0,),
        made=True,
        size=32,
        simulations=2,
        frames=8,
        training=1,
        width=0.0625,
        judge_width=0.0625,
        epochs=(2, 2),
        batch_size=4,
        reduced="made blobs of 32x32 pixels, a sixteenth of the channels, 2 epochs",
    ),
}


def table(scale: str, seeds: int | None = None) -> SmokeTransfer:
    """The settings of Table 6 at a scale: "smoke", "reduced" or "paper".

    Args:
        seeds: so many runs of everything.

    Raises:
        ValueError: an unknown scale, or fewer than one seed.

    >>> table("reduced").seeds, table("smoke").made
    ((0, 1, 2), True)
    """
    return figure("table6", scale, seeds)


def figure(name: str, scale: str, seeds: int | None = None) -> SmokeTransfer:
    """The settings of one of Figures 8, 9 and 18 to 21: rows of Table 6, those it shows. Others: as for :func:`table`.

    >>> figure("figure20", "smoke").parts
    ('A', 'B2')
    """
    from revprop.experiments.catalogue import check_scale  # here: the catalogue lists this module

    check_scale(scale, seeds)
    found = replace(_SCALES[scale], parts=PARTS[name])
    return found if seeds is None else replace(found, seeds=tuple(range(seeds)))


def run(study: SmokeTransfer, folder: Path, **how: Unpack[SweepOptions]) -> list[Row]:
    """Trains what has no row yet.

    Args:
        folder: where rows, weights and pictures are kept; running again continues. Tables and figures share them.
        how: ``device``, ``report``, ``workers``, ``engine`` of :func:`revprop.sweep.sweep`.

    Returns:
        rows of kind "smoke", one per part, model and seed: "l2", the mean squared error of the test images; the history;
        seconds per step; "pictures", a file of the folder. Of A also "input_l2": of the small image that the reverse pass gives.

    Raises:
        FileNotFoundError: the simulated smoke is not there. SweepError: some runs failed; all others are stored.
    """
    folder = folder.absolute()
    if not study.made:  # before anything is trained
        for part in study.parts:
            _images(study, part)
    tasks: list[Task] = []
    for seed in study.seeds:
        first: dict[str, Task] = {}
        for part in study.parts:
            for model in MODELS[part]:
                function = train_gan if part == "A" else train_autoencoder
                arguments = (study, part, model, seed, folder, how.get("device", "auto"))
                settings = _key(study, part, model, seed)
                name = f"{part}, {model}, seed {seed}"
                task = Task(
                    name, folder / "rows", settings, function, arguments, None if part == "A" else first.get(model)
                )
                if part == "A":
                    first[model] = task
                tasks.append(task)
    return sweep(tasks, describe=_describe, **how)


def _describe(task: Task, row: Row) -> str:
    regenerated = f", of the regenerated input {row['input_l2']:.2e}" if "input_l2" in row else ""
    return f"{task.name}: mean squared error {row['l2']:.2e}{regenerated}"


def _key(study: SmokeTransfer, part: str, model: str, seed: int) -> dict[str, Any]:
    about = {name: value for name, value in asdict(study).items() if name not in ("seeds", "parts")}
    return {"kind": "smoke", "part": part, "model": model, "seed": seed, **about}


@lru_cache(maxsize=3)
def _images(study: SmokeTransfer, part: str) -> tuple[Tensor, Tensor]:
    """The images to train on and those to test on, (n, channels, h, w); none of one simulation in both."""
    kind = KINDS[part]
    if study.made:
        found = made_smoke(kind, study.simulations, study.frames, study.size)
    else:
        found = load_smoke(kind, study.simulations, study.frames)
    return found[: study.training].flatten(0, 1), found[study.training :].flatten(0, 1)


def _shown(study: SmokeTransfer, part: str) -> Tensor:
    """Test images for the pictures: late frames of different simulations."""
    test = _images(study, part)[1]
    late = range(study.frames - 1, len(test), study.frames)
    return test[[*late, len(test) // 2][:SHOWN]]


def _turned(images: Tensor) -> Tensor:
    """The images turned by a random number of right angles, and perhaps mirrored: from torch's own generator."""
    turns, mirrored = torch.randint(4, ()).item(), torch.randint(2, ()).item()
    images = torch.rot90(images, int(turns), (-2, -1))
    return images.flip(-1) if mirrored else images


def _small(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 4)


class _Judge:
    """The discriminator with an optimizer of its own: learns a step at a time, between those of the generator."""

    def __init__(self, study: SmokeTransfer, seed: int, device: torch.device) -> None:
        size = study.size
        self.network = smoke_discriminator(size, study.judge_width, seed=seed + 1_000).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=study.learning_rates[1])

    def __call__(self, high: Tensor, low: Tensor) -> Tensor:
        """Logits, in single precision."""
        return self.network(high, low).float()

    def learn(self, real: Tensor, made: Tensor, low: Tensor) -> Tensor:
        """One step towards telling real images from made ones; the loss before it."""
        self.network.requires_grad_(True)
        loss = F.softplus(-self(real, low)).mean() + F.softplus(self(made.detach(), low)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def not_fooled(self, made: Tensor, low: Tensor) -> Tensor:
        """How surely made images are told from real ones: what the generator makes small."""
        self.network.requires_grad_(False)
        return F.softplus(-self(made, low)).mean()


@contextmanager
def _precision(study: SmokeTransfer, device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16, enabled=study.mixed):
        yield


def train_gan(
    study: SmokeTransfer, part: str, model: str, seed: int, folder: Path, device: str = "auto"
) -> dict[str, Any]:
    """Phase I: trains a generator, "std" without and "rr" with the penalty; keeps its weights and pictures, returns its row."""
    train, test = _images(study, part)
    training = Training(study.epochs[0], study.batch_size, study.learning_rates[0], seed, device)
    place = training.fabric().device
    generator = smoke_generator(1, study.width, seed=seed)
    penalty = Racecar(generator, _small(train[:2]), weight=LAMBDA, reduction="mean", seed=seed)
    judge = _Judge(study, seed, place)

    def loss(_: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        high = _turned(batch[0])
        low = _small(high)
        with _precision(study, place):
            if model == "rr":
                made, constraint = penalty.with_output(low)
            else:
                made, constraint = generator(low), torch.zeros((), device=place)
            judged = judge.learn(high, made, low)
            error, fooling = F.mse_loss(made.float(), high), judge.not_fooled(made, low)
        total = error + ADVERSARIAL * fooling + constraint
        return {"loss": total, "error": error, "fooling": fooling, "judge": judged, "penalty": constraint}

    fitted = fit(generator, (train,), loss, training, description=f"smoke {part}, {model}")
    generator.eval()
    with torch.no_grad():
        errors, shares = [], []
        for high in test.to(place).split(64):
            low = _small(high)
            errors.append(F.mse_loss(generator(low), high, reduction="none").flatten(1).mean(1))
            shares.append(F.mse_loss(penalty.regenerate(low)["input"], low, reduction="none").flatten(1).mean(1))
        shown = _shown(study, part).to(place)
        low = _small(shown)
        pictures = {"low": low, "output": generator(low), "regenerated": penalty.regenerate(low)["input"]}
    key = _key(study, part, model, seed)
    _keep_weights(folder, key, generator)
    small = _small(test)
    enlarged = F.interpolate(small, scale_factor=4, mode="bilinear")
    return {
        "l2": float(torch.cat(errors).mean()),
        "enlarged_l2": float(F.mse_loss(enlarged, test)),
        "black_l2": float(test.square().mean()),
        "input_l2": float(torch.cat(shares).mean()),
        "input_black_l2": float(small.square().mean()),
        **_about(study, fitted.history, len(train)),
        "pictures": _keep_pictures(folder, key, {**pictures, "reference": shown}),
    }


def train_autoencoder(
    study: SmokeTransfer, part: str, model: str, seed: int, folder: Path, device: str = "auto"
) -> dict[str, Any]:
    """Phase II: trains an auto-encoder, from A's layers ("std", "rr") or from "scratch"; keeps its pictures, returns its row."""
    train, test = _images(study, part)
    training = Training(study.epochs[1], study.batch_size, study.learning_rates[2], seed, device)
    place = training.fabric().device
    autoencoder = smoke_autoencoder(train.shape[1], study.width, seed=seed + 2_000)
    reused: list[str] = []
    if model != "scratch":
        reused = reuse_layers(autoencoder.generator, _weights(folder, _key(study, "A", model, seed)))

    def loss(_: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        images = _turned(batch[0])
        with _precision(study, place):
            made = autoencoder(images)
        return {"loss": F.mse_loss(made.float(), images)}

    autoencoder.to(place)
    before = _test_error(autoencoder, test)
    fitted = fit(autoencoder, (train,), loss, training, description=f"smoke {part}, {model}")
    autoencoder.eval()
    with torch.no_grad():
        shown = _shown(study, part).to(place)
        pictures = {"output": autoencoder(shown), "reference": shown}
    return {
        "l2": _test_error(autoencoder, test),
        "before_l2": before,
        "black_l2": float(test.square().mean()),
        "reused": reused,
        **_about(study, fitted.history, len(train)),
        "pictures": _keep_pictures(folder, _key(study, part, model, seed), pictures),
    }


def _test_error(autoencoder: nn.Module, test: Tensor) -> float:
    place = next(autoencoder.parameters()).device
    with torch.no_grad():
        errors = [F.mse_loss(autoencoder(x), x, reduction="none").flatten(1).mean(1) for x in test.to(place).split(64)]
    return float(torch.cat(errors).mean())


def _about(study: SmokeTransfer, history: list[Epoch], images: int) -> dict[str, Any]:
    steps = -(-images // study.batch_size) * max(len(history) - 1, 1)
    return {
        "history": [{"epoch": e.epoch, **e.losses} for e in history[1:]],
        "images": images,
        "seconds_per_step": sum(e.seconds for e in history) / steps,
    }


def _keep_weights(folder: Path, key: dict[str, Any], generator: SmokeGenerator) -> None:
    path = _weights_file(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in generator.state_dict().items()}, part)
    os.replace(part, path)


def _weights_file(folder: Path, key: dict[str, Any]) -> Path:
    return folder / "weights" / f"{RunStore(folder).key(key)}.safetensors"


def _weights(folder: Path, key: dict[str, Any]) -> dict[str, Tensor]:
    path = _weights_file(folder, key)
    if not path.exists():
        row = folder / "rows" / f"{path.stem}.json"
        raise FileNotFoundError(f"{path} is gone, the weights of a finished run: delete {row} to train it again")
    return load_file(path)


def _keep_pictures(folder: Path, key: dict[str, Any], pictures: dict[str, Tensor]) -> str:
    """Writes pictures beside the rows, as they are (not clipped); returns the file's place in the folder."""
    name = f"pictures/{RunStore(folder).key(key)}.npz"
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.{uuid.uuid4().hex}.part"
    arrays: dict[str, Any] = {n: t.float().cpu().numpy().astype(np.float16) for n, t in pictures.items()}
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(part, folder / name)
    return name
