"""Feature alignment with a latent distribution that can be sampled from: the variational autoencoder without a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from revprop.alignment.encoder import FeatureAligned, half_squares

__all__ = ["Beta", "VariationalFeatureAligned", "along", "between", "divergence", "one_hot"]

Beta = float | Literal["uniform"]


def divergence(mean: Tensor, log_variance: Tensor, beta: Beta, generator: torch.Generator | None = None) -> Tensor:
    """``beta KL(N(mean, variance) || N(0, 1))`` summed over each example, the mean over the batch.

    Args:
        mean, log_variance: (n, latent). beta: a weight, or "uniform": drawn from U(0, 1) for each example.

    >>> divergence(torch.zeros(2, 3), torch.zeros(2, 3), 1.0).item()
    0.0
    """
    each = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    if beta == "uniform":
        place = "cpu" if generator is None else generator.device
        each = each * torch.rand(len(each), generator=generator, device=place, dtype=each.dtype).to(each.device)
    else:
        each = beta * each
    return each.sum() / max(len(each), 1)


def between(first: Tensor, last: Tensor, count: int) -> Tensor:
    """``count`` points on the straight line from each row of first to that of last, both included: (n, count, ...).

    >>> between(torch.zeros(1, 1), torch.ones(1, 1), 3).flatten().tolist()
    [0.0, 0.5, 1.0]
    """
    if count < 2:
        raise ValueError(f"expected at least 2 points from end to end, given {count}")
    share = torch.linspace(0, 1, count, dtype=first.dtype, device=first.device)
    share = share.view(1, -1, *[1] * (first.dim() - 1))
    return first.unsqueeze(1) * (1 - share) + last.unsqueeze(1) * share


def along(invert: Callable[[Tensor], Tensor], first: Tensor, last: Tensor, count: int) -> Tensor:
    """What ``invert`` makes of ``count`` codes :func:`between` two each: (n, count, ...).

    >>> along(lambda z: 2 * z, torch.zeros(1, 1), torch.ones(1, 1), 3).flatten().tolist()
    [0.0, 1.0, 2.0]
    """
    z = between(first, last, count)
    return invert(z.flatten(0, 1)).unflatten(0, z.shape[:2])


def one_hot(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """(n, classes) in the type and on the device of ``like``.

    Raises:
        ValueError: a label out of range.
    """
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        given = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels: expected 0 to {classes - 1}, given {given}")
    return nn.functional.one_hot(labels.to(like.device), classes).to(like.dtype)


class _Codes(nn.Module):
    """What is inverted: the mean, and behind it the classes where there are any."""

    def __init__(self, trunk: nn.Module, features: int, latent: int, classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.mean = nn.Linear(features, latent)
        self.classify = nn.Linear(features, classes) if classes else None

    def of(self, h: Tensor) -> Tensor:
        mean = self.mean(h)
        return mean if self.classify is None else torch.cat([mean, self.classify(h)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.trunk(x))


class VariationalFeatureAligned(nn.Module):
    """An encoder of means and variances that is inverted by its own gradient: reconstructs, samples, interpolates (section 3.3).

    It minimises, for each example (Equation 5),

        1/2 |x - r|^2 + beta KL(N(mean, variance) || N(0, 1)),   r = invert(mean + e * deviation),  e ~ N(0, 1)

    where ``invert`` is :class:`FeatureAligned`'s for the mean's head: of the start no variance is drawn. (The paper's text
    multiplies e by the variance; here, as in every variational autoencoder, by its root.) With classes, a linear layer beside
    the mean's tells them; its outputs are inverted, too, towards the one-hot label in training and a multiple of it,
    ``emphasis``, in sampling; ``1/2 |classes(x) - one-hot|^2`` is added to the loss.

    Args:
        trunk: (n, *input_shape) -> (n, features), on which the heads stand. latent: of how many variables. input_shape: of one
            example. classes: how many; 0 for none.
        beta: a weight, or "uniform": drawn from U(0, 1) for each example and step.
        options: those of :class:`FeatureAligned`.

    Raises:
        ValueError: fewer than one latent variable, a negative beta, a trunk whose output is not (n, features). And what
            :class:`FeatureAligned` raises.

    >>> trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.LeakyReLU())
    >>> model = VariationalFeatureAligned(trunk, 2, (1, 4, 4), output="sigmoid")
    >>> model.sample(5).shape, model.interpolate(torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4), 4).shape
    (torch.Size([5, 1, 4, 4]), torch.Size([3, 4, 1, 4, 4]))
    """

    def __init__(
        self,
        trunk: nn.Module,
        latent: int,
        input_shape: Sequence[int],
        classes: int = 0,
        beta: Beta = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if latent < 1:
            raise ValueError(f"latent: expected at least 1, given {latent}")
        if isinstance(beta, str) and beta != "uniform":
            raise ValueError(f'beta: expected a number or "uniform", given {beta!r}')
        if not isinstance(beta, str) and not beta >= 0:
            raise ValueError(f"beta: expected a weight of at least 0, given {beta}")
        features = _features(trunk, input_shape)
        self.aligned = FeatureAligned(_Codes(trunk, features, latent, classes), input_shape, **options)
        self.log_variance = nn.Linear(features, latent)
        self.latent, self.classes, self.beta = latent, classes, beta

    @property
    def codes(self) -> _Codes:
        assert isinstance(self.aligned.module, _Codes)
        return self.aligned.module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the logarithm of the variance, (n, latent) each."""
        h = self.codes.trunk(x)
        return self.codes.mean(h), self.log_variance(h)

    def classify(self, x: Tensor) -> Tensor:
        """What the class layer says, (n, classes).

        Raises:
            ValueError: there is none.
        """
        if self.codes.classify is None:
            raise ValueError("this model has no class layer: make it with classes=10, say")
        return self.codes.classify(self.codes.trunk(x))

    def invert(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """:meth:`FeatureAligned.invert` of (n, latent), or (n, latent + classes) where there are classes."""
        return self.aligned.invert(z, generator)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Of the mean, and of the classes as they were seen."""
        return self.aligned.reconstruct(x)

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
        """New inputs: ``invert`` of z ~ N(0, temperature^2).

        Args:
            labels: (n,), wanted classes; drawn at random where there are classes and none is given. emphasis: the height of
                the one-hot target. generator: of all that is drawn; torch's own where not given.
            decoder: what to use in place of ``invert``: with ``aligned.decoder()``, made once, the samples are the same, and one
                at a time takes a fraction of a VAE's time instead of twice as long.

        Returns:
            (n, *input_shape).

        Raises:
            ValueError: labels without a class layer, or not n of them.
        """
        z = self.draw(n, labels, emphasis, temperature, generator)
        return self.invert(z, generator) if decoder is None else decoder(z)

    def draw(
        self,
        n: int,
        labels: Tensor | None = None,
        emphasis: float = 1.0,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The codes that :meth:`sample` inverts, with its arguments: (n, latent), or (n, latent + classes)."""
        like = self.codes.mean.weight
        place = "cpu" if generator is None else generator.device
        z = temperature * torch.randn(n, self.latent, generator=generator, dtype=like.dtype, device=place)
        if labels is not None and (not self.classes or labels.shape != (n,)):
            known = f"{n} labels" if self.classes else "no labels, since this model has no class layer"
            raise ValueError(f"labels: expected {known}, given {tuple(labels.shape)}")
        if self.classes and labels is None:
            labels = torch.randint(self.classes, (n,), generator=generator, device=place)
        z = z.to(like.device)
        return z if labels is None else torch.cat([z, emphasis * one_hot(labels, self.classes, z)], 1)

    @torch.no_grad()
    def interpolate(self, first: Tensor, last: Tensor, count: int) -> Tensor:
        """Inverted codes on the straight line between those of two inputs: (n, count, *input_shape).

        Args:
            first, last: (n, *input_shape). count: how many, both ends included; at least 2.
        """
        return along(self.invert, self.aligned(first), self.aligned(last), count)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer's parameters: "encoder"."""
        return {"encoder": list(self.parameters())}

    def losses(
        self, batch: tuple[Tensor, ...], generator: torch.Generator | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """ "reconstruction", "divergence", with classes "classes", and their sum "loss"."""
        return {"encoder": self.terms(batch, generator)[0]}

    def terms(
        self, batch: tuple[Tensor, ...], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the loss, and the inputs inverted on the way, (n, *input_shape).

        Raises:
            ValueError: a batch without labels where there are classes.
        """
        x = batch[0]
        h = self.codes.trunk(self.aligned.with_start(x))
        codes = self.codes.of(h)
        n = len(x)
        found = codes[n:] if len(codes) > n else None
        mean, log_variance = codes[:n, : self.latent], self.log_variance(h[:n])
        place = "cpu" if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=place).to(mean.device)
        z = mean + noise * (0.5 * log_variance).exp()
        terms = {}
        if self.classes:
            if len(batch) < 2:
                raise ValueError("this model has a class layer: expected labels behind the images, given none")
            wanted = one_hot(batch[1], self.classes, x)
            terms["classes"] = half_squares(codes[:n, self.latent :] - wanted)
            z = torch.cat([z, wanted], 1)
        r = self.aligned.steps_towards(z, found, generator)
        terms["reconstruction"] = half_squares(x - r)
        terms["divergence"] = divergence(mean, log_variance, self.beta, generator)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}, r

    def constrain(self) -> None:
        """Puts the weights of what is inverted back within the bound."""
        self.aligned.constrain()


def _features(trunk: nn.Module, input_shape: Sequence[int]) -> int:
    like = next(trunk.parameters(), torch.zeros(()))
    training = trunk.training
    with torch.no_grad():
        h = trunk.eval()(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    trunk.train(training)
    if h.dim() != 2:
        raise ValueError(f"trunk: expected outputs (n, features), such as behind nn.Flatten(), given {tuple(h.shape)}")
    return h.shape[1]
