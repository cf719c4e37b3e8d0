"""The published numbers that ours are held against: Tables 1 to 6 of the paper on FR post-training (FR-PT), Tables 1 to 4 of
AdjointBackMapV2, Tables 1 to 5 of the racecar paper.

`published.csv` holds every line as printed there: trained parameters, GPU memory in the paper's MB, test accuracy in
percent, mean and standard deviation over ten runs, after 1, 5 and 10 epochs. What is derived from them is computed here.
"""

from __future__ import annotations

import csv
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass

PUBLISHED_EPOCHS = (1, 5, 10)
PUBLISHED_RUNS = 10  # of every line

# what the captions of the tables say: network, number, test accuracy of the baseline in percent, alpha
CAPTIONS = (
    ("mnist", 1, 97.62, 0.1),
    ("cifar10", 2, 62.55, 0.1),
    ("cifar100", 3, 36.74, 0.7),
    ("tiny-imagenet", 4, 24.99, 0.7),
    ("imagenette", 5, 51.56, 0.3),
    ("imagewoof", 6, 27.23, 0.1),
)


@dataclass(frozen=True)
class PublishedRow:
    """One line of a published table: the layers after `l_start` up to `l_stop`, trained by one method.

    Args:
        method: "bp" or "fr".
        l_start: the number of the last frozen layer in front (0: none).
        l_stop: the number of the last trained layer.
        parameters: how many parameters are trained.
        memory_mb: GPU memory, in the paper's MB.
        mean: test accuracy in percent after 1, 5 and 10 epochs, mean over the runs.
        std: the standard deviations of the same.

    Example:
        >>> PUBLISHED["cifar10"].rows[13].mean
        (62.393, 62.693, 62.982)
    """

    method: str
    l_start: int
    l_stop: int
    parameters: int
    memory_mb: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class PublishedTable:
    """One published table.

    Args:
        number: its number in the paper.
        baseline_accuracy: test accuracy of the network before post-training, in percent.
        alpha: the share of the reconstruction loss in FR's loss.
        runs: how many runs a line is the mean of.
        rows: its lines, in the paper's order.

    Example:
        >>> PUBLISHED["mnist"].baseline_accuracy, len(PUBLISHED["mnist"].rows)
        (97.62, 12)
    """

    number: int
    baseline_accuracy: float
    alpha: float
    runs: int
    rows: tuple[PublishedRow, ...]

    def row(self, method: str, l_start: int, l_stop: int) -> PublishedRow | None:
        """Look one line up.

        Args:
            method: "bp" or "fr".
            l_start: the number of the last frozen layer in front.
            l_stop: the number of the last trained layer.

        Returns:
            The line; None where the table has none for these.

        Example:
            >>> PUBLISHED["cifar10"].row("bp", 0, 1).memory_mb, PUBLISHED["cifar10"].row("solve", 0, 1)
            (17.43, None)
        """
        wanted = (method, l_start, l_stop)
        return next((row for row in self.rows if (row.method, row.l_start, row.l_stop) == wanted), None)

    def best(self, method: str, epochs: Sequence[int] = PUBLISHED_EPOCHS) -> tuple[PublishedRow, int]:
        """Find the highest mean of a method, as the paper does: over all its lines and the epochs given.

        Args:
            method: "bp" or "fr".
            epochs: which of the published epochs to look at.

        Returns:
            The line and the epoch.

        Example:
            >>> row, epoch = PUBLISHED["cifar10"].best("fr")
            >>> (row.l_start, row.l_stop), epoch, row.mean[2]
            ((0, 4), 10, 62.982)
        """
        found = [(row, epoch) for row in self.rows if row.method == method for epoch in epochs]
        return max(found, key=lambda pair: pair[0].mean[PUBLISHED_EPOCHS.index(pair[1])])

    def margin(self, epochs: Sequence[int] = PUBLISHED_EPOCHS) -> float:
        """Subtract the best mean of BP from the best mean of FR.

        Args:
            epochs: which of the published epochs to look at.

        Returns:
            The margin in points of a percent.

        Example:
            >>> round(PUBLISHED["cifar10"].margin(), 3), round(PUBLISHED["cifar10"].margin([10]), 3)
            (0.175, 0.207)
        """
        fr, bp = (
            row.mean[PUBLISHED_EPOCHS.index(epoch)] for row, epoch in (self.best(m, epochs) for m in ("fr", "bp"))
        )
        return fr - bp


def _read() -> dict[str, PublishedTable]:
    text = importlib.resources.files("revprop.report").joinpath("published.csv").read_text(encoding="utf-8")
    rows: dict[str, list[PublishedRow]] = {}
    for line in csv.DictReader(text.splitlines()):
        mean, std = (tuple(float(line[f"{kind}_{epoch}"]) for epoch in PUBLISHED_EPOCHS) for kind in ("mean", "std"))
        layers = int(line["l_start"]), int(line["l_stop"])
        row = PublishedRow(line["method"], *layers, int(line["parameters"]), float(line["memory_mb"]), mean, std)
        rows.setdefault(line["network"], []).append(row)
    return {
        network: PublishedTable(number, baseline, alpha, PUBLISHED_RUNS, tuple(rows[network]))
        for network, number, baseline, alpha in CAPTIONS
    }


PUBLISHED = _read()
"""The tables by the name of their network, which is that of their data set, too."""

PUBLISHED_ACCURACY = {
    ("vgg7", 3): 89.5,
    ("resnet20-wide", 3): 91.6,
    ("resnet20-fixup", 3): 91.2,
    ("vgg7", 4): 63.2,
    ("resnet20-wide", 4): 68.8,
    ("resnet20-fixup", 4): 64.0,
}
"""Test accuracy in percent of the networks of AdjointBackMapV2 Tables 3 (CIFAR-10) and 4 (CIFAR-100): its Tables 1 and 2."""


def _read_units() -> dict[tuple[str, int], tuple[float, ...]]:
    text = importlib.resources.files("revprop.report").joinpath("published_adjoint.csv").read_text(encoding="utf-8")
    found: dict[tuple[str, int], tuple[float, ...]] = {}
    for line in csv.DictReader(text.splitlines()):
        key = line["network"], int(line["table"])
        found[key] = (*found.get(key, ()), float(line["within"]))
    return found


PUBLISHED_UNITS = _read_units()
"""By network and number of the table: the share of units in percent with a relative error of at most 1 %, layer by layer."""


def _read_racecar() -> dict[tuple[str, str, str], tuple[float, ...]]:
    text = importlib.resources.files("revprop.report").joinpath("published_racecar.csv").read_text(encoding="utf-8")
    return {
        (line["experiment"], line["way"], line["phase"]): tuple(100 * float(run) for run in line["runs"].split())
        for line in csv.DictReader(text.splitlines())
    }


PUBLISHED_RACECAR = _read_racecar()
"""Tables 1 to 5 of the racecar paper: by experiment, way of phase I and phase, the accuracy in percent of each of five runs. One of
them, RR_AB's second on the 12-bit task, cannot be read; 1 is what the printed mean, 0.997, leaves."""
