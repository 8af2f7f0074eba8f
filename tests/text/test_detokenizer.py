"""Joined deltas equal the decode of all ids, at a constant cost per token."""

import random
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import byte_alphabet
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from stream_generator.loaded_model import Checkpoint
from stream_generator.text.detokenizer import MAX_INCOMPLETE, REPLACEMENT, Detokenizer, token_bytes

TEXTS = {
    "chinese": "彩虹是阳光经过水滴折射和反射后形成的。生僻字：𠮷、龘、㐂、𪚥。",
    "japanese": "虹はどうやってできるの？ 「それは、光の屈折です」と彼は言った。",
    "arabic": "كيف يتشكل قوس قزح؟ إِنَّهُ انْكِسَارُ الضَّوْءِ.",
    "devanagari": "इंद्रधनुष कैसे बनता है? क्षत्रिय ज्ञान श्री",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇨🇭 ❤️‍🔥 ✍🏿 e\u0301",
    "literal replacement": "a\ufffdb \ufffd\ufffd\ufffd\ufffd\ufffd c\ufffd",
    "spaces": "  leading,\t tabs\n\n\n    and lines \r\n trailing   ",
    "code": "def f(x) :\n    return x ** 2 , 'it''s'  # don't",
    "nul and controls": "a\x00b\x07\x1b[0m",
}


def stream(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.decode(i) for i in ids] + [detokenizer.flush()]


def decode_all(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session", params=["smollm2", "llama3"])
def real_tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "smollm2":
        checkpoint: Checkpoint = request.getfixturevalue("demo")
        return checkpoint.tokenizer
    return request.getfixturevalue("llama3_tokenizer")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_text_in_every_script_is_streamed_unchanged(real_tokenizer: Any, text: str) -> None:
    ids = real_tokenizer.encode(text, add_special_tokens=False)
    assert "".join(stream(real_tokenizer, ids)) == text


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_joined_deltas_equal_the_decode_of_random_ids(real_tokenizer: Any, data: Any) -> None:
    ids = data.draw(st.lists(st.integers(0, len(real_tokenizer) - 1), max_size=120))
    assert "".join(stream(real_tokenizer, ids)) == decode_all(real_tokenizer, ids)


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_joined_deltas_equal_the_decode_of_random_bytes(real_tokenizer: Any, data: Any) -> None:
    """Each id is one byte, and the bytes are not always valid UTF-8."""
    byte_ids = single_byte_ids(real_tokenizer)
    pieces = st.one_of(
        st.binary(min_size=1, max_size=6),
        st.text(min_size=1, max_size=3).map(lambda s: s.encode("utf-8", "ignore")),
        st.sampled_from([b"\xf0\x9f\x98", b"\xe4\xbd", b"\xc3", b"\xef\xbf\xbd", b"\xed\xa0\x80"]),
    )
    data_bytes = b"".join(data.draw(st.lists(pieces, max_size=40)))
    ids = [byte_ids[b] for b in data_bytes if b in byte_ids]
    assert "".join(stream(real_tokenizer, ids)) == decode_all(real_tokenizer, ids)


@cache  # because reading a vocabulary takes a moment
def single_byte_ids(tokenizer: Any) -> dict[int, int]:
    """The id of each byte that has an id of its own."""
    vocabulary = tokenizer.get_vocab()
    return {b: vocabulary[c] for b, c in enumerate(byte_alphabet()) if c in vocabulary}


def test_flush_delivers_an_incomplete_character(real_tokenizer: Any) -> None:
    ids = single_byte_ids(real_tokenizer)
    detokenizer = Detokenizer(real_tokenizer)
    assert [detokenizer.decode(ids[b]) for b in b"A\xf0\x9f"] == ["A", "", ""]
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


def test_at_most_three_characters_are_held_back(real_tokenizer: Any) -> None:
    ids = single_byte_ids(real_tokenizer)
    invalid = [ids[0x80]] * 50
    deltas = stream(real_tokenizer, invalid)
    for n in range(1, len(invalid) + 1):
        assert len("".join(deltas[:n])) >= n - MAX_INCOMPLETE


def test_special_tokens_are_never_shown(llama3_tokenizer: Any) -> None:
    eot = llama3_tokenizer.convert_tokens_to_ids("<|eot_id|>")
    ids = llama3_tokenizer.encode("你好", add_special_tokens=False)
    assert "".join(stream(llama3_tokenizer, [eot, *ids, eot])) == "你好"


class CountingTokenizer:
    """A tokenizer that counts the ids that it decodes."""

    def __init__(self, inner: Any):
        self._inner = inner
        self.added_tokens_decoder = inner.added_tokens_decoder
        self.all_special_ids = inner.all_special_ids
        self.decoded = 0

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return self._inner.decode(ids, **options)


@pytest.mark.parametrize("kind", ["text", "invalid bytes"])
def test_the_cost_of_a_token_does_not_grow_with_the_reply(real_tokenizer: Any, kind: str) -> None:
    rng = random.Random(0)
    if kind == "text":
        ids = real_tokenizer.encode("".join(TEXTS.values()) * 40, add_special_tokens=False)[:4000]
    else:
        byte_ids = single_byte_ids(real_tokenizer)
        ids = [byte_ids[rng.randrange(0x80, 0xC0)] for _ in range(4000)]
    counting = CountingTokenizer(real_tokenizer)
    assert "".join(stream(counting, ids)) == decode_all(real_tokenizer, ids)
    assert counting.decoded / len(ids) < 40


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: bytes are <0xNN>, spaces are U+2581, the first is stripped."""
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)}
    for word in ["▁a", "▁Hello", "▁", "b", "!", "▁world"]:
        vocabulary[word] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["▁a", "▁Hello", "▁", "b", "!", "▁world"]),
            st.text(alphabet="é你好𠮷👍🏽क्\u200d", min_size=1, max_size=30),
        ),
        max_size=12,
    )
)
@settings(deadline=None, max_examples=300)
def test_a_byte_fallback_tokenizer_streams_valid_text_unchanged(pieces: list[str]) -> None:
    """Rare characters are long runs of bytes, whose decoded text changes while they grow."""
    tokenizer = byte_fallback_tokenizer()
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    for piece in pieces:
        ids += [vocabulary[piece]] if piece in vocabulary else list(piece.encode())
    assert "".join(stream(tokenizer, ids)) == decode_all(tokenizer, ids)


def test_text_after_invalid_bytes_of_a_byte_fallback_tokenizer_is_not_lost() -> None:
    tokenizer = byte_fallback_tokenizer()
    vocabulary = tokenizer.get_vocab()
    deltas = stream(tokenizer, [*"é".encode(), *([0x80] * 200), vocabulary["▁world"]])
    text = "".join(deltas)
    assert text.startswith("é")
    assert text.endswith(" world")
    assert set(text[1:-6]) == {REPLACEMENT}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_token_bytes_join_to_the_bytes_of_the_text(real_tokenizer: Any, text: str) -> None:
    ids = real_tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(token_bytes(real_tokenizer, i) for i in ids) == text.encode()


def test_the_bytes_of_a_control_token_are_its_name(llama3_tokenizer: Any) -> None:
    eot = llama3_tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert token_bytes(llama3_tokenizer, eot) == b"<|eot_id|>"


def test_the_bytes_of_a_byte_fallback_token_are_its_byte() -> None:
    tokenizer = byte_fallback_tokenizer()
    token_id = tokenizer.convert_tokens_to_ids("<0xE5>")
    assert token_bytes(tokenizer, token_id) == b"\xe5"
