"""What one architecture says about the library: covered by what, exact or not, how far, how fast. One row of the coverage page."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import operator
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from architecture import Architecture, Pick, pick
from torch import Tensor, fx, nn

import revprop
from revprop.errors import ExportError, UnsupportedOperatorError

Row = dict[str, Any]
Report = Callable[[Row], None]

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"strategy": "greedy"},
    "refined": {"strategy": "greedy", "refine": 10},
    "global": {"strategy": "global"},
}
REPEATS = 3
LONG = 2.0  # seconds: what takes longer is timed once
NOISE = 0.1  # how far features are moved, relative to their norm, where a wanted output has to be made


def measure(architecture: Architecture, seed: int = 0, report: Report = lambda row: None) -> Row:
    """Runs everything the page tells of one architecture.

    Args:
        report: called with the row before each part of the work, so that what is known survives a crash or a hang;
            ``failed`` says what was begun.

    Returns:
        The row. A part that raises costs its own figures only: ``problems`` says which part, and what it raised.
    """
    row: Row = {"failed": None, "problems": []}

    @contextmanager
    def part(doing: str) -> Iterator[None]:
        report({**row, "failed": doing})
        try:
            yield
        except Exception as error:
            row["problems"].append(f"{doing}: {type(error).__name__}: {plain(str(error))}")

    _measure(architecture, seed, row, part)
    row["processor_seconds"] = time.process_time()
    report(row)
    return row


def _measure(
    architecture: Architecture, seed: int, row: Row, part: Callable[[str], AbstractContextManager[None]]
) -> None:
    with part("building the network"):
        model = architecture.model(seed)
        x = architecture.example(architecture.batch, seed + 2)
        with torch.no_grad():
            output = chosen(
                model(*x), architecture
            )  # before the fingerprint: some networks set themselves up when first run
        # left in training mode on purpose: nothing below may depend on the user's flags, or change them
        reference, model = copy.deepcopy(model), model.train()
        before = fingerprint(model)
        row |= {
            "inputs": [[str(value.dtype).removeprefix("torch."), *value.shape[1:]] for value in x],
            "output": list(output.shape[1:]),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    if row["problems"]:
        return
    row["traced"] = False
    with part("tracing"):
        began = time.perf_counter()
        try:
            graph = traced(model, architecture, seed)
        except ExportError as error:
            row["export_error"] = plain(str(error))
        else:
            row |= {"traced": True, "trace_seconds": time.perf_counter() - began, "layers": len(graph.layers)}
    if row["traced"]:
        _reverse(architecture, seed, row, part, graph, reference, x, output)
    row["untouched"] = fingerprint(model) == before


def _reverse(
    architecture: Architecture,
    seed: int,
    row: Row,
    part: Callable[[str], AbstractContextManager[None]],
    graph: revprop.Graph,
    reference: nn.Module,
    x: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    with part("running the graph"):
        row["forward_error"] = relative(graph(x), output)
    with part("checking coverage"):
        row |= coverage(revprop.check(graph).rows)
    with part("reversing the network's own output"):
        row |= fixed_point(graph, x, output)
    layer = third_of_the_way(graph)
    row |= {"layer": layer, "by_passed": len(graph.behind(layer)[1])}
    with part("making another output"):
        goal = wanted(architecture, graph, layer, x, output, seed)
    with part("forward and backward"):
        row["forward_backward_seconds"], _ = seconds(lambda: forward_backward(reference, architecture, x))
    for name, way in WAYS.items():
        with part(f"the {name} reconstruction"):
            try:
                took, found = seconds(lambda way=way: revprop.reconstruct(graph, x, **goal, to=layer, **way))  # type: ignore[misc]
            except UnsupportedOperatorError:
                row[name] = None  # said operator by operator in the coverage
                continue
            row[name] = {
                **quality(found, layer, reference, architecture, x),
                "seconds": took / row["forward_backward_seconds"],
            }


def traced(model: nn.Module, architecture: Architecture, seed: int) -> revprop.Graph:
    """The graph, traced on another batch than the one reconstructed."""
    example = architecture.example(3, seed + 3)
    if architecture.output is None:
        return revprop.trace(model, example)
    if "output" in inspect.signature(revprop.trace).parameters:
        return revprop.trace(model, example, output=architecture.output)
    return revprop.trace(Pick(model, architecture.output), example)


def chosen(results: object, architecture: Architecture) -> Tensor:
    """The output that is reversed."""
    if architecture.output is not None:
        return pick(results, architecture.output)
    assert isinstance(results, Tensor)
    return results


def coverage(rows: tuple[tuple[str, ...], ...]) -> Row:
    """How many operator calls are of each kind, and which operators are not in closed form, with the remedy of each."""
    kinds = Counter(kind for _, _, _, kind, _ in rows)
    named: dict[str, dict[str, Any]] = {}
    for name, _, _, kind, remedy in rows:
        if kind != "closed form":
            entry = named.setdefault(f"{kind}: {name}", {"calls": 0, "remedies": []})
            entry["calls"] += 1
            if plain(remedy) not in entry["remedies"]:
                entry["remedies"].append(plain(remedy))
    return {"operators": len(rows), "kinds": dict(kinds), "not_closed": named}


def fixed_point(graph: revprop.Graph, x: tuple[Tensor, ...], output: Tensor) -> Row:
    """Invariant 1: the greedy strategy towards the model's own output returns its features, at every layer it reaches."""
    floating = [layer for layer in graph.layers if graph.node(layer).meta["val"].is_floating_point()]
    layers = reached_by_greedy(graph, floating)
    found = revprop.reconstruct(graph, x, target=output, to=layers, strategy="greedy", margin=0.0)
    errors = [relative(found[layer], found.recorded[layer]) for layer in layers]
    finite = all(math.isfinite(error) for error in errors)
    return {
        "fixed_point": max(errors) if finite else None,
        "greedy_layers": len(layers),
        "floating_layers": len(floating),
    }


