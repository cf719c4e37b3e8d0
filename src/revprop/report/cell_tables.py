"""Tables with one line per module trained: beside the published ones, FR against BP, and the memory of both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from revprop.report.aggregation import method_name, three_digits
from revprop.report.grid import Grid, Way
from revprop.report.numerals import MINUS, mean_and_spread, p_value, signed, with_interval
from revprop.report.published import PUBLISHED_EPOCHS, PublishedRow, PublishedTable
from revprop.report.tables import Cell, Table


def published_table(grid: Grid) -> Table | None:
    """Hold every cell against the published one.

    Where the network was trained on the data set of the paper, test accuracies are compared. Elsewhere (other images,
    fewer of them, fewer classes) they mean different things, and gains over the baseline are compared instead.

    Args:
        grid: the runs of one network on one data set.

    Returns:
        One line per method and layers, and for each published epoch three columns: ours, the published number, ours
        minus it. None where nothing of this network was published, or no run reached a published epoch.

    Example:
        >>> run = {"settings": {"method": "fr", "seed": 0, "network": "mnist", "data": "mnist"}, "l_start": 0,
        ...        "l_stop": 1, "parameters": 52, "baseline_accuracy": 0.9762,
        ...        "history": [{"epoch": 1, "accuracy": 0.98}]}
        >>> table = published_table(Grid.of([run]))
        >>> table.columns
        ['trained', 'epoch 1', 'published', 'difference']
        >>> table.rows
        [['FR (0, 1)', '98.000', '97.682', '+0.318']]
    """
    theirs = grid.published
    epochs = [epoch for epoch in PUBLISHED_EPOCHS if epoch in grid.epochs]
    if theirs is None or not epochs:
        return None
    lines: list[list[Cell]] = []
    for group in grid.groups_by_epochs:
        row = theirs.row(group.method, *group.layers)
        baseline = group.by_seed(None)
        line: list[Cell] = [group.label]
        for epoch in epochs:
            values = group.by_seed(epoch)
            ours = None if not values else statistics.fmean(values.values())
            printed = None if row is None else row.mean[PUBLISHED_EPOCHS.index(epoch)]
            if not grid.comparable:
                ours = None if ours is None else ours - statistics.fmean(baseline[seed] for seed in values)
                printed = None if printed is None else printed - theirs.baseline_accuracy
            difference = None if ours is None or printed is None else ours - printed
            show = _percent if grid.comparable else signed
            line += [show(ours), show(printed), signed(difference)]
        lines.append(line)
    heads = [head for epoch in epochs for head in (f"epoch {epoch}", "published", "difference")]
    baselines = [100 * row["baseline_accuracy"] for row in grid.rows]
    note = (
        f"Published: Table {theirs.number} of the paper, means of {theirs.runs} runs from one baseline at "
        f"{theirs.baseline_accuracy:.2f} %; our baselines have {statistics.fmean(baselines):.2f} % on average. "
    )
    if not grid.comparable:
        data = grid.rows[0]["settings"].get("data")
        note += (
            f"Our data ({data}) is not the paper's, so that accuracies do not compare: gains over the baseline, in points "
            "of a percent, stand for them. "
        )
    sizes = sorted({len(group.runs) for group in grid.groups_by_epochs})
    if sizes and sizes[0] < theirs.runs:
        each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        note += f"Reduced: {each} of the paper's {theirs.runs} runs a line. "
    note += "Difference: ours minus published, in points."
    compared = "test accuracy (%)" if grid.comparable else "gain over the baseline (points)"
    return Table(f"{grid.name}: {compared}, ours and published", ["trained", *heads], lines, note)


def comparison_table(grid: Grid, way: Way, epoch: int | None = None) -> Table | None:
    """Compare one way of training with BP in every cell, paired over seeds.

    Args:
        grid: the runs of one network on one data set.
        way: the way to compare with the grid's BP.
        epoch: after how many epochs; None for the last of each.

    Returns:
        One line per layers: both mean accuracies, their mean difference with its 95 % interval, p-values, the verdict and,
        for FR, the published difference. Bold is a verdict that shows a difference. None where no cell has both.

    Example:
        >>> runs = [
        ...     {"settings": {"method": method, "seed": seed}, "l_start": 0, "l_stop": 1, "parameters": 52,
        ...      "baseline_accuracy": 0.5, "history": [{"epoch": 1, "accuracy": accuracy}]}
        ...     for method, accuracy in (("fr", 0.625), ("bp", 0.5)) for seed in (0, 1)
        ... ]
        >>> grid = Grid.of(runs)
        >>> comparison_table(grid, grid.fr[0], 1).rows[0][:5]
        ['(0, 1)', '50.00 ± 0.00', '62.50 ± 0.00', '+12.500', '0.50']
    """
    found = grid.against_bp(way, epoch)
    bp = grid.bp
    if bp is None or not any(paired.seeds for paired in found.values()):
        return None
    name = method_name(way.method)
    theirs = grid.published if way.method == "fr" and epoch in PUBLISHED_EPOCHS else None
    lines: list[list[Cell]] = []
    bold: set[tuple[int, int]] = set()
    for layers, paired in found.items():
        ours = way.cells[layers].by_seed(way.last if epoch is None else epoch)
        other = bp.cells[layers].by_seed(bp.last if epoch is None else epoch)
        line: list[Cell] = [
            str(layers),
            mean_and_spread(list(other.values())),
            mean_and_spread(list(ours.values())),
            with_interval(paired),
            p_value(paired.p),
            p_value(paired.corrected),
            p_value(paired.wilcoxon),
            paired.verdict(name, "BP"),
        ]
        if paired.shown:
            bold.add((len(lines), len(line) - 1))
        if theirs is not None and epoch is not None:
            line.append(signed(published_difference(theirs, layers, epoch)))
        lines.append(line)
    heads = ["layers", "BP (%)", f"{name} (%)", f"{name} {MINUS} BP"]
    heads += ["p", "corrected", "Wilcoxon", "verdict"]
    seeds = sorted({paired.seeds for paired in found.values()})
    shared = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    tested = sum(paired.p is not None for paired in found.values())
    note = (
        f"{name} {MINUS} BP in points of a percent, paired over the {shared} seeds that both have: the same baselines. 95 % "
        f"interval and p by the paired t test, then p corrected by Holm's method for the {tested} cells tested, and the p of "
        "Wilcoxon's signed-rank test, uncorrected. Bold: a corrected p below 0.05."
    )
    if theirs is not None:
        heads.append("published")
        note += f" Published: the difference of the means in Table {theirs.number}, whatever its baseline and data."
    after = "at the end of each" if epoch is None else f"after {epoch} epoch{'s' if epoch > 1 else ''}"
    return Table(f"{grid.name}: {way.label} against BP {after}", heads, lines, note, frozenset(bold))


def memory_table(grid: Grid, way: Way) -> Table | None:
    """Compare the peak memory of training one way with that of BP in every cell.

    Args:
        grid: the runs of one network on one data set.
        way: the way to compare with the grid's BP.

    Returns:
        One line per layers and one for all: peak memory of both in MB, their ratio (mean and range over shared seeds), and
        the paper's ratio. None where no cell has both.

    Example:
        >>> runs = [
        ...     {"settings": {"method": method, "seed": 0, "network": "mnist"}, "l_start": 0, "l_stop": 1,
        ...      "parameters": 52, "baseline_accuracy": 0.5, "history": [], "peak_memory_bytes": memory}
        ...     for method, memory in (("fr", 6e6), ("bp", 5e6))
        ... ]
        >>> grid = Grid.of(runs)
        >>> memory_table(grid, grid.fr[0]).rows
        [['(0, 1)', '5.00', '6.00', '1.200', '1.038'], ['all', None, None, '1.200', '1.038']]
    """
    bp, theirs = grid.bp, grid.published if way.method == "fr" else None
    if bp is None:
        return None
    name = method_name(way.method)
    lines: list[list[Cell]] = []
    all_ours, all_theirs = [], []
    for layers, group in way.cells.items():
        if layers not in bp.cells:
            continue
        ours, other = group.peak_memory(), bp.cells[layers].peak_memory()
        ratios = [ours[seed] / other[seed] for seed in ours.keys() & other.keys()]
        if not ratios:
            continue
        line: list[Cell] = [
            str(layers),
            three_digits(statistics.fmean(other.values())),
            three_digits(statistics.fmean(ours.values())),
            _mean_and_range(ratios),
        ]
        all_ours.append(statistics.fmean(ratios))
        if theirs is not None:
            rows = theirs.row("fr", *layers), theirs.row("bp", *layers)
            ratio = _memory_ratio(*rows)
            line.append(None if ratio is None else f"{ratio:.3f}")
            all_theirs += [] if ratio is None else [ratio]
        lines.append(line)
    if not lines:
        return None
    total: list[Cell] = ["all", None, None, _mean_and_range(all_ours)]
    heads = ["layers", "BP (MB)", f"{name} (MB)", f"{name} / BP"]
    note = (
        "Peak memory of one training step, in MB of 10^6 bytes. Ratio: mean, and range in brackets where there is one."
    )
    if theirs is not None:
        total.append(_mean_and_range(all_theirs) if all_theirs else None)
        heads.append("published ratio")
        note += f" Published: from the memory column of Table {theirs.number}, measured on a GPU."
    return Table(f"{grid.name}: peak memory, {way.label} against BP", heads, [*lines, total], note)


def published_difference(table: PublishedTable, layers: tuple[int, int], epoch: int) -> float | None:
    """Subtract the published mean of BP from that of FR.

    Args:
        table: the published table.
        layers: (lS, lR).
        epoch: one of the published epochs.

    Returns:
        Points of a percent; None where the table has no such lines.

    Example:
        >>> from revprop.report.published import PUBLISHED
        >>> round(published_difference(PUBLISHED["cifar10"], (0, 4), 10), 3)
        0.271
    """
    fr, bp = table.row("fr", *layers), table.row("bp", *layers)
    if fr is None or bp is None:
        return None
    column = PUBLISHED_EPOCHS.index(epoch)
    return fr.mean[column] - bp.mean[column]


def _memory_ratio(fr: PublishedRow | None, bp: PublishedRow | None) -> float | None:
    return None if fr is None or bp is None else fr.memory_mb / bp.memory_mb


def _mean_and_range(ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.3f}", f"{max(ratios):.3f}"
    return f"{statistics.fmean(ratios):.3f}" + ("" if low == high else f" [{low}, {high}]")


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
