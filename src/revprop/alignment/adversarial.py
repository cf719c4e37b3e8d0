"""Losses of a generator against a discriminator, and feature alignment with both (section 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from revprop.alignment.constraint import clamp_weights
from revprop.alignment.encoder import half_squares
from revprop.alignment.variational import VariationalFeatureAligned, along, one_hot
from revprop.errors import near_matches

__all__ = ["CONTESTS", "Contest", "FeatureAlignedGAN"]

ContestName = Literal["least-squares", "wasserstein"]
Fakes = Literal["reconstructions", "samples"]


@dataclass(frozen=True)
class Contest:
    """What a generator and a discriminator minimise.

    Attributes:
        generator: of the scores of what was generated. discriminator: of the scores of real and of generated images.
        bound: within which the discriminator's weights are kept; None: no bound.
    """

    generator: Callable[[Tensor], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]
    bound: float | None = None


CONTESTS: dict[str, Contest] = {
    "least-squares": Contest(
        lambda fake: (1 - fake).square().mean(),
        lambda real, fake: (1 - real).square().mean() + (-1 - fake).square().mean(),
    ),
    "wasserstein": Contest(lambda fake: -fake.mean(), lambda real, fake: fake.mean() - real.mean(), bound=0.01),
}
"""Least squares with targets +1 and -1 (Mao et al., 2017; Equations 7 and 8); Wasserstein, its critic's weights clipped at 0.01
(Arjovsky et al., 2017)."""


def contest_of(name: str) -> Contest:
    """The contest of this name."""
    if name not in CONTESTS:
        raise ValueError(near_matches(name, CONTESTS, "contest"))
    return CONTESTS[name]


class FeatureAlignedGAN(nn.Module):
    """A variational encoder, a generator that improves what is inverted, and a discriminator (Equations 6 to 8).

    The encoder minimises what it does by itself. With ``r`` the inverted image, the generator minimises

        contest(D(G(r))) + perceptual * (|mean(x) - mean(G(r))|^2 + |variance(x) - variance(G(r))|^2),

    mean and variance being the encoder's; no gradient of it reaches the encoder. All are stepped at once, from the same batch.

    Args:
        encoder: :class:`VariationalFeatureAligned`. generator: images to images of the same shape. discriminator: images to a
            score each, (n, 1). contest: "least-squares" or "wasserstein". perceptual: lambda.
        by_class: whether the generator is called with the class part of the code, (n, classes), behind the images.
        fakes: what the discriminator is shown as generated: "reconstructions" (Equation 8) or "samples" of the batch's classes,
            as the published code does; what is sampled in the end has then been judged in training.

    Raises:
        ValueError: an unknown contest or kind of fakes, a negative weight, ``by_class`` with an encoder that has no classes.

    >>> trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.LeakyReLU())
    >>> encoder = VariationalFeatureAligned(trunk, 2, (1, 4, 4))
    >>> FeatureAlignedGAN(encoder, nn.Conv2d(1, 1, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(16, 1))).sample(5).shape
    torch.Size([5, 1, 4, 4])
    """

    def __init__(
        self,
        encoder: VariationalFeatureAligned,
        generator: nn.Module,
        discriminator: nn.Module,
        contest: ContestName = "least-squares",
        perceptual: float = 0.01,
        by_class: bool = False,
        fakes: Fakes = "reconstructions",
    ) -> None:
        super().__init__()
        contest_of(contest)
        if not perceptual >= 0:
            raise ValueError(f"perceptual: expected a weight of at least 0, given {perceptual}")
        if by_class and not encoder.classes:
            raise ValueError("by_class: this encoder has no class layer: make it with classes=10, say")
        if fakes not in get_args(Fakes):
            raise ValueError(near_matches(fakes, get_args(Fakes), "kind of fakes"))
        self.encoder, self.generator, self.discriminator = encoder, generator, discriminator
        self.contest, self.perceptual, self.by_class, self.fakes = contest, perceptual, by_class, fakes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's mean and logarithm of the variance."""
        return self.encoder(x)

    def improve(self, images: Tensor, classes: Tensor) -> Tensor:
        """What the generator makes of inverted images whose codes end in these, (n, classes)."""
        return self.generator(images, classes) if self.by_class else self.generator(images)

    @torch.no_grad()
    def invert(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What the generator makes of the images that the encoder inverts z to, (n, latent) or (n, latent + classes)."""
        return self.improve(self.encoder.invert(z, generator), z[:, self.encoder.latent :])

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """What the generator makes of the encoder's reconstruction."""
        return self.invert(self.encoder.aligned(x))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        labels: Tensor | None = None,
        emphasis: float = 1.0,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        decoder: nn.Module | None = None,
    ) -> Tensor:
        """What the generator makes of the encoder's samples; it is told their classes as in training, unemphasised."""
        z = self.encoder.draw(n, labels, emphasis, temperature, generator)
        images = self.encoder.invert(z, generator) if decoder is None else decoder(z)
        return self.improve(images, z[:, self.encoder.latent :] / (emphasis or 1.0))

    @torch.no_grad()
    def interpolate(self, first: Tensor, last: Tensor, count: int) -> Tensor:
        """What the generator makes of the encoder's interpolation: (n, count, *input_shape)."""
        return along(self.invert, self.encoder.aligned(first), self.encoder.aligned(last), count)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Three optimizers' parameters: "encoder", "generator", "discriminator"."""
        names = ("encoder", "generator", "discriminator")
        return {name: list(self.get_submodule(name).parameters()) for name in names}

    def losses(
        self, batch: tuple[Tensor, ...], generator: torch.Generator | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Of each part; the generator's terms are "adversarial" and "perceptual"."""
        x = batch[0]
        encoding, inverted = self.encoder.terms(batch, generator)
        labels = batch[1] if self.encoder.classes else None
        told = x.new_zeros(len(x), 0) if labels is None else one_hot(labels, self.encoder.classes, x)
        made = self.improve(inverted.detach(), told)
        rules = contest_of(self.contest)
        terms = {"adversarial": rules.generator(self.discriminator(made))}
        if self.perceptual:
            with torch.no_grad():
                mean, log_variance = self.encoder(x)
            made_mean, made_log_variance = self.encoder(made)
            apart = half_squares(mean - made_mean) + half_squares(log_variance.exp() - made_log_variance.exp())
            terms["perceptual"] = 2 * self.perceptual * apart
        sampled = self.fakes == "samples"
        shown = self.sample(len(x), labels, generator=generator) if sampled else made.detach()
        scores = rules.discriminator(self.discriminator(x), self.discriminator(shown))
        return {
            "encoder": encoding,
            "generator": {"loss": torch.stack(list(terms.values())).sum(), **terms},
            "discriminator": {"loss": scores},
        }

    def constrain(self) -> None:
        """Puts the encoder's weights back within their bound, and a critic's within its own."""
        self.encoder.constrain()
        bound = contest_of(self.contest).bound
        if bound is not None:
            clamp_weights(self.discriminator, bound)
