"""Reads the weights of a GGUF file by transformers' names, packed as the file has them.

Source: the block formats of ggml (Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K), ggml-common.h.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf.quants import Q4_K

from stream_generator.loading.gguf.architectures import architecture_named
from stream_generator.loading.gguf.metadata import Metadata
from stream_generator.loading.gguf.rotary import ROTARY_TENSORS
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
_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"
_ROW = {"mlp.shared_expert_gate.weight"}  # one row in transformers, without that dimension here


class GgufWeights:
    """A file's tensors by the names of transformers' modules and parameters.

    The file is memory-mapped, so each tensor is read only when it is asked for.
    """

    def __init__(self, *parts: Path):
        """parts: the file, or all parts of it.

        Raises `UnsupportedFile` for an unknown architecture, and `ValueError` for a part of another
        file.
        """
        readers = [GGUFReader(path) for path in parts]
        for number, (path, reader) in enumerate(zip(parts, readers, strict=True)):
            _check_part(path, reader.fields, number, len(parts))
        self.fields = readers[0].fields
        metadata = Metadata(self.fields)
        self._architecture = architecture_named(metadata.architecture)
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        self._interleaved: dict[str, int] = {}
        if self._architecture.interleaved:
            heads = metadata.same_in_all_layers("attention.head_count")
            key_heads = metadata.same_in_all_layers("attention.head_count_kv", heads)
            self._interleaved = {"q_proj": heads, "k_proj": key_heads}

    @property
    def is_packed(self) -> bool:
        """Whether the file has packed weights."""
        return any(tensor.tensor_type in _PACKED for tensor in self._tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of nearly all dense weights, see `stored`."""
        kinds = {t.tensor_type for t in self._tensors.values() if len(t.shape) > 1}
        if len(kinds) > 1:  # files of all kinds have some small matrices in float32
            kinds.discard(GGMLQuantizationType.F32)
        return _FLOATS.get(kinds.pop(), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by its name in the file."""
        return {name: _shape(tensor) for name, tensor in self._tensors.items()}

    @property
    def rotary(self) -> dict[str, torch.Tensor]:
        """The tensors that describe rotary positions, by their names in the file."""
        return {name: _read(self._tensors[name]) for name in ROTARY_TENSORS & self._tensors.keys()}

    def unused(self, parameters: Iterable[str]) -> set[str]:
        """Return the names of the tensors that none of these parameters of a model reads."""
        used = {name for parameter in parameters for name in self._names(parameter)}
        return self._tensors.keys() - used - ROTARY_TENSORS

    def missing(self, parameter: str) -> str | None:
        """Return the name of a tensor that a parameter needs and the file lacks, or None."""
        try:
            self._sources(parameter)
        except KeyError as error:
            return str(error.args[0])
        return None

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return the shape of a parameter. Raises `KeyError` if the file lacks it."""
        shapes = [_shape(tensor) for tensor in self._sources(parameter)]
        if parameter.endswith(tuple(_ROW)):
            return (1, *shapes[0])
        if len(shapes) == 1:
            return shapes[0]
        return (shapes[0][0], sum(shape[1] for shape in shapes), *shapes[0][2:])

    def stored(self, parameter: str) -> torch.Tensor:
        """Read a parameter in the dtype of its tensor; packed weights as bfloat16.

        Raises `KeyError` if the file lacks it.
        """
        kind = self._sources(parameter)[0].tensor_type
        return self.dense(parameter).to(_FLOATS.get(kind, torch.bfloat16))

    def packed(self, module: str) -> PackedWeight | None:
        """Return the weight of a linear layer or an embedding; None if it is not packed.

        Raises `KeyError` if the file lacks it.
        """
        (tensor,) = self._sources(f"{module}.weight")
        if tensor.tensor_type not in _PACKED:
            return None
        return _unpack(self._reorder(module, torch.tensor(tensor.data)), tensor.tensor_type)

    def dense(self, parameter: str) -> torch.Tensor:
        """Read a parameter as float32. Raises `KeyError` if the file lacks it."""
        parts = [_read(tensor) for tensor in self._sources(parameter)]
        # The tensors of experts are [experts, out, in].
        dense = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        module = parameter.rpartition(".")[0]
        if self._architecture.norm_offset and module.endswith("norm"):
            dense = dense - self._architecture.norm_offset
        if parameter.endswith(tuple(_ROW)):
            dense = dense[None]
        return self._reorder(module, dense)

    def _sources(self, parameter: str) -> list[Any]:
        names = self._names(parameter)
        if not names:
            raise KeyError(parameter)
        if names == (_OUTPUT,) and _OUTPUT not in self._tensors:  # tied to the embedding
            names = (_EMBEDDING,)
        for name in names:
            if name not in self._tensors:
                raise KeyError(name)
        return [self._tensors[name] for name in names]

    def _names(self, parameter: str) -> tuple[str, ...]:
        """Return the names of a parameter's tensors in a file of this architecture."""
        found = _IN_LAYER.fullmatch(parameter)
        modules = self._architecture.layer if found else self._architecture.top
        key, prefix = (found[2], f"blk.{found[1]}.") if found else (parameter, "")
        if key in modules:  # the weights of experts, which are no modules
            module, kind = key, "weight"
        else:
            module, _, kind = key.rpartition(".")
        theirs = modules.get(module, ())
        return tuple(
            f"{prefix}{name}.{kind}" for name in ((theirs,) if isinstance(theirs, str) else theirs)
        )

    def _reorder(self, module: str, rows: torch.Tensor) -> torch.Tensor:
        """Move rotary pairs, which are neighbours in llama.cpp's Llama, half a head apart."""
        heads = self._interleaved.get(module.rpartition(".")[2])
        if not heads:
            return rows
        in_halves: torch.Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return in_halves


def _check_part(path: Path, fields: Any, number: int, count: int) -> None:
    if "split.count" not in fields or (count == 1 and fields["split.count"].contents() <= 1):
        return
    own, total = fields["split.no"].contents(), fields["split.count"].contents()
    if (own, total) != (number, count):
        raise ValueError(f"{path.name} is part {own + 1} of {total}; keep the names of all parts")


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _read(tensor: Any) -> torch.Tensor:
    """Read a tensor as float32."""
    numbers = dequantize(tensor.data, tensor.tensor_type)
    return torch.tensor(numbers, dtype=torch.float32).reshape(_shape(tensor))


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
