"""Attention of new tokens to all earlier tokens, without copies of the keys."""

import torch
from torch.nn import functional

# Queries per key head from which, on a CPU in bfloat16, attention is two products: the scores, then
# the context. They take half the time of PyTorch's kernel, which never holds all scores
# (docs/performance.md).
MANY_QUERIES = 128


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Compute scaled dot-product attention in which several query heads share a key head.

    queries: [rows, length, heads, head size].
    keys, values: [rows, key heads, key length, head size].
    mask: bool, or float that is added to the scores, [rows, 1, length * group, key length]; see
    `for_groups`. Without a mask, a single query sees all keys, and attention of several queries is
    causal.
    Returns [rows * length, heads * head size].

    The query heads that share a key head are laid out as more positions of a single query head, so
    no key is copied.
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
    rows, _, count, _ = queries.shape
    on_cpu = queries.device.type == "cpu" and queries.dtype == mask.dtype == torch.bfloat16
    return on_cpu and rows == 1 and count >= MANY_QUERIES


def _attend_as_products(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute attention of one row, one key head at a time.

    The scores of one key head stay in the processor's cache, and no other scores are in memory.
    queries: [key heads, length * group, head size]. mask: float [length * group, key length].
    """
    context = torch.empty_like(queries)
    for query, key, value, out in zip(queries, keys, values, context, strict=True):
        scores = torch.addmm(mask, query, key.t(), alpha=scale)
        torch.mm(scores.softmax(dim=-1), value, out=out)
    return context


def for_groups(mask: torch.Tensor | None, group: int) -> torch.Tensor | None:
    """Repeat a mask, [rows, 1, length, key length], for `group` query heads per key head."""
    if mask is None or mask.shape[2] == 1:  # PyTorch broadcasts a mask of length 1
        return mask
    return mask.repeat(1, 1, group, 1)
