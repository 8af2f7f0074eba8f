"""Packed weights mean what they say, and their kernels compute it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_generator import processor, quantization
from stream_generator.linear import DenseLinear, Linear, ReorderedLinear, can_reorder, laid_out
from stream_generator.loading.packed_file import PackedFile, save_packed
from stream_generator.quantization import (
    BLOCKS,
    MANY_ROWS,
    ByRows,
    PackedLinear,
    PackedWeight,
    Packing,
    UnpackedLinear,
    packed_block,
)

BITS = pytest.mark.parametrize("bits", [4, 8])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to one rounding to bfloat16, in which packed products are computed."""
    return torch.allclose(a, b, rtol=2**-8, atol=2**-8 * float(b.std()))


@BITS
@pytest.mark.parametrize("rows", [1, 3, 8, 33])
def test_a_packed_product_is_the_product_with_the_weights_it_stands_for(
    bits: int, rows: int
) -> None:
    weight, bias = PackedWeight.of(random(48, 96), bits), random(48)
    x = random(rows, 96).bfloat16().float()  # so that only the result is rounded
    y = PackedLinear(weight, bias)(x)
    assert y.dtype is torch.float32
    assert close(y - bias, x @ weight.dense().T)


@BITS
def test_a_weight_is_off_by_half_a_step_at_most_and_the_rounding_of_its_scale(bits: int) -> None:
    weight = random(64, 128)
    groups = weight.unflatten(1, (-1, 32))
    span = groups.amax(2) - groups.amin(2) if bits == 4 else 2 * groups.abs().amax(2)
    steps = span / (15 if bits == 4 else 254)
    error = (PackedWeight.of(weight, bits).dense() - weight).unflatten(1, (-1, 32)).abs().amax(2)
    # bfloat16 keeps 8 bits: of the scale, over 15 or 127 steps, and of the zero.
    assert (error <= steps * (0.5 + (15 if bits == 4 else 127) / 256 + 8 / 256)).all()


@settings(deadline=None, max_examples=30)
@given(
    values=st.lists(
        st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1e-30]), min_size=32, max_size=32
    )
)
def test_any_finite_group_packs_to_finite_numbers(values: list[float]) -> None:
    for bits in (4, 8):
        assert PackedWeight.of(torch.tensor([values]), bits).dense().isfinite().all()


