"""Feature alignment on images: every model trained alike, and what its images are worth (Table 2, Figures 7, 8 and 15)."""

from __future__ import annotations

import base64
import copy
import io
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from PIL import Image
from torch import Tensor, nn

from revprop.alignment import (
    AlignmentSettings,
    FeatureAligned,
    FeatureAlignedGAN,
    Sizes,
    VariationalFeatureAligned,
    frechet_distance,
    paper_model,
)
from revprop.experiments.alignment_training import AdamWith, generator_rates, train_generative
from revprop.experiments.baseline import Baseline, load_baseline, load_baseline_data, load_split, save_weights
from revprop.graph import trace
from revprop.networks.feature_alignment import PAPER
from revprop.reconstruction import reconstruct
from revprop.runs import Row, RunStore
from revprop.sweep import SweepOptions, Task, sweep
from revprop.training import Training, accuracy_of

__all__ = ["MODELS", "AlignmentImages", "as_png", "measure", "run", "settings", "sheet", "without_last"]

MODELS = ("ae", "vae", "gan", "fa", "vfa", "vfa-gan", "local")
ACROSS = 8
CLOSED = 16  # images whose codes are inverted both ways
EMPHASES = (1.0, 2.0, 3.0, 4.0)  # how high the one-hot target of a class is, line by line
SHOWN = 1000  # codes of a latent plane
SHORT: dict[str, Any] = {"learning_rate": 3e-4, "generator_rate": 1e-3}  # of few epochs
OWN = {
    "perceptual": ("vfa-gan",),
    "kernels": ("vfa-gan",),
    "refiner": ("vfa-gan",),
    "normalised": ("gan",),
    "generator_rate": ("gan", "vfa-gan"),
}
"""Settings that are of some models only, and not in the rows of others."""


@dataclass(frozen=True)
class AlignmentImages:
    """What is trained and measured.

    Attributes:
        classifier: a network trained on the data set, which judges images in [0, 1]. models, seeds: which, and how often.
        sizes: of the networks, alike for all. preset: of the settings; learning_rate: another than its own, 0 for its own;
            generator_rate: another than that for generators, 0 for the same.
        epochs: of ``samples`` training images. images: so many reconstructions and samples are measured, against as many real
            test images. reduced: what differs from the published setting.
        training: another data set of the same size to train on, whose labels are not looked at, "" for the classifier's.
        perceptual: another weight of the generator's perceptual loss than the preset's.
    """

    classifier: Baseline = Baseline(
        "mnist-lenet", "mnist", mean=(0.0,), std=(1.0,), weights="checkpoints/mnist_lenet.safetensors"
    )
    sizes: Sizes = Sizes(PAPER["mnist"].shape, classes=10)
    models: tuple[str, ...] = MODELS
    seeds: tuple[int, ...] = (0, 1, 2)
    preset: str = "published_code"
    learning_rate: float = 0.0
    epochs: int = 100
    samples: int = 60_000
    images: int = 10_000
    reduced: str = ""
    training: str = ""
    perceptual: float | None = None
    generator_rate: float = 0.0


def settings(scale: str, seeds: int | None = None) -> AlignmentImages:
    """The settings on MNIST at a scale.

    Args:
        scale: "paper": the paper's networks, its published code's settings, all images (for a GPU); "reduced": an eighth of the
            hidden neurons, half of the channels, for all models alike, three times the learning rate, generators ten times;
            "smoke": scikit-learn's digits.
        seeds: so many runs of each model.

    Raises:
        ValueError: an unknown scale, or fewer than one seed.

    >>> settings("reduced").sizes.hidden
    512
    """
    from revprop.experiments.catalogue import check_scale  # here: the catalogue lists this module

    check_scale(scale, seeds)
    chosen = tuple(range(seeds or (1 if scale == "smoke" else 3)))
    if scale == "paper":
        return AlignmentImages(seeds=chosen)
    if scale == "reduced":
        words = "512 hidden neurons, 16 channels, a learning rate of 0.0003, 10 epochs of 20,000 images, 1,000 images measured"
        sizes = Sizes(PAPER["mnist"].shape, 512, 16, classes=10, refiner=16, normalised=True)
        study = AlignmentImages(sizes=sizes, seeds=chosen, epochs=10, samples=20_000, images=1000, reduced=words)
        return replace(study, **SHORT, perceptual=0.01)
    digits = Baseline("digits", "digits", 10, 64, mean=(0.0,), std=(1.0,))
    sizes = Sizes((1, 8, 8), 32, 4, 8, 10, refiner=4)
    return AlignmentImages(digits, sizes, MODELS, chosen, "published_code", 1e-3, 2, 500, 200, "scikit-learn's digits")


