"""A diagnosis as a stored row: per layer the deviations, whether the label is reached, and the discrepancy maps."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from revprop.diagnosis import diagnose
from revprop.graph import Graph
from revprop.runs import RunStore
from revprop.settings import Settings

__all__ = ["run"]


def run(
    graph: Graph,
    data: tuple[Tensor, Tensor],
    about: dict[str, Any],
    folder: Path,
    layers: tuple[str, ...] | None = None,
    way: Settings = Settings(),
) -> dict[str, Any]:
    """Diagnoses a network on inputs and labels, or returns the stored row of the same settings.

    Args:
        about: what tells this network and data from others (names, weights, number of samples).
    """

    def measure(_: object) -> dict[str, Any]:
        began = time.perf_counter()
        result = diagnose(graph, zip(data[0].split(256), data[1].split(256), strict=True), layers, way)
        return {
            "accuracy": result.accuracy,
            "samples": len(result.wrong),
            "seconds": time.perf_counter() - began,
            "wrong": result.wrong,
            "layers": [
                {
                    "layer": d.layer,
                    "deviation": d.deviation,
                    "reached": d.reached,
                    "maps": d.maps.float(),
                    "steps": d.steps,
                }
                for d in result.layers
            ],
        }

    settings = {"kind": "diagnosis", **about, "way": asdict(way), "layers": list(layers) if layers else None}
    return RunStore(folder / "rows").run(settings, measure)
