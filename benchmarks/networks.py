"""Rows 2 to 5: labels to layer 1 against a training step; FR epochs against BP epochs; closed form against ten of them."""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timing import Paired, paired
from torch import Tensor, nn

from revprop import post_train, reconstruct, trace
from revprop.datasets import data_root, load_data
from revprop.hardware import StepMemory
from revprop.modes import NearestPreimage
from revprop.networks import NETWORKS, load_weights
from revprop.reverse import factors_behind
from revprop.training import Training, train_baseline


@dataclass(frozen=True)
class NetworkCase:
    """One measurement: what, on which network, and how often the network is wrong on the samples used."""

    what: str
    network: str
    wrong: float
    times: Paired
    remark: str = ""


def trained(name: str) -> tuple[nn.Module, Tensor, Tensor, str]:
    """A trained network with 256 test samples as they come; digits always, the others where their data is."""
    if name == "resnet20":
        model = NETWORKS["resnet20"]()
        load_weights(model, data_root() / "checkpoints" / "cifar10_resnet20.safetensors")
        test = load_data("cifar10-lossless").test
        x = test.subset(range(256)).scaled((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return model.eval(), x, test.labels[:256], "layer1"
    split = load_data(name)
    (x, y), (tx, ty) = split.train.tensors(), split.test.tensors()
    model = NETWORKS[name](seed=0)
    epochs = 40 if name == "digits" else 5
    train_baseline(model, (x, y), None, Training(epochs, 64 if name == "digits" else 256, device="cpu"))
    return model, tx[:256], ty[:256], "conv1"


def available() -> list[str]:
    """The networks that can be measured here."""
    found = ["digits"]
    if (data_root() / "mnist").exists():
        found.append("mnist")
    if (data_root() / "checkpoints" / "cifar10_resnet20.safetensors").exists():
        found.append("resnet20")
    return found


def measure(repeats: int = 9) -> list[NetworkCase]:
    """Rows 2 to 5 on every network available."""
    found = []
    for name in available():
        model, x, y, layer = trained(name)
        graph = trace(model, x[:2])
        with torch.no_grad():
            wrong = float((graph(x).argmax(1) != y).double().mean())
        step = _training_step(model, x, y)
        for strategy in ("greedy", "global"):
            run = partial(reconstruct, graph, x, y, to=layer, strategy=strategy)
            found.append(NetworkCase(f"labels -> {layer}, {strategy}", name, wrong, paired(run, step, repeats)))
        if name != "resnet20":
            found.append(NetworkCase("one FR-PT epoch / one BP-PT epoch", name, wrong, _epochs(model, name, repeats)))
            found.append(NetworkCase("closed form / ten BP-PT epochs", name, wrong, _closed_form(model, name)))
    return found


def measure_large(repeats: int = 3) -> NetworkCase:
    """ResNet-18 at 3 x 224 x 224, batch 8, random weights and labels: the walk down to layer1 against forward and backward."""
    model = NETWORKS["resnet18"](seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, 224, 224, generator=generator), torch.randint(0, 1000, (8,), generator=generator)
    graph, weights = trace(model, x[:2]), list(model.parameters())
    run = partial(reconstruct, graph, x, y, to="layer1", strategy="greedy")
    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    factors = [step.state for step in factors_behind(graph, NearestPreimage(0.01, "fft"), [graph.node("layer1")])]
    memory = StepMemory(weights, torch.device("cpu"))
    with memory.watch([x]):
        run()

    def pass_through() -> None:
        torch.autograd.grad(F.cross_entropy(model(x), y), weights)

    remark = (
        f"{len(factors)} steps; made ready once, in {first:.0f} s; tensors alive at most {memory.peak / 2**30:.2f} GiB, the whole "
        f"process so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )
    return NetworkCase(
        "labels -> layer1, one walk", "resnet18, 8 x 3 x 224 x 224", 1.0, paired(run, pass_through, repeats), remark
    )


def _training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    copied = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(copied.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(copied(x), y).backward()
        optimizer.step()

    return step


def _epochs(model: nn.Module, name: str, repeats: int) -> Paired:
    """Medians of single epochs over the modules (1, 2), (1, 3), (0, 2); targets are computed beforehand."""
    split = load_data(name)
    x, y = (t[:12800] for t in split.train.tensors())
    graph = trace(model, x[:2])
    layers = [layer for layer in graph.layers if "." not in layer and layer != "output"]
    ours, theirs = [], []
    for start, stop in ((1, 2), (1, 3), (0, 2)):
        for method, seconds in (("fr", ours), ("bp", theirs), ("fr", ours), ("bp", theirs)):
            result = post_train(
                graph,
                (x, y),
                layers[start],
                layers[stop],
                method=method,
                epochs=max(repeats // 2, 3),  # type: ignore[arg-type]
                device="cpu",
            )
            seconds.extend(e.seconds for e in result.history[2:])
    first, second = torch.tensor(ours).view(3, -1), torch.tensor(theirs).view(3, -1)
    ratios = (first.median(1).values / second.median(1).values).sort().values
    return Paired(
        float(first.median(1).values.sum()), float(second.median(1).values.sum()), float(ratios[0]), float(ratios[-1])
    )


def _closed_form(model: nn.Module, name: str, repeats: int = 3) -> Paired:
    """The linear layers refitted in closed form, everything included, against ten epochs of BP of the whole network, of which
    one is run and counted ten times."""
    x, y = load_data(name).train.tensors()
    graph = trace(model, x[:2])
    blocks = [layer for layer in graph.layers if "." not in layer and layer not in ("input", "output")]
    frozen = [layer for layer in blocks if not layer.startswith("fc")][-1]
    ours, theirs = [], []
    for _ in range(repeats):
        result = post_train(graph, (x, y), frozen, blocks[-1], method="solve", device="cpu")
        ours.append(result.target_seconds + result.seconds)
        theirs.append(10 * post_train(graph, (x, y), "input", blocks[-1], method="bp", epochs=1, device="cpu").seconds)
    first, second = torch.tensor(ours), torch.tensor(theirs)
    ratios = (first / second).sort().values
    return Paired(float(first.median()), float(second.median()), float(ratios[0]), float(ratios[-1]))
