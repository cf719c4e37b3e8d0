"""Normalisation: by constants (batch norm in eval mode, a diagonal map), and by the statistics of the entries themselves.

Layer, group, instance and RMS norm are ``y = gamma u + beta`` with ``u = c / sqrt(|c|^2 / m + eps)`` over groups of m entries,
``c = x - mean(x)`` (RMS norm: ``c = x``). All outputs lie inside the sphere ``|u| = sqrt(m)``, and nearly on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from revprop.linear_map import Diagonal
from revprop.rules.registry import Call, Fact, Linear, Nonlinear, Refusal, rule
from revprop.samples import Samples

aten = torch.ops.aten
NEAREST = 0.1  # to the centre, as a share of the recorded distance


@rule(aten.batch_norm.default)
def batch_norm(call: Call) -> Fact:
    """``z = (a - mean) / sqrt(var + eps) * weight + bias``, per channel, with the running statistics."""
    call.only()
    return _by_constants(call)


@rule(aten._native_batch_norm_legit.no_stats, anywhere=True)
def batch_statistics(call: Call) -> Fact:
    raise Refusal(
        'it normalises by the statistics of the batch; set track_running_stats=True, or use strategy="global"',
        final=True,
    )


@rule(aten.layer_norm.default, anywhere=True)
def layer_norm(call: Call) -> Fact:
    """Groups: the last dimensions. See :func:`normalised`."""
    return _over_the_last(call, centred=True)


@rule(aten.rms_norm.default, anywhere=True)
def rms_norm(call: Call) -> Fact:
    """Groups: the last dimensions; nothing is centred. See :func:`normalised`."""
    return _over_the_last(call, centred=False)


@rule(aten.group_norm.default)
def group_norm(call: Call) -> Fact:
    """Groups: neighbouring channels with all their positions. See :func:`normalised`."""
    return _over_channels(call, int(call["num_groups"]))


@rule(aten.instance_norm.default)
def instance_norm(call: Call) -> Fact:
    """Groups: one channel each; with running statistics in eval mode a diagonal map. See :func:`normalised`."""
    call.only()
    return _over_channels(call, call.shape[0]) if call["use_input_stats"] else _by_constants(call)


@rule(aten.linalg_vector_norm.default, anywhere=True)
def vector_norm(call: Call) -> Fact:
    """The Euclidean norm: the entries are scaled to the wanted one. From 0 every direction is equally far, so all rise alike."""
    value = call.only().meta["val"]
    samples, dims = Samples.of(value), tuple(d % value.dim() for d in call["dim"] or ())
    if float(call["ord"]) != 2.0 or not dims or samples is None or samples.axis in dims:
        raise Refusal('it is not the Euclidean norm of each sample; use strategy="global"')

    def preimage(wanted: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        kept = wanted.clamp_min(0.0)
        for d in () if call["keepdim"] else sorted(dims):
            kept = kept.unsqueeze(d)
        norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
        even = math.prod(x.shape[d] for d in dims) ** -0.5
        return (torch.where(norm > 0, x / norm, even) * kept,)

    return Nonlinear(call.run, preimage)


def _by_constants(call: Call) -> Fact:
    variance, weight = call.constant("running_var"), call.constant("weight")
    assert variance is not None
    scale = torch.rsqrt(variance + call["eps"])
    scale = scale if weight is None else scale * weight
    return Linear(Diagonal(scale.view(-1, *[1] * (len(call.shape) - 1))))


def _over_the_last(call: Call, centred: bool) -> Fact:
    value, count = call.only().meta["val"], len(call["normalized_shape"])
    samples = Samples.of(value)
    if samples is None or samples.axis >= value.dim() - count:
        raise Refusal('it mixes samples, or the batch size is in more than one dimension; use strategy="global"')
    weight, eps = call.constant("weight"), call["eps"]
    gain = None if weight is None else weight.flatten()
    return normalised(
        call,
        Groups(lambda x: x.flatten(-count), gain, centred),
        torch.finfo(value.dtype).eps if eps is None else float(eps),
    )


def _over_channels(call: Call, groups: int) -> Fact:
    call.only()
    weight = call.constant("weight")
    channels, *size = call.shape
    gain = None if weight is None else weight.repeat_interleave(math.prod(size)).view(groups, -1)
    entries = channels // groups * math.prod(size)
    return normalised(call, Groups(lambda x: x.reshape(len(x), groups, entries), gain, True), float(call["eps"]))


@dataclass(frozen=True)
class Groups:
    """What is normalised together.

    Attributes:
        of: a value -> its groups (..., m). gain: gamma in the same layout, or None. centred: whether the mean is taken off.
    """

    of: Callable[[Tensor], Tensor]
    gain: Tensor | None
    centred: bool

    def deviations(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


def normalised(call: Call, groups: Groups, eps: float) -> Nonlinear:
    """Layer, group, instance and RMS norm: the nearest entries in the wanted direction.

    The target's ``u*`` (without its mean) has the direction ``d = u* / |u*|``. An input has it where its deviations from its
    mean are ``s d``, s > 0; the mean is free, so it stays. Only ``s = sqrt(eps |u*|^2 / (1 - |u*|^2 / m))`` gives the length
    of ``u*``, too. It is taken where there is such a number (``|u*|^2 < m``) between a tenth and ten times the recorded one, or
    where the recorded one is below ``sqrt(m eps)``, so that it says nothing. For nearly every target there is none: then s is
    the nearest, ``<c^, d>``, but no less than a tenth of the recorded one and ``sqrt(m eps)``, as the direction is lost at the
    centre. Groups that nothing is asked of, that are asked for no direction (``u* = 0``), or whose gamma is 0 stay.

    Raises:
        Refusal: some gamma of a group is 0 and others are not. Then any entry fits there, and the nearest ones are searched.
    """
    gain = groups.gain
    if gain is not None:
        lost = gain.abs() <= gain.abs().amax(-1, keepdim=True) * torch.finfo(gain.dtype).eps
        if bool((lost.any(-1) & (gain != 0).any(-1)).any()):
            raise Refusal('some of its weights are 0 and others are not; use strategy="global"')
        gain = torch.where(gain == 0, math.inf, gain)

    def preimage(wanted: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        if x.numel() == 0:
            return (x,)
        entries = groups.of(x)
        c = groups.deviations(entries)
        m, norm = c.shape[-1], torch.linalg.vector_norm(c, dim=-1, keepdim=True)
        spread = norm.square() / m + eps
        own = c / spread.sqrt()
        change = groups.of(wanted - call.run(x))
        step = groups.deviations(change if gain is None else change / gain)
        aim = own + step
        length = torch.linalg.vector_norm(aim, dim=-1, keepdim=True)
        tiny, rounding = torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).eps
        # the room that eps leaves inside the sphere, 1 - |aim|^2 / m, without cancellation
        room = eps / spread - (step * (aim + own)).sum(-1, keepdim=True) / m
        exact = length * (eps / room.clamp_min(tiny)).sqrt()
        least = (norm * NEAREST).clamp_min(math.sqrt(m * eps))
        direction = aim / length.clamp_min(tiny)
        nearest = torch.maximum((c * direction).sum(-1, keepdim=True), least)
        alike = (exact >= norm * NEAREST) & (exact <= norm / NEAREST)
        scale = torch.where((room > 4 * rounding) & (alike | (norm < math.sqrt(m * eps))), exact, nearest)
        asked = step.any(-1, keepdim=True) & (length > 16 * rounding * math.sqrt(m))
        moved = torch.where(asked, scale * direction - c, 0.0)
        return ((entries + moved).view(x.shape),)

    return Nonlinear(call.run, preimage)
