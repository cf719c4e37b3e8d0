"""Finished runs as tables, for a terminal, a Markdown file or a page."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import rich.table
import rich.text

from revprop.report.aggregation import Row, RunGroup, group_runs, summarise_diagnosis, three_digits
from revprop.report.published import PUBLISHED_EPOCHS

Cell = str | float | None


@dataclass(frozen=True)
class Table:
    """A table to be read, in any of three forms.

    Args:
        title: what it shows.
        columns: the heads of the columns, with units.
        rows: one list of cells per line. Texts are shown as they are, whole numbers with separators, other numbers
            with four significant digits, None as a dash.
        note: what a reader must know beside it, below it.
        bold: (line, column) of the cells to stress, counted from 0.

    Raises:
        ValueError: a line has more or fewer cells than there are columns.

    Example:
        >>> print(Table("Sizes", ["layer", "parameters"], [["conv1", 380], ["fc1", 30848]]).to_markdown())
        **Sizes**
        <BLANKLINE>
        | layer | parameters |
        |:---|---:|
        | conv1 | 380 |
        | fc1 | 30,848 |
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    bold: Collection[tuple[int, int]] = field(default=frozenset())

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"line {number} of {self.title!r} has {len(row)} cells for {len(self.columns)} columns"
                )

    def to_markdown(self) -> str:
        """Write the table in GitHub's Markdown: the title in bold, the lines, the note.

        Returns:
            The text, without a line break at its end.

        Example:
            >>> print(Table("T", ["a"], [["x|y"]], note="n", bold={(0, 0)}).to_markdown().splitlines()[-3])
            | **x\\|y** |
        """

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

        body = [
            line([f"**{_shown(cell)}**" if (i, j) in self.bold else _shown(cell) for j, cell in enumerate(row)])
            for i, row in enumerate(self.rows)
        ]
        ruler = "|" + "|".join("---:" if self._is_numeric(j) else ":---" for j in range(len(self.columns))) + "|"
        lines = [f"**{self.title}**", "", line(self.columns), ruler, *body]
        return "\n".join([*lines, "", self.note] if self.note else lines)

    def to_html(self) -> str:
        """Write the table as an HTML element, between its title and its note.

        Returns:
            A `<figure>` element; every text in it is escaped.

        Example:
            >>> print(Table("T", ["a", "b"], [["<x>", 1024]], bold={(0, 1)}).to_html().splitlines()[6])
            <tr><th scope="row">&lt;x&gt;</th><td class="number"><strong>1,024</strong></td></tr>
        """

        number = ' class="number"'

        def cell(i: int, j: int, value: Cell) -> str:
            text = html.escape(_shown(value))
            text = f"<strong>{text}</strong>" if (i, j) in self.bold else text
            if j == 0:
                return f'<th scope="row">{text}</th>'
            return f"<td{number}>{text}</td>" if self._is_numeric(j) else f"<td>{text}</td>"

        heads = "".join(
            f'<th scope="col"{number if j and self._is_numeric(j) else ""}>{html.escape(column)}</th>'
            for j, column in enumerate(self.columns)
        )
        lines = "\n".join(
            f"<tr>{''.join(cell(i, j, value) for j, value in enumerate(row))}</tr>" for i, row in enumerate(self.rows)
        )
        note = f'\n<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        title = html.escape(self.title)
        # The table alone scrolls on a narrow screen: its title and note are read without.
        return (
            f'<figure class="table">\n<figcaption>{title}</figcaption>\n'
            f'<div class="scroll" role="region" aria-label="{title}" tabindex="0">\n'
            f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>\n</div>{note}\n</figure>"
        )

    def to_rich(self) -> rich.table.Table:
        """Make the table for a terminal.

        Returns:
            A table of the library rich, to be printed on its console.

        Example:
            >>> Table("T", ["layer", "n"], [["conv1", 3]]).to_rich().row_count
            1
        """
        note = rich.text.Text(self.note) if self.note else None
        title = rich.text.Text(self.title)
        table = rich.table.Table(title=title, caption=note, title_justify="left", caption_justify="left")
        for j, column in enumerate(self.columns):
            table.add_column(rich.text.Text(column), justify="right" if self._is_numeric(j) else "left")
        for i, row in enumerate(self.rows):
            # Text, not str: a bracket in a string would be taken for markup.
            cells = [rich.text.Text(_shown(cell), "bold" if (i, j) in self.bold else "") for j, cell in enumerate(row)]
            table.add_row(*cells)
        return table

    def _is_numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(not isinstance(cell, str) or re.match(r"[-\u2212]?\d", cell) for cell in cells)


