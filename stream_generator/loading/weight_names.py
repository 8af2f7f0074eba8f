"""Compares the names of stored weights with those that a model has."""

import logging
import re
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from stream_generator.errors import CheckpointError

logger = logging.getLogger(__name__)

# PyTorch's wrappers put these names into the names of the weights that they wrap.
WRAPPERS = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
DATA_PARALLEL = "module."  # only a wrapper's name if all weights have it
LORA = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save)\b")
QUANTIZED = re.compile(r"\.(qweight|qzeros|scales|g_idx|weight_scale(_inv)?|absmax|quant_map)\b")
HEADS = re.compile(r"^(model\.)?(score|classifier|classification_head|qa_outputs|reward_head)\.")

# Weights that a causal language model does not use: buffers of old versions of transformers, the
# value of a state in reinforcement learning, and heads that predict several tokens at once.
UNUSED = re.compile(
    r"(rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias|\.attention\.bias|\bposition_ids)$"
    r"|^v_head\.|(^|\.)mtp\."
)


def stored_names(files: Iterable[Path]) -> list[str]:
    """List the names of the weights in files, without reading the weights."""
    names: list[str] = []
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                names += weights.keys()
        else:
            mapped = zipfile.is_zipfile(file)  # not in the format of PyTorch before 1.6
            names += torch.load(file, map_location="meta", mmap=mapped, weights_only=True)
    return names


def key_mapping(names: Iterable[str]) -> dict[str, str]:
    """Return what to replace in stored names, pattern by pattern, to get the model's own names."""
    names = list(names)
    mapping = {WRAPPERS: ""} if any(re.search(WRAPPERS, name) for name in names) else {}
    plain = [re.sub(WRAPPERS, "", name) for name in names]
    if plain and all(name.startswith(DATA_PARALLEL) for name in plain):
        mapping[rf"^{re.escape(DATA_PARALLEL)}"] = ""
    return mapping


def renamed(name: str, mapping: dict[str, str]) -> str:
    """Apply `key_mapping` to a stored name."""
    for pattern, replacement in mapping.items():
        name = re.sub(pattern, replacement, name)
    return name


def check_names(source: object, missing: Collection[str], left_over: Collection[str]) -> None:
    """Raise `CheckpointError` if weights are missing, or left over so that they may be needed.

    missing: the model's names that the files lack. left_over: stored names that the model lacks.
    """
    unused = sorted(name for name in left_over if UNUSED.search(name))
    wrong = sorted(set(left_over) - set(unused))
    if missing or wrong:
        raise CheckpointError(_reason(str(source), sorted(missing), wrong))
    if unused:
        logger.info("ignoring %d weights that replies do not need: %s", len(unused), unused[0])


def _reason(source: str, missing: list[str], left_over: list[str]) -> str:
    for name in left_over:
        if LORA.search(name):
            return (
                f"{source} holds weights of an adapter that is not merged ({name}); merge it with "
                "peft (merge_and_unload), and save the result"
            )
        if QUANTIZED.search(name):
            return (
                f"{source} holds packed weights ({name}) that its config.json does not describe; "
                "use the version with plain weights, or a GGUF"
            )
        if HEADS.search(name):
            return (
                f"{source} is a reward or classification model ({name}), and no causal language "
                "model; use a model that generates text"
            )
    if missing and left_over:
        return (
            f"{source} lacks {len(missing)} of its weights ({missing[0]}, ...) and holds "
            f"{len(left_over)} others ({left_over[0]}, ...); its config.json describes another "
            "model, or its weights were saved with other names"
        )
    if missing == ["lm_head.weight"]:
        return (
            f"{source} lacks lm_head.weight, and config.json says that it is not the embedding; "
            "save the model again with its output matrix, or set tie_word_embeddings to true if "
            "the embedding serves as one"
        )
    if missing:
        return (
            f"{source} lacks {len(missing)} of its weights ({missing[0]}, ...); take all weight "
            "files and config.json from the same version of the model"
        )
    bias = all(name.endswith(".bias") for name in left_over)
    remedy = "set attention_bias or mlp_bias in config.json" if bias else "take config.json again"
    return (
        f"{source} holds {len(left_over)} weights that its config.json does not use "
        f"({left_over[0]}, ...); {remedy} from the model's own page"
    )
