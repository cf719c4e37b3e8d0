"""The networks of the feature alignment paper (Tables 7 to 12), as its parameter counts tell them.

Counts that these give, in millions (VAE; the GAN's generator; VFA, which has a layer of ten classes but for STL-10; VFA with its
generator), beside those of Tables 3 to 6. Tables 5 and 6 print ten times as much: their unit is 10^5, as Table 3's heading says.

    MNIST      27.40  13.44  14.00  14.16     printed 27.40  13.44  14.0   14.16
    CelebA     37.48  18.48  19.04  19.24     printed 37.48  18.48  19.04  19.24
    CIFAR-10    9.76   4.75   5.03   5.20     printed 97.55  47.48  50.28  51.95
    STL-10     25.42   3.27  22.15  22.99     printed 254.22 32.74 221.48 229.90    (512 latent variables; elsewhere 128)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revprop.networks.fr_pt import seed_parameters

__all__ = ["PAPER", "PaperSize", "Refiner", "decoder", "discriminator", "encoder", "local_layers", "refiner", "trunk"]

Shape = Sequence[int]


@dataclass(frozen=True)
class PaperSize:
    """The sizes for one data set.

    Attributes:
        shape: of an image. hidden: of the hidden linear layer. latent: variables. classes: of the class layer, 0 for none.
        mirrored: whether a decoder has the hidden layer, too. kernels: of the generator that improves images.
    """

    shape: tuple[int, int, int]
    hidden: int = 4096
    latent: int = 128
    classes: int = 10
    mirrored: bool = True
    kernels: tuple[int, int, int] = (3, 3, 3)


PAPER = {
    "mnist": PaperSize((1, 28, 28)),
    "cifar10": PaperSize((3, 32, 32), 2048),
    "celeba": PaperSize((3, 64, 64)),
    "stl10": PaperSize((3, 64, 64), latent=512, classes=0, mirrored=False, kernels=(7, 7, 7)),
}
"""The paper's sizes by data set."""


def blocks(shape: Shape) -> int:
    """How many pairs of convolutions an image gets: 2 up to 28 pixels, 3 up to 32, 4 beyond (Tables 7, 8 and 9)."""
    return 2 if shape[1] <= 28 else 3 if shape[1] <= 32 else 4


def trunk(
    shape: Shape, hidden: int = 4096, width: int = 32, batch_norm: bool = False, seed: int | None = None
) -> nn.Sequential:
    """Tables 7 to 9 without their last layer: pairs of 3x3 convolutions, the second of stride 2, then a hidden linear layer.

    Args:
        shape: (c, h, w) of an image. hidden: outputs. width: channels of the first pair; the next has twice as many, and so on.
        batch_norm: behind each convolution of stride 2 (Table 10). seed: of the parameters; None draws from the global generator.

    Returns:
        (n, c, h, w) -> (n, hidden).

    >>> sum(p.numel() for p in trunk((1, 28, 28), hidden=64, seed=0).parameters())
    265760
    """
    with seed_parameters(seed):
        layers: list[nn.Module] = []
        channels = shape[0]
        for block in range(blocks(shape)):
            out = width * 2**block
            layers += [nn.Conv2d(channels, out, 3, 1, 1), nn.LeakyReLU(), nn.Conv2d(out, out, 3, 2, 1), nn.LeakyReLU()]
            layers += [nn.BatchNorm2d(out)] if batch_norm else []
            channels = out
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * _small(shape) ** 2, hidden), nn.LeakyReLU())


def encoder(
    shape: Shape, latent: int = 128, hidden: int = 4096, width: int = 32, seed: int | None = None
) -> nn.Sequential:
    """Tables 7 to 9: the trunk and a linear layer of ``latent`` outputs. Args: those of :func:`trunk`.

    >>> import torch
    >>> encoder((3, 32, 32), 10, hidden=64, seed=0)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    with seed_parameters(seed):
        return nn.Sequential(*trunk(shape, hidden, width), nn.Linear(hidden, latent))


def discriminator(
    shape: Shape, hidden: int = 4096, width: int = 32, batch_norm: bool = False, seed: int | None = None
) -> nn.Sequential:
    """The trunk and one output.

    Args:
        batch_norm: as Table 10 prints it. The text ("only the generator") and the published code have none in it.
    """
    with seed_parameters(seed):
        return nn.Sequential(*trunk(shape, hidden, width, batch_norm), nn.Linear(hidden, 1))


class _Cut(nn.Module):
    """Images cut to a size: what doubling gives too much of where a size is odd."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.size, : self.size]


