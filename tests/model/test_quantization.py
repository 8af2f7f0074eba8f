"""Packed weights are close to the dense ones, and every layout gives the same products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_generator.model import packed_weight
from stream_generator.model.linear import DenseLinear, ReorderedLinear, can_reorder, fastest_linear
from stream_generator.model.packed_weight import PackedWeight, same_format_runs
from stream_generator.model.quantization import (
    MANY_ROWS,
    PackedLinear,
    Packing,
    dense_from_stored,
    in_groups_of_32,
)

BITS = pytest.mark.parametrize("bits", [4, 8])
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@BITS
def test_packing_rounds_a_weight_by_at_most_half_a_step(bits: int) -> None:
    weight = random(64, 128)
    groups = weight.unflatten(1, (-1, 32))
    span = groups.amax(2) - groups.amin(2) if bits == 4 else 2 * groups.abs().amax(2)
    steps = span / (15 if bits == 4 else 254)
    error = (PackedWeight.of(weight, bits).dense() - weight).unflatten(1, (-1, 32)).abs().amax(2)
    assert (error <= steps * 0.501).all()


@settings(deadline=None, max_examples=30)
@given(
    values=st.lists(
        st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1e-30]), min_size=32, max_size=32
    )
)
def test_a_group_of_finite_weights_packs_to_finite_weights(values: list[float]) -> None:
    for bits in (4, 8):
        assert PackedWeight.of(torch.tensor([values]), bits).dense().isfinite().all()


@BITS
def test_packing_in_slices_gives_the_same_weight(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random(48, 64)
    whole = PackedWeight.of(weight, bits).dense()
    monkeypatch.setattr(packed_weight, "SLICE_NUMBERS", 1)
    assert torch.equal(PackedWeight.of(weight, bits).dense(), whole)


@BITS
def test_joined_weights_concatenate_their_outputs(bits: int) -> None:
    parts = [PackedWeight.of(random(n, 64), bits) for n in (16, 32)]
    together = torch.cat([part.dense() for part in parts])
    assert torch.equal(PackedWeight.concatenate(parts).dense(), together)


def test_adjacent_weights_of_one_format_form_a_run() -> None:
    weights = [PackedWeight.of(random(16, 64), bits) for bits in (4, 4, 8, 4)]
    assert [len(run) for run in same_format_runs(weights)] == [2, 1, 1]


@BITS
def test_a_stored_weight_decodes_to_the_packed_weight(bits: int) -> None:
    weight = PackedWeight.of(random(16, 96), bits)
    stored = weight.stored()
    assert (stored.shape, stored.dtype) == ((16, 3, 32 * bits // 8), torch.uint8)
    assert torch.equal(dense_from_stored(stored, weight.scales, weight.zeros, bits), weight.dense())


def test_a_weight_in_groups_of_16_is_repacked_in_groups_of_32_for_a_gpu() -> None:
    fine = PackedWeight(8, torch.randint(-32, 32, (16, 64), dtype=torch.int8), random(16, 4).abs())
    coarse = in_groups_of_32(fine)
    assert (fine.group, coarse.group) == (16, 32)
    error = (coarse.dense() - fine.dense()).std() / fine.dense().std()
    assert float(error) < 0.01


def test_a_product_stays_dense_if_packing_is_off_or_its_size_does_not_fit() -> None:
    linear = torch.nn.Linear(64, 16, bias=False)
    dense = DenseLinear(linear.weight.detach())
    assert Packing().pack({"one": linear}, dense) is dense
    for inputs, outputs in ((48, 16), (64, 24)):
        linear = torch.nn.Linear(inputs, outputs)
        assert Packing(4).pack({"one": linear}, dense) is dense


@ON_A_GPU
@BITS
@pytest.mark.parametrize("rows", [1, 8, max(MANY_ROWS.values())])
def test_a_packed_product_equals_the_product_with_the_dense_weight(bits: int, rows: int) -> None:
    device = torch.device("cuda")
    linear = torch.nn.Linear(64, 32).to(device)
    product = Packing(bits).pack({"one": linear}, DenseLinear(linear.weight.detach()))
    assert isinstance(product, PackedLinear)
    x = random(rows, 64).bfloat16().float().to(device)
    weight = PackedWeight.of(linear.weight, bits).dense()
    expected = x @ weight.T + linear.bias
    assert torch.allclose(product(x), expected, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_layout_gives_the_same_products(
    dtype: torch.dtype, rows: int, with_bias: bool
) -> None:
    weight, x, other = (
        t.to(dtype) for t in (random(32, 64) / 8, random(rows, 64), random(rows, 32))
    )
    bias = random(32).to(dtype) if with_bias else None
    layouts = [DenseLinear(weight, bias), fastest_linear(weight, bias)]
    assert isinstance(layouts[1], ReorderedLinear) == can_reorder(dtype)
    y = x.float() @ weight.float().T + (0 if bias is None else bias.float())
    expected = [y, torch.nn.functional.silu(y[:, :16]) * y[:, 16:], y + other.float()]
    for linear in layouts:
        made = [linear(x), linear.gated(x), linear.plus(x, other)]
        for ours, theirs in zip(made, expected, strict=True):
            assert ours.dtype is dtype
            error = float((ours.float() - theirs).abs().max())
            assert error < (1e-4 if dtype is torch.float32 else 0.08)