@BITS
@pytest.mark.parametrize("outputs", [16, 48, 64, 208])
def test_packing_some_blocks_at_a_time_packs_the_same(
    bits: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random(outputs, 64)
    whole = PackedLinear(PackedWeight.of(weight, bits))
    monkeypatch.setattr(quantization, "SLICE_BYTES", 1)
    parts = PackedLinear(PackedWeight.of(weight, bits))
    assert parts.weight.equal(whole.weight)
    assert parts.scales_and_zeros.equal(whole.scales_and_zeros)


@BITS
def test_joined_weights_give_their_outputs_side_by_side(bits: int) -> None:
    parts = [PackedWeight.of(random(n, 64), bits) for n in (16, 32)]
    x = random(2, 64)
    together = PackedLinear(PackedWeight.joined(parts))(x)
    apart = [PackedLinear(part)(x) for part in parts]
    assert close(together, torch.cat(apart, dim=1))


@BITS
def test_what_is_saved_is_what_is_loaded(bits: int, tmp_path: Path) -> None:
    weights = {"a.b": PackedWeight.of(random(16, 64), bits), "c": PackedWeight.of(random(8, 32), 8)}
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        tensors |= weight.tensors(name)
    save_packed(tensors, tmp_path / "packed.safetensors")
    loaded = PackedFile(tmp_path / "packed.safetensors")
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert loaded[name].bits == weight.bits
        assert torch.equal(loaded[name].dense(), weight.dense())


def named(linear: torch.nn.Linear) -> dict[str, torch.nn.Linear]:
    return {"one": linear}


def test_what_the_kernels_cannot_take_stays_dense() -> None:
    for inputs, outputs in ((48, 16), (64, 24)):
        linear = torch.nn.Linear(inputs, outputs)
        dense = DenseLinear(linear.weight)
        assert Packing(4).pack(named(linear), dense) is dense


def test_what_is_not_asked_for_stays_dense_and_what_is_saved_is_taken() -> None:
    linear = torch.nn.Linear(64, 16, bias=False)
    dense = DenseLinear(linear.weight.detach())
    assert Packing().pack(named(linear), dense) is dense
    saved = {"one": PackedWeight.of(random(16, 64), 4)}
    product = Packing(saved=saved).pack(named(linear), dense)
    x = random(2, 64).bfloat16().float()
    assert close(product(x), x @ saved["one"].dense().T)


@BITS
def test_few_rows_and_many_are_multiplied_with_the_same_weights(bits: int) -> None:
    linear = torch.nn.Linear(64, 32)
    dense = DenseLinear(linear.weight.detach(), linear.bias.detach())
    product = Packing(bits, keep_dense=True).pack(named(linear), dense)
    x = random(40, 64).bfloat16().float()
    one_by_one = torch.cat([product(row[None]) for row in x])
    assert close(product(x), one_by_one)
    assert not close(product(x), dense(x)), "they are not the ones that were packed"


def packed_in_blocks(raw: torch.Tensor, block: int) -> torch.Tensor:
    """The order in which a kernel packs: uint8 [out, in / 2], of raw values [out, in]."""
    low, high = raw.to(torch.uint8).unflatten(0, (-1, 2, block // 2)).unbind(1)
    return (low | high << 4).transpose(1, 2).reshape(len(raw), -1)


@BITS
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("outputs", [64, 320])
@pytest.mark.parametrize("slice_bytes", [1, 100_000])
def test_unpacked_slice_by_slice_many_rows_meet_the_same_weights(
    bits: int, block: int, outputs: int, slice_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each order that a processor may have, whichever this one has."""
    monkeypatch.setattr(quantization, "SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(quantization, "_packed_for_cpu", lambda raw: packed_in_blocks(raw, block))
    weight, bias = PackedWeight.of(random(outputs, 96), bits), random(outputs)
    unpacked = UnpackedLinear(PackedLinear(weight, bias), block)
    x = random(40, 96)
    assert torch.allclose(unpacked(x), x @ weight.dense().T + bias, rtol=1e-4, atol=1e-3)
    ours, theirs = unpacked(x.bfloat16()).float(), unpacked(x)
    assert float((ours - theirs).std() / theirs.std()) < 0.01


def test_an_order_that_is_taken_for_known_is_the_kernels_own() -> None:
    block, raw = packed_block(), torch.randint(16, (128, 64))
    assert block == {"AVX512": 64, "AVX2": 32}.get(processor.capability(), 0)
    if block:
        assert torch.equal(quantization._packed_for_cpu(raw), packed_in_blocks(raw, block))


@pytest.mark.parametrize(("outputs", "is_known"), [(64, True), (48, True), (64, False)])
def test_without_dense_weights_many_rows_are_unpacked_where_that_is_possible(
    outputs: int, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = packed_block() if is_known else 0
    monkeypatch.setattr(quantization, "packed_block", lambda: block)
    seen: list[int] = []
    whole = UnpackedLinear.__call__
    monkeypatch.setattr(
        UnpackedLinear, "__call__", lambda self, x: seen.append(len(x)) or whole(self, x)
    )
    linear = torch.nn.Linear(64, outputs)
    product = Packing(4).pack(named(linear), DenseLinear(linear.weight.detach()))
    x = random(MANY_ROWS, 64).bfloat16().float()
    assert close(product(x)[:1], product(x[:1]))
    assert seen == ([MANY_ROWS] if block and outputs % block == 0 else [])


def test_few_rows_are_packed_and_many_dense() -> None:
    one, two = torch.ones(1, 4), torch.full((1, 4), 2.0)

    class Constant(DenseLinear):
        def __init__(self, value: torch.Tensor):
            self.value, self.dtype = value, value.dtype

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.value.expand(len(x), -1).clone()

    product = ByRows(Constant(one), Constant(two), 3)
    assert [float(product(torch.zeros(n, 2))[0, 0]) for n in (1, 3, 4)] == [1, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_layout_offers_the_same_products(
    dtype: torch.dtype, rows: int, with_bias: bool
) -> None:
    packed = PackedWeight.of(random(32, 64) / 8, 8)
    weight, x, other = (t.to(dtype) for t in (packed.dense(), random(rows, 64), random(rows, 32)))
    bias = random(32).to(dtype) if with_bias else None
    layouts: list[Linear] = [DenseLinear(weight, bias), laid_out(weight, bias)]
    layouts += [PackedLinear(packed, bias), ByRows(layouts[0], layouts[1], 3)]
    assert isinstance(layouts[1], ReorderedLinear) == can_reorder(dtype)
    y = x.float() @ packed.dense().T + (0 if bias is None else bias.float())
    expected = [y, torch.nn.functional.silu(y[:, :16]) * y[:, 16:], y + other.float()]
    for linear in layouts:
        made = [linear(x), linear.gated(x), linear.plus(x, other)]
        for ours, theirs in zip(made, expected, strict=True):
            assert ours.dtype is dtype
            error = float((ours.float() - theirs).abs().max())
            is_exact = dtype is torch.float32 and not isinstance(linear, PackedLinear)
            assert error < (1e-4 if is_exact else 0.08)
