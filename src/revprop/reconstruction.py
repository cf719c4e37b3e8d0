"""``reconstruct``: the features a network should have had, layer by layer, with certificates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from revprop import global_solve
from revprop.certificate import Certificate, MapCertificate
from revprop.errors import near_matches, require_finite
from revprop.graph import Example, Graph
from revprop.linear_map import Factor
from revprop.outputs import Choice
from revprop.refine import Remaining, slack
from revprop.refine import refine as refine_walk
from revprop.reverse import as_graph, factors_behind, walk
from revprop.samples import Samples
from revprop.settings import Settings
from revprop.tasks import Task, by_sample, stated

__all__ = ["Certificate", "MapCertificate", "Reconstruction", "Settings", "reconstruct"]


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
    _walked: dict[str, Tensor] = field(repr=False)

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
        walked = rec._walked.get(layer)
        before = None if walked is None else self._certify(layer, walked, None, None)
        return self._certify(layer, rec[layer], rec._steps.get(layer), before)

    def _certify(self, layer: str, features: Tensor, steps: Tensor | None, before: Certificate | None) -> Certificate:
        rec = self._of
        with torch.no_grad():
            outputs = _suffix(rec.graph, layer)(features, *rec._held[layer])
        goal, settings = rec.goal, rec.settings
        if goal.labels is not None:
            if settings.embedding == "nearest":
                require_finite(outputs, f"the network's output on the wanted features of {layer!r}")
            # a tie holds, as far as single precision tells; where little room is left, that much less
            reached = goal.task.miss(outputs, goal.labels) <= slack(outputs, goal.task)
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
            _relative(features, rec.recorded[layer]),
            settings.strategy,
            settings.solver if greedy else "dual active set",
            (0.0 if settings.rules == "paper" else settings.damping) if greedy else global_solve.Options().ridge,
            steps,
            _maps(rec.graph, settings, rec.graph.node(layer)) if greedy else (),
            before,
        )


def reconstruct(
    model: nn.Module | Graph,
    x: Example,
    labels: Tensor | None = None,
    task: Task | None = None,
    *,
    target: Tensor | None = None,
    to: str | Sequence[str] | None = None,
    output: Choice = None,
    embedding: Literal["nearest", "maximum", "one_hot"] = "nearest",
    rules: Literal["nearest", "paper"] = "nearest",
    strategy: Literal["global", "greedy"] = "global",
    damping: float = 0.01,
    solver: Literal["fft", "exact"] = "fft",
    margin: float = 0.0,
    tolerance: float = 0.05,
    blocks: str | Sequence[str] = (),
    refine: int = 0,
    attention: Literal["values", "all"] = "values",
    batch_size: int = 256,
) -> Reconstruction:
    """The features that layers should have had for the wanted output.

    ``strategy="global"``: for each layer named, ``argmin |a - a^|`` subject to the network behind it giving the wanted output;
    needs no rule for any operator. ``strategy="greedy"`` (FR-PT): one walk from the output, each step the nearest preimage of
    the one behind it, ``a* = a^ + A+ (z* - z^)`` for linear maps.

    Args:
        model: a module, or the graph of :func:`revprop.trace` (which saves tracing again). It is left as it was.
        x: inputs ``(n, ...)``, a tuple of them, or a dict of them by argument name.
        labels: (n,) int64 class indices, or what the task has; or target: the wanted output, the output's shape.
        task: what the labels are: :class:`revprop.Classification` (where not given, and they are int64; also one label per
            pixel or token), :class:`revprop.MultiLabel`, :class:`revprop.Regression`.
        to: a layer name, several, or None for all layers.
        output: which output is meant where a module returns several, as :func:`revprop.trace` takes it.
        embedding: how a label becomes wanted logits: nearest | maximum | one_hot (see :func:`revprop.embed_labels`).
        rules: nearest | paper (the published greedy rules).
        damping: greedy: mu relative to the largest singular value squared of each map; 0 for pseudo-inverses.
        solver: greedy, convolutions: fft (the published approximation) | exact.
        margin: by how much a label is to hold (nearest and maximum embedding): by how many logits a class is to win.
        tolerance: global: how tight the constraint is met and how settled the point has to be, relative.
        blocks: greedy: layers reversed as one map each, by Gauss-Newton, from where they fan out to where they merge.
        refine: greedy: at most so many sweeps that walk back what is still missing (:mod:`revprop.refine`); 0: one walk.
        attention: greedy: what moves in an attention: its values, by the weights as recorded, or queries and keys, too.
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
    settings = Settings(embedding, rules, strategy, damping, solver, margin, tolerance, blocks, refine, attention)
    graph = as_graph(model, x, output)
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
        task = stated(task, labels)
        task.check(torch.empty(n, *graph.shape(graph.output), device="meta"), labels)
        goal = global_solve.Goal(labels, None, settings.margin, task)
    if settings.strategy == "greedy":
        factors_behind(graph, settings.mode(), nodes.values(), settings.blocks)  # refuses before any computation
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
        graph.recorded
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
    held = {layer: tuple(_apart(n, recorded[n], len(output)) for n in by_pass[layer]) for layer in nodes}
    features, walked, steps = {}, {}, {}
    if greedy:
        change = _beyond_rounding(wanted, output)
        changes = walk(graph, settings.mode(), recorded, change, tuple(nodes.values()), settings.blocks)
        features = {layer: recorded[node] + changes[node] for layer, node in nodes.items()}
        if settings.refine:
            if search.target is not None:
                search = global_solve.Goal(target=torch.where(change == 0, output, wanted))
            walked, left, mode = dict(features), Remaining(search, output), settings.mode()
            everyone = torch.arange(len(output), device=output.device)
            for layer, node in nodes.items():
                if node is graph.output:
                    steps[layer] = torch.zeros_like(everyone)
                    continue
                found, steps[layer] = refine_walk(
                    graph, mode, node, recorded, left.change, left.miss, settings.refine, settings.blocks
                )
                # where sweeps do not get there and the one walk gets nearer, that is kept
                suffix = _suffix(graph, layer)
                with torch.no_grad():
                    miss, old = (left.miss(suffix(a, *held[layer]), everyone) for a in (found, walked[layer]))
                one = ((miss > 0) & (old < miss)).view(-1, *[1] * (found.dim() - 1))
                features[layer] = torch.where(one, walked[layer], found)
    else:
        options = global_solve.Options(tolerance=settings.tolerance)
        for layer, node in nodes.items():
            if node is graph.output:
                features[layer], steps[layer] = wanted, torch.zeros(len(wanted), dtype=torch.long, device=wanted.device)
                continue
            suffix = _suffix(graph, layer)
            solution = global_solve.solve(suffix, recorded[node].detach(), held[layer], output, search, options)
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
        walked,
    )


