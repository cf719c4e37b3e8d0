"""One page from the rows of a folder: what ``revprop report`` writes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from revprop.report import study_figures
from revprop.report.adjoint_sections import adjoint_sections
from revprop.report.alignment_sections import alignment_sections
from revprop.report.figures import deviation_bars, discrepancy_maps, figure_to_svg
from revprop.report.grid import Grid, split_by_study
from revprop.report.page import Section, write_page
from revprop.report.post_training_sections import accuracy_tables, post_training_sections
from revprop.report.racecar_sections import racecar_sections
from revprop.report.smoke_sections import smoke_sections
from revprop.report.stylisation_sections import stylisation_sections
from revprop.report.tables import Table, diagnosis_table
from revprop.report.verdict import headline
from revprop.runs import RunStore, write_atomically

__all__ = ["reconstruction_table", "study_tables", "write_figures", "write_markdown", "write_report"]

Row = Mapping[str, Any]

REPAIRED = (
    "revprop asks what each layer of a trained network should have produced for the right label, shows how far its "
    "features are from that, and trains single modules towards it."
)
EXPLAINED = (
    "revprop finds the linear functional on the input and the biases that a unit of a trained network is, exactly."
)
REGULARISED = (
    "revprop trains a network with its own reverse pass, so that its features keep the input, and shows what that does to what it "
    "learns next."
)

ALIGNED = "revprop trains encoders that are their own decoders: what they say is given back by a step down their own gradient."


def write_report(
    folder: Path,
    path: Path | None = None,
    title: str = "Running a network backwards",
    rows: Sequence[Row] | None = None,
) -> Path:
    """Writes one self-contained page of everything a folder of runs holds, or of some of its rows.

    Args:
        folder: where ``rows`` and ``baselines`` are. path: the page; ``report.html`` in the folder where not given.
        rows: those to report; all where not given.

    Returns:
        the page's path.

    Raises:
        ValueError: the folder holds no finished run.
    """
    rows = RunStore(folder / "rows").rows() if rows is None else rows
    if not rows:
        raise ValueError(
            f"no finished run in {folder / 'rows'}: run revprop demo, diagnose, post-train or reproduce first"
        )
    reported = {(row["settings"].get("network"), row["settings"].get("data")) for row in rows}
    baselines = [
        row
        for row in RunStore(folder / "baselines").rows()
        if (row["settings"].get("network"), row["settings"].get("data")) in reported
    ]
    kinds = {row["settings"].get("kind") for row in rows}
    regularised, explained = kinds <= {"racecar", "smoke", "stylisation"}, kinds <= {"adjoint", "baseline"}
    lead = [REGULARISED if regularised else EXPLAINED if explained else REPAIRED]
    if all(str(kind).startswith("alignment") for kind in kinds):
        lead = [ALIGNED]
    tables = [study for study in split_by_study(rows) if not study[0]["settings"].get("study")]
    lead += [text for study in tables if (text := headline(Grid.of(study)))]
    return write_page(
        path or folder / "report.html",
        title,
        "\n\n".join(lead),
        [*_sections(rows, folder=folder), _provenance([*baselines, *rows])],
    )


def write_markdown(folders: Sequence[Path], path: Path, title: str = "Results") -> Path:
    """Writes what some folders of runs say, and their tables, as one Markdown page.

    Raises:
        ValueError: the folders hold no finished run.
    """
    blocks = [f"# {title}", "Written by `revprop report` from the rows of finished runs."]
    for folder in folders:
        rows = RunStore(folder / "rows").rows()
        for section in _sections(rows, draw=False):
            blocks += [f"## {section.heading}", *section.paragraphs]
            for table in section.tables:
                blocks.append(table.to_markdown().replace(f"**{table.title}**", f"### {table.title}", 1))
            if section.reading and section.tables:  # without figures, what explains figures alone says nothing
                blocks.append(f"> {section.reading}")
        if rows:
            blocks.append(_provenance(rows).tables[0].to_markdown())
    if len(blocks) == 2:
        raise ValueError(f"no finished run in {', '.join(str(f / 'rows') for f in folders)}")
    write_atomically(path, "\n\n".join(blocks) + "\n")
    return path


def write_figures(folder: Path, out: Path) -> list[Path]:
    """Writes every figure of a folder's report as an SVG file, for pages and papers.

    Raises:
        ValueError: the folder holds no finished run.
    """
    rows = RunStore(folder / "rows").rows()
    figures = [figure for section in _sections(rows, folder=folder) for figure in section.figures]
    if not figures:
        raise ValueError(f"no figure to draw from {folder / 'rows'}: run revprop demo, diagnose or post-train first")
    written = []
    for number, figure in enumerate(figures, start=1):
        name = re.sub(r"[^a-z0-9]+", "-", re.split(r"[,:(;]", str(figure.get_label()))[0].lower()).strip("-")[:40]
        path = out / f"{number}-{name}.svg"
        # on a white ground: a page that shows the file may be dark
        ground = r'\1<rect width="100%" height="100%" fill="white"/>'
        write_atomically(path, re.sub(r"(<svg[^>]*>)", ground, figure_to_svg(figure), count=1))
        written.append(path)
    return written


def study_tables(rows: Sequence[Row]) -> list[Table]:
    """The tables of some post-training rows for a terminal: per network and data set the accuracy of every cell, or the
    ablation; per figure of the paper its own.

    >>> study_tables([])
    []
    """
    cells = [
        table
        for study in split_by_study(rows)
        if not study[0]["settings"].get("study")
        for table in accuracy_tables(Grid.of(study))
    ]
    ablations = [
        table
        for section in post_training_sections(
            [row for row in rows if row["settings"].get("study") == "ablation"], False
        )
        for table in section.tables
    ]
    others = [*study_figures.sections(rows, False), *_of_methods(rows, False)]
    return [*cells, *ablations, *(table for section in others for table in section.tables)]


def reconstruction_table(rows: Sequence[Row]) -> Table:
    """Label reached (%) / relative deviation per layer, one line per way of reconstructing; ``rows`` of one network.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no reconstruction rows to tabulate")
    layers = [d["layer"] for d in rows[0]["layers"]]
    lines: list[list[str | float | None]] = []
    for row in rows:
        way = row["settings"]["way"]
        name = f"{way['strategy']}, {way['rules']} rules" + (
            f", damping {way['damping']:g}" if way["strategy"] == "greedy" and way["rules"] == "nearest" else ""
        )
        name += f", margin {way['margin']:g}" if way["margin"] else ""
        cells = {d["layer"]: f"{100 * d['reached']:.1f} / {d['deviation']:.4f}" for d in row["layers"]}
        lines.append(
            [row["settings"]["wanted"], name, *(cells.get(layer) for layer in layers), f"{row['seconds']:.1f}"]
        )
    settings = rows[0]["settings"]
    note = (
        f"Label reached in % / mean deviation |wanted - recorded| / |recorded| over all {settings['samples']} samples "
        f"({settings['split']} set); the network itself gets {100 * rows[0]['accuracy']:.1f} % of them right. A tie with the "
        "label counts as reached. Seconds for all layers, the check included."
    )
    return Table(
        f"Reconstructed features of {settings['network']} on {settings['data']}",
        ["labels wanted", "way", *layers, "seconds"],
        lines,
        note,
    )


