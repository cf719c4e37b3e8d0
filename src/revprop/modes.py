"""Modes: what to send backwards through an operator, given its facts. Ops + modes, never ops x modes.

A mode turns a *correction* of an operator's output (wanted minus recorded) into corrections of its inputs. Working on
corrections makes the first invariant hold to the last bit: reversing a network's own output changes nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revprop.linear_map import Factor
from revprop.rules import Fact, Linear, Pointwise, Selection

__all__ = ["Adjoint", "Mode", "NearestPreimage", "PaperReconstruction"]

MARGIN = (
    1e-3  # how far from the end of an open range a target is kept, as a share of the range (of 1 where it is unbounded)
)


class Mode(ABC):
    """One way to walk backwards. Final classes state what they do with each kind of fact, and with a fan-out."""

    def prepare(self, fact: Fact) -> Factor | None:
        """What depends on the weights alone: computed once, used for many batches."""
        return None

    @abstractmethod
    def step(
        self, fact: Fact, state: Factor | None, inputs: Sequence[Tensor], output: Tensor, change: Tensor
    ) -> tuple[Tensor, ...]:
        """Corrections of the inputs, given recorded inputs and output and the output's correction."""

    @abstractmethod
    def join(self, changes: Sequence[Tensor]) -> Tensor:
        """One correction from those that the consumers of a value ask for."""


@dataclass(frozen=True)
class NearestPreimage(Mode):
    """``argmin |a - a^|`` subject to ``f(a) = z*``, and its least-squares relaxation where no such ``a`` exists.

    Linear maps: ``a* = a^ + A+ (z* - z^)`` (FR-PT Eq. 4-7 in one formula). Activations: the preimage nearest to the recorded
    pre-activation; targets outside an open range are kept MARGIN inside it. Max-pooling: cut to the target or raise the largest.
    A fan-out is the map ``[I; I]``, so its pseudo-inverse is the mean.

    Args:
        damping: mu relative to the largest singular value squared of each learned map.
        solver: "fft" | "exact", for convolutions.
    """

    damping: float = 0.01
    solver: str = "fft"

    def prepare(self, fact: Fact) -> Factor | None:
        return fact.map.factor(self.damping, self.solver) if isinstance(fact, Linear) else None

    def step(
        self, fact: Fact, state: Factor | None, inputs: Sequence[Tensor], output: Tensor, change: Tensor
    ) -> tuple[Tensor, ...]:
        if isinstance(fact, Linear):
            assert state is not None
            return _as_tuple(state.solve(change))
        if isinstance(fact, Selection):
            return (fact.windows.nearest(inputs[0], output + change),)
        return (_nearest(fact, inputs[0], output, change),)

    def join(self, changes: Sequence[Tensor]) -> Tensor:
        return changes[0] if len(changes) == 1 else torch.stack(tuple(changes)).mean(0)


@dataclass(frozen=True)
class PaperReconstruction(Mode):
    """FR-PT section 3 to the letter: undamped pseudo-inverses (convolutions by FFT), clamp and invert for activations of limited
    range, the identity for ReLU, copying for pooling. Kept for comparison with published results; not a fixed point."""

    margin: float = MARGIN

    def prepare(self, fact: Fact) -> Factor | None:
        return fact.map.factor(0.0, "fft") if isinstance(fact, Linear) and fact.windows is None else None

    def step(
        self, fact: Fact, state: Factor | None, inputs: Sequence[Tensor], output: Tensor, change: Tensor
    ) -> tuple[Tensor, ...]:
        if isinstance(fact, Linear | Selection) and fact.windows is not None:
            copied = fact.windows.spread(output + change, math.nan)
            return (torch.where(copied.isnan(), 0.0, copied - inputs[0]),)
        if isinstance(fact, Linear):
            assert state is not None
            return _as_tuple(state.solve(change))
        assert isinstance(fact, Pointwise)
        inverse = fact.inverse if fact.inverse is not None else lambda value: fact.preimage(value, inputs[0])
        low, high = _limits(fact, self.margin) if fact.inverse is None else (-math.inf, math.inf)
        return (inverse((output + change).clamp(low, high)) - inputs[0],)

    def join(self, changes: Sequence[Tensor]) -> Tensor:
        return changes[0] if len(changes) == 1 else torch.stack(tuple(changes)).mean(0)


@dataclass(frozen=True)
class Adjoint(Mode):
    """The adjoint of the linearised network: ``A^T`` and the slope. Equals reverse-mode differentiation."""

    def step(
        self, fact: Fact, state: Factor | None, inputs: Sequence[Tensor], output: Tensor, change: Tensor
    ) -> tuple[Tensor, ...]:
        if isinstance(fact, Linear):
            return _as_tuple(fact.map.adjoint(change))
        if isinstance(fact, Selection):
            at = fact.windows.argmax(inputs[0])
            flat = torch.zeros_like(inputs[0]).flatten(2).scatter_add_(2, at, change.flatten(2))
            return (flat.view(inputs[0].shape),)
        with torch.enable_grad():
            z = inputs[0].detach().requires_grad_()
            return (torch.autograd.grad(fact.function(z), z, change)[0],)

    def join(self, changes: Sequence[Tensor]) -> Tensor:
        return changes[0] if len(changes) == 1 else torch.stack(tuple(changes)).sum(0)


def _nearest(fact: Pointwise, z: Tensor, a: Tensor, change: Tensor) -> Tensor:
    low, high = _limits(fact, MARGIN)
    wanted = a + change
    if low > -math.inf or high < math.inf:
        # a recorded value beyond the margin is a legitimate target: it is where the network itself is
        wanted = torch.minimum(torch.maximum(wanted, a.clamp_max(low)), a.clamp_min(high))
    return torch.where(wanted == a, 0.0, fact.preimage(wanted, z) - z)


def _limits(fact: Pointwise, margin: float) -> tuple[float, float]:
    low, high = fact.range
    width = high - low if math.isfinite(high - low) else 1.0
    return (low if fact.attained[0] else low + margin * width, high if fact.attained[1] else high - margin * width)


def _as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value
