"""Says what a directory or file is, if it is no causal language model that can be loaded."""

import contextlib
import json
import logging
import re
import struct
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from stream_generator.errors import CheckpointError

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)
READ_SUFFIXES = {".json", ".jinja", ".model", ".safetensors", ".bin", ".pth", ".gguf", ".txt"}
NUMBERS_IN_HEADER = 100_000_000  # bytes of a safetensors header, at most; the format's own limit

GGUF_STRING = 8  # a type of a value in GGUF's metadata
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
MAX_GGUF_FACTS, MAX_GGUF_TEXT = 1000, 1_000_000  # values and bytes that are read at most

# What the class of a model computes instead of the next token, by a part of the class's name.
OTHER_KINDS = {
    "ForSequenceClassification": "a reward or classification model",
    "ForTokenClassification": "a model that classifies tokens, or a reward model",
    "ForRewardModel": "a reward model",
    "RewardModel": "a reward model",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMultipleChoice": "a model for multiple choice",
    "ForNextSentencePrediction": "an encoder",
    "ForMaskedLM": "an encoder, which fills gaps",
    "ForPreTraining": "a model for pre-training",
}


def read_json(file: Path) -> Any:
    """Read JSON with or without a byte order mark; None if the file is missing or is no JSON."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def reject_pointer(file: Path) -> None:
    """Raise `CheckpointError` if a file is a git-lfs pointer or a web page, and not the content."""
    if file.suffix not in READ_SUFFIXES or not file.is_file():
        return
    with file.open("rb") as stream:
        beginning = stream.read(200)
    if beginning.startswith(POINTER):
        raise CheckpointError(
            f"{file} is a git-lfs pointer, and not the file itself; run `git lfs pull` in its "
            "directory, or give the hub id to --ckpts"
        )
    if WEB_PAGE.match(beginning) and file.suffix not in (".jinja", ".txt"):
        raise CheckpointError(
            f"{file} is a web page, and not the file itself; download the file by the hub's "
            "download link, or give the hub id to --ckpts"
        )


def reject_pointers(directory: Path) -> None:
    """Raise `CheckpointError` if a file of a directory is a git-lfs pointer or a web page."""
    for file in sorted(directory.iterdir()):
        reject_pointer(file)


def reject_adapter(directory: Path) -> None:
    """Raise `CheckpointError` if a directory holds an adapter, with or without a whole model.

    A merged model may still hold adapter_config.json; the log then says that it is not used.
    """
    if not (directory / ADAPTER).is_file():
        return
    if weights := sorted(file.name for file in directory.glob("adapter_model.*")):
        is_whole = any(file for kind in WEIGHTS for file in directory.glob(kind))
        if is_whole:
            raise CheckpointError(
                f"{directory} holds a whole model and an adapter of it ({weights[0]}); merge the "
                "adapter with peft (merge_and_unload), or delete adapter_config.json and "
                f"{weights[0]} to use the model without it"
            )
    elif any(file for kind in WEIGHTS for file in directory.glob(kind)):
        logger.info("ignoring %s, because %s holds a whole model", ADAPTER, directory)
        return
    raise CheckpointError(
        f"{directory} holds an adapter of {_base_of(directory)}, and no whole model; load both "
        "with peft, merge them (merge_and_unload), save the result and its tokenizer, and use that"
    )


def _base_of(directory: Path) -> str:
    content = read_json(directory / ADAPTER)
    name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return str(name or "an unnamed base model")


def reject_other_kind(directory: Path, config: Any) -> None:
    """Raise `CheckpointError` if a configuration describes no causal language model."""
    if kind := _other_kind(directory, config):
        raise CheckpointError(
            f"{directory} is {kind}, and no causal language model; use a model that generates text"
        )


def _other_kind(directory: Path, config: Any) -> str | None:
    names = [str(name) for name in getattr(config, "architectures", None) or []]
    for name in names:
        for part, kind in OTHER_KINDS.items():
            if part in name:
                return f"{kind} ({name})"
    if getattr(config, "is_encoder_decoder", False):
        return f"an encoder-decoder model ({_name(names, config)})"
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_encoder and not getattr(config, "is_decoder", True):
        return f"an encoder ({_name(names, config)})"
    if names and all(re.fullmatch(r"[A-Za-z0-9_]+(?<!LMHead)Model", name) for name in names):
        return f"a model without an output matrix, as for embeddings ({names[0]})"
    if (directory / "config_sentence_transformers.json").is_file():
        return "an embedding model (config_sentence_transformers.json)"
    return None


def _name(names: list[str], config: Any) -> str:
    return names[0] if names else str(config.model_type)


def reject_packed_for_mlx(directory: Path) -> None:
    """Raise `CheckpointError` if weights are packed in MLX's format."""
    config = read_json(directory / "config.json")
    packing = config.get("quantization") if isinstance(config, dict) else None
    if isinstance(packing, dict) and "bits" in packing:
        raise CheckpointError(
            f"{directory} holds weights that are packed for MLX; use the version with plain "
            "weights, or a GGUF"
        )


