"""The GPU kernels equal the operations of PyTorch that they replace."""

import pytest
import torch
from torch.nn import functional

from stream_generator.model import gpu_kernels
from stream_generator.model.packed_weight import PackedWeight

# Without a GPU, Triton's interpreter runs them: TRITON_INTERPRET=1 pytest tests/model
triton = pytest.importorskip("triton", reason="the kernels need Triton")
if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("Triton needs a GPU, or its interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"rtol": 2**-7, "atol": 2**-7}  # one rounding to bfloat16


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("shape", [(1, 64), (3, 960), (2, 1, 5, 128)])
def test_rms_norm_equals_pytorchs(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(shape[-1])
    expected = functional.rms_norm(x.float(), weight.shape, weight.float(), 1e-5)
    torch.testing.assert_close(gpu_kernels.rms_norm(x, weight, 1e-5).float(), expected, **CLOSE)


@pytest.mark.parametrize("size", [8, 64, 96])
def test_rotation_in_place_equals_its_formula(size: int) -> None:
    whole = random(3, 1, 7, size)
    heads = whole[:, :, :5]  # the values behind them stay
    cosines, sines = random(3, 1, 1, size), random(3, 1, 1, size)
    swapped = heads.float().roll(size // 2, dims=-1)
    expected = whole.float()
    expected[:, :, :5] = heads.float() * cosines.float() + swapped * sines.float()
    gpu_kernels.rotate(heads, cosines, sines, out=heads)
    torch.testing.assert_close(whole.float(), expected, **CLOSE)


@pytest.mark.parametrize("size", [16, 1500])
def test_silu_product_equals_its_formula(size: int) -> None:
    gate_up = random(3, 2 * size)
    gate, up = gate_up.float().chunk(2, dim=1)
    result = gpu_kernels.silu_product(gate_up).float()
    torch.testing.assert_close(result, functional.silu(gate) * up, **CLOSE)


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_gives_the_dense_weight(bits: int) -> None:
    weight = PackedWeight.of(random(24, 320).float(), bits)
    result = gpu_kernels.unpack(weight.stored(), weight.scales, weight.zeros, bits, torch.float32)
    torch.testing.assert_close(result, weight.dense())


def test_the_kernels_are_used_only_inside_a_graph() -> None:
    assert not gpu_kernels.use_kernels()
    with gpu_kernels.inside_a_graph():
        assert gpu_kernels.use_kernels()
    assert not gpu_kernels.use_kernels()
