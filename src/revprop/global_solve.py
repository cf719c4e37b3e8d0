"""The nearest features whose whole remaining network gives the wanted output.

For a layer's features ``a^`` and the network behind it ``f``:

    a* = argmin |a - a^|   subject to   f_y(a) >= f_i(a) + margin for all i     (a label), or   f(a) = z*   (a target).

Other tasks have other linear constraints on the outputs: :mod:`revprop.tasks`.

Sequential quadratic programming in the dual: linearise f at the current point, project the *recorded* features onto the
linearised constraints (a few dual variables: only classes that beat the label, or whose constraint pushed in the step before,
need a row of the Jacobian), step there under a trust region, repeat until the label really wins and the point stops moving.
Where pulling towards the recorded features does not get there, steps accumulate first and are shortened afterwards. Samples
that are right already are not touched. It is to features what DeepFool (Moosavi-Dezfooli, Fawzi, Frossard, 2016) is to inputs.

Many outputs (a label per pixel) have too many rows. There a step makes equations of the constraints that are active, those that
the outputs violate once the forces of the step before are taken away, and solves them by Jacobian products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from revprop.krylov import least_squares_and_dual
from revprop.tasks import Classification, Task, by_sample

__all__ = ["Goal", "Options", "Solution", "solve"]


DENSE_OUTPUTS = 64  # with more, and not one label per sample, the rows of the Jacobian are done without


@dataclass(frozen=True)
class Goal:
    """What the outputs should be: labels that hold by a margin, or target outputs (exactly one of the two).

    Attributes:
        labels: (n, ...), as the task has them. target: (n, ...) outputs. margin: in the outputs' units. task: of the labels.
    """

    labels: Tensor | None = None
    target: Tensor | None = None
    margin: float = 0.0
    task: Task = Classification()

    @property
    def room(self) -> float:
        """How far beyond the threshold one can aim: :meth:`revprop.tasks.Task.room`."""
        return self.task.room(self.margin) if self.labels is not None else 0.0

    def at(self, index: Tensor | slice) -> Goal:
        """The goal of some of the samples."""
        return replace(
            self,
            labels=None if self.labels is None else self.labels[index],
            target=None if self.target is None else self.target[index],
        )

    def miss(self, outputs: Tensor) -> Tensor:
        """(n,): how far each output is from its goal; not above 0 where it is met (labels), the distance (targets)."""
        if self.labels is not None:
            return self.task.miss(outputs, self.labels, self.margin)
        assert self.target is not None
        return by_sample(outputs - self.target).norm(dim=1)

    def missing(self, outputs: Tensor) -> Tensor:
        """(n, groups, k): what each constraint (labels) or equation (targets) misses, differentiable."""
        if self.labels is not None:
            return self.task.missing(outputs, self.labels, self.margin)
        assert self.target is not None
        return by_sample(self.target - outputs).unsqueeze(2)

    def wanted(self, outputs: Tensor, beyond: Tensor) -> Tensor:
        """The nearest outputs that meet the goal, labels ``beyond`` (n,) their margin; differentiable."""
        if self.labels is not None:
            return self.task.embed(outputs, self.labels, "nearest", self.margin + beyond)
        assert self.target is not None
        return self.target


@dataclass(frozen=True)
class Options:
    """Settings of :func:`solve`.

    Attributes:
        steps: at most so many linearisations. tolerance: how tight the constraint and how settled the point has to be,
            relative. trust: the longest first step, relative to the norm of the recorded features.
        pull: for so many steps the recorded features are projected; then, where the goal is not met, steps accumulate.
        ridge: added to the dual matrix, relative to its largest diagonal entry.
    """

    steps: int = 30
    tolerance: float = 0.05
    trust: float = 0.1
    pull: int = 4
    ridge: float = 1e-6


@dataclass(frozen=True)
class Solution:
    """features (n, ...), outputs of the network on them, steps (n,) taken, met (n,) whether the goal is met."""

    features: Tensor
    outputs: Tensor
    steps: Tensor
    met: Tensor


def solve(
    suffix: Callable[..., Tensor],
    recorded: Tensor,
    held: tuple[Tensor, ...],
    outputs: Tensor,
    goal: Goal,
    options: Options = Options(),
) -> Solution:
    """The nearest features that meet the goal, for each sample of a batch.

    Args:
        suffix: (features, *held) -> outputs, sample by sample independent, differentiable.
        recorded: (n, ...) the layer's features. held: other values the suffix reads, batch first.
        outputs: suffix(recorded, *held), known already.

    Returns:
        A :class:`Solution`. Where the goal is not met in ``options.steps`` steps, the nearest miss found.
    """
    dtype = recorded.dtype
    if outputs.dtype != dtype:  # a network that changes precision behind the layer
        target = None if goal.target is None else goal.target.to(dtype)
        goal = replace(goal, target=target)
        found = solve(lambda *v: suffix(*v).to(dtype), recorded, held, outputs.to(dtype), goal, options)
        return replace(found, outputs=found.outputs.to(outputs.dtype))
    scale = (
        torch.finfo(dtype).eps ** 0.75 * by_sample(outputs).abs().amax(1).clamp_min(1.0)
        if outputs.numel()
        else outputs.new_zeros(outputs.shape[0])
    )
    first = goal.miss(outputs)
    met = first <= (0.0 if goal.labels is not None else scale)
    features, results = recorded.clone(), outputs.clone()
    steps = torch.zeros(len(outputs), dtype=torch.long, device=outputs.device)
    todo = (~met).nonzero().squeeze(1)
    if len(todo):
        part = _Search(
            suffix, recorded[todo], tuple(h[todo] for h in held), goal.at(todo), first[todo], scale[todo], options
        )
        part.run()
        assert part.best_outputs is not None
        features[todo], results[todo] = part.best, part.best_outputs
        steps[todo], met[todo] = part.taken, part.best_met
    return Solution(features, results, steps, met)


class _Search:
    """The state of one batch's search; every array has one entry per sample that was wrong."""

    def __init__(
        self,
        suffix: Callable[..., Tensor],
        recorded: Tensor,
        held: tuple[Tensor, ...],
        goal: Goal,
        first: Tensor,
        scale: Tensor,
        options: Options,
    ) -> None:
        self.suffix, self.recorded, self.held, self.goal, self.options = suffix, recorded, held, goal, options
        n = len(recorded)
        self.first = first
        # labels: aim a little beyond the threshold, so that the label wins in the arithmetic at hand, too
        self.aim = torch.maximum(0.5 * options.tolerance * first.clamp_min(0), scale).clamp_max(0.5 * goal.room)
        self.size = by_sample(recorded).norm(dim=1).clamp_min(torch.finfo(recorded.dtype).tiny ** 0.5)
        self.x = recorded.clone()
        self.trust = options.trust * self.size
        self.best = recorded.clone()
        self.best_outputs: Tensor | None = None
        self.best_distance = torch.full((n,), torch.inf, dtype=recorded.dtype, device=recorded.device)
        self.best_miss = torch.full_like(self.best_distance, torch.inf)
        self.best_met = torch.zeros(n, dtype=torch.bool, device=recorded.device)
        self.taken = torch.zeros(n, dtype=torch.long, device=recorded.device)
        self.pulled = torch.ones_like(self.best_met)
        self.last_miss = torch.full_like(self.best_distance, torch.inf)
        self.last_step = torch.zeros_like(recorded)
        self.rows: Tensor | None = None  # which constraints pushed in the step before; with many outputs:
        self.force: Tensor | None = None  # how hard they pushed, on each output and in its units

    def run(self) -> None:
        todo = torch.arange(len(self.recorded), device=self.recorded.device)
        for k in range(self.options.steps + 1):
            todo = self._advance(todo, k, last=k == self.options.steps)
            if not len(todo):
                return

    def _advance(self, todo: Tensor, k: int, last: bool) -> Tensor:
        """Evaluates the current points, keeps the best, and moves those that go on; returns which those are."""
        whole = len(todo) == len(self.x)
        x = self.x[todo].requires_grad_(not last)  # a copy: the points move while this step's graph is still needed
        held = self.held if whole else tuple(h[todo] for h in self.held)
        goal = self.goal if whole else self.goal.at(todo)
        with torch.set_grad_enabled(not last):
            outputs = self.suffix(x, *held)
        going = self._judge(todo, x.detach(), outputs.detach(), goal)
        if last or not bool(going.any()):
            return todo[going]
        miss = goal.miss(outputs.detach())
        # step control: a step that made things worse (and met nothing) is halved instead of followed by another
        worse = going & (miss > self.last_miss[todo]) & (miss > 0)
        moving = going & ~worse
        if bool(worse.any()):
            back = todo[worse]
            self.last_step[back] *= 0.5
            self.x[back] = self.x[back] - self.last_step[back]
            self.trust[back] *= 0.5
        if bool(moving.any()):
            self._move(todo, x, outputs, goal, moving, k)
            self.last_miss[todo[moving]] = miss[moving]
        self.taken[todo[going]] += 1
        return todo[going]

    def _judge(self, todo: Tensor, x: Tensor, outputs: Tensor, goal: Goal) -> Tensor:
        """Keeps the nearest point that meets the goal (else the nearest miss); says which samples go on."""
        miss = goal.miss(outputs)
        distance = by_sample(x - self.recorded[todo]).norm(dim=1)
        tolerance = self.options.tolerance
        if goal.labels is not None:
            met = miss <= 0
            tight = met & (miss >= -torch.maximum(tolerance * self.first[todo], 2 * self.aim[todo]))
        else:
            met = miss <= 0.01 * tolerance * self.first[todo]
            tight = met
        old_distance, old_met, old_miss = self.best_distance[todo], self.best_met[todo], self.best_miss[todo]
        better = torch.where(met, ~old_met | (distance < old_distance), ~old_met & (miss < old_miss))
        settled = met & old_met & (distance > old_distance * (1 - 0.2 * tolerance))
        if self.best_outputs is None:
            self.best_outputs = outputs.clone()
        at = todo[better]
        self.best[at], self.best_outputs[at] = x[better], outputs[better]
        self.best_distance[at], self.best_met[at], self.best_miss[at] = distance[better], met[better], miss[better]
        step = by_sample(self.last_step[todo]).norm(dim=1)
        # only a point that was projected from the recorded features can be the nearest; accumulated steps are shortened first
        still = tight & self.pulled[todo] & ((step <= 4 * tolerance * distance) | (self.taken[todo] <= 1))
        return ~(still | settled)

    def _move(self, todo: Tensor, x: Tensor, outputs: Tensor, goal: Goal, moving: Tensor, k: int) -> None:
        if outputs[0].numel() > DENSE_OUTPUTS and (goal.labels is None or goal.labels[0].numel() > 1):
            self._move_iteratively(todo, x, outputs, goal, moving, k)
            return
        with torch.enable_grad():
            missing = goal.missing(outputs)
            each = missing.flatten(1)
        bounds, chosen = self._constraints(todo, missing.detach(), goal)
        jacobian = self._jacobian(x, each, chosen)
        at = todo[moving]
        x, jacobian, b = x.detach()[moving], jacobian[moving], bounds[moving]
        away = self._away(at, x, k)
        b = b + torch.where(b > -torch.inf, (jacobian @ away.unsqueeze(-1)).squeeze(-1), 0.0)
        # in units of its largest entry, so that a vanishing Jacobian gives a finite step, and a zero one none
        # (only rows that are constraints count: how many rows there are depends on the other samples of the batch)
        jacobian = torch.where((b > -torch.inf).unsqueeze(-1), jacobian, 0.0)
        scale = jacobian.abs().amax((1, 2))
        scale = torch.where(scale > 0, scale, 1.0)
        jacobian, b = jacobian / scale[:, None, None], b / scale[:, None]
        gram = jacobian @ jacobian.mT
        size = torch.diagonal(gram, dim1=1, dim2=2).amax(1).clamp_min(1.0)
        gram = gram + (self.options.ridge * size)[:, None, None] * torch.eye(
            gram.shape[1], dtype=gram.dtype, device=gram.device
        )
        if goal.labels is None:
            dual = torch.linalg.solve(gram, b)
        else:
            dual = _nonnegative(gram, b)
            assert self.rows is not None
            # a constraint that holds without force is dropped until it is violated again
            self.rows[at] = torch.zeros_like(self.rows[at]).scatter(1, chosen[moving], dual > 0)
        self._step(at, x, (jacobian.mT @ dual.unsqueeze(-1)).squeeze(-1) - away)

    def _move_iteratively(self, todo: Tensor, x: Tensor, outputs: Tensor, goal: Goal, moving: Tensor, k: int) -> None:
        """The same for many outputs: the least-squares solution of smallest norm by conjugate gradients on the normal
        equations; their products are a vector-Jacobian and a Jacobian-vector product (the latter by differentiating the
        former, which is linear, once more).

        Of labels the active constraints are the face of the wanted set that is nearest to the outputs less the forces on them
        (a primal-dual active set); the derivative of ``out - wanted(out)`` projects onto the normals of that face."""
        if self.force is None:
            self.force = outputs.new_zeros((len(self.x), *outputs.shape[1:]))
        with torch.enable_grad():
            out = outputs - self.force[todo]
            wanted = goal.wanted(out, self.aim[todo])
            off = out - wanted
        probe = torch.zeros_like(off, requires_grad=True)
        pulled = torch.autograd.grad(off, x, probe, create_graph=True)[0]

        def normal(y: Tensor) -> Tensor:
            return torch.autograd.grad(off, outputs, y, retain_graph=True)[0]

        def transposed(y: Tensor) -> Tensor:
            return torch.autograd.grad(off, x, y, retain_graph=True)[0]

        def forward(v: Tensor) -> Tensor:
            return torch.autograd.grad(pulled, probe, v, retain_graph=True)[0]

        away = self._away(todo, x.detach(), k).view(x.shape)
        # where many outputs are wanted, directions that change them little are not followed far
        radius = None if goal.labels is not None else torch.where(self.pulled[todo], torch.inf, self.trust[todo])
        missing = normal((wanted - outputs).detach()) + forward(away)
        change, dual = least_squares_and_dual(forward, transposed, missing, 1e-3 * self.options.tolerance, 200, radius)
        if goal.labels is not None:
            pull = by_sample(normal(dual))
            # in the outputs' units: a constraint that pulled is kept until it holds by about as much as was missing
            units = by_sample(missing).norm(dim=1) / pull.norm(dim=1).clamp_min(torch.finfo(pull.dtype).tiny)
            force = (units[:, None] * pull).clamp(-0.5 * goal.room, 0.5 * goal.room).view(outputs.shape)
            self.force[todo[moving]] = force[moving]
        change = by_sample(change - away)
        self._step(todo[moving], x.detach()[moving], change[moving])

    def _away(self, at: Tensor, x: Tensor, k: int) -> Tensor:
        """(n, features): how far the point is from what is projected: the recorded features, or the point itself once steps
        accumulate."""
        pull = (k < self.options.pull) | self.best_met[at]
        self.pulled[at] = pull
        return torch.where(pull[:, None], by_sample(x - self.recorded[at]), 0.0)

    def _step(self, at: Tensor, x: Tensor, step: Tensor) -> None:
        length = step.norm(dim=1)
        # recorded features of zeros set no scale: the first step does, which is halved where it goes too far
        scaled = (self.taken[at] > 0) | (self.size[at] > torch.finfo(length.dtype).eps * length)
        self.trust[at] = torch.where(scaled, self.trust[at], length)
        shrink = (self.trust[at] / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1.0)
        # a step that the trust region cut and that helped may be longer next time
        self.trust[at] = torch.where(length > 0.999 * self.trust[at], 1.5 * self.trust[at], self.trust[at])
        step = (step * shrink[:, None]).view(x.shape)
        self.last_step[at] = step
        self.x[at] = x + step

    def _constraints(self, todo: Tensor, missing: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
        """What the constraints that count miss (n, k; -inf: no constraint), and which of all they are (n, k)."""
        if goal.labels is None:
            missing = missing.flatten(1)
            return missing, torch.arange(missing.shape[1], device=missing.device).expand(missing.shape)
        missing = missing + self.aim[todo][:, None, None]
        active, missing = _active(missing).flatten(1), missing.flatten(1)
        if self.rows is None:
            self.rows = torch.zeros(len(self.x), missing.shape[1], dtype=torch.bool, device=missing.device)
        active = active | self.rows[todo]
        k = max(int(active.sum(1).max()), 1)
        order = torch.where(active, missing, -torch.inf).topk(k, dim=1)
        return order.values, order.indices

    def _jacobian(self, x: Tensor, missing: Tensor, chosen: Tensor) -> Tensor:
        """(n, k, features): of what the chosen constraints are about, one vector-Jacobian product each, all samples at once."""
        parts = []
        for j in range(chosen.shape[1]):
            last = j == chosen.shape[1] - 1
            row = torch.zeros_like(missing).scatter_(1, chosen[:, j : j + 1], -1.0)
            parts.append(by_sample(torch.autograd.grad(missing, x, row, retain_graph=not last)[0]))
        return torch.stack(parts, 1)


def _active(missing: Tensor) -> Tensor:
    """The constraints that are active in the nearest embedding, given what they miss, group by group (n, groups, k)."""
    d, order = missing.sort(dim=-1, descending=True)
    positive = d > 0
    sums = torch.where(positive, d, 0.0).cumsum(-1)
    count = torch.arange(1, d.shape[-1] + 1, device=d.device, dtype=d.dtype)
    active = positive & (sums < (count + 1) * d)
    return torch.zeros_like(active).scatter(-1, order, active)


def _nonnegative(gram: Tensor, b: Tensor, rounds: int = 30) -> Tensor:
    """``argmin 1/2 y^T G y - b^T y`` over y >= 0 for a batch of small positive definite G: primal-dual active sets.

    Entries with b = -inf are no constraints. What the active sets leave unsettled is finished by Hildreth's method.
    """
    present = b > -torch.inf
    b = torch.where(present, b, 0.0)
    active = present & (b > 0)
    eye = torch.eye(b.shape[1], dtype=b.dtype, device=b.device)
    y = torch.zeros_like(b)
    for _ in range(rounds):
        both = active[:, :, None] & active[:, None, :]
        y = torch.linalg.solve(torch.where(both, gram, eye), torch.where(active, b, 0.0))
        slack = b - (gram @ y.unsqueeze(-1)).squeeze(-1)
        new = present & torch.where(active, y > 0, slack > 1e-6 * b.abs().amax(1, keepdim=True))
        if bool((new == active).all()):
            return y.clamp_min(0.0)
        active = new
    y = y.clamp_min(0.0)
    diagonal = torch.diagonal(gram, dim1=1, dim2=2)
    for _ in range(200):
        for j in range(b.shape[1]):
            residual = b[:, j] - (gram[:, j] * y).sum(1)
            y[:, j] = torch.where(present[:, j], (y[:, j] + residual / diagonal[:, j]).clamp_min(0.0), 0.0)
    return y
