"""Writes weights as safetensors files with an index, about one file in memory at a time."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

PART_BYTES = 2 * 1024**3  # of one weight file, and about what is in memory at a time


def write_weights(weights: Iterable[tuple[str, torch.Tensor]], directory: Path) -> None:
    """Write named weights into a directory, in parts of about `PART_BYTES`."""
    part: dict[str, torch.Tensor] = {}
    file_by_name: dict[str, str] = {}
    total = size = 0

    def write() -> None:
        name = f"model-{len(set(file_by_name.values())) + 1:05}.safetensors"
        save_file(part, directory / name, metadata={"format": "pt"})
        file_by_name.update(dict.fromkeys(part, name))
        part.clear()

    for name, tensor in weights:
        part[name] = tensor.contiguous()
        total += tensor.nbytes
        size += tensor.nbytes
        if size > PART_BYTES:
            write()
            size = 0
    if part:
        write()
    index = {"metadata": {"total_size": total}, "weight_map": file_by_name}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
