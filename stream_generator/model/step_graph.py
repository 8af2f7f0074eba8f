"""A model's step as an ONNX graph: from ids and the KV cache to logits.

The graph computes the same layers as `FusedLayer`, but with packed weights. Its operators are those
of ONNX opset 21, and ONNX Runtime's MatMulNBits, GroupQueryAttention, GatherBlockQuantized,
QuickGelu and SkipSimplifiedLayerNormalization.
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

INT8_INPUTS = 4  # accuracy_level of MatMulNBits that has kernels for AVX2, AVX-512 and ARM
QUERY_LENGTHS = 16  # index of the input `query_seqlens` of GroupQueryAttention


@dataclass(frozen=True)
class LayerShape:
    """The dimensions of a model's layers.

    size: of a head. scale: of the attention scores. epsilon: of the norms.
    windows: the number of positions that each layer sees; None for all.
    """

    hidden: int
    heads: int
    key_heads: int
    size: int
    scale: float
    epsilon: float
    has_head_norms: bool
    windows: tuple[int | None, ...]


class StepGraph:
    """Builds the graph, one layer after the other. Here, a row is one new token of one slot.

    Methods take and return names of values in the graph. `states` are float [rows, hidden].

    Inputs:
        ids: int64 [rows]
        rows_by_slot: int64 [slots, length], the row of each new token of each slot
        slot_by_row: int64 [rows, 2], the indices of each row in `rows_by_slot`
        lengths: int32 [slots], the number of new tokens of each slot
        last_keys: int32 [slots], the position of the last new token of each slot
        total: int32, the number of tokens in the longest slot, new tokens included
        cosines, sines: float [context, head size / 2]
        keys.N, values.N: float [slots, key heads, context, head size]
        wanted: int64 [any], the rows whose logits are computed
    Outputs:
        logits: float [any, vocabulary]
        new_keys.N, new_values.N: bind them to the memory of keys.N and values.N
    """

    def __init__(self, weights: Weights, shape: LayerShape, store: WeightStore):
        self.writer = GraphWriter(store)
        self._weights, self._shape = weights, shape
        self._block_sums: dict[str, str] = {}

    def embed(self) -> str:
        """Look up the embeddings of `ids`; return the states."""
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
        """Apply RMSNorm with the weight of the module `name`."""
        return self.writer.node(
            "SimplifiedLayerNormalization", [states, self._float(f"{name}.weight")],
            axis=-1, epsilon=self._shape.epsilon,
        )  # fmt: skip

    def add_and_norm(self, new: str, states: str, name: str) -> tuple[str, str]:
        """Add `new` to the states; return the normalised sum and the sum."""
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
        """Compute what a layer's attention adds to the states."""
        shape, name = self._shape, f"model.layers.{layer}.self_attn"
        if not self.writer.has_input("rows_by_slot"):
            self._attention_inputs()
        qkv = self._linear(normed, [f"{name}.{part}_proj" for part in "qkv"])
        if shape.has_head_norms:
            parts = self._head_norms(qkv, name)
        else:
            parts = [self.writer.node("Gather", [qkv, "rows_by_slot"], axis=0), "", ""]
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
        return self._linear(
            self.writer.node("GatherND", [attended, "slot_by_row"]), [f"{name}.o_proj"]
        )

    def mlp(self, normed: str, layer: int) -> str:
        """Compute what a layer's gated MLP adds to the states."""
        name = f"model.layers.{layer}.mlp"
        both = self._linear(normed, [f"{name}.gate_proj", f"{name}.up_proj"])
        gate, up = self.writer.split(both, 2)
        activated = self.writer.node("QuickGelu", [gate], CONTRIB, alpha=1.0)  # SiLU: x sigmoid(x)
        return self._linear(self.writer.node("Mul", [activated, up]), [f"{name}.down_proj"])

    def layer(self, states: str, index: int) -> str:
        """Compute one whole layer; return the new states."""
        name = f"model.layers.{index}"
        attended = self.attention(self.norm(states, f"{name}.input_layernorm"), index)
        normed, states = self.add_and_norm(attended, states, f"{name}.post_attention_layernorm")
        return self.writer.node("Add", [self.mlp(normed, index), states])

    def layers(self, states: str, indices: Sequence[int]) -> str:
        """Compute these layers and the model's last norm; return the normalised states."""
        norms = [f"model.layers.{index}.input_layernorm" for index in indices] + ["model.norm"]
        normed = self.norm(states, norms[0])
        for index, norm in zip(indices, norms[1:], strict=True):
            after = f"model.layers.{index}.post_attention_layernorm"
            normed, states = self.add_and_norm(self.attention(normed, index), states, after)
            normed, states = self.add_and_norm(self.mlp(normed, index), states, norm)
        return normed

    def head(self, normed: str) -> None:
        """Compute the logits of the rows in `wanted`, as an output of the graph."""
        self.writer.input("wanted", TensorProto.INT64, ["any"])
        self.writer.result(
            self._linear(self.writer.node("Gather", [normed, "wanted"]), ["lm_head"]), "logits"
        )

    def states_input(self) -> str:
        """Declare the states as an input, for a graph without `embed`."""
        return self.writer.input("states", TensorProto.FLOAT, ["rows", self._shape.hidden])

    def _attention_inputs(self) -> None:
        self.writer.input("rows_by_slot", TensorProto.INT64, ["slots", "length"])
        self.writer.input("slot_by_row", TensorProto.INT64, ["rows", 2])
        for name in ("lengths", "last_keys"):
            self.writer.input(name, TensorProto.INT32, ["slots"])
        self.writer.input("total", TensorProto.INT32, [])
        for name in ("cosines", "sines"):
            self.writer.input(name, TensorProto.FLOAT, ["context", self._shape.size // 2])

    def _head_norms(self, qkv: str, name: str) -> list[str]:
        """Split queries, keys and values; normalise each head of the queries and keys."""
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
        return [self.writer.node("Gather", [x, "rows_by_slot"], axis=0) for x in (*normed, v)]

    def _linear(self, x: str, modules: list[str]) -> str:
        """Multiply `x` by the concatenated weights of modules that have the same inputs."""
        weights = [self._packed(module) for module in modules]
        outputs, start = [], 0
        for run in same_format_runs(weights):
            names = modules[start : start + len(run)]
            start += len(run)
            outputs.append(self._product(x, PackedWeight.concatenate(run), names))
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
        # Each group adds (sum of its inputs) * zero.
        zeros = self.writer.weight(f"{name}.zeros", weight.zeros.T)
        return self.writer.node("Gemm", [self._block_sum(x, ins, weight.group), zeros, y])

    def _bias(self, modules: list[str]) -> torch.Tensor | None:
        try:
            return torch.cat([self._weights.dense(f"{m}.bias").float() for m in modules])
        except KeyError:
            return None

    def _block_sum(self, x: str, ins: int, group: int) -> str:
        """Sum each group of inputs. Products with the same inputs share these sums."""
        key = f"{x}/{group}"
        if key not in self._block_sums:
            grouped = self.writer.numbers(f"groups.{ins}.{group}", [-1, ins // group, group])
            blocks = self.writer.node("Reshape", [x, grouped])
            last = self.writer.numbers("last", [-1])
            self._block_sums[key] = self.writer.node("ReduceSum", [blocks, last], keepdims=0)
        return self._block_sums[key]

    def _float(self, parameter: str) -> str:
        return self.writer.weight(parameter, self._weights.dense(parameter).float())
