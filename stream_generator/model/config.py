"""What a model's configuration says about its attention."""

from typing import Any

# Settings of a generation config that only transformers' own loop applies.
_LOOP_SETTINGS = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
    "guidance_scale", "watermarking_config", "epsilon_cutoff", "eta_cutoff", "top_h",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
)  # fmt: skip


def require_batchable(
    config: Any, generation_config: Any, *, has_fixed_frequencies: bool = False
) -> None:
    """Raise `ValueError` if the engine cannot batch the requests of a model.

    Looks for what changes logits only later in a reply, so that `slot_check`, which compares logits
    of a few tokens, would miss it. has_fixed_frequencies: whether longrope changes its frequencies
    no more, see `longrope`.
    """
    config = config.get_text_config()
    rope = repr([getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")])
    for kind in ("dynamic", "longrope"):  # the longest row would set the frequencies of all rows
        if f"'{kind}'" in rope and not (kind == "longrope" and has_fixed_frequencies):
            raise ValueError(f"its rotary embeddings are {kind}")
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo's windows
        raise ValueError("some of its layers have local attention")
    for name in _LOOP_SETTINGS:
        if getattr(generation_config, name, None):
            raise ValueError(f"its generation config sets {name}")


def attention_windows(config: Any) -> dict[str, int | None]:
    """The number of positions that each kind of layer sees; None for all positions.

    The dictionary has an entry for each kind in `config.layer_types`. If all layers have one kind,
    its only entry is "". Raises `ValueError` for a kind that no mask can express, such as recurrent
    layers or chunked attention.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"it has layers of the kind {', '.join(sorted(unknown))}")
    if not kinds:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
