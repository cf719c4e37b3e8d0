"""``make attributions``: what methods of attribution leave unaccounted for, and their time, beside revprop's.

Written to docs/attributions.md. A method gives parts of a unit: of the input, and what else it states (biases, the output at a
baseline of zeros). What is left, ``|unit - sum of parts|``, over the largest ``|unit|``, is its completeness error.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from handwritten_images import IMAGES
from handwritten_sequences import SEQUENCES
from libraries import torchvision
from timing import machine
from torch import Tensor, nn

import revprop
from revprop.datasets import data_root, load_data
from revprop.networks import NETWORKS, load_weights
from revprop.runs import RunStore

Method = Callable[[nn.Module, Tensor, int], Tensor]
"""(network, inputs, class) -> the sum of all parts, one number per sample."""

COMPLETE = 1e-6  # of the largest value, in float64


def hypersurface(model: nn.Module, x: Tensor, k: int) -> Tensor:
    return revprop.hypersurface(model, x, "output", k).reconstructed


def full_gradient(model: nn.Module, x: Tensor, k: int) -> Tensor:
    """FullGrad's identity (Srinivas, Fleuret, 2019, Eq. 3): input gradients and bias gradients, batch norm's bias with its mean."""
    held: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        bias = getattr(module, "bias", None)
        bias = torch.zeros(1).to(output) if bias is None else bias
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            scale = torch.rsqrt(module.running_var + module.eps) * (1 if module.weight is None else module.weight)  # type: ignore[operator]
            bias = bias - module.running_mean * scale
        dim = output.dim() - 1 if isinstance(module, nn.Linear) else 1
        shape = [-1 if i == dim else 1 for i in range(output.dim())]
        zero = torch.zeros_like(output, requires_grad=True)
        held.append((zero, bias.detach().view(shape)))
        return output + zero

    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    try:
        x = x.clone().requires_grad_()
        out = model(x)[:, k]
        first, *others = torch.autograd.grad(out.sum(), [x, *(zero for zero, _ in held)], materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
    parts = (x * first).flatten(1).sum(1)
    for gradient, (_, bias) in zip(others, held, strict=True):
        parts = parts + (gradient * bias).flatten(1).sum(1)
    return parts.detach()


def _captum(name: str, **options: Any) -> Method:
    def run(model: nn.Module, x: Tensor, k: int) -> Tensor:
        import captum.attr

        parts = getattr(captum.attr, name)(model).attribute(x.clone().requires_grad_(), target=k, **options)
        at_zero = 0.0 if name in ("InputXGradient", "LRP") else model(torch.zeros_like(x))[:, k]
        return (parts.flatten(1).sum(1) + at_zero).detach()  # type: ignore[no-any-return]

    return run


def zennit_epsilon_plus(model: nn.Module, x: Tensor, k: int) -> Tensor:
    torchvision()  # zennit looks at it
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus

    with Gradient(model=model, composite=EpsilonPlus()) as attributor:
        out = model(x)
        wanted = torch.zeros_like(out)
        wanted[:, k] = out.detach()[:, k]
        _, parts = attributor(x.clone().requires_grad_(), wanted)
    return parts.flatten(1).sum(1).detach()  # type: ignore[no-any-return]


METHODS: dict[str, Method] = {
    "revprop hypersurface": hypersurface,
    "FullGrad's identity, written plainly": full_gradient,
    "captum input x gradient": _captum("InputXGradient"),
    "captum integrated gradients, 50 steps": _captum("IntegratedGradients", n_steps=50),
    "captum DeepLift": _captum("DeepLift"),
    "captum LRP": _captum("LRP"),
    "zennit LRP, epsilon plus": zennit_epsilon_plus,
}


@dataclass(frozen=True)
class Outcome:
    """What a method left of a network's units, and its seconds; or why it gave nothing."""

    error: float = float("nan")
    seconds: float = float("nan")
    failed: str = ""


def outcome(method: Method, model: nn.Module, x: Tensor, k: int, repeats: int = 3) -> Outcome:
    """Runs one method; the first run is for warming up."""
    with torch.no_grad():
        value = model(x)[:, k]
    seconds = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(repeats + 1):
                began = time.perf_counter()
                found = method(model, x, k)
                seconds.append(time.perf_counter() - began)
    except Exception as error:  # whatever a library raises is its row
        return Outcome(failed=f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}")
    left = float((found - value).abs().max() / value.abs().max())
    return Outcome(left, statistics.median(seconds[1:] or seconds))


