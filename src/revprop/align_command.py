"""``revprop align``: encoders that are their own decoders, and what they are compared with, trained and asked for images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from revprop.alignment import AlignmentSettings
from revprop.command_model import console
from revprop.datasets import ImageData
from revprop.experiments import alignment_model
from revprop.experiments.alignment_images import sheet
from revprop.experiments.alignment_model import AlignmentModel
from revprop.experiments.baseline import load_split
from revprop.networks import feature_alignment

__all__ = ["Align"]

Name = Literal["ae", "vae", "gan", "fa", "vfa", "vfa-gan", "local"]
PRESETS = {"paper": "published-code", "published-code": "paper"}  # and the one it is told apart from
SAMPLED = ("vae", "gan", "vfa", "vfa-gan")
ACROSS = 8


@dataclass(frozen=True)
class _Train:
    """Train a model, or go on with one that was stopped."""

    model: Name
    """ae, vae, gan: what is compared; fa: feature alignment; vfa: variational; vfa-gan: with a generator; local: layer by layer."""
    data: str
    """A name (digits, mnist, cifar10-jpeg, ...) or the path of a file or folder."""
    hidden: int = 512
    """Neurons of the hidden layer; published: 4096 (CIFAR-10: 2048)."""
    width: int = 16
    """Channels of the first convolutions; published: 32."""
    latent: int = 128
    """Latent variables."""
    by_class: bool = True
    """vfa, vfa-gan: with a layer that tells the classes, so that one can be asked for."""
    preset: Literal["paper", "published-code"] = "published-code"
    """Settings as the paper's text has them, or its published code; what differs is printed."""
    learning_rate: float | None = None
    """The preset's where not given, which is for long training: 3e-4 suits short ones."""
    generator_rate: float | None = None
    """gan, vfa-gan: the generator's learning rate, where not the same: 1e-3 suits short training."""
    perceptual: float | None = None
    """vfa-gan: the weight of the perceptual loss, the preset's where not given: 0.01 suits short training."""
    epochs: int = 10
    samples: int = 0
    """Train on so many images; 0 for all."""
    out: Path = Path("out/align")
    """Folder for results; running again continues."""
    seed: int = 0
    device: str = "auto"

    def run(self) -> None:
        for name in ("learning_rate", "generator_rate"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"{name}: expected a positive number, given {rate}")
        for name, models in (("generator_rate", ("gan", "vfa-gan")), ("perceptual", ("vfa-gan",))):
            if getattr(self, name) is not None and self.model not in models:
                raise ValueError(f"{name}: {self.model} has none; it is of {' and '.join(models)}")
        chosen = AlignmentModel(
            self.model,
            self.data,
            self.hidden,
            self.width,
            self.latent,
            self.by_class,
            _stored(self.preset),
            self.learning_rate or 0.0,
            self.generator_rate or 0.0,
            self.perceptual,
            self.epochs,
            self.samples,
            self.seed,
        )
        split = load_split(self.data, self.out)
        _say(*_preset_lines(self), *_size_lines(self, split.train))
        row = alignment_model.run(chosen, split, self.out, self.device, progress=True)
        losses = ", ".join(f"{name} {value:.3g}" for name, value in row["losses"].items())
        _say(
            f"{row['parameters']:,} parameters, {self.epochs} epochs in {row['seconds']:.0f} s; in the last: {losses}",
            f"|x - reconstruction|^2 = {row['error']:.2f} per test image",
            f"weights: {chosen.weights(self.out)}",
            *_next_steps(self.model, self.out),
        )


@dataclass(frozen=True)
class _Sample:
    """New images, as a PNG file."""

    model: Name
    """A model that was trained into --out; the last one of this name."""
    count: int = 32
    label: str | None = None
    """Only of this class."""
    emphasis: float = 1.0
    """The height of the one-hot target of a class."""
    temperature: float = 1.0
    """The standard deviation of the latent variables."""
    out: Path = Path("out/align")
    png: Path | None = None
    """The file to write; in --out where not given."""
    seed: int = 0

    def run(self) -> None:
        _at_least(1, count=self.count)
        if self.model not in SAMPLED:
            known = ", ".join(SAMPLED)
            raise ValueError(f"{self.model} has no distribution of codes to sample from; these have: {known}")
        model, chosen, row, _ = _trained(self.model, self.out)
        options: dict[str, Any] = {}
        if row["classes"]:
            options["emphasis"] = self.emphasis
        if self.label is not None:
            if self.label not in row["classes"]:
                known = (
                    f"one of {', '.join(row['classes'])}" if row["classes"] else "none, as this model has no classes"
                )
                raise ValueError(f"label: expected {known}, given {self.label}")
            options["labels"] = torch.full((self.count,), row["classes"].index(self.label))
        generator = torch.Generator().manual_seed(self.seed)
        images = model.sample(self.count, temperature=self.temperature, generator=generator, **options)
        _write(images, self.png or self.out / f"{self.model}-samples.png", chosen)


