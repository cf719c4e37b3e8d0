"""Workers that run jobs one at a time: this process, spawned processes of this machine, or actors of a Ray cluster.

The three have one interface: ``free`` workers, ``submit`` a job to one of them, ``wait`` for what became of some jobs. A
worker that dies takes only the job with it that it was running, and is replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal, Protocol

__all__ = ["Here", "Outcome", "Processes", "RayActors", "Workers", "count_cores"]

# nothing of this process is copied: threads and a GPU in use do not survive a fork
START_METHOD = "spawn"
# workers that die before they are ready, one after the other, until it is the start itself that must be at fault
FAILED_STARTS = 5


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        kind: "finished"; "raised" an ordinary exception; its worker "died" while it ran; or its worker was "lost" before
            the job began.
        message: for the user, in one line. details: a traceback where there is one. seconds: how long it ran.
    """

    kind: Literal["finished", "raised", "died", "lost"]
    message: str = ""
    details: str = ""
    seconds: float = 0.0


class Workers(Protocol):
    """What runs jobs: pickled pairs of an importable function and its arguments."""

    def free(self) -> int:
        """How many jobs could be submitted now."""
        ...

    def submit(self, name: str, job: bytes) -> None:
        """Give the job to a free worker, under a name that no other job that runs now has."""
        ...

    def wait(self) -> list[tuple[str, Outcome]]:
        """Wait until at least one job has ended, and tell which and how."""
        ...

    def close(self) -> None:
        """Stop the workers at once, whatever they are at."""
        ...


