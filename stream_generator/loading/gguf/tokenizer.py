"""Reads the tokenizer of a GGUF file, and makes it split texts as in training."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from stream_generator.loading.gguf.metadata import UnsupportedFile

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # the values of tokenizer.ggml.model that are read


@dataclass(frozen=True)
class Kind:
    """How a byte-level tokenizer cuts a text into pieces, before it merges bytes to tokens.

    splits: regular expressions. Each cuts the pieces that the one before it left.
    ignore_merges: whether a piece that the vocabulary holds is one token, whatever the merges say.
    begins: whether texts begin with the begin token if the file does not say so.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    begins: bool = False


_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # the ends of English contractions
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACE}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACE}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATHS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
_GPT4O = rf"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|\p{{N}}{{1,3}}|{_PATHS}"
_HALVES = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_BLOOM = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{0964}\x{06D4}\x{060C})]+"

# By the value of tokenizer.ggml.pre. The splits are those of the models' own tokenizers. Which
# kinds share them, and the rest, is from llama.cpp's llama-vocab.cpp.
_GROUPS: dict[str, Kind] = {
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Kind(
        (_LLAMA3,), ignore_merges=True, begins=True
    ),
    "dbrx smaug-bpe chatglm-bpe": Kind((_LLAMA3,)),
    "glm4": Kind((_LLAMA3,), ignore_merges=True),
    "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2 bailingmoe "
    "bailingmoe2 llada-moe": Kind((_QWEN2,)),
    "qwen35": Kind((
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
        rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}",
    )),
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum exaone4 mpt olmo "
    "jais trillion granite-docling": Kind((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b": Kind((r"\p{N}", _GPT2)),
    "default": Kind((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": Kind((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-coder": Kind((
        r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+",
        r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+", r"\p{N}",
    )),
    "deepseek-v3 hunyuan-dense joyai-llm": Kind((
        r"\p{N}{1,3}", r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
        rf"{_ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+|"
        rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}",
    )),
    "poro-chat bloom gpt3-finnish": Kind((_BLOOM,)),
    "viking": Kind((_BLOOM, r"\p{N}")),
    "tekken": Kind(
        (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_PATHS}",), ignore_merges=True, begins=True
    ),
    "gpt-4o llama4 kanana2 minimax-m2": Kind((_GPT4O,)),
    "superbpe": Kind((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "seed-coder": Kind((rf"{_SHORT}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}",)),
    "jais-2": Kind((
        rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|{_HALVES}|\s{{1,2}}(?!\S)|\s",
    )),
}  # fmt: skip
KINDS = {name: kind for names, kind in _GROUPS.items() for name in names.split()}


def read_tokenizer(path: Path, fields: dict[str, Any]) -> Any:
    """Return a file's tokenizer. fields: of the `gguf` package's reader.

    Raises `UnsupportedFile` if the file has a tokenizer of an unknown model or kind.
    """
    kind = _kind(fields)
    with _isolated(path) as options:
        tokenizer = _tokenizer_class(fields).from_pretrained(**options)
    if kind is not None:
        _correct(tokenizer, kind, fields)
    return tokenizer


def _kind(fields: dict[str, Any]) -> Kind | None:
    """Return the kind of a byte-level tokenizer, None for SentencePiece."""
    model = _field(fields, "tokenizer.ggml.model")
    if model == SENTENCEPIECE:
        return None
    if model != BYTE_LEVEL:
        raise UnsupportedFile(f"its value tokenizer.ggml.model ({model!r:.40}) is not known")
    name = _field(fields, "tokenizer.ggml.pre") or "default"
    if name not in KINDS:
        raise UnsupportedFile(f"its value tokenizer.ggml.pre ({name!r:.40}) is not known")
    return KINDS[name]


def _field(fields: dict[str, Any], name: str) -> Any:
    return fields[name].contents() if name in fields else None


@contextmanager
def _isolated(path: Path) -> Iterator[dict[str, Any]]:
    """Yield arguments with which transformers reads only this file of its directory."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.gguf"
        source.symlink_to(path.resolve())
        yield {
            "pretrained_model_name_or_path": folder,
            "gguf_file": source.name,
            "trust_remote_code": False,
        }


def _tokenizer_class(fields: dict[str, Any]) -> Any:
    """Return the class that reads the tokenizer; the automatic one rejects some architectures."""
    architecture = fields["general.architecture"].contents()
    known = architecture in GGUF_SUPPORTED_ARCHITECTURES
    return AutoTokenizer if known else PreTrainedTokenizerFast


def _correct(tokenizer: Any, kind: Kind, fields: dict[str, Any]) -> None:
    """Make the tokenizer split texts as in training, and begin them as the file says."""
    backend = tokenizer.backend_tokenizer
    steps = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in kind.splits]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    backend.model.ignore_merges = kind.ignore_merges
    begin, begins = tokenizer.bos_token, _field(fields, "tokenizer.ggml.add_bos_token")
    if begins is None:  # missing in many files of Llama 3; llama.cpp has the same rule
        begins = kind.begins
    if begin and begins:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
        )
