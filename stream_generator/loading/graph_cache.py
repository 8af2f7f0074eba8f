"""Keeps the step graphs of models with packed weights."""

import sys
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedConfig

from stream_generator.loading.layout import Located, weights_in
from stream_generator.loading.weights import PackedOnTheWay, SafetensorsWeights
from stream_generator.model.packed_weight import Weights

BUILDER = 3  # raise it when graphs change, so that older ones are not used


def saved_graph(found: Located, config: PreTrainedConfig, bits: int | None) -> Path:
    """The directory of a model's graph, built where it is not kept yet.

    bits: of each weight that is not packed in the source; None: as the source has them, and eight
    for what it has in another format. Raises `NotBuildable` as `build_graph` does, and `KeyError`
    where the source lacks a weight.
    """

    def make(directory: Path) -> None:
        # Imported here: later starts do not need what writes graphs.
        from stream_generator.loading.graph_build import build_graph

        print(f"Building the graph of {found.name} for faster starts (once) ...", file=sys.stderr)
        stored: Weights
        if found.gguf:
            stored = found.gguf.weights()
        else:
            stored = SafetensorsWeights(weights_in(found.directory))
        build_graph(config, PackedOnTheWay(stored, bits or 8), directory)

    # The checks hold for the version of ONNX Runtime that has passed them.
    kind = f"graph-int{bits}" if bits else "graph"
    return found.cache().made(kind, (BUILDER, version("onnxruntime")), make)
