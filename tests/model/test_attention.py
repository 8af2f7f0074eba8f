"""Grouped attention equals its formula, computed in float64."""

import math

import pytest
import torch

from stream_generator.model.attention import MANY_QUERIES, attend, for_groups


def attention_by_formula(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """softmax(q k / sqrt(size)) v, one head at a time. seen: bool [rows, 1, length, key length]."""
    rows, length, heads, size = queries.shape
    group = heads // keys.shape[1]
    result = torch.empty(rows, length, heads, size, dtype=torch.float64)
    for head in range(heads):
        key, value = (t[:, head // group].double() for t in (keys, values))
        scores = queries[:, :, head].double() @ key.mT / math.sqrt(size)
        scores = scores.masked_fill(~seen[:, 0], -math.inf)
        result[:, :, head] = scores.softmax(-1) @ value
    return result.reshape(rows * length, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    ("rows", "length", "key_length"),
    [(1, 1, 30), (3, 1, 30), (1, MANY_QUERIES, 300), (1, 7, 30), (2, MANY_QUERIES, 200)],
)
def test_attention_equals_its_formula(
    rows: int, length: int, key_length: int, window: int | None, kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    heads, key_heads, size = 6, 2, 16
    queries = torch.randn(rows, length, heads, size, dtype=dtype)
    store = torch.randn(rows, 2 * key_heads, key_length + 9, size, dtype=dtype)
    keys, values = store[:, :, :key_length].split(key_heads, dim=1)
    positions = torch.arange(key_length - length, key_length)[:, None]
    others = torch.arange(key_length)
    seen = (others <= positions) & (others > positions - (window or key_length))
    seen = seen.expand(rows, 1, length, key_length)
    mask = seen if kind == "bool" else torch.zeros(seen.shape, dtype=dtype)
    if kind == "added":
        mask = mask.masked_fill(~seen, -math.inf)
    ours = attend(queries, keys, values, for_groups(mask, heads // key_heads), size**-0.5)
    expected = attention_by_formula(queries, keys, values, seen)
    error = (ours.double() - expected).abs().mean() / expected.abs().mean()
    assert error < (1e-5 if dtype == torch.float32 else 0.01)


def test_without_a_mask_attention_is_causal() -> None:
    torch.manual_seed(0)
    queries = torch.randn(1, 9, 6, 16)
    keys, values = torch.randn(1, 4, 9, 16).split(2, dim=1)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    ours = attend(queries, keys, values, None, 0.25)
    expected = attention_by_formula(queries, keys, values, seen).float()
    torch.testing.assert_close(ours, expected)
