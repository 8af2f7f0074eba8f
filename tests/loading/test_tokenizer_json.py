"""A tokenizer.json is used by its own rules, whatever class a configuration names."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.fakes import byte_tokenizer
from support.models import build
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors as post_processors

from stream_generator.errors import CheckpointError
from stream_generator.loading.load import load_checkpoint

TEXTS = (
    "Hello world", "  two spaces", " lead", "trail  ", "a   b", "彩虹 🌈", "12 345", "a\n b",
    "don't", "[INST] hello [/INST]",
)  # fmt: skip
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CLASSES: dict[str, dict[str, Any] | None] = {
    "no configuration": None,
    "LlamaTokenizer": ROLES | {"tokenizer_class": "LlamaTokenizer", "legacy": False},
    "LlamaTokenizerFast": {"tokenizer_class": "LlamaTokenizerFast"},
    "GemmaTokenizer": ROLES | {"tokenizer_class": "GemmaTokenizer"},
    "Qwen2Tokenizer": ROLES | {"tokenizer_class": "Qwen2Tokenizer"},
    "GPT2Tokenizer": ROLES | {"tokenizer_class": "GPT2Tokenizer"},
    "PreTrainedTokenizerFast": ROLES | {"tokenizer_class": "PreTrainedTokenizerFast"},
}
FAMILIES = ("llama", "mistral", "qwen2", "gemma")


def sentencepiece_like(rules: str) -> Tokenizer:
    """A tokenizer of Llama 2's kind. rules: where a space is put in front of a text."""
    special = ["<unk>", "<s>", "</s>"]
    letters = ["▁", *"abcdehlorwt12345"]
    words = ["ll", "he", "▁he", "▁▁", "wo"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    merges = [("l", "l"), ("h", "e"), ("▁", "he"), ("▁", "▁"), ("w", "o")]
    tokenizer = Tokenizer(
        models.BPE(
            {name: n for n, name in enumerate(names)}, merges,
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    spaces = normalizers.Replace(" ", "▁")
    if rules == "each text":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    elif rules == "the first text":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.post_processor = post_processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def digits_first() -> Tokenizer:
    tokenizer: Tokenizer = byte_tokenizer().backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.add_special_tokens(list(ROLES.values()))
    return tokenizer


TOKENIZERS: dict[str, Any] = {
    "space before each text": lambda: sentencepiece_like("each text"),
    "space before the first text": lambda: sentencepiece_like("the first text"),
    "no space": lambda: sentencepiece_like("none"),
    "bytes": digits_first,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights")
    for family in FAMILIES:
        build(family).save_pretrained(directory / family)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("named", CLASSES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_get_the_ids_of_the_file(
    weights: Path, tmp_path: Path, kind: str, named: str, family: str
) -> None:
    source = shutil.copytree(weights / family, tmp_path / "model")
    file = TOKENIZERS[kind]()
    file.save(str(source / "tokenizer.json"))
    if (settings := CLASSES[named]) is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_checkpoint(str(source), "none").tokenizer
    for text in (*TEXTS, f"<s>{TEXTS[0]}</s><s> x"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == file.encode(text, add_special_tokens=False).ids, text


def test_a_tokenizer_without_words_is_rejected(weights: Path, tmp_path: Path) -> None:
    source = shutil.copytree(weights / "llama", tmp_path / "model")
    tokenizer = Tokenizer(models.BPE({"<unk>": 0}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(list(ROLES.values()))
    tokenizer.save(str(source / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="without a vocabulary"):
        load_checkpoint(str(source))


def test_a_tokenizer_json_may_limit_the_length_of_texts_for_training(
    weights: Path, tmp_path: Path
) -> None:
    """The limits are no rules for the ids of a text."""
    source = shutil.copytree(weights / "llama", tmp_path / "model")
    file = digits_first()
    file.enable_truncation(max_length=4)
    file.enable_padding(length=8)
    file.save(str(source / "tokenizer.json"))
    file.no_truncation()
    file.no_padding()
    tokenizer = load_checkpoint(str(source), "none").tokenizer
    for text in TEXTS:
        assert tokenizer.encode(text) == file.encode(text).ids
