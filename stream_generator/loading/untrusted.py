"""Rejects unsafe checkpoints before anything else reads them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stream_generator.errors import CheckpointError

_PLAIN_NAME = re.compile(r"\w[\w.-]*")


def reject_unsafe(directory: Path) -> None:
    """Raise `CheckpointError` if a checkpoint asks to run code, or is an adapter.

    Also raise if one of its indexes or links leads to a file outside of its directory.
    """
    for file in [*directory.glob("*config.json"), *directory.glob("*.index.json")]:
        for key, value in _all_items(_read_json(file)):
            if key == "auto_map":
                raise CheckpointError(
                    f"{file} asks to run code of the checkpoint (auto_map), which is never run; "
                    "delete auto_map if transformers supports the model, or use another model"
                )
            if key.endswith("attn_implementation") and "/" in str(value):
                raise CheckpointError(
                    f"{file} asks to run code from the hub ({key}: {value}), which is never run; "
                    f"delete {key}"
                )
        if file.name.endswith(".index.json"):
            for name in _names_in_index(file):
                if not _PLAIN_NAME.fullmatch(name):  # a path, or a pattern
                    raise CheckpointError(
                        f"{file} names the weight file {name!r}, which is not a plain file name; "
                        "download the model from a source that you trust"
                    )
    # In the hub's cache, the files of a snapshot are links into the directory `blobs`.
    allowed = [directory.resolve(), directory.resolve().parent.parent / "blobs"]
    for file in directory.iterdir():
        target = file.resolve()
        if file.is_symlink() and not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{file} links to {target}, which is outside the checkpoint; replace the link with "
                "a copy, or name the directory that holds the files"
            )


def reject_pickle(directory: Path) -> None:
    """Raise `CheckpointError` if all weights are pickled, because reading a pickle can run code."""
    if any(directory.glob("model*.safetensors*")):
        return
    if pickled := sorted(p.name for kind in ("*.bin", "*.pt") for p in directory.glob(kind)):
        raise CheckpointError(
            f"{directory} has only pickled weights ({pickled[0]}), and reading a pickle can run "
            "code; use a version in safetensors, or --allow-pickle, which reads only plain tensors"
        )


def weight_files(directory: Path, single: str) -> list[str]:
    """List the weight files that the index of `single` names; without an index, `single`."""
    index = directory / f"{single}.index.json"
    return _names_in_index(index) if index.is_file() else [single]


def _names_in_index(index: Path) -> list[str]:
    content = _read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(
            f"{index} is not an index of weights; take it from the model's own page"
        )
    return sorted(set(names.values()))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())  # in any encoding of Unicode, with or without a mark
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not JSON ({error}); correct it, or take it from the model's own page"
        ) from error


def _all_items(value: object) -> Iterator[tuple[str, object]]:
    """Yield every key with its value, at all depths of a JSON value."""
    if isinstance(value, dict):
        yield from value.items()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from _all_items(item)
