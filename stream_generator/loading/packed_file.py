"""A file of packed weights, by the names of the model's modules. Four bits are two to a byte."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stream_generator.quantization import PackedWeight


def save_packed(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """tensors: `PackedWeight.tensors` of all weights."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


class PackedFile(Mapping[str, PackedWeight]):
    """Each weight is read when it is asked for: unpacked, all at once would take twice the room."""

    def __init__(self, path: Path):
        """Raises `SafetensorError` or `OSError` for a file that cannot be read."""
        self._file = safe_open(path, framework="pt")
        self._kinds: dict[str, list[str]] = {}
        for key in self._file.keys():  # noqa: SIM118 - it is no mapping
            name, _, kind = key.rpartition(".")
            self._kinds.setdefault(name, []).append(kind)

    def __getitem__(self, name: str) -> PackedWeight:
        kinds = self._kinds[name]
        return PackedWeight.of_tensors({k: self._file.get_tensor(f"{name}.{k}") for k in kinds})

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)
