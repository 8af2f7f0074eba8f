"""Weights from safetensors files, and weights that are packed when they are read."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stream_generator.model.packed_weight import GROUP, NotBuildable, PackedWeight, Weights

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class SafetensorsWeights:
    """The weights of safetensors files. Reads each tensor only when it is asked for."""

    def __init__(self, files: list[Path]):
        self._files = [safe_open(file, framework="pt") for file in files]
        self._file_of: dict[str, Any] = {n: file for file in self._files for n in file.keys()}  # noqa: SIM118

    def packed(self, module: str) -> PackedWeight | None:
        """Return None, because these files hold no packed weights."""
        return None

    def dense(self, parameter: str) -> torch.Tensor:
        """Read a parameter. Raises `KeyError` if the files lack it."""
        if parameter not in self._file_of and parameter == f"{HEAD}.weight":
            parameter = f"{EMBEDDING}.weight"  # tied weights
        tensor: torch.Tensor = self._file_of[parameter].get_tensor(parameter)
        return tensor


class PackedOnRead:
    """Packs weights when they are read, unless the source has packed them already.

    Leaves the embedding as it is, because looking up a row is cheap. Packs the output matrix in
    eight bits.
    """

    def __init__(self, weights: Weights, bits: int):
        self._weights, self._bits = weights, bits

    def packed(self, module: str) -> PackedWeight | None:
        """Read a packed weight. Raises `NotBuildable` if its inputs do not form whole groups."""
        packed = self._weights.packed(module)
        if packed is not None or module == EMBEDDING:
            return packed
        weight = self._weights.dense(f"{module}.weight")
        if weight.shape[1] % GROUP:
            raise NotBuildable(f"{module} has {weight.shape[1]} inputs, not a multiple of {GROUP}")
        return PackedWeight.of(weight, 8 if module == HEAD else self._bits)

    def dense(self, parameter: str) -> torch.Tensor:
        """Read a parameter, rounded as packing rounds it. Raises `KeyError`."""
        module = parameter.removesuffix(".weight")
        if module in (parameter, EMBEDDING):  # not packed here
            return self._weights.dense(parameter)
        dense = self._weights.dense(parameter)
        if dense.dim() == 1 or self._weights.packed(module) is not None:
            return dense
        packed = self.packed(module)
        assert packed is not None
        return packed.dense()
