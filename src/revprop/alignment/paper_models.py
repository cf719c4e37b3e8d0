"""The paper's models by name, with its networks and one of its presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from revprop.alignment.adversarial import FeatureAlignedGAN
from revprop.alignment.baselines import GAN, VAE, AutoEncoder
from revprop.alignment.constraint import orthogonal_weights
from revprop.alignment.encoder import FeatureAligned
from revprop.alignment.local import LocalFeatureAligned
from revprop.alignment.settings import AlignmentSettings
from revprop.alignment.variational import VariationalFeatureAligned
from revprop.errors import near_matches
from revprop.networks import feature_alignment as networks
from revprop.networks.fr_pt import seed_parameters

__all__ = ["MODELS", "Sizes", "paper_model"]


@dataclass(frozen=True)
class Sizes:
    """Of what size the networks are, alike for every model that is compared.

    Attributes:
        shape: (c, h, w) of an image. hidden, width: as for :func:`revprop.networks.feature_alignment.trunk`. latent: variables.
        classes: of the class layer of variational encoders; 0 for none. mirrored: as for ``decoder``. kernels, refiner: kernels
            and channels of the generator that improves images, which is given the class where there are classes. normalised: batch
            norm in a GAN's generator, as for ``decoder``.
    """

    shape: tuple[int, ...]
    hidden: int = 4096
    width: int = 32
    latent: int = 128
    classes: int = 0
    mirrored: bool = True
    kernels: tuple[int, int, int] = (3, 3, 3)
    refiner: int = 128
    normalised: bool = False

    @classmethod
    def paper(cls, data: str) -> Sizes:
        """The paper's for "mnist", "cifar10", "celeba" or "stl10".

        Raises:
            ValueError: another name.
        """
        if data not in networks.PAPER:
            raise ValueError(near_matches(data, networks.PAPER, "data set of the paper"))
        size = networks.PAPER[data]
        return cls(size.shape, size.hidden, 32, size.latent, size.classes, size.mirrored, size.kernels)


def paper_model(
    name: str, sizes: Sizes, settings: AlignmentSettings, seed: int = 0, orthogonal: bool = True
) -> nn.Module:
    """A model of the paper, untrained: a :class:`revprop.alignment.Trainable`.

    Args:
        name: "ae", "vae", "gan", "fa", "vfa", "vfa-gan" or "local". sizes: of its networks. settings: those of a preset.
        seed: of all parameters. orthogonal: whether encoders and generators start from orthogonal weights, as the paper's do;
            discriminators as the settings say.

    Raises:
        ValueError: an unknown name.

    >>> model = paper_model("vfa", Sizes((1, 8, 8), 32, 4, 3), AlignmentSettings.published_code())
    >>> model.sample(2).shape
    torch.Size([2, 1, 8, 8])
    """
    if name not in MODELS:
        raise ValueError(near_matches(name, MODELS, "model"))
    with seed_parameters(seed):
        model = MODELS[name](sizes, settings)
        if orthogonal:
            for part, module in model.named_children():
                if part != "discriminator" or settings.orthogonal_discriminator:
                    orthogonal_weights(module)
    return model


def _trunk(sizes: Sizes) -> nn.Sequential:
    return networks.trunk(sizes.shape, sizes.hidden, sizes.width)


def _encoder(sizes: Sizes) -> nn.Sequential:
    return networks.encoder(sizes.shape, sizes.latent, sizes.hidden, sizes.width)


def _decoder(sizes: Sizes, batch_norm: bool = False) -> nn.Sequential:
    options = {"mirrored": sizes.mirrored, "batch_norm": batch_norm}
    return networks.decoder(sizes.shape, sizes.latent, sizes.hidden, sizes.width, **options)


def _discriminator(sizes: Sizes) -> nn.Sequential:
    return networks.discriminator(sizes.shape, sizes.hidden, sizes.width)


def _vfa(sizes: Sizes, settings: AlignmentSettings) -> VariationalFeatureAligned:
    options: dict[str, Any] = {**settings.inner(), "output": settings.output}
    return VariationalFeatureAligned(
        _trunk(sizes), sizes.latent, sizes.shape, sizes.classes, beta=settings.beta, **options
    )


def _vfa_gan(sizes: Sizes, settings: AlignmentSettings) -> FeatureAlignedGAN:
    refiner = networks.refiner(sizes.shape, sizes.refiner, sizes.kernels, sizes.classes)
    return FeatureAlignedGAN(
        _vfa(sizes, settings),
        refiner,
        _discriminator(sizes),
        settings.contest,
        settings.perceptual,
        sizes.classes > 0,
        settings.fakes,
    )


def _local(sizes: Sizes, settings: AlignmentSettings) -> LocalFeatureAligned:
    layers = networks.local_layers(sizes.shape, sizes.latent, sizes.hidden, sizes.width)
    return LocalFeatureAligned(layers, sizes.shape, output=settings.local_output, **settings.inner())


MODELS: dict[str, Callable[[Sizes, AlignmentSettings], nn.Module]] = {
    "ae": lambda sizes, settings: AutoEncoder(_encoder(sizes), _decoder(sizes)),
    "vae": lambda sizes, settings: VAE(_trunk(sizes), sizes.hidden, sizes.latent, _decoder(sizes), settings.beta),
    "gan": lambda sizes, settings: GAN(
        _decoder(sizes, sizes.normalised), _discriminator(sizes), sizes.latent, settings.contest
    ),
    "fa": lambda sizes, settings: FeatureAligned(
        _encoder(sizes), sizes.shape, output=settings.output, **settings.inner()
    ),
    "vfa": _vfa,
    "vfa-gan": _vfa_gan,
    "local": _local,
}
"""Every model by name."""
