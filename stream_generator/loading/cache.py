"""Where this project keeps what it has downloaded or made, and how it is made: once, and whole."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

from stream_generator.errors import CheckpointError

MODELS = "models"
# What earlier versions have left.
OLD = ("converted", "packed", "SmolLM2-135M-Instruct-*")


def cache_directory() -> Path:
    """The user's own; XDG_CACHE_HOME moves it on Linux."""
    return platformdirs.user_cache_path("llm-stream-service")


def fingerprint(*facts: object) -> str:
    """A short name for these facts."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def state_of(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of files: another download in the same place differs."""
    states = ((path, path.stat()) for path in sorted(files))
    return [(str(path.resolve()), s.st_size, s.st_mtime_ns) for path, s in states]


class SourceCache:
    """What is made of one source, by kind: one version of each kind is kept."""

    def __init__(self, source: Path, files: Iterable[Path], cache: Path | None = None):
        """source: a file or directory. files: those that all of it is made of."""
        self._state = state_of(files)
        name = f"{source.resolve().name}-{fingerprint(source.resolve())[:8]}"
        self._directory = (cache or cache_directory()) / MODELS / name

    def made(self, kind: str, version: object, make: Callable[[Path], None], size: int = 0) -> Path:
        """The directory of a kind, which `make` fills where this version of it is not there.

        size: bytes that it will take. Older versions are removed. Raises as `made_once` does.
        """
        path = self._directory / f"{kind}-{fingerprint(version, self._state)}"
        if path.is_dir():
            return path
        made_once(path, make, size)
        for older in self._directory.glob(f"{kind}-{'[0-9a-f]' * 16}*"):
            if not older.name.startswith(path.name):
                _remove(older)
        return path


def made_once(directory: Path, make: Callable[[Path], None], size: int = 0) -> Path:
    """`directory`, which `make` fills if it is not there.

    It is made beside its place and then renamed: an interruption leaves nothing half-made. Of two
    processes one makes it. size: bytes that it will take. Raises `CheckpointError` where nothing
    can be written, or there is too little room.
    """
    if directory.is_dir():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"a cache directory is needed, but {directory.parent} cannot be made "
            f"({error.strerror}); set XDG_CACHE_HOME to a place that can be written"
        ) from error
    if size > (free := shutil.disk_usage(directory.parent).free):
        raise CheckpointError(
            f"converting takes {size / 1e9:.1f} GB of disk in {directory.parent}, where "
            f"{free / 1e9:.1f} GB are free; make room, or set XDG_CACHE_HOME to another place"
        )
    making = directory.with_name(f"making-{directory.name}-")
    with FileLock(directory.with_name(f"{directory.name}.lock")):
        if directory.is_dir():
            return directory
        for remains in directory.parent.glob(f"{making.name}*"):  # of an interruption
            shutil.rmtree(remains, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=making.parent, prefix=making.name) as folder:
            make(Path(folder) / "made")
            os.replace(Path(folder) / "made", directory)
    return directory


@dataclass(frozen=True)
class CacheEntry:
    """An entry of the cache. parts: the kinds of what is kept. size: bytes."""

    name: str
    parts: list[str]
    size: int


def entries(cache: Path | None = None) -> list[CacheEntry]:
    """What the cache holds."""
    return [
        CacheEntry(
            path.name,
            sorted({part.name.rpartition("-")[0] for part in path.iterdir() if part.is_dir()}),
            sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        )
        for path in _entry_paths(cache)
    ]


def delete(name: str, cache: Path | None = None) -> None:
    """Delete an entry of the cache. Raises `CheckpointError` for a name that it does not have."""
    for path in _entry_paths(cache):
        if path.name == name:
            return _remove(path)
    raise CheckpointError(f"the cache holds no {name}; --cache lists what it holds")


def remove_old(cache: Path | None = None) -> None:
    """Remove what earlier versions of this project have left."""
    for pattern in OLD:
        for path in (cache or cache_directory()).glob(pattern):
            _remove(path)


def _entry_paths(cache: Path | None) -> list[Path]:
    top = cache or cache_directory()
    paths = [*top.glob("*"), *(top / MODELS).glob("*")]
    return sorted(path for path in paths if path.is_dir() and path.name != MODELS)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
