"""Packed weights: four or eight bits each, multiplied as they are by PyTorch's own kernels.

A step for a few rows spends its time reading weights, so fewer bytes mean more tokens a second.
"""

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import nn

from stream_generator.linear import Linear, PlainLinear, joined_bias, laid_out

GROUP = 32  # consecutive inputs that share a scale, as in GGUF's blocks
MIDDLE = 8  # the kernels take a value as (value - 8) * scale + zero

# From so many rows on, unpacking once beats a packed product, which grows with the rows.
MANY_ROWS = 96
BLOCKS = (64, 32)  # outputs that the CPU's kernel packs together: with AVX-512, with AVX2
SLICE_BYTES = 8_000_000  # of unpacked weights at a time: they stay in the processor's cache

# The most of the free memory that dense weights beside packed ones may take. A GPU's is there for
# the model, and its kernel for packed weights takes ten times as long for a prompt.
DENSE_SHARE = {"cpu": 1 / 16, "cuda": 1 / 3}


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] in groups of 32 inputs: values * scale + zero.

    values: int8 [out, in], -8 to 7 for four bits. scales: bfloat16 [out, in / 32]. zeros: the
    same; None: all 0.
    """

    bits: int
    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    # Up to so many rows the packed product beats the dense one, where both are there: packed, a
    # product is bound by arithmetic and grows with the rows; dense, by memory (performance.md).
    FEW_ROWS: ClassVar = {4: 8, 8: 2}

    @classmethod
    def of(cls, weight: torch.Tensor, bits: int) -> Self:
        """The nearest values between the least and the greatest weight of each group.

        With eight bits, between the greatest and its negative, so that there are no zeros.
        """
        rows = max(SLICE_BYTES // weight.shape[1], 1)  # at a time: in float32 they take room
        parts = [cls._of_some(part, bits) for part in weight.detach().split(rows)]
        return cls.joined(parts) if len(parts) > 1 else parts[0]

    @classmethod
    def _of_some(cls, weight: torch.Tensor, bits: int) -> Self:
        groups = weight.float().unflatten(1, (-1, GROUP))
        if bits == 8:
            scales = (groups.abs().amax(dim=2) / 127).clamp_min(1e-8).bfloat16()
            values = (groups / scales.float()[..., None]).round().clamp(-128, 127)
            return cls(8, values.to(torch.int8).flatten(1), scales)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scales = ((high - low) / 15).clamp_min(1e-8).bfloat16()
        zeros = (low + MIDDLE * scales.float()).bfloat16()
        values = (groups - zeros.float()[..., None]) / scales.float()[..., None]
        return cls(4, values.round().clamp(-8, 7).to(torch.int8).flatten(1), scales, zeros)

    @classmethod
    def joined(cls, weights: "Sequence[PackedWeight]") -> Self:
        """Several with the same inputs, as one with all their outputs: of the most bits."""
        some_zeros = any(w.zeros is not None for w in weights)
        zeros = [torch.zeros_like(w.scales) if w.zeros is None else w.zeros for w in weights]
        return cls(
            max(w.bits for w in weights),
            torch.cat([w.values for w in weights]),
            torch.cat([w.scales for w in weights]),
            torch.cat(zeros) if some_zeros else None,
        )

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What it is kept as in a file, by "name.kind": four bits are two to a byte."""
        values = self.values
        if self.bits == 4:
            raw = (values + MIDDLE).view(torch.uint8)
            values = raw[:, ::2] | raw[:, 1::2] << 4
        kept = {f"{name}.values{self.bits}": values, f"{name}.scales": self.scales}
        return kept if self.zeros is None else {**kept, f"{name}.zeros": self.zeros}

    @classmethod
    def of_tensors(cls, kept: Mapping[str, torch.Tensor]) -> Self:
        """From what `tensors` has made, by kind."""
        scales, zeros = kept["scales"], kept.get("zeros")
        if "values8" in kept:
            return cls(8, kept["values8"], scales, zeros)
        pairs = kept["values4"]
        raw = torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1)
        return cls(4, raw.view(torch.int8) - MIDDLE, scales, zeros)

    def to(self, device: torch.device) -> "PackedWeight":
        """The same on a device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return PackedWeight(self.bits, self.values.to(device), self.scales.to(device), zeros)

    def dense(self) -> torch.Tensor:
        """float32 [out, in]"""
        groups = self.values.float().unflatten(1, (-1, GROUP)) * self.scales.float()[..., None]
        if self.zeros is not None:
            groups += self.zeros.float()[..., None]
        dense: torch.Tensor = groups.flatten(1)
        return dense


class PackedLinear(PlainLinear):
    """A product with a `PackedWeight`, by the kernel for four bits. It takes inputs of any dtype.

    Eight bits are two times four, v = 16 high + low, side by side along the inputs: the kernel for
    eight bits has one scale for a whole output, which costs quality.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        """dtype: the kernel's, whatever the inputs' is: for all but bfloat16 PyTorch's kernel is a
        scalar loop on a CPU, forty times slower (docs/performance.md)."""
        values, scales, zeros = weight.values, weight.scales, weight.zeros
        if zeros is None:
            zeros = torch.zeros_like(scales)
        self.twice = weight.bits == 8
        if self.twice:
            high, low = values >> 4, values & 15
            values = torch.cat((high, low - MIDDLE), dim=1)
            zeros = torch.cat((torch.zeros_like(zeros), zeros + MIDDLE * scales), dim=1)
            scales = torch.cat((16 * scales, scales), dim=1)
        self.scales_and_zeros = torch.stack((scales.T, zeros.T), dim=2).to(dtype).contiguous()
        self.bias, self.dtype = bias, dtype
        raw = values + MIDDLE  # 0 to 15
        if raw.device.type == "cpu":
            self._product = torch.ops.aten._weight_int4pack_mm_for_cpu
            # Some blocks at a time: the kernel's own packing takes 32 bits for each value.
            rows = max(SLICE_BYTES // raw.shape[1] // BLOCKS[0], 1) * BLOCKS[0]
            self.weight = torch.cat([_packed_for_cpu(part) for part in raw.split(rows)])
        else:
            self._product = torch.ops.aten._weight_int4pack_mm
            pairs = (raw[:, ::2] << 4 | raw[:, 1::2]).view(torch.uint8).contiguous()
            self.weight = torch.ops.aten._convert_weight_to_int4pack(pairs, 2)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # A step has some 120 of these products: even a cast that changes nothing costs it time.
        is_cast = x.dtype is not self.dtype
        inputs = x.to(self.dtype) if is_cast else x
        if self.twice:
            inputs = torch.cat((inputs, inputs), dim=1)
        y: torch.Tensor = self._product(inputs, self.weight, GROUP, self.scales_and_zeros)
        if is_cast:
            y = y.to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)


