"""What the tests of sweeps run in workers: functions that other processes can import."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

from revprop import workers
from revprop.sweep import Task, sweep


def nap(seconds: float, value: int, log: Path) -> dict[str, Any]:
    """Sleeps; leaves a file that says who ran what."""
    log.mkdir(parents=True, exist_ok=True)
    (log / f"{value}-{os.getpid()}-{uuid.uuid4().hex}").touch()
    time.sleep(seconds)
    return {"value": value, "threads": os.environ.get("OMP_NUM_THREADS")}


def naps(folder: Path, count: int, seconds: float = 0.05) -> list[Task]:
    return [Task(f"nap {n}", folder / "rows", {"n": n}, nap, (seconds, n, folder / "log")) for n in range(count)]


def started(folder: Path) -> dict[int, int]:
    """How often each nap was begun."""
    counts: dict[int, int] = {}
    for path in (folder / "log").iterdir():
        value = int(path.name.split("-")[0])
        counts[value] = counts.get(value, 0) + 1
    return counts


def who(folder: Path) -> set[int]:
    """The processes that ran naps."""
    return {int(path.name.split("-")[1]) for path in (folder / "log").iterdir()}


def die(log: Path, times: int) -> dict[str, Any]:
    """Kills its own process so many times, then succeeds."""
    log.mkdir(parents=True, exist_ok=True)
    before = len(list(log.iterdir()))
    (log / uuid.uuid4().hex).touch()
    if before < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"deaths": before}


def fail(value: int) -> dict[str, Any]:
    raise ValueError(f"{value} is no good")


def no_row() -> dict[str, Any]:
    return {"bad": float("nan")}


def sweep_naps(folder: Path, count: int, marker: Path, method: str) -> None:
    """A sweep to be killed: ``marker`` appears when it begins, and beside it one with the suffix ".row" with its first row."""
    workers.START_METHOD = method
    marker.touch()
    sweep(naps(folder, count), workers=2, device="cpu", report=lambda line: marker.with_suffix(".row").touch())


def gone(pids: set[int], seconds: float) -> set[int]:
    """Those of the processes that are still there after so many seconds at most."""
    deadline = time.monotonic() + seconds
    left = set(pids)
    while left and time.monotonic() < deadline:
        left = {pid for pid in left if _runs(pid)}
        time.sleep(0.01)
    return left


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
