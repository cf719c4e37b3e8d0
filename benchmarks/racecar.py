"""Racecar: a training step with the penalty against one without, of the MNIST network and of VGG19, on made images."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from networks import NetworkCase
from timing import paired
from torch import Tensor, nn

from revprop import Racecar
from revprop.networks import racecar

SHARES = (1.0, 0.25)
PUBLISHED = {"mnist": 1.61, "vgg19": 2.06}  # the paper's cost of the full penalty
AIMS = {"mnist": 1.3, "vgg19": 1.6}  # with a share
BATCHES = {"mnist": 64, "vgg19": 4}  # the paper's are 64 and 24
WEIGHTS = {"mnist": 1e-5, "vgg19": 1e-10}
SLOW = 3  # repeats of VGG19 at most: a step takes seconds


def measure(repeats: int = 9) -> list[NetworkCase]:
    """Each network: the whole batch and a share of it, by ``penalty.with_output(x)`` and by ``penalty(x)`` beside ``model(x)``."""
    found = []
    for name, build, shape in (("mnist", racecar.mnist, (1, 28, 28)), ("vgg19", racecar.vgg19, (3, 224, 224))):
        generator = torch.Generator().manual_seed(0)
        model = build(seed=0).train()
        x = torch.rand(BATCHES[name], *shape, generator=generator)
        y = torch.randint(10, (len(x),), generator=generator)
        plain = _step(model, y, lambda x, model=model: (model(x), None), x)
        count = repeats if name == "mnist" else min(repeats, SLOW)
        for share in SHARES:
            penalty = Racecar(model, x[:2], layers=_convolutions(model), weight=WEIGHTS[name], share=share)
            ways = {
                "with_output": penalty.with_output,
                "beside": lambda x, model=model, penalty=penalty: (model(x), penalty(x)),
            }
            for way, forward in ways.items():
                times = paired(_step(model, y, forward, x), plain, count, warm=2 if name == "mnist" else 1)
                remark = f"share {share:g}, {way}"
                found.append(NetworkCase(f"racecar step, {remark}, batch {len(x)}", name, 0.0, times, remark))
    return found


def table(cases: list[NetworkCase]) -> list[str]:
    """The lines of the speed table."""
    lines = []
    for share, way, words in (
        (0.25, "with_output", "on a quarter of the batch, one pass forward for both"),
        (0.25, "beside", "on a quarter of the batch, beside `model(x)`"),
        (1.0, "with_output", "on the whole batch, one pass forward for both"),
        (1.0, "beside", "on the whole batch, beside `model(x)`"),
    ):
        own = [case for case in cases if case.remark == f"share {share:g}, {way}"]
        said = AIMS if share < 1 else PUBLISHED
        aim = ", ".join(f"{'<= ' if share < 1 else 'published: '}{said[case.network]} ({case.network})" for case in own)
        cells = "; ".join(f"{case.network} {case.times.ratio:.2f}" for case in own)
        lines.append(f"| training step with the racecar penalty {words} | the step without | {aim} | {cells} |")
    return lines


def _convolutions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def _step(
    model: nn.Module, y: Tensor, forward: Callable[[Tensor], tuple[Tensor, Tensor | None]], x: Tensor
) -> Callable[[], None]:
    """A step of gradient descent, so small that the network stays what it is."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        output, penalty = forward(x)
        loss = F.cross_entropy(output, y)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()

    return run
