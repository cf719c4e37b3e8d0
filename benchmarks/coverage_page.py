"""The coverage page from its rows: the same rows give the same page, and nothing is computed here but counts and medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]

SOURCES = ("written here", "timm", "torchvision", "transformers")
WAYS = ("greedy", "refined", "global")
NOTHING = "\N{EN DASH}"
TOLERANCE = 1e-9  # of the fixed point and of the certificates, in float64
HEAD = """# Coverage: which networks, how exact, how fast

Written by `make coverage` from the rows in `docs/results/coverage/rows`. Every network has seeded random weights, in float64,
its batch-norm statistics set from one random batch; nothing is downloaded. What each column says:

- **closed / fallback / stops / none**: operator calls that the greedy strategy steps through in closed form, by damped Gauss-Newton
  on their own Jacobian, not at all because nothing behind them can move (looking up a token), and those that it refuses.
- **fixed point**: greedy, towards the network's own output: the largest difference between the features returned and those
  recorded, over all layers reached, relative to the largest entry. It must be below 1e-9.
- **greedy**, **refined** (greedy with `refine=10`) and **global**: towards another output, at a layer about a third of the way in.
  Classifiers get random other labels; other networks the output that they give on that layer's features moved by 10 % of their
  norm, so that a solution exists.
  Where other values by-pass the layer (said beside its name), an output need not be reachable from it alone.
  *Residual*: the certificate's, relative to the residual before (0 is exact, 1 is no progress). *Reached*: the share of samples
  that get there. *Deviation*: how far the features move, relative to their norm. *Time*: relative to one forward and backward pass
  of the same batch, medians of three, factors ready.
