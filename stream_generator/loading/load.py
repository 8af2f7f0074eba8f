"""Loads a model from whatever people have of it."""

import logging
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from stream_generator.errors import CheckpointError, first_line
from stream_generator.loaded_model import Checkpoint, facts_of
from stream_generator.loading.cache import remove_old
from stream_generator.loading.graph_cache import saved_graph
from stream_generator.loading.layout import META, Located, could_not_load, locate
from stream_generator.loading.untrusted import refuse_pickle, refuse_unsafe
from stream_generator.model.config import refuse_what_rows_cannot_share
from stream_generator.model.packed_weight import (
    BITS,
    FAMILIES,
    MODEL_TYPES,
    NotBuildable,
    packed_size,
)
from stream_generator.model.saved_graph import SavedGraph
from stream_generator.text.chat import ChatFormat, MetaChatFormat

if TYPE_CHECKING:  # it takes a second to import, and what runs on a graph needs none
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def load_checkpoint(
    source: str | None = None,
    quantize: str = "auto",
    *,
    name: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Load a model from whatever people have of it; see `locate`. None: the demo model.

    quantize: "none", "int8", "int4", or "auto" for weights packed as the checkpoint has them.
    name: what it is called in answers. dtype: of dense weights, "bfloat16", "float16", "float32",
    or "auto" for bfloat16 where the device is fast at it or float32 does not fit, else float32.
    device: one to put it on; by default it is
    spread over all GPUs there are, else on the CPU. device_map: which part goes where, as
    transformers takes it: "auto", "balanced", "sequential", or devices by the names of modules.
    allow_pickle: read pickled weights where there are no others.

    Weights come from safetensors, GGUF or Meta's own files; of a pickle only plain tensors are
    read, and no code of the checkpoint is run.
    Raises `CheckpointError`, whose message says what to do.
    """
    if device is not None:
        _refuse_unusable(device)
    on_cpu = not torch.cuda.is_available() or device == "cpu"
    if device is None and device_map is None and not on_cpu:
        device_map = "auto"
    remove_old()
    try:
        found = locate(source, allow_pickle=allow_pickle)
        refuse_unsafe(found.directory)
        if not allow_pickle:
            refuse_pickle(found.directory)
    except (OSError, RuntimeError) as error:  # a place that must not be read or written, say
        raise CheckpointError(f"could not read {source}: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.directory, trust_remote_code=False)
        chat = MetaChatFormat(tokenizer) if found.layout == META else ChatFormat(tokenizer)
        chat.check_template()
        config = AutoConfig.from_pretrained(found.directory, trust_remote_code=False)
        generation_config = _generation_config(found.directory, config)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a foreign checkpoint makes transformers raise
        raise could_not_load(source, error) from error
    graph = None
    if on_cpu and _packs(found, quantize):
        spread = device_map is not None
        graph = _graph(found, quantize, config, generation_config, dtype=dtype, spread=spread)

    @cache
    def load() -> tuple["PreTrainedModel", int]:
        # Imported here: transformers' models take a second, and what runs on a graph needs none.
        from stream_generator.loading.transformers_model import ModelLoader

        packable = on_cpu and not graph and not device_map and _packable(config, generation_config)
        size = partial(packed_size, config) if packable else None
        loader = ModelLoader(found, source, size, dtype, device, device_map, on_cpu, allow_pickle)
        # On a CPU a transformers model is dense: packed weights run on the graph.
        return loader.load("none" if on_cpu else quantize)

    if graph is None:
        model, parameters = load()
        dtype_there, where = model.dtype, model.device
    else:
        dtype_there, where = torch.float32, torch.device("cpu")
        parameters = SavedGraph.load(graph).parameters
    return Checkpoint(
        **facts_of(config, generation_config, tokenizer),
        name=name or found.name,
        chat=chat,
        load_model=lambda: load()[0],
        dtype=dtype_there,
        device=where,
        parameters=parameters,
        layout=found.layout,
        graph=graph,
    )


def _refuse_unusable(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"--device {device} cannot be used here: {first_line(error)}; try cpu, or cuda with a "
            "PyTorch that has it"
        ) from error


def _packs(found: Located, quantize: str) -> bool:
    """Whether weights are to be packed, by what is asked for and what the source has."""
    gguf = found.gguf
    return quantize in BITS or (quantize == "auto" and gguf is not None and gguf.is_packed())


def _packable(config: Any, generation_config: GenerationConfig) -> bool:
    """Whether a model's weights could be packed on a CPU, as far as its shape tells."""
    from stream_generator.loading.graph_build import layer_shape

    try:
        refuse_what_rows_cannot_share(config, generation_config)
        layer_shape(config)
    except (NotBuildable, ValueError):
        return False
    return config.model_type in MODEL_TYPES


def _graph(
    found: Located,
    quantize: str,
    config: Any,
    generation_config: GenerationConfig,
    *,
    dtype: str,
    spread: bool,
) -> Path | None:
    """The directory of the step graph for packed weights; None where the model runs dense.

    Raises `CheckpointError` where the weights cannot be packed and that was asked for.
    """
    try:
        if spread:
            raise NotBuildable("it is spread by --device-map")
        refuse_what_rows_cannot_share(config, generation_config)
        if dtype in ("bfloat16", "float16"):
            from stream_generator.loading.graph_build import layer_shape

            layer_shape(config)  # a model of another shape runs dense
            raise CheckpointError(
                f"--dtype {dtype} and packed weights exclude each other on a CPU: they are "
                "multiplied as integers, and the rest is float32; leave --dtype out, or give "
                "--quantize none"
            )
        return saved_graph(found, config, BITS.get(quantize))
    except (NotBuildable, ValueError) as error:
        if quantize in BITS:
            raise CheckpointError(
                f"--quantize {quantize} packs models of the families {FAMILIES}, and this one "
                f"cannot be packed ({error}); leave --quantize out"
            ) from error
        logger.warning("the weights are made dense: %s", error)
        return None
    except KeyError as error:
        raise CheckpointError(
            f"{found.name} lacks 1 of its weights ({error.args[0]}); download it again"
        ) from error


def _generation_config(directory: Path, config: Any) -> GenerationConfig:
    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(config)
