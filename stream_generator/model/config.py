"""What a model's configuration says about its attention, for all executors."""

from typing import Any

# Settings of a checkpoint's generation config that only transformers' own loop applies.
_LOOP_SETTINGS = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
    "guidance_scale", "watermarking_config", "epsilon_cutoff", "eta_cutoff", "top_h",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
)  # fmt: skip


def refuse_what_rows_cannot_share(config: Any, generation_config: Any) -> None:
    """Raise `ValueError` for what rows cannot share, and a short probe does not show."""
    config = config.get_text_config()
    rope = repr([getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")])
    for kind in ("dynamic", "longrope"):  # the longest row would set the frequencies of all
        if f"'{kind}'" in rope:
            raise ValueError(f"rotary embeddings of the kind {kind}")
    if "local" in (getattr(config, "attention_layers", None) or ()):  # a window of GPT-Neo's own
        raise ValueError("local attention layers")
    for name in _LOOP_SETTINGS:
        if getattr(generation_config, name, None):
            raise ValueError(f"its generation config sets {name}")


def attention_windows(config: Any) -> dict[str, int | None]:
    """How far back each kind of layer looks: by kind as in `config.layer_types`, or "" for all.

    Raises `ValueError` for a kind that no mask can express (recurrent layers, chunks).
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of the kind {', '.join(sorted(unknown))}")
    if not kinds:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
