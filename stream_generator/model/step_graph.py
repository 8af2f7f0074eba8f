"""A model's step as an ONNX graph: from ids, and the keys and values so far, to logits.

The graph computes what `FusedLayer` computes, with packed weights (see `StepGraph` for its inputs).
Operators: ONNX 21, and ONNX Runtime's MatMulNBits, GroupQueryAttention, GatherBlockQuantized and
SkipSimplifiedLayerNormalization.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from stream_generator.model.packed_weight import (
    NotBuildable,
    PackedWeight,
    Weights,
    same_format_runs,
)

OPSET, CONTRIB, IR = 21, "com.microsoft", 10
INT8_INPUTS = 4  # MatMulNBits' level of accuracy with kernels for AVX2, AVX-512 and ARM
ALIGNMENT = 4096  # of a weight in its file, so that the file can be mapped to memory
SMALL_BYTES = 1024  # a weight up to this size stays in the graph itself
QUERY_LENGTHS = 16  # the place of `query_seqlens` among GroupQueryAttention's inputs

Array = NDArray[Any]


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


class WeightStore:
    """The initializers of graphs, each kept once, in a file beside the graphs: a graph itself must
    not exceed 2 GB."""

    def __init__(self, path: Path):
        self.path = path
        self._offsets: dict[bytes, int] = {}  # in the file, by a digest of the weight
        self._kept: dict[str, Any] = {}

    def keep(self, name: str, weight: torch.Tensor) -> Any:
        """The initializer for a weight; a weight of this name that is kept already is the same."""
        if name in self._kept:
            return self._kept[name]
        kind = TensorProto.BFLOAT16 if weight.dtype is torch.bfloat16 else None
        weight = weight.contiguous()
        array = (weight.view(torch.int16) if kind else weight).numpy()
        kept = TensorProto(name=name, dims=array.shape)
        kept.data_type = kind or helper.np_dtype_to_tensor_dtype(array.dtype)
        if array.nbytes <= SMALL_BYTES:
            kept.raw_data = array.tobytes()
        else:
            offset, length = self._offset(array), array.nbytes
            facts = {"location": self.path.name, "offset": offset, "length": length}
            kept.data_location = TensorProto.EXTERNAL
            for key, value in facts.items():
                kept.external_data.add(key=key, value=str(value))
        self._kept[name] = kept
        return kept

    def _offset(self, array: Array) -> int:
        """Where an array is in the file. What two weights share is there once, such as the
        embedding and the output matrix."""
        digest = hashlib.blake2b(array.data, digest_size=32).digest()
        if digest not in self._offsets:
            with self.path.open("ab") as file:
                file.truncate(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
                self._offsets[digest] = file.seek(0, os.SEEK_END)
                array.tofile(file)
        return self._offsets[digest]


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
        self._weights, self._shape, self._store = weights, shape, store
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._block_sums: dict[str, str] = {}

    def embed(self) -> str:
        """Look up the embeddings of `ids`; returns the name of the states."""
        self._input("ids", TensorProto.INT64, ["rows"])
        name = "model.embed_tokens"
        packed = self._weights.packed(name)
        if packed is None:
            table = self._weight(f"{name}.weight", self._weights.dense(f"{name}.weight"))
            return self._node("Cast", [self._node("Gather", [table, "ids"])], to=TensorProto.FLOAT)
        stored = self._weight(f"{name}.values", packed.stored().flatten(1))
        scales = self._weight(f"{name}.scales", packed.scales)
        states = self._node(
            "GatherBlockQuantized", [stored, "ids", scales], CONTRIB,
            bits=packed.bits, block_size=packed.group, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if packed.zeros is None:
            return states
        zeros = self._node("Gather", [self._weight(f"{name}.zeros", packed.zeros), "ids"])
        spread = self._numbers("spread", [-1, packed.scales.shape[1], packed.group])
        grouped = self._node("Reshape", [states, spread])
        added = self._node(
            "Add", [grouped, self._node("Unsqueeze", [zeros, self._numbers("2", [2])])]
        )
        return self._node("Reshape", [added, self._numbers("flat", [-1, packed.values.shape[1]])])

    def norm(self, states: str, name: str) -> str:
        """RMSNorm with the weight of a module."""
        return self._node(
            "SimplifiedLayerNormalization", [states, self._float(f"{name}.weight")],
            axis=-1, epsilon=self._shape.epsilon,
        )  # fmt: skip

    def add_and_norm(self, new: str, states: str, name: str) -> tuple[str, str]:
        """Add to the states, and normalise the sum; returns the normalised and the sum."""
        outputs = [f"{name}.normed", "", "", f"{name}.sum"]
        self._add(
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
        if not self._has_input("place"):
            self._attention_inputs()
        qkv = self._linear(normed, [f"{name}.{part}_proj" for part in "qkv"])
        if shape.has_head_norms:
            parts = self._head_norms(qkv, name)
        else:
            parts = [self._node("Gather", [qkv, "place"], axis=0), "", ""]
        states: list[str] = []
        for kind in ("keys", "values"):
            sizes = ["slots", shape.key_heads, "context", shape.size]
            states.append(self._input(f"{kind}.{layer}", TensorProto.FLOAT, sizes))
            self._output(f"new_{kind}.{layer}", sizes)
        inputs = [*parts, *states, "last_keys", "total", "cosines", "sines"]
        inputs += [""] * (QUERY_LENGTHS - len(inputs)) + ["lengths"]
        attended = f"{name}.attended"
        self._add(
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
        return self._linear(self._node("GatherND", [attended, "back"]), [f"{name}.o_proj"])

    def mlp(self, normed: str, layer: int) -> str:
        """The gated MLP of a layer, to be added to the states."""
        name = f"model.layers.{layer}.mlp"
        both = self._linear(normed, [f"{name}.gate_proj", f"{name}.up_proj"])
        gate, up = self._split(both, 2)
        activated = self._node("QuickGelu", [gate], CONTRIB, alpha=1.0)  # x sigmoid(x): SiLU
        return self._linear(self._node("Mul", [activated, up]), [f"{name}.down_proj"])

    def layer(self, states: str, index: int) -> str:
        """A whole layer by itself; returns the new states."""
        name = f"model.layers.{index}"
        attended = self.attention(self.norm(states, f"{name}.input_layernorm"), index)
        normed, states = self.add_and_norm(attended, states, f"{name}.post_attention_layernorm")
        return self._node("Add", [self.mlp(normed, index), states])

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
        self._input("wanted", TensorProto.INT64, ["any"])
        self.result(self._linear(self._node("Gather", [normed, "wanted"]), ["lm_head"]), "logits")

    def states_input(self) -> str:
        """The states as an input, for a graph without `embed`."""
        return self._input("states", TensorProto.FLOAT, ["rows", self._shape.hidden])

    def result(self, value: str, name: str) -> None:
        """Make a value an output of the graph."""
        self._add("Identity", [value], [name])
        self._outputs.insert(0, helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def model(self) -> Any:
        """The graph as a `ModelProto`."""
        graph = helper.make_graph(
            self._nodes, "step", self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR)

    def _attention_inputs(self) -> None:
        self._input("place", TensorProto.INT64, ["slots", "length"])
        self._input("back", TensorProto.INT64, ["rows", 2])
        for name in ("lengths", "last_keys"):
            self._input(name, TensorProto.INT32, ["slots"])
        self._input("total", TensorProto.INT32, [])
        for name in ("cosines", "sines"):
            self._input(name, TensorProto.FLOAT, ["context", self._shape.size // 2])

    def _head_norms(self, qkv: str, name: str) -> list[str]:
        """Queries, keys and values apart, the first two normalised head by head."""
        shape = self._shape
        sizes = [n * shape.size for n in (shape.heads, shape.key_heads, shape.key_heads)]
        q, k, v = self._split(qkv, 3, sizes)
        by_head = self._numbers("by_head", [-1, shape.size])
        normed = []
        for part, width, norm in ((q, sizes[0], "q_norm"), (k, sizes[1], "k_norm")):
            heads = self.norm(self._node("Reshape", [part, by_head]), f"{name}.{norm}")
            normed.append(
                self._node("Reshape", [heads, self._numbers(f"{norm}.flat", [-1, width])])
            )
        return [self._node("Gather", [x, "place"], axis=0) for x in (*normed, v)]

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
        return self._node("Concat", outputs, axis=-1)

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
            self._weight(f"{name}.values", weight.stored()),
            self._weight(f"{name}.scales", weight.scales.flatten()),
        ]
        if (bias := self._bias(modules)) is not None:
            inputs += ["", "", self._weight(f"{name}.bias", bias)]
        y = self._node(
            "MatMulNBits", inputs, CONTRIB,
            K=ins, N=outs, bits=weight.bits, block_size=weight.group, accuracy_level=INT8_INPUTS,
        )  # fmt: skip
        if weight.zeros is None or not bool(weight.zeros.any()):
            return y
        zeros = self._weight(f"{name}.zeros", weight.zeros.T)
        return self._node("Gemm", [self._block_sum(x, ins, weight.group), zeros, y])

    def _bias(self, modules: list[str]) -> torch.Tensor | None:
        try:
            return torch.cat([self._weights.dense(f"{m}.bias").float() for m in modules])
        except KeyError:
            return None

    def _block_sum(self, x: str, ins: int, group: int) -> str:
        """The sums of each row's groups of inputs, once for all products with the same inputs."""
        key = f"{x}/{group}"
        if key not in self._block_sums:
            grouped = self._numbers(f"groups.{ins}.{group}", [-1, ins // group, group])
            blocks = self._node("Reshape", [x, grouped])
            last = self._numbers("last", [-1])
            self._block_sums[key] = self._node("ReduceSum", [blocks, last], keepdims=0)
        return self._block_sums[key]

    def _split(self, value: str, parts: int, sizes: list[int] | None = None) -> list[str]:
        outputs = [f"{value}.{n}" for n in range(parts)]
        inputs = [value] if sizes is None else [value, self._numbers(f"{value}.sizes", sizes)]
        options: dict[str, Any] = {"num_outputs": parts} if sizes is None else {}
        self._add("Split", inputs, outputs, axis=-1, **options)
        return outputs

    def _node(
        self, operator: str, inputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> str:
        output = f"{operator}.{len(self._nodes)}"
        self._add(operator, inputs, [output], domain, **attributes)
        return output

    def _add(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> None:
        self._nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))

    def _input(self, name: str, kind: int, sizes: list[Any]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, sizes))
        return name

    def _has_input(self, name: str) -> bool:
        return any(value.name == name for value in self._inputs)

    def _output(self, name: str, sizes: list[Any]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))

    def _float(self, parameter: str) -> str:
        return self._weight(parameter, self._weights.dense(parameter).float())

    def _numbers(self, name: str, numbers: list[int]) -> str:
        key = f"numbers.{name}"
        self._initializers[key] = numpy_helper.from_array(numpy.array(numbers, numpy.int64), key)
        return key

    def _weight(self, name: str, weight: torch.Tensor) -> str:
        self._initializers[name] = self._store.keep(name, weight)
        return name
