"""Racecar training: the two-phase study's rows beside the paper's Tables 1 to 5."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence

from revprop.report.aggregation import Row
from revprop.report.comparison import Paired, compare, correct
from revprop.report.information_figures import information_planes
from revprop.report.numerals import mean_and_spread, p_value, signed, with_interval
from revprop.report.page import Section
from revprop.report.published import PUBLISHED_RACECAR
from revprop.report.racecar_figures import accuracy_chart, regenerated_inputs
from revprop.report.tables import Cell, Table

__all__ = ["racecar_sections"]

SHARED = ("experiment", "network", "reduced")
TITLES = {
    "bits": ("the 12-bit task", {"A": "Table 1", "AA": "Table 1", "AB": "Table 2", "B": "Table 2"}),
    "mnist": ("MNIST", {"A": "Table 3", "AA": "Table 3", "AB": "Table 4", "B": "Table 4"}),
    "cifar": ("CIFAR", dict.fromkeys(("A", "AA", "AB", "B"), "Table 5")),
}
PHASES = ("A", "AA", "AB", "B")
ORDER = ("Std", "Ort", "RR1", "RR")  # others, such as RR on a share, behind these
PLANES = {"A": "Figure 2", "AA": "Figure 3", "AB": "Figure 4", "B": "Figure 4"}

Runs = dict[tuple[str, str], list[Row]]  # by way and phase


def racecar_sections(rows: Sequence[Row], draw: bool = True) -> list[Section]:
    """Make a section of the rows of each experiment: accuracies beside the published ones, paired comparisons, figures.

    Args:
        rows: finished runs of any kind; others than "racecar" are left alone. draw: whether to draw the figures.

    >>> racecar_sections([])
    []
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["settings"].get("kind") == "racecar":
            shared = json.dumps([row["settings"].get(name) for name in SHARED])
            groups.setdefault(shared, []).append(row)
    return [_section(group, draw) for group in groups.values()]


def _section(rows: Sequence[Row], draw: bool) -> Section:
    settings = rows[0]["settings"]
    experiment = settings["experiment"]
    title, numbers = TITLES[experiment]
    runs = _by_way_and_phase(rows)
    there = list(dict.fromkeys(numbers[phase] for phase in PHASES if any(phase == found for _, found in runs)))
    sources = {row["settings"]["data"] for row in rows if row["settings"]["phase"] in ("A", "AA")}
    targets = {row["settings"]["data"] for row in rows if row["settings"]["phase"] in ("AB", "B")}
    tasks = [f"task {name}: {', '.join(sorted(found))}" for name, found in (("A", sources), ("B", targets)) if found]
    families = _comparisons(experiment, runs)
    seeds = sorted({row["settings"]["seed"] for row in rows})
    figures = []
    if draw:
        named = {_name(way, phase): [100 * row["accuracy"] for row in found] for (way, phase), found in runs.items()}
        published = {_name(way, phase): _published(experiment, way, phase) for way, phase in runs}
        figures.append(accuracy_chart(named, published, f"Accuracy, {title}"))
        pictures = {
            _name(way, phase): row for (way, phase), found in runs.items() for row in found if "pictures" in row
        }
        figures += [regenerated_inputs(pictures, f"Regenerated inputs, {title}")] if pictures else []
        for phase in PHASES:
            planes = {
                _name(way, phase): found[0]["information"]  # of the first seed
                for (way, of), found in runs.items()
                if of == phase and found[0].get("information")
            }
            if planes:
                figures.append(information_planes(planes))
                figures[-1].set_label(f"{PLANES[phase]}, phase {phase}: {figures[-1].get_label()}")
    return Section(
        f"Racecar training, {title}: {' and '.join(there)}",
        f"Phase I (A) trains {settings['network']} with its way's penalty: none (Std), SRIP (Ort), the whole reverse pass (RR) "
        "or the whole reverse pass of which only the regenerated input counts (RR1). Phase II goes on without it, for task A (AA) "
        f"or B (AB); Std_B is task B from scratch. {'; '.join(tasks)}. {len(seeds)} seed{'s' if len(seeds) > 1 else ''}."
        + (f" Not as published: {settings['reduced']}." if settings["reduced"] else ""),
        tables=[_accuracies(experiment, runs), *([_differences(experiment, families)] if families else [])],
        figures=figures,
        reading=_verdict(families),
    )


