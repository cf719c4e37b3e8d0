"""Row 1: one reconstruction through one layer, factors ready, against its forward + backward on the same batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import Paired, paired
from torch import Tensor, fx

from revprop.graph import Graph, trace
from revprop.modes import NearestPreimage
from revprop.networks import NETWORKS
from revprop.reverse import factors_behind

# (network, input shape, batch): batches keep each case within seconds on two cores
CASES: tuple[tuple[str, tuple[int, ...], int], ...] = (
    ("mnist", (1, 28, 28), 256),
    ("cifar10", (3, 32, 32), 256),
    ("cifar100", (3, 32, 32), 256),
    ("tiny-imagenet", (3, 64, 64), 64),
    ("imagenette", (3, 224, 224), 4),
    ("imagewoof", (3, 224, 224), 4),
    ("resnet18", (3, 224, 224), 16),
)


@dataclass(frozen=True)
class LayerCase:
    """One layer: its name, what one reconstruction costs and what forward + backward costs."""

    network: str
    layer: str
    batch: int
    times: Paired


def measure(repeats: int = 15) -> list[LayerCase]:
    """Every block of the six networks, every convolution, pooling and linear operator of ResNet-18."""
    found = []
    for name, shape, batch in CASES:
        model = NETWORKS[name](seed=0).eval()
        graph = trace(model, torch.zeros(2, *shape))
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        recorded = graph.record(x)
        for layer, group in _layers(graph, name).items():
            backward, forward = _pair(graph, recorded, group)
            found.append(LayerCase(name, layer, batch, paired(backward, forward, repeats)))
    return found


def _layers(graph: Graph, name: str) -> dict[str, list[fx.Node]]:
    """Layer -> its operators in order: the blocks of the papers' chains; single operators of the residual network."""
    groups: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        path = graph.path(node)
        if name == "resnet18":
            operator = str(node.target)
            if any(kind in operator for kind in ("conv", "linear", "max_pool", "mean", "adaptive_avg")):
                groups[path or operator.removeprefix("aten.")] = [node]
        else:
            groups.setdefault(path.split(".")[0] or "flatten", []).append(node)
    groups.pop("flatten", None)
    return groups


def _pair(
    graph: Graph, recorded: dict[fx.Node, Tensor], group: list[fx.Node]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The two things to time: steps back through the group; forward and backward of the group, its weights included."""
    first, last = group[0], group[-1]
    source = next(n for n in first.all_input_nodes if n in graph.active)
    mode = NearestPreimage()
    steps = [s for s in factors_behind(graph, mode, [source]) if s.node in group]
    wanted = recorded[last] * 0.01 * torch.randn(recorded[last].shape, generator=torch.Generator().manual_seed(1))

    def reconstruct() -> Tensor:
        change = wanted
        with torch.no_grad():
            for step in steps:
                change = mode.step(
                    step.fact, step.state, [recorded[n] for n in step.inputs], recorded[step.node], change
                )[0]
            return recorded[source] + change

    segment = graph.segment((source,), (last,))
    parameters = {name: graph.tensor(name).detach().requires_grad_() for name in graph.parameters_of(group)}
    value = recorded[source].detach().requires_grad_()

    def forward_backward() -> object:
        output = segment(value, parameters=parameters)[0]
        return torch.autograd.grad(output, [value, *parameters.values()], wanted)

    return reconstruct, forward_backward