def count_cores() -> int:
    """How many cores this process may use.

    >>> count_cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_job(job: bytes) -> Outcome:
    """Run a pickled (function, arguments): an ordinary exception, also of unpickling, is an outcome like another.

    >>> run_job(pickle.dumps((int, ("seven",)))).message
    "ValueError: invalid literal for int() with base 10: 'seven'"
    """
    began = time.perf_counter()
    try:
        function, arguments = pickle.loads(job)
        function(*arguments)
    except Exception as error:
        return Outcome("raised", f"{type(error).__name__}: {error}", traceback.format_exc())
    return Outcome("finished", seconds=time.perf_counter() - began)


class Here:
    """One worker that is this process, with all its threads: for few or short jobs, and for a debugger."""

    def __init__(self) -> None:
        self._ended: list[tuple[str, Outcome]] = []

    def free(self) -> int:
        return 1 - len(self._ended)

    def submit(self, name: str, job: bytes) -> None:
        self._ended.append((name, run_job(job)))

    def wait(self) -> list[tuple[str, Outcome]]:
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        self._ended = []


@dataclass
class _Process:
    process: BaseProcess
    connection: Connection
    job: str | None = None
    ready: bool = False


class Processes:
    """Spawned processes of this machine, one thread each.

    They leave by themselves when this process dies, however it dies, and do not hear Ctrl-C, which is this process's.

    Args:
        count: how many.
        gpus: what each worker in turn sees as its only GPU (a value of CUDA_VISIBLE_DEVICES); empty: no restriction.
    """

    def __init__(self, count: int, gpus: Sequence[str] = ()) -> None:
        self._context: Any = multiprocessing.get_context(START_METHOD)
        self._gpus = gpus
        self._slots: list[_Process | None] = [None] * count
        self._failed_starts = 0

    def free(self) -> int:
        return sum(slot is None or slot.job is None for slot in self._slots)

    def submit(self, name: str, job: bytes) -> None:
        index = next(i for i, slot in enumerate(self._slots) if slot is None or slot.job is None)
        slot = self._slots[index]
        if slot is None or not slot.process.is_alive():  # an idle one may have been killed
            self._stop(slot)
            slot = self._slots[index] = self._start(index)
        slot.job = name
        with contextlib.suppress(OSError):  # it died this moment: waiting for it says so
            slot.connection.send_bytes(job)

    def wait(self) -> list[tuple[str, Outcome]]:
        ended: list[tuple[str, Outcome]] = []
        while not ended:
            running = {slot.connection: i for i, slot in enumerate(self._slots) if slot is not None and slot.job}
            for connection in wait(list(running)):
                index = running[connection]  # type: ignore[index]
                slot = self._slots[index]
                assert slot is not None
                assert slot.job is not None
                try:
                    outcome = slot.connection.recv()
                except (EOFError, OSError):
                    ended.append((slot.job, self._bury(index, slot)))
                    continue
                if outcome is None:  # it has started
                    slot.ready, self._failed_starts = True, 0
                    continue
                ended.append((slot.job, outcome))
                slot.job = None
        return ended

    def close(self) -> None:
        for slot in self._slots:
            if slot is not None:
                slot.process.kill()
        for slot in self._slots:
            self._stop(slot)
        self._slots = [None] * len(self._slots)

    def _start(self, index: int) -> _Process:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True, name=f"revprop worker {index}")
        gpu = {"CUDA_VISIBLE_DEVICES": self._gpus[index % len(self._gpus)]} if self._gpus else {}
        resource_tracker.ensure_running()  # it would lift the blocking of Ctrl-C when it starts
        with _environment({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **gpu}), _without_interrupts():
            process.start()
        theirs.close()  # so that the pipe ends when the worker does
        return _Process(process, ours)

    def _bury(self, index: int, slot: _Process) -> Outcome:
        slot.process.join(1)
        self._stop(slot)
        self._slots[index] = None
        code = slot.process.exitcode or 0
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name + (": killed, perhaps for want of memory" if code == -9 else "")
        if slot.ready:
            return Outcome("died", f"its worker died ({how})")
        self._failed_starts += 1
        if self._failed_starts >= FAILED_STARTS:
            raise RuntimeError(
                f"{self._failed_starts} workers died before they were ready ({how}). Started from a script of your own? "
                'Then call it under: if __name__ == "__main__". Or run in this process: workers=1'
            )
        return Outcome("lost", f"its worker died while it started ({how})")

    @staticmethod
    def _stop(slot: _Process | None) -> None:
        if slot is not None:
            slot.process.kill()
            slot.process.join()
            slot.connection.close()


def _serve(connection: Connection) -> None:
    """What a spawned worker does: jobs from the pipe, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    try:
        connection.send(None)
        while True:
            connection.send(run_job(connection.recv_bytes()))
    except (EOFError, OSError):  # the other end is gone
        os._exit(1)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for the processes started inside: what reads them does so when it is first loaded."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end of this block; processes started inside never hear it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RayActors:
    """Persistent actors of a Ray cluster, one core each: of the one at RAY_ADDRESS, else of one started here.

    Every machine must see the same folder of results, under the same path.

    Args:
        count: how many; None for as many as the cluster has GPUs, or cores where ``gpu`` is false.
        gpu: whether each has a GPU to itself.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, count: int | None = None, gpu: bool = False) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ImportError("engine='ray' needs Ray: pip install 'revprop[cluster]'") from error
        self._ours = not self._ray.is_initialized()
        if self._ours:
            here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": count, "include_dashboard": False}
            paths = os.pathsep.join(path for path in sys.path if path)  # a user's own modules lie there
            one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": paths}
            self._ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": one}, **here)
        there = self._ray.cluster_resources()
        self._count = count or max(1, int(there.get("GPU" if gpu else "CPU", 1)))
        self._actor: Callable[[], Any] = self._ray.remote(num_cpus=1, num_gpus=int(gpu))(_Actor).remote
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[str, Any]] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return self._count

    def free(self) -> int:
        return self._count - len(self._running)

    def submit(self, name: str, job: bytes) -> None:
        actor = self._idle.pop() if self._idle else self._actor()
        self._running[actor.run.remote(job)] = (name, actor)

    def wait(self) -> list[tuple[str, Outcome]]:
        ended = []
        for result in self._ray.wait(list(self._running), num_returns=1)[0]:
            name, actor = self._running.pop(result)
            try:
                outcome = Outcome(*self._ray.get(result))
                self._idle.append(actor)
            except self._ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines()
                outcome = Outcome(
                    "died", f"its worker died ({lines[0] if lines else type(error).__name__})", str(error)
                )
                with contextlib.suppress(Exception):
                    self._ray.kill(actor)
            ended.append((name, outcome))
        return ended

    def close(self) -> None:
        for actor in [*self._idle, *(actor for _, actor in self._running.values())]:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()


class _Actor:
    def __init__(self) -> None:
        importlib.import_module("torch").set_num_threads(1)

    def run(self, job: bytes) -> tuple[Any, ...]:
        return astuple(run_job(job))
