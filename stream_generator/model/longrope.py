"""Fixes the rotary frequencies of models with longrope, such as Phi 3 with a long context.

These models have two sets of frequencies: one for texts up to the length of their first training,
one for longer texts. transformers changes the set when a text passes this length, but the keys that
the cache holds stay rotated by the old set. It would also change the set for all rows of a batch.
"""

from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LONGROPE = "longrope"
FIXED = "fixed"  # a kind that transformers does not know, so it leaves the frequencies alone


def fix_frequencies(model: nn.Module, context: int) -> None:
    """Choose the frequencies of a model once, by the number of tokens that a text can have.

    May be called again with another `context`. Does nothing for models without longrope.
    """
    for rotary in _rotary_modules(model):
        frequencies, _ = ROPE_INIT_FUNCTIONS[LONGROPE](
            rotary.config, rotary.inv_freq.device, seq_len=context
        )
        rotary.inv_freq = frequencies
        rotary.rope_type = FIXED


def has_fixed_frequencies(model: nn.Module) -> bool:
    """Whether `fix_frequencies` has chosen the frequencies of a model."""
    return any(rotary.rope_type == FIXED for rotary in _rotary_modules(model))


def _rotary_modules(model: nn.Module) -> list[Any]:
    kinds = (LONGROPE, FIXED)
    return [m for m in model.modules() if str(getattr(m, "rope_type", None)) in kinds]
