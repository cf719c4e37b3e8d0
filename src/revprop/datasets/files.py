"""Files, folders and tar archives read safely: nothing unpacked to disk, damage named, nothing half-read."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

__all__ = ["blame_damage", "name_data", "open_plain", "read_npz", "require_path", "walk_files"]


def walk_files(source: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes] | None]]:
    """Yield each file of a folder (four levels deep) or tar archive with what reads it, and each folder with None.

    An archive is read in one pass: read a file before going on to the next.
    """
    require_path(source)
    if source.is_dir():
        for path in sorted(path for depth in range(1, 5) for path in source.glob("/".join("*" * depth))):
            yield PurePosixPath(path.relative_to(source).as_posix()), None if path.is_dir() else path.read_bytes
        return
    with blame_damage(source), open_plain(source) as file:
        watched = _TailReader(file)
        with tarfile.open(fileobj=cast(IO[bytes], watched), mode="r|") as archive:
            for member in archive:

                def read(member: tarfile.TarInfo = member) -> bytes:
                    with blame_damage(source):
                        content = archive.extractfile(member)
                        return content.read() if content is not None else b""

                if member.isfile() or member.isdir():
                    yield PurePosixPath(member.name), read if member.isfile() else None
            while watched.read(2**20):  # to the end, where gzip checks its sum
                pass
        # Where one member ends, tarfile takes a cut for the end; a whole archive ends in zeros.
        if watched.tail.strip(b"\0") or len(watched.tail) < 1024:
            raise ValueError(f"{source}: the archive is cut off (no end-of-archive mark): get it again")


class _TailReader:
    """A file that remembers the last 1,024 bytes read, the size of the end-of-archive mark."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.tail = file, b""

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.tail = (self.tail + content)[-1024:]
        return content


def open_plain(path: Path) -> IO[bytes]:
    require_path(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if zipped else path.open("rb")


def require_path(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")


@contextmanager
def blame_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise ValueError(f"{path}: the file is cut off ({error}): get it again") from error
    except (gzip.BadGzipFile, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: the file is damaged or of another kind ({error}): get it again") from error


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    require_path(path)
    with blame_damage(path):
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive}
        except (ValueError, TypeError, AttributeError) as error:  # pickles, bad headers, and what is no archive at all
            raise ValueError(f"{path}: expected an .npz archive of plain arrays ({error})") from error


def name_data(path: Path) -> str:
    return path.resolve().name.split(".")[0]
