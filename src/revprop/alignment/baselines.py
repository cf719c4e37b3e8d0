"""What feature alignment is compared with: an autoencoder, a variational one, and a generator against a discriminator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revprop.alignment.adversarial import ContestName, contest_of
from revprop.alignment.constraint import clamp_weights
from revprop.alignment.encoder import half_squares
from revprop.alignment.variational import Beta, along, divergence

__all__ = ["GAN", "VAE", "AutoEncoder"]


class AutoEncoder(nn.Module):
    """An encoder and a decoder that minimise ``1/2 |x - decoder(encoder(x))|^2``.

    Args:
        encoder: (n, ...) -> (n, latent). decoder: (n, latent) -> (n, ...).

    >>> AutoEncoder(nn.Linear(4, 2), nn.Linear(2, 4)).reconstruct(torch.zeros(3, 4)).shape
    torch.Size([3, 4])
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        """decoder(encoder(x))."""
        return self.decoder(self.encoder(x))

    def reconstruct(self, x: Tensor) -> Tensor:
        """The same without gradients."""
        with torch.no_grad():
            return self(x)

    @torch.no_grad()
    def interpolate(self, first: Tensor, last: Tensor, count: int) -> Tensor:
        """Decoded codes on the straight line between those of two inputs: (n, count, ...)."""
        return along(self.decoder, self.encoder(first), self.encoder(last), count)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer's parameters."""
        return {"autoencoder": list(self.parameters())}

    def losses(
        self, batch: tuple[Tensor, ...], generator: torch.Generator | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """ "loss"."""
        return {"autoencoder": {"loss": half_squares(batch[0] - self(batch[0]))}}

    def constrain(self) -> None:
        """Nothing."""


class VAE(nn.Module):
    """A variational autoencoder (Kingma and Welling, 2014): ``1/2 |x - decoder(z)|^2 + beta KL``, z drawn around the mean.

    Args:
        trunk: (n, ...) -> (n, features), on which the heads of mean and variance stand. features: how many. latent: of how many
            variables. decoder: (n, latent) -> (n, ...). beta: a weight, or "uniform": drawn for each example.

    >>> VAE(nn.Linear(4, 3), 3, 2, nn.Linear(2, 4)).sample(5).shape
    torch.Size([5, 4])
    """

    def __init__(self, trunk: nn.Module, features: int, latent: int, decoder: nn.Module, beta: Beta = 1.0) -> None:
        super().__init__()
        self.trunk, self.decoder = trunk, decoder
        self.mean, self.log_variance = nn.Linear(features, latent), nn.Linear(features, latent)
        self.latent, self.beta = latent, beta

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the logarithm of the variance, (n, latent) each."""
        h = self.trunk(x)
        return self.mean(h), self.log_variance(h)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Of the mean."""
        with torch.no_grad():
            return self.decoder(self(x)[0])

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """``decoder(z)``, z ~ N(0, temperature^2)."""
        return self.decoder(_normal(n, self.latent, self.mean.weight, generator) * temperature)

    @torch.no_grad()
    def interpolate(self, first: Tensor, last: Tensor, count: int) -> Tensor:
        """Decoded means on the straight line between those of two inputs: (n, count, ...)."""
        return along(self.decoder, self(first)[0], self(last)[0], count)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer's parameters."""
        return {"autoencoder": list(self.parameters())}

    def losses(
        self, batch: tuple[Tensor, ...], generator: torch.Generator | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """ "reconstruction", "divergence", and their sum "loss"."""
        mean, log_variance = self(batch[0])
        noise = _normal(len(mean), self.latent, mean, generator)
        made = self.decoder(mean + noise * (0.5 * log_variance).exp())
        terms = {
            "reconstruction": half_squares(batch[0] - made),
            "divergence": divergence(mean, log_variance, self.beta, generator),
        }
        return {"autoencoder": {"loss": terms["reconstruction"] + terms["divergence"], **terms}}

    def constrain(self) -> None:
        """Nothing."""


class GAN(nn.Module):
    """A generator of images from noise against a discriminator, both stepped at once, from the same batch.

    Args:
        generator: (n, latent) -> (n, ...). discriminator: (n, ...) -> (n, 1). latent: of how many variables. contest:
            "least-squares" or "wasserstein".

    >>> GAN(nn.Linear(2, 4), nn.Linear(4, 1), 2).sample(5).shape
    torch.Size([5, 4])
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, latent: int, contest: ContestName = "least-squares"
    ) -> None:
        super().__init__()
        contest_of(contest)
        self.generator, self.discriminator, self.latent, self.contest = generator, discriminator, latent, contest

    def forward(self, z: Tensor) -> Tensor:
        """generator(z)."""
        return self.generator(z)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """``generator(z)``, z ~ N(0, temperature^2)."""
        return self(_normal(n, self.latent, next(self.generator.parameters()), generator) * temperature)

    def search(self, x: Tensor, steps: int = 200, rate: float = 0.05) -> Tensor:
        """``argmin_z |x - generator(z)|^2`` by Adam from zero (the paper's reconstruction by a GAN): (n, latent)."""
        z = torch.zeros(len(x), self.latent, dtype=x.dtype, device=x.device, requires_grad=True)
        optimizer = torch.optim.Adam([z], lr=rate)
        with torch.enable_grad():
            for _ in range(steps):
                (z.grad,) = torch.autograd.grad((x - self(z)).square().sum(), z)
                optimizer.step()
        return z.detach()

    def reconstruct(self, x: Tensor) -> Tensor:
        """The generator's image nearest to x, as far as :meth:`search` finds it."""
        z = self.search(x)
        with torch.no_grad():
            return self(z)

    @torch.no_grad()
    def interpolate(self, first: Tensor, last: Tensor, count: int) -> Tensor:
        """Generated images on the straight line between the codes searched for two inputs: (n, count, ...)."""
        return along(self, self.search(first), self.search(last), count)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Two optimizers' parameters: "generator", "discriminator"."""
        names = ("generator", "discriminator")
        return {name: list(self.get_submodule(name).parameters()) for name in names}

    def losses(
        self, batch: tuple[Tensor, ...], generator: torch.Generator | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """ "loss" of each part."""
        rules = contest_of(self.contest)
        made = self(_normal(len(batch[0]), self.latent, batch[0], generator))
        return {
            "generator": {"loss": rules.generator(self.discriminator(made))},
            "discriminator": {
                "loss": rules.discriminator(self.discriminator(batch[0]), self.discriminator(made.detach()))
            },
        }

    def constrain(self) -> None:
        """Keeps a critic's weights within its bound."""
        bound = contest_of(self.contest).bound
        if bound is not None:
            clamp_weights(self.discriminator, bound)


def _normal(n: int, latent: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    place = "cpu" if generator is None else generator.device
    return torch.randn(n, latent, generator=generator, dtype=like.dtype, device=place).to(like.device)