class UnpackedLinear(PlainLinear):
    """The product of a `PackedLinear` for many rows: its weights are made dense, slice by slice.

    For a model whose dense weights do not fit beside the packed ones.
    """

    def __init__(self, packed: PackedLinear, block: int):
        """packed: on a CPU. block: as `packed_block` tells; the outputs are a multiple of it."""
        self._packed, self._block, self.dtype = packed, block, packed.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        packed = self._packed
        if packed.twice:
            x = torch.cat((x, x), dim=1)
        inputs, outputs = x.shape[1], packed.scales_and_zeros.shape[1]
        step = max(SLICE_BYTES // x.element_size() // inputs // self._block, 1) * self._block
        y = x.new_empty(len(x), outputs)
        for first in range(0, outputs, step):
            part = slice(first, first + step)
            scales_and_zeros = packed.scales_and_zeros[:, part].to(x.dtype)
            torch.mm(x, self._dense(packed.weight[part], scales_and_zeros), out=y[:, part])
        return y if packed.bias is None else y.add_(packed.bias)

    def _dense(self, weight: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
        """[in, outputs of the slice], of the dtype of the scales and zeros"""
        scales, zeros = scales_and_zeros[:, None].unbind(dim=3)
        values = _values(weight, scales.dtype, self._block).unflatten(0, (-1, GROUP))
        # PyTorch adds and multiplies along a row only if scales and zeros lie close together, too.
        zeros = (zeros - MIDDLE * scales).contiguous()
        return torch.addcmul(zeros, values, scales.contiguous(), out=values).flatten(0, 1)


def _packed_for_cpu(raw: torch.Tensor) -> torch.Tensor:
    """raw: 0 to 15, [out, in]. Returns what the CPU's kernel reads, uint8 [out, in / 2]."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(raw.int(), 1)
    return packed


def _values(weight: torch.Tensor, dtype: torch.dtype, block: int) -> torch.Tensor:
    """What the CPU's kernel has packed, 0 to 15: [in, out].

    In each byte an output of the first half of a block, and above it one of the second.
    """
    blocks = weight.view(-1, weight.shape[1] * 2, block // 2)
    values = torch.empty(blocks.shape[1], len(blocks), block, dtype=dtype)
    by_block = values.transpose(0, 1)
    by_block[:, :, : block // 2] = blocks & 15
    by_block[:, :, block // 2 :] = blocks >> 4
    return values.flatten(1)


@functools.cache
def packed_block() -> int:
    """How many outputs the CPU's kernel packs together; 0 if `_values` cannot read its order."""
    raw = torch.randint(16, (2 * BLOCKS[0], GROUP), generator=torch.Generator().manual_seed(0))
    packed = _packed_for_cpu(raw)
    readable = (b for b in BLOCKS if torch.equal(_values(packed, raw.dtype, b).T, raw))
    return next(readable, 0)


def product_milliseconds(dtype: torch.dtype) -> tuple[float, float]:
    """Time a product of one row with 1,024 by 1,024 weights on the CPU: packed, and dense.

    dtype: of the row, and of the dense weights.
    """
    size = 1024
    values = torch.randint(-8, 8, (size, size), dtype=torch.int8)
    packed = PackedWeight(4, values, torch.ones(size, size // GROUP, dtype=torch.bfloat16))
    x = torch.randn(1, size, dtype=dtype)

    def of(product: Linear) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            product(x)
            times.append(time.perf_counter() - began)
        return 1000 * statistics.median(times)

    return of(PackedLinear(packed)), of(laid_out(torch.randn(size, size, dtype=dtype)))


class ByRows:
    """The same product twice: packed for few rows, dense for many."""

    def __init__(self, few: Linear, many: Linear, few_rows: int):
        self._few, self._many, self._few_rows, self.dtype = few, many, few_rows, few.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._for(x)(x)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return self._for(x).gated(x)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self._for(x).plus(x, other)

    def _for(self, x: torch.Tensor) -> Linear:
        return self._few if len(x) <= self._few_rows else self._many


@dataclass(frozen=True)
class Packing:
    """How the linear layers of a model are packed.

    bits: 4 or 8, of what `saved` does not hold; 0: that stays dense. saved: by the names of the
    model's modules; without `bits`, equal to its dense weights up to rounding. keep_dense: keep
    the dense weights too, for many rows. dtype: in which packed products are computed. made: what
    had to be packed, to be saved for another time, as `PackedWeight.tensors`.
    """

    bits: int = 0
    saved: Mapping[str, PackedWeight] = field(default_factory=dict)
    keep_dense: bool = False
    dtype: torch.dtype = torch.bfloat16
    made: dict[str, torch.Tensor] = field(default_factory=dict)

    def pack(self, named: dict[str, nn.Linear], dense: Linear, *, least_bits: int = 4) -> Linear:
        """The product with all these side by side, packed; `dense`, if they are not to be packed.

        named: linear layers with the same inputs, by their names in the model.
        """
        linears = list(named.values())
        first = linears[0].weight
        # What the kernels can take: 16 outputs and a group of inputs at a time.
        if any(x.out_features % 16 or x.in_features % GROUP for x in linears):
            return dense
        if not self.bits and any(name not in self.saved for name in named):
            return dense
        bias = joined_bias(linears)
        if all(name in self.saved for name in named):
            weight = PackedWeight.joined([self.saved[name] for name in named]).to(first.device)
        else:
            bits = max(self.bits, least_bits)
            made = {name: PackedWeight.of(x.weight, bits) for name, x in named.items()}
            for name, weight in made.items():
                self.made.update(weight.tensors(name))
            weight = PackedWeight.joined(list(made.values()))
        few = PackedLinear(weight, bias, self.dtype)
        if not self.keep_dense:
            block = packed_block() if first.device.type == "cpu" else 0
            if not block or len(weight.values) % block:
                return few
            return ByRows(few, UnpackedLinear(few, block), MANY_ROWS - 1)
        if self.bits:
            # What few rows and many are multiplied with must be the same.
            dense = laid_out(weight.dense().to(first.dtype), bias)
        return ByRows(few, dense, PackedWeight.FEW_ROWS[weight.bits])
