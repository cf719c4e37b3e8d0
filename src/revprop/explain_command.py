"""``revprop explain``: what one unit's value consists of, for one image."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor

from revprop.command_model import Model, console
from revprop.datasets import ImageData
from revprop.datasets.image_folder import decode_image
from revprop.experiments import explanation
from revprop.graph import trace
from revprop.report import unit_words, write_explanation
from revprop.training import Training

__all__ = ["Explain"]


@dataclass(frozen=True)
class Explain:
    """What one unit's value consists of, for one image: the image's part and each layer's, as text and as pictures."""

    model: tyro.conf.OmitArgPrefixes[Model]
    image: str = "0"
    """The number of an image of the test set, or an image file."""
    layer: str = "output"
    unit: tuple[int, ...] = ()
    """Its index in the layer, e.g. 3, or 12 4 5 (channel, row, column); the largest one where not given."""
    mode: str = "unit"
    """unit: an entry of the layer; or one of the paper's: RM0 logit, RM1 channel, RM2 position, RM3 channel slice, RM4 slice."""
    float64: bool = False
    """Compute in double precision."""
    maps: str | None = None
    """The layer whose feature maps are compared with reconstructed ones."""

    def run(self) -> None:
        split = self.model.split()
        images, name = _chosen(split.test, self.image)
        device = Training(device=self.model.device).fabric().device
        model, _ = self.model.trained(lambda: self.model.inputs(split))
        x = self.model.scaled(images).to(device)
        graph = trace(model.to(device), torch.cat([x, x]))
        row = explanation.run(graph, x, self.layer, self.unit, self.mode, self.float64, self.maps)
        page = (
            self.model.out / f"explain-{_file_name(self.layer, row['mode'], *row['unit'], Path(self.image).name)}.html"
        )
        classes = split.test.classes
        of_class = self.layer == "output" and graph.shape(graph.output) == (len(classes),)
        named = classes[row["unit"][0]] if of_class else ""
        label = classes[int(images.labels[0])] if self.image.isdigit() else ""
        write_explanation(page, row, _picture(images), name, self.model.network, named, label)
        for line in (
            f"{unit_words(row)}{f' ({named})' if named else ''}, {name}{f', labelled {label}' if label else ''}",
            row["text"],
            f"page: {page}",
        ):
            console.print(line, markup=False, highlight=False)


def _chosen(data: ImageData, image: str) -> tuple[ImageData, str]:
    """One image, and words for it."""
    if not image.isdigit():
        return _from_file(data, Path(image)), Path(image).name
    if int(image) >= len(data):
        raise ValueError(f"image: expected a number from 0 to {len(data) - 1}, or a file, given {image}")
    return data.subset([int(image)]), f"image {image} of {data.name}"


def _from_file(data: ImageData, path: Path) -> ImageData:
    """An image file in the size and with the channels of the data: the largest central part of its shape, resized."""
    if not path.is_file():
        raise FileNotFoundError(f"image: expected a number or a JPEG or PNG file, and there is no file {path}")
    channels, *size = data.images.shape[1:]
    rgb = Image.fromarray(decode_image(path.read_bytes(), str(path), None).transpose(1, 2, 0))
    fitted = ImageOps.fit(rgb, (size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.array(fitted.convert("L") if channels == 1 else fitted).reshape(*size, -1).transpose(2, 0, 1)
    return replace(data, images=torch.from_numpy(pixels.copy())[None], labels=data.labels[:1])


def _picture(images: ImageData) -> Tensor:
    """An image as a person sees it, (rows, columns) or (rows, columns, 3), 0 to 1."""
    pixels = images.images[0].permute(1, 2, 0).float() / 255
    return pixels if pixels.shape[2] == 3 else pixels[..., 0]


def _file_name(*parts: object) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(map(str, parts))).strip("-")