def where_it_may_be(directory: Path) -> str:
    """Say what a directory without a checkpoint is, with the remedy; "" if that is not known."""
    inside = [*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json")]
    if inside:
        names = ", ".join(str(file.parent) for file in sorted(inside)[:8])
        return f"its model lies in another directory; name one of these: {names}"
    if (directory / "params.json").is_file() and any(directory.glob("consolidated*.safetensors")):
        return "it is in Mistral's own format; use the model in Hugging Face format"
    if (directory / "model_index.json").is_file():
        return "it makes images (model_index.json); use a model that generates text"
    for kind, name in (("*.onnx", "ONNX"), ("*.engine", "TensorRT"), ("*.h5", "TensorFlow")):
        if any(directory.glob(kind)):
            return f"it is in the format of {name}; use the model in Hugging Face format"
    return ""


def reject_gguf_of_other_kind(file: Path) -> None:
    """Raise `CheckpointError` if a GGUF file is an adapter or belongs to the images of a model."""
    facts = _beginning_of_gguf(file)
    if facts.get("general.type") == "adapter":
        raise CheckpointError(
            f"{file} is an adapter (LoRA), and no whole model; merge it into its base model with "
            "llama.cpp's llama-export-lora, and use the result"
        )
    if facts.get("general.type") == "mmproj" or facts.get("general.architecture") == "clip":
        raise CheckpointError(
            f"{file} reads images for another model (mmproj), and generates no text; name the GGUF "
            "file of the language model"
        )


def _beginning_of_gguf(file: Path) -> dict[str, str]:
    """Read the strings at the beginning of a GGUF's metadata, up to the first list."""
    facts: dict[str, str] = {}
    with file.open("rb") as stream, contextlib.suppress(struct.error, UnicodeDecodeError):

        def number(form: str) -> int:
            (value,) = struct.unpack(form, stream.read(struct.calcsize(form)))
            return int(value)

        def text() -> str:
            length = number("<Q")
            if length > MAX_GGUF_TEXT:
                raise struct.error
            return stream.read(length).decode()

        stream.read(16)  # magic, version, number of tensors
        for _ in range(min(number("<Q"), MAX_GGUF_FACTS)):
            name, kind = text(), number("<I")
            if kind == GGUF_STRING:
                facts[name] = text()
            elif kind in GGUF_SIZES:
                stream.read(GGUF_SIZES[kind])
            else:
                break
    return facts


def reject_cut_off(file: Path) -> None:
    """Raise `CheckpointError` if a safetensors file is shorter than its own header says."""
    size = file.stat().st_size
    if file.suffix != ".safetensors" or size == (needed := _size_by_header(file, size)):
        return
    if size < needed:
        raise CheckpointError(
            f"{file} is cut off: it has {size} bytes, but its header asks for {needed}; download "
            "it again"
        )


def _size_by_header(file: Path, size: int) -> int:
    """Return how many bytes a safetensors file has by its header; `size` if it tells nothing."""
    if size < 8:
        return 8
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > NUMBERS_IN_HEADER:
            return size
        if 8 + length > size:
            return int(8 + length)
        try:
            header = json.loads(stream.read(length))
            ends = [x["data_offsets"][1] for name, x in header.items() if name != "__metadata__"]
            return 8 + int(length) + max((end for end in ends if isinstance(end, int)), default=0)
        except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError):
            return size