def reached_by_greedy(graph: revprop.Graph, layers: list[str]) -> list[str]:
    """The layers with no operator without a rule between them and the output."""
    refused = {row[:3] for row in revprop.check(graph).rows if row[3] == "no rule"}
    nodes = {node for node in graph.nodes if _named(graph, node) in refused}
    return [layer for layer in layers if not nodes & (graph.descendants([graph.node(layer)]) - {graph.node(layer)})]


def _named(graph: revprop.Graph, node: fx.Node) -> tuple[str, str, str]:
    """A node by the first columns of :class:`revprop.Coverage`: operator, module, shape."""
    value = node.meta.get("val")
    sizes = ["n" if isinstance(s, torch.SymInt) else str(s) for s in value.shape] if isinstance(value, Tensor) else []
    source = node.args[0] if node.target is operator.getitem else node
    name = str(source.target).removeprefix("aten.")  # type: ignore[union-attr]
    return name, graph.path(node), f"({', '.join(sizes) if isinstance(value, Tensor) else 'several tensors'})"


def third_of_the_way(graph: revprop.Graph) -> str:
    """The last layer within the first third of the operators, if possible one that everything passes through."""
    position = {node: i / len(graph.nodes) for i, node in enumerate(graph.nodes)}
    inner: dict[fx.Node, str] = {}
    for layer in graph.layers:
        node = graph.node(layer)
        if node in position and node is not graph.output and node.meta["val"].is_floating_point():
            inner[node] = layer  # of several names for one value the outermost module's
    if not inner:
        return next(layer for layer in graph.layers if graph.node(layer).meta["val"].is_floating_point())
    early = [node for node in inner if position[node] <= 1 / 3] or list(inner)[:1]
    through = [node for node in early if not graph.behind(inner[node])[1]]
    return inner[max(through or early, key=lambda node: position[node])]


def wanted(
    architecture: Architecture, graph: revprop.Graph, layer: str, x: tuple[Tensor, ...], output: Tensor, seed: int
) -> dict[str, Tensor]:
    """Another output than the network's: random other labels; else what it gives on features of the layer moved by noise, so
    that features that give it are known to exist."""
    generator = torch.Generator().manual_seed(seed + 4)
    if architecture.classes:
        shift = torch.randint(1, output.shape[1], (len(output),), generator=generator)
        return {"labels": (output.argmax(1) + shift) % output.shape[1]}
    suffix, by_pass = graph.behind(layer)
    recorded = graph.record(x)
    features = recorded[graph.node(layer)]
    noise = torch.randn(features.shape, generator=generator, dtype=features.dtype)
    size = NOISE * norms(features) / norms(noise)
    moved = features + noise * size.view(-1, *[1] * (features.dim() - 1))
    with torch.no_grad():
        return {"target": suffix(moved, *(recorded[node] for node in by_pass))[0]}


