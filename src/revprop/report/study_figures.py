"""Figures 4 to 7 of the paper on FR post-training as sections of a page: drawn from rows, with what they say of its claims."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence

from revprop.report.aggregation import Row, three_digits
from revprop.report.comparison import LEVEL, Paired, compare, correct
from revprop.report.difference_figures import difference_dots
from revprop.report.figures import METHOD_COLOURS
from revprop.report.grid import STUDY, Grid, Layers, Way, options_of, split_by_study
from revprop.report.numerals import p_value, signed, with_interval
from revprop.report.page import Section
from revprop.report.published import PUBLISHED_EPOCHS
from revprop.report.study_drawings import (
    EMBEDDINGS,
    Stages,
    by_stage,
    embeddings,
    mean_and_reach,
    option,
    stage_boxes,
    stage_maps,
    way_name,
)
from revprop.report.tables import Cell, Table

__all__ = ["sections"]


def sections(rows: Sequence[Row], draw: bool = True) -> list[Section]:
    """Make a section of each of the paper's Figures 4 to 7 that the rows allow.

    Args:
        rows: finished runs of any kind; others than those of the figures are left alone.
        draw: whether to draw the figures; else the sections hold text and tables only.

    Returns:
        The sections, in the order of the figures: text, figure, table, and how to read them, with what the numbers say
        about the paper's claims. Figure 5 needs rows of the study "figure5"; Figure 7 needs the post-training of a
        network and of the same with its channels reversed.

    Example:
        >>> sections([])
        []
    """
    of_kind: dict[str, list[Row]] = {}
    for row in rows:
        of_kind.setdefault(str(row["settings"].get("kind")), []).append(row)
    studies = split_by_study(rows)
    found = [
        _figure4(group, draw)
        for group in _grouped(of_kind.get("figure4", []), "network", "data", "stages", "samples", "reduced")
    ]
    fifth = [Grid.of(study) for study in studies if study[0]["settings"].get("study") == "figure5"]
    found += [_figure5(fifth, draw)] if fifth else []
    names = ("network", "data", "baseline_seed", "reduced", "start", "stop", "epochs")
    found += [_figure6(group, draw) for group in _grouped(of_kind.get("figure6", []), *names)]
    others = [Grid.of(study) for study in studies if study[0]["settings"].get("study") != "figure5"]
    found += [_figure7(a, b, draw) for a in others for b in others if _is_reversed(b, a)]
    return found


# --- Figure 4 ---------------------------------------------------------------------------------------------------------


def _figure4(rows: Sequence[Row], draw: bool) -> Section:
    settings = rows[0]["settings"]
    tables, figures, verdicts = [], [], []
    for same in _grouped(rows, "way"):
        first = min(row["settings"]["seed"] for row in same)
        figures += [stage_maps([row for row in same if row["settings"]["seed"] == first])] if draw else []
        stages = _grouped(same, "stage")
        tables.append(_stage_table(stages))
        verdicts.append(_shrinking(stages))
    networks = len({row["settings"]["seed"] for row in rows})
    return Section(
        f"Figure 4: {settings['network']} on {settings['data']} at {len({r['settings']['stage'] for r in rows})} stages",
        f"One network as it trains. At each stage, the features it has (recorded) against the features that would give the right "
        f"label (wanted), as the mean absolute difference over the first {settings['samples']:,} test samples, right and wrong "
        f"ones together. {'The maps are of the first of ' + str(networks) + ' networks. ' if networks > 1 else ''}"
        f"{_reduced(rows)}",
        tables=tables,
        figures=figures,
        reading=("Down a column, darker is nearer. " if figures else "")
        + f"The paper's claim is that the discrepancy shrinks as accuracy grows. {' '.join(verdicts)}",
    )


PANELS = "Each panel has its own scale; bars are 95 % intervals of the gain over each seed's own baseline. "
BOXES = "Above, boxes are quartiles over the seeds; below, dots above zero are stages where FR is ahead of BP. "
PARTS = (
    ("discrepancy", "mean |difference|"),
    ("deviation", "relative deviation"),
    ("deviation_wrong", "relative deviation of wrong samples"),
)


def _values(rows: Sequence[Row], number: int, name: str) -> list[float]:
    """One part of what a stage says of one layer, by network; a stage with no wrong sample has no ``deviation_wrong``."""
    return [row["layers"][number][name] for row in rows if row["layers"][number][name] is not None]


def _stage_table(stages: Sequence[Sequence[Row]]) -> Table:
    """Per layer and stage: the mean discrepancy, and the relative deviation over all samples and over the wrong ones."""

    def cell(rows: Sequence[Row], number: int, name: str) -> str | None:
        values = _values(rows, number, name)
        spread = f" \u00b1 {three_digits(statistics.stdev(values))}" if len(values) > 1 else ""
        return three_digits(statistics.fmean(values)) + spread if values else None

    accuracies = [f"{100 * statistics.fmean(row['accuracy'] for row in rows):.2f} %" for rows in stages]
    lines: list[list[Cell]] = [
        [layer["layer"], *(cell(rows, number, name) for name, _ in PARTS for rows in stages)]
        for number, layer in enumerate(stages[0][0]["layers"])
    ]
    return Table(
        f"Distance from the wanted features by test accuracy: {way_name(stages[0][0])}",
        ["layer", *(f"{head}, at {accuracy}" for _, head in PARTS for accuracy in accuracies)],
        lines,
        "Relative deviation: mean over samples of |wanted - recorded| / |recorded|.",
    )


def _shrinking(stages: Sequence[Sequence[Row]]) -> str:
    """In which layers the claim of Figure 4 holds, by each of what is tabulated."""
    layers = [layer["layer"] for layer in stages[0][0]["layers"]]
    found = []
    for name, what in PARTS:
        means = {
            layer: [statistics.fmean(values) for rows in stages if (values := _values(rows, number, name))]
            for number, layer in enumerate(layers)
        }
        falls = [layer for layer, values in means.items() if all(b < a for a, b in itertools.pairwise(values))]
        rises = [
            f"{layer} ({', '.join(three_digits(v) for v in values)})"
            for layer, values in means.items()
            if layer not in falls
        ]
        verdict = "confirmed" if not rises else "confirmed in part" if falls else "contradicted"
        parts = [f"falls from stage to stage in {', '.join(falls)}"] if falls else []
        parts += [f"does not in {', '.join(rises)}"] if rises else []
        found.append(f"{what} {' and '.join(parts)}: {verdict}")
    return f"With {way_name(stages[0][0])}, the {'; the '.join(found)}."


# --- Figure 5 ---------------------------------------------------------------------------------------------------------


def _figure5(grids: Sequence[Grid], draw: bool) -> Section:
    pairs: dict[tuple[int, float, str], Paired] = {
        (number, alpha, name): compare(found[name], found["one_hot"])
        for number, grid in enumerate(grids)
        for alpha, found in _by_alpha(grid).items()
        for name in ("nearest", "maximum")
        if name in found and "one_hot" in found
    }
    corrected = dict(zip(pairs, correct(list(pairs.values())), strict=True))
    tested = sum(pair.p is not None for pair in pairs.values())
    lines: list[list[Cell]] = []
    for number, grid in enumerate(grids):
        for way in grid.ways:
            name, alpha = option(way, "embedding"), option(way, "alpha")
            pair = corrected.get((number, alpha, name))
            mean, reach = mean_and_reach(way)
            against = None if way is grid.bp else next(iter(grid.against_bp(way).values()), None)
            label = EMBEDDINGS[name][0] if name in EMBEDDINGS else way.label
            cells = [with_interval(against, 2), with_interval(pair, 2), p_value(pair.corrected if pair else None)]
            lines.append(
                [
                    grid.name,
                    None if alpha is None else f"{alpha}",
                    label,
                    f"{mean:.2f}" + (f" \u00b1 {reach:.2f}" if reach else ""),
                    *cells,
                ]
            )
    columns = ["network and data", "alpha", "embedding", "accuracy (%)", "minus BP", "minus one-hot", "p"]
    note = (
        "Accuracy after the last epoch: the mean over seeds, and the reach of the 95 % interval of its gain over each seed's own "
        f"baseline. p: of the paired t test against one-hot, corrected for {tested} comparisons."
    )
    return Section(
        "Figure 5: embeddings of the label, last layer only",
        "Only the last layer is trained, so that no reconstruction takes part: the wanted output is the label's embedding itself. "
        + " ".join(filter(None, dict.fromkeys(_reduced(grid.rows) for grid in grids))),
        tables=[Table("Embeddings of the label", columns, lines, note)],
        figures=[embeddings(grids)] if draw else [],
        reading=(PANELS if draw else "")
        + "The paper's claim is that the nearest and the maximum embedding outperform one-hot "
        f"coding. Of {tested} comparisons, {_verdict(list(corrected.values()))}.",
    )


def _by_alpha(grid: Grid) -> dict[float, dict[str, dict[int, float]]]:
    """Accuracies after the last epoch by alpha, embedding and seed."""
    found: dict[float, dict[str, dict[int, float]]] = {}
    for way in grid.fr:
        alpha, name = option(way, "alpha"), option(way, "embedding")
        found.setdefault(alpha, {})[name] = way.groups[0].by_seed(way.last)
    return found


# --- Figure 6 ---------------------------------------------------------------------------------------------------------


def _figure6(rows: Sequence[Row], draw: bool) -> Section:
    settings = rows[0]["settings"]
    bp = by_stage([row for row in rows if row["settings"]["method"] == "bp"])
    tables, figures, verdicts = [], [], []
    for same in _grouped([row for row in rows if row["settings"]["method"] == "fr"], *FR_OPTIONS):
        fr = by_stage(same)
        last = max(epoch for group in fr.values() for epoch in group.epochs())
        epochs = sorted({epoch for epoch in PUBLISHED_EPOCHS if epoch <= last} | {last})
        figures += [stage_boxes(bp, fr, epochs)] if draw else []
        table, verdict = _stage_comparison(bp, fr, epochs)
        tables.append(table)
        verdicts.append(verdict)
    seeds = len({row["settings"]["seed"] for row in rows})
    return Section(
        f"Figure 6: {settings['network']} on {settings['data']}, post-trained at every stage of its training",
        f"One network, kept after every epoch of its training. At each stage the layers after {settings['start']} up to "
        f"{settings['stop']} are trained by BP and by FR, with {seeds} seed{'s' if seeds > 1 else ''} of the shuffling. "
        f"{_reduced(rows)}",
        tables=tables,
        figures=figures,
        reading=(BOXES if draw else "")
        + "The paper's claims are that BP is ahead while the network underfits, that FR is ahead "
        f"once it converges, and that there one epoch of FR is best. {' '.join(verdicts)}",
    )


FR_OPTIONS = ("alpha", "embedding", "strategy", "rules", "damping", "margin")


def _stage_comparison(bp: Stages, fr: Stages, epochs: Sequence[int]) -> tuple[Table, str]:
    """FR minus BP after its last epoch by stage and epoch of FR; and what that says of the paper's claims."""
    stages = [stage for stage in fr if stage in bp]
    pairs = [compare(fr[s].by_seed(e), bp[s].by_seed(bp[s].epochs()[-1])) for s in stages for e in epochs]
    found = dict(zip([(s, e) for s in stages for e in epochs], correct(pairs), strict=True))
    lines: list[list[Cell]] = [
        [
            f"{s}",
            f"{100 * statistics.fmean(run['baseline_accuracy'] for run in fr[s].runs):.2f}",
            f"{statistics.fmean(bp[s].accuracies(bp[s].epochs()[-1])):.2f}",
            *(with_interval(found[s, e], 2) for e in epochs),
        ]
        for s in stages
    ]
    table = Table(
        "FR minus BP by stage (points of test accuracy)",
        ["stage", "before (%)", "BP (%)", *(f"FR after {e} minus BP" for e in epochs)],
        lines,
        "Means over seeds, with the 95 % interval of the paired difference.",
    )
    third = max(1, len(stages) // 3)
    parts = [("first", stages[:third]), ("middle", stages[third:-third]), ("last", stages[-third:])]
    says = []
    for epoch in epochs:
        shown = [found[s, epoch] for s in stages if found[s, epoch].shown]
        ahead = sum((pair.mean or 0) > 0 for pair in shown)
        means = ", ".join(
            f"{signed(statistics.fmean(found[s, epoch].mean or 0.0 for s in part), 2)} in the {name} third"
            for name, part in parts
            if part
        )
        says.append(
            f"FR after {epoch} epoch{'s' if epoch > 1 else ''} minus BP: {means}; ahead in {ahead} and behind in "
            f"{len(shown) - ahead} of {len(stages)} stages (corrected p < 0.05)."
        )
    late = {e: statistics.fmean(found[s, e].mean or 0.0 for s in parts[-1][1]) for e in epochs} if stages else {}
    best = max(late, key=lambda epoch: late[epoch], default=0)
    if late:
        lead = (
            "BP is best of all" if late[best] < 0 else f"FR after {best} epoch{'s' if best > 1 else ''} is best of all"
        )
        says.append(f"In the last third, {lead} by the means.")
    return table, " ".join(says)


# --- Figure 7 ---------------------------------------------------------------------------------------------------------


def _is_reversed(one: Grid, other: Grid) -> bool:
    """Whether ``one`` is the network of ``other`` with its channels reversed, and everything else is the same."""
    a, b = one.rows[0]["settings"], other.rows[0]["settings"]
    same = all(a.get(name) == b.get(name) for name in STUDY if name != "network")
    return same and a["network"] == f"{b['network']}-reversed" and bool(_shared_ways(other, one))


def _shared_ways(a: Grid, b: Grid) -> list[tuple[Way, Way]]:
    """The ways of FR that both networks were trained in."""
    return [(x, y) for x in a.fr for y in b.fr if options_of(x) == options_of(y)] if a.bp and b.bp else []


def _figure7(a: Grid, b: Grid, draw: bool) -> Section:
    figures, tables, verdicts = [], [], []
    for in_a, in_b in _shared_ways(a, b):
        found = [(f"({x}) {grid.name}", grid.against_bp(way)) for x, grid, way in (("a", a, in_a), ("b", b, in_b))]
        if not all(found):
            continue
        panels = {name: {str(layers): pair for layers, pair in pairs.items()} for name, pairs in found}
        if draw:
            figure = difference_dots(panels, ("FR", METHOD_COLOURS["fr"]), ("BP", METHOD_COLOURS["bp"]))
            figure.set_label(f"{in_a.label} against BP for two networks. {figure.get_label()}")
            figures.append(figure)
        layers = list(dict.fromkeys(cell for _, pairs in found for cell in pairs))
        tables.append(
            Table(
                f"{in_a.label} minus BP after the last epoch (points of test accuracy)",
                ["layers trained", *(name for name, _ in found)],
                [[str(cell), *(with_interval(pairs.get(cell), 2) for _, pairs in found)] for cell in layers],
                "Means over seeds, with the 95 % interval of the paired difference.",
            )
        )
        verdicts.append(_growing_or_shrinking((a, in_a), (b, in_b)))
    return Section(
        f"Figure 7: {a.name}, channels as published and reversed",
        f"The same modules of two networks that differ in the order of their channels: (a) they grow towards the output, (b) they "
        f"shrink. {_reduced(a.rows)}",
        tables=tables,
        figures=figures,
        reading="The paper's claim is that FR improves over BP more in (b), where every step back has an exact solution. "
        + " ".join(verdicts),
    )


def _growing_or_shrinking(a: tuple[Grid, Way], b: tuple[Grid, Way]) -> str:
    """Whether FR gains more over BP in b than in a: the mean over the cells that both have, compared over seeds."""
    pairs = [grid.against_bp(way) for grid, way in (a, b)]
    shared = [layers for layers in pairs[0] if layers in pairs[1]]
    gains = [_gain(grid, way, shared) for grid, way in (a, b)]
    parts = []
    for name, found in zip("ab", pairs, strict=True):
        shown = [pair for pair in found.values() if pair.shown]
        ahead = sum((pair.mean or 0) > 0 for pair in shown)
        mean = signed(statistics.fmean(pair.mean or 0.0 for pair in found.values()), 2)
        parts.append(
            f"in ({name}) {mean} points on average, ahead in {ahead} and behind in {len(shown) - ahead} of {len(found)}"
        )
    difference = compare(gains[1], gains[0])
    if difference.p is None:
        verdict = "not tested, for want of seeds"
    else:
        verdict = (
            "not shown" if difference.p >= LEVEL else "confirmed" if (difference.mean or 0) > 0 else "contradicted"
        )
    return (
        f"{a[1].label} minus BP is {' cells; '.join(parts)} cells (corrected p < 0.05). (b) minus (a), mean over "
        f"{len(shared)} cells: {with_interval(difference, 2) or 'no seed in common'}, p {p_value(difference.p) or 'not known'}. "
        f"The claim is {verdict}."
    )


def _gain(grid: Grid, way: Way, cells: Sequence[Layers]) -> dict[int, float]:
    """FR minus BP after the last epoch by seed, mean over the cells, of the seeds that have all of them."""
    assert grid.bp is not None
    each = []
    for layers in cells:
        fr, bp = way.cells[layers].by_seed(way.last), grid.bp.cells[layers].by_seed(grid.bp.last)
        each.append({seed: fr[seed] - bp[seed] for seed in fr if seed in bp})
    seeds = set.intersection(*(set(one) for one in each)) if each else set()
    return {seed: statistics.fmean(one[seed] for one in each) for seed in seeds}


# --- all of them ------------------------------------------------------------------------------------------------------


def _grouped(rows: Sequence[Row], *names: str) -> list[list[Row]]:
    """Rows that agree in these settings, in the order in which they first come; numbers in increasing order."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: [row["settings"].get("stage", 0), row["settings"].get("seed", 0)]):
        groups.setdefault(json.dumps([row["settings"].get(name) for name in names]), []).append(row)
    return list(groups.values())


def _reduced(rows: Sequence[Row]) -> str:
    said = dict.fromkeys(row["settings"].get("reduced", "") for row in rows)
    return "".join(f"Reduced: {text.rstrip('.')}." for text in said if text)


def _verdict(pairs: Sequence[Paired]) -> str:
    shown = [(pair.mean or 0.0) > 0 for pair in pairs if pair.shown]
    better, worse = sum(shown), len(shown) - sum(shown)
    if better and worse:
        says = "holds in some cases and fails in others"
    elif shown:
        says = ("is confirmed" if better else "is contradicted") + (" in part" if len(shown) < len(pairs) else "")
    else:
        says = "is not shown"
    return f"{better} show a difference in its favour and {worse} against it (corrected p < 0.05): the claim {says}"
