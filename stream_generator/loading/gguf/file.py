"""Converts a GGUF file's configuration, tokenizer and weights to Hugging Face format, once.

transformers needs about twenty seconds to read a small model's GGUF, but less than one second to
read a directory.
"""

import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stream_generator.errors import CheckpointError, first_line
from stream_generator.loading.cache import SourceCache
from stream_generator.memory import free_memory, reject_if_too_large

if TYPE_CHECKING:
    from stream_generator.loading.gguf.weights import GgufWeights

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
HAS_PACKED = "packed.json"  # in the directory of facts: whether the GGUF has packed weights
CONVERSION = 5  # raise this when the conversion changes, so that cached results are made again


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


def reject_part(name: str) -> None:
    """Raise `CheckpointError` if a file's name, in llama.cpp's form, names one part of several."""
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", name):
        raise CheckpointError(
            f"{name} is one part of several; join them with llama.cpp's llama-gguf-split --merge"
        )


class GgufFile:
    """A GGUF file, and the cached results of its conversion."""

    def __init__(self, path: Path, cache: Path | None = None):
        """Raises `CheckpointError` for one part of several."""
        reject_part(path.name)
        self.path = path
        self.cache = SourceCache(path, [path], cache)

    def facts(self) -> Path:
        """Return a directory with the configuration and the tokenizer, in Hugging Face format.

        Raises `CheckpointError` if the file is damaged, has an unknown architecture, or does not
        fit into memory.
        """
        size = self.path.stat().st_size
        reject_if_too_large(self.path, size, free_memory(torch.device("cpu")))
        return self.cache.get("facts", CONVERSION, self._write_facts)

    def dense(self) -> Path:
        """Return a directory with the whole model in Hugging Face format, in bfloat16.

        Raises as `facts` does. Also raises `CheckpointError` if weights are missing, or if the
        weights in bfloat16 are too large for the memory or the disk.
        """
        size = 2 * self.parameters
        reject_if_too_large(self.path, size, free_memory(torch.device("cpu")))
        return self.cache.get("dense", CONVERSION, self._write_dense, size)

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold. Raises `CheckpointError` for a damaged header."""
        from stream_generator.loading.gguf.header import checked_parameters

        try:
            return checked_parameters(self.path)
        except ValueError as error:
            raise _unreadable(self.path, error) from error

    def is_packed(self) -> bool:
        """Whether the file has packed weights."""
        return bool(json.loads((self.facts() / HAS_PACKED).read_text()))

    def weights(self) -> "GgufWeights":
        """Open the weights. Raises `CheckpointError` for an unknown architecture."""
        from stream_generator.loading.gguf.weights import GgufWeights

        try:
            return GgufWeights(self.path)
        except (ValueError, KeyError) as error:
            raise _unreadable(self.path, error) from error

    def _write_facts(self, directory: Path) -> None:
        # Imported here, because the import is slow and only the first start needs it.
        from gguf import GGUFReader

        _ = self.parameters  # check the header before anything else reads the file
        print(f"Converting the tokenizer of {self.path.name} (once) ...", file=sys.stderr)
        try:
            reader = GGUFReader(self.path)
            with _isolated(self.path) as options:
                tokenizer = AutoTokenizer.from_pretrained(**options)
                config = AutoConfig.from_pretrained(**options)
            _correct_tokenizer(tokenizer, reader.fields)
            _reject_biases(config, reader)
            _add_rotary_scaling(config, reader)
        except Exception as error:  # a damaged file can make the readers raise anything
            raise _unreadable(self.path, error) from error
        config.save_pretrained(directory)
        (directory / HAS_PACKED).write_text(json.dumps(self.weights().is_packed))
        tokenizer.save_pretrained(directory)

    def _write_dense(self, directory: Path) -> None:
        facts = self.facts()
        print(f"Converting {self.path.name} for faster starts (once) ...", file=sys.stderr)
        try:
            with _isolated(self.path) as options:
                model, report = AutoModelForCausalLM.from_pretrained(
                    quantization_config=GgufConfig(dequantize=True),
                    dtype=torch.bfloat16,
                    output_loading_info=True,
                    **options,
                )
            if missing := sorted(report["missing_keys"]):
                raise ValueError(f"it lacks {len(missing)} of its weights ({missing[0]}, ...)")
        except Exception as error:  # a damaged file can make the readers raise anything
            raise _unreadable(self.path, error) from error
        model.save_pretrained(directory)
        for file in facts.iterdir():
            shutil.copy(file, directory)


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
    return CheckpointError(
        f"{path} could not be read: {first_line(error)}; download it again if it is incomplete, or "
        "use the model in Hugging Face format"
    )


def _reject_biases(config: Any, reader: Any) -> None:
    if config.model_type == "llama" and any(t.name.endswith(".bias") for t in reader.tensors):
        raise ValueError("it has biases, which transformers ignores in a Llama's GGUF")


def _add_rotary_scaling(config: Any, reader: Any) -> None:
    """Set the scaled rotary frequencies of Llama 3.1 and 3.2, which transformers ignores in a GGUF.

    The file holds them as a tensor of divisors. Raises `ValueError` for any other scaling.
    """
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind = next(
        (f for name, f in reader.fields.items() if name.endswith("rope.scaling.type")), None
    )
    if kind is not None and kind.contents() != "none":
        raise ValueError(
            f"its rotary positions are scaled in a way that is not supported ({kind.contents()})"
        )
    if "rope_freqs.weight" not in tensors:
        return
    divisors = torch.tensor(tensors["rope_freqs.weight"].data)
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": config.rope_parameters["rope_theta"],
        "factor": round(float(divisors.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = 1 / config.rope_parameters["rope_theta"] ** (
        torch.arange(len(divisors)) / len(divisors)
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if not torch.allclose(plain / scaled, divisors, rtol=1e-3):
        raise ValueError("its rotary frequencies are scaled in another way than Llama 3's")


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
