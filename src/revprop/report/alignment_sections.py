"""Feature alignment's experiments as sections of a page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure

from revprop.report.aggregation import Row, three_digits
from revprop.report.alignment_drawings import NAMES, errors_by_data, image_sheets, latent_plane, sine_panels
from revprop.report.page import Section
from revprop.report.tables import Cell, Table

__all__ = ["alignment_sections"]

PUBLISHED_SIZES: dict[int, dict[str, tuple[float, float]]] = {
    3: {"vae": (27.40, 9.44), "gan": (13.44, 5.73), "vfa": (14.0, 11.66), "vfa-gan": (14.16, 20.59)},
    4: {"vae": (37.48, 19.41), "gan": (18.48, 12.45), "vfa": (19.04, 22.79), "vfa-gan": (19.24, 41.71)},
    5: {"vae": (9.755, 10.01), "gan": (4.748, 7.20), "vfa": (5.028, 11.25), "vfa-gan": (5.195, 21.56)},
    6: {"vae": (25.422, 151.0), "gan": (3.274, 150.0), "vfa": (22.148, 172.0), "vfa-gan": (22.990, 218.0)},
}
"""Parameters in millions and 10^-4 s per sample, by table (those of Tables 5 and 6 are printed in another unit)."""
_SAMPLED = ("vae", "gan", "vfa", "vfa-gan")
PUBLISHED_FID: dict[str, dict[str, float]] = {
    "mnist": dict(zip(_SAMPLED, (39.84, 71.50, 120.02, 41.24), strict=True)),
    "cifar10": dict(zip(_SAMPLED, (163.59, 63.30, 209.32, 73.20), strict=True)),
    "stl10": dict(zip(_SAMPLED, (201.59, 247.35, 259.96, 167.26), strict=True)),
}
"""Table 2, in Inception's features, by data set; CelebA's numbers are not legible in the text at hand."""


def alignment_sections(rows: Sequence[Row], draw: bool = True) -> list[Section]:
    """Make a section of each of feature alignment's experiments that the rows allow.

    Args:
        rows: finished runs of any kind; others are left alone. draw: whether to draw the figures.

    >>> alignment_sections([])
    []
    """
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=_place):  # not in the order they were finished in
        kind = str(row["settings"].get("kind"))
        if kind in SECTIONS:
            groups.setdefault(json.dumps(_study(row["settings"]), sort_keys=True), []).append(row)
    found = [SECTIONS[str(group[0]["settings"]["kind"])](group, draw) for group in groups.values()]
    return [*_across(list(groups.values()), draw), *found]


OF_SOME = ("way", "seed", "model", "device", "perceptual", "kernels", "refiner", "normalised", "generator_rate")
"""Settings in which the rows of one section may differ."""


def _study(settings: Mapping[str, Any]) -> dict[str, Any]:
    shared = {k: v for k, v in settings.items() if k not in OF_SOME}
    return shared | ({"sizes": _study(settings["sizes"])} if "sizes" in shared else {})


def _figure2(rows: Sequence[Row], draw: bool) -> Section:
    settings = rows[0]["settings"]
    ways = list(dict.fromkeys(row["settings"]["way"] for row in rows))
    lines: list[list[Cell]] = []
    for way in ways:
        same = [row for row in rows if row["settings"]["way"] == way]
        lines.append([way, len(same), *(_spread(same, name) for name in ("fit", "error", "error_many", "value"))])
    first = min(row["settings"]["seed"] for row in rows)
    return Section(
        "Figure 2: sin(3 pi x), and x asked back",
        f"Networks of two hidden layers of {settings['hidden']:,} neurons learn y = sin(3 pi x). From their outputs alone, x is "
        f"asked back by one step from zero down their own gradient. {_sentence(settings['reduced'])}",
        tables=(
            Table(
                "Mean absolute errors",
                ["network", "runs", "f against y", "x, one step", "x, 200 steps of 0.01", "sin of what is recovered"],
                lines,
                "Mean and standard deviation over the runs. A guess of x = 0 has an error of 0.5.",
            ),
        ),
        figures=(sine_panels([row for row in rows if row["settings"]["seed"] == first]),) if draw else (),
        reading="The paper's claim is that alignment with a latent neuron recovers x over the whole interval. Without it x cannot "
        "be recovered by any method: up to six values of x have the same y. One step from zero is an affine map of the outputs, "
        "so with one output it is a multiple of y.",
    )


def _spread(rows: Sequence[Row], name: str) -> str:
    values = [row[name] for row in rows]
    spread = f" \u00b1 {three_digits(statistics.stdev(values))}" if len(values) > 1 else ""
    return three_digits(statistics.fmean(values)) + spread


def _sentence(reduced: str) -> str:
    return f"Reduced: {reduced}." if reduced else ""


def _sizes(rows: Sequence[Row], draw: bool) -> Section:
    row = rows[-1]
    settings, models = row["settings"], row["models"]
    published = PUBLISHED_SIZES[settings["table"]]
    batches = [str(n) for n in settings["batches"]]
    vae, vae_published = models["vae"], published["vae"]
    lines: list[list[Cell]] = []
    for name, found in models.items():
        size, seconds = published.get(name, (None, None))
        line: list[Cell] = [
            NAMES[name],
            f"{found['parameters'] / 1e6:.2f}",
            None if size is None else f"{size:.2f}",
            f"{found['parameters'] / vae['parameters']:.3f}",
            None if size is None else f"{size / vae_published[0]:.3f}",
        ]
        for n in batches:
            line += [three_digits(1e4 * found["seconds"][n]), f"{found['seconds'][n] / vae['seconds'][n]:.2f}"]
        lines.append([*line, None if seconds is None else f"{seconds / vae_published[1]:.2f}"])
    heads = [head for n in batches for head in (f"time per sample, {n} at once (1e-4 s)", f"/ VAE, {n} at once")]
    columns = [
        "model",
        "parameters (millions)",
        "published",
        "/ VAE",
        "published / VAE",
        *heads,
        "published time / VAE",
    ]
    note = (
        f"Measured on {row['device']}; published: one sample at a time on an RTX 2070. What sampling needs is counted: no "
        "discriminator. Written out: one step from zeros is an affine map of the code, so a trained VFA samples by one matrix."
    )
    text = f"The paper's networks for {settings['data']}. {_sentence(settings['reduced'])}"
    title = f"Table {settings['table']}: parameters and time per sample"
    return Section(title, text, tables=(Table(title, columns, lines, note),))


def _images(rows: Sequence[Row], draw: bool) -> Section:
    settings = rows[0]["settings"]
    models = list(dict.fromkeys(row["settings"]["model"] for row in rows))
    by_model = {name: [row for row in rows if row["settings"]["model"] == name] for name in models}
    judge = f"{settings['judge']['network']}, trained on {settings['data']}"
    published_fid = _published_fid(settings["data"])
    lines: list[list[Cell]] = []
    for name, same in by_model.items():
        values: list[Cell] = [_spread(same, what) if what in same[0] else None for what in ("error", "frechet")]
        accuracy = statistics.fmean(row["accuracy"] for row in same)
        reconstructed = _spread(same, "frechet_reconstruction")
        published = published_fid.get(name)
        lines.append(
            [
                NAMES[name],
                len(same),
                f"{same[0]['parameters'] / 1e6:.3f}",
                values[0],
                f"{100 * accuracy:.1f}",
                reconstructed,
                values[1],
                None if published is None else f"{published:.2f}",
                three_digits(statistics.fmean(row["seconds"] for row in same)),
            ]
        )
    first = rows[0]
    columns = ["model", "runs", "parameters (millions)", "|x - reconstruction|^2", "told right (%)"]
    columns += ["Frechet, reconstructions", "Frechet, samples", "FID published", "seconds of an epoch"]
    note = (
        f"Mean and standard deviation over the runs, over up to {settings['images']:,} test images. Told right: of the "
        f"reconstructions, by {judge}, which gets {100 * first['accuracy_real']:.1f} % of real ones right. Frechet: distance in "
        "the features in front of its last layer, not Inception's: no FID, and comparable within this table only; "
        f"{three_digits(first['frechet_real'])} between two halves of the real images (half as many: it is biased upwards)."
    )
    tables = [Table("Reconstructions and samples", columns, lines, note), *_closed_loops(by_model)]
    seeds = sorted({row["settings"]["seed"] for row in rows})
    shown = [row for row in rows if row["settings"]["seed"] == seeds[0]]
    text = f"Settings: {settings['preset']}, {settings['epochs']} epochs. {_sentence(settings['reduced'])}"
    contending = [row["settings"] for name in ("gan", "vfa-gan") for row in by_model.get(name, ())]
    for rate in {about.get("generator_rate") for about in contending} - {None, 0.0}:
        text += f" Generators learn at a rate of {rate:g}."
    for weight in {about.get("perceptual") for about in contending} - {None}:
        text += f" VFA-GAN's perceptual loss weighs {weight:g}."
    if any(about["sizes"].get("normalised") for about in contending):
        text += " The GAN's generator has batch norm behind each layer."
    few = settings["sizes"]["latent"] == 2
    return Section(
        f"Feature alignment on {settings['data']}{', two latent variables' if few else ''}",
        text,
        tables=tables,
        figures=_drawn(shown) if draw else (),
        reading=_ordering(by_model, published_fid),
    )


def _place(row: Row) -> tuple[int, int]:
    name = row["settings"].get("model")
    return row["settings"].get("table", 0), list(NAMES).index(name) if name in NAMES else -1


def _drawn(rows: Sequence[Row]) -> list[Figure]:
    """What the rows of one data set and seed have pictures of."""
    planes = [latent_plane(row) for row in rows if "plane" in row]
    kinds = [what for what in ("reconstruction", "samples", "interpolation", "classes") if _has(rows, what)]
    return [*planes, *(image_sheets(rows, what) for what in kinds)]


def _has(rows: Sequence[Row], what: str) -> bool:
    return any(what in row["grids"] for row in rows)


def _published_fid(data: str) -> dict[str, float]:
    return next((numbers for name, numbers in PUBLISHED_FID.items() if data.startswith(name)), {})


def _across(groups: Sequence[Sequence[Row]], draw: bool) -> list[Section]:
    """Several data sets beside each other, where there are several: Table 2 and Figure 15."""
    by_data: dict[str, dict[str, list[Row]]] = {}
    for group in groups:
        settings = group[0]["settings"]
        if settings["kind"] == "alignment-images" and settings["sizes"]["latent"] != 2:
            others = sum(name.startswith(settings["data"]) for name in by_data)
            by_model = by_data.setdefault(settings["data"] + (f" ({others + 1})" if others else ""), {})
            for row in group:
                by_model.setdefault(row["settings"]["model"], []).append(row)
    if len(by_data) < 2:
        return []
    models = list(dict.fromkeys(name for by_model in by_data.values() for name in by_model))
    tables = []
    for what, title in (("error", "|x - reconstruction|^2"), ("frechet", "Frechet distance of samples")):
        shown = [name for name in models if any(what in row for by in by_data.values() for row in by.get(name, []))]
        lines: list[list[Cell]] = []
        for data, by_model in by_data.items():
            cells: list[Cell] = [_spread(by_model[name], what) if name in by_model else None for name in shown]
            lines.append([data, *cells])
        if shown:
            tables.append(Table(title, ["data", *(NAMES[name] for name in shown)], lines, ACROSS_NOTES[what]))
    figures = [errors_by_data(by_data)] if draw else []
    text = "The same models on several data sets; the sections below say how each was trained and judged."
    return [Section("Several data sets", text, tables=tables, figures=figures)]


ACROSS_NOTES = {
    "error": "Mean and standard deviation over the runs. Published as a figure only: autoencoders least.",
    "frechet": "In the features of a classifier of that data set: numbers of one line compare, those of one column do not.",
}


def _closed_loops(by_model: Mapping[str, Sequence[Row]]) -> list[Table]:
    rows = [row for same in by_model.values() for row in same if "inverted" in row]
    if not rows:
        return []
    lines: list[list[Cell]] = []
    for way in rows[0]["inverted"]:
        parts = [[row["inverted"][way][part] for row in rows] for part in ("error", "code", "seconds")]
        lines.append([way, *(three_digits(statistics.fmean(values)) for values in parts)])
    columns = ["way", "|x - reconstruction|^2", "|E(r) - z| / |z|", "seconds, 16 images"]
    note = "Both from zeros, for the same codes of the same trained encoders (FA)."
    return [Table("The same codes by the encoder's inverse and by reconstruct", columns, lines, note)]


def _ordering(by_model: Mapping[str, Sequence[Row]], published_fid: Mapping[str, float]) -> str:
    def ordered(what: str) -> list[str]:
        means = {
            name: statistics.fmean(row[what] for row in same) for name, same in by_model.items() if what in same[0]
        }
        return sorted(means, key=means.__getitem__)

    said = []
    samples = [name for name in ordered("frechet") if name in published_fid]
    if len(samples) > 1:
        published = sorted(samples, key=published_fid.__getitem__)
        verdict = "the same as" if samples == published else "another than"
        pairs = pairwise(published)
        said.append(
            f"By the distance of samples: {' < '.join(NAMES[n] for n in samples)}, {verdict} the paper's order in Table 2, "
            f"{' < '.join(NAMES[n] for n in published)}. Of its neighbours, "
            f"{', '.join(_below(by_model, nearer, farther, 'frechet') for nearer, farther in pairs)}."
        )
    errors = ordered("error")
    if len(errors) > 1:
        said.append(f"By the error of reconstructions: {' < '.join(NAMES[n] for n in errors)}.")
    if "ae" in by_model and len(by_model) > 1:
        others = ", ".join(_below(by_model, "ae", name, "error") for name in errors if name != "ae")
        said.append(f"The paper's claim (Figure 15) is that autoencoders have the least: {others}.")
    return " ".join(said)


def _below(by_model: Mapping[str, Sequence[Row]], nearer: str, farther: str, what: str) -> str:
    """In how many of the runs that share a seed the first model's number is below the second's."""
    first, second = ({row["settings"]["seed"]: row[what] for row in by_model[name]} for name in (nearer, farther))
    shared = sorted(set(first) & set(second))
    count = sum(first[seed] < second[seed] for seed in shared)
    return f"{NAMES[nearer]} is below {NAMES[farther]} in {count} of {len(shared)} runs"


SECTIONS = {"alignment-figure2": _figure2, "alignment-sizes": _sizes, "alignment-images": _images}
