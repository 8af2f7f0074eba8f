"""A model's step as an ONNX graph: from ids, and the keys and values so far, to logits.

The graph computes what `FusedLayer` computes, with packed weights (see `StepGraph` for its inputs).
Operators: ONNX 21, and ONNX Runtime's MatMulNBits, GroupQueryAttention, GatherBlockQuantized and
SkipSimplifiedLayerNormalization.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from onnx import TensorProto

from stream_generator.model.graph_writer import CONTRIB, GraphWriter, WeightStore
from stream_generator.model.packed_weight import (
    NotBuildable,
    PackedWeight,
    Weights,
    same_format_runs,
)

INT8_INPUTS = 4  # MatMulNBits' level of accuracy with kernels for AVX2, AVX-512 and ARM
QUERY_LENGTHS = 16  # the place of `query_seqlens` among GroupQueryAttention's inputs


@dataclass(frozen=True)
class LayerShape:
    """What a model's layers have in common. windows: of each layer, how many positions it sees;
    None: all."""

    hidden: int
    heads: int
    key_heads: int
    size: int
    scale: float
    epsilon: float
    has_head_norms: bool
    windows: tuple[int | None, ...]


class StepGraph:
    """Builds the graph, one layer after the other. Rows are the tokens of all sequences, in a line.

    Inputs: `ids`, int64 [rows]. `place`, int64 [slots, length]: the row of each new token of each
    slot. `back`, int64 [rows, 2]: the slot and the place of each row. `lengths`, int32 [slots]: how
    many new tokens each slot has. `last_keys`, int32 [slots]: the position of the last one.
    `total`, int32: the longest slot's tokens, the new ones included. `cosines` and `sines`, float
    [context, head size / 2]. `keys.N` and `values.N`, float [slots, key heads, context, head size].
    `wanted`, int64 [any]: the rows whose logits are computed.
    Outputs: `logits`, float [any, vocabulary]; `new_keys.N` and `new_values.N`, which are to be
    bound to the memory of `keys.N` and `values.N`.
    """

    def __init__(self, weights: Weights, shape: LayerShape, store: WeightStore):
        self.writer = GraphWriter(store)
        self._weights, self._shape = weights, shape
        self._block_sums: dict[str, str] = {}

    def embed(self) -> str:
        """Look up the embeddings of `ids`; returns the name of the states."""
        self.writer.input("ids", TensorProto.INT64, ["rows"])
        name = "model.embed_tokens"
        packed = self._weights.packed(name)
        if packed is None:
            table = self.writer.weight(f"{name}.weight", self._weights.dense(f"{name}.weight"))
            return self.writer.node(
                "Cast", [self.writer.node("Gather", [table, "ids"])], to=TensorProto.FLOAT
            )
        stored = self.writer.weight(f"{name}.values", packed.stored().flatten(1))
        scales = self.writer.weight(f"{name}.scales", packed.scales)
        states = self.writer.node(
            "GatherBlockQuantized", [stored, "ids", scales], CONTRIB,
            bits=packed.bits, block_size=packed.group, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if packed.zeros is None:
            return states
        zeros = self.writer.node(
            "Gather", [self.writer.weight(f"{name}.zeros", packed.zeros), "ids"]
        )
        spread = self.writer.numbers("spread", [-1, packed.scales.shape[1], packed.group])
        grouped = self.writer.node("Reshape", [states, spread])
        added = self.writer.node(
            "Add", [grouped, self.writer.node("Unsqueeze", [zeros, self.writer.numbers("2", [2])])]
        )
        return self.writer.node(
            "Reshape", [added, self.writer.numbers("flat", [-1, packed.values.shape[1]])]
        )

    def norm(self, states: str, name: str) -> str:
        """RMSNorm with the weight of a module."""
        return self.writer.node(
            "SimplifiedLayerNormalization", [states, self._float(f"{name}.weight")],
            axis=-1, epsilon=self._shape.epsilon,
        )  # fmt: skip

    def add_and_norm(self, new: str, states: str, name: str) -> tuple[str, str]:
        """Add to the states, and normalise the sum; returns the normalised and the sum."""
        outputs = [f"{name}.normed", "", "", f"{name}.sum"]
        self.writer.add(
            "SkipSimplifiedLayerNormalization",
            [new, states, self._float(f"{name}.weight")],
            outputs,
            CONTRIB,
            epsilon=self._shape.epsilon,
        )
        return outputs[0], outputs[3]

    def attention(self, normed: str, layer: int) -> str:
        """The attention block of a layer, to be added to the states."""
        shape, name = self._shape, f"model.layers.{layer}.self_attn"
        if not self.writer.has_input("place"):
            self._attention_inputs()
        qkv = self._linear(normed, [f"{name}.{part}_proj" for part in "qkv"])
        if shape.has_head_norms:
            parts = self._head_norms(qkv, name)
        else:
            parts = [self.writer.node("Gather", [qkv, "place"], axis=0), "", ""]
        states: list[str] = []
        for kind in ("keys", "values"):
            sizes = ["slots", shape.key_heads, "context", shape.size]
            states.append(self.writer.input(f"{kind}.{layer}", TensorProto.FLOAT, sizes))
            self.writer.output(f"new_{kind}.{layer}", sizes)
        inputs = [*parts, *states, "last_keys", "total", "cosines", "sines"]
        inputs += [""] * (QUERY_LENGTHS - len(inputs)) + ["lengths"]
        attended = f"{name}.attended"
        self.writer.add(
            "GroupQueryAttention",
            inputs,
            [attended, f"new_keys.{layer}", f"new_values.{layer}"],
            CONTRIB,
            num_heads=shape.heads,
            kv_num_heads=shape.key_heads,
            scale=shape.scale,
            do_rotary=1,
            local_window_size=shape.windows[layer] or -1,
        )
        return self._linear(self.writer.node("GatherND", [attended, "back"]), [f"{name}.o_proj"])

    def mlp(self, normed: str, layer: int) -> str:
        """The gated MLP of a layer, to be added to the states."""
        name = f"model.layers.{layer}.mlp"
        both = self._linear(normed, [f"{name}.gate_proj", f"{name}.up_proj"])
        gate, up = self.writer.split(both, 2)
        activated = self.writer.node("QuickGelu", [gate], CONTRIB, alpha=1.0)  # x sigmoid(x): SiLU
        return self._linear(self.writer.node("Mul", [activated, up]), [f"{name}.down_proj"])

    def layer(self, states: str, index: int) -> str:
        """A whole layer by itself; returns the new states."""
        name = f"model.layers.{index}"
        attended = self.attention(self.norm(states, f"{name}.input_layernorm"), index)
        normed, states = self.add_and_norm(attended, states, f"{name}.post_attention_layernorm")
        return self.writer.node("Add", [self.mlp(normed, index), states])

    def layers(self, states: str, indices: Sequence[int]) -> str:
        """These layers and the norm after the last; returns the normalised states."""
        norms = [f"model.layers.{index}.input_layernorm" for index in indices] + ["model.norm"]
        normed = self.norm(states, norms[0])
        for index, norm in zip(indices, norms[1:], strict=True):
            after = f"model.layers.{index}.post_attention_layernorm"
            normed, states = self.add_and_norm(self.attention(normed, index), states, after)
            normed, states = self.add_and_norm(self.mlp(normed, index), states, norm)
        return normed

    def head(self, normed: str) -> None:
        """The logits of the rows that are wanted."""
        self.writer.input("wanted", TensorProto.INT64, ["any"])
        self.writer.result(
            self._linear(self.writer.node("Gather", [normed, "wanted"]), ["lm_head"]), "logits"
        )

    def states_input(self) -> str:
        """The states as an input, for a graph without `embed`."""
        return self.writer.input("states", TensorProto.FLOAT, ["rows", self._shape.hidden])

    def _attention_inputs(self) -> None:
        self.writer.input("place", TensorProto.INT64, ["slots", "length"])
        self.writer.input("back", TensorProto.INT64, ["rows", 2])
        for name in ("lengths", "last_keys"):
            self.writer.input(name, TensorProto.INT32, ["slots"])
        self.writer.input("total", TensorProto.INT32, [])
        for name in ("cosines", "sines"):
            self.writer.input(name, TensorProto.FLOAT, ["context", self._shape.size // 2])

    def _head_norms(self, qkv: str, name: str) -> list[str]:
        """Queries, keys and values apart, the first two normalised head by head."""
        shape = self._shape
        sizes = [n * shape.size for n in (shape.heads, shape.key_heads, shape.key_heads)]
        q, k, v = self.writer.split(qkv, 3, sizes)
        by_head = self.writer.numbers("by_head", [-1, shape.size])
        normed = []
        for part, width, norm in ((q, sizes[0], "q_norm"), (k, sizes[1], "k_norm")):
            heads = self.norm(self.writer.node("Reshape", [part, by_head]), f"{name}.{norm}")
            normed.append(
                self.writer.node(
                    "Reshape", [heads, self.writer.numbers(f"{norm}.flat", [-1, width])]
                )
            )
        return [self.writer.node("Gather", [x, "place"], axis=0) for x in (*normed, v)]

    def _linear(self, x: str, modules: list[str]) -> str:
        """The product with the weights of these modules side by side, which have the same inputs.

        A weight's zeros add (sum of a group's inputs) * zero: a small product of its own.
        """
        weights = [self._packed(module) for module in modules]
        outputs, start = [], 0
        for run in same_format_runs(weights):
            names = modules[start : start + len(run)]
            start += len(run)
            outputs.append(self._product(x, PackedWeight.joined(run), names))
        if len(outputs) == 1:
            return outputs[0]
        return self.writer.node("Concat", outputs, axis=-1)

    def _packed(self, module: str) -> PackedWeight:
        packed = self._weights.packed(module)
        if packed is None:
            raise NotBuildable(f"{module} is not packed")
        return packed

    def _product(self, x: str, weight: PackedWeight, modules: list[str]) -> str:
        name = modules[0]
        outs, ins = weight.values.shape
        inputs = [
            x,
            self.writer.weight(f"{name}.values", weight.stored()),
            self.writer.weight(f"{name}.scales", weight.scales.flatten()),
        ]
        if (bias := self._bias(modules)) is not None:
            inputs += ["", "", self.writer.weight(f"{name}.bias", bias)]
        y = self.writer.node(
            "MatMulNBits", inputs, CONTRIB,
            K=ins, N=outs, bits=weight.bits, block_size=weight.group, accuracy_level=INT8_INPUTS,
        )  # fmt: skip
        if weight.zeros is None or not bool(weight.zeros.any()):
            return y
        zeros = self.writer.weight(f"{name}.zeros", weight.zeros.T)
        return self.writer.node("Gemm", [self._block_sum(x, ins, weight.group), zeros, y])

    def _bias(self, modules: list[str]) -> torch.Tensor | None:
        try:
            return torch.cat([self._weights.dense(f"{m}.bias").float() for m in modules])
        except KeyError:
            return None

    def _block_sum(self, x: str, ins: int, group: int) -> str:
        """The sums of each row's groups of inputs, once for all products with the same inputs."""
        key = f"{x}/{group}"
        if key not in self._block_sums:
            grouped = self.writer.numbers(f"groups.{ins}.{group}", [-1, ins // group, group])
            blocks = self.writer.node("Reshape", [x, grouped])
            last = self.writer.numbers("last", [-1])
            self._block_sums[key] = self.writer.node("ReduceSum", [blocks, last], keepdims=0)
        return self._block_sums[key]

    def _float(self, parameter: str) -> str:
        return self.writer.weight(parameter, self._weights.dense(parameter).float())