def quality(
    found: revprop.Reconstruction, layer: str, reference: nn.Module, architecture: Architecture, x: tuple[Tensor, ...]
) -> Row:
    """The certificate's figures, and how far it is from what the model itself says when it is run on the features."""
    certificate = found.certificates[layer]
    first = norms(found.wanted - found.output)
    outputs = run_from(reference, architecture, x, layer, found.recorded[layer], found[layer])
    row: Row = {
        "residual": number((certificate.residual / first).mean()),
        "reached": number(certificate.reached.double().mean()),
        "deviation": number(certificate.deviation.mean()),
        "finite": bool(found[layer].isfinite().all()),
        "certificate_error": None,
    }
    if outputs is not None:
        labels = found.goal.labels
        target = found.wanted if labels is None else revprop.embed_labels(outputs, labels, "nearest", 0.0)
        row["certificate_error"] = number(((norms(outputs - target) - certificate.residual).abs() / first).max())
    return row


def run_from(
    reference: nn.Module,
    architecture: Architecture,
    x: tuple[Tensor, ...],
    layer: str,
    recorded: Tensor,
    features: Tensor,
) -> Tensor | None:
    """The model's output with a layer's features replaced: a hook on a copy of the model, no graph. None: no such module."""
    path, _, call = layer.partition("@")
    model = copy.deepcopy(reference)
    modules = dict(model.named_modules())
    path = path if path in modules else path.removeprefix("network.")  # of Pick
    if path not in modules:
        return None
    calls = iter(range(sys.maxsize))

    def replace(module: nn.Module, arguments: object, result: Any) -> Any:
        if next(calls) != int(call or 0):
            return result
        if isinstance(result, Tensor):
            return _replaced(result, recorded, features)
        if isinstance(result, tuple):
            return tuple(_replaced(part, recorded, features) for part in result)
        for key, part in result.items():  # a mapping, or a data class of the zoo that is one
            result[key] = _replaced(part, recorded, features)
        return result

    modules[path].register_forward_hook(replace)
    with torch.no_grad():
        return chosen(model(*x), architecture)


def _replaced(part: Any, recorded: Tensor, features: Tensor) -> Any:
    """The features instead of a part of a module's result, where that part is the layer."""
    same = isinstance(part, Tensor) and part.shape == recorded.shape and relative(part, recorded) < 1e-9
    return features if same else part


def forward_backward(reference: nn.Module, architecture: Architecture, x: tuple[Tensor, ...]) -> None:
    """One forward and backward pass of the batch, as a training step has them."""
    parameters = [p for p in reference.parameters() if p.requires_grad]
    output = chosen(reference(*x), architecture)
    torch.autograd.grad(output.square().mean(), parameters, allow_unused=True)


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """The median time of several calls behind a first one, which factors and compiles, and the last result."""
    began = time.perf_counter()
    result = function()
    times = [time.perf_counter() - began]
    if times[0] > LONG:
        return times[0], result
    times.clear()
    for _ in range(REPEATS):
        began = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - began)
    return statistics.median(times), result


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Everything about a model that a call must leave as it was."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(
            value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        )
    hooks = [
        len(held)
        for module in model.modules()
        for name, held in sorted(vars(module).items())
        if "hooks" in name and isinstance(held, Mapping)
    ]
    flags = [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()]
    parameters = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return digest.hexdigest(), str(hooks), str(flags), str(parameters)


def relative(value: Tensor, reference: Tensor) -> float:
    """The largest difference relative to the largest entry of the reference."""
    if not value.numel():
        return 0.0
    difference = (value - reference).detach().abs().max()
    size = reference.detach().abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
    return float(difference / size)


def norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def number(value: Tensor) -> float | None:
    """None where it is not finite: a row holds finite numbers."""
    return float(value) if math.isfinite(float(value)) else None


def plain(text: str) -> str:
    """A message without the folders of the machine it came from, in one line."""
    text = re.sub(r"(?:[A-Za-z]:)?[\\/][^\s:,'\"`]*(?:site-packages|benchmarks|lib[\\/]python3\.\d+)[\\/]", "", text)
    text = re.sub(r"(?<![\w.])/(?:[\w.-]+/)+", "", text)
    return " ".join(text.split())
