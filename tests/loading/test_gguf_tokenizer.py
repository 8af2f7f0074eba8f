"""The tokenizer of a GGUF file gives the ids of llama.cpp, or the file is rejected."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from stream_generator.errors import CheckpointError
from stream_generator.loading.gguf.tokenizer import KINDS, Kind, read_tokenizer
from stream_generator.loading.load import load_checkpoint

# Loads each file that it is told of, and prints the ids of the texts. The texts come first.
LLAMA_CPP = """
import json, sys, requests, xllamacpp
texts = json.loads(sys.stdin.readline())
with requests.Session() as session:
    for line in sys.stdin:
        params = xllamacpp.CommonParams()
        params.model.path = json.loads(line)
        params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
        params.cpuparams.n_threads = 1
        params.hostnames, params.port = ["127.0.0.1"], 0
        found = None
        try:
            server = xllamacpp.Server(params)
        except RuntimeError:
            pass
        else:
            url = f"{server.listening_address}/tokenize"
            bodies = [{"content": text, "add_special": True} for text in texts]
            found = [session.post(url, json=body, timeout=60).json()["tokens"] for body in bodies]
            del server
        print(json.dumps(found), flush=True)
"""
MARKS = "हिन्दी में पाठ"  # has combining marks
TEXTS = [
    "Hello, world!", "hello world", " leading", "trailing ", "two  spaces", "a   b    c     d",
    "I'm sure it's what they'd've said, don't you?", "WE'LL SEE, IT'S HERE; I'VE GONE", "'tis 's",
    "1", "12", "123", "1234", "12345678", "3.14159 and 2,718,281", "x1y22z333", "year 2024, 50%",
    "line\nline", "one\n\ntwo\n\n\nthree", "\n", "\n\n  indented", "  \n  \n", "tab\tand\t\ttabs",
    "\r\nwindows\r\nlines", "end.\n", "end?!\n\n", "    def f(x):\n        return x**2  # square\n",
    "中文句子没有空格", "你好，世界。今天是2024年", "中文 and English 混合", "ひらがなとカタカナ",
    "한국어 문장입니다", "😀😃 emoji 👍🏽", "a😀b",
    "snake_case camelCase HTTPServer XMLHttpRequest",
    "path/to/file.txt https://example.org/?q=1&r=2", "$100 + <tag> = ^x^ ~y | `code`",
    '{"key": [1, 22, 333], "b": null}', "(parenthesis) [bracket]", "...---!!!",
    "wonderful wonderful", "use `this` or `that` `",
    "Привет, мир", "naïve café", MARKS, "a" * 40, " " * 40 + "x", "",
]  # fmt: skip
BEGIN, WHOLE = "<begin>", "wonderful"  # the second is a token that no merges lead to


@pytest.fixture(scope="module")
def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges that cross every border, so that each split shows in the ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, show_progress=False, min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=len(WHOLE) - 1,
    )  # fmt: skip
    pieces = [text[start : start + 12] for text in TEXTS for start in range(0, len(text), 3)]
    tokenizer.train_from_iterator([*TEXTS, *pieces], trainer)
    found = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    words = sorted(found, key=found.__getitem__)
    assert WHOLE not in words
    return [*words, WHOLE, BEGIN], [" ".join(pair) for pair in merges]


# For these kinds, llama.cpp does not count combining marks as parts of words. The models' own
# tokenizers do, and this project follows them.
WITHOUT_MARKS = {"tekken", "gpt-4o", "llama4", "kanana2", "minimax-m2"}


def write(
    path: Path,
    vocabulary: tuple[list[str], list[str]],
    model: str,
    kind: str | None,
    begins: bool | None = None,
) -> Path:
    """A file with a tokenizer, and the smallest model with which llama.cpp loads it."""
    words, merges = vocabulary
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    if kind is not None:
        writer.add_tokenizer_pre(kind)
    writer.add_token_list(words)
    writer.add_token_types([TokenType.NORMAL] * (len(words) - 1) + [TokenType.CONTROL])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(words) - 1)
    writer.add_eos_token_id(len(words) - 1)
    if begins is not None:
        writer.add_add_bos_token(begins)
    square = numpy.zeros((32, 32), dtype=numpy.float32)
    writer.add_tensor("token_embd.weight", numpy.zeros((len(words), 32), dtype=numpy.float32))
    writer.add_tensor("output_norm.weight", square[0])
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", square[0])
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> Any:
    return read_tokenizer(path, GGUFReader(path).fields)


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", LLAMA_CPP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        print(json.dumps(TEXTS), file=process.stdin, flush=True)
        yield process
        process.kill()


@pytest.fixture(scope="module")
def known_ids() -> dict[Kind, list[list[int]]]:
    """Our ids of the texts, once for all kinds that share an entry: to read a file is slow."""
    return {}


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_each_kind_gives_the_ids_of_llama_cpp(
    kind: str | None, vocabulary: tuple[list[str], list[str]], tmp_path: Path,
    llama_cpp: subprocess.Popen[str], known_ids: dict[Kind, list[list[int]]],
) -> None:  # fmt: skip
    path = write(tmp_path / "tiny.gguf", vocabulary, "gpt2", kind)
    assert llama_cpp.stdin is not None
    assert llama_cpp.stdout is not None
    print(json.dumps(str(path)), file=llama_cpp.stdin, flush=True)
    theirs = json.loads(llama_cpp.stdout.readline())
    assert theirs is not None, "llama.cpp does not load the file"
    entry = KINDS[kind or "default"]
    if entry not in known_ids:
        tokenizer = read(path)
        known_ids[entry] = [tokenizer.encode(text) for text in TEXTS]
    for text, ours, ids in zip(TEXTS, known_ids[entry], theirs, strict=True):
        agrees = text != MARKS or kind not in WITHOUT_MARKS
        assert (ours == ids) == agrees, text


@pytest.mark.parametrize("add", [True, False])
def test_the_file_says_whether_texts_begin_with_the_begin_token(
    add: bool, vocabulary: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    for kind in ("llama-bpe", "gpt-2"):
        path = write(tmp_path / f"{kind}.gguf", vocabulary, "gpt2", kind, add)
        assert (read(path).encode("a")[0] == vocabulary[0].index(BEGIN)) == add


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("gpt2", "future-bpe", r"tokenizer.ggml.pre \('future-bpe'\)"),
        ("gemma4", "gemma4", r"tokenizer.ggml.model \('gemma4'\)"),
        ("bert", None, r"tokenizer.ggml.model \('bert'\)"),
        ("t5", None, r"tokenizer.ggml.model \('t5'\)"),
    ],
)
def test_a_file_with_an_unknown_tokenizer_is_rejected_by_its_name(
    model: str, kind: str | None, words: str, vocabulary: tuple[list[str], list[str]],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write(tmp_path / "tiny.gguf", vocabulary, model, kind)
    with pytest.raises(CheckpointError, match=rf"{words} is not known.*Hugging Face format"):
        load_checkpoint(str(path))


def test_the_texts_tell_all_kinds_apart(
    vocabulary: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    """Otherwise the test with llama.cpp could not notice a wrong split."""
    distinct = {kind: name for name, kind in KINDS.items()}
    found: dict[str, str] = {}
    for name in distinct.values():
        tokenizer = read(write(tmp_path / f"{name}.gguf", vocabulary, "gpt2", name))
        ids = str([tokenizer.encode(text) for text in TEXTS])
        assert ids not in found, f"{name} and {found[ids]}"
        found[ids] = name
