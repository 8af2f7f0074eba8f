"""A model whose next id is a Python function, and a tokenizer of 256 bytes.

Only the model is fake: transformers' `generate` runs it like any other.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from support.waiting import wait_for
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from stream_generator.loaded_model import Checkpoint

END, TURN = 256, 257  # ids of the byte tokenizer's two control tokens
VOCABULARY = 258

# Each message is "role:content<|turn|>".
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer with one id per byte: id n is byte n."""
    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<|end|>", "<|turn|>")]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.chat_template = chat_template
    return wrapped


def byte_alphabet() -> list[str]:
    """The character for each byte in byte-level tokenizers (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


class FakeConfig(PreTrainedConfig):
    model_type = "fake"

    def __init__(self, max_position_embeddings: int = 512, **kwargs: Any):
        self.vocab_size = VOCABULARY
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class FakeModel(PreTrainedModel, GenerationMixin):
    """A model whose next id is `next_id(ids)`, where `ids` is the whole row so far."""

    config_class = FakeConfig

    def __init__(self, next_id: Callable[[list[int]], int], context_length: int = 512):
        super().__init__(FakeConfig(context_length))
        self.next_id = next_id
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # gives the model its device and dtype
        self.generation_config = GenerationConfig(use_cache=False, do_sample=False)

    def next_of(self, ids: list[int]) -> int:
        """The next id. A row with ids below 32 only is a runner's test and gets the end id."""
        return END if max(ids) < 32 else self.next_id(ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute a layer whose keys are the ids, so that the cache and the mask matter."""
        seen = input_ids
        if past_key_values is not None:
            states = input_ids[:, None, :, None].float()
            keys, _ = past_key_values.update(states, states, 0)
            seen = keys[:, 0, :, 0].long()
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, ids in enumerate(seen):
            if attention_mask is not None and attention_mask.dim() == 4:
                ids = ids[attention_mask[row if len(attention_mask) > 1 else 0, 0, -1] == 0]
            logits[row, -1, self.next_of(ids.tolist())] = 50.0
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def reply_length(ids: list[int]) -> int:
    """How many ids the fake model has produced after the last "assistant:"."""
    marker = list(b"assistant:")
    for start in range(len(ids) - len(marker), -1, -1):
        if ids[start : start + len(marker)] == marker:
            return len(ids) - start - len(marker)
    return 0


def is_complete_prompt(ids: list[int]) -> bool:
    """Whether the ids hold a complete prompt, rather than a chunk or a runner's test."""
    return bytes(i for i in ids if i < 256).rpartition(b"assistant:")[1] != b""


def says(text: str) -> Callable[[list[int]], int]:
    """A function for `FakeModel` that replies `text`, then the end id."""
    data = text.encode()
    return lambda ids: data[n] if (n := reply_length(ids)) < len(data) else END


def fake_checkpoint(next_id: Callable[[list[int]], int], context_length: int = 512) -> Checkpoint:
    return Checkpoint.of(FakeModel(next_id, context_length), byte_tokenizer(), "fake")


class Gate:
    """A function for `FakeModel` that waits for a permit before each token."""

    def __init__(self, inner: Callable[[list[int]], int]):
        self.inner = inner
        self.permits = threading.Semaphore(0)
        self.num_computed_tokens = 0
        self.arrived = threading.Semaphore(0)  # released when a computation begins

    def __call__(self, ids: list[int]) -> int:
        if not is_complete_prompt(ids):
            return END
        self.arrived.release()
        wait_for(self.permits)
        self.num_computed_tokens += 1
        return self.inner(ids)

    def allow(self, tokens: int = 1) -> None:
        self.permits.release(tokens)
