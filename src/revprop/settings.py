"""How to reconstruct: the options that every verb shares, checked together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from revprop.embedding import EMBEDDINGS
from revprop.errors import near_matches
from revprop.modes import Mode, NearestPreimage, PaperReconstruction

__all__ = ["Settings"]

STRATEGIES = ("global", "greedy")
RULES = ("nearest", "paper")
SOLVERS = ("fft", "exact")
ATTENTION = ("values", "all")


@dataclass(frozen=True)
class Settings:
    """How to reconstruct; the options of :func:`reconstruct`, checked together.

    Raises:
        ValueError: an unknown option, with the near matches, or a negative damping.

    >>> Settings(strategy="greedi")
    Traceback (most recent call last):
    ValueError: unknown strategy 'greedi'; did you mean 'greedy'?
    """

    embedding: str = "nearest"
    rules: str = "nearest"
    strategy: str = "global"
    damping: float = 0.01
    solver: str = "fft"
    margin: float = 0.0
    tolerance: float = 0.05
    blocks: str | Sequence[str] = ()
    refine: int = 0
    attention: str = "values"

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.embedding, tuple(EMBEDDINGS), "embedding"),
            (self.rules, RULES, "rules"),
            (self.strategy, STRATEGIES, "strategy"),
            (self.solver, SOLVERS, "solver"),
            (self.attention, ATTENTION, "attention"),
        ):
            if value not in known:
                raise ValueError(near_matches(str(value), known, what))
        object.__setattr__(self, "blocks", (self.blocks,) if isinstance(self.blocks, str) else tuple(self.blocks))
        if self.refine < 0:
            raise ValueError(f"refine: expected a number of sweeps >= 0; given {self.refine}")
        for option, given in (("blocks", self.blocks), ("refine", self.refine)):
            if given and self.strategy != "greedy":
                raise ValueError(f'{option} is an option of the greedy walk: pass strategy="greedy" with it')
        if not self.tolerance > 0:
            raise ValueError(f"tolerance: expected a number > 0; given {self.tolerance}")
        if not math.isfinite(self.margin):
            raise ValueError(f"margin: expected a finite number; given {self.margin}")
        if not self.damping >= 0:
            raise ValueError(
                f"damping: expected a number >= 0, relative to the largest singular value squared; given {self.damping}"
            )
        if self.strategy == "global" and self.rules == "paper":
            raise ValueError('rules="paper" is the published greedy walk: pass strategy="greedy" with it')

    def mode(self) -> Mode:
        """The mode of the greedy walk."""
        return (
            PaperReconstruction()
            if self.rules == "paper"
            else NearestPreimage(self.damping, self.solver, self.attention)
        )
