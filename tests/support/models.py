"""Tiny random models of many families, in float32, and random parameters for their requests."""

import random
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

PAD = 0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMMON: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}


def tiny_llama(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random Llama in float32. Its large weights keep the scores well apart."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model in float32. Its sliding window, if any, is shorter than the prompts."""
    return _build(name, changes).to(DEVICE)


def _build(name: str, changes: dict[str, Any]) -> PreTrainedModel:
    if name.startswith("llama"):
        return tiny_llama(
            **changes,
            vocab_size=258,
            num_key_value_heads=4 if "ungrouped" in name else 2,
            tie_word_embeddings="tied" in name,
        )
    torch.manual_seed(0)
    common = COMMON | changes
    config = {
        "mistral": lambda: MistralConfig(**common, sliding_window=6),
        "qwen2": lambda: Qwen2Config(**common, **SLIDING, use_sliding_window=True),
        "qwen3": lambda: Qwen3Config(**common),
        "gemma": lambda: GemmaConfig(**common),
        "gemma3": lambda: Gemma3TextConfig(**common, **SLIDING),
        "phi3": lambda: Phi3Config(**common, sliding_window=6),
        "gemma2": lambda: Gemma2Config(**common, **SLIDING),
        "mamba": lambda: MambaConfig(
            vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=8,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        ),
    }[name]()  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def random_params(rng: random.Random) -> dict[str, Any]:
    params: dict[str, Any] = {"max_new_tokens": rng.randrange(5, 24), "seed": rng.randrange(2**32)}
    if rng.random() < 0.4:
        params["temperature"] = 0
    else:
        params |= {
            "temperature": rng.choice([0.5, 1.0, 2.0]),
            "top_k": rng.choice([0, 0, 3, 40]),
            "top_p": rng.choice([0.5, 0.9, 1.0]),
            "min_p": rng.choice([0.0, 0.0, 0.1]),
            "typical_p": rng.choice([1.0, 1.0, 0.8]),
        }
    extras = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "frequency_penalty": 0.7,
        "presence_penalty": -0.5,
        "logit_bias": {5: 4.0, 6: -4.0},
        "min_new_tokens": 5,
        "stop_token_ids": [7, 8, 9],
        "stop": ["a", "\ufffd\ufffd\ufffd\ufffd"],
    }
    return params | {name: extras[name] for name in rng.sample(sorted(extras), 2)}


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(2, 128, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """The ids that transformers' own loop adds to the prompts: [rows, steps]."""
    whole = model.generate(**inputs, **options)
    return whole[:, inputs["input_ids"].shape[1] :]


def counting(model: PreTrainedModel) -> Callable[[], int]:
    """Return a function that tells how many forwards the model has run since this call."""
    calls = [0]
    model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return lambda: calls[0]
