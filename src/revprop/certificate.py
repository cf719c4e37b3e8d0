"""What a reconstruction is worth, layer by layer and map by map."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Certificate", "MapCertificate"]


@dataclass(frozen=True)
class MapCertificate:
    """One linear map on the way: how it was inverted. ``rank`` is None where no dense factorisation gave it."""

    operator: str
    module: str
    solver: str
    damping: float
    rank: int | None
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Certificate:
    """What a reconstruction at one layer is worth, measured by running the rest of the network on it.

    Attributes:
        residual: (n,) the distance of the network's output on the wanted features from the wanted output (labels with the
            nearest embedding: from the outputs that hold by the margin); 0 is exact, in the output's units.
        reached: (n,) labels: whether the label wins or ties (all of a sample's labels hold; to 1 % of a regression's
            tolerance); targets, and values without a tolerance: whether the residual is below 0.1 % of what it was.
        deviation: (n,) |a* - a^| / |a^|.
        strategy, solver, damping: what was used ("dual active set" for the global strategy).
        steps: (n,) linearisations the global strategy took, or sweeps of ``refine``; None for one greedy walk.
        maps: greedy: the linear maps between this layer and the output, and what was searched by Gauss-Newton.
        before: with ``refine``: the certificate of the one walk.
    """

    residual: Tensor
    reached: Tensor
    deviation: Tensor
    strategy: str
    solver: str
    damping: float
    steps: Tensor | None = None
    maps: tuple[MapCertificate, ...] = ()
    before: Certificate | None = None

    def __str__(self) -> str:
        n = max(len(self.residual), 1)
        before = "" if self.before is None else f"; before refinement: {self.before}"
        return (
            f"reached {int(self.reached.sum())} of {len(self.residual)}, mean residual {float(self.residual.sum()) / n:.3g}, "
            f"mean deviation {float(self.deviation.sum()) / n:.3g} ({self.strategy}, {self.solver}){before}"
        )
