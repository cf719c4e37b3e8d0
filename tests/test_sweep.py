"""Sweeps: every run once, whatever raises, dies or is killed; the same rows from all engines."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sweep_cases import die, fail, gone, nap, naps, no_row, started, sweep_naps, who
from training_cases import run_and_kill

from revprop.runs import RunStore
from revprop.sweep import SweepError, Task, _gpus, _job, sweep
from revprop.workers import Processes, count_cores

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "rows").glob("*.json")}


# -- in this process --------------------------------------------------------------------------------


def test_rows_in_order_each_run_once_and_lines(tmp_path: Path) -> None:
    tasks = naps(tmp_path, 4, 0.001)
    rows = sweep([tasks[2], tasks[0], tasks[2]], workers=1)
    assert [row["value"] for row in rows] == [2, 0, 2]
    assert started(tmp_path) == {0: 1, 2: 1}
    lines: list[str] = []
    everything = sweep(
        tasks, workers=1, report=lines.append, describe=lambda task, row: f"{task.name} = {row['value']}"
    )
    assert [row["value"] for row in everything] == [0, 1, 2, 3]
    assert started(tmp_path) == dict.fromkeys(range(4), 1)
    assert lines == ["2 of 4 runs were finished before", "3/4 nap 1 = 1; about 1 s left", "4/4 nap 3 = 3"]
    before, lines = contents(tmp_path), []
    assert sweep(tasks, workers=1, report=lines.append) == everything
    assert lines == []
    assert contents(tmp_path) == before


def test_the_estimate_is_the_mean_of_what_was_run_now(tmp_path: Path) -> None:
    lines: list[str] = []
    tasks = naps(tmp_path, 3, 0.001) + [
        Task(f"long {n}", tmp_path / "rows", {"long": n}, nap, (0.75, 10 + n, tmp_path / "log")) for n in range(5)
    ]
    sweep(tasks[:3], workers=1)
    sweep(tasks, workers=1, report=lines.append)
    assert [re.sub(r".* about ", "", line) for line in lines[1:4]] == ["3 s left", "2 s left", "2 s left"]


def test_what_a_run_needs_goes_first(tmp_path: Path) -> None:
    first, second = naps(tmp_path, 2, 0.001)
    late = Task("late", tmp_path / "rows", {"late": 1}, nap, (0, 7, tmp_path / "log"), after=second)
    lines: list[str] = []
    sweep([late, first, second], workers=1, report=lines.append)
    assert [re.split("[ ;]", line, maxsplit=1)[1].split(";")[0] for line in lines] == ["nap 0", "nap 1", "late"]
    again = Task("again", tmp_path / "rows", {"late": 2}, nap, (0, 8, tmp_path / "log"), after=second)
    assert sweep([again], workers=1)[0]["value"] == 8  # what it needs has a row from before


def test_all_failures_at_once(tmp_path: Path) -> None:
    bad = [Task(f"bad {n}", tmp_path / "rows", {"bad": n}, fail, (n,)) for n in range(2)]
    needs = Task("needs", tmp_path / "rows", {"needs": 1}, nap, (0, 9, tmp_path / "log"), after=bad[0])
    infinite = Task("infinite", tmp_path / "rows", {"infinite": 1}, no_row)
    lines: list[str] = []
    with pytest.raises(SweepError) as caught:
        sweep([needs, *bad, infinite, *naps(tmp_path, 2, 0)], workers=1, report=lines.append)
    assert str(caught.value) == (
        "4 of 6 runs failed; the other 2 are stored, and the same command again runs the failed ones only:\n"
        "  bad 0: ValueError: 0 is no good\n"
        '    settings: {"bad": 0}\n'
        "  bad 1: ValueError: 1 is no good\n"
        '    settings: {"bad": 1}\n'
        "  infinite: ValueError: result.bad is nan: rows hold finite numbers; None says that there is none\n"
        '    settings: {"infinite": 1}\n'
        "  needs: not started, since it needs bad 0\n"
        '    settings: {"needs": 1}'
    )
    assert "in fail" in caught.value.failures[0].details  # the traceback
    assert lines[0] == "bad 0 failed: ValueError: 0 is no good"
    assert started(tmp_path) == {0: 1, 1: 1}
    assert len(contents(tmp_path)) == 2


def test_ctrl_c_in_this_process_is_not_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sweep_cases.time.sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(naps(tmp_path, 2), workers=1)
    assert contents(tmp_path) == {}


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown engine 'lokal'; did you mean 'local'"):
        sweep(naps(tmp_path, 1), engine="lokal")
    with pytest.raises(ValueError, match="workers: expected at least 1, given 0"):
        sweep(naps(tmp_path, 1), workers=0)
    inner = Task("inner", tmp_path / "rows", {}, lambda: {})
    with pytest.raises(ValueError, match=r"inner: cannot be sent to a worker .* a function that can be imported"):
        sweep([*naps(tmp_path, 1), inner], workers=1)
    assert not (tmp_path / "log").exists()  # nothing was run
    assert sweep([]) == []


# -- workers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_that_die_runs_that_raise_and_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("revprop.workers.START_METHOD", method)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    twice = Task("twice", tmp_path / "rows", {"die": 2}, die, (tmp_path / "twice", 2))
    always = Task("always", tmp_path / "rows", {"die": 99}, die, (tmp_path / "always", 99))
    needs = Task("needs", tmp_path / "rows", {"needs": 1}, nap, (0, 9, tmp_path / "log"), after=always)
    bad = Task("bad", tmp_path / "rows", {"bad": 1}, fail, (1,))
    lines: list[str] = []
    with pytest.raises(SweepError) as caught:
        sweep([twice, needs, always, bad, *naps(tmp_path, 8)], workers=2, device="cpu", report=lines.append)
    assert {f.task.name: f.message for f in caught.value.failures} == {
        "bad": "ValueError: 1 is no good",
        "always": "its worker died 3 times; the last time: its worker died (SIGKILL: killed, perhaps for want of memory)",
        "needs": "not started, since it needs always",
    }
    assert len(list((tmp_path / "always").iterdir())) == 3
    store = RunStore(tmp_path / "rows")
    assert store.get({"die": 2})["deaths"] == 2  # type: ignore[index]
    found = [store.get({"n": n}) for n in range(8)]
    assert [row and row["value"] for row in found] == list(range(8))
    assert started(tmp_path) == dict.fromkeys(range(8), 1)  # a worker that dies takes no other run with it
    if method == "spawn":
        assert {row and row["threads"] for row in found} == {"1"}
        assert "OMP_NUM_THREADS" not in os.environ
    assert any(line.startswith("twice: its worker died (SIGKILL") and line.endswith("tried again") for line in lines)
    assert os.getpid() not in who(tmp_path)
    assert gone(who(tmp_path), 5) == set()


def test_an_idle_worker_that_was_killed_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revprop.workers.START_METHOD", "fork")
    workers, seen = Processes(1), set[int]()
    try:
        for n, task in enumerate(naps(tmp_path, 3, 0.001)):
            workers.submit(str(n), _job(task))
            ((name, outcome),) = workers.wait()
            assert (name, outcome.kind) == (str(n), "finished")
            (pid,) = who(tmp_path) - seen
            os.kill(pid, signal.SIGKILL)
            assert gone({pid}, 5) == set()
            time.sleep(0.3)  # until its last thread is gone, too
            seen.add(pid)
    finally:
        workers.close()


def test_workers_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revprop.workers.START_METHOD", "fork")
    monkeypatch.setattr("revprop.workers._serve", lambda connection: os._exit(3))
    with pytest.raises(RuntimeError, match=r"5 workers died before they were ready \(exit code 3\).*if __name__ =="):
        sweep(naps(tmp_path, 3), workers=2, device="cpu")


@pytest.mark.filterwarnings("ignore:.* is skipped. it is being written now")
def test_twenty_kills_at_random_times(tmp_path: Path) -> None:
    """Kill -9 of the sweep: its workers leave, its rows stay as they are, and the same sweep continues.

    Workers are forked here, so that they are at work at once.
    """
    draw, runs, count, kills = random.Random(0), tmp_path / "runs", 700, 20
    before: dict[str, bytes] = {}
    starts: dict[int, int] = {}
    partial = 0
    for kill in range(kills):
        arguments = (runs, count, tmp_path / f"started{kill}", "fork")
        marker = arguments[2] if kill % 2 else arguments[2].with_suffix(".row")  # at any time, and once at work
        assert run_and_kill(sweep_naps, arguments, marker, after=draw.uniform(0.05, 0.8)), f"ended before {kill}"
        if not (runs / "log").exists():
            continue
        assert gone(who(runs), 5) == set(), "a worker outlives its sweep"
        now = contents(runs)
        assert {name: now.get(name) for name in before} == before, "a finished row changed"
        begun = started(runs)
        finished = {row["settings"]["n"] for row in RunStore(runs / "rows").rows()}
        assert len(finished) == len(now)
        assert {n: begun[n] for n in starts} == starts, "a finished run was run again"
        partial += len(now) > len(before)
        before, starts = now, {n: begun[n] for n in finished}
    assert partial >= kills // 2  # these came in the middle of work
    assert len(before) < count
    rows = sweep(naps(runs, count, 0.001), workers=1)
    assert [row["value"] for row in rows] == list(range(count))
    assert len(contents(runs)) == count
    assert {name: contents(runs)[name] for name in before} == before
    begun = started(runs)
    assert {n: begun[n] for n in starts} == starts
    assert sum(begun.values()) <= count + 2 * kills  # repeated: what was in flight, two workers each time


# -- a sweep as a program ---------------------------------------------------------------------------

PROGRAM = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from sweep_cases import naps
from revprop.sweep import sweep
if __name__ == "__main__":
    try:
        sweep(naps(Path(sys.argv[1]), 40, 0.3), workers=2, device="cpu")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_program_is_stopped(tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C reaches all processes of a terminal, kill -9 the program alone: either way no worker is left."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(contents(tmp_path)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = who(tmp_path)
    assert process.pid not in workers
    began = time.monotonic()
    (os.killpg if how is signal.SIGINT else os.kill)(process.pid, how)
    _, err = process.communicate(timeout=30)
    assert gone(workers, 5) == set()
    assert time.monotonic() - began < 5
    assert err == ("stopped\n" if how is signal.SIGINT else "")  # no worker prints a traceback
    deadline = time.monotonic() + 5  # nor is anything else of it left: the group of its processes is empty
    while group_exists(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_exists(process.pid)


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# -- where ------------------------------------------------------------------------------------------


def test_one_worker_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _gpus("auto") == _gpus("cuda") == ["0", "1"]
    assert _gpus("cuda:1") == [""]
    assert _gpus("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    assert _gpus("auto") == ["3", "GPU-5f"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _gpus("auto") == [""]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _gpus("cuda") == []  # the tasks say that there is none


def test_each_worker_sees_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revprop.workers.START_METHOD", "fork")
    monkeypatch.setattr("revprop.sweep._gpus", lambda device: ["3", "5"])
    task = [Task(f"{n}", tmp_path, {"n": n}, visible, (n,)) for n in range(6)]
    assert {row["sees"] for row in sweep(task)} == {"3", "5"}


def visible(n: int) -> dict[str, str | None]:
    time.sleep(0.1)
    return {"sees": os.environ.get("CUDA_VISIBLE_DEVICES")}


def test_as_many_workers_as_cores() -> None:
    assert count_cores() == len(os.sched_getaffinity(0))


def test_ray_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'revprop\[cluster\]'"):
        sweep(naps(tmp_path, 1), engine="ray")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'revprop[cluster]'")
def test_the_same_rows_from_ray(tmp_path: Path) -> None:
    twice = Task("twice", tmp_path / "rows", {"die": 2}, die, (tmp_path / "twice", 2))
    bad = Task("bad", tmp_path / "rows", {"bad": 1}, fail, (1,))
    always = Task("always", tmp_path / "rows", {"die": 99}, die, (tmp_path / "always", 99))
    with pytest.raises(SweepError) as caught:
        sweep([twice, bad, always, *naps(tmp_path, 6)], workers=2, engine="ray", device="cpu")
    assert sorted(f.task.name for f in caught.value.failures) == ["always", "bad"]
    assert "its worker died 3 times" in str(caught.value)
    assert len(contents(tmp_path)) == 7
    assert started(tmp_path) == dict.fromkeys(range(6), 1)
    assert 1 < len(who(tmp_path)) <= 6  # persistent: fewer than there were runs and deaths