def _by_way_and_phase(rows: Sequence[Row]) -> Runs:
    found: Runs = {}
    ways = sorted(
        {row["settings"]["way"] for row in rows},
        key=lambda way: (ORDER.index(way) if way in ORDER else len(ORDER), way),
    )
    for phase in PHASES:
        for way in ways:
            same = [row for row in rows if (row["settings"]["way"], row["settings"]["phase"]) == (way, phase)]
            if same:
                found[way, phase] = sorted(same, key=lambda row: int(row["settings"]["seed"]))
    return found


def _name(way: str, phase: str) -> str:
    """
    >>> _name("RR", "AB"), _name("RR, share 0.25", "A")
    ('RR_AB', 'RR_A, share 0.25')
    """
    first, comma, rest = way.partition(",")
    return f"{first}_{phase}{comma}{rest}"


def _published(experiment: str, way: str, phase: str) -> tuple[float, ...]:
    return PUBLISHED_RACECAR.get((experiment, way, phase), ())


def _accuracies(experiment: str, runs: Runs) -> Table:
    columns = ["training", "runs", "accuracy (%)", "published (%)", "input given back within (%)", "seconds a run"]
    lines: list[list[Cell]] = []
    for (way, phase), rows in runs.items():
        errors = [100 * row["error"] for row in rows if row["error"] is not None]
        lines.append(
            [
                _name(way, phase),
                len(rows),
                mean_and_spread([100 * row["accuracy"] for row in rows]),
                mean_and_spread(_published(experiment, way, phase)),
                mean_and_spread(errors, 1),
                f"{statistics.fmean(row['seconds'] for row in rows):.1f}",
            ]
        )
    note = (
        "Test accuracy after the last epoch, mean and standard deviation over the runs; published: over five. Input given back: "
        "|I' - I| / |I| over 1,000 test inputs (all where there are fewer), I' from the network's own reverse pass; 100 % is no "
        "better than nothing. Seconds: training alone, of one core."
    )
    numbers = TITLES[experiment][1]
    shown = dict.fromkeys(numbers[phase] for _, phase in runs)
    return Table(f"{' and '.join(shown)}: accuracy in both phases", columns, lines, note)


def _comparisons(experiment: str, runs: Runs) -> list[tuple[str, str, Paired, float | None]]:
    """The paper's claims: RR against the others in phase II, and against task B from scratch; a share against the whole."""
    pairs: list[tuple[tuple[str, str], tuple[str, str]]] = []
    ways = list(dict.fromkeys(way for way, _ in runs))
    for way in [way for way in ways if way == "RR" or way.startswith("RR,")]:
        for phase in ("AA", "AB"):
            others = [other for other in ways if other in ("Std", "Ort", "RR1")] + (["RR"] if way != "RR" else [])
            pairs += [((way, phase), (other, phase)) for other in others]
        pairs.append(((way, "AB"), ("Std", "B")))
    found = []
    for first, second in pairs:
        if first in runs and second in runs:
            found.append((first, second, compare(_by_seed(runs[first]), _by_seed(runs[second]))))
    corrected = correct([paired for *_, paired in found])
    return [
        (_name(*first), _name(*second), paired, _published_difference(experiment, first, second))
        for (first, second, _), paired in zip(found, corrected, strict=True)
    ]


def _by_seed(rows: Sequence[Row]) -> Mapping[int, float]:
    return {int(row["settings"]["seed"]): 100 * float(row["accuracy"]) for row in rows}


def _published_difference(experiment: str, first: tuple[str, str], second: tuple[str, str]) -> float | None:
    ours, theirs = _published(experiment, *first), _published(experiment, *second)
    return statistics.fmean(ours) - statistics.fmean(theirs) if ours and theirs else None


def _differences(experiment: str, families: Sequence[tuple[str, str, Paired, float | None]]) -> Table:
    columns = [
        "first - second",
        "seeds",
        "difference [95 % interval] (points)",
        "p, corrected",
        "published (points)",
        "verdict",
    ]
    lines: list[list[Cell]] = [
        [
            f"{first} - {second}",
            paired.seeds,
            with_interval(paired, 2),
            p_value(paired.corrected),
            signed(published, 2),
            paired.verdict(first, second),
        ]
        for first, second, paired, published in families
    ]
    note = (
        "Paired by seed: both sides begin with the same parameters, data and order of samples. Two-sided paired t test, Holm's "
        "correction over the lines. Published: the difference of the two means."
    )
    return Table(f"Differences, {TITLES[experiment][0]}", columns, lines, note)


def _verdict(families: Sequence[tuple[str, str, Paired, float | None]]) -> str:
    claims = [f"{first} against {second}: {paired.verdict(first, second)}." for first, second, paired, _ in families]
    return (
        "The paper's claim is that RR is best in phase II, for both tasks, and above task B from scratch. "
        + " ".join(claims)
    )
