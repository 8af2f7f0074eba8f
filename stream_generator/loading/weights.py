"""Weights from safetensors files, and weights that are packed when they are read."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stream_generator.loading.weight_names import key_mapping, renamed
from stream_generator.model.packed_weight import GROUP, NotBuildable, PackedWeight, Weights

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class SafetensorsWeights:
    """The weights of safetensors files. Reads each tensor only when it is asked for.

    names: the names of all weights, without those of wrappers.
    """

    def __init__(self, files: list[Path], *, tied: bool = False):
        """tied: whether the embedding is the output matrix if the files hold no other one."""
        self._tied = tied
        self._files = [safe_open(file, framework="pt") for file in files]
        stored = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118
        mapping = key_mapping(stored)
        self._place_of: dict[str, tuple[Any, str]] = {
            renamed(name, mapping): (file, name) for name, file in stored.items()
        }
        self.names = set(self._place_of)

    def packed(self, module: str) -> PackedWeight | None:
        """Return None, because these files hold no packed weights."""
        return None

    def dense(self, parameter: str) -> torch.Tensor:
        """Read a parameter. Raises `KeyError` if the files lack it."""
        if self._tied and parameter == f"{HEAD}.weight" and parameter not in self._place_of:
            parameter = f"{EMBEDDING}.weight"
        file, name = self._place_of[parameter]
        tensor: torch.Tensor = file.get_tensor(name)
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
        """Read a parameter as a dense tensor. If `packed` packs it, it has the same rounded values.

        Raises `KeyError` if it is missing.
        """
        module = parameter.removesuffix(".weight")
        if module in (parameter, EMBEDDING):  # not packed here
            return self._weights.dense(parameter)
        dense = self._weights.dense(parameter)
        if dense.dim() == 1 or self._weights.packed(module) is not None:
            return dense
        packed = self.packed(module)
        assert packed is not None
        return packed.dense()
