"""Writes ONNX graphs, and their weights into a separate file."""

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
ALIGNMENT = 4096  # bytes to which weights in the file are aligned, so that they can be mapped
SMALL_BYTES = 1024  # weights up to this size are stored in the graph itself

Array = NDArray[Any]


class WeightStore:
    """Weights of several graphs in one file, because a graph's own file is limited to 2 GB."""

    def __init__(self, path: Path):
        self.path = path
        self._offsets: dict[bytes, int] = {}  # in the file, by the digest of a weight
        self._initializers: dict[str, Any] = {}

    def keep(self, name: str, weight: torch.Tensor) -> Any:
        """Store a weight under a name, and return its initializer.

        If the name is known, the weight that was stored first is used instead.
        """
        if name in self._initializers:
            return self._initializers[name]
        kind = TensorProto.BFLOAT16 if weight.dtype is torch.bfloat16 else None
        weight = weight.contiguous()
        array = (weight.view(torch.int16) if kind else weight).numpy()
        stored = TensorProto(name=name, dims=array.shape)
        stored.data_type = kind or helper.np_dtype_to_tensor_dtype(array.dtype)
        if array.nbytes <= SMALL_BYTES:
            stored.raw_data = array.tobytes()
        else:
            offset, length = self._offset(array), array.nbytes
            entries = {"location": self.path.name, "offset": offset, "length": length}
            stored.data_location = TensorProto.EXTERNAL
            for key, value in entries.items():
                stored.external_data.add(key=key, value=str(value))
        self._initializers[name] = stored
        return stored

    def _offset(self, array: Array) -> int:
        """Return the position of an array in the file, and append the array if it is new.

        Equal arrays are stored once, such as a tied embedding and output matrix.
        """
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
        """Make a value the first output of the graph, under `name`."""
        self.add("Identity", [value], [name])
        self._outputs.insert(0, helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def split(self, value: str, parts: int, sizes: list[int] | None = None) -> list[str]:
        """Split the last dimension into parts, equal or of these sizes; return their names."""
        outputs = [f"{value}.{n}" for n in range(parts)]
        inputs = [value] if sizes is None else [value, self.numbers(f"{value}.sizes", sizes)]
        options: dict[str, Any] = {"num_outputs": parts} if sizes is None else {}
        self.add("Split", inputs, outputs, axis=-1, **options)
        return outputs

    def node(
        self, operator: str, inputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output; return the output's name."""
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
        """Add a node whose outputs get the given names."""
        self._nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))

    def input(self, name: str, kind: int, sizes: list[Any]) -> str:
        """Declare an input of dtype `kind`; return its name. A string in `sizes` stands for a
        dimension of any size."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, sizes))
        return name

    def has_input(self, name: str) -> bool:
        return any(value.name == name for value in self._inputs)

    def output(self, name: str, sizes: list[Any]) -> None:
        """Declare a float output, which a node computes under this name."""
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))

    def numbers(self, name: str, numbers: list[int]) -> str:
        """Store a constant list of integers, such as a shape; return its name in the graph."""
        key = f"numbers.{name}"
        self._initializers[key] = numpy_helper.from_array(numpy.array(numbers, numpy.int64), key)
        return key

    def weight(self, name: str, weight: torch.Tensor) -> str:
        """Store a weight; return its name."""
        self._initializers[name] = self._store.keep(name, weight)
        return name
