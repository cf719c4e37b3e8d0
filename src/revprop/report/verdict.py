"""What a post-training study says, in plain sentences made from its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from revprop.report.aggregation import method_name
from revprop.report.comparison import LEVEL, Paired, compare_choices
from revprop.report.grid import Grid, Layers, Way
from revprop.report.numerals import interval, p_value, signed, with_interval
from revprop.report.summary import BestOfWay, best_of_ways


def cell_verdicts(grid: Grid, way: Way) -> str:
    """Say in which cells a way of training beats BP, in which BP beats it, and in which no difference is shown.

    Args:
        grid: the runs of one network on one data set.
        way: the way to compare with the grid's BP.

    Returns:
        A paragraph, the last epoch first; empty where no cell has both.

    Example:
        >>> runs = [
        ...     {"settings": {"method": method, "seed": seed}, "l_start": 0, "l_stop": 1, "parameters": 52,
        ...      "baseline_accuracy": 0.5, "history": [{"epoch": 1, "accuracy": gain + (0.5 + seed / 64) ** 2}]}
        ...     for method, gain in (("fr", 0.25), ("bp", 0.0)) for seed in range(8)
        ... ]
        >>> print(cell_verdicts(Grid.of(runs), Grid.of(runs).fr[0]))
        FR against BP: after 1 epoch FR beats BP in 1 of 1 cell (corrected p < 0.05): (0, 1); BP beats FR in none.
    """
    name = _inside(method_name(way.method))
    sentences: list[str] = []
    for epoch in reversed(grid.epochs) if way.by_epochs else [None]:
        found = grid.against_bp(way, epoch)
        found = {layers: paired for layers, paired in found.items() if paired.seeds}
        if not found:
            continue
        when = "at the end of each" if epoch is None else f"after {epoch} epoch{'s' if epoch > 1 else ''}"
        sentences.append(f"{when} {_count(found, name, with_reach=not sentences)}")
    if not sentences:
        return ""
    text = ". ".join([sentences[0], *(sentence[0].upper() + sentence[1:] for sentence in sentences[1:])])
    return f"{way.label} against BP: {text}."


def best_verdicts(grid: Grid) -> list[str]:
    """Say what the best setting of every way gains over the baseline and over the best of BP, and what the paper found.

    Args:
        grid: the runs of one network on one data set.

    Returns:
        One paragraph per way other than BP, one on what the best of many is worth, and one on the paper's numbers where
        there are any; of a study with BP alone, its gain.

    Example:
        >>> runs = [
        ...     {"settings": {"method": method, "seed": 0}, "l_start": 0, "l_stop": 1, "parameters": 52, "seconds": 1.0,
        ...      "baseline_accuracy": 0.5, "history": [{"epoch": 1, "accuracy": accuracy, "seconds": 1.0}]}
        ...     for method, accuracy in (("fr", 0.75), ("bp", 0.625))
        ... ]
        >>> for paragraph in best_verdicts(Grid.of(runs)):
        ...     print(paragraph)
        Best of BP: (0, 1), epoch 1, 62.50 %, +12.500 points over the baseline (1 seed: no test).
        Best of FR: (0, 1), epoch 1, 75.00 %, +25.000 points over the baseline (1 seed: no test); +12.500 against the best of
        BP (1 seed: no test), at 1
        times the time.
    """
    found = best_of_ways(grid)
    bp = next((one for one in found if one.way is grid.bp), None)
    paragraphs = []
    for one in found:
        text = (
            f"Best of {_inside(one.way.label)}: {one.place}, {one.best.mean:.2f} %, {signed(one.gain.mean)} points over the "
            f"baseline ({_tested(one.gain)})"
        )
        if one.lead is not None and one.lead.mean is not None:
            text += f"; {signed(one.lead.mean)} against the best of BP ({_tested(one.lead)})"
            if bp is not None and bp.seconds and one.seconds is not None:
                text += f", at {one.seconds / bp.seconds:.2g} times the time"
            text += _chosen_elsewhere(grid, one)
        paragraphs.append(f"{text}.")
    if any(one.best.candidates > 1 and one.gain.seeds > 1 for one in found):
        paragraphs.append(
            "Each best is the highest of many means, found on the test set that it is reported on, as the paper's are: part of "
            "it is luck, its p-values are too small, and only p far below 0.05 deserve belief. Chosen on the other "
            "seeds means: for every seed, layers and epoch are chosen without it and measured on it."
        )
    paragraphs += _published_margin(grid)
    return paragraphs


def _inside(name: str) -> str:
    """A name within a sentence: "closed form", but "FR"."""
    return name if name[:2].isupper() else name[0].lower() + name[1:]


def _count(found: dict[Layers, Paired], name: str, with_reach: bool) -> str:
    tested = {layers: paired for layers, paired in found.items() if paired.p is not None}
    if not tested:
        mean = statistics.fmean(paired.mean or 0.0 for paired in found.values())
        return (
            f"nothing can be tested: {len(found)} cell{_s(found)} {'has' if len(found) == 1 else 'have'} fewer than two seeds "
            f"that both share (mean difference over the cells {signed(mean)} points)"
        )
    ahead = [layers for layers, paired in tested.items() if paired.shown and (paired.mean or 0) > 0]
    behind = [layers for layers, paired in tested.items() if paired.shown and (paired.mean or 0) < 0]
    text = (
        f"{name} beats BP in {_cells(ahead, len(tested))} (corrected p < {LEVEL:g}){_list(ahead)}; "
        f"BP beats {name} in {_cells(behind)}{_list(behind)}"
    )
    rest = len(tested) - len(ahead) - len(behind)
    if rest:
        reaches = [(one.interval[1] - one.interval[0]) / 2 for one in tested.values() if one.interval is not None]
        reach = f" (the intervals reach {statistics.median(reaches):.3f} points to either side, in the median)"
        text += f"; in {rest} no difference is shown{reach if reaches and with_reach else ''}"
    untested = len(found) - len(tested)
    if untested:
        text += f"; {untested} cell{'s' if untested > 1 else ''} with fewer than two shared seeds not tested"
    return text


def _cells(cells: Sequence[Layers], of: int | None = None) -> str:
    count = str(len(cells)) if cells else "none"
    return count if of is None else f"{count} of {of} cell{'' if of == 1 else 's'}"


def _list(cells: Sequence[Layers]) -> str:
    return f": {', '.join(str(layers) for layers in cells)}" if cells else ""


def _s(things: dict[Layers, Paired]) -> str:
    return "" if len(things) == 1 else "s"


def _tested(paired: Paired) -> str:
    seeds = f"{paired.seeds} seed{'' if paired.seeds == 1 else 's'}"
    if paired.p is None:
        return f"{seeds}: no test"
    reach = interval(paired)
    p = str(p_value(paired.p))
    test = f"p {p}" if p.startswith("<") else f"p = {p}"
    return f"95 % interval {reach}, {test}, {seeds}" if reach else f"no spread over {seeds}, {test}"


def _chosen_elsewhere(grid: Grid, one: BestOfWay) -> str:
    if grid.bp is None:
        return ""
    fair = compare_choices(one.way.groups, grid.bp.groups, grid.epochs if one.way.by_epochs else None, grid.epochs)
    return f"; chosen on the other seeds, {signed(fair.mean)}" if fair.mean is not None else ""


def _published_margin(grid: Grid) -> list[str]:
    table = grid.published
    if table is None or not grid.fr:
        return []
    (fr, fr_epoch), (bp, bp_epoch) = table.best("fr"), table.best("bp")
    text = (
        f"The paper's best FR minus its best BP on this network (Table {table.number}) is {signed(table.margin())} points: "
        f"({fr.l_start}, {fr.l_stop}) after {fr_epoch} epoch{'s' if fr_epoch > 1 else ''} against "
        f"({bp.l_start}, {bp.l_stop}) after {bp_epoch}; of epoch 10 alone, {signed(table.margin([10]))}."
    )
    return [text if grid.comparable else f"{text} Ours was trained on other data."]


def headline(grid: Grid) -> str:
    """Say in one sentence what came out, for the top of a page.

    Args:
        grid: the runs of one network on one data set.

    Returns:
        One sentence; empty where there is nothing to compare with BP.

    Example:
        >>> headline(Grid.of([{"settings": {"method": "bp", "seed": 0}, "l_start": 0, "l_stop": 1, "parameters": 52,
        ...                    "baseline_accuracy": 0.5, "history": []}]))
        ''
    """
    leads = [one for one in best_of_ways(grid) if one.lead is not None and one.lead.mean is not None]
    if not leads:
        return ""
    parts = [f"best of {_inside(one.way.label)} {with_interval(one.lead)}" for one in leads]
    return f"{grid.name}, points above the best of BP with 95 % interval: {'; '.join(parts)}."
