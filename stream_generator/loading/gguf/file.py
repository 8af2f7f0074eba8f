"""Converts a GGUF file's configuration, tokenizer and weights to Hugging Face format, once.

transformers needs about twenty seconds to read a small model's GGUF, but less than one second to
read a directory.
"""

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from stream_generator.errors import CheckpointError, first_line
from stream_generator.loading.cache import SourceCache
from stream_generator.loading.gguf.parts import find_parts, whole_name
from stream_generator.memory import free_memory, reject_if_too_large

if TYPE_CHECKING:
    from stream_generator.loading.gguf.weights import GgufWeights

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
HAS_PACKED = "packed.json"  # in the directory of facts: whether the GGUF has packed weights
CONVERSION = 6  # raise this when the conversion changes, so that cached results are made again


def _digits_first() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _split_by(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# How to split a text into pieces, by the value of tokenizer.ggml.pre. transformers splits texts for
# every GGUF with a byte-level vocabulary as GPT-2 does. Source: llama.cpp, llama-vocab.cpp.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _digits_first,
    "llama-bpe": _split_by(_WORDS + r"\p{N}{1,3}" + _REST),
    "qwen2": _split_by(_WORDS + r"\p{N}" + _REST),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}
IGNORE_MERGES = {"llama-bpe"}  # a piece that the vocabulary holds is one token


def is_gguf(path: Path) -> bool:
    """Whether a file begins with the magic bytes of GGUF."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class GgufFile:
    """A GGUF file, in one or several parts, and the cached results of its conversion."""

    def __init__(self, path: Path, cache: Path | None = None):
        """path: the file, or any of its parts. Raises `CheckpointError` if a part is missing."""
        self.parts = find_parts(path)
        self.path = self.parts[0]  # has the metadata
        self.name = whole_name(path.name)
        self.cache = SourceCache(self.path, self.parts, cache)

    def facts(self) -> Path:
        """Return a directory with the configuration and the tokenizer, in Hugging Face format.

        Raises `CheckpointError` if the file is damaged, does not fit into memory, or holds
        something that is not understood: an architecture, a value or a tensor.
        """
        size = sum(path.stat().st_size for path in self.parts)
        reject_if_too_large(self.path, size, free_memory(torch.device("cpu")))
        return self.cache.get("facts", CONVERSION, self._write_facts)

    def dense(self) -> Path:
        """Return a directory with the whole model in Hugging Face format.

        Floats keep their dtype; packed weights become bfloat16. Raises as `facts` does. Also raises
        `CheckpointError` if weights are missing, or if the dense weights are too large for the
        memory or the disk.
        """
        size = self.weights().dtype.itemsize * self.parameters
        reject_if_too_large(self.path, size, free_memory(torch.device("cpu")))
        return self.cache.get("dense", CONVERSION, self._write_dense, size)

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold. Raises `CheckpointError` for a damaged header."""
        from stream_generator.loading.gguf.header import checked_parameters

        total = 0
        for path in self.parts:
            try:
                total += checked_parameters(path)
            except ValueError as error:
                raise _unreadable(path, error) from error
        return total

    def is_packed(self) -> bool:
        """Whether the file has packed weights."""
        return bool(json.loads((self.facts() / HAS_PACKED).read_text()))

    def weights(self) -> "GgufWeights":
        """Open the weights. Raises `CheckpointError` for a damaged file or an unknown
        architecture."""
        from stream_generator.loading.gguf.weights import GgufWeights

        try:
            return GgufWeights(*self.parts)
        except Exception as error:  # a damaged file can make the reader raise anything
            raise _unreadable(self.path, error) from error

    def _write_facts(self, directory: Path) -> None:
        # Imported here, because the import is slow and only the first start needs it.
        from stream_generator.loading.gguf.config import read_config
        from stream_generator.loading.gguf.dense import check_tensors

        _ = self.parameters  # check the headers before anything else reads the files
        print(f"Converting the tokenizer of {self.path.name} (once) ...", file=sys.stderr)
        weights = self.weights()
        try:
            config = read_config(weights.fields, weights.shapes, weights.rotary)
            check_tensors(config, weights)
            with _isolated(self.path) as options:
                tokenizer = _tokenizer_class(weights.fields).from_pretrained(**options)
            _correct_tokenizer(tokenizer, weights.fields)
        except Exception as error:  # a damaged file can make the readers raise anything
            raise _unreadable(self.path, error) from error
        config.save_pretrained(directory)
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        GenerationConfig(**ids).save_pretrained(directory)
        (directory / HAS_PACKED).write_text(json.dumps(weights.is_packed))
        tokenizer.save_pretrained(directory)

    def _write_dense(self, directory: Path) -> None:
        from stream_generator.loading.gguf.dense import write_dense

        facts, weights = self.facts(), self.weights()
        print(f"Converting {self.path.name} for faster starts (once) ...", file=sys.stderr)
        shutil.copytree(facts, directory)
        config = AutoConfig.from_pretrained(facts)
        config.dtype = weights.dtype
        config.save_pretrained(directory)
        write_dense(config, weights, directory)


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


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    from stream_generator.loading.gguf.metadata import UnsupportedFile

    if isinstance(error, UnsupportedFile):
        return CheckpointError(
            f"{path} cannot be loaded: {error}; use the model in Hugging Face format"
        )
    return CheckpointError(
        f"{path} could not be read: {first_line(error)}; download it again if it is incomplete, or "
        "use the model in Hugging Face format"
    )


def _tokenizer_class(fields: dict[str, Any]) -> Any:
    """Return the class that reads the tokenizer; the automatic one rejects some architectures."""
    architecture = fields["general.architecture"].contents()
    known = architecture in GGUF_SUPPORTED_ARCHITECTURES
    return AutoTokenizer if known else PreTrainedTokenizerFast


def _correct_tokenizer(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Make the tokenizer split as in training, and add a begin token if the file asks for it."""

    def field(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    backend = tokenizer.backend_tokenizer
    if field("tokenizer.ggml.model") == "gpt2":
        kind = field("tokenizer.ggml.pre")
        if kind in PRE_TOKENIZERS:
            backend.pre_tokenizer = PRE_TOKENIZERS[kind]()
            backend.model.ignore_merges = kind in IGNORE_MERGES
        else:
            logger.warning("unknown tokenizer kind %s: texts may be split unlike in training", kind)
        begin = tokenizer.bos_token
        begins = field("tokenizer.ggml.add_bos_token")
        if begins is None:  # missing in many files of Llama 3; llama.cpp has the same rule
            begins = kind == "llama-bpe"
        if begin and begins:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
            )
