"""The cache directory for downloaded and converted models."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

from stream_generator.errors import CheckpointError

MODELS = "models"
# Entries that earlier versions of this project have left.
OLD_PATTERNS = ("converted", "packed", "SmolLM2-135M-Instruct-*")


def cache_directory() -> Path:
    """Return the user's cache directory; on Linux, XDG_CACHE_HOME moves it."""
    return platformdirs.user_cache_path("llm-stream-service")


class SourceCache:
    """Keeps directories made from one source: one of each kind, such as "dense" or "graph"."""

    def __init__(self, source: Path, files: Iterable[Path], cache: Path | None = None):
        """source: a file or directory. files: a change to any of them outdates all directories."""
        self._state = _file_states(files)
        name = f"{source.resolve().name}-{_fingerprint(source.resolve())[:8]}"
        self._directory = (cache or cache_directory()) / MODELS / name

    def get(self, kind: str, version: object, make: Callable[[Path], None], size: int = 0) -> Path:
        """Return the directory of a kind in this version; make it if it is missing.

        Making it removes other versions. `make_once` explains `make`, `size` and the errors.
        """
        path = self._directory / f"{kind}-{_fingerprint(version, self._state)}"
        if os.path.isdir(path):
            return path
        make_once(path, make, size)
        for older in self._directory.glob(f"{kind}-{'[0-9a-f]' * 16}*"):
            if not older.name.startswith(path.name):
                _remove(older)
        return path


def make_once(directory: Path, make: Callable[[Path], None], size: int = 0) -> Path:
    """Return `directory`. If it is missing, one process at a time creates it by `make(path)`.

    `path` is temporary and is renamed at the end, so `directory` is always complete. size: the
    bytes of `directory`. Raises `CheckpointError` if the cache is not writable or the disk is full.
    """
    if os.path.isdir(directory):  # False without permission, where Path.is_dir raises
        return directory
    with lock(directory.with_name(f"{directory.name}.lock")):
        if directory.is_dir():
            return directory
        if size > (free := shutil.disk_usage(directory.parent).free):
            raise CheckpointError(
                f"the converted model takes {size / 1e9:.1f} GB of disk in {directory.parent}, but "
                f"{free / 1e9:.1f} GB are free; free some space, or set XDG_CACHE_HOME to another "
                "disk"
            )
        making = directory.with_name(f"making-{directory.name}-")
        for remains in directory.parent.glob(f"{making.name}*"):  # left by an interruption
            shutil.rmtree(remains, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=making.parent, prefix=making.name) as folder:
            make(Path(folder) / "made")
            os.replace(Path(folder) / "made", directory)
    return directory


def lock(path: Path) -> AbstractContextManager[object]:
    """Lock a file of the cache. Raises `CheckpointError` if its directory is not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path).acquire()
    except OSError as error:
        raise CheckpointError(
            f"could not write to the cache directory {path.parent} ({error.strerror}); set "
            "XDG_CACHE_HOME to a writable directory"
        ) from error


@dataclass(frozen=True)
class CacheEntry:
    """A directory in the cache. parts: the kinds that it holds. size: bytes."""

    name: str
    parts: list[str]
    size: int


def entries(cache: Path | None = None) -> list[CacheEntry]:
    return [
        CacheEntry(
            path.name,
            sorted({part.name.rpartition("-")[0] for part in path.iterdir() if part.is_dir()}),
            sum(file.lstat().st_size for file in path.rglob("*") if file.is_file()),
        )
        for path in _entry_paths(cache)
    ]


def delete(name: str, cache: Path | None = None) -> None:
    """Delete an entry. Raises `CheckpointError` if no entry has this name."""
    for path in _entry_paths(cache):
        if path.name == name:
            return _remove(path)
    raise CheckpointError(f"no cache entry is named {name}; --cache lists all entries")


def remove_old(cache: Path | None = None) -> None:
    """Remove entries that earlier versions of this project have left."""
    for pattern in OLD_PATTERNS:
        for path in (cache or cache_directory()).glob(pattern):
            _remove(path)


def _fingerprint(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _file_states(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and time of each file, which differ after another download."""
    states = ((path, path.stat()) for path in sorted(files))
    return [(str(path.resolve()), s.st_size, s.st_mtime_ns) for path, s in states]


def _entry_paths(cache: Path | None) -> list[Path]:
    top = cache or cache_directory()
    paths = [*top.glob("*"), *(top / MODELS).glob("*")]
    return sorted(path for path in paths if path.is_dir() and path.name != MODELS)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
