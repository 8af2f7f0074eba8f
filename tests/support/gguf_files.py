"""GGUF files for tests, in every common format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, dequantize, quantize
from transformers import PreTrainedModel

Kind = GGMLQuantizationType
SIX_BIT_TENSORS = {"attn_v", "ffn_down", "output", "token_embd"}  # in files of type M
Encode = Callable[[str, numpy.ndarray], tuple[numpy.ndarray, Kind]]


def as_float32(name: str, data: numpy.ndarray) -> tuple[numpy.ndarray, Kind]:
    """Keep a tensor in float32."""
    return data, Kind.F32


def as_file_type(file_type: str) -> Encode:
    """Encode tensors as llama.cpp's quantizer does for a file type, such as Q4_K_M."""

    def encode(name: str, data: numpy.ndarray) -> tuple[numpy.ndarray, Kind]:
        kind = Kind[file_type.removesuffix("_M")]
        if data.ndim == 1:
            kind = Kind.F32
        elif file_type.endswith("_M") and name.split(".")[-2] in SIX_BIT_TENSORS:
            kind = Kind.Q6_K
        return quantized(data, kind), kind

    return encode


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """The GGUF name of a weight, from its name in transformers."""
    key, prefix = name.removesuffix(".weight"), ""
    if key.startswith("model.layers."):
        _, _, number, key = key.split(".", 3)
        prefix = f"blk.{number}."
    return f"{prefix}{NAMES[key]}.weight"


def round_trip(encode: Encode, name: str, data: numpy.ndarray) -> numpy.ndarray:
    """Encode a tensor, then decode it again."""
    encoded, kind = encode(name, data)
    result: numpy.ndarray = dequantize(encoded, kind)
    return result


def quantized(data: numpy.ndarray, kind: Kind) -> numpy.ndarray:
    """Encode a tensor as blocks of a format."""
    own = {Kind.Q4_K: _q4_k, Kind.Q5_K: _q5_k, Kind.Q6_K: _q6_k}
    if kind not in own:  # the gguf package can encode it
        return quantize(data, kind)
    blocks = own[kind](data.reshape(-1, 256).astype(numpy.float32))
    return blocks.reshape(len(data), -1)


def _q4_k(x: numpy.ndarray) -> numpy.ndarray:
    head, q = _in_groups(x, 15)
    return numpy.concatenate([head, _nibbles(q)], axis=1)


def _q5_k(x: numpy.ndarray) -> numpy.ndarray:
    head, q = _in_groups(x, 31)
    fifth = (q >> 4 << numpy.arange(8, dtype=numpy.uint8)[:, None]).sum(1, dtype=numpy.uint8)
    return numpy.concatenate([head, fifth, _nibbles(q & 15)], axis=1)


def _in_groups(x: numpy.ndarray, most: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The first 16 bytes of each block, and the values [blocks, 8, 32], 0 to `most`."""
    x = x.reshape(-1, 8, 32)
    low = numpy.minimum(x.min(2), 0)
    scales, minima = (x.max(2) - low) / most, -low
    d = _in_half_precision(scales, 63)
    m = _in_half_precision(minima, 63)
    sc = numpy.rint(scales / d.astype(numpy.float32)).clip(0, 63).astype(numpy.uint8)
    mn = numpy.rint(minima / m.astype(numpy.float32)).clip(0, 63).astype(numpy.uint8)
    step = numpy.maximum(d.astype(numpy.float32) * sc, 1e-12)[..., None]
    q = numpy.rint((x + (m.astype(numpy.float32) * mn)[..., None]) / step).clip(0, most)
    six_bits = [
        sc[:, :4] | sc[:, 4:] >> 4 << 6,
        mn[:, :4] | mn[:, 4:] >> 4 << 6,
        sc[:, 4:] & 15 | (mn[:, 4:] & 15) << 4,
    ]
    head = numpy.concatenate([d.view(numpy.uint8), m.view(numpy.uint8), *six_bits], axis=1)
    return head, q.astype(numpy.uint8)


def _in_half_precision(scales: numpy.ndarray, most: int) -> numpy.ndarray:
    """The scale of a block, never 0. The scales of its groups are 0 to `most` times as large."""
    return numpy.maximum(scales.max(1, keepdims=True) / most, 1e-6).astype(numpy.float16)


def _nibbles(q: numpy.ndarray) -> numpy.ndarray:
    return (q[:, ::2] | q[:, 1::2] << 4).reshape(len(q), 128)


def _q6_k(x: numpy.ndarray) -> numpy.ndarray:
    x = x.reshape(-1, 16, 16)
    scales = numpy.abs(x).max(2) / 31
    d = _in_half_precision(scales, 127)
    sc = numpy.rint(scales / d.astype(numpy.float32)).clip(0, 127).astype(numpy.int8)
    step = numpy.maximum(d.astype(numpy.float32) * sc, 1e-12)[..., None]
    q = (numpy.rint(x / step).clip(-32, 31) + 32).astype(numpy.uint8).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4
    high = (q >> 4 << numpy.arange(0, 8, 2, dtype=numpy.uint8)[:, None]).sum(2, dtype=numpy.uint8)
    parts = [low.reshape(len(q), -1), high.reshape(len(q), -1)]
    return numpy.concatenate([*parts, sc.view(numpy.uint8), d.view(numpy.uint8)], axis=1)


def interleave_rotary_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Place the two halves of each rotary pair side by side, as Meta and llama.cpp do."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    model: PreTrainedModel,
    tokenizer: Any,
    path: Path,
    encode: Encode = as_float32,
    change: Callable[[GGUFWriter, dict[str, numpy.ndarray]], object] = lambda writer, tensors: None,
) -> Path:
    """Write a Llama as llama.cpp's converter does.

    tokenizer: one of Meta's kind, see `meta_tokenizer`. encode: encodes each tensor, given its GGUF
    name. change: may change the metadata and tensors before they are written.
    """
    config, state = model.config, model.state_dict()
    writer = GGUFWriter(path, "llama")
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL if w in special else TokenType.NORMAL for w in words])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    tensors: dict[str, numpy.ndarray] = {}
    for name, weight in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = interleave_rotary_pairs(weight, heads if "q_proj" in name else key_heads)
        tensors[gguf_name(name)] = weight.numpy().astype(numpy.float32)
    if config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = rope_divisors(size, config.rope_parameters["factor"])
    change(writer, tensors)
    for name, tensor in tensors.items():
        data, kind = encode(name, tensor)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rope_divisors(size: int, factor: float) -> numpy.ndarray:
    """The divisor of each rotary frequency in Llama 3.1, as in Meta's apply_scaling."""
    result = []
    for n in range(size // 2):
        wavelength = 2 * numpy.pi * 500000.0 ** (2 * n / size)
        if wavelength < 8192 / 4:
            result.append(1.0)
        elif wavelength > 8192:
            result.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            result.append(1 / ((1 - smooth) / factor + smooth))
    return numpy.array(result, dtype=numpy.float32)
