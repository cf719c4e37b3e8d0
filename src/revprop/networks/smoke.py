"""The networks of Racecar's smoke tests (Table 13): a super-resolution GAN, and the auto-encoder that its generator is part of."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revprop.networks.fr_pt import seed_parameters

__all__ = [
    "SmokeAutoencoder",
    "SmokeDiscriminator",
    "SmokeGenerator",
    "reuse_layers",
    "smoke_autoencoder",
    "smoke_discriminator",
    "smoke_generator",
]

GENERATOR, DISCRIMINATOR = (64, 128, 128, 64, 32), (32, 64, 128, 256)
UPSAMPLED = (1, 2)  # behind these layers the image doubles
SLOPE = 0.2  # of the leaky ReLU


def _narrowed(widths: tuple[int, ...], width: float) -> list[int]:
    if not width > 0:
        raise ValueError(f"width: expected a positive share of the published channels, given {width}")
    return [max(1, round(width * channels)) for channels in widths]


class SmokeGenerator(nn.Module):
    """Six 5x5 convolutions of stride 1 with ReLU between them; nearest-neighbour up-sampling behind the first and the second.

    Args:
        channels: of the output; the input has one. width: share of the published channels, (64, 128, 128, 64, 32).

    Raises:
        ValueError: a width that is not positive.

    Example:
        >>> import torch
        >>> SmokeGenerator(width=0.125)(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 1, 64, 64])
    """

    def __init__(self, channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        widths = [1, *_narrowed(GENERATOR, width), channels]
        for i, (into, out) in enumerate(itertools.pairwise(widths), start=1):
            self.add_module(f"conv{i}", nn.Conv2d(into, out, 5, padding=2))
            if i < len(widths) - 1:
                self.add_module(f"relu{i}", nn.ReLU())
            if i in UPSAMPLED:
                self.add_module(f"up{i}", nn.Upsample(scale_factor=2))

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """The learned layers, in forward order."""
        return [module for module in self.children() if isinstance(module, nn.Conv2d)]

    def forward(self, low: Tensor) -> Tensor:
        """Map (n, 1, h, w) to (n, channels, 4 h, 4 w)."""
        features = low
        for module in self.children():
            features = module(features)
        return features


class SmokeDiscriminator(nn.Module):
    """Four 5x5 convolutions of stride 1 with batch norm and leaky ReLU, then one linear map.

    Args:
        size: height and width of the large image in pixels. width: share of the published channels, (32, 64, 128, 256).

    Raises:
        ValueError: a width that is not positive.

    Example:
        >>> import torch
        >>> SmokeDiscriminator(32, 0.125)(torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 1])
    """

    def __init__(self, size: int = 64, width: float = 1.0) -> None:
        super().__init__()
        widths = [2, *_narrowed(DISCRIMINATOR, width)]
        layers: list[nn.Module] = []
        for into, out in itertools.pairwise(widths):
            layers += [nn.Conv2d(into, out, 5, padding=2), nn.BatchNorm2d(out), nn.LeakyReLU(SLOPE)]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1] * size * size, 1)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """Judge large images (n, 1, size, size) beside the small ones (n, 1, size / 4, size / 4): logits (n, 1), > 0 for real."""
        enlarged = F.interpolate(low, scale_factor=4)
        logits: Tensor = self.fc(self.features(torch.cat((high, enlarged), 1)).flatten(1))
        return logits


class SmokeAutoencoder(nn.Module):
    """The generator's reverse pass of Table 13 encodes, the generator itself decodes; both have the same six layers.

    The paper says that the auto-encoders reuse all six layers of the generator and names no other layer. Its table has the two
    directions of these six: the one from large to small is read as the encoder here. Each layer backwards: the bias is
    subtracted, then the transposed convolution, then ReLU; 2x2 max-pooling where the forward pass up-samples.

    Args:
        channels: of the images. width: as for :class:`SmokeGenerator`.

    Example:
        >>> import torch
        >>> autoencoder = SmokeAutoencoder(3, 0.125)
        >>> autoencoder.encode(torch.zeros(2, 3, 64, 64)).shape, autoencoder(torch.zeros(2, 3, 64, 64)).shape
        (torch.Size([2, 1, 16, 16]), torch.Size([2, 3, 64, 64]))
    """

    def __init__(self, channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        self.generator = SmokeGenerator(channels, width)

    def encode(self, images: Tensor) -> Tensor:
        """Map (n, channels, 4 h, 4 w) to the code, (n, 1, h, w)."""
        features = images
        layers = self.generator.convolutions
        for place in range(len(layers), 0, -1):
            layer = layers[place - 1]
            assert layer.bias is not None
            features = F.conv_transpose2d(features - layer.bias[:, None, None], layer.weight, padding=2).relu()
            if place - 1 in UPSAMPLED:
                features = F.max_pool2d(features, 2)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, channels, 4 h, 4 w) to themselves, through the code."""
        decoded: Tensor = self.generator(self.encode(images))
        return decoded


def reuse_layers(generator: SmokeGenerator, weights: Mapping[str, Tensor]) -> list[str]:
    """Starts the layers of a generator from those of another that fit; the others stay as they are.

    Args:
        generator: changed in place. weights: the other's state dict, of the same width.

    Returns:
        the names of the layers reused, all that have the same shape.

    Example:
        >>> reuse_layers(SmokeGenerator(3, 0.125), SmokeGenerator(1, 0.125).state_dict())
        ['conv1', 'conv2', 'conv3', 'conv4', 'conv5']
    """
    own = generator.state_dict()
    layers = [name for name, module in generator.named_children() if isinstance(module, nn.Conv2d)]
    fitting = [name for name in layers if own[f"{name}.weight"].shape == weights[f"{name}.weight"].shape]
    own.update({name: tensor for name, tensor in weights.items() if name.partition(".")[0] in fitting})
    generator.load_state_dict(own)
    return fitting


def smoke_generator(channels: int = 1, width: float = 1.0, *, seed: int | None = None) -> SmokeGenerator:
    """Build the generator of Table 13 with initial parameters from ``seed``; None draws from the global generator.

    Example:
        >>> sum(p.numel() for p in smoke_generator(seed=0).parameters())
        873217
    """
    with seed_parameters(seed):
        return SmokeGenerator(channels, width)


def smoke_discriminator(size: int = 64, width: float = 1.0, *, seed: int | None = None) -> SmokeDiscriminator:
    """Build the discriminator of Table 13 for images of ``size``; seed: as for :func:`smoke_generator`.

    Example:
        >>> smoke_discriminator(seed=0).fc.in_features == 64 * 64 * 256
        True
    """
    with seed_parameters(seed):
        return SmokeDiscriminator(size, width)


def smoke_autoencoder(channels: int = 1, width: float = 1.0, *, seed: int | None = None) -> SmokeAutoencoder:
    """Build the auto-encoder; seed: as for :func:`smoke_generator`.

    Example:
        >>> len(smoke_autoencoder(seed=0).generator.convolutions)
        6
    """
    with seed_parameters(seed):
        return SmokeAutoencoder(channels, width)
