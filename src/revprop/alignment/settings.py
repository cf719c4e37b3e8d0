"""How the papers' models are trained: as the paper's text says, and as its published code does."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from revprop.alignment.adversarial import ContestName, Fakes
from revprop.alignment.encoder import Init, Output
from revprop.alignment.variational import Beta
from revprop.errors import near_matches

__all__ = ["AlignmentSettings"]


@dataclass(frozen=True)
class AlignmentSettings:
    """The choices that the paper's text (section 4) and its published code do not share, and those that they do.

    Attributes:
        init: where r starts. output, local_output: what the last r goes through, in models trained as a whole and layer by layer.
        low, high: images are clamped to these. learning_rate, betas: Adam's. beta: of the divergence. perceptual: lambda of
            Equation 7. fakes: what the discriminator is shown. orthogonal_discriminator: whether it, too, starts from orthogonal
            weights. contest: of generator and discriminator. latent, batch_size, steps, step_size, bound: as named elsewhere.

    >>> [name for name, _, _ in AlignmentSettings.paper().differences(AlignmentSettings.published_code())]
    ['init', 'output', 'local_output', 'low', 'high', 'learning_rate', 'betas', 'perceptual', 'fakes', 'orthogonal_discriminator']
    """

    init: Init = "uniform"
    output: Output | None = None
    local_output: Output | None = None
    low: float = 0.0
    high: float = 1.0
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    beta: Beta = "uniform"
    perceptual: float = 0.01
    fakes: Fakes = "reconstructions"
    orthogonal_discriminator: bool = False
    contest: ContestName = "least-squares"
    latent: int = 128
    batch_size: int = 128
    steps: int = 1
    step_size: float = 1.0
    bound: float = math.sqrt(2.0)

    @classmethod
    def paper(cls) -> AlignmentSettings:
        """The text's: r drawn at random, nothing behind the last step, Adam's usual averages, a rate of 1e-5; a generator's
        discriminator is shown reconstructions."""
        return cls()

    @classmethod
    def published_code(cls) -> AlignmentSettings:
        """The published code's: r starts at zeros and ends in a sigmoid (tanh, layer by layer), images are clamped to
        [0.01, 0.99], Adam at 1e-4 with averages (0.5, 0.999); a generator has no perceptual loss, its discriminator starts from
        orthogonal weights and is shown samples."""
        adversarial: dict[str, Any] = {"perceptual": 0.0, "fakes": "samples", "orthogonal_discriminator": True}
        return cls("zeros", "sigmoid", "tanh", 0.01, 0.99, 1e-4, (0.5, 0.999), **adversarial)

    @classmethod
    def named(cls, name: str) -> AlignmentSettings:
        """The preset "paper" or "published_code".

        Raises:
            ValueError: another name.
        """
        presets = {"paper": cls.paper, "published_code": cls.published_code}
        if name not in presets:
            raise ValueError(near_matches(name, presets, "preset"))
        return presets[name]()

    def differences(self, other: AlignmentSettings) -> list[tuple[str, Any, Any]]:
        """What differs: (name, here, there) each."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return [(name, here, there) for name, here, there in pairs if here != there]

    def clamp(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the models are given them."""
        return images.clamp(self.low, self.high)

    def inner(self) -> dict[str, Any]:
        """The options of :class:`FeatureAligned`, but for its output."""
        return {name: asdict(self)[name] for name in ("init", "steps", "step_size", "bound")}
