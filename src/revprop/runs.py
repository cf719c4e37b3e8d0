"""Where results live: one JSON file per finished run, in one folder.

A file is named by the hash of the settings of its run, written under another name and renamed when complete, and never
changed afterwards. So a folder can be read while a sweep writes into it, several processes can share it, and whatever
is killed loses only the run it was in: the same command again finds the finished rows and computes the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import tempfile
import uuid
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = Mapping[str, Any] | DataclassInstance

Row = dict[str, Any]
AnySettings = TypeVar("AnySettings", bound="Settings")

ADDED_KEYS = ("settings", "versions", "commit", "machine", "finished")


class RunStore:
    """The finished runs of one folder.

    The folder is made by the first :meth:`put`; a store on a folder that is not there is an empty store.

    Args:
        folder: where the files are. Any number of processes may read and write it at once.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = RunStore(Path(folder.name))
        >>> row = store.run({"alpha": 0.5, "seed": 0}, lambda settings: {"accuracy": 1 - settings["alpha"]})
        >>> row["accuracy"], len(store.rows())
        (0.5, 1)
        >>> store.get({"seed": 0, "alpha": 0.5}) == row, store.get({"alpha": 0.5, "seed": 1}) is None
        (True, True)
        >>> folder.cleanup()
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def key(self, settings: Settings) -> str:
        """Name the settings: the first 16 hexadecimal digits of the SHA-256 of their canonical JSON.

        The order of the keys does not matter, nor whether a whole number is written ``1`` or ``1.0``, nor whether the
        settings are a mapping or a dataclass with the same fields.

        Args:
            settings: a mapping or a dataclass of numbers, texts, truth values, None, and lists or mappings of these.

        Returns:
            16 hexadecimal digits.

        Raises:
            TypeError: a value has no JSON form; the message names it.
            ValueError: a value is NaN or infinite; the message names it.

        Example:
            >>> store = RunStore(Path("runs"))
            >>> store.key({"seed": 0, "alpha": 1}) == store.key({"alpha": 1.0, "seed": 0})
            True
        """
        canonical = _whole_numbers_as_integers(_plain(settings, "settings"))
        text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]

    def get(self, settings: Settings) -> Row | None:
        """Look a finished run up.

        Args:
            settings: the settings of the run.

        Returns:
            Its row, or None where there is none. A file that is no row counts as none, with a warning.

        Raises:
            TypeError, ValueError: as :meth:`key` does.

        Example:
            >>> RunStore(Path("no/such/folder")).get({"seed": 0}) is None
            True
        """
        return _read_row(self._path(settings))

    def put(self, settings: Settings, result: Mapping[str, Any]) -> Row:
        """Store the result of a finished run.

        Args:
            settings: the settings of the run, which name it.
            result: what it found: numbers, texts, truth values, None, lists and mappings of these; NumPy and PyTorch
                scalars and arrays are stored as numbers and lists.

        Returns:
            The row as stored: the settings, the result, and added to them ``versions`` (of python, torch, numpy and
            revprop), ``commit`` (of the checkout the package runs from, ``-dirty`` behind it where tracked files
            differ from it; None outside a checkout), ``machine`` and ``finished`` (time in UTC, ISO 8601).

        Raises:
            FileExistsError: these settings have a row already. The store only grows.
            TypeError: a value has no JSON form; the message names it.
            ValueError: a value is NaN or infinite, or a key of the result is one that the store adds.

        Example:
            >>> RunStore(Path("runs")).put({"seed": 0}, {"history": [{"loss": float("nan")}]})
            Traceback (most recent call last):
            ...
            ValueError: result.history[0].loss is nan: ...
        """
        path = self._path(settings)
        taken = [key for key in ADDED_KEYS if key in result]
        if taken:
            raise ValueError(f"the store adds {', '.join(taken)} to every row: rename that part of the result")
        row: Row = {
            "settings": _plain(settings, "settings"),
            **_plain(result, "result"),
            "versions": dict(_versions()),
            "commit": _commit(),
            "machine": dict(_machine()),
            # Microseconds always: so the texts have one length, and their order is the order in time.
            "finished": datetime.now(UTC).isoformat(timespec="microseconds"),
        }
        already = f"{path} has the result of these settings already: the store only grows; delete it to run again"
        # A truncated file is no result: it is replaced. Two processes that pass this line at once with the same
        # settings both write, the later rename stands, and a reader sees one complete row or the other.
        if _read_row(path) is not None:
            raise FileExistsError(already)
        try:
            write_atomically(path, json.dumps(row, indent=2, allow_nan=False) + "\n")
        except FileNotFoundError:
            if path.exists():  # a process with the same settings finished first, and swept our unfinished file away
                raise FileExistsError(already) from None
            raise
        for leftover in self.folder.glob(f".{path.name}.*.tmp"):  # of runs with these settings that were killed
            with contextlib.suppress(PermissionError):  # Windows: another process has it open, so it is no leftover
                leftover.unlink(missing_ok=True)
        return row

    def run(self, settings: AnySettings, function: Callable[[AnySettings], Mapping[str, Any]]) -> Row:
        """Return the stored row of these settings, or run them and store it.

        Args:
            settings: the settings of the run.
            function: called with the settings, as given, where there is no row yet; returns the result.

        Returns:
            The row. If another process stored one for the same settings meanwhile, that one.

        Raises:
            TypeError, ValueError: as :meth:`put` does; and whatever the function raises, with nothing stored.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     first = RunStore(Path(folder)).run({"seed": 3}, lambda settings: {"twice": 2 * settings["seed"]})
            ...     again = RunStore(Path(folder)).run({"seed": 3}, lambda settings: {"twice": None})
            >>> again["twice"]
            6
        """
        row = self.get(settings)
        if row is not None:
            return row
        result = function(settings)
        try:
            return self.put(settings, result)
        except FileExistsError:
            row = self.get(settings)
            if row is None:
                raise
            return row

    def rows(self) -> list[Row]:
        """Read all finished runs.

        Returns:
            The rows in the order they finished. Files that are not complete rows (still being written, left behind by
            a killed run, truncated, edited into something else) are skipped, each with a warning that names it.

        Example:
            >>> RunStore(Path("no/such/folder")).rows()
            []
        """
        for unfinished in sorted(self.folder.glob(".*.tmp")):
            warnings.warn(
                f"{unfinished} is skipped: it is being written now, or a run was killed while writing it", stacklevel=2
            )
        rows = [row for path in sorted(self.folder.glob("*.json")) if (row := _read_row(path)) is not None]
        return sorted(rows, key=lambda row: str(row["finished"]))

    def to_parquet(self, path: Path) -> None:
        """Write all finished runs as one Parquet file, for other tools: one line per run, nested parts as structures.

        Args:
            path: the file to write; replaced, in one step, if it is there.

        Raises:
            ValueError: there is no finished run.

        Example:
            >>> import tempfile
            >>> import duckdb
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     row = RunStore(Path(folder)).put({"seed": 1}, {"accuracy": 0.75})
            ...     RunStore(Path(folder)).to_parquet(Path(folder) / "runs.parquet")
            ...     duckdb.read_parquet(folder + "/runs.parquet").project("settings.seed, accuracy").fetchall()
            [(1, 0.75)]
        """
        import duckdb  # here, because nothing else needs it

        rows = self.rows()
        if not rows:
            raise ValueError(f"{self.folder} holds no finished run: there is nothing to write to {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(path)
        # Not the files of the folder themselves: duckdb takes *, ? and [ in a folder's name for patterns.
        with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
            lines = Path(folder, "rows.ndjson")
            lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            try:
                connection.sql(
                    "SELECT * FROM read_json_auto($lines, format = 'newline_delimited', sample_size = -1,"
                    " maximum_object_size = 1073741824)",
                    params={"lines": str(lines)},
                ).write_parquet(str(temporary))
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def _path(self, settings: Settings) -> Path:
        return self.folder / f"{self.key(settings)}.json"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader finds the old content or the whole new one, whatever is killed when.

    Args:
        path: the file; its folder is made if need be.
        text: the content, stored as UTF-8.

    Raises:
        OSError: the content cannot be written; the file is then as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder) / "report" / "page.html", "<p>done</p>")
        ...     (Path(folder) / "report" / "page.html").read_text()
        '<p>done</p>'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            # Without this a power cut can leave the new name on blocks that were never written.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is the system's business
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _temporary_name(path: Path) -> Path:
    # In the same folder, because a rename is atomic only within one file system.
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")