def measure(study: AlignmentImages, name: str, seed: int, folder: Path, device: str) -> dict[str, Any]:
    """Trains one model and measures it.

    Returns:
        "error": ``|x - reconstruction|^2`` per image; "accuracy" of the classifier on reconstructions, and "accuracy_real";
        "frechet" and "frechet_reconstruction": the distance from as many real test images, in the features in front of the
        classifier's last layer, and "frechet_real" between two halves of those; "parameters"; "seconds" of an epoch;
        "history"; "grids": PNG images in base64. For "fa" also "inverted": how ``invert`` and ``reconstruct`` compare.
        With two latent variables "plane": codes and labels of test images.
    """
    chosen = AlignmentSettings.named(study.preset)
    if study.perceptual is not None:
        chosen = replace(chosen, perceptual=study.perceptual)
    data, judge, accuracy_real = _prepared(study, folder)
    features = without_last(judge)
    x, y = (t[: study.samples] for t in _training_images(study, data.train, folder))
    real, labels = (t[: study.images] for t in data.test)
    model = paper_model(name, study.sizes, chosen, seed)
    rate = study.learning_rate or chosen.learning_rate
    key = _key(study, name, seed)
    checkpoint = folder / "checkpoints" / f"{name}-{RunStore(folder).key(key)}"
    training = Training(
        study.epochs, chosen.batch_size, rate, seed, device, checkpoint=checkpoint, recipe=AdamWith(betas=chosen.betas)
    )
    rates = generator_rates(model, study.generator_rate)
    history = train_generative(model, (chosen.clamp(x), y), training, key, rates=rates)
    found = cast("Any", model.cpu())
    back = torch.cat([found.reconstruct(part) for part in real.split(500)])
    result: dict[str, Any] = {
        "error": float((real - back).square().sum((1, 2, 3)).mean()),
        "accuracy": accuracy_of(judge, [(back, labels)]),
        "accuracy_real": accuracy_real,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": history[-1].seconds,
        "history": [e.losses for e in history[1:]],
    }
    grids = {"reconstruction": torch.cat([real[:ACROSS], back[:ACROSS]])}
    with torch.no_grad():
        seen = features(real)
        half = len(seen) // 2
        result["frechet_real"] = frechet_distance(seen[:half], seen[half : 2 * half])
        result["frechet_reconstruction"] = frechet_distance(seen, features(back))
    if hasattr(model, "sample"):
        generator = torch.Generator().manual_seed(seed)
        made = torch.cat([found.sample(min(500, len(real) - i), generator=generator) for i in range(0, len(real), 500)])
        with torch.no_grad():
            result["frechet"] = frechet_distance(seen, features(made))
        grids["samples"] = made[: 4 * ACROSS]
    if hasattr(model, "interpolate"):
        grids["interpolation"] = found.interpolate(real[:4], real[4:8], ACROSS).flatten(0, 1)
    if isinstance(model, FeatureAligned):
        result["inverted"] = _closed_loop(model, real[:CLOSED])
    result["grids"] = {what: as_png(images, ACROSS) for what, images in grids.items()}
    if isinstance(model, VariationalFeatureAligned | FeatureAlignedGAN) and study.sizes.classes:
        result["grids"]["classes"] = as_png(_class_by_class(model, study.sizes.classes, seed), study.sizes.classes)
    if study.sizes.latent == 2 and isinstance(model, VariationalFeatureAligned):
        with torch.no_grad():
            codes = model(real[:SHOWN])[0]
        result["plane"] = {
            "codes": [[round(v, 4) for v in c] for c in codes.tolist()],
            "labels": labels[:SHOWN].tolist(),
        }
    save_weights(model, folder / "models" / f"{checkpoint.name}.safetensors")
    shutil.rmtree(checkpoint, ignore_errors=True)  # three times the size of the weights
    return result


def _training_images(study: AlignmentImages, own: tuple[Tensor, Tensor], folder: Path) -> tuple[Tensor, Tensor]:
    if not study.training:
        return own
    everything = load_split(study.training, folder / "cache").train
    found = everything.subset(range(min(study.samples, len(everything))))
    return found.images.float() / 255, found.labels


