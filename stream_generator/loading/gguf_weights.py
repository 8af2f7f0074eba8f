"""The packed weights of a GGUF file, taken over as they are.

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

from stream_generator.quantization import GROUP, MIDDLE, PackedWeight

# Bytes of a block of 32 weights: a scale, for Q4_1 a minimum, then the values.
_HEADERS = {
    GGMLQuantizationType.Q4_0: 2,
    GGMLQuantizationType.Q4_1: 4,
    GGMLQuantizationType.Q8_0: 2,
}
# A block of 256 weights is eight groups of 32, whose scales and minima have six bits each.
_IN_GROUPS = {GGMLQuantizationType.Q4_K: 4, GGMLQuantizationType.Q5_K: 5}
_PACKED = {*_HEADERS, *_IN_GROUPS, GGMLQuantizationType.Q6_K}


def packed_weights(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Those of a model's linear layers, by the names of its modules, that the file has packed.

    As `PackedWeight.tensors`, in half the room.
    Raises `ValueError` for an architecture that the `gguf` package does not know.
    """
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise ValueError(f"unknown GGUF architecture {architecture}")
    layers = reader.fields[f"{architecture}.block_count"].contents()
    in_file = get_tensor_name_map(kinds[architecture], layers)
    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}
    interleaved = {}
    if architecture == "llama":
        heads = reader.fields["llama.attention.head_count"].contents()
        key_heads = reader.fields.get("llama.attention.head_count_kv")
        interleaved = {"q_proj": heads, "k_proj": key_heads.contents() if key_heads else heads}
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        tensor = tensors.get(in_file.get_name(name) or "")
        if tensor is None and name == "lm_head":
            tensor = tensors.get("token_embd")  # shared with the embedding
        if tensor is None or tensor.tensor_type not in _PACKED:
            continue
        count = interleaved.get(name.rpartition(".")[2])
        weights |= _weight(tensor.data, tensor.tensor_type, count).tensors(name)
    return weights


def _weight(data: Any, kind: GGMLQuantizationType, interleaved_heads: int | None) -> PackedWeight:
    """data: a NumPy array, uint8 [out, bytes]."""
    rows = torch.tensor(data)
    if interleaved_heads:
        # llama.cpp's Llama pairs neighbours of a head for rotary positions, transformers its halves
        rows = rows.unflatten(0, (interleaved_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    if kind is GGMLQuantizationType.Q6_K:
        # A scale for each 16 weights: made anew with one for 32, and eight bits for six.
        return PackedWeight.of(torch.from_numpy(dequantize(rows.numpy(), kind)), 8)
    if kind in _IN_GROUPS:
        return _grouped(rows, _IN_GROUPS[kind])
    header = _HEADERS[kind]
    bits = 8 if kind == GGMLQuantizationType.Q8_0 else 4
    blocks = rows.unflatten(1, (-1, header + GROUP * bits // 8))
    head = blocks[:, :, :header].contiguous().view(torch.float16).float()
    body = blocks[:, :, header:].contiguous()
    scales = head[:, :, 0].bfloat16()
    if bits == 8:
        return PackedWeight(8, body.view(torch.int8).flatten(1), scales)
    values = torch.cat((body & 15, body >> 4), dim=2).view(torch.int8).flatten(1) - MIDDLE
    if kind == GGMLQuantizationType.Q4_0:
        return PackedWeight(4, values, scales, torch.zeros_like(scales))
    # d value + m, with the value counted from -8
    zeros = (head[:, :, 1] + MIDDLE * head[:, :, 0]).bfloat16()
    return PackedWeight(4, values, scales, zeros)


def _grouped(rows: torch.Tensor, bits: int) -> PackedWeight:
    """Q4_K or Q5_K: scale * value - minimum, both of a group as multiples of the block's own.

    A block: its scale and minimum in half precision, 12 bytes of the groups' multiples, for Q5_K
    32 bytes of fifth bits, then the lower four, those of two groups to a byte.
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
    packed = 4 if bits == 4 else 8
    middle = MIDDLE if bits == 4 else 0
    return PackedWeight(
        packed,
        values.flatten(1).to(torch.int8) - middle,
        scales.bfloat16(),
        (middle * scales - minima).bfloat16(),
    )
