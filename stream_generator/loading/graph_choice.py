"""Decides whether a model's weights run packed on a CPU, as a step graph."""

import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from stream_generator.errors import CheckpointError
from stream_generator.loading.graph_cache import saved_graph
from stream_generator.loading.layout import Located
from stream_generator.model.config import require_batchable
from stream_generator.model.packed_weight import BITS, FAMILIES, MODEL_TYPES, NotBuildable

logger = logging.getLogger(__name__)


def wants_packed(found: Located, quantize: str) -> bool:
    """Whether the weights should be packed: because the user asks, or because the file has them."""
    gguf = found.gguf
    return quantize in BITS or (quantize == "auto" and gguf is not None and gguf.is_packed())


def could_pack(config: Any, generation_config: GenerationConfig) -> bool:
    """Whether `--quantize` would work for a model of this shape on a CPU."""
    from stream_generator.loading.graph_build import layer_shape

    try:
        require_batchable(config, generation_config)
        layer_shape(config)
    except (NotBuildable, ValueError):
        return False
    return config.model_type in MODEL_TYPES


def graph_for(
    found: Located,
    quantize: str,
    config: Any,
    generation_config: GenerationConfig,
    *,
    dtype: str,
    spread: bool,
) -> Path | None:
    """The directory of the step graph for packed weights; None if the model must run dense.

    spread: whether `--device-map` places the model. Raises `CheckpointError` if the weights cannot
    be packed although the user asks for it.
    """
    try:
        if spread:
            raise NotBuildable("--device-map spreads it over devices")
        require_batchable(config, generation_config)
        if dtype in ("bfloat16", "float16"):
            from stream_generator.loading.graph_build import layer_shape

            layer_shape(config)  # a model of another shape runs dense
            raise CheckpointError(
                f"--dtype {dtype} and packed weights exclude each other on a CPU: packed weights "
                "are multiplied as integers, and the rest is float32; leave --dtype out, or give "
                "--quantize none"
            )
        return saved_graph(found, config, BITS.get(quantize))
    except (NotBuildable, ValueError) as error:
        if quantize in BITS:
            raise CheckpointError(
                f"--quantize {quantize} packs models of the families {FAMILIES}, and this one "
                f"cannot be packed ({error}); leave --quantize out"
            ) from error
        logger.warning("the weights run dense, because they cannot run packed: %s", error)
        return None
    except KeyError as error:
        raise CheckpointError(
            f"{found.name} lacks 1 of its weights ({error.args[0]}); download it again"
        ) from error
