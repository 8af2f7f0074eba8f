"""The rotary positions of a GGUF file, as transformers describes them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stream_generator.loading.gguf.metadata import Metadata, UnsupportedFile

DIVISORS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
ROTARY_TENSORS = {DIVISORS, SHORT, LONG}  # tensors that belong to no module of transformers

_SCALING = "rope.scaling."
_LLAMA3_CONTEXT = 8192  # tokens that Llama 3 was trained on before its positions were scaled


def read_rotary(
    metadata: Metadata, tensors: Mapping[str, torch.Tensor], head_size: int, *, partial: bool
) -> dict[str, Any]:
    """Return `rope_parameters` of a configuration.

    tensors: those of `ROTARY_TENSORS` that the file has. partial: whether the model can rotate a
    part of each head. Raises `UnsupportedFile` for what transformers cannot express.
    """
    rope: dict[str, Any] = {"rope_theta": float(metadata.get("rope.freq_base", 10000.0))}
    rotated = metadata.get("rope.dimension_count", head_size)
    if rotated > head_size or (rotated != head_size and not partial):
        raise UnsupportedFile(f"it rotates {rotated} of {head_size} numbers of each head")
    if partial:
        rope["partial_rotary_factor"] = _share(rotated, head_size)
    kind = metadata.get(f"{_SCALING}type")
    metadata.get(f"{_SCALING}original_context_length")  # only YaRN and longrope need it
    factor = metadata.get(f"{_SCALING}factor") or 1.0
    if old := metadata.get("rope.scale_linear"):
        factor = old
    if SHORT in tensors or LONG in tensors:
        return rope | _longrope(metadata, tensors, kind, rotated)
    if kind == "yarn":
        scaling = _yarn(metadata, factor)
    elif kind == "none" or (kind in (None, "linear") and factor == 1.0):
        scaling = {"rope_type": "default"}
    elif kind in (None, "linear"):
        scaling = {"rope_type": "linear", "factor": float(factor)}
    else:
        raise UnsupportedFile(f"its rotary positions are scaled in an unknown way ({kind})")
    if DIVISORS in tensors:
        if scaling["rope_type"] != "default":
            raise UnsupportedFile("its rotary frequencies are scaled twice")
        scaling = _divided(tensors[DIVISORS].double(), rope["rope_theta"], rotated)
    return rope | scaling


def _share(rotated: int, size: int) -> float:
    """Return a share of the head size whose product with it is rounded down to `rotated`."""
    share = rotated / size
    return share if int(size * share) == rotated else (rotated + 0.5) / size


def _yarn(metadata: Metadata, factor: float) -> dict[str, Any]:
    if metadata.get(f"{_SCALING}yarn_ext_factor", 1.0) != 1.0:
        raise UnsupportedFile("its rotary positions are scaled by a part of YaRN only")
    context = metadata.get(f"{_SCALING}original_context_length")
    found = {
        "attention_factor": metadata.get(f"{_SCALING}yarn_attn_factor"),
        "beta_fast": metadata.get(f"{_SCALING}yarn_beta_fast"),
        "beta_slow": metadata.get(f"{_SCALING}yarn_beta_slow"),
    }
    if (own := metadata.get(f"{_SCALING}attn_factor")) is not None:
        # llama.cpp multiplies YaRN's usual factor by this one.
        found["attention_factor"] = own * (1 + 0.1 * math.log(max(factor, 1.0)))
    return {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": context or metadata.require("context_length"),
        **{name: float(value) for name, value in found.items() if value is not None},
    }


def _longrope(
    metadata: Metadata, tensors: Mapping[str, torch.Tensor], kind: str | None, rotated: int
) -> dict[str, Any]:
    if kind not in (None, "none", "longrope"):
        raise UnsupportedFile(f"its rotary positions are scaled as {kind} and by factors")
    if not {SHORT, LONG} <= tensors.keys():
        raise ValueError(f"it has only one of {SHORT} and {LONG}")
    if any(len(tensors[name]) * 2 != rotated for name in (SHORT, LONG)):
        raise ValueError(f"{SHORT} and {LONG} do not fit {rotated} rotated numbers")
    return {
        "rope_type": "longrope",
        "short_factor": tensors[SHORT].tolist(),
        "long_factor": tensors[LONG].tolist(),
        # llama.cpp takes 1 if the file has no factor; transformers would compute one.
        "attention_factor": float(metadata.get(f"{_SCALING}attn_factor", 1.0)),
        "original_max_position_embeddings": metadata.require(f"{_SCALING}original_context_length"),
    }


def _divided(divisors: torch.Tensor, theta: float, rotated: int) -> dict[str, Any]:
    """Describe frequencies that the file divides: as Llama 3's, or all alike.

    Raises `UnsupportedFile` for other divisors.
    """
    if len(divisors) * 2 != rotated:
        raise ValueError(f"{DIVISORS} does not fit {rotated} rotated numbers")
    largest = round(float(divisors.max()), 4)
    if torch.allclose(divisors, divisors.mean(), rtol=1e-5):
        if largest == 1.0:
            return {"rope_type": "default"}
        return {"rope_type": "linear", "factor": largest}
    scaling = {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
    plain = 1 / theta ** (torch.arange(len(divisors)) / len(divisors))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](
        _RotaryConfig(scaling | {"rope_theta": theta}, rotated), torch.device("cpu")
    )
    if not torch.allclose(plain / scaled, divisors.float(), rtol=1e-3):
        raise UnsupportedFile("its rotary frequencies are scaled in another way than Llama 3's")
    return scaling


class _RotaryConfig:
    """The part of a configuration that transformers' functions of rotary frequencies read."""

    def __init__(self, rope_parameters: dict[str, Any], head_dim: int):
        self.rope_parameters, self.head_dim = rope_parameters, head_dim
        self.hidden_size, self.num_attention_heads = head_dim, 1

    def standardize_rope_params(self) -> None:
        """Nothing to do: the parameters are in the new format."""
