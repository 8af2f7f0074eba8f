"""Loads the tokenizer of a directory; converts tokenizer.model if there is no tokenizer.json."""

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import __version__ as version

from stream_generator.errors import CheckpointError
from stream_generator.loading.diagnosis import read_json
from stream_generator.loading.sentencepiece_model import PROBES, REMEDY, convert_sentencepiece

logger = logging.getLogger(__name__)

FAST, SENTENCEPIECE, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
# What transformers converts itself: byte-level BPE of GPT-2's kind, and BERT's words.
CONVERTED = (("vocab.json", "merges.txt"), ("vocab.txt",))
NOT_CONVERTED = (
    "tekken.json", "*.tiktoken", "spiece.model", "sentencepiece.bpe.model", "*.model", "vocab.json",
)  # fmt: skip
# Fields that the conversion has applied, and that transformers must not apply again.
APPLIED = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "sp_model_kwargs", "use_fast",
    "tokenizer_file", "added_tokens_decoder", "auto_map",
)  # fmt: skip


def load_tokenizer(directory: Path, origin: Path) -> Any:
    """Load a tokenizer. origin: the directory or file that an error names.

    Raises `CheckpointError` if there is none, or if it is a slow one that cannot be converted, and
    whatever transformers raises for a damaged one.
    """
    _reject_missing(directory, origin)
    tokenizer = _by_class(directory)
    if (directory / FAST).is_file():
        tokenizer = _as_in_file(tokenizer, directory, origin)
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{origin} has the slow tokenizer {type(tokenizer).__name__}, without tokenizer.json; "
            f"{REMEDY}"
        )
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if not set(tokenizer.get_vocab()) - special - set(tokenizer.all_special_tokens):
        raise CheckpointError(f"{origin} has a tokenizer without a vocabulary; {REMEDY}")
    return tokenizer


def _by_class(directory: Path) -> Any:
    """Load a tokenizer by the class that a configuration names, or without it if that fails."""
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception:  # the class may be wrong, but tokenizer.json needs none
        if not (directory / FAST).is_file():
            raise
        return PreTrainedTokenizerFast.from_pretrained(directory, trust_remote_code=False)


def _as_in_file(tokenizer: Any, directory: Path, origin: Path) -> Any:
    """Return a tokenizer that splits texts by the rules in tokenizer.json.

    transformers 5 replaces these rules by those of the class that a configuration names.
    """
    file = Tokenizer.from_file(str(directory / FAST))
    file.no_truncation()
    file.no_padding()
    if _splits_like(tokenizer, file):
        return tokenizer
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    config = _as_dict(read_json(directory / CONFIG))
    missing = {name: getattr(tokenizer, name) for name in names if name not in config}
    known = {name: token for name, token in missing.items() if token in file.get_vocab()}
    plain = PreTrainedTokenizerFast.from_pretrained(directory, trust_remote_code=False, **known)
    if not _splits_like(plain, file):
        raise CheckpointError(
            f"transformers {version} does not split texts as {origin / FAST} says; {REMEDY}"
        )
    kind = type(tokenizer).__name__
    logger.info("splitting texts as tokenizer.json says, and not as %s does", kind)
    return plain


def _splits_like(tokenizer: Any, file: Tokenizer) -> bool:
    """Whether a tokenizer gives sample texts the ids that the tokenizer of a file gives them."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    stored = {t.content for t in file.get_added_tokens_decoder().values() if t.special}
    turns = [f"{name}Hello {name} there" for name in sorted(special & stored)[:3]]
    try:
        return all(
            tokenizer.encode(text, add_special_tokens=False)
            == file.encode(text, add_special_tokens=False).ids
            for text in (*PROBES, *turns)
        )
    except Exception:  # such as an unknown token that the vocabulary lacks
        return False


def has_only_sentencepiece(directory: Path) -> bool:
    """Whether the tokenizer must be converted from tokenizer.model."""
    return (directory / SENTENCEPIECE).is_file() and not (directory / FAST).is_file()


def write_converted(directory: Path, target: Path) -> None:
    """Write the tokenizer.json of a directory with tokenizer.model, and the fitting configuration.

    Raises `CheckpointError` as `convert_sentencepiece` does, or if the ids of added tokens do not
    follow those of the model.
    """
    config = _as_dict(read_json(directory / CONFIG))
    tokenizer, names = convert_sentencepiece(directory / SENTENCEPIECE)
    roles = _as_dict(read_json(directory / "special_tokens_map.json"))
    roles = names | {name: value for name, value in roles.items() if name.endswith("_token")}
    config = roles | {name: value for name, value in config.items() if name not in APPLIED}
    _add_tokens(tokenizer, directory)
    settings = _as_dict(read_json(directory / CONFIG))
    begin = _content(config.get("bos_token")) if settings.get("add_bos_token") is not False else ""
    end = _content(config.get("eos_token")) if settings.get("add_eos_token") else ""
    if ends := [name for name in (begin, end) if name and tokenizer.token_to_id(name) is not None]:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, (begin, "$A", end))),
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in ends],
        )
    tokenizer.save(str(target / FAST))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.setdefault("clean_up_tokenization_spaces", False)
    (target / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=1))


def _add_tokens(tokenizer: Tokenizer, directory: Path) -> None:
    """Add the tokens that the directory's files add to those of the model."""
    config = _as_dict(read_json(directory / CONFIG))
    roles = _as_dict(read_json(directory / "special_tokens_map.json"))
    extra = [
        *(roles.get("additional_special_tokens") or []),
        *(config.get("additional_special_tokens") or []),
    ]
    special = {_content(value) for value in [*roles.values(), *config.values(), *extra]} - {""}
    added: dict[int, AddedToken] = {}
    for name, token_id in _as_dict(read_json(directory / "added_tokens.json")).items():
        added[int(token_id)] = AddedToken(name, special=name in special, normalized=False)
    for token_id, fields in _as_dict(config.get("added_tokens_decoder")).items():
        content, is_special = _content(fields), bool(fields.get("special"))
        sides = {side: bool(fields.get(side)) for side in ("lstrip", "rstrip", "single_word")}
        added[int(token_id)] = AddedToken(content, special=is_special, normalized=False, **sides)
    for token_id in sorted(added):
        token = added[token_id]
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if (got := tokenizer.token_to_id(token.content)) != token_id:
            raise CheckpointError(
                f"{directory} gives the added token {token.content!r} the id {token_id}, but it "
                f"follows the vocabulary with the id {got}; {REMEDY}"
            )


def _content(token: Any) -> str:
    """Return the text of a token in a configuration; "" if there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _reject_missing(directory: Path, origin: Path) -> None:
    files = [(FAST,), (SENTENCEPIECE,), *CONVERTED]
    if any(all((directory / name).is_file() for name in names) for names in files):
        return
    if other := sorted(file.name for kind in NOT_CONVERTED for file in directory.glob(kind)):
        raise CheckpointError(
            f"{origin} has the tokenizer {other[0]}, which transformers does not convert; {REMEDY}"
        )
    looked_for = ", ".join(" with ".join(names) for names in files)
    raise CheckpointError(
        f"{origin} has no tokenizer (looked for: {looked_for}); copy the tokenizer's files from "
        "the model's own page into it"
    )
