"""Models of the Hugging Face hub, brought into its own cache: no more of them than is loaded.

`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are read by huggingface-hub.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import DryRunError, GatedRepoError

from stream_generator.errors import CheckpointError
from stream_generator.loading.gguf.file import refuse_part
from stream_generator.loading.untrusted import refuse_unsafe, weight_files

FACTS = ["*.json", "*.jinja", "*.model", "*.txt"]  # what describes a model
IN_DIRECTORIES = "*/*"  # the same weights for other programs


def downloaded_model(name: str, revision: str | None, *, allow_pickle: bool = False) -> Path:
    """The directory of a model in Hugging Face format, in the hub's cache.

    What describes it comes first, so that what must not be there is refused before its weights
    come. allow_pickle: take pickled weights where there are no others.
    Raises `CheckpointError` where it can't be had, is unsafe, or there is no room for it.
    """
    directory = _downloaded(name, revision, FACTS, IN_DIRECTORIES)
    if not directory.is_dir():
        raise CheckpointError(_no_weights(name, revision))
    refuse_unsafe(directory)
    kinds = ("model.safetensors", "pytorch_model.bin")[: 2 if allow_pickle else 1]
    for kind in kinds:
        files = weight_files(directory, kind)
        _downloaded(name, revision, files)
        if all((directory / file).is_file() for file in files):
            return directory
    raise CheckpointError(_no_weights(name, revision))


def downloaded_file(name: str, file: str, revision: str | None) -> Path:
    """One file of a repository, in the hub's cache. Raises `CheckpointError`."""
    refuse_part(file)
    path = _downloaded(name, revision, [file]) / file
    if not path.is_file():
        raise CheckpointError(f"{name} holds no {file}; {_no_weights(name, revision)}")
    return path


def _downloaded(name: str, revision: str | None, files: list[str], besides: str = "") -> Path:
    """The snapshot's directory. files, besides: patterns of what to bring, and what of it not."""
    download = functools.partial(
        snapshot_download, name, revision=revision, allow_patterns=files, ignore_patterns=besides
    )

    def with_room_for_it() -> Path:
        missing = 0
        with contextlib.suppress(DryRunError):  # offline: what is there must do
            plan: Any = download(dry_run=True)
            missing = sum(file.file_size for file in plan if file.will_download)
        directory = Path(constants.HF_HUB_CACHE)
        directory.mkdir(parents=True, exist_ok=True)
        if missing > (free := shutil.disk_usage(directory).free):
            raise CheckpointError(
                f"{name} takes {missing / 1e9:.1f} GB more of disk in {directory}, where "
                f"{free / 1e9:.1f} GB are free; make room, or set HF_HOME to another place"
            )
        return Path(download())

    return _tried(name, with_room_for_it)


def _tried(what: str, download: Callable[[], Path]) -> Path:
    try:
        return download()
    except GatedRepoError as error:
        raise CheckpointError(
            f"{what} is gated: ask for access on its page on the hub, then set HF_TOKEN"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # its HTTP library's own, among others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"could not get {what} from the hub: {reason}") from error


def _no_weights(name: str, revision: str | None) -> str:
    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except Exception as error:  # its HTTP library's own, among others
        return f"{name} is not wholly in the cache, and the hub cannot be asked: {error}"
    ggufs = [file for file in sorted(files) if file.endswith(".gguf")]
    if ggufs:
        choices = ", ".join(f"{name}:{file}" for file in ggufs[:8])
        return f"{name} holds GGUF files; name one of them: {choices}"
    if any(file.endswith(".bin") for file in files):
        return f"{name} has pickled weights alone; --allow-pickle reads them, as plain tensors"
    return f"{name} has no weights in Hugging Face format (found: {', '.join(files[:8])})"
