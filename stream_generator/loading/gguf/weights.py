"""Reads the weights of a GGUF file by transformers' names, packed as the file has them.

Source: the block formats of ggml (Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K), ggml-common.h.
"""

from pathlib import Path
from typing import Any

import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    dequantize,
    get_tensor_name_map,
)
from gguf.quants import Q4_K

from stream_generator.model.packed_weight import GROUP, PackedWeight

# Bytes before the values in a block of 32 weights: a scale, and for Q4_1 a minimum.
_HEADER_BYTES = {
    GGMLQuantizationType.Q4_0: 2,
    GGMLQuantizationType.Q4_1: 4,
    GGMLQuantizationType.Q8_0: 2,
}
# Bits of a weight in formats with blocks of 256: eight groups of 32, each with a scale and minimum.
_GROUPED_BITS = {GGMLQuantizationType.Q4_K: 4, GGMLQuantizationType.Q5_K: 5}
_PACKED = {*_HEADER_BYTES, *_GROUPED_BITS, GGMLQuantizationType.Q6_K}


class GgufWeights:
    """A file's tensors by the names of transformers' modules and parameters.

    The file is memory-mapped, so each tensor is read only when it is asked for.
    """

    def __init__(self, path: Path):
        """Raises `ValueError` if the `gguf` package does not know the architecture."""
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        if architecture not in kinds:
            raise ValueError(f"unknown GGUF architecture {architecture}")
        layers = reader.fields[f"{architecture}.block_count"].contents()
        self._in_file = get_tensor_name_map(kinds[architecture], layers)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._interleaved: dict[str, int] = {}
        if architecture == "llama":
            heads = reader.fields["llama.attention.head_count"].contents()
            key_heads = reader.fields.get("llama.attention.head_count_kv")
            self._interleaved = {
                "q_proj": heads,
                "k_proj": key_heads.contents() if key_heads else heads,
            }

    @property
    def is_packed(self) -> bool:
        """Whether the file has packed weights."""
        return any(tensor.tensor_type in _PACKED for tensor in self._tensors.values())

    def packed(self, module: str) -> PackedWeight | None:
        """Return the weight of a linear layer or an embedding; None if it is not packed.

        Raises `KeyError` if the file lacks it.
        """
        tensor = self._tensor(f"{module}.weight")
        if tensor.tensor_type not in _PACKED:
            return None
        return _unpack(self._reorder(module, torch.tensor(tensor.data)), tensor.tensor_type)

    def dense(self, parameter: str) -> torch.Tensor:
        """Read a parameter as float32. Raises `KeyError` if the file lacks it."""
        tensor = self._tensor(parameter)
        dense = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        return self._reorder(parameter.rpartition(".")[0], dense)

    def _tensor(self, parameter: str) -> Any:
        module, _, kind = parameter.rpartition(".")
        found = self._tensors.get(f"{self._in_file.get_name(module)}.{kind}")
        if found is None and parameter == "lm_head.weight":  # tied to the embedding
            found = self._tensors.get("token_embd.weight")
        if found is None:
            raise KeyError(parameter)
        return found

    def _reorder(self, module: str, rows: torch.Tensor) -> torch.Tensor:
        """Move rotary pairs, which are neighbours in llama.cpp's Llama, half a head apart."""
        heads = self._interleaved.get(module.rpartition(".")[2])
        if not heads:
            return rows
        in_halves: torch.Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return in_halves


def _unpack(rows: torch.Tensor, kind: GGMLQuantizationType) -> PackedWeight:
    """Read blocks of any packed format. rows: uint8 [out, bytes]."""
    if kind is GGMLQuantizationType.Q6_K:
        return _unpack_q6_k(rows)
    if kind in _GROUPED_BITS:
        return _unpack_q4_k_or_q5_k(rows, _GROUPED_BITS[kind])
    header = _HEADER_BYTES[kind]
    bits = 8 if kind == GGMLQuantizationType.Q8_0 else 4
    blocks = rows.unflatten(1, (-1, header + GROUP * bits // 8))
    head = blocks[:, :, :header].contiguous().view(torch.float16).float()
    body = blocks[:, :, header:].contiguous()
    scales = head[:, :, 0].contiguous()
    if bits == 8:
        return PackedWeight(8, body.view(torch.int8).flatten(1), scales)
    values = torch.cat((body & 15, body >> 4), dim=2).view(torch.int8).flatten(1) - 8
    # The file has scale * value + minimum with values from 0, and we count values from -8.
    zeros = None if header == 2 else head[:, :, 1] + 8 * scales
    return PackedWeight(4, values, scales, zeros)


def _unpack_q4_k_or_q5_k(rows: torch.Tensor, bits: int) -> PackedWeight:
    """Read blocks of Q4_K or Q5_K, in which a weight is scale * value - minimum.

    A block holds a scale and a minimum in half precision. Then 12 bytes hold two factors of six
    bits for each group: one for the scale, one for the minimum. In Q5_K, 32 bytes of fifth bits
    follow. Then each byte holds the lower four bits of two weights, which are in neighbouring
    groups. rows: uint8 [out, bytes].
    """
    blocks = rows.unflatten(1, (-1, 16 + GROUP * bits))
    own = blocks[:, :, :4].contiguous().view(torch.float16).float()  # [out, blocks, 2]
    multiples = blocks[:, :, 4:16].reshape(-1, 12).numpy()
    scales, minima = (
        (own[:, :, n, None] * torch.from_numpy(found).view(*own.shape[:2], 8)).flatten(1)
        for n, found in enumerate(Q4_K.get_scale_min(multiples))
    )
    pairs = blocks[:, :, -4 * GROUP :].unflatten(2, (4, 1, GROUP))
    values = torch.cat((pairs & 15, pairs >> 4), dim=3).flatten(2, 3)  # [out, blocks, 8, 32]
    if bits == 5:
        fifth = blocks[:, :, 16 : 16 + GROUP].unsqueeze(2)
        values = values + (fifth >> torch.arange(8, dtype=torch.uint8)[:, None] & 1) * 16
    packed, middle = (4, 8) if bits == 4 else (8, 0)
    return PackedWeight(
        packed, values.flatten(1).to(torch.int8) - middle, scales, middle * scales - minima
    )


def _unpack_q6_k(rows: torch.Tensor) -> PackedWeight:
    """Read blocks of Q6_K: six bits per weight, and a scale per group of 16.

    A block holds 128 bytes of lower four bits, 64 bytes of upper two bits, and a signed byte per
    group. That byte times the scale at the end, in half precision, is the group's scale.
    """
    blocks = rows.unflatten(1, (-1, 210))
    low = blocks[:, :, :128].unflatten(2, (2, 64))
    low = torch.cat((low & 15, low >> 4), dim=3).unflatten(3, (4, 32))
    high = blocks[:, :, 128:192].unflatten(2, (2, 1, 32))
    high = high >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3  # [out, blocks, 2, 4, 32]
    values = (low | high << 4).flatten(1).to(torch.int8) - 32
    multiples = blocks[:, :, 192:208].contiguous().view(torch.int8).float()
    own = blocks[:, :, 208:].contiguous().view(torch.float16).float()
    return PackedWeight(8, values, (own * multiples).flatten(1))
