"""Converts a GGUF file's configuration, tokenizer and weights to Hugging Face format, once.

transformers needs about twenty seconds to read a small model's GGUF, but less than one second to
read a directory.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, GenerationConfig

from stream_generator.errors import CheckpointError, first_line
from stream_generator.loading.cache import SourceCache
from stream_generator.loading.gguf.parts import find_parts, whole_name
from stream_generator.memory import free_memory, reject_if_too_large

if TYPE_CHECKING:
    from stream_generator.loading.gguf.weights import GgufWeights

MAGIC = b"GGUF"
HAS_PACKED = "packed.json"  # in the directory of facts: whether the GGUF has packed weights
CONVERSION = 7  # raise this when the conversion changes, so that cached results are made again


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
        from stream_generator.loading.gguf.tokenizer import read_tokenizer

        _ = self.parameters  # check the headers before anything else reads the files
        print(f"Converting the tokenizer of {self.path.name} (once) ...", file=sys.stderr)
        weights = self.weights()
        try:
            config = read_config(weights.fields, weights.shapes, weights.rotary)
            check_tensors(config, weights)
            tokenizer = read_tokenizer(self.path, weights.fields)
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
