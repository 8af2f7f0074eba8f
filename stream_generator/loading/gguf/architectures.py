"""The GGUF architectures that are read: their modules, and their settings in transformers.

Source: llama.cpp's convert_hf_to_gguf.py, which writes such files, and llama-model.cpp.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stream_generator.loading.gguf.metadata import Metadata, UnsupportedFile

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by their names in the file
Settings = dict[str, Any]  # of a configuration of transformers
Names = Mapping[str, str | tuple[str, ...]]  # transformers' module, and the file's modules

TOP: Names = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
ATTENTION: Names = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
}  # fmt: skip
GATED: Names = {
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
# The file has the gate and the other half in one tensor.
FUSED_GATED: Names = {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NORMS: Names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
HEAD_NORMS: Names = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
NORMS_AROUND: Names = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
EXPERTS: Names = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": "ffn_down_exps",
}
SHARED_EXPERT: Names = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}

RMS = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
LAYER_NORM = ("layer_norm_eps", "attention.layer_norm_epsilon")


def _nothing(metadata: Metadata, shapes: Shapes) -> Settings:
    return {}


@dataclass(frozen=True)
class Architecture:
    """How to read the files of one architecture.

    layer, top: the modules of a layer, and the modules outside of the layers.
    interleaved: whether the file has the two numbers of a rotary pair side by side.
    norm_offset: what the file adds to each weight of a norm.
    partial: whether transformers can rotate a part of each head.
    local_theta: the base of the rotary positions in layers with a sliding window, if it differs.
    """

    model_type: str
    layer: Names
    settings: Callable[[Metadata, Shapes], Settings] = _nothing
    top: Names = field(default_factory=lambda: TOP)
    epsilon: tuple[str, str] = RMS
    interleaved: bool = False
    norm_offset: int = 0
    partial: bool = False
    local_theta: float | None = None


def _llama(metadata: Metadata, shapes: Shapes) -> Settings:
    """Mistral, Mixtral and models with biases have this architecture too."""
    window = metadata.get("attention.sliding_window") or None
    in_layer = {name.removeprefix("blk.0.") for name in shapes if name.startswith("blk.0.")}
    if metadata.get("expert_count"):
        return {
            "model_type": "mixtral",
            "sliding_window": window,
            "num_local_experts": metadata.get("expert_count"),
            "num_experts_per_tok": metadata.require("expert_used_count"),
        }
    if window:
        return {"model_type": "mistral", "sliding_window": window}
    attention_bias, mlp_bias = "attn_q.bias" in in_layer, "ffn_gate.bias" in in_layer
    if attention_bias and not mlp_bias and "attn_output.bias" not in in_layer:
        return {"model_type": "qwen2", "use_sliding_window": False}
    return {"attention_bias": attention_bias, "mlp_bias": mlp_bias}


def _experts(metadata: Metadata, shapes: Shapes, *, normed: bool) -> Settings:
    metadata.get("expert_feed_forward_length")  # the shapes of the tensors have the number too
    gating = metadata.get("expert_gating_func", 1)
    if gating != 1:
        raise UnsupportedFile(f"its experts are chosen in an unknown way ({gating})")
    return {
        "num_experts": metadata.require("expert_count"),
        "num_experts_per_tok": metadata.require("expert_used_count"),
        "moe_intermediate_size": shapes["blk.0.ffn_gate_exps.weight"][1],
        "norm_topk_prob": metadata.get("expert_weights_norm", normed),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def _qwen2_moe(metadata: Metadata, shapes: Shapes) -> Settings:
    metadata.get("expert_shared_feed_forward_length")
    size = shapes["blk.0.ffn_gate_shexp.weight"][0]
    return _experts(metadata, shapes, normed=False) | {"shared_expert_intermediate_size": size}


def _qwen3_moe(metadata: Metadata, shapes: Shapes) -> Settings:
    return _experts(metadata, shapes, normed=True)


def _windows(metadata: Metadata, window: int, every: int) -> Settings:
    """Return the windows of a model in which each layer number `every` sees all positions."""
    layers = metadata.require("block_count")
    pattern = metadata.get("attention.sliding_window_pattern", every)
    if not isinstance(pattern, list):
        pattern = [(n + 1) % pattern != 0 for n in range(layers)]
    return {
        "sliding_window": metadata.get("attention.sliding_window", window),
        "layer_types": ["sliding_attention" if local else "full_attention" for local in pattern],
    }


def _query_scale(metadata: Metadata, layers_of_27b: int) -> Settings:
    """The file does not say the scale; the model with 27 billion parameters has its own."""
    heads = metadata.same_in_all_layers("attention.head_count")
    size = metadata.require("embedding_length") // heads
    if metadata.require("block_count") != layers_of_27b:
        size = metadata.get("attention.key_length", size)
    return {"query_pre_attn_scalar": size}


def _gemma2(metadata: Metadata, shapes: Shapes) -> Settings:
    return {
        "attn_logit_softcapping": metadata.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.get("final_logit_softcapping", 30.0),
        **_windows(metadata, 4096, 2),
        **_query_scale(metadata, 46),
    }


def _gemma3(metadata: Metadata, shapes: Shapes) -> Settings:
    return {
        "attn_logit_softcapping": metadata.get("attn_logit_softcapping") or None,
        "final_logit_softcapping": metadata.get("final_logit_softcapping") or None,
        **_windows(metadata, 1024, 6),
        **_query_scale(metadata, 62),
    }


def _phi3(metadata: Metadata, shapes: Shapes) -> Settings:
    context = metadata.get("context_length")
    return {
        "sliding_window": metadata.get("attention.sliding_window") or None,
        "original_max_position_embeddings": metadata.get(
            "rope.scaling.original_context_length", context
        ),
    }


def _granite(metadata: Metadata, shapes: Shapes) -> Settings:
    heads = metadata.same_in_all_layers("attention.head_count")
    size = metadata.get("attention.key_length", metadata.require("embedding_length") // heads)
    return {
        "attention_multiplier": metadata.get("attention.scale") or size**-0.5,
        "embedding_multiplier": metadata.get("embedding_scale") or 1.0,
        "residual_multiplier": metadata.get("residual_scale") or 1.0,
        "logits_scaling": metadata.get("logit_scale") or 1.0,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
    }


def _starcoder2(metadata: Metadata, shapes: Shapes) -> Settings:
    # All published models have this window, and the converter does not write it.
    return {"sliding_window": metadata.get("attention.sliding_window", 4096), "use_bias": True}


def _stablelm(metadata: Metadata, shapes: Shapes) -> Settings:
    metadata.get("use_parallel_residual")  # llama.cpp goes by the tensors too
    return {
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in shapes,
        "use_qkv_bias": "blk.0.attn_q.bias" in shapes,
    }


def _command_r(metadata: Metadata, shapes: Shapes) -> Settings:
    has_norms = "blk.0.attn_q_norm.weight" in shapes
    return {"logit_scale": metadata.require("logit_scale"), "use_qk_norm": has_norms}


def _cohere2(metadata: Metadata, shapes: Shapes) -> Settings:
    return {"logit_scale": metadata.require("logit_scale"), **_windows(metadata, 4096, 4)}


def _glm4(metadata: Metadata, shapes: Shapes) -> Settings:
    return {"attention_bias": "blk.0.attn_q.bias" in shapes}


_LLAMA: Names = {**ATTENTION, **GATED, **NORMS}
_PARALLEL: Names = {**ATTENTION, **GATED, "input_layernorm": "attn_norm", **HEAD_NORMS}

ARCHITECTURES = {
    "llama": Architecture("llama", {**_LLAMA, **EXPERTS}, _llama, interleaved=True),
    "qwen2": Architecture("qwen2", _LLAMA),
    "qwen2moe": Architecture(
        "qwen2_moe", {**ATTENTION, **NORMS, **EXPERTS, **SHARED_EXPERT}, _qwen2_moe
    ),
    "qwen3": Architecture("qwen3", {**_LLAMA, **HEAD_NORMS}),
    "qwen3moe": Architecture(
        "qwen3_moe", {**ATTENTION, **NORMS, **EXPERTS, **HEAD_NORMS}, _qwen3_moe
    ),
    "gemma": Architecture("gemma", _LLAMA, norm_offset=1),
    "gemma2": Architecture(
        "gemma2", {**ATTENTION, **GATED, **NORMS_AROUND}, _gemma2, norm_offset=1
    ),
    "gemma3": Architecture(
        "gemma3_text", {**ATTENTION, **GATED, **NORMS_AROUND, **HEAD_NORMS}, _gemma3,
        norm_offset=1, local_theta=10000.0,
    ),
    "phi3": Architecture(
        "phi3",
        {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output"}
        | {**FUSED_GATED, **NORMS},
        _phi3, partial=True,
    ),
    "granite": Architecture("granite", _LLAMA, _granite, interleaved=True),
    "olmo2": Architecture(
        "olmo2",
        {**ATTENTION, **GATED, **HEAD_NORMS, "post_attention_layernorm": "post_attention_norm"}
        | {"post_feedforward_layernorm": "post_ffw_norm"},
    ),
    "smollm3": Architecture("smollm3", _LLAMA, interleaved=True),
    "starcoder2": Architecture(
        "starcoder2",
        {**ATTENTION, **NORMS, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        _starcoder2, epsilon=("norm_epsilon", LAYER_NORM[1]),
    ),
    "stablelm": Architecture("stablelm", _LLAMA, _stablelm, epsilon=LAYER_NORM, partial=True),
    "command-r": Architecture("cohere", _PARALLEL, _command_r, epsilon=LAYER_NORM),
    "cohere2": Architecture("cohere2", _PARALLEL, _cohere2, epsilon=LAYER_NORM),
    "glm4": Architecture(
        "glm4",
        {**ATTENTION, **FUSED_GATED, **NORMS, "post_self_attn_layernorm": "post_attention_norm"}
        | {"post_mlp_layernorm": "post_ffw_norm"},
        _glm4, partial=True,
    ),
    "phi2": Architecture(
        "phi",
        {**ATTENTION, "self_attn.dense": "attn_output", "input_layernorm": "attn_norm"}
        | {"mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
        top={**TOP, "model.final_layernorm": "output_norm"}, epsilon=LAYER_NORM, partial=True,
    ),
}  # fmt: skip


def architecture_named(name: str) -> Architecture:
    """Return an architecture. Raises `UnsupportedFile` if the name is not known."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedFile(f"its GGUF architecture {name} is not known; known are {known}")
    return ARCHITECTURES[name]
