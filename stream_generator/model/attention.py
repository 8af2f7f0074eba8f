"""Attention of some new tokens to all that came before, without copying a key."""

import torch
from torch.nn import functional

# From so many queries a key head on, on a CPU in bfloat16, scores as one product, and the context
# as another, take half the time of the kernel that never holds all scores (docs/performance.md).
MANY_QUERIES = 128


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Scaled dot-product attention, where several query heads share a key head.

    queries: [rows, length, heads, size]. keys, values: [rows, key heads, key length, size].
    mask: bool or float [rows, 1, length * group, key length], see `for_groups`; None: causal.
    Returns [rows * length, heads * size].

    The query heads of a key head are laid out as so many more positions of one head: so no key is
    repeated, and none read twice.
    Source: Ainslie et al., GQA, 2023 (arXiv:2305.13245).
    """
    rows, length, heads, size = queries.shape
    key_heads = keys.shape[1]
    by_head = queries.transpose(1, 2)
    if length == 1 or mask is not None:
        grouped = by_head.reshape(rows, key_heads, -1, size)
        if mask is not None and _suits_products(grouped, mask):
            context = _attend_as_products(grouped[0], keys[0], values[0], mask[0, 0], scale)
        else:
            context = functional.scaled_dot_product_attention(
                grouped, keys, values, attn_mask=mask, scale=scale
            )
        context = context.reshape(rows, heads, length, size)
    else:
        context = functional.scaled_dot_product_attention(
            by_head, keys, values, is_causal=True, scale=scale, enable_gqa=heads != key_heads
        )
    return context.transpose(1, 2).reshape(rows * length, -1)


def _suits_products(queries: torch.Tensor, mask: torch.Tensor) -> bool:
    rows, _, many, _ = queries.shape
    on_cpu = queries.device.type == "cpu" and queries.dtype == mask.dtype == torch.bfloat16
    return on_cpu and rows == 1 and many >= MANY_QUERIES


def _attend_as_products(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """queries: [key heads, many, size]; mask: [many, key length], to be added.

    A key head at a time: its scores stay in the processor's cache, and no more than its are held.
    """
    context = torch.empty_like(queries)
    for query, key, value, out in zip(queries, keys, values, context, strict=True):
        scores = torch.addmm(mask, query, key.t(), alpha=scale)
        torch.mm(scores.softmax(dim=-1), value, out=out)
    return context


def for_groups(mask: torch.Tensor | None, group: int) -> torch.Tensor | None:
    """A mask, [rows, 1, length, key length], for `group` query heads to a key head."""
    if mask is None or mask.shape[2] == 1:
        return mask
    return mask.repeat(1, 1, group, 1)
