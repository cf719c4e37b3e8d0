"""``make coverage``: runs the library over many architectures and writes docs/coverage.md.

Each architecture runs in a process of its own, with a limit on its time and memory; one that hangs or crashes costs its own row
alone, which says what happened. Finished rows are kept, so the same command again continues, and writes the page.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from architecture import Architecture
from coverage_page import page
from coverage_row import Row, measure, plain
from rich.progress import track
from zoo import ARCHITECTURES

from revprop.runs import RunStore, write_atomically

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
PACKAGES = ("timm", "torchvision", "transformers")
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["*"], help="names or sources, with * and ?; all by default")
    parser.add_argument("--again", action="store_true", help="forget the rows of these architectures first")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of one architecture")
    parser.add_argument("--gib", type=float, default=6, help="memory limit of one architecture (Linux)")
    parser.add_argument("--rows", type=Path, default=ROOT / "docs" / "results" / "coverage" / "rows")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        run_one(ARCHITECTURES[given.one], given.out, given.gib)
        return
    store = RunStore(given.rows)
    chosen = [a for a in ARCHITECTURES.values() if any(fnmatch(a.name, p) or fnmatch(a.source, p) for p in given.only)]
    for architecture in track(chosen, "architectures", disable=not sys.stderr.isatty()):
        settings = settings_of(architecture)
        if given.again:
            (given.rows / f"{store.key(settings)}.json").unlink(missing_ok=True)
        row = store.run(settings, lambda _, a=architecture: run_apart(a, given.seconds, given.gib))  # type: ignore[misc]
        print(
            f"{architecture.source}: {architecture.name}: {row['failed'] or '; '.join(row['problems']) or 'done'}",
            flush=True,
        )
    write_atomically(given.out, page([row for a in ARCHITECTURES.values() if (row := store.get(settings_of(a)))]))


def settings_of(architecture: Architecture) -> dict[str, object]:
    """What a row is filed under."""
    return {
        "architecture": architecture.name,
        "family": architecture.family,
        "source": architecture.source,
        "batch": architecture.batch,
        "seed": SEED,
    }


def run_apart(architecture: Architecture, limit: float, gib: float) -> Row:
    """The row of one architecture, measured in another process; what it knew last where that was stopped or died."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--one", architecture.name, "--out", str(out), "--gib", str(gib)]
        end = ""
        try:
            done = subprocess.run(
                command, timeout=limit, env={**os.environ, **ALONE}, capture_output=True, text=True, check=False
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [""])[-1]
                end = f"its process ended with code {done.returncode}: {plain(last)}"
        except subprocess.TimeoutExpired:
            end = f"stopped after {limit:g} seconds"
        row: Row = {"failed": "importing", "problems": []}
        with contextlib.suppress(FileNotFoundError):
            row = json.loads(out.read_text(encoding="utf-8"))
    # a process that is stopped after its last word has lost nothing
    return {**row, "failed": f"{row['failed']}: {end}"} if end and row["failed"] else row


def run_one(architecture: Architecture, out: Path, gib: float) -> None:
    """Measures one architecture in this process, writing what is known of its row as it goes."""
    torch.set_num_threads(1)
    packages = {name: _version(name) for name in PACKAGES}
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), int(gib * 2**30)))
    measure(architecture, SEED, lambda row: write_atomically(out, json.dumps({**row, "packages": packages})))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
