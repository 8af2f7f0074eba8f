"""What a checkpoint from elsewhere must not hold, found before any of it is loaded."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stream_generator.errors import CheckpointError

_PLAIN_NAME = re.compile(r"\w[\w.-]*")


def refuse_unsafe(directory: Path) -> None:
    """Raise `CheckpointError` where a directory names code of its own, or leads out of itself."""
    for file in [*directory.glob("*config.json"), *directory.glob("*.index.json")]:
        content = _content(file)
        for key, value in _entries(content):
            if key == "auto_map":
                raise CheckpointError(
                    f"{file} names code of the checkpoint's own (auto_map), which is not run here; "
                    "use a model that transformers itself knows, or take auto_map out if it does"
                )
            if key.endswith("attn_implementation") and "/" in str(value):
                raise CheckpointError(
                    f"{file} names code to fetch from the hub ({value}), which is not run here; "
                    "take that entry out"
                )
        if file.name.endswith(".index.json"):
            for part in _parts(file):
                if not _PLAIN_NAME.fullmatch(part):  # nor is it a pattern
                    raise CheckpointError(f"{file} leads out of its directory ({part})")
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} holds an adapter, which names a model elsewhere; merge the two, and give "
            "the merged model"
        )
    # The hub's own cache keeps what a directory links to in one beside it.
    allowed = [directory.resolve(), directory.resolve().parent.parent / "blobs"]
    for file in directory.iterdir():
        target = file.resolve()
        if file.is_symlink() and not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{file} is a link out of its directory, to {target}; put the files themselves "
                "there, or name the directory that they are in"
            )


def refuse_pickle(directory: Path) -> None:
    """Raise `CheckpointError` for weights that are pickled alone: reading a pickle can run code."""
    if any(directory.glob("model*.safetensors*")):
        return
    if pickled := sorted(p.name for kind in ("*.bin", "*.pt") for p in directory.glob(kind)):
        raise CheckpointError(
            f"{directory} has pickled weights alone ({pickled[0]}), which can run code when they "
            "are read; use a version in safetensors, or --allow-pickle, which reads them as plain "
            "tensors"
        )


def weight_files(directory: Path, single: str) -> list[str]:
    """The files of weights that an index names; without one, `single` alone."""
    index = directory / f"{single}.index.json"
    return _parts(index) if index.is_file() else [single]


def _parts(index: Path) -> list[str]:
    content = _content(index)
    parts = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise CheckpointError(f"{index} is no index of weights; download it again")
    return sorted(set(parts.values()))


def _content(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download it again") from error


def _entries(value: object) -> Iterator[tuple[str, object]]:
    """Every key with its value, however deep in a JSON value."""
    if isinstance(value, dict):
        yield from value.items()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from _entries(item)
