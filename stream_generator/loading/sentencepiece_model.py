"""Converts SentencePiece's tokenizer.model to tokenizer.json, and compares the two.

transformers 5 converts such a file without its rules for spaces, so the ids differ. Source of the
rules: sentencepiece_model.proto and normalizer.cc of SentencePiece.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
)

from stream_generator.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of pieces
UNIGRAM, BPE = 1, 2  # types of models
SPACE = "▁"
PROBES = (
    "Hello world", " leading", "  two", "trailing  ", "a   b", "\n\nline\n", "tab\tend", "\r\n",
    "a.\n  b \nc", "1234567", "3.14", "彩虹 🌈 你好", "🌈", "é e\u0301 ﬁ Ａ",
    "don't", "x = [1];  # c", "\u00a0\u3000 x",
)  # fmt: skip
RANDOM_PROBES = 300
REMEDY = (
    "add the tokenizer.json of the model's own page, or write one with the transformers version "
    "that the model was made with: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
)


def convert_sentencepiece(file: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Convert a SentencePiece model. Returns the tokenizer and its special tokens, by their roles.

    Each text between control tokens is split as SentencePiece splits a whole text. Raises
    `CheckpointError` if the file is no SentencePiece model, or if some texts get other ids.
    """
    original = sentencepiece.SentencePieceProcessor()
    try:
        original.load_from_serialized_proto(file.read_bytes())
        proto = _parsed(original.serialized_model_proto())
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file} is no SentencePiece model; {REMEDY}") from error
    tokenizer = _converted(proto)
    for text in _probes(proto):
        if tokenizer.encode(text, add_special_tokens=False).ids != original.encode(text):
            raise CheckpointError(
                f"{file} cannot be converted, because some texts would get other ids ({text!r}); "
                f"{REMEDY}"
            )
    roles = {"unk_token": original.unk_id(), "bos_token": original.bos_id()}
    roles |= {"eos_token": original.eos_id(), "pad_token": original.pad_id()}
    names = {role: original.id_to_piece(i) for role, i in roles.items() if i >= 0}
    _add_special_tokens(tokenizer, proto)
    return tokenizer, names


def _parsed(data: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2  # its classes are made when it is imported

    proto = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009
    proto.ParseFromString(data)
    return proto


def _converted(proto: Any) -> Tokenizer:
    """Return a tokenizer without special tokens."""
    tokenizer = Tokenizer(_model(proto))
    rules: list[Any] = []
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap:
        rules.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        rules += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        rules.append(normalizers.Prepend(SPACE))
    rules.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(rules)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []),
        ]
    )
    defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(name, normalized=True, special=False) for name in defined])
    return tokenizer


def _model(proto: Any) -> models.Model:
    pieces = proto.pieces
    falls_back = any(piece.type == BYTE for piece in pieces)
    unknown = next(n for n, piece in enumerate(pieces) if piece.type == UNKNOWN)
    if proto.trainer_spec.model_type == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scores, unk_id=unknown, byte_fallback=falls_back)
    if proto.trainer_spec.model_type != BPE:
        raise CheckpointError(f"tokenizer.model splits texts into words or characters; {REMEDY}")
    ids = {piece.piece: n for n, piece in enumerate(pieces)}
    return models.BPE(
        ids,
        _merges(pieces),
        unk_token=pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=falls_back,
    )


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """List the pairs of pieces that join into a piece; the piece with the best score first."""
    ids = {piece.piece: n for n, piece in enumerate(pieces) if piece.type in (NORMAL, USER_DEFINED)}
    ranked = sorted(
        (n for n, piece in enumerate(pieces) if piece.type == NORMAL),
        key=lambda n: (-pieces[n].score, n),
    )
    found: list[tuple[str, str]] = []
    for n in ranked:
        whole = pieces[n].piece
        splits = [(whole[:at], whole[at:]) for at in range(1, len(whole))]
        pairs = [(a, b) for a, b in splits if a in ids and b in ids]
        found += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return found


def _add_special_tokens(tokenizer: Tokenizer, proto: Any) -> None:
    special = [p.piece for p in proto.pieces if p.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in special])


def _probes(proto: Any) -> Iterator[str]:
    """Yield texts that the two tokenizers must split equally: fixed ones, and pieces at random."""
    yield from PROBES
    rng = random.Random(0)
    pieces = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type in (NORMAL, USER_DEFINED)]
    for _ in range(RANDOM_PROBES):
        yield "".join(rng.choices(pieces, k=rng.randrange(1, 9)))
