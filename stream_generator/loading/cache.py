"""Where this project keeps what it has brought or made, and how it is made: once, and whole."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import platformdirs
from filelock import FileLock

from stream_generator.errors import CheckpointError


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
