"""A GGUF file as a directory in Hugging Face format, converted once.

Reading a GGUF takes transformers some twenty seconds for a small model, each time; the directory
loads in under a second. Four and eight bit weights are also kept as they are.
"""

import logging
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, pre_tokenizers, processors
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stream_generator.errors import CheckpointError, first_line
from stream_generator.loading.cache import cache_directory, fingerprint, made_once, state_of
from stream_generator.loading.packed_file import save_packed
from stream_generator.memory import free_memory, refuse_if_too_large

logger = logging.getLogger(__name__)

PACKED_FILE = "packed.safetensors"  # the weights as the GGUF has them, beside the dense ones
MAGIC = b"GGUF"
CONVERSION = 3  # raise it when the conversion changes, so that older results are not used


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


def converted_gguf(path: Path, cache: Path | None = None) -> Path:
    """The same model as a directory in Hugging Face format, in the cache.

    Raises `CheckpointError` for a file that is damaged, or of an architecture that is not known.
    """
    refuse_part(path.name)
    facts = fingerprint(CONVERSION, state_of([path]))
    target = (cache or cache_directory()) / "converted" / f"{path.stem}-{facts}"
    if target.is_dir():
        return target
    from stream_generator.loading.gguf_header import checked_parameters

    try:
        dense = 2 * checked_parameters(path)  # in bfloat16
    except ValueError as error:
        raise _unreadable(path, error) from error
    refuse_if_too_large(path, dense, free_memory(torch.device("cpu")))
    size = dense + path.stat().st_size  # beside the dense weights, about those of the file
    return made_once(target, lambda directory: convert_gguf(path, directory), size)


def convert_gguf(path: Path, directory: Path) -> None:
    """Write the model, its tokenizer and its packed weights into `directory`."""
    # Imported here: only the first start needs it, and it takes a while.
    from gguf import GGUFReader

    from stream_generator.loading.gguf_weights import packed_weights

    print(f"Converting {path.name} for faster starts (once) ...", file=sys.stderr)
    try:
        reader = GGUFReader(path)
        tokenizer, model = _read_alone(path)
        _mend_tokenizer(tokenizer, reader.fields)
        _refuse_biases(model.config, reader)
        _mend_rotation(model.config, reader)
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    except Exception as error:  # whatever a foreign file makes the readers raise
        raise _unreadable(path, error) from error
    model.save_pretrained(directory)
    del model  # both at once would take half as much memory again
    try:
        packed = packed_weights(path, linears)
    except (ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    if packed:
        save_packed(packed, directory / PACKED_FILE)
    tokenizer.save_pretrained(directory)


def _read_alone(path: Path) -> tuple[Any, Any]:
    """The file's tokenizer and model, without what lies beside it: transformers would prefer that.

    Raises `ValueError` where the file lacks weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.gguf"
        source.symlink_to(path.resolve())
        options: dict[str, Any] = {"gguf_file": source.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} of its weights ({missing[0]}, ...)")
    return tokenizer, model


def _unreadable(path: Path, error: Exception) -> CheckpointError:
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
