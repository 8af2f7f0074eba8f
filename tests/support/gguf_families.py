"""Tiny random models of each GGUF architecture, written as llama.cpp's converter writes them.

The names of tensors come from the `gguf` package, not from this project.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    RopeScalingType,
    TokenType,
    get_tensor_name_map,
)
from support.fakes import byte_alphabet
from support.gguf_files import interleave_rotary_pairs, quantized, rope_divisors, round_trip
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stream_generator.engine.graph_runner import GraphRunner
from stream_generator.loaded_model import Checkpoint
from stream_generator.model.saved_graph import SavedGraph

Kind = GGMLQuantizationType
Tensors = dict[str, numpy.ndarray]
Change = Callable[[GGUFWriter, Tensors], object]

WORDS = [*byte_alphabet(), "he", "ll"]
SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>", "<|message|>"]
BEGIN, END, TURN, MESSAGE = range(len(WORDS), len(WORDS) + len(SPECIAL))
VOCABULARY = 288  # with unused rows: a multiple of the block size of all formats
CONTEXT, ORIGINAL = 1024, 256  # tokens; the second before the positions of a model were scaled
THETA = 5000.0

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """architecture: in the file. config: differences from `COMMON`. write: writes what only this
    architecture has."""

    architecture: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    write: Callable[[GGUFWriter, Any], object] = lambda writer, config: None
    interleaved: bool = False
    norm_offset: int = 0


def _window(writer: GGUFWriter, config: Any) -> None:
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)


def _mixtral(writer: GGUFWriter, config: Any) -> None:
    _window(writer, config)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)


def _qwen_moe(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if shared := getattr(config, "shared_expert_intermediate_size", 0):
        writer.add_expert_shared_feed_forward_length(shared)


def _gemma2(writer: GGUFWriter, config: Any) -> None:
    _window(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _granite(writer: GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _cohere2(writer: GGUFWriter, config: Any) -> None:
    writer.add_logit_scale(config.logit_scale)
    _window(writer, config)


def _phi3(writer: GGUFWriter, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    _window(writer, config)


_GEMMA = {"tie_word_embeddings": True, "head_dim": 32}
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "use_sliding_window": False, "mlp_only_layers": [], "decoder_sparse_step": 1,
}  # fmt: skip
_PARTIAL = {"rope_parameters": {"rope_theta": THETA, "partial_rotary_factor": 0.5}}

FAMILIES = {
    "llama": Family("llama", "llama", interleaved=True),
    "mistral": Family("llama", "mistral", {"sliding_window": 6}, _window, interleaved=True),
    "mixtral": Family(
        "llama", "mixtral", {"num_local_experts": 4, "sliding_window": None, "head_dim": 16},
        _mixtral, interleaved=True,
    ),
    "qwen2": Family("qwen2", "qwen2"),
    "qwen2moe": Family(
        "qwen2moe", "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": False}, _qwen_moe,
    ),
    "qwen3": Family("qwen3", "qwen3", {"head_dim": 32}),
    "qwen3moe": Family(
        "qwen3moe", "qwen3_moe", {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True}, _qwen_moe
    ),
    "gemma": Family("gemma", "gemma", _GEMMA, norm_offset=1),
    "gemma2": Family(
        "gemma2", "gemma2", {**_GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 6}, _gemma2,
        norm_offset=1,
    ),
    "gemma3": Family(
        "gemma3", "gemma3_text",
        {**_GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 6, "num_hidden_layers": 7},
        _window, norm_offset=1,
    ),
    "phi3": Family("phi3", "phi3", {"original_max_position_embeddings": CONTEXT}, _phi3),
    "granite": Family(
        "granite", "granite",
        {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
         "logits_scaling": 2.0},
        _granite, interleaved=True,
    ),
    "olmo2": Family("olmo2", "olmo2"),
    "smollm3": Family("smollm3", "smollm3", {"num_hidden_layers": 5}, interleaved=True),
    "starcoder2": Family(
        "starcoder2", "starcoder2", {"tie_word_embeddings": True, "sliding_window": 4096}
    ),
    "stablelm": Family("stablelm", "stablelm", _PARTIAL),
    "command-r": Family(
        "command-r", "cohere", {"tie_word_embeddings": True, "logit_scale": 0.5},
        lambda writer, config: writer.add_logit_scale(config.logit_scale),
    ),
    "cohere2": Family(
        "cohere2", "cohere2",
        {"tie_word_embeddings": True, "logit_scale": 0.5, "sliding_window": 6,
         "num_hidden_layers": 5, "head_dim": 16},
        _cohere2,
    ),
    "glm4": Family("glm4", "glm4", {"head_dim": 16, **_PARTIAL}),
    "phi2": Family("phi2", "phi", {"num_key_value_heads": 4, **_PARTIAL}),
}  # fmt: skip


def family_model(family: Family, **changes: Any) -> PreTrainedModel:
    """A random model of a family, in float32. Each parameter is random, also norms and biases."""
    settings = COMMON | {"rope_parameters": {"rope_theta": THETA}} | family.config | changes
    settings = copy.deepcopy(settings)  # transformers completes them in place
    if family.model_type == "gemma3_text":
        rope = {"rope_type": "default", **settings["rope_parameters"]}
        local = {"rope_type": "default", "rope_theta": settings.pop("local_theta", 10000.0)}
        settings["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    torch.manual_seed(len(str(sorted(settings.items()))))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family.model_type, **settings)
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter.shape[-1]))
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.uniform_(parameter, 0.5 - family.norm_offset, 1.5 - family.norm_offset)
    return model.float().eval()


ROUTERS = ("mlp.gate.weight", "shared_expert_gate.weight")  # in float32 in every file


@torch.no_grad()
def rounded(model: PreTrainedModel, kind: Kind, dtype: torch.dtype = torch.float32) -> None:
    """Replace a model's matrices by the values that a format holds, and then a dtype."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith(ROUTERS):
            data = round_trip(
                lambda name, data: (quantized(data, kind), kind), "", parameter.numpy()
            )
            parameter.copy_(torch.from_numpy(data).view_as(parameter).to(dtype))


