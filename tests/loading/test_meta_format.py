"""Prompt ids equal those of Meta's own code in thousands of random conversations."""

import random
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.llama3 import LLAMA3_TOKENIZER

from stream_generator.loading.cache import cache_directory, make_once
from stream_generator.loading.meta_checkpoint import SPECIAL_TOKENS, meta_tokenizer
from stream_generator.loading.pypi_file import download_wheel, fetch
from stream_generator.text.chat import ChatFormat, MetaChatFormat

CONVERSATIONS = 2500
PIECES = [
    "Hello", " world", "彩虹是怎么形成的？", "🌈👩‍👩‍👧‍👦", "def f(x):\n    return x ** 2\n",
    "\n", "\n\n", "  ", "\t",
    " \n ", "1234567", "don't", "'S", "<|eot_id|>", "<|begin_of_text|>", "<|end_header_id|>\n\n",
    "<|start_header_id|>system<|end_header_id|>", "<|python_tag|>", "<|reserved_special_token_7|>",
    "<|not_a_token|>", "<|", "|>", "Ünïcödé e\u0301", "عربي", "हिन्दी",
    "{{ x }}", "{% raw %}", "\x00", "\ufffd",
    "\u200b", "https://a.example/?q=1&b=2", "$$\\int_0^1$$", "```python\n```", "\r\n", "[INST]", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return meta_tokenizer(fetch(LLAMA3_TOKENIZER))


@pytest.fixture(scope="module")
def reference() -> Any:
    """Meta's prompt encoder and tokenizer, from the package that has the tokenizer's file."""

    def unpack(directory: Path) -> None:
        directory.mkdir()
        wheel = download_wheel(LLAMA3_TOKENIZER, directory)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory, [n for n in archive.namelist() if n.endswith(".py")])
        wheel.unlink()

    package = f"{LLAMA3_TOKENIZER.package}-{LLAMA3_TOKENIZER.version}-code"
    sys.path.insert(0, str(make_once(cache_directory() / package, unpack)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from llama_models.datatypes import RawMessage
        from llama_models.llama3.chat_format import ChatFormat as MetasOwn
        from llama_models.llama3.tokenizer import Tokenizer

    metas_tokenizer = Tokenizer(fetch(LLAMA3_TOKENIZER))
    own = MetasOwn(metas_tokenizer)

    def encode(messages: list[dict[str, str]]) -> list[int]:
        return own.encode_dialog_prompt([RawMessage(**message) for message in messages]).tokens

    yield encode, metas_tokenizer
    sys.path.pop(0)


def conversation(rng: random.Random) -> list[Any]:
    def text() -> str:
        return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 8)))

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
    for _ in range(rng.randrange(0, 4)):
        messages += [
            {"role": "user", "content": text()}, {"role": "assistant", "content": text()}
        ]  # fmt: skip
    return [*messages, {"role": "user", "content": text()}]


def test_prompt_ids_equal_metas_for_random_conversations(tokenizer: Any, reference: Any) -> None:
    encode, _ = reference
    ours = MetaChatFormat(tokenizer)
    rng = random.Random(0)
    for _ in range(CONVERSATIONS):
        messages = conversation(rng)
        assert ours.encode(messages) == encode(messages), messages


def test_the_published_template_gives_metas_prompt_ids_for_trimmed_messages(
    llama3_tokenizer: Any, reference: Any
) -> None:
    """The template of the Hugging Face checkpoints trims each message; Meta's code does not."""
    encode, _ = reference
    ours = ChatFormat(llama3_tokenizer)
    rng = random.Random(1)
    for _ in range(CONVERSATIONS):
        messages = conversation(rng)
        trimmed = [{**m, "content": m["content"].strip()} for m in messages]
        assert ours.encode(messages) == encode(trimmed), messages


def test_the_tokenizer_gives_metas_ids(tokenizer: Any, reference: Any) -> None:
    _, metas = reference
    assert [tokenizer.convert_ids_to_tokens(128000 + n) for n in range(256)] == list(SPECIAL_TOKENS)
    assert metas.special_tokens == {t: 128000 + n for n, t in enumerate(SPECIAL_TOKENS)}
    rng = random.Random(2)
    for _ in range(CONVERSATIONS):
        text = "".join(rng.choice(PIECES) for _ in range(12))
        expected = metas.encode(text, bos=False, eos=False)
        ours = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours == expected, text
        assert tokenizer.encode(text, split_special_tokens=True) == [128000, *expected]
