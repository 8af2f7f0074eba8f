"""Converts Meta's original layout (consolidated.*.pth, params.json, tokenizer.model), once.

Source: the reference code in Meta's llama-models (model.py, tokenizer.py), and transformers'
convert_llama_weights_to_hf.py for the order of rotary pairs.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from stream_generator.errors import CheckpointError, first_line
from stream_generator.loading.cache import SourceCache
from stream_generator.loading.safetensors_writer import write_weights

CONVERSION = 1  # raise this when the conversion changes, so that cached results are made again
CONTEXT, SCALED_CONTEXT = 8192, 131072  # tokens, without and with scaled rotary positions

# In the order of their ids, which follow the ids of ordinary tokens.
SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    "<|image|>", *(f"<|reserved_special_token_{n}|>" for n in range(2, 246)),
)  # fmt: skip
END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

# Meta's name, transformers' name, and the dimension along which Meta's files split the weight.
LAYER_WEIGHTS = (
    ("attention.wq", "self_attn.q_proj", 0),
    ("attention.wk", "self_attn.k_proj", 0),
    ("attention.wv", "self_attn.v_proj", 0),
    ("attention.wo", "self_attn.o_proj", 1),
    ("feed_forward.w1", "mlp.gate_proj", 0),
    ("feed_forward.w3", "mlp.up_proj", 0),
    ("feed_forward.w2", "mlp.down_proj", 1),
    ("attention_norm", "input_layernorm", None),
    ("ffn_norm", "post_attention_layernorm", None),
)


def is_meta_layout(directory: Path) -> bool:
    """Whether a directory holds a checkpoint in Meta's layout."""
    return (directory / "params.json").is_file() and any(directory.glob("consolidated*.pth"))


def convert_meta_checkpoint(source: Path, cache: Path | None = None) -> Path:
    """Return the model's directory in Hugging Face format, in the cache. Converts it once.

    Raises `CheckpointError` if a file is missing or damaged, or if the model is not a Llama 3.
    """
    files = sorted(source.glob("consolidated*.pth"))
    kept = SourceCache(source, [*files, source / "params.json"], cache)
    size = sum(file.stat().st_size for file in files)
    return kept.get("dense", CONVERSION, lambda directory: _convert(source, files, directory), size)


def _convert(source: Path, files: list[Path], target: Path) -> None:
    if not (source / "tokenizer.model").is_file():
        raise CheckpointError(f"{source} lacks tokenizer.model; download that file too")
    print(f"Converting {source.name} from Meta's layout (once) ...", file=sys.stderr)
    try:
        params = json.loads((source / "params.json").read_text())
        # Mapped, so that only the tensor being converted is in memory.
        shards = [torch.load(f, map_location="cpu", mmap=True, weights_only=True) for f in files]
        target.mkdir()
        tied = _write_weights(params, shards, target)
        _llama_config(params, shards, tied).save_pretrained(target)
    except Exception as error:  # a damaged file can make torch raise anything
        raise CheckpointError(
            f"{source} is not a Llama 3 checkpoint in Meta's layout: {first_line(error)}; use "
            "the model in Hugging Face format"
        ) from error
    tokenizer = meta_tokenizer(source / "tokenizer.model")
    tokenizer.save_pretrained(target)
    ends = [tokenizer.convert_tokens_to_ids(name) for name in END_TOKENS]
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends,
        do_sample=True, temperature=0.6, top_p=0.9,
    ).save_pretrained(target)  # fmt: skip


def meta_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Read Llama 3's tokenizer from Meta's file. It begins each text with <|begin_of_text|>."""
    backend = TikTokenConverter(str(file), extra_special_tokens=list(SPECIAL_TOKENS)).converted()
    begin = SPECIAL_TOKENS[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
    )


def _llama_config(params: dict[str, Any], shards: list[dict[str, Any]], tied: bool) -> LlamaConfig:
    heads = params["n_heads"]
    scaled = bool(params.get("use_scaled_rope"))
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": params.get("rope_theta", 500000.0),
    }
    if scaled:
        rope |= {
            "rope_type": "llama3",
            # If params.json lacks it: Llama 3.2's small models, which are tied, use 32.
            "factor": params.get("rope_scaling_factor") or (32.0 if tied else 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": params.get("rope_high_freq_factor") or 4.0,
            "original_max_position_embeddings": CONTEXT,
        }
    embedding = _embedding(params, shards)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=params["dim"],
        intermediate_size=sum(s["layers.0.feed_forward.w1.weight"].shape[0] for s in shards),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        vocab_size=embedding.shape[0],
        rms_norm_eps=params["norm_eps"],
        rope_parameters=rope,
        max_position_embeddings=SCALED_CONTEXT if scaled else CONTEXT,
        tie_word_embeddings=tied,
        dtype=embedding.dtype,
    )


def _write_weights(params: dict[str, Any], shards: list[dict[str, Any]], target: Path) -> bool:
    """Write the weights in parts, with an index; return whether embedding and output are tied."""
    tied = "output.weight" in shards[0] and torch.equal(
        _join(shards, "output.weight", 0), _embedding(params, shards)
    )
    count = params["n_layers"] * len(LAYER_WEIGHTS) + 3 - tied
    weights = (
        (name, tensor)
        for name, tensor in _weights(params, shards)
        if name != "lm_head.weight" or not tied
    )
    write_weights(tqdm(weights, total=count), target)
    return tied


def _weights(
    params: dict[str, Any], shards: list[dict[str, Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight by transformers' name. The output matrix comes last."""
    heads, dim = params["n_heads"], params["dim"]
    key_heads = params.get("n_kv_heads") or heads
    yield "model.embed_tokens.weight", _embedding(params, shards)
    for layer in range(params["n_layers"]):
        for theirs, ours, split_dim in LAYER_WEIGHTS:
            tensor = _join(shards, f"layers.{layer}.{theirs}.weight", split_dim)
            if theirs in ("attention.wk", "attention.wv"):
                tensor = _drop_copied_heads(tensor, len(shards), key_heads * dim // heads)
            if theirs == "attention.wq":
                tensor = _reorder_rotary_pairs(tensor, heads)
            elif theirs == "attention.wk":
                tensor = _reorder_rotary_pairs(tensor, key_heads)
            yield f"model.layers.{layer}.{ours}.weight", tensor
    yield "model.norm.weight", _join(shards, "norm.weight", None)
    if "output.weight" in shards[0]:
        yield "lm_head.weight", _join(shards, "output.weight", 0)


def _join(shards: list[dict[str, Any]], name: str, dim: int | None) -> torch.Tensor:
    tensors = [shard[name] for shard in shards]
    return tensors[0] if dim is None or len(tensors) == 1 else torch.cat(tensors, dim=dim)


def _embedding(params: dict[str, Any], shards: list[dict[str, Any]]) -> torch.Tensor:
    """Join the embedding, which the files split either by tokens or by features."""
    split_dim = 0 if shards[0]["tok_embeddings.weight"].shape[1] == params["dim"] else 1
    return _join(shards, "tok_embeddings.weight", split_dim)


def _drop_copied_heads(tensor: torch.Tensor, shards: int, rows: int) -> torch.Tensor:
    """Drop copies of key heads: with more files than heads, adjacent files share one."""
    copies = tensor.shape[0] // rows
    if copies == 1:
        return tensor
    return torch.cat(tensor.chunk(shards)[::copies])


def _reorder_rotary_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Move rotary pairs, which are neighbours in Meta's order, half a head apart."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
