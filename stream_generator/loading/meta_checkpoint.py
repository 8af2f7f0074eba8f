"""Meta's original layout (consolidated.*.pth, params.json, tokenizer.model), converted once.

Source: the reference code in Meta's llama-models (model.py, tokenizer.py), and transformers'
convert_llama_weights_to_hf.py for the order of rotary pairs.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import processors
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from stream_generator.errors import CheckpointError, first_line
from stream_generator.loading.cache import SourceCache

CONVERSION = 1  # raise it when the conversion changes, so that older results are not used
PART_BYTES = 2 * 1024**3  # of a file of weights: about what is in memory at a time
CONTEXT, SCALED_CONTEXT = 8192, 131072  # without and with scaled rotary embeddings

# In the order of their ids, after the last one of the text.
SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    "<|image|>", *(f"<|reserved_special_token_{n}|>" for n in range(2, 246)),
)  # fmt: skip
END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

# Meta's name, transformers' name, and the dimension along which shards are joined.
LAYER = (
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
    """Whether a directory holds a checkpoint as Meta distributes it."""
    return (directory / "params.json").is_file() and any(directory.glob("consolidated*.pth"))


def converted_meta_checkpoint(source: Path, cache: Path | None = None) -> Path:
    """The same model as a directory in Hugging Face format, in the cache.

    Raises `CheckpointError` for what is missing, damaged, or not Llama 3.
    """
    files = sorted(source.glob("consolidated*.pth"))
    kept = SourceCache(source, [*files, source / "params.json"], cache)
    size = sum(file.stat().st_size for file in files)
    return kept.made(
        "dense", CONVERSION, lambda directory: _convert(source, files, directory), size
    )


def _convert(source: Path, files: list[Path], target: Path) -> None:
    if not (source / "tokenizer.model").is_file():
        raise CheckpointError(f"{source} lacks tokenizer.model; download it again")
    print(f"Converting {source.name} from Meta's layout (once) ...", file=sys.stderr)
    try:
        params = json.loads((source / "params.json").read_text())
        # Mapped, not read: a tensor is in memory while it is converted.
        shards = [torch.load(f, map_location="cpu", mmap=True, weights_only=True) for f in files]
        target.mkdir()
        tied = _write_weights(params, shards, target)
        _config(params, shards, tied).save_pretrained(target)
    except Exception as error:  # whatever a foreign file makes torch raise, it means the same
        raise CheckpointError(
            f"{source} is not a Llama 3 checkpoint as Meta distributes it: {first_line(error)}"
        ) from error
    tokenizer = meta_tokenizer(source / "tokenizer.model")
    tokenizer.save_pretrained(target)
    ends = [tokenizer.convert_tokens_to_ids(name) for name in END_TOKENS]
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends,
        do_sample=True, temperature=0.6, top_p=0.9,
    ).save_pretrained(target)  # fmt: skip


def meta_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Llama 3's tokenizer, out of Meta's own file; a text that is encoded begins with its mark."""
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


def _config(params: dict[str, Any], shards: list[dict[str, Any]], tied: bool) -> LlamaConfig:
    heads = params["n_heads"]
    scaled = bool(params.get("use_scaled_rope"))
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": params.get("rope_theta", 500000.0),
    }
    if scaled:
        rope |= {
            "rope_type": "llama3",
            # Where it is not said: Llama 3.2's small models, the tied ones, have their own.
            "factor": params.get("rope_scaling_factor") or (32.0 if tied else 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": params.get("rope_high_freq_factor") or 4.0,
            "original_max_position_embeddings": CONTEXT,
        }
    embedding = _joined(shards, "tok_embeddings.weight", _embedding_dim(params, shards))
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
    """Write all weights in parts, with an index; returns whether the output is the embedding."""
    part: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    total = 0

    def write() -> None:
        name = f"model-{len(set(where.values())) + 1:05}.safetensors"
        save_file(part, target / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, name))
        part.clear()

    tied = False
    for name, tensor in tqdm(_weights(params, shards), total=params["n_layers"] * len(LAYER) + 3):
        if name == "lm_head.weight":
            embedding = _joined(shards, "tok_embeddings.weight", _embedding_dim(params, shards))
            tied = torch.equal(tensor, embedding)
            if tied:
                continue
        part[name] = tensor.contiguous()
        total += tensor.nbytes
        if sum(t.nbytes for t in part.values()) > PART_BYTES:
            write()
    write()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return tied


def _weights(
    params: dict[str, Any], shards: list[dict[str, Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under transformers' name, the output's matrix last."""
    heads, dim = params["n_heads"], params["dim"]
    key_heads = params.get("n_kv_heads") or heads
    yield (
        "model.embed_tokens.weight",
        _joined(shards, "tok_embeddings.weight", _embedding_dim(params, shards)),
    )
    for layer in range(params["n_layers"]):
        for theirs, ours, along in LAYER:
            tensor = _joined(shards, f"layers.{layer}.{theirs}.weight", along)
            if theirs in ("attention.wk", "attention.wv"):
                tensor = _without_copies(tensor, len(shards), key_heads * dim // heads)
            if theirs == "attention.wq":
                tensor = _halves_apart(tensor, heads)
            elif theirs == "attention.wk":
                tensor = _halves_apart(tensor, key_heads)
            yield f"model.layers.{layer}.{ours}.weight", tensor
    yield "model.norm.weight", _joined(shards, "norm.weight", None)
    if "output.weight" in shards[0]:
        yield "lm_head.weight", _joined(shards, "output.weight", 0)


def _joined(shards: list[dict[str, Any]], name: str, along: int | None) -> torch.Tensor:
    tensors = [shard[name] for shard in shards]
    return tensors[0] if along is None or len(tensors) == 1 else torch.cat(tensors, dim=along)


def _embedding_dim(params: dict[str, Any], shards: list[dict[str, Any]]) -> int:
    """Whether shards hold some words each, or some of each word's numbers."""
    return 0 if shards[0]["tok_embeddings.weight"].shape[1] == params["dim"] else 1


def _without_copies(tensor: torch.Tensor, shards: int, rows: int) -> torch.Tensor:
    """With more shards than key heads, neighbouring shards hold the same head."""
    copies = tensor.shape[0] // rows
    if copies == 1:
        return tensor
    return torch.cat(tensor.chunk(shards)[::copies])


def _halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs are neighbours for Meta, and lie half a head apart for transformers."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
