"""Paired comparisons of finished runs: the same seeds, hence the same baselines, on both sides.

From rows alone: nothing here knows how a row is stored or shown.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from revprop.report.aggregation import RunGroup

LEVEL = 0.05  # a corrected p-value below it counts as a difference shown
CONFIDENCE = 0.95
SAME = 1e-9  # points; accuracies are multiples of one sample's share, so that smaller differences are rounding


@dataclass(frozen=True)
class Paired:
    """The difference between two settings, first minus second, over the runs that share a seed.

    Args:
        seeds: how many seeds both have.
        mean: the mean difference in points of a percent; None without a shared seed.
        interval: its 95 % confidence interval, by the paired t distribution; None for fewer than two seeds, and where
            all differences are equal, so that there is no spread to take it from.
        p: of the two-sided paired t test; of the exact sign-flip test where all differences are equal; None for fewer
            than two seeds.
        wilcoxon: the p-value of the two-sided Wilcoxon signed-rank test; None where `p` is.
        corrected: `p` after Holm's correction for the other comparisons of its family; None before :func:`correct`.

    Example:
        >>> Paired(5, 0.2, (0.1, 0.3), p=0.005, wilcoxon=0.06, corrected=0.02).verdict("FR", "BP")
        'FR better'
    """

    seeds: int
    mean: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    wilcoxon: float | None = None
    corrected: float | None = None

    @property
    def shown(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.corrected is not None and self.corrected < LEVEL

    def verdict(self, first: str, second: str) -> str:
        """Say which of the two is better, as far as the corrected p-value allows.

        Args:
            first: the name of the first setting.
            second: the name of the second one.

        Returns:
            "<name> better", "no difference shown", or "not tested" for fewer than two shared seeds.

        Example:
            >>> Paired(1, 0.2).verdict("FR", "BP")
            'not tested: 1 shared seed'
        """
        if self.p is None:
            return f"not tested: {self.seeds} shared seed{'' if self.seeds == 1 else 's'}"
        if not self.shown or self.mean is None:
            return "no difference shown"
        return f"{first if self.mean > 0 else second} better"


def compare(first: Mapping[int, float], second: Mapping[int, float]) -> Paired:
    """Compare two settings over the seeds that both have.

    Args:
        first: a value in percent by seed.
        second: the same of the other setting.

    Returns:
        The difference, first minus second; `corrected` equals `p`, as of one comparison alone.

    Example:
        >>> paired = compare({0: 61.0, 1: 62.0, 2: 63.0, 7: 9.0}, {0: 60.0, 1: 60.0, 2: 60.0})
        >>> paired.seeds, paired.mean, [round(end, 3) for end in paired.interval], round(paired.p, 4)
        (3, 2.0, [-0.484, 4.484], 0.0742)
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return Paired(0)
    differences = np.array([first[seed] - second[seed] for seed in shared]).round(9)
    mean, count = float(differences.mean()), len(shared)
    if count < 2:
        return Paired(count, mean)
    if np.ptp(differences) < SAME:
        # The t test has no spread to hold the mean against. Each difference is as likely positive as negative if the
        # two are alike, so that all n of them have one sign with probability 2 / 2^n.
        p = 1.0 if abs(mean) < SAME else 2.0 ** (1 - count)
        return Paired(count, mean, None, p, p, p)
    from scipy import stats  # here, so that a command that compares nothing starts without it

    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    p = float(test.pvalue)
    return Paired(count, mean, (float(low), float(high)), p, signed_rank(differences), p)


