"""Attention of some new tokens to all that came before, without copying a key."""

import torch
from torch.nn import functional


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
        context = functional.scaled_dot_product_attention(
            by_head.reshape(rows, key_heads, -1, size), keys, values, attn_mask=mask, scale=scale
        ).reshape(rows, heads, length, size)
    else:
        context = functional.scaled_dot_product_attention(
            by_head, keys, values, is_causal=True, scale=scale, enable_gqa=heads != key_heads
        )
    return context.transpose(1, 2).reshape(rows * length, -1)


def for_groups(mask: torch.Tensor | None, group: int) -> torch.Tensor | None:
    """A mask, [rows, 1, length, key length], for `group` query heads to a key head."""
    if mask is None or mask.shape[2] == 1:
        return mask
    return mask.repeat(1, 1, group, 1)
