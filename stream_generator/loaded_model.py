"""A model with its tokenizer, and the facts about both that requests need."""

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

if TYPE_CHECKING:  # its import takes a second, and step graphs do not need it
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# In Llama 3, the first token ends a text and the other two end a turn. Some copies of the model
# name only one of them in their configuration, and have no chat template that names another.
LLAMA3_END_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")

DEFAULT_CONTEXT_LENGTH = 2048  # if a configuration names none


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's tokenizer and facts, and the function that loads the model.

    `end_ids`: every id that ends a reply. `context_length`: tokens of prompt and reply together.
    `defaults`: the sampling parameters of the generation config. `graph`: the directory of the step
    graph if packed weights run on a CPU; None if the model runs dense, or packed on a GPU.
    `parameters`: the number of parameters, counted before weights were packed.
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
        """The transformers model. If there is a graph, the first access loads a dense model."""
        return self.load_model()

    def describe(self) -> str:
        """The model and the origin of its parts, in words."""
        ids = sorted(self.end_ids)
        tokens = zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True)
        ends = " ".join(token or f"id {i}" for i, token in tokens) or "none"
        family = self.config.model_type
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family, family)
        return (
            f"{self.name}: {self.layout}, {kind}, {self.parameters / 1e6:,.0f} M parameters in "
            f"{self._numbers()} on {self.device}, context: {self.context_length} tokens, end "
            f"tokens: {ends}, chat template: {self.chat.describe()}"
        )

    def _numbers(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"packed weights and {name}" if self.graph else name

    @classmethod
    def of(cls, model: "PreTrainedModel", tokenizer: Any, name: str = "model") -> Self:
        """Make the checkpoint of a model that is loaded already."""
        return cls(
            **facts_of(model.config, model.generation_config, tokenizer, ChatFormat(tokenizer)),
            name=name,
            load_model=lambda: model,
            dtype=model.dtype,
            device=model.device,
            parameters=model.num_parameters(),
        )

    def new_request(
        self, prompt_ids: Iterable[int], params: SamplingParams, *, request_id: str
    ) -> Request:
        """Make a request that is ready to run, with all parameters filled in and a random number
        generator of its own.

        Raises `PromptTooLong` if the context has no room for a reply, and `InvalidRequest` for an
        empty prompt and for ids outside the vocabulary.
        """
        prompt = list(prompt_ids)
        room = self.context_length - len(prompt)
        if not prompt:
            raise InvalidRequest("the prompt is empty; send at least one token", param="messages")
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens but the context holds {self.context_length}, "
                "including the reply; shorten the prompt",
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
        """Encode a text that the model is to continue. Names of control tokens become control
        tokens. There is at most one begin-of-text token."""
        ids: list[int] = self.tokenizer.encode(text)
        begin = self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of an id, even if they are only part of a character."""
        return token_bytes(self.tokenizer, token_id)

    def _check_ids(self, param: str, ids: Iterable[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is not in the vocabulary; use 0 to {self.vocab_size - 1}",
                    param=param,
                )


def facts_of(
    config: Any, generation_config: GenerationConfig, tokenizer: Any, chat: ChatFormat
) -> dict[str, Any]:
    """The fields of a `Checkpoint` that come from its configurations, tokenizer and chat format."""
    text_config = config.get_text_config()
    return {
        "tokenizer": tokenizer,
        "chat": chat,
        "config": config,
        "generation_config": generation_config,
        "end_ids": _end_ids((config, text_config, generation_config), tokenizer, chat),
        "context_length": getattr(text_config, "max_position_embeddings", None)
        or DEFAULT_CONTEXT_LENGTH,
        "vocab_size": text_config.vocab_size,
        "defaults": _defaults(generation_config),
    }


def _end_ids(configs: Iterable[Any], tokenizer: Any, chat: ChatFormat) -> frozenset[int]:
    """Every id that a configuration, the tokenizer or the chat template names as an end."""
    named = [
        *(getattr(config, "eos_token_id", None) for config in configs),
        tokenizer.eos_token_id,
        chat.end_of_turn(),
        [i for i, t in tokenizer.added_tokens_decoder.items() if t.content in LLAMA3_END_TOKENS],
    ]
    ids = {i for value in named for i in (value if isinstance(value, list) else [value])}
    return frozenset(i for i in ids if i is not None and i >= 0)


def _defaults(config: GenerationConfig | None) -> SamplingParams:
    """The sampling parameters of a generation config, without invalid values."""
    defaults: dict[str, Any] = {}
    for name in SamplingParams.model_fields:
        # transformers calls `stop` `stop_strings`
        value = getattr(config, "stop_strings" if name == "stop" else name, None)
        if value is None:
            continue
        try:
            defaults[name] = getattr(SamplingParams(**{name: value}), name)
        except ValidationError:
            logger.warning("ignoring %s=%r in the generation config: invalid value", name, value)
    # Not validated together: as in transformers, a greedy checkpoint may name a temperature.
    return SamplingParams.model_construct(**defaults)