def post_training_table(
    rows: Sequence[Row],
    epochs: Sequence[int] = PUBLISHED_EPOCHS,
    published: Mapping[tuple[str, int, int], Sequence[float]] | None = None,
) -> Table:
    """Tabulate post-training runs as the paper's Tables 1 to 6 do.

    Args:
        rows: finished post-training runs, all of one network on one data set.
        epochs: after which epochs to give the test accuracy.
        published: by (method, l_start, l_stop), published mean accuracies in percent after 1, 5 and 10 epochs, to be
            shown beside ours.

    Returns:
        One line per method and layers trained (and other settings, where these differ): trained parameters, peak
        memory in MB (of 10^6 bytes; the largest of the runs), test accuracy in percent, as mean and sample standard
        deviation where there are several seeds. The best value of each accuracy column is bold.

    Raises:
        ValueError: as :func:`group_runs` does.

    Example:
        >>> run = {"settings": {"method": "fr", "seed": 0}, "l_start": 0, "l_stop": 1, "parameters": 52,
        ...        "peak_memory_bytes": 8_000_000, "baseline_accuracy": 0.9762,
        ...        "history": [{"epoch": 1, "accuracy": 0.98}]}
        >>> table = post_training_table([run], epochs=(1,), published={("fr", 0, 1): (97.682, 97.688, 97.692)})
        >>> table.columns
        ['trained', 'parameters', 'peak memory (MB)', 'epoch 1 (%)', 'epoch 1, published (%)']
        >>> table.rows
        [['FR (0, 1)', 52, '8.00', '98.00', '97.68']]
    """
    groups = group_runs(rows)
    theirs = {(method.lower(), start, stop): values for (method, start, stop), values in (published or {}).items()}
    columns = ["trained", "parameters", "peak memory (MB)"]
    lines: list[list[Cell]] = [[group.label, group.runs[0]["parameters"], _peak_memory(group)] for group in groups]
    bold: set[tuple[int, int]] = set()

    def add(head: str, means: list[float | None], texts: list[str | None]) -> None:
        # By what is printed: of two equal numbers, one bold and one not, a reader would think that one is wrong.
        printed = [None if mean is None else round(mean, 2) for mean in means]
        best = max((mean for mean in printed if mean is not None), default=None)
        bold.update((i, len(columns)) for i, mean in enumerate(printed) if mean is not None and mean == best)
        columns.append(head)
        for line, text in zip(lines, texts, strict=True):
            line.append(text)

    for epoch in epochs:
        found = [group.accuracies(epoch) for group in groups]
        add(
            f"epoch {epoch} (%)",
            [_mean(values) for values in found],
            [_printed(*pair) for pair in zip(found, groups, strict=True)],
        )
        if theirs and epoch in PUBLISHED_EPOCHS:
            column = PUBLISHED_EPOCHS.index(epoch)
            values = [theirs.get((group.method, group.l_start, group.l_stop)) for group in groups]
            means = [None if value is None else float(value[column]) for value in values]
            add(f"epoch {epoch}, published (%)", means, [None if mean is None else f"{mean:.2f}" for mean in means])

    settings = rows[0]["settings"]
    about = " on ".join(str(settings[key]) for key in ("network", "data") if settings.get(key))
    title = f"Post-training {about}" if about else "Post-training"
    return Table(f"{title}: test accuracy", columns, lines, _note(groups, bool(theirs)), frozenset(bold))


