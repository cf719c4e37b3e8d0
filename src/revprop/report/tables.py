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
from revprop.report.numerals import mean_and_spread
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

        number, short = ' class="number"', ' class="short"'

        def cell(i: int, j: int, value: Cell) -> str:
            text = html.escape(_shown(value))
            text = f"<strong>{text}</strong>" if (i, j) in self.bold else text
            if j == 0:
                return f'<th scope="row">{text}</th>'
            return f"<td{number if self._is_numeric(j) else short if len(text) < 30 else ''}>{text}</td>"

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
        return bool(cells) and all(not isinstance(cell, str) or re.match(r"(< )?[-+\u2212]?\d", cell) for cell in cells)


def post_training_table(rows: Sequence[Row], epochs: Sequence[int] | None = None, step: str = "epoch") -> Table:
    """Tabulate post-training runs as the paper's Tables 1 to 6 do.

    Args:
        rows: finished post-training runs, all of one network on one data set.
        epochs: after which epochs to give the test accuracy; None for the published ones, 1, 5 and 10.
        step: what the entries of the history are: "epoch", or "sweep" of the closed form.

    Returns:
        One line per method and layers trained (and other settings, where these differ): trained parameters, peak
        memory in MB (of 10^6 bytes; the largest of the runs), seconds of a run (mean), test accuracy in percent, as
        mean and sample standard deviation where there are several seeds. Nothing is bold: the highest of many means
        is no finding.

    Raises:
        ValueError: as :func:`group_runs` does.

    Example:
        >>> run = {"settings": {"method": "fr", "seed": 0}, "l_start": 0, "l_stop": 1, "parameters": 52,
        ...        "peak_memory_bytes": 8_000_000, "baseline_accuracy": 0.9762, "seconds": 2.0, "target_seconds": 0.5,
        ...        "history": [{"epoch": 1, "accuracy": 0.98}]}
        >>> table = post_training_table([run], epochs=(1,))
        >>> table.columns
        ['trained', 'parameters', 'peak memory (MB)', 'seconds', 'epoch 1 (%)']
        >>> table.rows
        [['FR (0, 1)', 52, '8.00', '2.50', '98.00']]
    """
    groups = group_runs(rows)
    epochs = PUBLISHED_EPOCHS if epochs is None else epochs
    lines: list[list[Cell]] = []
    for group in groups:
        memory, seconds = list(group.peak_memory().values()), group.seconds()
        found = [group.accuracies(epoch) for epoch in epochs]
        lines.append(
            [
                group.label,
                group.runs[0]["parameters"],
                three_digits(max(memory)) if memory else None,
                three_digits(statistics.fmean(seconds)) if seconds else None,
                *(_printed(values, group) for values in found),
            ]
        )
    settings = rows[0]["settings"]
    about = " on ".join(str(settings[key]) for key in ("network", "data") if settings.get(key))
    title = f"Post-training {about}" if about else "Post-training"
    columns = ["trained", "parameters", "peak memory (MB)", "seconds", *(f"{step} {epoch} (%)" for epoch in epochs)]
    measured = "accuracy on held-out training images" if settings.get("holdout") else "test accuracy"
    return Table(f"{title}: {measured}", columns, lines, _note(groups))


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


def _printed(values: Sequence[float], group: RunGroup) -> str | None:
    text = mean_and_spread(values)
    return f"{text} ({len(values)} of {len(group.runs)})" if text and len(values) < len(group.runs) else text


def _note(groups: Sequence[RunGroup]) -> str:
    runs = [run for group in groups for run in group.runs]
    sizes = sorted({len(group.runs) for group in groups})
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    parts = [f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {each} a line."]
    if sizes[-1] > 1:
        parts.append("\u00b1 is the sample standard deviation over the seeds of a line.")
    baseline = 100 * statistics.fmean(run["baseline_accuracy"] for run in runs)
    parts.append(f"Baseline accuracy (mean): {baseline:.2f} %.")
    if any(run.get("seconds") is not None for run in runs):
        parts.append("Seconds: of one whole run, wanted features included.")
    parts += reductions(runs)
    return " ".join(parts)


def reductions(runs: Sequence[Row]) -> list[str]:
    """Say what reduced runs reduce.

    Args:
        runs: finished runs.

    Returns:
        One sentence for each reduction that any of the runs names.

    Example:
        >>> reductions([{"settings": {"reduced": "2 of 10 runs"}}, {"settings": {}}])
        ['Reduced (1 of the runs): 2 of 10 runs.']
    """
    counts: dict[str, int] = {}
    for run in runs:
        if run["settings"].get("reduced"):
            counts[run["settings"]["reduced"]] = counts.get(run["settings"]["reduced"], 0) + 1
    return [
        f"Reduced ({'all' if count == len(runs) else count} of the runs): {text.rstrip('.')}."
        for text, count in counts.items()
    ]
