"""Caches the step graphs of models with packed weights."""

import sys
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedConfig

from stream_generator.loading.gguf.file import CONVERSION
from stream_generator.loading.layout import LocatedModel, weights_in
from stream_generator.loading.weight_names import check_names
from stream_generator.loading.weights import HEAD, PackedOnRead, SafetensorsWeights
from stream_generator.model.packed_weight import NotBuildable, Weights

BUILDER = 3  # raise this when graphs change, so that cached ones are built again


def get_or_build_graph(found: LocatedModel, config: PreTrainedConfig, bits: int | None) -> Path:
    """Return the directory of a model's step graph. Builds the graph if the cache lacks it.

    bits: for weights that the source has not packed; None means eight. Raises `NotBuildable` as
    `build_graph` does, and `KeyError` if the source lacks a weight.
    """

    def make(directory: Path) -> None:
        # Imported here, because later starts do not build the graph.
        from stream_generator.loading.graph_build import build_graph, parameter_names

        print(f"Building the graph of {found.name} for faster starts (once) ...", file=sys.stderr)
        stored: Weights
        if found.gguf:
            stored = found.gguf.weights()
        else:
            files = weights_in(found.directory)
            if any(file.suffix != ".safetensors" for file in files):
                raise NotBuildable("its weights are pickled, and not in safetensors")
            tied = bool(config.tie_word_embeddings)
            stored = SafetensorsWeights(files, tied=tied)
            expected = parameter_names(config)
            missing = expected - stored.names - ({f"{HEAD}.weight"} if tied else set())
            check_names(found.origin, missing, stored.names - expected)
        build_graph(config, PackedOnRead(stored, bits or 8), directory)

    # The checks in `build_graph` are valid for one version of ONNX Runtime. The graph of a GGUF
    # depends on how its configuration is read.
    kind = f"graph-int{bits}" if bits else "graph"
    conversion = CONVERSION if found.gguf else None
    return found.cache().get(kind, (BUILDER, version("onnxruntime"), conversion), make)