def _beyond_rounding(wanted: Tensor, output: Tensor) -> Tensor:
    """The change of the output, without what is rounding: reversed, it would be magnified like any other."""
    change = wanted - output
    if not output.numel():
        return change
    size = torch.maximum(by_sample(output).abs().amax(1), by_sample(wanted).abs().amax(1))
    floor = 64 * torch.finfo(output.dtype).eps * size.view(-1, *[1] * (output.dim() - 1))
    return torch.where(change.abs() <= floor, 0.0, change)


def _suffix(graph: Graph, layer: str) -> Callable[..., Tensor]:
    """The network behind a layer as a function of its features and of what by-passes it, samples first in all of them."""
    segment, by_pass = graph.behind(layer)
    places = [Samples.of(node.meta["val"]) for node in by_pass]

    def run(features: Tensor, *held: Tensor) -> Tensor:
        values = [part[0] if place is None else place.together(part) for place, part in zip(places, held, strict=True)]
        return segment(features, *values)[0]

    return run


def _apart(node: fx.Node, value: Tensor, n: int) -> Tensor:
    place = Samples.of(node.meta["val"])
    return value.expand(n, *value.shape) if place is None else place.apart(value)


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
        {k: join([p._walked[k] for p in parts]) for k in first._walked},
    )


def _names(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _nodes(graph: Graph, to: str | Sequence[str] | None) -> dict[str, fx.Node]:
    """The nodes of the layers asked for; None asks for all whose values can move (token indices cannot)."""
    if to is None:
        return {layer: node for layer in graph.layers if (node := graph.node(layer)).meta["val"].is_floating_point()}
    nodes = {layer: graph.node(layer) for layer in _names(to)}
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
    for step in factors_behind(graph, settings.mode(), [node], settings.blocks):
        if step.searched:
            found.append(MapCertificate(step.name, graph.path(step.node), "Gauss-Newton", 0.0, None, None))
        elif isinstance(step.state, Factor) and step.state.solver != "closed form":
            state = step.state
            place = graph.path(step.node)
            found.append(MapCertificate(step.name, place, state.solver, state.damping, state.rank, state.size))
    return tuple(found[::-1])


def _norm(x: Tensor) -> Tensor:
    return by_sample(x).norm(dim=1) if x.numel() else x.new_zeros(len(x))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return _norm(a - b)


def _relative(wanted: Tensor, recorded: Tensor) -> Tensor:
    return _distance(wanted, recorded) / _norm(recorded).clamp_min(torch.finfo(recorded.dtype).tiny)
