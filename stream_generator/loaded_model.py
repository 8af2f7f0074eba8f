"""A model with its tokenizer, and the facts that requests need of them."""

import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import ValidationError
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stream_generator.errors import InvalidRequest, PromptTooLong
from stream_generator.request import Request
from stream_generator.sampling.sampler import generator_for
from stream_generator.sampling_params import SamplingParams
from stream_generator.text.chat import ChatFormat
from stream_generator.text.detokenizer import Detokenizer, token_bytes

if TYPE_CHECKING:  # it takes a second to import, and what runs on a graph needs none
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Llama 3 ends a text with the first and a turn with the others. Some copies of the checkpoint
# name only one of them in their configuration, and then never stop.
LLAMA3_END_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")

# Where a configuration names no context length.
UNKNOWN_CONTEXT_LENGTH = 2048


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What there is to know about a model, and how to get it.

    `end_ids`: every id that ends a reply. `context_length`: prompt and reply together, in
    tokens. `defaults`: the sampling parameters that its generation config names. `graph`: the
    directory of its step graph, where packed weights run on a CPU; None: it runs dense, or packed
    on a GPU. `parameters`: how many numbers it was made of, before any was packed.
    """

    name: str
    tokenizer: Any
    chat: ChatFormat
    config: Any
    generation_config: GenerationConfig
    load_model: Callable[[], "PreTrainedModel"]
    end_ids: frozenset[int]
    context_length: int
    vocab_size: int
    defaults: SamplingParams
    dtype: torch.dtype
    device: torch.device
    parameters: int
    layout: str = "a loaded model"
    graph: Path | None = None

    @property
    def model(self) -> "PreTrainedModel":
        """The transformers model. With a graph it is a dense one, loaded when it is first read."""
        return self.load_model()

    def describe(self) -> str:
        """What it is and where its parts came from, for a person."""
        ids = sorted(self.end_ids)
        tokens = zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True)
        ends = " ".join(token or f"id {i}" for i, token in tokens) or "nothing"
        family = self.config.model_type
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family, family)
        return (
            f"{self.name}: {self.layout}, {kind}, {self.parameters / 1e6:,.0f} M parameters in "
            f"{self._numbers()} on {self.device}, a context of {self.context_length} tokens, ends "
            f"with {ends}, chat template: {self.chat.describe()}"
        )

    def _numbers(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"packed weights and {name}" if self.graph else name

    @classmethod
    def of(cls, model: "PreTrainedModel", tokenizer: Any, name: str = "model") -> Self:
        """The facts of a model that is loaded already."""
        return cls(
            **facts_of(model.config, model.generation_config, tokenizer),
            name=name,
            chat=ChatFormat(tokenizer),
            load_model=lambda: model,
            dtype=model.dtype,
            device=model.device,
            parameters=model.num_parameters(),
        )

    def new_request(
        self, prompt_ids: Iterable[int], params: SamplingParams, *, request_id: str
    ) -> Request:
        """A request ready to run: parameters resolved, a generator of its own.

        Raises `PromptTooLong` when the context has no room for a reply, and `InvalidRequest`
        for ids that the vocabulary does not have.
        """
        prompt = list(prompt_ids)
        room = self.context_length - len(prompt)
        if not prompt:
            raise InvalidRequest("the prompt is empty; give at least one token", param="messages")
        if room < 1:
            raise PromptTooLong(
                f"prompt has {len(prompt)} tokens but the context holds {self.context_length}, "
                "the reply included; shorten it",
                param="messages",
            )
        self._check_ids("messages", prompt)
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())
        resolved = params.resolved(self.defaults, room=room, seed=secrets.randbits(32))
        return Request(
            id=request_id,
            prompt_ids=prompt,
            params=resolved,
            end_ids=self.end_ids,
            context_length=self.context_length,
            detokenizer=Detokenizer(self.tokenizer),
            generator=None if resolved.greedy else generator_for(resolved.seed or 0),
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text to go on from, control tokens read as such, with one begin-of-text."""
        ids: list[int] = self.tokenizer.encode(text)
        begin = self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    def token_bytes(self, token_id: int) -> bytes:
        """What an id stands for, also where it is a part of a character only."""
        return token_bytes(self.tokenizer, token_id)

    def _check_ids(self, param: str, ids: Iterable[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is not in the vocabulary; use 0 to {self.vocab_size - 1}",
                    param=param,
                )


def facts_of(config: Any, generation_config: GenerationConfig, tokenizer: Any) -> dict[str, Any]:
    """What a `Checkpoint` takes from these."""
    text_config = config.get_text_config()
    return {
        "tokenizer": tokenizer,
        "config": config,
        "generation_config": generation_config,
        "end_ids": _end_ids(text_config, generation_config, tokenizer),
        "context_length": getattr(text_config, "max_position_embeddings", None)
        or UNKNOWN_CONTEXT_LENGTH,
        "vocab_size": text_config.vocab_size,
        "defaults": _defaults(generation_config),
    }


def _end_ids(config: Any, generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a reply: what the configurations and the tokenizer name, in union."""
    named = [
        getattr(generation_config, "eos_token_id", None),
        getattr(config, "eos_token_id", None),
        tokenizer.eos_token_id,
        [i for i, t in tokenizer.added_tokens_decoder.items() if t.content in LLAMA3_END_TOKENS],
    ]
    ids = {i for value in named for i in (value if isinstance(value, list) else [value])}
    return frozenset(i for i in ids if i is not None and i >= 0)


def _defaults(config: GenerationConfig | None) -> SamplingParams:
    """What a checkpoint's generation config says about sampling; odd values are left out."""
    defaults: dict[str, Any] = {}
    for name in SamplingParams.model_fields:
        # transformers' name where ours is OpenAI's
        value = getattr(config, "stop_strings" if name == "stop" else name, None)
        if value is None:
            continue
        try:
            defaults[name] = getattr(SamplingParams(**{name: value}), name)
        except ValidationError:
            logger.warning("ignoring %s=%r of the checkpoint's generation config", name, value)
    # A checkpoint may be greedy and still carry a temperature: transformers lets it, so do we.
    return SamplingParams.model_construct(**defaults)