def _class_by_class(model: VariationalFeatureAligned | FeatureAlignedGAN, classes: int, seed: int) -> Tensor:
    """Of latent variables at zero every class, more and more emphasised: Figure 6b."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes)
    return torch.cat([model.sample(classes, labels, height, 0.0, generator) for height in EMPHASES])


def _closed_loop(model: FeatureAligned, x: Tensor) -> dict[str, dict[str, float]]:
    """``invert`` and ``reconstruct`` from zeros for the same codes: errors in the image and in the code, and seconds."""
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        z = model(x)
        graph = trace(model.module, x[:2])
        ways: dict[str, Callable[[], Tensor]] = {
            "invert": lambda: model.invert(z),
            "reconstruct, global": lambda: reconstruct(graph, torch.zeros_like(x), target=z, to="input")["input"],
        }
        for name, way in ways.items():
            began = time.perf_counter()
            back = way()
            seconds = time.perf_counter() - began
            found[name] = {
                "error": float((x - back).square().sum((1, 2, 3)).mean()),
                "code": float((model(back) - z).norm() / z.norm()),
                "seconds": seconds,
            }
    return found


def without_last(model: nn.Module) -> nn.Module:
    """A copy of a classifier that stops in front of its last linear layer: its features.

    Raises:
        ValueError: it has none.

    >>> without_last(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))(torch.zeros(1, 4)).shape
    torch.Size([1, 3])
    """
    copied = copy.deepcopy(model).eval()
    names = [name for name, part in copied.named_modules() if isinstance(part, nn.Linear)]
    if not names:
        raise ValueError("the classifier has no linear layer, so it is not known where its features are")
    copied.set_submodule(names[-1], nn.Identity())
    return copied


def sheet(images: Tensor, across: int) -> Image.Image:
    """Images (n, 1 or 3, h, w) in [0, 1] as one, so many in a line, a pixel apart."""
    n, channels, height, width = images.shape
    down = -(-n // across)
    canvas = torch.ones(channels, down * (height + 1) - 1, across * (width + 1) - 1)
    for index, image in enumerate(images.detach()):
        top, left = (index // across) * (height + 1), (index % across) * (width + 1)
        canvas[:, top : top + height, left : left + width] = image.clamp(0, 1)
    pixels = (255 * canvas).round().to(torch.uint8).movedim(0, -1).numpy()
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def as_png(images: Tensor, across: int) -> str:
    """A :func:`sheet` as a PNG file in base64."""
    buffer = io.BytesIO()
    sheet(images, across).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


@lru_cache(maxsize=1)
def _prepared(study: AlignmentImages, folder: Path) -> tuple[Any, nn.Module, float]:
    data = load_baseline_data(study.classifier, folder / "cache")
    judge, accuracy, _ = load_baseline(study.classifier, data, folder, "cpu")
    return data, judge, accuracy


def _judge(study: AlignmentImages, folder: Path) -> dict[str, Any]:
    """Makes the classifier ready, before many runs ask for it at once."""
    return {"accuracy": _prepared(study, folder)[2]}


def _key(study: AlignmentImages, name: str, seed: int) -> dict[str, Any]:
    def own(values: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in values.items() if name in OWN.get(k, (name,))}

    unsaid = ("classifier", "models", "seeds", *(() if study.training else ("training",)))
    about = {k: v for k, v in own(asdict(study)).items() if k not in unsaid} | {"sizes": own(asdict(study.sizes))}
    judge = study.classifier.settings()
    return {"kind": "alignment-images", "model": name, "seed": seed, "data": judge["data"], "judge": judge, **about}


def run(study: AlignmentImages, folder: Path, **how: Unpack[SweepOptions]) -> list[Row]:
    """Runs what has no row yet: each model with each seed.

    Returns:
        rows of kind "alignment-images", as :func:`measure` says.

    Raises:
        SweepError: some runs failed; all others are stored.
    """
    folder = folder.absolute()
    alone = replace(study, models=(), seeds=())
    judge = Task("the classifier", folder / "judges", {"judge": study.classifier.settings()}, _judge, (alone, folder))
    tasks = [judge]
    for seed in study.seeds:  # all models with one seed first: what is there can be compared
        for name in study.models:
            arguments = (alone, name, seed, folder, how.get("device", "auto"))
            tasks.append(
                Task(f"{name}, seed {seed}", folder / "rows", _key(study, name, seed), measure, arguments, judge)
            )
    rows = sweep(tasks, describe=_describe, **how)
    return [row for row in rows if row["settings"].get("kind") == "alignment-images"]


def _describe(task: Task, row: Row) -> str:
    if "error" not in row:
        return f"{task.name}: {100 * row['accuracy']:.2f} %"
    return f"{task.name}: squared error {row['error']:.2f}, {100 * row['accuracy']:.1f} % of reconstructions told right"
