"""Linear layers in the memory layout that is fastest on their device.

Each class offers the same three products. Two of them include the gate or the residual that follows
in a transformer layer: some kernels compute it while the product is still in registers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from stream_generator.model.gpu_kernels import silu_product, use_kernels

# oneDNN chooses a weight's layout for this number of rows. The layout is as good for one row as for
# a thousand.
ROWS_HINT = 64


class Linear(Protocol):
    """A linear layer with weight W [out, in] and bias b [out].

    x: [rows, in], contiguous. other: [rows, out].
    dtype: the layer computes in this dtype or in a more precise one. Checks take their tolerance
    from it.
    """

    dtype: torch.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b: [rows, out]"""

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """silu(first half of x Wᵀ + b) * second half: [rows, out / 2]"""

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b + other: [rows, out]"""


class PlainLinear(ABC):
    """A linear layer that computes the gate and the residual as separate operations."""

    dtype: torch.dtype

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b: [rows, out]"""

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self(x)
        if use_kernels():
            return silu_product(gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        return functional.silu(gate).mul_(up)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self(x).add_(other)


class DenseLinear(PlainLinear):
    """A weight [out, in] in PyTorch's layout, for GPUs and for dtypes that oneDNN rejects."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self._weight, self._bias, self.dtype = weight, bias, weight.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if self._bias is not None or not use_kernels():
            return super().plus(x, other)
        return torch.addmm(other, x, self._weight.t())  # adds while the product is in registers


class ReorderedLinear(PlainLinear):
    """A weight in oneDNN's blocked layout: `functional.linear` would reorder it in each call."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
        self._bias, self.dtype = bias, weight.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return y

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self._weight, self._bias, "add"
        )
        return y


class LinearModule(nn.Module):
    """A `Linear` that replaces an `nn.Linear` of a model."""

    def __init__(self, linear: Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out]."""
        return self.linear(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], -1)


def concatenated_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    """Concatenate the biases of layers that all have one; return None if no layer has one."""
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None


def fastest_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """Create the fastest `Linear` for a weight, float [out, in], on the weight's device."""
    if weight.device.type == "cpu" and can_reorder(weight.dtype):
        return ReorderedLinear(weight, bias)
    return DenseLinear(weight, bias)


@cache
def can_reorder(dtype: torch.dtype) -> bool:
    """Whether oneDNN accepts weights of this dtype on this processor.

    oneDNN rejects bfloat16 and float16 on processors without instructions for them, such as those
    with AVX2 only. Some builds of PyTorch lack oneDNN.
    """
    try:
        ReorderedLinear(torch.zeros(16, 16, dtype=dtype))
    except (RuntimeError, AttributeError):
        return False
    return True
