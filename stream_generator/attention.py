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
    mask: bool or float [rows, 1, length, key length]; None: causal.
    Returns [rows * length, heads * size].

    For one new token a row, the query heads of a key head are laid out as so many positions of one
    head: so no key is repeated, and none read twice.
    Source: Ainslie et al., GQA, 2023 (arXiv:2305.13245).
    """
    rows, length, heads, size = queries.shape
    if length == 1:
        grouped = queries.reshape(rows, keys.shape[1], -1, size)
        context = functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=mask, scale=scale
        )
        return context.reshape(rows, -1)
    context = functional.scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, attn_mask=mask, is_causal=mask is None, scale=scale,
        enable_gqa=heads != keys.shape[1],
    )  # fmt: skip
    return context.transpose(1, 2).reshape(rows * length, -1)
