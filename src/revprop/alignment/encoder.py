"""Feature alignment: an encoder that is its own decoder (Farias and Maziero, "Feature alignment as a generative process")."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from revprop.alignment.constraint import WEIGHT_BOUND, clamp_weights
from revprop.alignment.start import first_step, jacobian, mixing
from revprop.errors import near_matches, require_finite

__all__ = ["INITS", "OUTPUTS", "AffineDecoder", "FeatureAligned", "half_squares"]

Init = Literal["zeros", "normal", "uniform"]
Output = Literal["sigmoid", "tanh"]
INITS = ("zeros", "normal", "uniform")
OUTPUTS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda r: r,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def half_squares(difference: Tensor) -> Tensor:
    """``1/2 |d|^2`` summed over each example, and the mean of that over the batch: the scale of every loss of these models.

    >>> half_squares(torch.ones(4, 3, 2)).item()
    3.0
    """
    return 0.5 * difference.square().sum() / max(len(difference), 1)


class FeatureAligned(nn.Module):
    """An encoder E that is inverted by gradient descent on its own input, and trained so that this gives the input back.

    ``invert`` computes, for wanted codes z and from a start r, ``steps`` times

        r <- r - step_size * d/dr 1/2 |E(r) - z|^2_W                                         (Equation 2 of the paper)

    and ``alignment_loss`` is ``1/2 |x - invert(E(x))|^2`` summed over each example, the mean over the batch (Algorithm 1),
    differentiated through all the steps. With a start that is the same for every example, and examples that do not depend on each
    other in E, the first step's pass over r is one row's; with one step, what is inverted is then an *affine* map of z
    (:meth:`affine`), before ``output``.

    Args:
        module: E, any differentiable module, (n, *input_shape) -> (n, ...).
        input_shape: of one example, without the batch.
        steps: T; at least 1. step_size: eta.
        init: where r starts: "zeros"; "normal" or "uniform" (in [0, 1)): drawn for each example.
        output: what the last r goes through: None, "sigmoid" or "tanh".
        seed: of the starts that ``invert`` draws where it is given no generator: the same z gives the same r.
        weights: the diagonal of W, broadcast over the shape of one code; None: all one.
        bound: within which ``constrain`` puts the weights; None: no bound.
        share_start: False: the plain computation always, whatever the start.

    Raises:
        ValueError: an unknown init or output, fewer than one step, a step size that is not positive, an empty shape.

    >>> layer = nn.Linear(4, 4, bias=False)
    >>> _ = nn.init.orthogonal_(layer.weight)
    >>> encoder = FeatureAligned(layer, (4,))
    >>> x = torch.randn(3, 4)
    >>> torch.allclose(encoder.invert(encoder(x)), x, atol=1e-5)
    True
    """

    def __init__(
        self,
        module: nn.Module,
        input_shape: Sequence[int],
        steps: int = 1,
        step_size: float = 1.0,
        init: Init = "zeros",
        output: Output | None = None,
        seed: int = 0,
        weights: Tensor | None = None,
        bound: float | None = WEIGHT_BOUND,
        share_start: bool = True,
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(near_matches(init, INITS, "init"))
        if output not in OUTPUTS:
            raise ValueError(near_matches(str(output), [str(name) for name in OUTPUTS], "output"))
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, given {steps}")
        if not step_size > 0:
            raise ValueError(f"step_size: expected a positive number, given {step_size}")
        if not input_shape or any(size < 1 for size in input_shape):
            raise ValueError(
                f"input_shape: expected the sizes of one example, such as (1, 28, 28), given {input_shape}"
            )
        self.module = module
        self.weights: Tensor | None
        self.input_shape = tuple(input_shape)
        self.steps, self.step_size, self.init, self.output, self.seed = steps, step_size, init, output, seed
        self.bound, self.share_start = bound, share_start
        self.register_buffer("weights", weights)
        self._said = False

    def forward(self, x: Tensor) -> Tensor:
        """E(x)."""
        return self.module(x)

    def alignment_loss(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``1/2 |x - invert(E(x))|^2`` summed over each example, the mean over the batch; differentiable in E's parameters.

        Args:
            x: (n, *input_shape). generator: of the starts, where they are drawn; torch's own where not given.

        Raises:
            ValueError: x of another shape.
        """
        z, found = self.encode(x)
        return half_squares(x - self.steps_towards(z, found, generator))

    def invert(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The input that z stands for: ``steps`` steps from the start, then the output.

        Args:
            z: (n, ...), codes as E gives them. generator: of the starts, where they are drawn; a new one of ``seed`` where not
                given.

        Returns:
            (n, *input_shape); differentiable in z and the parameters where gradients are enabled (``torch.no_grad()`` is
            cheaper where they are not needed).

        Raises:
            ValueError: codes of another shape than E's. NonFiniteError: NaN or infinity among them.
        """
        require_finite(z.detach(), "z")
        if generator is None and self.init != "zeros":
            generator = torch.Generator().manual_seed(self.seed)
        return self.steps_towards(z, None, generator)

    def affine(self) -> tuple[Tensor, Tensor]:
        """One step from zeros as what it is: ``invert(z) = output(offset + z.flatten(1) @ matrix)``, reshaped.

        Returns:
            matrix: (latent variables, pixels), the Jacobian at the start times step size and weights. offset: (pixels,).

        Raises:
            ValueError: more than one step, a start that is drawn, or a module whose examples depend on each other.

        >>> encoder = FeatureAligned(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), (6,))
        >>> matrix, offset = encoder.affine()
        >>> z = torch.randn(3, 2)
        >>> torch.allclose(encoder.invert(z), offset + z @ matrix, atol=1e-6)
        True
        """
        if self.steps > 1 or not self.shares_start():
            raise ValueError(
                "only one step from zeros, in a module that takes each example by itself, is affine in z; "
                f"given steps={self.steps}, init={self.init!r}{_because(self.module)}"
            )
        start = self._start(1, next(self.module.parameters()), None)
        found, rows = jacobian(self.module, start)
        weights = torch.ones_like(found[0]) if self.weights is None else self.weights.expand_as(found[0])
        matrix = self.step_size * weights.reshape(-1, 1) * rows.flatten(1)
        return matrix, start.flatten() - found.flatten() @ matrix

    @torch.no_grad()
    def decoder(self) -> AffineDecoder:
        """:meth:`affine` as a module of its own that gives what ``invert`` gives, as the parameters are now: for many samples of
        a trained model, at the cost of one product of matrices.

        Raises:
            ValueError: as :meth:`affine` does.

        >>> encoder = FeatureAligned(nn.Linear(6, 2), (6,), output="tanh")
        >>> z = torch.randn(3, 2)
        >>> torch.allclose(encoder.decoder()(z), encoder.invert(z), atol=1e-6)
        True
        """
        return AffineDecoder(*self.affine(), self.input_shape, self.output)

    # -- what the models built on this one share ------------------------------------------------------------------------------

    def shares_start(self) -> bool:
        """Whether the first step's pass over the start is one row's: a start of zeros, and examples that stand by themselves."""
        if self.init != "zeros" or not self.share_start:
            return False
        if because := _because(self.module):
            if not self._said:
                warnings.warn(
                    f"the start's pass cannot be shared by the batch{because}: computed in full", stacklevel=3
                )
                self._said = True
            return False
        return True

    def with_start(self, x: Tensor) -> Tensor:
        """x, with the start as one more row behind it where the batch shares it: what a module's pass is best run on."""
        self._check(x)
        return torch.cat([x, self._start(1, x, None)]) if self.shares_start() else x

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """E(x), and E of the start, (1, ...), from the same pass where the batch shares it."""
        z = self.module(self.with_start(x))
        return (z[:-1], z[-1:]) if len(z) > len(x) else (z, None)

    def steps_towards(self, z: Tensor, found: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """What ``invert`` does. found: E of the start, where known."""
        done = 0
        alone = (
            len(z) == 1 and not torch.is_grad_enabled()
        )  # then nothing is shared, and the plain way has less around it
        if self.shares_start() and not alone:
            start = self._start(1, z, None)
            r, done = start + self.step_size * first_step(self.module, start, z, self.weights, found), 1
            r = r if torch.is_grad_enabled() else r.detach()
        else:
            r = self._start(len(z), z, generator)
        for _ in range(done, self.steps):
            r = self._step(r, z)
        return OUTPUTS[self.output](r)

    # -- the training loop's side: see :class:`revprop.alignment.Trainable` ----------------------------------------------------

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer's parameters: "encoder"."""
        return {"encoder": list(self.parameters())}

    def losses(
        self, batch: tuple[Tensor, ...], generator: torch.Generator | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """The terms of what each optimizer minimises, "loss" being their sum."""
        return {"encoder": {"loss": self.alignment_loss(batch[0], generator)}}

    def constrain(self) -> None:
        """Puts the weights back within the bound."""
        if self.bound is not None:
            clamp_weights(self.module, self.bound)

    def reconstruct(self, x: Tensor) -> Tensor:
        """``invert(E(x))``."""
        with torch.no_grad():
            return self.invert(self.module(x))

    # -- one step -------------------------------------------------------------------------------------------------------------

    def _step(self, r: Tensor, z: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            r = r if r.requires_grad else r.detach().requires_grad_()
            codes = self.module(r)
            if codes.shape != z.shape:
                raise ValueError(f"z: expected codes of shape {tuple(codes.shape)}, given {tuple(z.shape)}")
            squares = (codes - z).square()
            distance = 0.5 * (squares if self.weights is None else self.weights * squares).sum()
            (slope,) = torch.autograd.grad(distance, r, create_graph=differentiable)
        return r - self.step_size * slope

    def _start(self, n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
        shape = (n, *self.input_shape)
        if self.init == "zeros":
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        draw = torch.randn if self.init == "normal" else torch.rand
        # on the generator's own device, so that the same seed gives the same numbers on every machine
        place = "cpu" if generator is None else generator.device
        return draw(shape, generator=generator, dtype=like.dtype, device=place).to(like.device)

    def _check(self, x: Tensor) -> None:
        if x.shape[1:] != self.input_shape:
            shape = ", ".join(map(str, self.input_shape))
            raise ValueError(f"x: expected inputs of shape (n, {shape}), given {tuple(x.shape)}")


class AffineDecoder(nn.Module):
    """``output(offset + z @ matrix)``: an encoder's inverse by one step from zeros, written out (:meth:`FeatureAligned.decoder`).

    Args:
        matrix: (latent variables, pixels). offset: (pixels,). input_shape: of one example. output: None, "sigmoid" or "tanh".
    """

    def __init__(self, matrix: Tensor, offset: Tensor, input_shape: Sequence[int], output: str | None) -> None:
        super().__init__()
        self.matrix: Tensor
        self.offset: Tensor
        self.register_buffer("matrix", matrix)
        self.register_buffer("offset", offset)
        self.input_shape, self.output = tuple(input_shape), output

    def forward(self, z: Tensor) -> Tensor:
        """(n, ...) -> (n, *input_shape)."""
        r = torch.addmm(self.offset, z.flatten(1), self.matrix)
        return OUTPUTS[self.output](r).view(len(z), *self.input_shape)


def _because(module: nn.Module) -> str:
    part = mixing(module)
    return f", since its part {part} looks at the whole batch or draws at random" if part else ""
