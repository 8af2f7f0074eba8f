"""Operations that are several kernels in PyTorch as single GPU kernels, written in Triton.

In a captured step, each kernel costs about two microseconds. Outside of captured steps, PyTorch's
small operations are faster, because Python needs longer to start a kernel of Triton: see
`inside_a_graph`. Unpacking a weight is a large operation, and always faster in one kernel.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from stream_generator.model.packed_weight import UNSIGNED_OFFSET

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch without CUDA comes without Triton
    triton, tl = None, SimpleNamespace(constexpr=int)

_graph = threading.local()


@contextmanager
def inside_a_graph() -> Iterator[None]:
    """Let this thread use the kernels, because it captures a graph or prepares to."""
    _graph.is_captured = triton is not None
    try:
        yield
    finally:
        _graph.is_captured = False


def use_kernels() -> bool:
    """Whether this thread is inside of `inside_a_graph`, and has Triton."""
    return getattr(_graph, "is_captured", False)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight. x, result: [..., size], contiguous."""
    size = x.shape[-1]
    result = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _rms_norm[(x.numel() // size,)](x, weight, result, size, epsilon, block, num_warps=8)
    return result


def rotate(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, out: torch.Tensor
) -> None:
    """Rotate heads into `out`, which may be the same: [rows, 1, heads, size] each.

    cosines, sines: [rows, 1, 1, size], as in `Rotation`.
    """
    rows, _, count, size = heads.shape
    half = size // 2
    _rotate[(rows, count)](
        heads, cosines, sines, out,
        heads.stride(0), heads.stride(2), out.stride(0), out.stride(2), cosines.stride(0),
        half, triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip


def silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half: [rows, size]. gate_up: [rows, 2 * size], contiguous."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    result = gate_up.new_empty(rows, size)
    _silu_product[(rows, triton.cdiv(size, 1024))](gate_up, result, size, 1024)
    return result


def can_unpack(stored: torch.Tensor) -> bool:
    """Whether `unpack` can read this weight: on a GPU, with Triton."""
    return triton is not None and stored.is_cuda


def unpack(
    stored: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Unpack a `PackedWeight`, as `PackedWeight.stored` returns it: [out, in], rounded to `dtype`.

    scales, zeros: float32 [out, groups] each, contiguous.
    """
    group = stored.shape[2] * 8 // bits
    out = stored.new_empty((stored.shape[0], stored.shape[1] * group), dtype=dtype)
    numbers, has_zeros = out.numel(), zeros is not None
    if zeros is None:
        zeros = scales  # not read
    _unpack[(triton.cdiv(numbers, 2048),)](
        stored, scales, zeros, out, numbers, group, has_zeros, bits, UNSIGNED_OFFSET[bits], 2048
    )
    return out


def _kernel(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_kernel
def _rms_norm(x, weight, out, size, epsilon, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    values = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / size + epsilon)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    result = values * scale * weights
    tl.store(out + row * size + at, result.to(out.dtype.element_ty), mask=inside)


@_kernel
def _rotate(  # type: ignore
    x, cosines, sines, out, x_row, x_head, out_row, out_head, angle_row, half,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < half
    x += row * x_row + head * x_head + at
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    cosines += row * angle_row + at
    sines += row * angle_row + at
    turned = first * tl.load(cosines, mask=inside, other=0.0).to(tl.float32)
    turned += second * tl.load(sines, mask=inside, other=0.0).to(tl.float32)
    other = second * tl.load(cosines + half, mask=inside, other=0.0).to(tl.float32)
    other += first * tl.load(sines + half, mask=inside, other=0.0).to(tl.float32)
    out += row * out_row + head * out_head + at
    tl.store(out, turned.to(out.dtype.element_ty), mask=inside)
    tl.store(out + half, other.to(out.dtype.element_ty), mask=inside)


@_kernel
def _silu_product(gate_up, out, size, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * size + at, result.to(out.dtype.element_ty), mask=inside)


@_kernel
def _unpack(  # type: ignore
    stored, scales, zeros, out, numbers, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr,
    BITS: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * BLOCK  # BLOCK is a multiple of GROUP
    at = tl.arange(0, BLOCK)  # int32, because arithmetic in int64 is slow
    inside = begin + at < numbers
    if BITS == 4:
        pairs = tl.load(stored + begin // 2 + at // 2, mask=inside, other=0).to(tl.int32)
        values = (pairs >> (at % 2 * 4)) & 15
    else:
        values = tl.load(stored + begin + at, mask=inside, other=0).to(tl.int32)
    result = (values - OFFSET).to(tl.float32)
    result *= tl.load(scales + begin // GROUP + at // GROUP, mask=inside, other=0.0)
    if HAS_ZEROS:
        result += tl.load(zeros + begin // GROUP + at // GROUP, mask=inside, other=0.0)
    tl.store(out + begin + at, result.to(out.dtype.element_ty), mask=inside)