def signed_rank(differences: npt.NDArray[np.float64]) -> float:
    """Test whether differences centre on zero by Wilcoxon's signed-rank test, exactly, ties included.

    Args:
        differences: one per seed; zeros are left out, as Wilcoxon did.

    Returns:
        The two-sided p-value: how often a sum of the ranks of the positive ones is as far out, over all 2^n choices of
        signs. (SciPy goes through the choices one by one where there are ties, or takes a normal approximation.)

    Example:
        >>> signed_rank(np.array([1.0, 2.0, 3.0])), signed_rank(np.array([0.0, 1.0, -1.0]))
        (0.25, 1.0)
    """
    from scipy import stats

    differences = differences[differences != 0]
    doubled = (2 * stats.rankdata(np.abs(differences))).astype(int)  # ranks of ties are halves
    chance = np.ones(1)  # of each sum, over the ranks seen so far
    for rank in doubled:
        chance = (np.pad(chance, (0, rank)) + np.pad(chance, (rank, 0))) / 2
    found = doubled[differences > 0].sum()
    return float(min(1.0, 2 * min(chance[: found + 1].sum(), chance[found:].sum())))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for their number by Holm's step-down method (1979).

    The share of families in which any true null hypothesis falls below a level is then at most that level.

    Args:
        p_values: of one family of tests; None for a test that could not be made, which does not count.

    Returns:
        The corrected p-values, in the order given.

    Example:
        >>> holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]
    """
    made = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(made):
        highest = max(highest, min(1.0, p * (len(made) - rank)))
        corrected[place] = highest
    return corrected


def correct(family: Sequence[Paired]) -> list[Paired]:
    """Correct the p-values of a family of comparisons by :func:`holm`.

    Args:
        family: the comparisons that are looked at together.

    Returns:
        The same comparisons with `corrected` set.

    Example:
        >>> [paired.corrected for paired in correct([Paired(5, 0.1, p=0.02), Paired(1, 0.1), Paired(5, 0.0, p=0.5)])]
        [0.04, None, 0.5]
    """
    corrected = holm([paired.p for paired in family])
    return [dataclasses.replace(paired, corrected=p) for paired, p in zip(family, corrected, strict=True)]


@dataclass(frozen=True)
class Best:
    """The setting whose mean accuracy is the highest of several.

    Args:
        group: the runs of its layers.
        epoch: after how many epochs.
        accuracies: in percent by seed.
        candidates: of how many pairs of layers and epochs it is the best.
    """

    group: RunGroup
    epoch: int
    accuracies: Mapping[int, float]
    candidates: int

    @property
    def mean(self) -> float:
        """The mean accuracy in percent."""
        return math.fsum(self.accuracies.values()) / len(self.accuracies)


def best_setting(groups: Sequence[RunGroup], epochs: Sequence[int] | None = None) -> Best | None:
    """Find the highest mean accuracy over all layers and epochs, as the paper does.

    The best of many means is optimistic: some of its lead is luck. :func:`compare_choices` gives a fairer difference.

    Args:
        groups: the runs of one method, one group per layers.
        epochs: after which epochs to look; None for each group's last one.

    Returns:
        The best among the candidates with the most seeds: fewer would leave more to luck. None without an accuracy.

    Example:
        >>> def group(stop, accuracy):
        ...     run = {"settings": {"seed": 0}, "history": [{"epoch": 1, "accuracy": accuracy}]}
        ...     return RunGroup("fr", 0, stop, "", (run,))
        >>> best = best_setting([group(1, 0.75), group(2, 0.5)])
        >>> best.group.layers, best.epoch, best.mean, best.candidates
        ((0, 1), 1, 75.0, 2)
    """
    found = _candidates(groups, epochs)
    if not found:
        return None
    group, epoch, accuracies = max(found, key=lambda one: math.fsum(one[2].values()))
    return Best(group, epoch, accuracies, len(found))


def compare_choices(
    first: Sequence[RunGroup],
    second: Sequence[RunGroup],
    first_epochs: Sequence[int] | None = None,
    second_epochs: Sequence[int] | None = None,
) -> Paired:
    """Compare two methods, each at the layers and epoch that are best for it on the *other* seeds.

    For every seed in turn the choice is made without it and measured on it, so that the choice has not seen the
    baseline, the initialisation and the order of samples it is measured on. It has seen the test images.

    Args:
        first: the runs of one method, one group per layers.
        second: the runs of the other method.
        first_epochs: after which epochs to look; None for each group's last one.
        second_epochs: the same for the other method.

    Returns:
        The mean difference, first minus second, with no interval and no p-value: the choices for different seeds rest on
        almost the same runs, so that the differences are not independent.

    Example:
        >>> run = lambda seed, accuracy: {"settings": {"seed": seed}, "history": [{"epoch": 1, "accuracy": accuracy}]}
        >>> lucky = RunGroup("fr", 0, 1, "", (run(0, 0.9), run(1, 0.5), run(2, 0.5)))
        >>> steady = RunGroup("fr", 0, 2, "", (run(0, 0.6), run(1, 0.6), run(2, 0.6)))
        >>> flat = RunGroup("bp", 0, 1, "", (run(0, 0.6), run(1, 0.6), run(2, 0.6)))
        >>> round(best_setting([lucky, steady]).mean - 60, 2), round(compare_choices([lucky, steady], [flat]).mean, 2)
        (3.33, -6.67)
    """
    measured = [
        _measured_elsewhere(_candidates(first, first_epochs)),
        _measured_elsewhere(_candidates(second, second_epochs)),
    ]
    paired = compare(*measured)
    return Paired(paired.seeds, paired.mean)


Candidate = tuple[RunGroup, int, dict[int, float]]


def _candidates(groups: Sequence[RunGroup], epochs: Sequence[int] | None) -> list[Candidate]:
    """The layers and epochs to choose from: those with the most seeds."""
    found: list[Candidate] = []
    for group in groups:
        for epoch in group.epochs()[-1:] if epochs is None else epochs:
            accuracies = group.by_seed(epoch)
            if accuracies:
                found.append((group, epoch, accuracies))
    most = max((len(accuracies) for _, _, accuracies in found), default=0)
    return [one for one in found if len(one[2]) == most]


def _measured_elsewhere(candidates: Sequence[Candidate]) -> dict[int, float]:
    seeds = sorted(set.intersection(*(set(accuracies) for _, _, accuracies in candidates))) if candidates else []
    if len(seeds) < 2:
        return {}
    values = np.array([[accuracies[seed] for seed in seeds] for _, _, accuracies in candidates])
    others = values.sum(1, keepdims=True) - values
    return {seed: float(values[others[:, place].argmax(), place]) for place, seed in enumerate(seeds)}