def _read_row(path: Path) -> Row | None:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        warnings.warn(f"{path} is skipped: it is truncated or not JSON ({error})", stacklevel=3)
        return None
    if not (isinstance(row, dict) and isinstance(row.get("settings"), dict) and isinstance(row.get("finished"), str)):
        warnings.warn(f"{path} is skipped: it is JSON, but no run (it has no settings, or no time)", stacklevel=3)
        return None
    return row


def _plain(value: object, where: str) -> Any:
    """Turn a value into what JSON can hold, or say which part of it cannot be."""
    if isinstance(value, enum.Enum):
        return _plain(value.value, where)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {float(value)}: rows hold finite numbers; None says that there is none")
        return float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), f"{where}.{name}") for name in names}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON has text keys only; use {str(key)!r}")
        return {str(key): _plain(part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, f"{where}[{position}]") for position, part in enumerate(value)]
    if hasattr(value, "tolist"):  # a scalar or an array of NumPy or PyTorch, neither of which is needed here
        return _plain(value.tolist(), where)
    raise TypeError(
        f"{where} is a {type(value).__name__}: rows hold numbers, texts, bools, None, lists and mappings of these"
    )


def _whole_numbers_as_integers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole_numbers_as_integers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_whole_numbers_as_integers(part) for part in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:  # beyond, floats skip integers
        return int(value)
    return value


@functools.cache
def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "numpy", "revprop"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


@functools.cache  # asked once: the code that runs is the code that was loaded
def _commit() -> str | None:
    here = Path(__file__).resolve()
    # An installed copy may lie in an environment inside some other project's checkout: that commit says nothing.
    if _output_of("git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _output_of("git", "-C", str(here.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


@functools.cache
def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # no such question on this system
        memory = None
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return {"processor": _processor(), "cores": cores, "memory_gib": memory, "system": system}


def _processor() -> str:
    # platform.processor() is empty or just the architecture on Linux and macOS.
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    brand = _output_of("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else None
    return brand or platform.processor() or platform.machine()


def _output_of(*command: str) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # asking must not touch the index of the checkout
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
