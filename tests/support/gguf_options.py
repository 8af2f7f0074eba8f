"""Options of GGUF files: what a file of an architecture can say beside its usual values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
from gguf import GGUFWriter, RopeScalingType
from support.gguf_families import FAMILIES, ORIGINAL, THETA, Change, Family, Tensors

ROTARY = ["llama", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "granite", "glm4", "olmo2"]
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0],
           "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0]}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}


@dataclass(frozen=True)
class Option:
    """families: that have it. config: of the model. change: what is written into the file."""

    families: list[str]
    config: Mapping[str, Any] = field(default_factory=dict)
    change: Change = lambda writer, tensors: None


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": THETA} | parameters}


def _without_type(writer: GGUFWriter, tensors: Tensors) -> None:
    values = writer.kv_data[0]
    del values[next(key for key in values if key.endswith("rope.scaling.type"))]


def _old_key(writer: GGUFWriter, tensors: Tensors) -> None:
    _without_type(writer, tensors)
    values = writer.kv_data[0]
    key = next(key for key in values if key.endswith("rope.scaling.factor"))
    values[key.replace("scaling.factor", "scale_linear")] = values.pop(key)


def _as_divisors(writer: GGUFWriter, tensors: Tensors) -> None:
    _without_type(writer, tensors)
    values = writer.kv_data[0]
    del values[next(key for key in values if key.endswith("rope.scaling.factor"))]
    tensors["rope_freqs.weight"] = numpy.full(8, 4.0, numpy.float32)


def _neutral(writer: GGUFWriter, tensors: Tensors) -> None:
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    writer.add_rope_scaling_finetuned(False)
    writer.add_expert_count(0)
    writer.add_causal_attention(True)
    writer.add_string("general.anything", "x")


_LINEAR = _rope(rope_type="linear", factor=4.0)
_PATTERN = ["sliding_attention", "full_attention"]
OPTIONS = {
    "usual values": Option(list(FAMILIES)),
    "neutral values": Option(["llama", "qwen2", "gemma2", "olmo2", "phi3"], {}, _neutral),
    "tied": Option(["llama", "qwen2", "phi3", "granite", "smollm3"], {"tie_word_embeddings": True}),
    "untied": Option(["starcoder2"], {"tie_word_embeddings": False}),
    "head size": Option(["llama", "mistral", "mixtral", "qwen2", "granite"], {"head_dim": 32}),
    "as many key heads as heads": Option(["llama", "phi3", "qwen3"], {"num_key_value_heads": 4}),
    "linear": Option([*ROTARY, "cohere2"], _LINEAR),
    "linear without a type": Option(ROTARY, _LINEAR, _without_type),
    "old key for linear": Option(ROTARY, _LINEAR, _old_key),
    "equal divisors": Option(["llama", "granite"], _LINEAR, _as_divisors),
    "yarn": Option(["llama", "qwen2", "qwen3", "granite", "mixtral"], _rope(**YARN)),
    "yarn with its keys": Option(
        ["llama", "qwen2"], _rope(**YARN, attention_factor=1.3, beta_fast=8.0, beta_slow=2.0)
    ),
    "llama3": Option(
        ["llama"],
        _rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192, rope_theta=500000.0),
    ),
    "longrope": Option(
        ["phi3"],
        _rope(rope_type="longrope", **FACTORS, attention_factor=1.2,
              original_max_position_embeddings=ORIGINAL, partial_rotary_factor=1.0)
        | {"original_max_position_embeddings": ORIGINAL},
    ),
    "partial longrope": Option(
        ["phi3"],
        _rope(rope_type="longrope", **{name: values[:6] for name, values in FACTORS.items()},
              attention_factor=1.2, original_max_position_embeddings=ORIGINAL,
              partial_rotary_factor=0.75)
        | {"original_max_position_embeddings": ORIGINAL},
    ),
    "local base": Option(
        ["gemma3"], {"local_theta": 3000.0},
        lambda writer, tensors: writer.add_rope_freq_base_swa(3000.0),
    ),
    "partial": Option(
        ["phi3", "stablelm", "glm4", "phi2"],
        _rope(rope_type="default", partial_rotary_factor=0.75),
    ),
    "whole": Option(
        ["stablelm", "glm4", "phi2"], _rope(rope_type="default", partial_rotary_factor=1.0)
    ),
    "window": Option(["mistral", "mixtral", "phi3"], {"sliding_window": 4}),
    "starcoder's window": Option(
        ["starcoder2"], {"sliding_window": 4}, lambda writer, tensors: writer.add_sliding_window(4)
    ),
    "window pattern": Option(
        ["gemma3"], {"layer_types": [*_PATTERN * 3, "sliding_attention"]},
        lambda writer, tensors: writer.add_sliding_window_pattern(2),
    ),
    "biases": Option(["llama", "granite"], {"attention_bias": True, "mlp_bias": True}),
    "attention biases": Option(["llama", "glm4"], {"attention_bias": True}),
    "no biases": Option(["glm4"], {"attention_bias": False}),
    "qkv biases": Option(["stablelm"], {"use_qkv_bias": True}),
    "parallel": Option(["stablelm"], {"use_parallel_residual": True}),
    "caps": Option(["gemma2"], {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "27b": Option(["gemma2"], {"num_hidden_layers": 46, "query_pre_attn_scalar": 16}),
    "gemma3 27b": Option(["gemma3"], {"num_hidden_layers": 62, "query_pre_attn_scalar": 16}),
    "head norms": Option(["command-r"], {"use_qk_norm": True}),
    "one expert": Option(["mixtral", "qwen2moe", "qwen3moe"], {"num_experts_per_tok": 1}),
    "normed experts": Option(
        ["qwen2moe"], {"norm_topk_prob": True},
        lambda writer, tensors: writer.add_expert_weights_norm(True),
    ),
}  # fmt: skip
QWEN_AS_LLAMA = Family("llama", "qwen2", interleaved=True)  # biases in three products only
CASES = [(name, family) for name, option in OPTIONS.items() for family in option.families]
