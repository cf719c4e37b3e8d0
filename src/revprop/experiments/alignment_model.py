"""One of feature alignment's models trained on some data, and found again: what ``revprop align`` runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from revprop.alignment import AlignmentSettings, Sizes, Trainable, along, paper_model
from revprop.datasets import ImageData, Split
from revprop.experiments.alignment_training import AdamWith, generator_rates, train_generative
from revprop.experiments.baseline import save_weights
from revprop.networks import load_weights
from revprop.runs import Row, RunStore
from revprop.training import Training

__all__ = ["AlignmentModel", "find", "interpolate", "load", "pixels", "run"]

KIND = "alignment-model"
MEASURED = 200  # a GAN searches its codes, which takes a while
WITH_CLASSES = ("vfa", "vfa-gan")


@dataclass(frozen=True)
class AlignmentModel:
    """What is trained, on what, how.

    Attributes:
        model: a name in :data:`revprop.alignment.MODELS`. data: a name or a path. hidden, width, latent: of its networks.
        by_class: whether vfa and vfa-gan get a layer that tells the classes. preset: of the settings; learning_rate: another
            than its own, 0 for its own; generator_rate: another than that for generators, 0 for the same; perceptual: another
            weight of vfa-gan's perceptual loss. samples: train on so many images, 0 for all. seed: of all that is drawn.
    """

    model: str
    data: str
    hidden: int = 512
    width: int = 16
    latent: int = 128
    by_class: bool = True
    preset: str = "published_code"
    learning_rate: float = 0.0
    generator_rate: float = 0.0
    perceptual: float | None = None
    epochs: int = 10
    samples: int = 0
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What names its row."""
        return {"kind": KIND, **asdict(self)}

    def weights(self, folder: Path) -> Path:
        """Where its trained weights are."""
        return folder / "models" / f"{self.model}-{RunStore(folder).key(self.settings())}.safetensors"

    def build(self, images: ImageData) -> nn.Module:
        """The model for such images, untrained.

        Raises:
            ValueError: images that are not square; sizes below 1; an unknown model or preset.

        >>> from revprop.datasets import load_digits
        >>> type(AlignmentModel("vae", "digits", 16, 4, 2).build(load_digits().test)).__name__
        'VAE'
        """
        shape = tuple(images.images.shape[1:])
        if shape[1] != shape[2]:
            raise ValueError(f"expected square images, given {shape[1]}x{shape[2]} pixels: cut them")
        for name in ("hidden", "width", "latent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, given {getattr(self, name)}")
        classes = len(images.classes) if self.by_class and self.model in WITH_CLASSES else 0
        chosen = AlignmentSettings.named(self.preset)
        if self.perceptual is not None:
            chosen = replace(chosen, perceptual=self.perceptual)
        sizes = Sizes(shape, self.hidden, self.width, self.latent, classes if classes > 1 else 0)
        sizes = replace(sizes, refiner=4 * self.width, normalised=True)
        return paper_model(self.model, sizes, chosen, self.seed)


def pixels(images: ImageData, preset: str) -> Tensor:
    """Images as a preset's models are given them: (n, c, h, w), between its lowest and highest value.

    >>> from revprop.datasets import load_digits
    >>> [round(float(edge), 2) for edge in pixels(load_digits().test, "published_code").aminmax()]
    [0.01, 0.94]
    """
    return AlignmentSettings.named(preset).clamp(images.images.float() / 255)


def run(chosen: AlignmentModel, split: Split, folder: Path, device: str = "auto", progress: bool = False) -> Row:
    """Trains a model, or continues where an interrupted run stopped; its row and weights are kept in the folder.

    Returns:
        The row: "error" (``|x - reconstruction|^2`` per image, of at most 200 test images), "losses" of the last epoch,
        "parameters", "seconds", and "classes", the names of those that can be asked for.

    Raises:
        ValueError: as :meth:`AlignmentModel.build`; samples below 0. TrainingDivergedError: a loss that is not finite.
    """
    if chosen.samples < 0:
        raise ValueError(f"samples: expected at least 1, or 0 for all, given {chosen.samples}")
    return RunStore(folder / "rows").run(
        chosen.settings(), lambda _: _trained(chosen, split, folder.absolute(), device, progress)
    )


def _trained(chosen: AlignmentModel, split: Split, folder: Path, device: str, progress: bool) -> dict[str, Any]:
    preset = AlignmentSettings.named(chosen.preset)
    model = chosen.build(split.train)
    train = split.train.subset(range(min(chosen.samples, len(split.train)))) if chosen.samples else split.train
    training = Training(
        chosen.epochs,
        preset.batch_size,
        chosen.learning_rate or preset.learning_rate,
        chosen.seed,
        device,
        checkpoint=chosen.weights(folder).with_suffix(""),
        progress=progress,
        recipe=AdamWith(betas=preset.betas),
    )
    rates = generator_rates(model, chosen.generator_rate)
    x_train = pixels(train, chosen.preset)
    history = train_generative(model, (x_train, train.labels), training, chosen.settings(), rates=rates)
    x = pixels(split.test, chosen.preset)[:MEASURED]
    back = cast("Trainable", model.cpu()).reconstruct(x)
    save_weights(model, chosen.weights(folder))
    classes = getattr(getattr(model, "encoder", model), "classes", 0)
    return {
        "error": float((x - back).square().sum((1, 2, 3)).mean()),
        "losses": history[-1].losses,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": sum(epoch.seconds for epoch in history),
        "classes": list(split.train.classes) if classes else [],
    }


def find(folder: Path, model: str) -> tuple[AlignmentModel, Row]:
    """The model of this name in a folder that was trained last, and its row.

    Raises:
        FileNotFoundError: none was; the message has the command that trains one.
    """
    rows = [row for row in RunStore(folder / "rows").rows() if row["settings"].get("kind") == KIND]
    wanted = [row for row in rows if row["settings"]["model"] == model]
    if not wanted:
        others = ", ".join(sorted({row["settings"]["model"] for row in rows}))
        there = f" (there is {others})" if others else ""
        command = f"revprop align train --model {model} --data mnist --out {folder}"
        raise FileNotFoundError(f"{folder} holds no trained {model}{there}; this trains one: {command}")
    row = max(wanted, key=lambda row: row["finished"])
    names = [field.name for field in fields(AlignmentModel)]
    return AlignmentModel(**{name: row["settings"][name] for name in names if name in row["settings"]}), row


def load(chosen: AlignmentModel, images: ImageData, folder: Path) -> nn.Module:
    """The model with its trained weights, for images as it was trained on.

    Raises:
        FileNotFoundError: its weights are gone.
    """
    weights = chosen.weights(folder)
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is gone: delete {folder / 'rows'}, and train the model again")
    model = chosen.build(images)
    load_weights(model, weights)
    return model.eval()


@torch.no_grad()
def interpolate(model: nn.Module, first: Tensor, last: Tensor, count: int) -> Tensor:
    """What any of the models makes of codes on the straight line between those of two images: (n, count, c, h, w)."""
    found = cast("Any", model)
    if hasattr(model, "interpolate"):
        return found.interpolate(first, last, count)
    return along(found.invert, found(first), found(last), count)