"""


def page(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    rows = sorted(
        rows, key=lambda r: (_source(r), r["settings"]["family"].lower(), r["settings"]["architecture"].lower())
    )
    if not rows:
        return f"{HEAD}\nNo row yet.\n"
    parts = [HEAD, _summary(rows)]
    for source in dict.fromkeys(row["settings"]["source"] for row in rows):
        parts.append(_table(source, [row for row in rows if row["settings"]["source"] == source]))
    parts += [_remarks(rows), _operators(rows, "fallback"), _operators(rows, "stops here"), _operators(rows, "no rule")]
    parts.append(_machine(rows))
    return "\n".join(part for part in parts if part)


def _source(row: Row) -> int:
    return SOURCES.index(row["settings"]["source"])


def _summary(rows: Sequence[Row]) -> str:
    traced = [row for row in rows if row.get("traced")]
    checked = [row for row in traced if "kinds" in row]
    covered = [row for row in checked if not row["kinds"].get("no rule")]
    closed = [row for row in checked if set(row["kinds"]) == {"closed form"}]
    exact = [row for row in traced if _small(row.get("fixed_point"))]
    lines = [
        "## Summary",
        "",
        "| | |",
        "|:---|---:|",
        f"| architectures | {len(rows)} |",
        f"| families | {len({row['settings']['family'] for row in rows})} |",
        f"| traced | {_share(len(traced), len(rows))} |",
        f"| greedy strategy covers every operator | {_share(len(covered), len(rows))} |",
        f"| of these, all in closed form | {_share(len(closed), len(rows))} |",
        f"| global strategy ran | {_share(sum(bool(row.get('global')) for row in rows), len(rows))} |",
        f"| fixed point below 1e-9 | {_share(len(exact), len(rows))} |",
        f"| worst fixed point | {_number(max(_values(rows, 'fixed_point'), default=None))} |",
    ]
    for strategy in WAYS:
        found = [row[strategy] for row in rows if row.get(strategy)]
        lines += [
            f"| {strategy}: median residual, relative | {_median(f['residual'] for f in found)} |",
            f"| {strategy}: mean share reached | {_percent(_mean(f['reached'] for f in found))} |",
            f"| {strategy}: median deviation | {_median(f['deviation'] for f in found)} |",
            f"| {strategy}: median time (forward + backward = 1) | {_median(f['seconds'] for f in found)} |",
        ]
    errors = [f["certificate_error"] for row in rows for s in WAYS if (f := row.get(s)) and "certificate_error" in f]
    right = sum(_small(error) for error in errors if error is not None)
    early = [row for row in rows if row["failed"] or row["problems"]]
    lines += [
        f"| certificates recomputed by running the model itself | {sum(error is not None for error in errors)} |",
        f"| of these, the same to 1e-9 | {_share(right, sum(error is not None for error in errors))} |",
        f"| model left as it was | {_share(sum(bool(row.get('untouched')) for row in rows), len(rows))} |",
        f"| processor minutes, all together | {sum(_values(rows, 'processor_seconds')) / 60:.0f} |",
        f"| a part raised, or ended early (see [Remarks](#remarks)) | {len(early)} |",
    ]
    return "\n".join([*lines, ""])


COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("architecture", ":---", lambda r: r["settings"]["architecture"]),
    ("family", ":---", lambda r: r["settings"]["family"]),
    ("input", ":---", lambda r: "; ".join(_shape(shape) for shape in r.get("inputs", []))),
    ("parameters", "---:", lambda r: _thousands(r.get("parameters"))),
    ("operators", "---:", lambda r: str(r.get("operators", NOTHING))),
    ("closed / fallback / stops / none", "---:", lambda r: _kinds(r)),
    ("fixed point", "---:", lambda r: _number(r["fixed_point"], "not finite") if "fixed_point" in r else NOTHING),
    ("at layer", ":---", lambda r: _layer(r)),
    ("greedy: residual / reached / deviation", "---:", lambda r: _quality(r, "greedy")),
    ("time", "---:", lambda r: _time(r, "greedy")),
    ("refined: residual / reached / deviation", "---:", lambda r: _quality(r, "refined")),
    ("time", "---:", lambda r: _time(r, "refined")),
    ("global: residual / reached / deviation", "---:", lambda r: _quality(r, "global")),
    ("time", "---:", lambda r: _time(r, "global")),
)


def _table(source: str, rows: Sequence[Row]) -> str:
    lines = [
        f"## {source[0].upper()}{source[1:]}" if source == "written here" else f"## {source}",
        "",
        f"| {' | '.join(name for name, _, _ in COLUMNS)} |",
        f"|{'|'.join(align for _, align, _ in COLUMNS)}|",
    ]
    lines += [f"| {' | '.join(cell(row).replace('|', '/') for _, _, cell in COLUMNS)} |" for row in rows]
    return "\n".join([*lines, ""])


def _remarks(rows: Sequence[Row]) -> str:
    lines = ["## Remarks", ""]
    for row in rows:
        said = []
        if row.get("export_error"):
            said.append(f"not traced: {row['export_error']}")
        said += row["problems"]
        if row["failed"]:
            said.append(f"**{row['failed']}**")
        if row.get("untouched") is False:
            said.append("**the model was changed**")
        if "fixed_point" in row and not _small(row["fixed_point"]):
            said.append(f"**fixed point {_number(row['fixed_point'], 'not finite')}**")
        if row.get("greedy_layers", 0) < row.get("floating_layers", 0):
            said.append(f"greedy reaches {row['greedy_layers']} of {row['floating_layers']} layers")
        for strategy in WAYS:
            error = (row.get(strategy) or {}).get("certificate_error")
            if error is not None and not _small(error):
                said.append(f"**{strategy}: certificate off by {_number(error)} of the first residual**")
            if row.get(strategy) and not row[strategy]["finite"]:
                said.append(f"**{strategy}: features not finite**")
        if said:
            lines.append(f"- {row['settings']['architecture']} ({row['settings']['source']}): {'; '.join(said)}.")
    return "\n".join([*(lines if len(lines) > 2 else [*lines, "None."]), ""])


TITLES = {
    "fallback": "## Operators reversed by the fallback",
    "stops here": "## Operators where the greedy strategy stops",
    "no rule": "## Operators refused, and why",
}


def _operators(rows: Sequence[Row], kind: str) -> str:
    found: dict[str, tuple[list[str], list[int], dict[str, None]]] = {}
    for row in rows:
        for name, entry in row.get("not_closed", {}).items():
            if name.startswith(f"{kind}: "):
                where, calls, remedies = found.setdefault(name.removeprefix(f"{kind}: "), ([], [], {}))
                where.append(row["settings"]["architecture"])
                calls.append(entry["calls"])
                remedies.update(dict.fromkeys(entry["remedies"]))
    if not found:
        return ""
    lines = [TITLES[kind], "", "| operator | architectures | calls | said of it |", "|:---|---:|---:|:---|"]
    for name, (where, calls, remedies) in sorted(found.items(), key=lambda item: (-len(item[1][0]), item[0])):
        said = "; ".join(text for text in sorted(remedies) if text).replace("|", "/")
        lines.append(f"| `{name}` | {len(where)} | {sum(calls)} | {said} |")
    return "\n".join([*lines, ""])


def _machine(rows: Sequence[Row]) -> str:
    machines = {
        f"{m['processor']}, {m['cores']} cores, {m['memory_gib']:g} GiB, {m['system'].split()[0]}"
        for m in (row["machine"] for row in rows)
    }
    versions = {", ".join(f"{name} {v}" for name, v in row["versions"].items() if v) for row in rows}
    packages = {", ".join(f"{n} {v}" for n, v in row.get("packages", {}).items() if v) for row in rows} - {""}
    days = sorted({row["finished"][:10] for row in rows})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    said = ["; ".join(sorted(machines)), "one thread", "; ".join(sorted(versions)), "; ".join(sorted(packages)), span]
    return f"## Where\n\n{'. '.join(part for part in said if part)}.\n"


def _kinds(row: Row) -> str:
    if "kinds" not in row:
        return "not traced" if row.get("export_error") else NOTHING
    return " / ".join(str(row["kinds"].get(kind, 0)) for kind in ("closed form", "fallback", "stops here", "no rule"))


def _layer(row: Row) -> str:
    if "layer" not in row:
        return NOTHING
    return f"`{row['layer']}`" + (" (by-passed)" if row["by_passed"] else "")


def _quality(row: Row, strategy: str) -> str:
    if strategy not in row:
        return NOTHING
    found = row[strategy]
    if found is None:
        return "refused"
    return f"{_number(found['residual'])} / {_percent(found['reached'])} / {_number(found['deviation'])}"


def _time(row: Row, strategy: str) -> str:
    return _number(row[strategy]["seconds"]) if row.get(strategy) else NOTHING


def _shape(described: Sequence[Any]) -> str:
    kind, *shape = described
    return " x ".join(map(str, shape)) + (" indices" if kind == "int64" else "")


def _thousands(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _number(value: float | None, none: str = NOTHING) -> str:
    if value is None:
        return none
    if value >= 100:
        return f"{value:,.0f}"
    return "0" if value == 0 else f"{value:.0e}" if value < 1e-3 else f"{value:.2g}"


def _small(value: float | None) -> bool:
    return value is not None and value <= TOLERANCE


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"


def _share(part: int, of: int) -> str:
    return f"{part} of {of} ({100 * part / of:.0f} %)" if of else "0"


def _values(rows: Iterable[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _median(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(statistics.median(known)) if known else NOTHING
