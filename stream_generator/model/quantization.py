"""Packed weights on a GPU: four bits each, or eight as two times four, by PyTorch's own kernel.

A step for a few rows spends its time reading weights, so fewer bytes mean more tokens a second.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from stream_generator.model.linear import Linear, PlainLinear, joined_bias
from stream_generator.model.packed_weight import (
    GROUP,
    MIDDLE,
    PackedWeight,
    same_format_runs,
    scaled,
)

# From so many rows on, the weights are made dense for one product: the packed kernel's time grows
# with the rows.
MANY_ROWS = 64


class PackedLinear(PlainLinear):
    """A product with a `PackedWeight` on a GPU. It takes inputs of any dtype.

    Eight bits are two times four, v = 16 high + low, side by side along the inputs: the kernel for
    eight bits has one scale for a whole output, which costs quality.
    """

    dtype = torch.bfloat16  # the kernel's

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None = None):
        """weight: in groups of 32, on a GPU."""
        values, scales, zeros = weight.values, weight.scales, weight.zeros
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
        if len(x) >= MANY_ROWS:
            weight = dense_from_stored(self._weight, self._scales, self._zeros, self._bits)
            return functional.linear(x, weight.to(x.dtype), self._bias)
        inputs = x.to(self.dtype)
        if self._bits == 8:
            inputs = torch.cat((inputs, inputs), dim=1)
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(
            inputs, self._packed, GROUP, self._scales_and_zeros
        ).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)


def dense_from_stored(
    stored: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """What `PackedWeight.stored` stands for: float32 [out, in]."""
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=3).flatten(2)
    return scaled(stored.float() - MIDDLE[bits], scales, zeros)


def in_thirty_twos(weight: PackedWeight) -> PackedWeight:
    """The nearest weight in groups of 32, which the kernel takes."""
    return weight if weight.group == GROUP else PackedWeight.of(weight.dense(), weight.bits)


@dataclass(frozen=True)
class Packing:
    """How the linear layers of a model on a GPU are packed.

    bits: 4 or 8, of what `saved` has not packed; 0: that stays dense. saved: the packed weight of
    a module, by its name, or None.
    """

    bits: int = 0
    saved: Callable[[str], PackedWeight | None] = lambda name: None

    def pack(self, named: dict[str, nn.Linear], dense: Linear, *, least_bits: int = 4) -> Linear:
        """The product with all these side by side, packed; `dense`, if they are not to be packed.

        named: linear layers with the same inputs, by their names in the model.
        """
        linears = list(named.values())
        device = linears[0].weight.device
        # What the kernel can take: 16 outputs and a group of inputs at a time.
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
                else in_thirty_twos(saved).to(device)
            )
        if len(list(same_format_runs(weights))) > 1:  # one kernel call takes one format
            weights = [PackedWeight.of(weight.dense(), 8) for weight in weights]
        return PackedLinear(PackedWeight.joined(weights), joined_bias(linears))
