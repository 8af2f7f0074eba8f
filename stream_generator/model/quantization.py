"""Packed weights on a GPU, computed by PyTorch's kernel for four bits.

A step for a few rows spends its time reading weights, so fewer bytes mean more tokens per second.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from stream_generator.model.gpu_kernels import can_unpack, unpack
from stream_generator.model.linear import Linear, PlainLinear, concatenated_bias
from stream_generator.model.packed_weight import (
    GROUP,
    UNSIGNED_OFFSET,
    PackedWeight,
    same_format_runs,
    scaled,
)

# The number of rows from which a product unpacks its weights first, by bits: the time of the packed
# kernel grows with the rows, that of unpacking does not (docs/performance.md).
MANY_ROWS = {4: 32, 8: 16}


class PackedLinear(PlainLinear):
    """A linear layer with a `PackedWeight` on a GPU, for inputs of any dtype.

    A value of eight bits becomes two of four, v = 16 high + low, concatenated along the inputs.
    PyTorch's kernel for eight bits is not used: it has one scale for a whole output, which costs
    quality.
    """

    dtype = torch.bfloat16  # of the kernel

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None = None):
        """weight: in groups of 32, on a GPU. bias: [out]."""
        values, scales, zeros = weight.values, weight.scales, weight.zeros
        assert scales.is_contiguous()
        assert zeros is None or zeros.is_contiguous()
        self._weight, self._scales, self._zeros = weight.stored(), scales, zeros
        self._bits, self._bias = weight.bits, bias
        if zeros is None:
            zeros = torch.zeros_like(scales)
        if weight.bits == 8:
            high, low = values >> 4, values & 15
            values = torch.cat((high, low - 8), dim=1)
            zeros = torch.cat((torch.zeros_like(zeros), zeros + 8 * scales), dim=1)
            scales = torch.cat((16 * scales, scales), dim=1)
        raw = values + 8  # 0 to 15
        pairs = (raw[:, ::2] << 4 | raw[:, 1::2]).view(torch.uint8).contiguous()
        self._packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 2)
        self._scales_and_zeros = torch.stack((scales.T, zeros.T), dim=2).to(self.dtype).contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) >= MANY_ROWS[self._bits]:
            return functional.linear(x, self._unpacked(x.dtype), self._bias)
        inputs = x.to(self.dtype)
        if self._bits == 8:
            inputs = torch.cat((inputs, inputs), dim=1)
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(
            inputs, self._packed, GROUP, self._scales_and_zeros
        ).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)

    def _unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight: [out, in]."""
        if can_unpack(self._weight):
            return unpack(self._weight, self._scales, self._zeros, self._bits, dtype)
        return dense_from_stored(self._weight, self._scales, self._zeros, self._bits).to(dtype)


def dense_from_stored(
    stored: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Unpack the result of `PackedWeight.stored`: float32 [out, in]."""
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=3).flatten(2)
    return scaled(stored.float() - UNSIGNED_OFFSET[bits], scales, zeros)


def in_groups_of_32(weight: PackedWeight) -> PackedWeight:
    """Pack a weight again unless its groups have 32 inputs, as the kernel requires."""
    return weight if weight.group == GROUP else PackedWeight.of(weight.dense(), weight.bits)


@dataclass(frozen=True)
class Packing:
    """How the linear layers of a model on a GPU are packed.

    saved: returns the weight of a module, by name, if the checkpoint has it packed; else None.
    bits: 4 or 8, for the modules that `saved` lacks; 0 leaves these modules dense.
    """

    bits: int = 0
    saved: Callable[[str], PackedWeight | None] = lambda name: None

    def pack(self, named: dict[str, nn.Linear], dense: Linear, *, least_bits: int = 4) -> Linear:
        """Pack linear layers into one packed layer; return `dense` if they must stay dense.

        named: linear layers with the same inputs, by their names in the model. dense: one layer
        with their dense weights. least_bits: a lower bound of `bits` for these layers.
        """
        linears = list(named.values())
        device = linears[0].weight.device
        # The kernel needs a multiple of 16 outputs, and whole groups of inputs.
        if any(x.out_features % 16 or x.in_features % GROUP for x in linears):
            return dense
        weights = []
        for name, linear in named.items():
            saved = self.saved(name)
            if saved is None and not self.bits:
                return dense
            weights.append(
                PackedWeight.of(linear.weight, max(self.bits, least_bits))
                if saved is None
                else in_groups_of_32(saved).to(device)
            )
        if len(list(same_format_runs(weights))) > 1:  # the kernel needs one format
            weights = [PackedWeight.of(weight.dense(), 8) for weight in weights]
        return PackedLinear(PackedWeight.concatenate(weights), concatenated_bias(linears))
