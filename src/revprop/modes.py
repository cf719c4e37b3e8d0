"""Modes: what to send backwards through an operator, given its facts. Ops + modes, never ops x modes.

A mode turns a *correction* of an operator's output (wanted minus recorded) into corrections of its inputs. Working on
corrections makes the first invariant hold to the last bit: reversing a network's own output changes nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from revprop.gauss_newton import search, search_entries
from revprop.linear_map import Factor
from revprop.rules import MARGIN, Fact, Linear, Nonlinear, Pointwise, Selection

__all__ = ["Adjoint", "Mode", "NearestPreimage", "PaperReconstruction"]


class Mode(ABC):
    """One way to walk backwards. Final classes state what they do with each kind of fact, and with a fan-out."""

    def prepare(self, fact: Fact) -> Factor | None:
        """What depends on the weights alone: computed once, used for many batches."""
        return None

    @abstractmethod
    def step(
        self, fact: Fact, state: Factor | None, inputs: Sequence[Tensor], output: Tensor, change: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Corrections of the inputs, given their recorded values (those of what is held behind them), the recorded output and
        its correction; None for an input that is to stay, whatever others ask of it."""

    @abstractmethod
    def join(self, changes: Sequence[Tensor], shares: Sequence[Tensor | None] = ()) -> Tensor:
        """One correction from those that the consumers of a value ask for.

        Args:
            shares: for each of them 1 where it asks for something, 0 at entries that it never reads; None: it reads all.
        """


@dataclass(frozen=True)
class NearestPreimage(Mode):
    """``argmin |a - a^|`` subject to ``f(a) = z*``, and its least-squares relaxation where no such ``a`` exists.

    Linear maps: ``a* = a^ + A+ (z* - z^)`` (FR-PT Eq. 4-7 in one formula). Activations: the preimage nearest to the recorded
    pre-activation; targets outside an open range are kept MARGIN inside it. Max-pooling: cut to the target or raise the largest.
    A fan-out is the map ``[I; I]``, so its pseudo-inverse is the mean. What is neither linear nor entry by entry: its rule's
    closed form, or Gauss-Newton (:mod:`revprop.gauss_newton`).

    Args:
        damping: mu relative to the largest singular value squared of each learned map.
        solver: "fft" | "exact", for convolutions.
        attention: what moves in an attention: its "values", by the recorded weights, or "all": queries and keys, too, by
            Gauss-Newton.
    """

    damping: float = 0.01
    solver: str = "fft"
    attention: str = "values"

    def prepare(self, fact: Fact) -> Factor | None:
        return fact.map.factor(self.damping, self.solver) if isinstance(fact, Linear) else None

    def step(
        self, fact: Fact, state: Factor | None, inputs: Sequence[Tensor], output: Tensor, change: Tensor
    ) -> tuple[Tensor | None, ...]:
        if isinstance(fact, Linear):
            assert state is not None
            return _as_tuple(state.solve(change))
        if isinstance(fact, Selection):
            return (fact.windows.nearest(inputs[0], output + change),)
        if isinstance(fact, Nonlinear):
            given = None if self.attention == "all" else fact.linear
            return _nearest_inputs(replace(fact, linear=given), inputs, output, change, self.damping)
        return (_nearest(fact, inputs[0], output, change),)

    def join(self, changes: Sequence[Tensor], shares: Sequence[Tensor | None] = ()) -> Tensor:
        return _mean(changes, shares)


@dataclass(frozen=True)
class PaperReconstruction(Mode):
    """FR-PT section 3 to the letter: undamped pseudo-inverses (convolutions by FFT), clamp and invert for activations of limited
    range, the identity for ReLU, copying for pooling. Kept for comparison with published results; not a fixed point."""

    margin: float = MARGIN

    def prepare(self, fact: Fact) -> Factor | None:
        return fact.map.factor(0.0, "fft") if isinstance(fact, Linear) and fact.windows is None else None

    def step(
        self, fact: Fact, state: Factor | None, inputs: Sequence[Tensor], output: Tensor, change: Tensor
    ) -> tuple[Tensor | None, ...]:
        if isinstance(fact, Linear | Selection) and fact.windows is not None:
            copied = fact.windows.spread(output + change, math.nan)
            return (torch.where(copied.isnan(), 0.0, copied - inputs[0]),)
        if isinstance(fact, Linear):
            assert state is not None
            return _as_tuple(state.solve(change))
        if isinstance(fact, Nonlinear):  # the paper has none of these
            return _nearest_inputs(fact, inputs, output, change, 0.01)
        assert isinstance(fact, Pointwise)
        inverse = fact.inverse if fact.inverse is not None else lambda value: fact.preimage(value, inputs[0])
        low, high = _limits(fact, self.margin) if fact.inverse is None else (-math.inf, math.inf)
        return (inverse((output + change).clamp(low, high)) - inputs[0],)

    def join(self, changes: Sequence[Tensor], shares: Sequence[Tensor | None] = ()) -> Tensor:
        return _mean(changes, shares)


