"""Decides whether a model runs on a CPU with packed weights, as a step graph."""

import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from stream_generator.errors import CheckpointError
from stream_generator.loading.graph_cache import get_or_build_graph
from stream_generator.loading.layout import LocatedModel
from stream_generator.model.config import require_batchable
from stream_generator.model.packed_weight import BITS, FAMILIES, MODEL_TYPES, NotBuildable

logger = logging.getLogger(__name__)


def wants_packed(found: LocatedModel, quantize: str) -> bool:
    """Whether the user asks for packed weights, or the file has some and `quantize` is "auto"."""
    gguf = found.gguf
    return quantize in BITS or (quantize == "auto" and gguf is not None and gguf.is_packed())


def could_pack(config: Any, generation_config: GenerationConfig) -> bool:
    """Whether `--quantize int8` and `int4` would work for this model on a CPU."""
    from stream_generator.loading.graph_build import layer_shape

    try:
        require_batchable(config, generation_config)
        layer_shape(config)
    except (NotBuildable, ValueError):
        return False
    return config.model_type in MODEL_TYPES


def choose_graph(
    found: LocatedModel,
    quantize: str,
    config: Any,
    generation_config: GenerationConfig,
    *,
    dtype: str,
    spread: bool,
) -> Path | None:
    """Return the directory of the step graph, built if necessary; None if the model must run dense.

    spread: whether `--device-map` places the model. Raises `CheckpointError` if the user asks for
    packed weights that the model or another option rules out, or if a weight is missing.
    """
    try:
        if spread:
            raise NotBuildable("--device-map spreads the model over devices")
        require_batchable(config, generation_config)
        if dtype in ("bfloat16", "float16"):
            from stream_generator.loading.graph_build import layer_shape

            layer_shape(config)  # raises if this model runs dense anyway
            raise CheckpointError(
                f"--dtype {dtype} does not work with packed weights on a CPU, where all other "
                "values are float32; leave --dtype out, or give --quantize none"
            )
        return get_or_build_graph(found, config, BITS.get(quantize))
    except (NotBuildable, ValueError) as error:
        if quantize in BITS:
            raise CheckpointError(
                f"--quantize {quantize} works for the families {FAMILIES}, but not for this model "
                f"({error}); leave --quantize out"
            ) from error
        logger.warning("using dense weights, because this model cannot run packed: %s", error)
        return None
    except KeyError as error:
        raise CheckpointError(
            f"{found.name} lacks the weight {error.args[0]}; take all weight files and "
            "config.json from the same version of the model"
        ) from error
