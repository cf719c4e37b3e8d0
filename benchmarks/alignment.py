"""Feature alignment on the paper's MNIST networks: a training step against Algorithm 1 as written; sampling against a VAE's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from networks import NetworkCase
from timing import paired
from torch import Tensor, nn

from revprop.alignment import AlignmentSettings, FeatureAligned, Sizes, clamp_weights, paper_model
from revprop.networks.feature_alignment import encoder

BATCH = 128
NETWORK = "the paper's for MNIST"


def measure(repeats: int = 9) -> list[NetworkCase]:
    """Steps with the optimizer and without; one sample at a time and many at once."""
    sizes = Sizes.paper("mnist")
    x = torch.rand(BATCH, *sizes.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for name, optimized in (("gradients of the loss", False), ("a whole training step", True)):
        shared, plain = encoder(sizes.shape, seed=0), encoder(sizes.shape, seed=0)
        aligned = FeatureAligned(shared, sizes.shape)
        ours = _step(shared, partial(aligned.alignment_loss, x), optimized)
        theirs = _step(plain, partial(as_written, plain, x), optimized)
        what = f"alignment, {name}, {BATCH} images"
        found.append(NetworkCase(what, NETWORK, 0.0, paired(ours, theirs, repeats), "Algorithm 1 as written"))
    return [*found, *_sampling(sizes, repeats)]


def as_written(module: nn.Module, x: Tensor) -> Tensor:
    """Algorithm 1 from zeros by plain autograd: one step, size one."""
    z = module(x)
    r = torch.zeros_like(x).requires_grad_()
    distance = 0.5 * (module(r) - z).square().sum()
    (slope,) = torch.autograd.grad(distance, r, create_graph=True)
    return 0.5 * (x - (r - slope)).square().sum() / len(x)


def _step(module: nn.Module, loss: Callable[[], Tensor], optimized: bool) -> Callable[[], None]:
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-6)

    def step() -> None:
        if optimized:
            clamp_weights(module)
        for parameter, slope in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
            parameter.grad = slope
        if optimized:
            optimizer.step()

    return step


def _sampling(sizes: Sizes, repeats: int) -> list[NetworkCase]:
    """Samples by the step itself, one by one and many at once; and by what one step from zeros is, one product of matrices."""
    settings = AlignmentSettings.published_code()
    vfa, vae = (paper_model(name, sizes, settings, orthogonal=False).eval() for name in ("vfa", "vae"))
    decoder = vfa.aligned.decoder()  # type: ignore[operator, union-attr]
    codes = sizes.latent + sizes.classes
    ways: list[tuple[str, int, Callable[[int], Tensor]]] = [
        ("VFA's samples", 1, vfa.sample),  # type: ignore[list-item]
        ("VFA's samples", BATCH, vfa.sample),  # type: ignore[list-item]
        ("VFA's samples, its step written out as a matrix", 1, lambda n: decoder(torch.randn(n, codes))),
    ]
    return [
        NetworkCase(
            f"{what}, {n} at once", NETWORK, 0.0, paired(partial(way, n), partial(vae.sample, n), repeats), "a VAE's"
        )  # type: ignore[operator]
        for what, n, way in ways
    ]


def main() -> None:
    torch.set_num_threads(1)
    for case in measure(5):
        t = case.times
        print(
            f"{case.what}: {1e3 * t.ours:.2f} / {1e3 * t.baseline:.2f} ms = {t.ratio:.3f} ({t.low:.3f} to {t.high:.3f})"
        )


if __name__ == "__main__":
    main()
