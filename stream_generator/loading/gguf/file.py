"""A GGUF file's configuration, tokenizer and dense weights in Hugging Face format, made once.

Reading a GGUF takes transformers some twenty seconds for a small model, each time; a directory
loads in under a second.
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
from stream_generator.memory import free_memory, refuse_if_too_large

if TYPE_CHECKING:
    from stream_generator.loading.gguf.weights import GgufWeights

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
HAS_PACKED = "packed.json"  # whether the file has packed weights, beside its configuration
CONVERSION = 5  # raise it when the conversion changes, so that older results are not used


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

# How a text is split before its pieces are looked up, by tokenizer.ggml.pre. transformers splits
# every GGUF with a byte-level vocabulary as GPT-2's. Source: llama.cpp, llama-vocab.cpp.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _digits_first,
    "llama-bpe": _split_by(_WORDS + r"\p{N}{1,3}" + _REST),
    "qwen2": _split_by(_WORDS + r"\p{N}" + _REST),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}
IGNORE_MERGES = {"llama-bpe"}  # a piece that is a word of the vocabulary is that word


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def refuse_part(name: str) -> None:
    """Raise `CheckpointError` for a name that llama.cpp gives to one file of several."""
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", name):
        raise CheckpointError(
            f"{name} is one part of several; join them with llama.cpp's llama-gguf-split --merge"
        )


class GgufFile:
    """A GGUF file, and what is kept of it."""

    def __init__(self, path: Path, cache: Path | None = None):
        """Raises `CheckpointError` for one part of several, or a file with a damaged header."""
        refuse_part(path.name)
        self.path = path
        self.cache = SourceCache(path, [path], cache)

    def facts(self) -> Path:
        """Its configuration and tokenizer, as a directory in Hugging Face format.

        Raises `CheckpointError` for a file that is damaged, or of an architecture that is not
        known, or does not fit into memory.
        """
        size = self.path.stat().st_size
        refuse_if_too_large(self.path, size, free_memory(torch.device("cpu")))
        return self.cache.made("facts", CONVERSION, self._write_facts)

    def dense(self) -> Path:
        """The whole model as a directory in Hugging Face format, its weights in bfloat16.

        Raises as `facts`, and for a model that does not fit into memory.
        """
        size = 2 * self.parameters
        refuse_if_too_large(self.path, size, free_memory(torch.device("cpu")))
        return self.cache.made("dense", CONVERSION, self._write_dense, size)

    @property
    def parameters(self) -> int:
        """How many numbers it holds. Raises `CheckpointError` for a damaged header."""
        from stream_generator.loading.gguf.header import checked_parameters

        try:
            return checked_parameters(self.path)
        except ValueError as error:
            raise unreadable(self.path, error) from error

    def is_packed(self) -> bool:
        """Whether it has packed weights."""
        return bool(json.loads((self.facts() / HAS_PACKED).read_text()))

    def weights(self) -> "GgufWeights":
        """Its weights as they are. Raises `CheckpointError` for an unknown architecture."""
        from stream_generator.loading.gguf.weights import GgufWeights

        try:
            return GgufWeights(self.path)
        except (ValueError, KeyError) as error:
            raise unreadable(self.path, error) from error

    def _write_facts(self, directory: Path) -> None:
        # Imported here: only the first start needs it, and it takes a while.
        from gguf import GGUFReader

        _ = self.parameters  # the header is checked before anything else reads it
        print(f"Reading {self.path.name} for faster starts (once) ...", file=sys.stderr)
        try:
            reader = GGUFReader(self.path)
            with _alone(self.path) as options:
                tokenizer = AutoTokenizer.from_pretrained(**options)
                config = AutoConfig.from_pretrained(**options)
            _mend_tokenizer(tokenizer, reader.fields)
            _refuse_biases(config, reader)
            _mend_rotation(config, reader)
        except Exception as error:  # whatever a foreign file makes the readers raise
            raise unreadable(self.path, error) from error
        config.save_pretrained(directory)
        (directory / HAS_PACKED).write_text(json.dumps(self.weights().is_packed))
        tokenizer.save_pretrained(directory)

    def _write_dense(self, directory: Path) -> None:
        facts = self.facts()
        print(f"Converting {self.path.name} for faster starts (once) ...", file=sys.stderr)
        try:
            with _alone(self.path) as options:
                model, report = AutoModelForCausalLM.from_pretrained(
                    quantization_config=GgufConfig(dequantize=True),
                    dtype=torch.bfloat16,
                    output_loading_info=True,
                    **options,
                )
            if missing := sorted(report["missing_keys"]):
                raise ValueError(f"it lacks {len(missing)} of its weights ({missing[0]}, ...)")
        except Exception as error:  # whatever a foreign file makes the readers raise
            raise unreadable(self.path, error) from error
        model.save_pretrained(directory)
        for file in facts.iterdir():
            shutil.copy(file, directory)


@contextmanager
def _alone(path: Path) -> Iterator[dict[str, Any]]:
    """Arguments for transformers to read the file without what lies beside it, which it prefers."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.gguf"
        source.symlink_to(path.resolve())
        yield {
            "pretrained_model_name_or_path": folder,
            "gguf_file": source.name,
            "trust_remote_code": False,
        }


def unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} could not be read: {first_line(error)}; if it was cut off, download it again"
    )


def _refuse_biases(config: Any, reader: Any) -> None:
    if config.model_type == "llama" and any(t.name.endswith(".bias") for t in reader.tensors):
        raise ValueError("it has biases, which transformers leaves out of a Llama")


def _mend_rotation(config: Any, reader: Any) -> None:
    """Llama 3.1's and 3.2's scaled frequencies, which a GGUF has as a tensor of divisors.

    transformers leaves them out. Raises `ValueError` for what it leaves out and we do, too.
    """
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind = next(
        (f for name, f in reader.fields.items() if name.endswith("rope.scaling.type")), None
    )
    if kind is not None and kind.contents() != "none":
        raise ValueError(
            f"its rotary positions are scaled ({kind.contents()}), which cannot be taken over; use "
            "the model in Hugging Face format"
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
        raise ValueError("its rotary frequencies are scaled in a way that is not Llama 3's")


def _mend_tokenizer(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Split texts as the model was trained, and begin them as the file says."""

    def field(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    backend = tokenizer.backend_tokenizer
    if field("tokenizer.ggml.model") == "gpt2":
        kind = field("tokenizer.ggml.pre")
        if kind in PRE_TOKENIZERS:
            backend.pre_tokenizer = PRE_TOKENIZERS[kind]()
            backend.model.ignore_merges = kind in IGNORE_MERGES
        else:
            logger.warning("the file's tokenizer is of the kind %s: it may split otherwise", kind)
        begin = tokenizer.bos_token
        begins = field("tokenizer.ggml.add_bos_token")
        if begins is None:  # many files of Llama 3 do not say it; llama.cpp knows
            begins = kind == "llama-bpe"
        if begin and begins:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
            )
