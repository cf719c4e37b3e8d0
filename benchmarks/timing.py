"""Timing two things against each other in one process: alternating, medians, a ratio with its spread."""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Paired:
    """Medians in seconds of ours and of the baseline, and the quartiles of the pairwise ratios."""

    ours: float
    baseline: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        return self.ours / self.baseline


def paired(ours: Callable[[], object], baseline: Callable[[], object], repeats: int = 15, warm: int = 2) -> Paired:
    """Runs the two alternately, so that whatever else the machine does falls on both alike."""
    for _ in range(warm):
        ours()
        baseline()
    gc.collect()
    gc.disable()
    try:
        first, second = [], []
        for _ in range(repeats):
            first.append(_seconds(ours))
            second.append(_seconds(baseline))
    finally:
        gc.enable()
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    return Paired(
        statistics.median(first), statistics.median(second), ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    )


def geometric_mean(values: Sequence[float]) -> float:
    """The mean for ratios."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def machine() -> str:
    """The machine's description, for the head of the results."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            name,
        )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{name}, {os.cpu_count()} cores{gpu}; {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
