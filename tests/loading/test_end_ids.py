"""Every id that a file or the chat template names as an end finishes a reply."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.fakes import CHAT_TEMPLATE, END, TURN, byte_tokenizer
from support.models import build, tiny_llama
from transformers import Gemma3Config, GenerationConfig

from stream_generator.engine.engine import Engine
from stream_generator.engine.runners import runner_for
from stream_generator.engine.solo_runner import SoloRunner
from stream_generator.loaded_model import facts_of
from stream_generator.loading.load import load_checkpoint
from stream_generator.sampling_params import SamplingParams
from stream_generator.text.chat import ChatFormat

FIRST_ADDED = TURN + 1

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n"
    "</think>\n\n{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
)
PLAIN_WORDS = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
NEXT_ROLE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
DROPS_REPLIES = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"

FAMILIES: dict[str, tuple[str, list[str], str | None]] = {
    "ChatML": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "Llama 3": (LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "Llama 2": (LLAMA_2, ["<s>", "</s>"], "</s>"),
    "Phi 3": (PHI_3, ["<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"], "<|end|>"),
    "Gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "Harmony": (HARMONY, ["<|start|>", "<|message|>", "<|return|>"], "<|return|>"),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "a required system message": (NEEDS_SYSTEM, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "plain words": (PLAIN_WORDS, [], None),
    "no end of a turn": (NEXT_ROLE, ["<|user|>", "<|assistant|>"], None),
    "names that are no tokens": (CHATML, [], None),
    "a template without replies": (DROPS_REPLIES, ["<|im_end|>"], None),
    "a template that always fails": ("{{ raise_exception('no') }}", ["<|im_end|>"], None),
    "a template that never ends": (
        "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, ["<|im_end|>"], None,
    ),
    "a template that is damaged": ("{% for %}", ["<|im_end|>"], None),
}  # fmt: skip


def tokenizer_of(template: str | None, names: list[str], *, special: bool = True) -> Any:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens([name for name in names if name != "<|end|>"], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_after_a_reply_in_the_template_is_the_end_of_a_turn(
    family: str, special: bool
) -> None:
    """Some checkpoints do not flag their turn tokens as special, but their templates name them."""
    template, names, end = FAMILIES[family]
    tokenizer = tokenizer_of(template, names, special=special)
    expected = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert ChatFormat(tokenizer).end_of_turn() == expected


def test_a_base_model_has_no_end_of_turn() -> None:
    assert ChatFormat(byte_tokenizer(None)).end_of_turn() is None


def saved(directory: Path, tokenizer: Any, model: str = "llama", **ends: Any) -> str:
    """Write a model and its tokenizer. ends: `eos_token_id` by the name of the file."""
    made = tiny_llama(vocab_size=len(tokenizer)) if model == "llama" else build(model)
    made.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for name in ("config", "generation_config"):
        file = directory / f"{name}.json"
        content = json.loads(file.read_text()) | {"eos_token_id": ends.get(name)}
        content.pop("pad_token_id", None)
        file.write_text(json.dumps(content))
    return str(directory)


def reply(checkpoint: Any, *, solo: bool, **params: Any) -> tuple[list[int], str | None]:
    """The ids of a greedy reply, and the reason of its end."""
    model = checkpoint.model
    engine = Engine(checkpoint, runner=SoloRunner(model, 64) if solo else runner_for(model, 64))
    stream = engine.submit([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=5, **params))
    while engine.step():
        pass
    outputs = list(stream)
    ids = [output.choice.token_id for output in outputs if output.choice]
    return ids, outputs[-1].finish_reason


@pytest.mark.parametrize("solo", [False, True])
def test_the_end_of_a_turn_finishes_a_reply_if_the_configurations_name_another_id(
    tmp_path: Path, solo: bool
) -> None:
    tokenizer = tokenizer_of(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    source = saved(tmp_path / "model", tokenizer, config=FIRST_ADDED)
    checkpoint = load_checkpoint(source, "none", dtype="float32")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert checkpoint.end_ids == {END, FIRST_ADDED, end}
    assert "<|im_end|>" in checkpoint.describe()
    ids, reason = reply(checkpoint, solo=solo, logit_bias={end: 100.0})
    assert (ids[:-1], reason) == ([], "stop")


def test_the_ids_of_every_file_end_a_reply(tmp_path: Path) -> None:
    source = saved(tmp_path, byte_tokenizer(CHAT_TEMPLATE), config=7, generation_config=[8, 9])
    assert load_checkpoint(source).end_ids == {7, 8, 9, END, TURN}


def test_the_ids_of_the_outer_part_of_a_configuration_end_a_reply() -> None:
    """A configuration for texts and images has a part for texts, which may name no end."""
    config = Gemma3Config(
        text_config={"eos_token_id": None, "vocab_size": 258}, eos_token_id=[5, 6]
    )
    facts = facts_of(config, GenerationConfig(), byte_tokenizer(None), ChatFormat(byte_tokenizer()))
    assert {5, 6} <= facts["end_ids"]


@pytest.mark.parametrize("ends", [None, [], -1, [-1]])
@pytest.mark.parametrize("model", ["llama", "mamba"])
def test_replies_of_a_checkpoint_without_end_ids_end_by_length(
    tmp_path: Path, model: str, ends: Any
) -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    source = saved(tmp_path, tokenizer, model, config=ends, generation_config=ends)
    checkpoint = load_checkpoint(source, "none", dtype="float32")
    assert checkpoint.end_ids == frozenset()
    assert "end tokens: none" in checkpoint.describe()
    for solo in (False, True):
        ids, reason = reply(checkpoint, solo=solo)
        assert (len(ids), reason) == (5, "length")
