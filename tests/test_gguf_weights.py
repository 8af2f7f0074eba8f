"""Packed weights of a GGUF are those of its blocks."""

from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from transformers import AutoModelForCausalLM

from stream_generator.loading.demo_model import DEMO_GGUF, demo_model_directory
from stream_generator.loading.gguf_checkpoint import PACKED_FILE
from stream_generator.loading.gguf_weights import packed_weights
from stream_generator.loading.packed_file import PackedFile, save_packed
from stream_generator.loading.pypi_file import bring

HEADS, KEY_HEADS, SIZE = 4, 2, 16
KINDS = [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0]


def write(path: Path, architecture: str, tensors: dict[str, numpy.ndarray], kind: object) -> None:
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    for name, data in tensors.items():
        writer.add_tensor(name, quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path, names: list[str]) -> PackedFile:
    save_packed(packed_weights(path, names), path.with_suffix(".safetensors"))
    return PackedFile(path.with_suffix(".safetensors"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_stand_for_what_gguf_makes_of_the_blocks(
    kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    data = numpy.random.default_rng(0).normal(size=(64, 64)).astype(numpy.float32)
    path = tmp_path / "model.gguf"
    write(path, "qwen2", {"blk.0.ffn_up.weight": data, "token_embd.weight": data}, kind)
    weights = read(path, ["model.layers.0.mlp.up_proj", "lm_head", "model.nothing"])
    assert set(weights) == {"model.layers.0.mlp.up_proj", "lm_head"}
    expected = torch.from_numpy(dequantize(quantize(data, kind), kind))
    for weight in weights.values():
        assert weight.bits == (8 if kind is GGMLQuantizationType.Q8_0 else 4)
        # bfloat16 has 8 bits of a scale, and of a zero of a few times a weight
        assert torch.allclose(weight.dense(), expected, atol=0.03)
        assert float((weight.dense() - expected).std()) < 0.006


def test_a_llamas_queries_and_keys_are_put_back_in_order(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_0
    data = numpy.arange(HEADS * SIZE, dtype=numpy.float32)[:, None].repeat(64, axis=1)
    # As llama.cpp's converter lays them out: the halves of a head in turns.
    mixed = data.reshape(HEADS, 2, SIZE // 2, 64).swapaxes(1, 2).reshape(data.shape)
    path = tmp_path / "model.gguf"
    write(path, "llama", {"blk.0.attn_q.weight": mixed, "blk.0.attn_v.weight": data}, kind)
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qv"]
    for weight in read(path, names).values():
        assert torch.allclose(weight.dense(), torch.from_numpy(data), rtol=0.01)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "nonesuch", {"a.weight": numpy.ones((32, 32), "f4")}, KINDS[0])
    with pytest.raises(ValueError, match="nonesuch"):
        packed_weights(tmp_path / "model.gguf", [])


def test_the_demo_models_packed_weights_are_its_dense_ones() -> None:
    """All 210 products of its layers and its output matrix, up to the rounding to bfloat16."""
    directory = demo_model_directory()
    saved = PackedFile(directory / PACKED_FILE)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert saved.keys() == linears.keys()
    assert len(saved) == 211
    for name, linear in linears.items():
        weight = linear.weight.detach()
        error = (saved[name].dense() - weight).std() / weight.std()
        assert float(error) < 0.004, name
    assert bring(DEMO_GGUF).is_file()
