"""The packed weights of a GGUF equal those of its blocks exactly."""

from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize
from support.gguf_files import quantized

from stream_generator.loading.demo_model import demo_gguf
from stream_generator.loading.gguf.weights import GgufWeights

HEADS, KEY_HEADS, SIZE = 4, 2, 16
Kind = GGMLQuantizationType
FORMATS = {
    Kind.Q4_0: (4, 32, False), Kind.Q4_1: (4, 32, True), Kind.Q8_0: (8, 32, False),
    Kind.Q4_K: (4, 32, True), Kind.Q5_K: (8, 32, True), Kind.Q6_K: (8, 16, False),
}  # fmt: skip


def write(path: Path, architecture: str, tensors: dict[str, numpy.ndarray], kind: Kind) -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    for name, data in tensors.items():
        writer.add_tensor(name, quantized(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_weights_equal_the_blocks_that_the_gguf_package_decodes(kind: Kind, tmp_path: Path) -> None:
    data = numpy.random.default_rng(0).normal(size=(64, 512)).astype(numpy.float32)
    tensors = {"blk.0.ffn_up.weight": data, "token_embd.weight": data}
    weights = GgufWeights(write(tmp_path / "model.gguf", "qwen2", tensors, kind))
    assert weights.is_packed
    expected = torch.from_numpy(dequantize(quantized(data, kind), kind))
    for name in ("model.layers.0.mlp.up_proj", "model.embed_tokens", "lm_head"):
        packed = weights.packed(name)
        assert packed is not None
        assert packed.format == FORMATS[kind]
        assert torch.equal(packed.dense(), expected)
        assert torch.equal(weights.dense(f"{name}.weight"), expected)
    with pytest.raises(KeyError, match=r"blk\.0\.ffn_down"):
        weights.packed("model.layers.0.mlp.down_proj")


def test_float16_weights_of_a_gguf_are_not_packed(tmp_path: Path) -> None:
    data = numpy.ones((32, 32), numpy.float32)
    weights = GgufWeights(write(tmp_path / "m.gguf", "qwen2", {"output.weight": data}, Kind.F16))
    assert not weights.is_packed
    assert weights.packed("lm_head") is None
    assert torch.equal(weights.dense("lm_head.weight"), torch.ones(32, 32))


def test_query_and_key_rows_of_a_llama_gguf_are_put_back_in_order(tmp_path: Path) -> None:
    data = numpy.arange(HEADS * SIZE, dtype=numpy.float32)[:, None].repeat(64, axis=1)
    # llama.cpp's converter interleaves the two halves of each head.
    interleaved = data.reshape(HEADS, 2, SIZE // 2, 64).swapaxes(1, 2).reshape(data.shape)
    tensors = {"blk.0.attn_q.weight": interleaved, "blk.0.attn_v.weight": data}
    weights = GgufWeights(write(tmp_path / "model.gguf", "llama", tensors, Kind.Q8_0))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"):
        packed = weights.packed(name)
        assert packed is not None
        for dense in (packed.dense(), weights.dense(f"{name}.weight")):
            assert torch.allclose(dense, torch.from_numpy(data), rtol=0.01)


def test_an_unknown_architecture_is_named_in_the_error(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf", "nonesuch", {"a.weight": numpy.ones((32, 32), "f4")}, Kind.F16
    )
    with pytest.raises(ValueError, match="nonesuch"):
        GgufWeights(path)


def test_all_products_of_the_demo_model_are_packed() -> None:
    weights = GgufWeights(demo_gguf())
    for layer in range(30):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            packed = weights.packed(f"model.layers.{layer}.self_attn.{part}")
            assert packed is not None
            assert packed.format == (4, 32, True)
    assert weights.packed("lm_head") is not None