def _sections(rows: Sequence[Row], draw: bool = True, folder: Path | None = None) -> list[Section]:
    """The sections of all kinds of rows; ``folder``: where pictures lie beside them."""
    found = [*_diagnoses(rows), *_reconstructions(rows), *post_training_sections(rows, draw)]
    return [*found, *study_figures.sections(rows, draw), *_of_methods(rows, draw, folder)]


def _of_methods(rows: Sequence[Row], draw: bool, folder: Path | None = None) -> list[Section]:
    """Those of explaining, of racecar training and of feature alignment."""
    racecar = (
        *racecar_sections(rows, draw),
        *smoke_sections(rows, draw, folder),
        *stylisation_sections(rows, draw, folder),
    )
    return [*adjoint_sections(rows, draw), *racecar, *alignment_sections(rows, draw)]


def _diagnoses(rows: Sequence[Row]) -> list[Section]:
    sections = []
    for row in rows:
        if row["settings"].get("kind") != "diagnosis":
            continue
        layers = [{**layer, "active": row["wrong"]} for layer in row["layers"]]
        name = f"{row['settings']['network']} on {row['settings']['data']}"
        maps = {
            layer["layer"]: np.asarray(layer["maps"])
            for layer in row["layers"]
            if np.asarray(layer["maps"]).ndim in (1, 3)
        }
        sections.append(
            Section(
                f"Where {name} departs from its labels",
                f"{100 * row['accuracy']:.2f} % of {row['samples']} samples are right. For every layer: the nearest "
                f"features that give the label ({row['settings']['way']['strategy']} strategy), and how far its own are from them.",
                tables=(diagnosis_table(layers),),
                figures=(deviation_bars(layers), *((discrepancy_maps(maps, "Mean over all samples"),) if maps else ())),
                reading="Samples the network gets right need no change, so the deviation over all samples is small; a layer whose "
                "wrong samples deviate little is one where a small repair is enough. Bright places in the maps are where the "
                "recorded and the wanted features differ most.",
            )
        )
    return sections


def _reconstructions(rows: Sequence[Row]) -> list[Section]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["settings"].get("kind") == "reconstruction":
            groups.setdefault((row["settings"]["network"], row["settings"]["data"]), []).append(row)
    return [
        Section(
            f"Reconstruction quality: {network} on {data}",
            "",
            tables=(reconstruction_table(group),),
            reading="A truer way reaches more labels; a nearer one changes the features less.",
        )
        for (network, data), group in groups.items()
    ]


def _provenance(rows: Sequence[Row]) -> Section:
    seen: dict[str, set[str]] = {}
    for row in rows:
        seen.setdefault("commit", set()).add(str(row.get("commit")))
        machine = row.get("machine", {})
        seen.setdefault("machine", set()).add(
            f"{machine.get('processor')}, {machine.get('cores')} cores, "
            f"{machine.get('memory_gib')} GiB, {machine.get('system')}"
        )
        seen.setdefault("versions", set()).add(", ".join(f"{k} {v}" for k, v in row.get("versions", {}).items()))
    lines: list[list[str | float | None]] = [[key, "; ".join(sorted(values))] for key, values in seen.items()]
    return Section(
        "How this was made", f"{len(rows)} finished runs.", tables=(Table("Provenance", ["what", "value"], lines),)
    )
