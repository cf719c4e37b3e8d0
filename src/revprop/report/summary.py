"""What beats what: one line per way of training, at its best."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from revprop.report.aggregation import three_digits
from revprop.report.comparison import Best, Paired, best_setting, compare
from revprop.report.grid import Grid, Way
from revprop.report.numerals import mean_and_spread, p_value, with_interval
from revprop.report.tables import Cell, Table


@dataclass(frozen=True)
class BestOfWay:
    """The best setting of one way of training, held against the baseline and against the best of BP.

    Args:
        way: the way.
        best: its best layers and epoch.
        gain: its accuracy minus the baseline's, paired over seeds.
        lead: its accuracy minus that of BP's best setting, paired over seeds; None for BP itself, and without BP.
    """

    way: Way
    best: Best
    gain: Paired
    lead: Paired | None

    @property
    def place(self) -> str:
        """The layers and the epoch, to be read."""
        return f"{self.best.group.layers}, {self.when}"

    @property
    def when(self) -> str:
        """The epoch, or the sweep of the closed form, to be read."""
        return f"{'epoch' if self.way.by_epochs else 'sweep'} {self.best.epoch}"

    @property
    def seconds(self) -> float | None:
        """Mean seconds of a run up to that epoch, wanted features included; None where the runs do not tell."""
        seconds = self.best.group.seconds(self.best.epoch)
        return statistics.fmean(seconds) if seconds else None

    @property
    def memory(self) -> float | None:
        """Peak memory in MB, the largest of the runs; None where they do not tell."""
        return max(self.best.group.peak_memory().values(), default=None)


def best_of_ways(grid: Grid) -> list[BestOfWay]:
    """Find the best setting of every way of training: over all layers and the tabulated epochs, as the paper does.

    Of the closed form the last sweep counts alone, because how many to make is one of its settings.

    Args:
        grid: the runs of one network on one data set.

    Returns:
        One entry per way with any accuracy, BP first.

    Example:
        >>> runs = [
        ...     {"settings": {"method": method, "seed": seed}, "l_start": 0, "l_stop": stop, "parameters": 52,
        ...      "baseline_accuracy": 0.5, "history": [{"epoch": 1, "accuracy": accuracy + stop / 64}]}
        ...     for method, accuracy in (("fr", 0.625), ("bp", 0.5)) for seed in (0, 1) for stop in (1, 2)
        ... ]
        >>> [(one.way.label, one.place, one.gain.mean, one.lead and one.lead.mean) for one in best_of_ways(Grid.of(runs))]
        [('BP', '(0, 2), epoch 1', 3.125, None), ('FR', '(0, 2), epoch 1', 15.625, 12.5)]
    """
    bp = None if grid.bp is None else best_setting(grid.bp.groups, grid.epochs)
    found = []
    for way in grid.ways:
        best = best_setting(way.groups, grid.epochs if way.by_epochs else None)
        if best is not None:
            gain = compare(best.accuracies, best.group.by_seed(None))
            lead = None if bp is None or way is grid.bp else compare(best.accuracies, bp.accuracies)
            found.append(BestOfWay(way, best, gain, lead))
    return found


def summary_table(grid: Grid) -> Table:
    """Tabulate what beats what: the baseline and the best setting of every way of training.

    Args:
        grid: the runs of one network on one data set.

    Returns:
        One line for the baseline and one per way: layers and epoch of its best mean, accuracy, gain over the baseline and
        lead over the best of BP with 95 % intervals and p-values, seconds and peak memory, also as multiples of BP's.

    Example:
        >>> run = {"settings": {"method": "bp", "seed": 0}, "l_start": 0, "l_stop": 1, "parameters": 52, "seconds": 3.0,
        ...        "baseline_accuracy": 0.5, "history": [{"epoch": 1, "accuracy": 0.75, "seconds": 3.0}]}
        >>> for line in summary_table(Grid.of([run])).rows:
        ...     print(line[:5])
        ['baseline', None, None, '50.00', None]
        ['BP', '(0, 1)', 'epoch 1', '75.00', '+25.000']
    """
    found = best_of_ways(grid)
    bp = next((one for one in found if one.way is grid.bp), None)
    baselines = {int(row["settings"].get("seed", 0)): 100.0 * row["baseline_accuracy"] for row in grid.rows}
    empty: list[Cell] = [None] * 5
    lines: list[list[Cell]] = [["baseline", None, None, mean_and_spread(list(baselines.values())), *empty]]
    for one in found:
        lines.append(
            [
                one.way.label,
                str(one.best.group.layers),
                one.when,
                mean_and_spread(list(one.best.accuracies.values())),
                with_interval(one.gain),
                with_interval(one.lead),
                None if one.lead is None else p_value(one.lead.p),
                _with_multiple(one.seconds, None if bp is None else bp.seconds),
                _with_multiple(one.memory, None if bp is None else bp.memory),
            ]
        )
    heads = [
        "best of",
        "layers",
        "after",
        "accuracy (%)",
        "gain",
        "minus best BP",
        "p",
        "seconds (BP = 1)",
        "MB (BP = 1)",
    ]
    counts = {one.best.candidates for one in found}
    of = " to ".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else "0"
    note = (
        f"{len(baselines)} seed{'s' if len(baselines) != 1 else ''}. Best: the highest mean of {of} pairs of layers and epoch, "
        "found on the test set that it is reported on, as in the paper; of many, the best is partly luck, so that gains and "
        "leads are optimistic and their p-values, paired t tests not corrected for that choice, too small. Differences in "
        "points of a percent, in brackets the 95 % interval. Gain: over the baseline. Seconds: up to that epoch, wanted features "
        "included. MB: peak memory. In brackets behind both, as a multiple of the best BP's."
    )
    return Table(f"{grid.name}: what beats what", heads, lines, note)


def _with_multiple(value: float | None, of: float | None) -> str | None:
    if value is None:
        return None
    return f"{three_digits(value)} ({value / of:.2g})" if of else three_digits(value)