@torch.inference_mode()
def family_logits(checkpoint: Checkpoint | PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits after each of the ids, by the graph if the checkpoint has one."""
    if isinstance(checkpoint, PreTrainedModel):
        return checkpoint(input_ids=ids[None]).logits[0].float()
    if checkpoint.graph is None:
        return family_logits(checkpoint.model, ids)
    runner = GraphRunner(SavedGraph.load(checkpoint.graph), slots=1, context=len(ids))
    return runner.chunk(0, 0, ids.tolist(), range(len(ids)))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The standard deviation of the difference, relative to that of `theirs`."""
    return float((ours - theirs).std() / theirs.std())


def write_family(
    family: Family,
    model: PreTrainedModel,
    path: Path,
    kind: Kind = Kind.F32,
    change: Change = lambda writer, tensors: None,
    **split: int,
) -> Path:
    """Write a model. change: may change the metadata and tensors before they are written.

    split: arguments of `GGUFWriter` that split the file.
    """
    writer = GGUFWriter(path, family.architecture, **split)
    _write_metadata(writer, model.config, family)
    family.write(writer, model.config)
    _write_tokenizer(writer)
    tensors = _tensors(family, model)
    change(writer, tensors)
    for name, data in tensors.items():
        own = kind if data.ndim > 1 and "ffn_gate_inp" not in name else Kind.F32
        writer.add_tensor(name, quantized(data, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer: GGUFWriter, config: Any, family: Family) -> None:
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_vocab_size(config.vocab_size)
    if head_size != config.hidden_size // heads or "gemma" in family.architecture:
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        found = getattr(config, "layer_norm_eps", None) or config.norm_epsilon
        writer.add_layer_norm_eps(found)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])


def _write_tokenizer(writer: GGUFWriter) -> None:
    names = [*WORDS, *SPECIAL]
    unused = [f"<unused{n}>" for n in range(VOCABULARY - len(names))]
    control = [TokenType.CONTROL] * (len(SPECIAL) + len(unused))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names + unused)
    writer.add_token_types([TokenType.NORMAL] * len(WORDS) + control)
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)


def _tensors(family: Family, model: PreTrainedModel) -> Tensors:
    """The tensors of a model by their names in a file, in the order of a file."""
    config = model.config
    kind = next(k for k, name in MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer = f"blk.{name.split('.')[2]}." if name.startswith("model.layers.") else ""
        if name.endswith("experts.gate_up_proj"):
            halves = weight.chunk(2, dim=1)
            found |= {f"{layer}ffn_gate_exps.weight": halves[0]}
            found |= {f"{layer}ffn_up_exps.weight": halves[1]}
            continue
        if name.endswith("experts.down_proj"):
            found[f"{layer}ffn_down_exps.weight"] = weight
            continue
        module, _, end = name.rpartition(".")
        if family.interleaved and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads
            heads = heads if module.endswith("q_proj") else config.num_key_value_heads
            rows = interleave_rotary_pairs(weight.reshape(len(weight), -1), heads)
            weight = rows.reshape(weight.shape)
        if module.endswith("shared_expert_gate"):
            weight = weight[0]
        theirs = names.get_name(module)
        assert theirs is not None, f"the gguf package does not know {module}"
        offset = family.norm_offset if module.endswith("norm") else 0
        found[f"{theirs}.{end}"] = weight + offset
    tensors = {name: weight.detach().numpy() for name, weight in found.items()}
    return tensors | _rotary_tensors(config)


def _rotary_tensors(config: Any) -> Tensors:
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        size = config.hidden_size // config.num_attention_heads
        return {"rope_freqs.weight": rope_divisors(size, rope["factor"])}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{name}.weight": numpy.array(rope[f"{name}_factor"], numpy.float32)
            for name in ("long", "short")
        }
    return {}