@dataclass(frozen=True)
class _Reconstruct:
    """Test images beside what the model gives back of them, as a PNG file."""

    model: Name
    """A model that was trained into --out; the last one of this name."""
    count: int = 16
    """So many of the test set."""
    out: Path = Path("out/align")
    png: Path | None = None
    """The file to write; in --out where not given."""

    def run(self) -> None:
        _at_least(1, count=self.count)
        model, chosen, _, test = _trained(self.model, self.out)
        x = alignment_model.pixels(test, chosen.preset)[: self.count]
        back = model.reconstruct(x)
        across = min(len(x), ACROSS)
        lines = [line for pair in zip(_lines(x, across), _lines(back, across), strict=True) for line in pair]
        _write(torch.cat(lines), self.png or self.out / f"{self.model}-reconstructions.png", chosen, across)
        error = float((x - back).square().sum((1, 2, 3)).mean())
        _say(
            f"in turn a line of originals and a line of reconstructions; |x - reconstruction|^2 = {error:.2f} per image"
        )


@dataclass(frozen=True)
class _Interpolate:
    """Images on the way from one test image to another, as a PNG file."""

    model: Name
    """A model that was trained into --out; the last one of this name."""
    first: int = 0
    """The number of an image of the test set."""
    last: int = 1
    """And of another."""
    steps: int = 8
    """So many images, both ends included."""
    out: Path = Path("out/align")
    png: Path | None = None
    """The file to write; in --out where not given."""

    def run(self) -> None:
        _at_least(2, steps=self.steps)
        model, chosen, _, test = _trained(self.model, self.out)
        for name, index in (("first", self.first), ("last", self.last)):
            if not 0 <= index < len(test):
                raise ValueError(f"{name}: expected the number of a test image, 0 to {len(test) - 1}, given {index}")
        x = alignment_model.pixels(test.subset([self.first, self.last]), chosen.preset)
        images = alignment_model.interpolate(model, x[:1], x[1:], self.steps)[0]
        strip = torch.cat([x[:1], images, x[1:]])
        _write(strip, self.png or self.out / f"{self.model}-{self.first}-{self.last}.png", chosen, len(strip))
        _say("the outermost two are the test images themselves")


@dataclass(frozen=True)
class Align:
    """Train encoders that are their own decoders, and draw what they make: samples, reconstructions, interpolations."""

    action: tyro.conf.OmitSubcommandPrefixes[
        Annotated[_Train, tyro.conf.subcommand("train")]
        | Annotated[_Sample, tyro.conf.subcommand("sample")]
        | Annotated[_Reconstruct, tyro.conf.subcommand("reconstruct")]
        | Annotated[_Interpolate, tyro.conf.subcommand("interpolate")]
    ]

    def run(self) -> None:
        self.action.run()


def _stored(preset: str) -> str:
    """A preset's name as rows have it."""
    return preset.replace("-", "_")


def _preset_lines(train: _Train) -> list[str]:
    other = PRESETS[train.preset]
    here, there = (AlignmentSettings.named(_stored(name)) for name in (train.preset, other))
    lines = [f"settings: {train.preset}. Where {other} differs:"]
    lines += [f"  {name}: {mine} ({other}: {its})" for name, mine, its in here.differences(there)]
    asked = {name: getattr(train, name) for name in ("learning_rate", "generator_rate", "perceptual")}
    lines += [f"  but {name}: {value:g}, as asked for" for name, value in asked.items() if value is not None]
    return lines


def _size_lines(train: _Train, images: ImageData) -> list[str]:
    """What the networks lack of the published size, and have besides."""
    alike = [size for size in feature_alignment.PAPER.values() if size.shape == tuple(images.images.shape[1:])]
    published = alike[0].hidden if alike else 4096
    said = []
    if (train.hidden, train.width) != (published, 32):
        said.append(f"networks: {train.hidden} hidden neurons, {train.width} channels (published: {published}, 32)")
    if train.model == "gan":
        said.append("the generator has batch norm behind each layer (published: none)")
    return said


def _next_steps(model: str, out: Path) -> list[str]:
    actions = ["reconstruct", "interpolate", *(["sample"] if model in SAMPLED else [])]
    return [f"next: revprop align {action} --model {model} --out {out}" for action in actions]


def _trained(name: str, out: Path) -> tuple[Any, AlignmentModel, dict[str, Any], ImageData]:
    chosen, row = alignment_model.find(out, name)
    test = load_split(chosen.data, out).test
    return alignment_model.load(chosen, test, out), chosen, row, test


def _at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, given {value}")


def _lines(images: Tensor, across: int) -> tuple[Tensor, ...]:
    """So many images each, the last filled up with white ones."""
    white = images.new_ones(-len(images) % across, *images.shape[1:])
    return torch.cat([images, white]).split(across)


def _write(images: Tensor, path: Path, chosen: AlignmentModel, across: int = ACROSS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(images, across).save(path, "PNG")
    _say(f"{chosen.model} of {chosen.data}, {chosen.epochs} epochs, {chosen.preset.replace('_', ' ')}: {path}")


def _say(*lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False)
