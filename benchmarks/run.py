"""``make bench``: the speed table, as ratios of medians against a named baseline in the same process, to RESULTS.md."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import alignment
import hypersurfaces
import layers
import networks
import racecar
import torch
from timing import geometric_mean, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1 is steadier on a busy machine)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "RESULTS.md")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    large = networks.measure_large()  # first, while nothing else has been held in memory
    whole = networks.measure(given.repeats)
    units = hypersurfaces.measure(given.repeats)
    penalised = racecar.measure(given.repeats)
    aligned = alignment.measure(given.repeats)
    single = layers.measure(given.repeats)
    lines = [
        "# Speed",
        "",
        "Written by `make bench`. Ratios of medians of alternating runs in one process; below 1 is faster than the "
        "baseline.",
        "",
        f"{machine()}; {given.repeats} repeats; {datetime.now(UTC):%Y-%m-%d}.",
        "",
        "| work | against | aim | measured |",
        "|---|---|---|---|",
    ]
    mean = geometric_mean([case.times.ratio for case in single])
    lines.append(
        "| one reconstruction through one layer, factors ready | forward + backward of it | <= 1.0, geometric mean | "
        f"{mean:.2f} over {len(single)} layers |"
    )
    for key, against, aim in (
        ("greedy", "one training step", "<= 1.0"),
        ("global", "one training step", "<= 2.0"),
        ("FR-PT epoch", "one BP-PT epoch", "<= 1.05"),
        ("closed form", "ten BP-PT epochs of the whole network", "<= 0.05"),
    ):
        cases = [case for case in whole if key in case.what]
        cells = "; ".join(
            f"{case.network} {case.times.ratio:{'.3f' if case.times.ratio < 0.1 else '.2f'}}" for case in cases
        )
        work = cases[0].what.split(" /")[0].replace("conv1", "the first block")
        lines.append(f"| {work} | {against} | {aim} | {cells} |")
    lines.append(
        f"| {large.what}, {large.network} | forward + backward | <= 2.0, within 4 GiB | {large.times.ratio:.2f}: {large.remark} |"
    )
    ones = [case for case in units if "one unit" in case.what]
    lines.append(
        "| one unit's hypersurface | forward + backward | <= 1.1 | "
        + "; ".join(f"{c.network}, {c.what.split(', ')[1]} {c.times.ratio:.2f}" for c in ones)
        + " |"
    )
    lines += [
        f"| hypersurfaces of {c.what} of {c.network} | `torch.func.jacrev` in chunks | <= 0.2, in less memory | "
        f"{c.times.ratio:.2f}: {c.remark} |"
        for c in units
        if c not in ones
    ]
    lines += racecar.table(penalised)
    aims = ("<= 0.8", "<= 0.8", "<= 1.24", "<= 1.24", "<= 1.24")
    lines += [
        f"| {c.what}, {c.network} | {c.remark} | {aim} | {c.times.ratio:.2f} |"
        for c, aim in zip(aligned, aims, strict=True)
    ]
    lines += [
        "",
        "Shares of samples that are wrong, which set the cost of the global strategy: "
        + ", ".join(f"{case.network} {100 * case.wrong:.1f} % of 256" for case in whole if "global" in case.what)
        + ".",
        "",
        "## Whole networks",
        "",
        "| what | network | ours (ms) | baseline (ms) | ratio | quartiles |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.what} | {c.network} | {1e3 * c.times.ours:.2f} | {1e3 * c.times.baseline:.2f} | {c.times.ratio:.3f} | "
        f"{c.times.low:.3f} to {c.times.high:.3f} |"
        for c in (*whole, large, *units, *penalised, *aligned)
    ]
    lines += [
        "",
        "## One layer",
        "",
        "| network | layer | batch | reconstruction (ms) | forward + backward (ms) | ratio |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.network} | {c.layer} | {c.batch} | {1e3 * c.times.ours:.2f} | {1e3 * c.times.baseline:.2f} "
        f"| {c.times.ratio:.2f} |"
        for c in single
    ]
    for name in dict.fromkeys(c.network for c in single):
        part = geometric_mean([c.times.ratio for c in single if c.network == name])
        lines.append(f"| **{name}** | geometric mean | | | | **{part:.2f}** |")
    given.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:18]))


if __name__ == "__main__":
    main()
