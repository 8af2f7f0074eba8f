"""Linear layers in the layout that their kernel reads fastest.

Every one offers the same three products, so that what follows a product in a transformer layer (the
gate, the residual) is done while its result is still in registers, where the kernel can.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

# oneDNN lays a weight out for a number of rows it is told. What it chooses for this many serves one
# row and a thousand equally well.
ROWS_HINT = 64


class Linear(Protocol):
    """x: [rows, in], contiguous; other: [rows, out]; all return [rows, out].

    dtype: the coarsest that inputs may be rounded to, whatever theirs is.
    """

    dtype: torch.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x W + b"""

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """silu(first half of x W + b) * second half: [rows, out / 2]"""

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """x W + b + other"""


class PlainLinear(ABC):
    """A product, followed by the gate or the residual as an operation of its own."""

    dtype: torch.dtype

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x W + b"""

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self(x).chunk(2, dim=1)
        return functional.silu(gate).mul_(up)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self(x).add_(other)


class DenseLinear(PlainLinear):
    """A weight as the checkpoint has it, [out, in]: for a GPU, or where oneDNN refuses it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self._weight, self._bias, self.dtype = weight, bias, weight.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)


class ReorderedLinear(PlainLinear):
    """A weight in oneDNN's own blocked layout, for a CPU.

    `functional.linear` would reorder it at each call.
    """

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
    """A `Linear` in the place of a module of transformers'."""

    def __init__(self, linear: Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in], returns [..., out]."""
        return self.linear(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], -1)


def joined_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    """The biases of several layers, which all have one or none of them has, side by side."""
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None


def laid_out(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The `Linear` of this weight, float [out, in], that is fastest on its device."""
    if weight.device.type == "cpu" and can_reorder(weight.dtype):
        return ReorderedLinear(weight, bias)
    return DenseLinear(weight, bias)


@cache
def can_reorder(dtype: torch.dtype) -> bool:
    """Whether oneDNN accepts weights of this dtype here.

    It refuses bfloat16 and float16 on processors without instructions for them, as those with AVX2
    alone; and some builds of PyTorch lack oneDNN.
    """
    try:
        ReorderedLinear(torch.zeros(16, 16, dtype=dtype))
    except (RuntimeError, AttributeError):
        return False
    return True
