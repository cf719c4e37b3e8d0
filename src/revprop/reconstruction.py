"""``reconstruct``: the features a network should have had, layer by layer, with certificates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from revprop import global_solve
from revprop.certificate import Certificate, MapCertificate
from revprop.embedding import EMBEDDINGS
from revprop.errors import near_matches, require_finite
from revprop.graph import Example, Graph
from revprop.linear_map import Factor
from revprop.modes import Mode, NearestPreimage, PaperReconstruction
from revprop.reverse import as_graph, factors_behind, walk
from revprop.tasks import Task, by_sample, infer

__all__ = ["Certificate", "MapCertificate", "Reconstruction", "Settings", "reconstruct"]

STRATEGIES = ("global", "greedy")
RULES = ("nearest", "paper")
SOLVERS = ("fft", "exact")


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

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.embedding, tuple(EMBEDDINGS), "embedding"),
            (self.rules, RULES, "rules"),
            (self.strategy, STRATEGIES, "strategy"),
            (self.solver, SOLVERS, "solver"),
        ):
            if value not in known:
                raise ValueError(near_matches(str(value), known, what))
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
        return PaperReconstruction() if self.rules == "paper" else NearestPreimage(self.damping, self.solver)


@dataclass
class Reconstruction(Mapping[str, Tensor]):
    """Wanted features by layer name; a mapping, ``rec["conv1"]`` is ``(n, ...)`` like the layer's output.

    Attributes:
        recorded: the features the network has, by layer. deviation: (n,) relative to their norm, by layer.
        output: (n, ...) the network's output; wanted: the output asked for.
        certificates: by layer; computed when first asked for, by running the rest of the network on the wanted features.
    """

    graph: Graph = field(repr=False)
    features: dict[str, Tensor] = field(repr=False)
    recorded: dict[str, Tensor] = field(repr=False)
    output: Tensor = field(repr=False)
    wanted: Tensor = field(repr=False)
    settings: Settings
    goal: global_solve.Goal = field(repr=False)
    _held: dict[str, tuple[Tensor, ...]] = field(repr=False)
    _steps: dict[str, Tensor] = field(repr=False)

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self.features:
            raise KeyError(near_matches(layer, self.features, "layer of this reconstruction"))
        return self.features[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.features)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def deviation(self) -> dict[str, Tensor]:
        return {layer: _relative(self.features[layer], self.recorded[layer]) for layer in self.features}

    @property
    def certificates(self) -> Mapping[str, Certificate]:
        return _Certificates(self)


class _Certificates(Mapping[str, Certificate]):
    """Certificates on demand: each is one pass through the network behind its layer."""

    def __init__(self, reconstruction: Reconstruction) -> None:
        self._of = reconstruction

    def __iter__(self) -> Iterator[str]:
        return iter(self._of.features)

    def __len__(self) -> int:
        return len(self._of.features)

    def __getitem__(self, layer: str) -> Certificate:
        rec = self._of
        features = rec[layer]
        suffix, _ = rec.graph.behind(layer)
        with torch.no_grad():
            outputs = suffix(features, *rec._held[layer])[0]
        goal, settings = rec.goal, rec.settings
        if goal.labels is not None:
            if settings.embedding == "nearest":
                require_finite(outputs, f"the network's output on the wanted features of {layer!r}")
            slack = (
                1e-4 * by_sample(outputs).abs().amax(1).clamp_min(1.0)
                if outputs.numel()
                else outputs.new_zeros(len(outputs))
            )
            # a tie holds, as far as single precision tells; where little room is left, that much less
            reached = goal.task.miss(outputs, goal.labels) <= slack.clamp_max(0.01 * goal.task.room())
            wanted = (
                goal.task.embed(outputs, goal.labels, "nearest", goal.margin)
                if settings.embedding == "nearest"
                else rec.wanted
            )
        else:
            wanted = rec.wanted
            reached = _distance(outputs, wanted) <= 1e-3 * _distance(rec.output, wanted) + 1e-6 * _norm(wanted)
        greedy = settings.strategy == "greedy"
        return Certificate(
            _distance(outputs, wanted),
            reached,
            rec.deviation[layer],
            settings.strategy,
            settings.solver if greedy else "dual active set",
            (0.0 if settings.rules == "paper" else settings.damping) if greedy else global_solve.Options().ridge,
            rec._steps.get(layer),
            _maps(rec.graph, settings, rec.graph.node(layer)) if greedy else (),
        )


def reconstruct(
    model: nn.Module | Graph,
    x: Example,
    labels: Tensor | None = None,
    task: Task | None = None,
    *,
    target: Tensor | None = None,
    to: str | Sequence[str] | None = None,
    embedding: Literal["nearest", "maximum", "one_hot"] = "nearest",
    rules: Literal["nearest", "paper"] = "nearest",
    strategy: Literal["global", "greedy"] = "global",
    damping: float = 0.01,
    solver: Literal["fft", "exact"] = "fft",
    margin: float = 0.0,
    tolerance: float = 0.05,
    batch_size: int = 256,
) -> Reconstruction:
    """The features that layers should have had for the wanted output.

    ``strategy="global"``: for each layer named, ``argmin |a - a^|`` subject to the network behind it giving the wanted output;
    needs no rule for any operator. ``strategy="greedy"`` (FR-PT): one walk from the output, each step the nearest preimage of
    the one behind it, ``a* = a^ + A+ (z* - z^)`` for linear maps.

    Args:
        model: a module, or the graph of :func:`revprop.trace` (which saves tracing again). It is left as it was.
        x: inputs ``(n, ...)``, or a tuple of them.
        labels: (n,) int64 class indices, or what the task has; or target: the wanted output, the output's shape.
        task: what the labels are: :class:`revprop.Classification` (where not given, and they are int64; also one label per
            pixel or token), :class:`revprop.MultiLabel`, :class:`revprop.Regression`.
        to: a layer name, several, or None for all layers.
        embedding: how a label becomes wanted logits: nearest | maximum | one_hot (see :func:`revprop.embed_labels`).
        rules: nearest | paper (the published greedy rules).
        damping: greedy: mu relative to the largest singular value squared of each map; 0 for pseudo-inverses.
        solver: greedy, convolutions: fft (the published approximation) | exact.
        margin: by how much a label is to hold (nearest and maximum embedding): by how many logits a class is to win.
        tolerance: global: how tight the constraint is met and how settled the point has to be, relative.
        batch_size: samples worked on at once; results do not depend on it.

    Returns:
        A :class:`Reconstruction`: ``rec[layer]``, ``rec.recorded``, ``rec.deviation``, ``rec.certificates``.

    Raises:
        ValueError: labels or target that do not fit, an unknown layer or option.
        NonFiniteError: NaN or infinity in the input, weights or target.
        UnsupportedOperatorError: greedy, operators without a rule, all of them, before any work.
        ExportError: the model cannot be traced.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rec = reconstruct(net, torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), to="1")
    >>> rec["1"].shape, bool(rec.certificates["1"].reached.all())
    (torch.Size([5, 8]), True)
    """
    settings = Settings(embedding, rules, strategy, damping, solver, margin, tolerance)
    graph = as_graph(model, x)
    if (labels is None) == (target is None):
        raise ValueError("give either labels=<class indices> or target=<wanted output>")
    nodes = _nodes(graph, to)
    values = graph.check_input(x)
    for name, parameter in graph.model.named_parameters():
        require_finite(parameter.detach(), f"parameter {name!r}")
    n = values[0].shape[0]
    if target is not None:
        if task is not None:
            raise ValueError(f"task={task} says what labels are, and target= has none: give one of the two")
        _check_target(graph, target, n)
        goal = global_solve.Goal(target=target)
    else:
        assert labels is not None
        task = infer(labels) if task is None else task
        task.check(torch.empty(n, *graph.shape(graph.output), device="meta"), labels)
        goal = global_solve.Goal(labels, None, settings.margin, task)
    if settings.strategy == "greedy":
        factors_behind(graph, settings.mode(), nodes.values())  # refuses before any computation
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a number of samples >= 1; given {batch_size}")
    starts = range(0, n, batch_size) if n else [0]
    parts = []
    for start in starts:
        part = slice(start, start + batch_size)
        parts.append(_reconstruct_batch(graph, tuple(v[part] for v in values), goal.at(part), nodes, settings))
    return parts[0] if len(parts) == 1 else _join(parts)


def _reconstruct_batch(
    graph: Graph,
    values: tuple[Tensor, ...],
    goal: global_solve.Goal,
    nodes: dict[str, fx.Node],
    settings: Settings,
) -> Reconstruction:
    by_pass = {layer: graph.behind(layer)[1] for layer in nodes}
    greedy = settings.strategy == "greedy"
    kept = (
        graph.nodes
        if greedy
        else tuple(dict.fromkeys([*nodes.values(), *(n for held in by_pass.values() for n in held), graph.output]))
    )
    kept = tuple(n for n in kept if n not in graph.inputs)
    with torch.no_grad():
        recorded = dict(zip(kept, graph.segment(graph.inputs, kept)(*values), strict=True))
    recorded.update(zip(graph.inputs, values, strict=True))
    output = recorded[graph.output]
    require_finite(output, "the network's output on this input")
    if goal.labels is not None:
        wanted = goal.task.embed(output, goal.labels, settings.embedding, settings.margin)
        if goal.room == 0:  # one output alone holds
            goal = global_solve.Goal(target=wanted)
        free = settings.embedding == "nearest"  # any output that holds will do
        search = goal if free else global_solve.Goal(target=wanted)
    else:
        assert goal.target is not None
        require_finite(goal.target, "target")
        wanted = goal.target.to(output)
        goal = search = global_solve.Goal(target=wanted)
    held = {layer: tuple(recorded[n] for n in by_pass[layer]) for layer in nodes}
    features, steps = {}, {}
    if greedy:
        changes = walk(graph, settings.mode(), recorded, wanted - output, tuple(nodes.values()))
        features = {layer: recorded[node] + changes[node] for layer, node in nodes.items()}
    else:
        options = global_solve.Options(tolerance=settings.tolerance)
        for layer, node in nodes.items():
            if node is graph.output:
                features[layer], steps[layer] = wanted, torch.zeros(len(wanted), dtype=torch.long, device=wanted.device)
                continue
            suffix = graph.behind(layer)[0]
            solution = global_solve.solve(
                lambda a, *h, run=suffix: run(a, *h)[0], recorded[node].detach(), held[layer], output, search, options
            )
            features[layer], steps[layer] = solution.features, solution.steps
    return Reconstruction(
        graph,
        features,
        {layer: recorded[node] for layer, node in nodes.items()},
        output,
        wanted,
        settings,
        goal,
        held,
        steps,
    )


def _join(parts: list[Reconstruction]) -> Reconstruction:
    def join(of: list[Tensor]) -> Tensor:
        return torch.cat(of)

    first = parts[0]
    goal = replace(
        first.goal,
        labels=None if first.goal.labels is None else join([p.goal.labels for p in parts]),  # type: ignore[misc]
        target=None if first.goal.target is None else join([p.goal.target for p in parts]),  # type: ignore[misc]
    )
    return Reconstruction(
        first.graph,
        {k: join([p.features[k] for p in parts]) for k in first.features},
        {k: join([p.recorded[k] for p in parts]) for k in first.recorded},
        join([p.output for p in parts]),
        join([p.wanted for p in parts]),
        first.settings,
        goal,
        {k: tuple(join([p._held[k][i] for p in parts]) for i in range(len(first._held[k]))) for k in first._held},
        {k: join([p._steps[k] for p in parts]) for k in first._steps},
    )


def _nodes(graph: Graph, to: str | Sequence[str] | None) -> dict[str, fx.Node]:
    """The nodes of the layers asked for; None asks for all whose values can move (token indices cannot)."""
    if to is None:
        return {layer: node for layer in graph.layers if (node := graph.node(layer)).meta["val"].is_floating_point()}
    nodes = {layer: graph.node(layer) for layer in ([to] if isinstance(to, str) else to)}
    for layer, node in nodes.items():
        if not node.meta["val"].is_floating_point():
            raise ValueError(
                f"layer {layer!r} holds {node.meta['val'].dtype}: only floating point features can be reconstructed; "
                "name a layer behind it"
            )
    return nodes


def _check_target(graph: Graph, target: Tensor, n: int) -> None:
    expected = (n, *graph.shape(graph.output))
    if tuple(target.shape) != expected:
        raise ValueError(f"target: expected the output's shape {expected}; given {tuple(target.shape)}")
    if not target.is_floating_point():
        raise ValueError(f"target: expected floating point values, given {target.dtype}; class indices go to labels=")
    require_finite(target, "target")


def _maps(graph: Graph, settings: Settings, node: fx.Node) -> tuple[MapCertificate, ...]:
    found = []
    for step in factors_behind(graph, settings.mode(), [node]):
        if isinstance(step.state, Factor) and step.state.solver != "closed form":
            found.append(
                MapCertificate(
                    str(step.node.target).removeprefix("aten."),
                    graph.path(step.node),
                    step.state.solver,
                    step.state.damping,
                    step.state.rank,
                    step.state.size,
                )
            )
    return tuple(found[::-1])


def _norm(x: Tensor) -> Tensor:
    return by_sample(x).norm(dim=1) if x.numel() else x.new_zeros(len(x))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return _norm(a - b)


def _relative(wanted: Tensor, recorded: Tensor) -> Tensor:
    return _distance(wanted, recorded) / _norm(recorded).clamp_min(torch.finfo(recorded.dtype).tiny)
