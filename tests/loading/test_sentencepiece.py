"""A tokenizer.model alone gives SentencePiece's own ids, or is rejected with the remedy."""

import io
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import byte_tokenizer
from support.models import tiny_llama

from stream_generator.errors import CheckpointError
from stream_generator.loading.load import load_checkpoint
from stream_generator.text.detokenizer import Detokenizer

WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "彩虹", "你好", "世界", "hello",
    "rainbow", "world", "model", "stream", "token", "é", "ü", "ß", "def", "return", "user",
    "assistant",
]  # fmt: skip
TEXTS = (
    "Hello world", "  two spaces", " lead", "trail  ", "a   b", "彩虹 🌈 你好", "🌈👩‍👩‍👧", "",
    "\n\nx\n", "tab\tx", "1234", "the quick  brown", "fox.\n fox", "\r\n", "é\u0301 ﬁ Ａ",
    "[INST] hi [/INST]",
)  # fmt: skip
LLAMA_2 = {
    "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True,
                  "rstrip": False, "single_word": False},
    "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None, "legacy": False,
    "clean_up_tokenization_spaces": False, "sp_model_kwargs": {}, "model_max_length": 1e30,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "empty": {},
    "Llama 2": LLAMA_2,
    "Vicuna": LLAMA_2 | {"legacy": True, "use_fast": False},
    "fast class": {"tokenizer_class": "LlamaTokenizerFast"},
    "no class": {"bos_token": "<s>", "eos_token": "</s>"},
    "begin token not said": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": None},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def trained(**options: Any) -> bytes:
    """Train a tiny SentencePiece model, by default of Llama 2's kind."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=12)) + "  " * rng.randrange(3) + "." for _ in range(800)]
    written = io.BytesIO()
    kind: dict[str, Any] = {
        "model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True, "hard_vocab_limit": False, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, **kind | options
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def llama_2() -> bytes:
    return trained()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights") / "model"
    tiny_llama(vocab_size=410).save_pretrained(directory)
    return directory


def directory_with(
    weights: Path, target: Path, model: bytes, config: dict[str, Any] | None = None
) -> Path:
    shutil.copytree(weights, target)
    (target / "tokenizer.model").write_bytes(model)
    if config is not None:
        (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def processor(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_gives_the_ids_of_sentencepiece(
    weights: Path, tmp_path: Path, llama_2: bytes, config: str, family: str
) -> None:
    source = directory_with(weights, tmp_path / "model", llama_2, CONFIGS[config])
    settings_ = json.loads((source / "config.json").read_text())
    settings_ |= {"model_type": family, "architectures": [f"{family.title()}ForCausalLM"]}
    (source / "config.json").write_text(json.dumps(settings_))
    checkpoint = load_checkpoint(str(source), "none")
    original = processor(llama_2)
    for text in TEXTS:
        assert checkpoint.encode(text) == [original.bos_id(), *original.encode(text)], text
        plain = checkpoint.tokenizer.encode(text, add_special_tokens=False)
        assert plain == original.encode(text), text
    assert original.eos_id() in checkpoint.end_ids
    assert not (source / "tokenizer.json").exists()


KINDS: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram"},
    "normalized": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "normalized unigram": {
        "model_type": "unigram", "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
    "without a space in front": {"add_dummy_prefix": False},
    "without bytes": {"byte_fallback": False},
    "without doubled spaces": {"remove_extra_whitespaces": True},
    "Gemma's runs of spaces": {
        "add_dummy_prefix": False, "user_defined_symbols": ["▁▁", "▁▁▁", "<start_of_turn>"],
    },
    "control tokens": {"control_symbols": ["[INST]", "[/INST]"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_gives_the_ids_of_sentencepiece(
    weights: Path, tmp_path: Path, kind: str
) -> None:
    model = trained(**KINDS[kind])
    source = directory_with(weights, tmp_path / "model", model)
    tokenizer = load_checkpoint(str(source), "none").tokenizer
    original = processor(model)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == original.encode(text), text


@pytest.fixture(scope="module")
def pair(
    weights: Path, tmp_path_factory: pytest.TempPathFactory, llama_2: bytes
) -> Iterator[tuple[Any, Any]]:
    directory = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        source = directory_with(weights, directory / "model", llama_2, LLAMA_2)
        yield load_checkpoint(str(source), "none").tokenizer, processor(llama_2)


@given(text=st.text(st.sampled_from("abehlo the▁彩虹🌈 \n\t.1é\u0301"), max_size=40))
@settings(deadline=None, max_examples=300)
def test_any_text_has_the_ids_of_sentencepiece_and_comes_back(
    pair: tuple[Any, Any], text: str
) -> None:
    tokenizer, original = pair
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == original.encode(text)
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.decode, ids)) + detokenizer.flush() == original.decode(ids)


def test_names_of_control_tokens_are_control_tokens_and_the_text_between_begins_anew(
    pair: tuple[Any, Any],
) -> None:
    tokenizer, original = pair
    expected = [1, *original.encode("[INST] hi"), 2, 1, *original.encode("[INST] 彩虹 ")]
    text = "<s>[INST] hi</s><s>[INST] 彩虹 "
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    plain = tokenizer.encode("</s>", add_special_tokens=False, split_special_tokens=True)
    assert 2 not in plain, "a name in a message is text"


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_the_directory_adds_keep_their_ids(
    weights: Path, tmp_path: Path, llama_2: bytes, place: str
) -> None:
    source = directory_with(weights, tmp_path / "model", llama_2, LLAMA_2)
    start, end = 400, 401
    if place == "added_tokens.json":
        (source / place).write_text(json.dumps({"<|im_end|>": end, "<|im_start|>": start}))
        roles = {"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}
        (source / "special_tokens_map.json").write_text(json.dumps(roles))
        config = {name: value for name, value in LLAMA_2.items() if name != "eos_token"}
    else:
        added = {str(i): {"content": n, "special": True} for n, i in
                 (("<|im_end|>", end), ("<|im_start|>", start), ("<s>", 1))}  # fmt: skip
        config = LLAMA_2 | {"added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    config |= {"chat_template": TEMPLATE}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    checkpoint = load_checkpoint(str(source), "none")
    assert end in checkpoint.end_ids
    original = processor(llama_2)
    ids = checkpoint.chat.encode([{"role": "user", "content": "hi <|im_end|>"}])
    assert ids[0] == start
    assert ids.count(end) == 1, "a name in a message is text"
    without = checkpoint.chat.encode([{"role": "user", "content": "hi"}])
    assert without == [
        start, *original.encode("user\nhi"), end, *original.encode("\n"), start,
        *original.encode("assistant\n"),
    ]  # fmt: skip


def test_an_added_token_with_another_id_is_rejected(
    weights: Path, tmp_path: Path, llama_2: bytes
) -> None:
    source = directory_with(weights, tmp_path / "model", llama_2)
    (source / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 405}))
    with pytest.raises(CheckpointError, match=r"the id 405.*the id 400.*tokenizer\.json"):
        load_checkpoint(str(source))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: trained(treat_whitespace_as_suffix=True), "some texts would get other ids"),
        (lambda: trained(user_defined_symbols=["<|im_start|>"]), "some texts would get other ids"),
        (lambda: trained(model_type="char", byte_fallback=False), "words or characters"),
        (lambda: b"IQ== 0\nIg== 1\n", "no SentencePiece model"),  # Llama 3's format
        (lambda: b"", "no SentencePiece model"),
    ],
)
def test_a_model_that_cannot_be_converted_is_rejected_with_the_remedy(
    weights: Path, tmp_path: Path, model: Any, words: str
) -> None:
    source = directory_with(weights, tmp_path / "model", model())
    with pytest.raises(CheckpointError, match=rf"{words}.*tokenizer\.json.*save_pretrained"):
        load_checkpoint(str(source))


@pytest.mark.parametrize("name", ["tekken.json", "qwen.tiktoken", "spiece.model"])
def test_a_tokenizer_without_conversion_is_rejected_with_the_remedy(
    weights: Path, tmp_path: Path, name: str
) -> None:
    source = shutil.copytree(weights, tmp_path / "model")
    (source / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name}.*tokenizer\.json.*save_pretrained"):
        load_checkpoint(str(source))


def test_a_slow_tokenizer_is_rejected_with_the_remedy(weights: Path, tmp_path: Path) -> None:
    source = shutil.copytree(weights, tmp_path / "model")
    (source / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    config = {"tokenizer_class": "CTRLTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"slow tokenizer CTRLTokenizer.*tokenizer\.json"):
        load_checkpoint(str(source))


def test_a_directory_without_a_tokenizer_is_rejected_with_the_files_looked_for(
    weights: Path,
) -> None:
    with pytest.raises(CheckpointError, match=r"looked for: tokenizer\.json, tokenizer\.model"):
        load_checkpoint(str(weights))


def test_a_tokenizer_json_without_a_configuration_keeps_its_ids(
    weights: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(weights, tmp_path / "model")
    byte_tokenizer().save_pretrained(source)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink(missing_ok=True)
    for text in TEXTS:
        assert load_checkpoint(str(source), "none").encode(text) == list(text.encode())
