"""`load_checkpoint`: loads a model from any source, in five steps."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoConfig, GenerationConfig

from stream_generator.errors import CheckpointError, first_line
from stream_generator.loaded_model import Checkpoint, facts_of
from stream_generator.loading.cache import remove_old
from stream_generator.loading.diagnosis import reject_cut_off, reject_other_kind
from stream_generator.loading.graph_choice import choose_graph, could_pack, wants_packed
from stream_generator.loading.layout import (
    DEMO,
    META,
    LocatedModel,
    could_not_load,
    locate,
    weights_in,
)
from stream_generator.loading.tidy import template_source, tidy
from stream_generator.loading.tokenizer_files import load_tokenizer
from stream_generator.loading.untrusted import reject_pickle, reject_unsafe
from stream_generator.model.packed_weight import packed_size
from stream_generator.model.saved_graph import SavedGraph
from stream_generator.text.chat import ChatFormat, MetaChatFormat

if TYPE_CHECKING:  # the import takes a second, and step graphs work without it
    from transformers import PreTrainedModel


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
    """Load a model. See `locate` for what `source` may be; None is the demo model.

    quantize: "none", "int8", "int4", or "auto", which keeps weights packed as the file has them.
    name: the model's name in answers. dtype: of dense weights, "bfloat16", "float16", "float32",
    or "auto": bfloat16 if the device is fast at it or float32 does not fit, else float32.
    device: by default all GPUs, or the CPU if there is no GPU. device_map: how to spread the model
    over devices, as in transformers: "auto", "balanced", "sequential", or devices by module name.
    allow_pickle: load pickled weights if there are no others.

    Loads safetensors, GGUF and Meta's own files. Reads only plain tensors from pickles, and runs no
    code of the checkpoint. Raises `CheckpointError`, whose message says what to do.
    """
    # 1. Choose the device.
    if device is not None:
        _reject_unusable_device(device)
    on_cpu = not torch.cuda.is_available() or device == "cpu"
    if device is None and device_map is None and not on_cpu:
        device_map = "auto"

    # 2. Find the files. Reject unsafe ones before anything else reads them.
    remove_old()
    found = _find(source, allow_pickle=allow_pickle)

    # 3. Read the tokenizer and the configuration.
    parts = _read_parts(found, source)

    # 4. Get the step graph, if packed weights run on the CPU.
    graph = None
    if on_cpu and wants_packed(found, quantize):
        spread = device_map is not None
        configs = parts.config, parts.generation_config
        graph = choose_graph(found, quantize, *configs, dtype=dtype, spread=spread)

    # 5. Load the transformers model; with a graph, only when `Checkpoint.model` is read.
    @cache
    def load() -> tuple["PreTrainedModel", int]:
        from stream_generator.loading.transformers_model import ModelLoader

        packable = on_cpu and not graph and not device_map
        packable = packable and could_pack(parts.config, parts.generation_config)
        size = partial(packed_size, parts.config) if packable else None
        loader = ModelLoader(found, source, size, dtype, device, device_map, on_cpu, allow_pickle)
        # On a CPU, packed weights run on the graph, and transformers models are dense.
        return loader.load("none" if on_cpu else quantize)

    if graph is None:
        model, parameters = load()
        loaded_dtype, loaded_device = model.dtype, model.device
    else:
        loaded_dtype, loaded_device = torch.float32, torch.device("cpu")
        parameters = SavedGraph.load(graph).parameters
    return Checkpoint(
        **facts_of(parts.config, parts.generation_config, parts.tokenizer, parts.chat),
        name=name or found.name,
        load_model=lambda: load()[0],
        dtype=loaded_dtype,
        device=loaded_device,
        parameters=parameters,
        layout=found.layout,
        graph=graph,
    )


class _Parts(NamedTuple):
    """The parts of a checkpoint except its weights."""

    tokenizer: Any
    chat: ChatFormat
    config: Any
    generation_config: GenerationConfig


def _find(source: str | None, *, allow_pickle: bool) -> LocatedModel:
    try:
        found = locate(source, allow_pickle=allow_pickle)
        reject_unsafe(found.directory)
        if not allow_pickle:
            reject_pickle(found.directory)
        if found.gguf is None:
            found = replace(found, directory=tidy(found.directory), source=found.directory)
            for file in weights_in(found.directory):
                reject_cut_off(file)
    except (OSError, RuntimeError) as error:  # such as missing permissions
        raise CheckpointError(
            f"could not read {source or DEMO}: {error}; check the path and its permissions"
        ) from error
    return found


def _read_parts(found: LocatedModel, source: str | None) -> _Parts:
    try:
        config = AutoConfig.from_pretrained(found.directory, trust_remote_code=False)
        reject_other_kind(found.origin, config)
        tokenizer = load_tokenizer(found.directory, found.origin)
        chat = _chat_format(found, tokenizer)
        chat.check_template()
        return _Parts(tokenizer, chat, config, _generation_config(found.directory, config))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged checkpoint can make transformers raise anything
        raise could_not_load(source, error) from error


def _reject_unusable_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"--device {device} cannot be used here: {first_line(error)}; use cpu, or install a "
            "PyTorch build that supports this device"
        ) from error


def _chat_format(found: LocatedModel, tokenizer: Any) -> ChatFormat:
    if found.layout == META:
        return MetaChatFormat(tokenizer)
    if found.gguf is not None:
        return ChatFormat(tokenizer, "the GGUF file's metadata")
    return ChatFormat(tokenizer, template_source(found.origin))


def _generation_config(directory: Path, config: Any) -> GenerationConfig:
    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(config)
