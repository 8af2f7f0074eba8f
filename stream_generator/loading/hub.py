"""Downloads models from the Hugging Face hub into its cache: one file, or metadata and weights.

huggingface-hub reads `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE`.
"""

import contextlib
import functools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import DryRunError, GatedRepoError

from stream_generator.errors import CheckpointError
from stream_generator.loading.diagnosis import (
    read_json,
    reject_adapter,
    reject_other_kind,
    reject_packed_for_mlx,
)
from stream_generator.loading.gguf.parts import part_names
from stream_generator.loading.untrusted import reject_unsafe, weight_files

METADATA = ["*.json", "*.jinja", "*.model", "*.txt"]  # all files but the weights
WEIGHTS = "weights in Hugging Face format"
IN_DIRECTORIES = "*/*"  # where repositories keep the same weights for other programs


def download_model(name: str, revision: str | None, *, allow_pickle: bool = False) -> Path:
    """Download a model in Hugging Face format; return its directory in the hub's cache.

    Downloads the metadata first, so that an unsafe model is rejected before its weights are
    downloaded. allow_pickle: download pickled weights if there are no others.
    Raises `CheckpointError` if the download fails, the model is unsafe, or the disk is too full.
    """
    directory = _download(name, revision, METADATA, IN_DIRECTORIES)
    if not directory.is_dir():
        raise _not_found(name, revision, WEIGHTS)
    reject_unsafe(directory)
    reject_packed_for_mlx(directory)
    if isinstance(config := read_json(directory / "config.json"), dict):
        reject_other_kind(directory, SimpleNamespace(**{"model_type": ""} | config))
    else:
        reject_adapter(directory)
    kinds = ("model.safetensors", "pytorch_model.bin")[: 2 if allow_pickle else 1]
    for kind in kinds:
        files = weight_files(directory, kind)
        _download(name, revision, files)
        if all((directory / file).is_file() for file in files):
            reject_adapter(directory)
            return directory
    reject_adapter(directory)
    raise _not_found(name, revision, WEIGHTS)


def download_file(name: str, file: str, revision: str | None) -> Path:
    """Download a GGUF file, with all of its parts; return the path of the file that is named.

    Raises `CheckpointError` if the download fails.
    """
    parts = part_names(file)
    directory = _download(name, revision, parts)
    for part in parts:
        if not (directory / part).is_file():
            raise _not_found(name, revision, part)
    return directory / file


def _download(name: str, revision: str | None, files: list[str], ignored: str = "") -> Path:
    """Download files that the cache lacks; return their directory. files, ignored: patterns."""
    download = functools.partial(
        snapshot_download, name, revision=revision, allow_patterns=files, ignore_patterns=ignored
    )
    try:
        missing = 0
        with contextlib.suppress(DryRunError):  # offline: the cached files must be enough
            plan: Any = download(dry_run=True)
            missing = sum(file.file_size for file in plan if file.will_download)
        directory = Path(constants.HF_HUB_CACHE)
        directory.mkdir(parents=True, exist_ok=True)
        if missing > (free := shutil.disk_usage(directory).free):
            raise CheckpointError(
                f"downloading {name} takes {missing / 1e9:.1f} GB of disk in {directory}, but "
                f"{free / 1e9:.1f} GB are free; free some space, or set HF_HOME to another disk"
            )
        return Path(download())
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: request access on its page on the hub, then set HF_TOKEN"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # such as those of the hub's HTTP library
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"could not download {name} from the hub: {reason}; check the path or id, the revision "
            "and the network"
        ) from error


def _not_found(name: str, revision: str | None, wanted: str) -> CheckpointError:
    """Return an error that says what the repository holds. wanted: what it lacks."""
    try:
        files = sorted(HfApi().list_repo_files(name, revision=revision))
    except Exception as error:  # such as those of the hub's HTTP library
        return CheckpointError(
            f"the cache holds no {wanted} for {name}, and the hub cannot be reached ({error}); "
            "connect to a network and unset HF_HUB_OFFLINE"
        )
    if ggufs := [file for file in files if file.endswith(".gguf")]:
        source = f"{name}@{revision}" if revision else name
        remedy = f"name one of them: {', '.join(f'{source}:{file}' for file in ggufs[:8])}"
        return CheckpointError(f"{name} holds no {wanted}, but it holds GGUF files; {remedy}")
    if wanted == WEIGHTS and any(file.endswith(".bin") for file in files):
        return CheckpointError(
            f"{name} has only pickled weights; --allow-pickle reads them, as plain tensors only"
        )
    found = ", ".join(files[:8]) or "nothing"
    return CheckpointError(f"{name} holds no {wanted} (found: {found}); use another model or file")