@dataclass(frozen=True)
class Adjoint(Mode):
    """The adjoint of the linearised network: ``A^T`` and the slope. Equals reverse-mode differentiation."""

    def step(
        self, fact: Fact, state: Factor | None, inputs: Sequence[Tensor], output: Tensor, change: Tensor
    ) -> tuple[Tensor | None, ...]:
        if isinstance(fact, Linear):
            return _as_tuple(fact.map.adjoint(change))
        if isinstance(fact, Selection):
            at = fact.windows.argmax(inputs[0])
            flat = torch.zeros_like(inputs[0]).flatten(2).scatter_add_(2, at, change.flatten(2))
            return (flat.view(inputs[0].shape),)
        count = len(fact.layout.moving) if isinstance(fact, Nonlinear) else 1
        with torch.enable_grad():
            z = [value.detach().requires_grad_() for value in inputs[:count]]
            return torch.autograd.grad(fact.function(*z, *inputs[count:]), z, change, materialize_grads=True)

    def join(self, changes: Sequence[Tensor], shares: Sequence[Tensor | None] = ()) -> Tensor:
        return changes[0] if len(changes) == 1 else torch.stack(tuple(changes)).sum(0)


def _nearest(fact: Pointwise, z: Tensor, a: Tensor, change: Tensor) -> Tensor:
    low, high = _limits(fact, MARGIN)
    wanted = a + change
    if low > -math.inf or high < math.inf:
        # a recorded value beyond the margin is a legitimate target: it is where the network itself is
        wanted = torch.minimum(torch.maximum(wanted, a.clamp_max(low)), a.clamp_min(high))
    return torch.where(wanted == a, 0.0, fact.preimage(wanted, z) - z)


def _nearest_inputs(
    fact: Nonlinear, values: Sequence[Tensor], output: Tensor, change: Tensor, damping: float
) -> tuple[Tensor | None, ...]:
    count = len(fact.layout.moving)
    if not bool(change.any()):
        return tuple(torch.zeros_like(value) for value in values[:count])
    if fact.linear is not None:
        which, given = fact.linear(*values)
        (correction,) = _as_tuple(given.factor(damping).solve(change))
        return tuple(correction if i == which else None for i in range(count))
    if fact.entrywise:
        return (search_entries(lambda x: fact.function(x, *values[count:]), values[0], output + change),)
    if fact.preimage is None:
        return search(fact.function, fact.layout, values, output, change)
    found = fact.preimage(output + change, *values)
    # what is infinite (a masked logit) stays
    return tuple(
        None if new is None else torch.where(new == old, 0.0, new - old)
        for new, old in zip(found, values, strict=False)
    )


def _mean(changes: Sequence[Tensor], shares: Sequence[Tensor | None]) -> Tensor:
    """The pseudo-inverse of a fan-out: the mean over those consumers that read an entry."""
    if len(changes) == 1:
        return changes[0]
    if all(share is None for share in shares):
        return torch.stack(tuple(changes)).mean(0)
    counts = [torch.ones_like(c) if s is None else s.to(c) for c, s in zip(changes, shares, strict=True)]
    asked = torch.stack([change * count for change, count in zip(changes, counts, strict=True)]).sum(0)
    return asked / torch.stack(counts).sum(0).clamp_min(1.0)


def _limits(fact: Pointwise, margin: float) -> tuple[float, float]:
    low, high = fact.range
    width = high - low if math.isfinite(high - low) else 1.0
    return (low if fact.attained[0] else low + margin * width, high if fact.attained[1] else high - margin * width)


def _as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value
