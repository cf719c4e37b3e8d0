"""Sweeps that make a greedy walk keep its promise: re-record at the point reached, reverse what is still missing, go on.

A walk loses part of a correction wherever branches meet or damping acts, and past activations it is a linear guess. Each sweep
runs the network behind the layer again, walks back the remaining change of its output, measures what the step does to the
output, and combines it with earlier steps by least squares in the output's space (as Anderson, 1965, accelerates fixed-point
iterations). It needs nothing but walks and forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from revprop.global_solve import Goal
from revprop.graph import Graph
from revprop.modes import Mode
from revprop.reverse import walk
from revprop.samples import Samples
from revprop.tasks import Task, by_sample

__all__ = ["Remaining", "refine", "slack"]

MEMORY = 12  # steps that are combined
TRUST = 0.2  # of a first step, relative to the features' norm


def refine(
    graph: Graph,
    mode: Mode,
    node: fx.Node,
    recorded: Mapping[fx.Node, Tensor],
    change: Callable[[Tensor, Tensor], Tensor],
    miss: Callable[[Tensor, Tensor], Tensor],
    sweeps: int,
    blocks: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """Features of one layer whose output is as wanted, by repeated walks from the recorded ones.

    Args:
        node: the layer's. recorded: every value, as :meth:`Graph.record` returns them.
        change: (outputs, which samples they are) -> what is to be added to these outputs.
        miss: (outputs, which samples they are) -> (n,) not above 0 where a sample needs no more.
        sweeps: at most so many. blocks: as for :func:`revprop.reverse.walk`.

    Returns:
        the features, and (n,) how many sweeps each sample took.
    """
    front, behind = recorded[node], graph.descendants([node])
    nodes = [n for n in graph.nodes if n in behind and n is not node]
    read = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in behind and a in recorded)
    held = tuple(a for a in read if isinstance(recorded[a], Tensor))
    everything, output = graph.segment((node, *held), tuple(nodes)), graph.segment((node, *held), (graph.output,))
    x, outputs = front.clone(), recorded[graph.output].clone()
    taken = torch.zeros(len(x), dtype=torch.long, device=x.device)
    trust = TRUST * x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny) if x.numel() else x.new_zeros(len(x))
    memory = _Memory()
    with torch.no_grad():
        for _ in range(sweeps):
            every = torch.arange(len(x), device=x.device)
            todo = every[miss(outputs, every) > 0]
            if not len(todo):
                break
            aside = [_part(a, recorded[a], todo) for a in held]
            here, now = x[todo], outputs[todo]
            values = {**dict(zip(nodes, everything(here, *aside), strict=True)), node: here}
            values |= dict(zip(held, aside, strict=True))
            wanted = change(now, todo)
            step = _shortened(walk(graph, mode, values, wanted, [node], blocks)[node], 0.5 * trust[todo])
            memory.keep(step, output(here + step, *aside)[0] - now, todo, len(x))
            whole = memory.combined(wanted, todo).view(here.shape)
            step = _shortened(whole, trust[todo])
            before = miss(now, todo)
            after = output(here + step, *aside)[0]
            worse = ~(miss(after, todo) < before)
            # a step that was cut and helped may be longer next time, one that led away is cut
            cut = whole.flatten(1).norm(dim=1) > trust[todo]
            trust[todo] *= torch.where(worse, 0.3, torch.where(cut, 2.0, 1.0))
            if bool(worse.any()):
                step[worse] *= 0.3
                after = output(here + step, *aside)[0]
            memory.keep(step, after - now, todo, len(x))
            good = miss(after, todo) < before
            x[todo[good]], outputs[todo[good]] = (here + step)[good], after[good]
            taken[todo] += 1
    return x, taken


class _Memory:
    """Steps taken or tried, and what they did to the output, for every sample of the batch."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.effects: list[Tensor] = []

    def keep(self, step: Tensor, effect: Tensor, index: Tensor, n: int) -> None:
        for kept, new in ((self.steps, step), (self.effects, effect)):
            whole = new.new_zeros(n, new[0].numel())
            whole[index] = torch.where(new.isfinite(), new, 0.0).flatten(1)
            kept.append(whole)
            del kept[:-MEMORY]

    def combined(self, wanted: Tensor, index: Tensor) -> Tensor:
        """(n, features): the combination of steps whose effects add up to what is wanted, by damped least squares."""
        effects = torch.stack([effect[index] for effect in self.effects], 2)
        gram = effects.mT @ effects
        size = torch.diagonal(gram, dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(gram.dtype).tiny)
        gram = gram + (1e-3 * size)[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        shares = torch.linalg.solve(gram, effects.mT @ wanted.flatten(1).unsqueeze(2)).squeeze(2)
        return torch.stack([step[index] * shares[:, i, None] for i, step in enumerate(self.steps)]).sum(0)


def _part(node: fx.Node, value: Tensor, index: Tensor) -> Tensor:
    """Some of the samples of a value that is held, which may be the same for all."""
    samples = Samples.of(node.meta["val"])
    return value if samples is None else samples.take(value, index)


def _shortened(step: Tensor, longest: Tensor) -> Tensor:
    """Steps no longer than allowed; none where a step is not finite."""
    step = torch.where(step.isfinite().flatten(1).all(1).view(-1, *[1] * (step.dim() - 1)), step, 0.0)
    share = (longest / step.flatten(1).norm(dim=1).clamp_min(torch.finfo(step.dtype).tiny)).clamp_max(1.0)
    return step * share.view(-1, *[1] * (step.dim() - 1))


@dataclass(frozen=True)
class Remaining:
    """What is left to be reversed at outputs on the way."""

    goal: Goal
    output: Tensor

    def change(self, outputs: Tensor, index: Tensor) -> Tensor:
        goal = self.goal.at(index)
        if goal.labels is not None:
            return goal.task.embed(outputs, goal.labels, "nearest", goal.margin) - outputs
        assert goal.target is not None
        return goal.target - outputs

    def miss(self, outputs: Tensor, index: Tensor) -> Tensor:
        goal = self.goal.at(index)
        if goal.labels is not None:
            return goal.miss(outputs) - 0.5 * slack(outputs, goal.task)
        return goal.miss(outputs) - 5e-4 * goal.miss(self.output[index])


def slack(outputs: Tensor, task: Task) -> Tensor:
    """(n,) by how much labels may miss and still tie, in the arithmetic at hand."""
    if not outputs.numel():
        return outputs.new_zeros(len(outputs))
    return (1e-4 * by_sample(outputs).abs().amax(1).clamp_min(1.0)).clamp_max(0.01 * task.room())
