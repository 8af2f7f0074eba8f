"""Builds a model's step graph from its packed weights, and compares it with transformers."""

import json
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from stream_generator.model.config import attention_windows
from stream_generator.model.fused import NotFusible, check_parts, require_same
from stream_generator.model.graph_session import GraphFailed, GraphSession
from stream_generator.model.graph_writer import WeightStore
from stream_generator.model.kv_cache import CPU, SlotRows, masks
from stream_generator.model.packed_weight import NotBuildable, Weights
from stream_generator.model.saved_graph import CHECK, MANIFEST, STEP, WEIGHTS, rotation
from stream_generator.model.step_graph import LayerShape, StepGraph

# The largest difference, in standard deviations of the result, that rounding the inputs of products
# to eight bits may cause. A wrong rotation, order or scale causes many times as much.
TOLERANCE = 0.1
CHECK_TOKENS = 8
HEAD_SIZE_MULTIPLE = 16  # the attention operator takes only multiples of this head size


def build_graph(config: PreTrainedConfig, weights: Weights, directory: Path) -> None:
    """Write a model's step graph into a new directory; see `SavedGraph`.

    Compares each layer with transformers' own, with one layer in memory at a time. Raises
    `NotBuildable` if the layers are not like Llama's, or if a result differs.
    """
    model = _meta_model(config)
    shape = _shape_of(model, config)
    rotary = type(model.base_model.rotary_emb)(config)
    formats = []
    directory.mkdir()
    store = WeightStore(directory / WEIGHTS)
    try:
        _check_embedding_and_head(config, weights, shape, store)
        for index, layer in enumerate(model.base_model.layers):
            formats.append(_check_layer(layer, index, rotary, weights, shape, store))
            layer.to("meta")
    except (NotFusible, GraphFailed) as error:
        raise NotBuildable(str(error)) from error
    one_of_each = [formats.index(kind) for kind in dict.fromkeys(formats)]
    for file, layers in ((CHECK, one_of_each), (STEP, list(range(len(formats))))):
        graph = StepGraph(weights, shape, store)
        graph.head(graph.layers(graph.embed(), layers))
        onnx.save(graph.writer.model(), directory / file)
    manifest = {
        "layers": len(formats),
        "key_heads": shape.key_heads,
        "size": shape.size,
        "vocabulary": config.vocab_size,
        "parameters": model.num_parameters(),
        "frequencies": rotary.inv_freq.tolist(),
        "rotation_scale": float(rotary.attention_scaling),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))


def parameter_names(config: PreTrainedConfig) -> set[str]:
    """Return the names of all weights of a model."""
    return set(_meta_model(config).state_dict())


def layer_shape(config: PreTrainedConfig) -> LayerShape:
    """Return the shape of a model's layers. Raises `NotBuildable` if they are not like Llama's."""
    return _shape_of(_meta_model(config), config)


def _shape_of(model: Any, config: PreTrainedConfig) -> LayerShape:
    try:
        layers = list(model.base_model.layers)
        for layer in layers:
            check_parts(layer)
        windows = attention_windows(config)
        kinds = getattr(config, "layer_types", None) or [""] * len(layers)
        attention = layers[0].self_attn
        size = attention.head_dim
        if size % HEAD_SIZE_MULTIPLE:
            raise NotBuildable(f"its head size {size} is not a multiple of {HEAD_SIZE_MULTIPLE}")
        return LayerShape(
            hidden=config.hidden_size,
            heads=attention.q_proj.out_features // size,
            key_heads=attention.k_proj.out_features // size,
            size=size,
            scale=attention.scaling,
            epsilon=layers[0].input_layernorm.variance_epsilon,
            has_head_norms=hasattr(attention, "q_norm"),
            windows=tuple(windows[kind] for kind in kinds),
        )
    except (NotFusible, ValueError, AttributeError) as error:
        raise NotBuildable(str(error)) from error


@torch.inference_mode()
def _check_layer(
    layer: Any, index: int, rotary: Any, weights: Weights, shape: LayerShape, store: WeightStore
) -> tuple[object, ...]:
    """Compare a layer's graph with transformers' layer on random states; return weight formats.

    layer: on the device "meta"; it gets the weights here. rotary: transformers' rotary positions.
    """
    prefix = f"model.layers.{index}"
    parameters = {name: weights.dense(f"{prefix}.{name}").float() for name in layer.state_dict()}
    layer.load_state_dict(parameters, assign=True)
    states = torch.randn(CHECK_TOKENS, shape.hidden, generator=torch.Generator().manual_seed(index))
    positions = torch.arange(CHECK_TOKENS)[None]
    expected = layer(
        states[None],
        attention_mask=masks(
            SlotRows(slots=(0,), starts=(0,), length=CHECK_TOKENS),
            {"": shape.windows[index]},
            CPU,
            torch.float32,
        )[""],
        position_ids=positions,
        position_embeddings=rotary(states, positions),
    )
    graph = StepGraph(weights, shape, store)
    graph.writer.result(graph.layer(graph.states_input(), index), "result")
    empty = torch.zeros(1, shape.key_heads, CHECK_TOKENS, shape.size)
    indices = torch.arange(CHECK_TOKENS)
    result = _run(
        graph,
        store,
        states=states,
        rows_by_slot=indices[None],
        slot_by_row=torch.stack((torch.zeros_like(indices), indices), dim=1),
        lengths=torch.tensor([CHECK_TOKENS], dtype=torch.int32),
        last_keys=torch.tensor([CHECK_TOKENS - 1], dtype=torch.int32),
        total=torch.tensor(CHECK_TOKENS, dtype=torch.int32),
        **rotation(rotary.inv_freq, rotary.attention_scaling, CHECK_TOKENS),
        **{f"keys.{index}": empty, f"values.{index}": empty},
    )
    require_same(result - states, expected[0] - states, TOLERANCE, f"layer {index}")
    linears = [name for name, x in layer.named_modules() if isinstance(x, torch.nn.Linear)]
    return tuple(getattr(weights.packed(f"{prefix}.{name}"), "format", None) for name in linears)


@torch.inference_mode()
def _check_embedding_and_head(
    config: PreTrainedConfig, weights: Weights, shape: LayerShape, store: WeightStore
) -> None:
    """Compare a model without layers with transformers' own; some families scale embeddings."""
    bare = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 0, "layer_types": None})
    model = _meta_model(bare)
    parameters = {name: weights.dense(name).float() for name in model.state_dict()}
    model.load_state_dict(parameters, assign=True)
    model.base_model.rotary_emb = type(model.base_model.rotary_emb)(config)
    ids = torch.arange(CHECK_TOKENS)
    expected = model(input_ids=ids[None], use_cache=False).logits[0]
    graph = StepGraph(weights, shape, store)
    graph.head(graph.norm(graph.embed(), "model.norm"))
    result = _run(graph, store, ids=ids, wanted=ids)
    require_same(result, expected, TOLERANCE, "the model's embedding, norm and output matrix")


def _meta_model(config: PreTrainedConfig) -> Any:
    """Create a transformers model on the device "meta", without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def _run(graph: StepGraph, store: WeightStore, **inputs: torch.Tensor) -> torch.Tensor:
    """Run a graph once, with the weights in the store's file."""
    file = store.path.with_name("part.onnx")
    onnx.save(graph.writer.model(), file)
    try:
        return GraphSession(file).run_once(inputs)
    finally:
        file.unlink()
