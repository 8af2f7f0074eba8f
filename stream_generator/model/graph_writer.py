"""Writes the nodes of an ONNX graph, and its weights into a file beside it."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET, CONTRIB, IR = 21, "com.microsoft", 10
ALIGNMENT = 4096  # of each weight in the file, so that the file can be mapped to memory
SMALL_BYTES = 1024  # weights up to this size stay in the graph itself

Array = NDArray[Any]


class WeightStore:
    """The weights of several graphs, each stored once in a file beside them.

    A graph's own file must not exceed 2 GB.
    """

    def __init__(self, path: Path):
        self.path = path
        self._offsets: dict[bytes, int] = {}  # in the file, by a digest of the weight
        self._kept: dict[str, Any] = {}

    def keep(self, name: str, weight: torch.Tensor) -> Any:
        """The initializer for a weight. The first weight of a name is used for all."""
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
        """Where an array lies in the file. Equal arrays, such as a tied embedding and output
        matrix, are stored once."""
        digest = hashlib.blake2b(array.data, digest_size=32).digest()
        if digest not in self._offsets:
            with self.path.open("ab") as file:
                file.truncate(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
                self._offsets[digest] = file.seek(0, os.SEEK_END)
                array.tofile(file)
        return self._offsets[digest]


class GraphWriter:
    """Collects the nodes, inputs, outputs and weights of one graph."""

    def __init__(self, store: WeightStore):
        self._store = store
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def model(self) -> Any:
        """The graph as a `ModelProto`."""
        graph = helper.make_graph(
            self._nodes, "step", self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR)

    def result(self, value: str, name: str) -> None:
        """Make a value an output of the graph."""
        self.add("Identity", [value], [name])
        self._outputs.insert(0, helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def split(self, value: str, parts: int, sizes: list[int] | None = None) -> list[str]:
        """Split the last dimension, into equal parts or into parts of these sizes."""
        outputs = [f"{value}.{n}" for n in range(parts)]
        inputs = [value] if sizes is None else [value, self.numbers(f"{value}.sizes", sizes)]
        options: dict[str, Any] = {"num_outputs": parts} if sizes is None else {}
        self.add("Split", inputs, outputs, axis=-1, **options)
        return outputs

    def node(
        self, operator: str, inputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output, and return the output's name."""
        output = f"{operator}.{len(self._nodes)}"
        self.add(operator, inputs, [output], domain, **attributes)
        return output

    def add(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> None:
        """Add a node with named outputs."""
        self._nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))

    def input(self, name: str, kind: int, sizes: list[Any]) -> str:
        """Declare an input; names in `sizes` are dimensions that vary."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, sizes))
        return name

    def has_input(self, name: str) -> bool:
        return any(value.name == name for value in self._inputs)

    def output(self, name: str, sizes: list[Any]) -> None:
        """Declare a float output that a node already gives."""
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))

    def numbers(self, name: str, numbers: list[int]) -> str:
        """Store a constant list of integers, such as a shape."""
        key = f"numbers.{name}"
        self._initializers[key] = numpy_helper.from_array(numpy.array(numbers, numpy.int64), key)
        return key

    def weight(self, name: str, weight: torch.Tensor) -> str:
        """Store a weight, and return its name."""
        self._initializers[name] = self._store.keep(name, weight)
        return name