def checkpoints(trained: Path) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Trained networks on 32 test images, where these are at hand: public ones, and AdjointBackMapV2's by ``revprop reproduce
    adjoint/train``, whose folder of networks is ``trained``."""
    root = data_root()
    for name in ("resnet20", "resnet32"):
        path = root / "checkpoints" / f"cifar10_{name}.safetensors"
        if not path.is_file():
            continue
        model = NETWORKS[name]()
        load_weights(model, path)
        test = load_data("cifar10-lossless").test.subset(torch.arange(32))
        yield name, model.eval(), test.scaled((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    rows = {row["settings"]["network"]: row["settings"] for row in RunStore(trained).rows()}
    for name in ("vgg7", "resnet20-wide"):
        if name not in rows:
            continue
        settings = rows[name]
        model = NETWORKS[name]()
        load_weights(model, trained / f"{RunStore(trained).key(settings)}.safetensors")
        test = load_data(settings["data"]).test.subset(torch.arange(32))
        yield name, model.eval(), test.scaled(settings["mean"], settings["std"])


def small() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The small hand-written networks of the coverage page that take one floating point tensor and give classes."""
    for architecture in (*IMAGES, *SEQUENCES):
        if len(architecture.inputs) == 1 and architecture.output is None and architecture.classes:
            (x,) = architecture.example(3, 7)
            if x.is_floating_point():
                yield architecture.name, architecture.model(), x


def forward_and_backward(model: nn.Module, x: Tensor, k: int) -> Tensor:
    """The yardstick of time."""
    x = x.clone().requires_grad_()
    torch.autograd.grad(
        model(x)[:, k].sum(), [x, *(p for p in model.parameters() if p.requires_grad)], allow_unused=True
    )
    return model(x)[:, k].detach()


def cell(found: Outcome) -> str:
    if found.failed:
        return "fails"
    return f"{found.error:.0e}" if found.error < 0.01 else f"{100 * found.error:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "attributions.md")
    parser.add_argument("--trained", type=Path, default=Path("out/reproduce/adjoint-reduced/baselines"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Attributions that add up",
        "",
        "Written by `make attributions`. A method of attribution splits a unit into parts: of the input, and what else it states "
        "(of biases; the output at a baseline of zeros). The numbers are what its parts leave unaccounted for: the largest "
        "`|unit - sum of parts|` over the largest `|unit|`. Methods are not all meant to add up (input x gradient is not); one "
        "that does can be checked.",
        "",
        f"{machine()}; {datetime.now(UTC):%Y-%m-%d}.",
        "",
        "## Trained networks",
        "",
        "Class 3 of 32 test images in float32; resnet20 and resnet32: public checkpoints; vgg7 and resnet20-wide: by `revprop "
        "reproduce adjoint/train --scale reduced`. Time: as a multiple of one forward and backward pass of the batch.",
        "",
    ]
    table: dict[str, list[str]] = {name: [] for name in METHODS}
    heads = []
    for name, model, x in checkpoints(given.trained):
        pace = outcome(forward_and_backward, model, x, 3).seconds
        heads += [f"{name}: left", "time"]
        graph = revprop.trace(model, x[:2])
        for method, function in METHODS.items():
            subject: Any = graph if function is hypersurface else model
            found = outcome(function, subject, x, 3) if function is not hypersurface else traced(graph, model, x)
            table[method] += [cell(found), "" if found.failed else f"{found.seconds / pace:.1f}"]
            print(name, method, found, flush=True)
    lines += ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    lines += [f"| {method} | " + " | ".join(cells) + " |" for method, cells in table.items()]
    lines += [
        "",
        "## Networks of every kind",
        "",
        "Small networks with random weights in float64, class 1 of three samples (the hand-written ones of the "
        "[coverage page](coverage.md)). revprop's column also says whether quantities were held: where none was, the functional "
        "is the network itself around the input.",
        "",
        "| network | held | " + " | ".join(METHODS) + " |",
        "|---|---|" + "---|" * len(METHODS),
    ]
    counts = dict.fromkeys(METHODS, 0)
    total = 0
    for name, model, x in small():
        total += 1
        row = []
        for method, function in METHODS.items():
            found = outcome(function, model, x, 1, repeats=0)
            counts[method] += found.error < COMPLETE
            row.append(cell(found))
            print(name, method, found, flush=True)
        held = sorted(set(revprop.hypersurface(model, x, "output", 1).held.values()))
        lines.append(f"| {name} | {'; '.join(held) or 'nothing'} | " + " | ".join(row) + " |")
    lines += [
        f"| **complete to {COMPLETE:.0e}** | | " + " | ".join(f"**{n} of {total}**" for n in counts.values()) + " |",
        "",
        '"fails": the library raises an error on this network.',
        "",
    ]
    given.out.write_text("\n".join(lines), encoding="utf-8")


def traced(graph: revprop.Graph, model: nn.Module, x: Tensor) -> Outcome:
    """revprop on a network that was traced before, as it is used: tracing is done once."""
    with torch.no_grad():
        value = model(x)[:, 3]
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        found = revprop.hypersurface(graph, x, "output", 3)
        seconds.append(time.perf_counter() - began)
    left = float((found.reconstructed - value).abs().max() / value.abs().max())
    return Outcome(left, statistics.median(seconds[1:] or seconds))


if __name__ == "__main__":
    main()