def decoder(
    shape: Shape,
    latent: int = 128,
    hidden: int = 4096,
    width: int = 32,
    seed: int | None = None,
    mirrored: bool = True,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Table 12: two linear layers, which mirror the encoder's as the parameter counts tell, then transposed convolutions.

    Args:
        shape: (c, h, w) of the images made. latent: inputs. mirrored: False: one linear layer, as the table prints and as the
            count for STL-10 tells. batch_norm: behind each layer but the last, linear ones too. Not published (there is no room
            for it in the counts); a GAN's generator that is trained for a short time may make one image for all codes without
            it. Others: those of :func:`trunk`.

    Returns:
        (n, latent) -> (n, c, h, w), in (0, 1): a sigmoid is behind it.

    >>> import torch
    >>> decoder((1, 28, 28), 2, hidden=64, seed=0)(torch.zeros(3, 2)).shape
    torch.Size([3, 1, 28, 28])
    """
    with seed_parameters(seed):
        count, small = blocks(shape), _small(shape)
        channels = width * 2 ** (count - 1)
        layers: list[nn.Module] = [nn.Linear(latent, hidden), nn.LeakyReLU()] if mirrored else []
        layers.append(nn.Linear(hidden if mirrored else latent, channels * small**2))
        layers += [nn.LeakyReLU(), nn.Unflatten(1, (channels, small, small))]
        size = small
        for block in reversed(range(count)):
            larger = -(-shape[1] // 2**block)
            layers += [
                nn.ConvTranspose2d(channels, channels, 3, 2, 1, 1),
                *([_Cut(larger)] if larger < 2 * size else []),
            ]
            size, last = larger, block == 0
            out = shape[0] if last else width * 2 ** (block - 1)
            layers += [
                nn.LeakyReLU(),
                nn.Conv2d(channels, out, 3, 1, 1) if last else nn.ConvTranspose2d(channels, out, 3, 1, 1),
            ]
            layers += [nn.Sigmoid() if last else nn.LeakyReLU()]
            channels = out
        return nn.Sequential(*(_normalised(layers) if batch_norm else layers))


def _normalised(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Batch norm behind each linear layer and each convolution but the last."""
    found: list[nn.Module] = []
    for layer in layers:
        found.append(layer)
        if isinstance(layer, nn.Linear):
            found.append(nn.BatchNorm1d(layer.out_features))
        elif isinstance(layer, nn.ConvTranspose2d):
            found.append(nn.BatchNorm2d(layer.out_channels))
    return found


class Refiner(nn.Module):
    """Three convolutions that improve an image, of the same size as it is; the first sees one more channel, made of the class.

    Args: those of :func:`refiner`.
    """

    def __init__(self, shape: Shape, width: int, kernels: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, across = shape
        plane = [nn.Linear(classes, height * across), nn.Unflatten(1, (1, height, across))] if classes else []
        self.plane = nn.Sequential(*plane)
        first, middle, last = kernels
        self.layers = nn.Sequential(
            nn.Conv2d(channels + bool(classes), width, first, padding=first // 2),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(),
            nn.Conv2d(width, width, middle, padding=middle // 2),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(),
            nn.Conv2d(width, channels, last, padding=last // 2),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """(n, c, h, w), and (n, classes) where there are classes -> (n, c, h, w), in (0, 1)."""
        return self.layers(images if classes is None else torch.cat([images, self.plane(classes)], 1))


def refiner(
    shape: Shape,
    width: int = 128,
    kernels: tuple[int, int, int] = (3, 3, 3),
    classes: int = 0,
    seed: int | None = None,
) -> Refiner:
    """The generator that improves inverted images: as the text says it, of kernels of 3 and with batch norm.

    The counts of Tables 3 to 5 are those of such a network with a linear layer from the class to one more channel, which the
    published code has; that of Table 6, without classes, fits kernels of 7. Table 11 prints kernels of 7 and no batch norm.

    Args:
        shape: (c, h, w) of an image. width: channels within. classes: of the one-hot vector that is given, too; 0 for none.

    >>> sum(p.numel() for p in refiner((1, 28, 28), classes=10, seed=0).parameters())
    160305
    """
    with seed_parameters(seed):
        return Refiner(shape, width, kernels, classes)


def local_layers(
    shape: Shape, latent: int = 128, hidden: int = 4096, width: int = 32, seed: int | None = None
) -> list[nn.Module]:
    """The layers of Tables 7 to 9 one by one, without their activations: for training layer by layer.

    >>> [type(layer).__name__ for layer in local_layers((1, 8, 8), 2, 16, seed=0)]
    ['Conv2d', 'Conv2d', 'Conv2d', 'Conv2d', 'Sequential', 'Linear']
    """
    found: list[nn.Module] = []
    for layer in encoder(shape, latent, hidden, width, seed):
        if isinstance(layer, nn.Linear) and not any(isinstance(part, nn.Sequential) for part in found):
            found.append(nn.Sequential(nn.Flatten(), layer))
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            found.append(layer)
    return found


def _small(shape: Shape) -> int:
    """Height and width behind all convolutions: halved as often, rounded up."""
    return -(-shape[1] // 2 ** blocks(shape))
