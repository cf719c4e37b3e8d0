"""What each option of a way of training does: every line held against BP and against the default."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from revprop.report.aggregation import RunGroup, describe_options, method_name, three_digits
from revprop.report.comparison import Paired, compare, correct
from revprop.report.grid import Grid, Way, default_way, options_of
from revprop.report.numerals import mean_and_spread, p_value, with_interval
from revprop.report.tables import Cell, Table


@dataclass(frozen=True)
class Change:
    """One way of training on the layers of an ablation, at the end of its runs.

    Args:
        name: the method, and what it changes from the default of that method.
        group: the runs.
        accuracies: in percent by seed.
        to_bp: their difference to BP on the same layers, corrected for the number of changes.
        to_default: their difference to the default on the same layers, likewise; without seeds for the default itself.
    """

    name: str
    group: RunGroup
    accuracies: Mapping[int, float]
    to_bp: Paired
    to_default: Paired


def find_changes(grid: Grid, references: Grid | None = None) -> list[Change]:
    """Hold every way of training but BP against BP and against the default of its method, layers by layers.

    Args:
        grid: the runs of an ablation: ways that vary one option at a time.
        references: where the ablation has no BP of its own, the study of the same baselines whose BP to compare with.

    Returns:
        One entry per way and layers, by method and layers, the default first.

    Example:
        >>> runs = [
        ...     {"settings": {"method": "fr", "seed": 0, "margin": margin, "alpha": alpha}, "l_start": 0, "l_stop": 1,
        ...      "parameters": 52, "baseline_accuracy": 0.5, "history": [{"epoch": 1, "accuracy": 0.5 + margin / 8}]}
        ...     for margin, alpha in ((0, 0.1), (1, 0.1), (0, 0.9))
        ... ]
        >>> [(change.name, change.to_default.mean) for change in find_changes(Grid.of(runs))]
        [('FR, default', None), ('FR, margin=1', 12.5), ('FR, alpha=0.9', 0.0)]
    """
    bp = grid.bp or (references.bp if references else None)
    defaults = defaults_of(grid)
    entries = [(way, group) for way in grid.others for group in way.groups if group.epochs()]
    entries.sort(key=lambda entry: (*_place(entry[1]), entry[0] is not defaults[entry[0].method]))
    ends = [_end(group) for _, group in entries]
    to_bp = correct([compare(end, _end(_cell(bp, group))) for (_, group), end in zip(entries, ends, strict=True)])
    to_default = correct(
        [
            Paired(0) if way is defaults[way.method] else compare(end, _end(_cell(defaults[way.method], group)))
            for (way, group), end in zip(entries, ends, strict=True)
        ]
    )
    return [
        Change(_name(way, defaults[way.method]), group, end, other, default)
        for (way, group), end, other, default in zip(entries, ends, to_bp, to_default, strict=True)
    ]


def ablation_table(grid: Grid, references: Grid | None = None) -> Table:
    """Tabulate what each option does: one line per way and layers.

    Args:
        grid: the runs of an ablation.
        references: as for :func:`find_changes`.

    Returns:
        For every change its accuracy at the end, its differences to the baseline, to BP and to the default on the same
        layers with 95 % intervals, p-values corrected for the number of lines, seconds and peak memory. Bold are the
        corrected p-values below 0.05.

    Example:
        >>> run = {"settings": {"method": "fr", "seed": 0}, "l_start": 0, "l_stop": 1, "parameters": 52, "seconds": 3.0,
        ...        "baseline_accuracy": 0.5, "history": [{"epoch": 1, "accuracy": 0.75}]}
        >>> ablation_table(Grid.of([run])).rows[0][:4]
        ['FR, default', '(0, 1)', '75.00', '+25.000']
    """
    lines: list[list[Cell]] = []
    bold: set[tuple[int, int]] = set()
    for change in find_changes(grid, references):
        group = change.group
        seconds, memory = group.seconds(), group.peak_memory().values()
        bold.update((len(lines), at) for at, paired in ((5, change.to_bp), (7, change.to_default)) if paired.shown)
        lines.append(
            [
                change.name,
                str(group.layers),
                mean_and_spread(list(change.accuracies.values())),
                with_interval(compare(change.accuracies, group.by_seed(None))),
                with_interval(change.to_bp),
                p_value(change.to_bp.corrected),
                with_interval(change.to_default),
                p_value(change.to_default.corrected),
                three_digits(statistics.fmean(seconds)) if seconds else None,
                three_digits(max(memory)) if memory else None,
            ]
        )
    heads = ["changed", "layers", "accuracy (%)", "gain over the baseline", "minus BP", "p, corrected"]
    heads += ["minus the default", "p, corrected", "seconds", "memory (MB)"]
    described = "; ".join(
        f"{method_name(method)}: {describe_options(_named(way)) or 'as the library has it'}"
        for method, way in defaults_of(grid).items()
    )
    note = (
        f"Defaults, {described}. At the end of each run. Differences in points of a percent, paired over seeds, in brackets "
        "the 95 % interval; p by the paired t test, corrected by Holm's method for the lines of its column. Bold: below 0.05."
    )
    return Table(f"{grid.name}: what each option does", heads, lines, note, frozenset(bold))


def defaults_of(grid: Grid) -> dict[str, Way]:
    """The default way of each method but BP."""
    methods = dict.fromkeys(way.method for way in grid.others)
    return {method: default_way([way for way in grid.others if way.method == method]) for method in methods}


def _place(group: RunGroup) -> tuple[str, int, int]:
    return group.method, group.l_stop, group.l_start


def _cell(way: Way | None, group: RunGroup) -> RunGroup | None:
    return None if way is None else way.cells.get(group.layers)


def _end(group: RunGroup | None) -> dict[int, float]:
    epochs = [] if group is None else group.epochs()
    return group.by_seed(epochs[-1]) if group is not None and epochs else {}


def _name(way: Way, default: Way) -> str:
    name = method_name(way.method)
    if way is default:
        return f"{name}, default"
    mine, usual = options_of(way), options_of(default)
    changed = {key: value for key, value in mine.items() if value != usual.get(key)}
    dropped = [f"no {key}" for key in usual if usual[key] and key not in mine]
    return ", ".join(part for part in (name, describe_options(changed), *dropped) if part)


def _named(way: Way) -> Mapping[str, object]:
    return {key: value for key, value in options_of(way).items() if key not in ("method", "batch_size")}
