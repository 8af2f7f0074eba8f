"""Writes the dense weights of a GGUF file in Hugging Face format, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig

from stream_generator.loading.gguf.metadata import UnsupportedFile
from stream_generator.loading.gguf.weights import GgufWeights
from stream_generator.loading.safetensors_writer import write_weights

TIED_OUTPUT = "lm_head.weight"


def check_tensors(config: PreTrainedConfig, weights: GgufWeights) -> None:
    """Compare a file's tensors with the parameters of a transformers model.

    Raises `ValueError` if a parameter is missing or has another shape, and `UnsupportedFile` if a
    tensor is left over.
    """
    parameters = _parameters(config)
    missing = sorted(name for name in map(weights.missing, parameters) if name)
    if missing:
        raise ValueError(f"it lacks {len(missing)} of its weights ({missing[0]}, ...)")
    for name, shape in parameters.items():
        if weights.shape(name) != shape:
            raise ValueError(
                f"its weight {name} has the shape {weights.shape(name)}, but {shape} is expected"
            )
    if unused := sorted(weights.unused(parameters)):
        raise UnsupportedFile(f"{len(unused)} of its tensors are not known ({unused[0]}, ...)")


def write_dense(config: PreTrainedConfig, weights: GgufWeights, directory: Path) -> None:
    """Write all weights into a directory: floats in their dtype, packed weights in bfloat16."""
    names = [
        name
        for name in _parameters(config)
        if name != TIED_OUTPUT or not config.tie_word_embeddings
    ]

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for name in tqdm(names):
            yield name, weights.stored(name)

    write_weights(read(), directory)


def _parameters(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
