"""Hypersurfaces: one unit against a forward and backward pass; units of a layer against ``torch.func.jacrev`` in chunks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from networks import NetworkCase, trained
from timing import Paired, paired
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from revprop import hypersurface, trace
from revprop.datasets import data_root

CHUNKS = (16, 64, 256)
LAYERS = ("layer1.2.conv2", "layer3.1.conv2")
UNITS = 4096


def measure(repeats: int = 9) -> list[NetworkCase]:
    """On the public ResNet-20 checkpoint, where it is at hand; else on the digits' network, one unit alone."""
    name = "resnet20" if (data_root() / "checkpoints" / "cifar10_resnet20.safetensors").exists() else "digits"
    model, x, _, _ = trained(name)
    graph = trace(model, x[:2])
    found = []
    for n in (1, 16):
        times = paired(partial(hypersurface, graph, x[:n], "output", 3), partial(_pass, model, x[:n]), repeats)
        found.append(NetworkCase(f"one unit's hypersurface, {n} images", name, 0.0, times))
    for layer in LAYERS if name == "resnet20" else ():
        found.append(_layer(model, graph, x[:1], layer))
    return found


def _pass(model: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x)[:, 3].sum(), [x, *model.parameters()])


def _layer(model: nn.Module, graph: Any, x: Tensor, layer: str) -> NetworkCase:
    """The first 4,096 units of a layer; jacrev's best chunk."""
    shape = graph.shape(graph.node(layer))
    units = [tuple(int(i) for i in index) for index in torch.cartesian_prod(*map(torch.arange, shape))[:UNITS]]
    ours = partial(hypersurface, graph, x, layer, units)
    best: tuple[Paired, int] | None = None
    for chunk in CHUNKS:
        times = paired(ours, partial(_jacobian, model, x, layer, len(units), chunk), 1, warm=0 if best else 1)
        if best is None or times.baseline < best[0].baseline:
            best = times, chunk
    assert best is not None
    memory = [_peak(ours), _peak(partial(_jacobian, model, x, layer, len(units), best[1]))]
    remark = (
        f"jacrev in chunks of {best[1]}; {memory[0]:.2f} and {memory[1]:.2f} GiB above what the process held before"
    )
    return NetworkCase(f"{len(units):,} units of {layer}", "resnet20", 0.0, best[0], remark)


def _jacobian(model: nn.Module, x: Tensor, layer: str, count: int, chunk: int) -> list[Any]:
    """What jacrev does with ``chunk_size``: rows of the Jacobian in the input and every bias."""
    state = {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}
    biases = {name: value for name, value in state.items() if name.endswith("bias")}

    def features(x: Tensor, biases: dict[str, Tensor]) -> Tensor:
        found: list[Tensor] = []
        hook = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: found.append(output))
        try:
            functional_call(model, {**state, **biases}, (x,))
        finally:
            hook.remove()
        return found[0][0].flatten()

    value, pull = vjp(features, x, biases)
    rows = [vmap(pull)(part) for part in torch.eye(value.numel())[:count].split(chunk)]
    return [torch.cat(parts) for parts in zip(*[[r[0], *r[1].values()] for r in rows], strict=True)]


def _peak(run: Callable[[], object]) -> float:
    """GiB that a run adds to what the process holds, at most (Linux)."""

    def field(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])

    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back first
    Path("/proc/self/clear_refs").write_text("5")
    before = field("VmRSS")
    run()
    return (field("VmHWM") - before) / 2**20