def diagnosis_table(diagnosis: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate by layer how far features are from the wanted ones, and whether the wanted ones do what they are for.

    Args:
        diagnosis: per layer `layer`, `deviation`, `reached` and optionally `active`, as :func:`summarise_diagnosis`
            takes them.

    Returns:
        One line per layer: mean relative deviation over the samples that the network gets wrong and over all, share of
        samples whose wanted features, run forward, give the label.

    Raises:
        ValueError: as :func:`summarise_diagnosis` does.

    Example:
        >>> entry = {"layer": "fc1", "deviation": [0.5, 0, 0, 0], "reached": [1, 1, 1, 0], "active": [1, 0, 0, 0]}
        >>> diagnosis_table([entry]).rows
        [['fc1', '0.500', '0.125', '75.0']]
    """
    summaries = summarise_diagnosis(diagnosis)
    wrong = [np.asarray(entry["active"], dtype=bool) for entry in diagnosis if entry.get("active") is not None]
    count = f" ({wrong[0].sum():,} of {wrong[0].size:,} are wrong)" if wrong else ""
    return Table(
        "Where the features depart from the wanted ones",
        ["layer", "deviation, wrong samples", "deviation, all samples", "label reached (%)"],
        [
            [
                summary.layer,
                None if summary.deviation_wrong is None else three_digits(summary.deviation_wrong),
                three_digits(summary.deviation),
                None if summary.reached is None else f"{100 * summary.reached:.1f}",
            ]
            for summary in summaries
        ],
        "Deviation: |wanted - recorded| / |recorded|, mean over samples"
        f"{count}. Label reached: share of samples whose wanted features, run forward from that layer, give the label.",
    )


def _shown(cell: Cell) -> str:
    if cell is None:
        return "\u2013"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, (int, np.integer)):
        return f"{int(cell):,}"
    return f"{cell:,.0f}" if 1e4 <= abs(cell) < 1e9 else f"{cell:.4g}"


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _printed(values: Sequence[float], group: RunGroup) -> str | None:
    if not values:
        return None
    spread = f" \u00b1 {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    count = f" ({len(values)} of {len(group.runs)})" if len(values) < len(group.runs) else ""
    return f"{statistics.fmean(values):.2f}{spread}{count}"


def _peak_memory(group: RunGroup) -> str | None:
    peaks = [run["peak_memory_bytes"] for run in group.runs if run.get("peak_memory_bytes") is not None]
    return three_digits(max(peaks) / 1e6) if peaks else None


PUBLISHED_RUNS = 10  # of each cell of FR-PT's Tables 1 to 6


def _note(groups: Sequence[RunGroup], with_published: bool) -> str:
    runs = [run for group in groups for run in group.runs]
    sizes = sorted({len(group.runs) for group in groups})
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    parts = [f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {each} a line."]
    if sizes[-1] > 1:
        parts.append("\u00b1 is the sample standard deviation over the seeds of a line.")
    baseline = 100 * statistics.fmean(run["baseline_accuracy"] for run in runs)
    parts.append(f"Baseline accuracy (mean): {baseline:.2f} %.")
    reductions: dict[str, int] = {}
    for run in runs:
        if run["settings"].get("reduced"):
            reductions[run["settings"]["reduced"]] = reductions.get(run["settings"]["reduced"], 0) + 1
    for text, count in reductions.items():
        parts.append(f"Reduced ({'all' if count == len(runs) else count} of the runs): {text.rstrip('.')}.")
    if with_published:
        parts.append("Published: the means of 10 runs a line that the paper prints, from a baseline of its own.")
        if sizes[0] < PUBLISHED_RUNS:
            parts.append(f"Reduced: {each} of the paper's {PUBLISHED_RUNS} runs a line.")
    return " ".join(parts)
