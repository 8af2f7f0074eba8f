"""Writes the configuration of a GGUF file as transformers has it, from the file's metadata.

A key or a tensor that is not understood rejects the file: it could change what the model computes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from stream_generator.loading.gguf.architectures import (
    Architecture,
    Settings,
    Shapes,
    architecture_named,
)
from stream_generator.loading.gguf.metadata import Metadata, UnsupportedFile
from stream_generator.loading.gguf.rotary import read_rotary

END_TOKENS = ("eos", "eot", "eom")  # the end of a text, of a turn, and of a message
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


def read_config(
    fields: Mapping[str, Any], shapes: Shapes, rotary: Mapping[str, torch.Tensor]
) -> PreTrainedConfig:
    """Return the configuration of a file.

    fields: of the `gguf` package's reader. shapes: of all tensors, as transformers has them.
    rotary: those of `rotary.ROTARY_TENSORS` that the file has. Raises `UnsupportedFile` for an
    unknown architecture, key or value, and `ValueError` if a key or tensor is missing.
    """
    metadata = Metadata(fields)
    architecture = architecture_named(metadata.architecture)
    if EMBEDDING not in shapes:
        raise ValueError(f"it lacks the tensor {EMBEDDING}")
    layers = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    if metadata.require("block_count") != layers:  # before anything is made for each layer
        raise ValueError(f"it has the tensors of {layers} layers, but names another number")
    try:
        own = architecture.settings(metadata, shapes)
    except KeyError as error:
        raise ValueError(f"it lacks the tensor {error.args[0]}") from error
    settings = _common(metadata, architecture, shapes) | _tokens(metadata, shapes)
    size = settings["head_dim"]
    rope = read_rotary(metadata, rotary, size, partial=architecture.partial)
    settings["rope_parameters"] = _by_layers(metadata, architecture, rope)
    metadata.reject_unknown()
    model_type = own.pop("model_type", architecture.model_type)
    try:
        return AutoConfig.for_model(model_type, **settings | own)
    except Exception as error:  # transformers has errors of its own for values that do not fit
        reason = " ".join(str(error).split())
        raise UnsupportedFile(f"transformers rejects its configuration ({reason})") from error


def _common(metadata: Metadata, architecture: Architecture, shapes: Shapes) -> Settings:
    hidden = metadata.require("embedding_length")
    heads = metadata.same_in_all_layers("attention.head_count")
    if not heads:
        raise ValueError(f"it lacks the value {metadata.architecture}.attention.head_count")
    head_size = metadata.get("attention.key_length", hidden // heads)
    if metadata.get("attention.value_length", head_size) != head_size:
        raise UnsupportedFile("its keys and values have heads of different sizes")
    name, key = architecture.epsilon
    return {
        "vocab_size": shapes[EMBEDDING][0],
        "hidden_size": hidden,
        "head_dim": head_size,
        "intermediate_size": metadata.same_in_all_layers("feed_forward_length"),
        "num_hidden_layers": metadata.require("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.same_in_all_layers("attention.head_count_kv", heads),
        "max_position_embeddings": metadata.require("context_length"),
        "tie_word_embeddings": OUTPUT not in shapes,
        name: metadata.require(key),
    }


def _tokens(metadata: Metadata, shapes: Shapes) -> Settings:
    """The ids of special tokens. A reply ends at each id that the file names as an end."""
    ends = [metadata.token(kind) for kind in END_TOKENS]
    return {
        "bos_token_id": metadata.token("bos"),
        "eos_token_id": list(dict.fromkeys(n for n in ends if n is not None)) or None,
        "pad_token_id": None,  # transformers would zero the embedding of this id
    }


def _by_layers(
    metadata: Metadata, architecture: Architecture, rope: dict[str, Any]
) -> dict[str, Any]:
    """Give layers with a sliding window their own, unscaled rotary positions, if they have some."""
    if architecture.local_theta is None:
        if metadata.get("rope.freq_base_swa", rope["rope_theta"]) != rope["rope_theta"]:
            raise UnsupportedFile("its layers with a window have another rotary base")
        return rope
    local = float(metadata.get("rope.freq_base_swa", architecture.local_theta))
    return {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
