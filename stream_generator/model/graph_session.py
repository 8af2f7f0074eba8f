"""Sessions of ONNX Runtime, which run graphs on torch tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import torch

_DTYPES = {torch.float32: numpy.float32, torch.int64: numpy.int64, torch.int32: numpy.int32}
# Threads spin while they wait for the next operation, but for at most 50 microseconds and not
# between steps, because other threads need the cores (docs/performance.md, "The graph").
_SPINNING = {"session.intra_op.spin_duration_us": "50", "session.force_spinning_stop": "1"}
_OUT_OF_MEMORY = ("bad allocation", "bad_alloc", "failed to allocate")


class GraphFailed(RuntimeError):
    """ONNX Runtime cannot load or run a graph."""


class GraphSession:
    """A loaded graph. It does not copy its input and output tensors, nor keep them alive."""

    def __init__(self, graph: Path):
        """graph: an ONNX file. The session uses as many threads as torch. Raises as `run` does."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # no logs: errors are raised, and the engine logs them
        options.intra_op_num_threads = torch.get_num_threads()
        for name, value in _SPINNING.items():
            options.add_session_config_entry(name, value)
        with _errors():
            self._session: Any = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )

    @property
    def inputs(self) -> list[str]:
        """The names of the graph's inputs."""
        return [value.name for value in self._session.get_inputs()]

    def binding(self) -> Any:
        """Create an empty set of bound tensors, which many calls of `run` can use."""
        return self._session.io_binding()

    def run_once(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the graph on inputs by name; return its first output. Raises as `run` does."""
        with _errors():
            outputs = self._session.run(None, {name: x.numpy() for name, x in inputs.items()})
        return torch.from_numpy(outputs[0])

    def run(
        self, binding: Any, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor],
        *, shrink: bool = False,
    ) -> None:  # fmt: skip
        """Bind more tensors by name, and run the graph on all tensors of the binding.

        inputs, outputs: see `bind`. shrink: return unused memory to the system afterwards.
        Raises `torch.OutOfMemoryError`, and `GraphFailed` for any other failure.
        """
        bind(binding, inputs, outputs)
        options = onnxruntime.RunOptions()
        if shrink:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        with _errors():
            self._session.run_with_iobinding(binding, options)


@contextmanager
def _errors() -> Iterator[None]:
    """Convert ONNX Runtime's errors, which share no class, to those that `run` raises."""
    try:
        yield
    except Exception as error:
        if any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(str(error)) from error
        raise GraphFailed(str(error)) from error


def bind(
    binding: Any, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> None:
    """Bind contiguous tensors by their addresses. They must live as long as the binding."""
    for bind_one, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            dtype = _DTYPES[tensor.dtype]
            bind_one(name, "cpu", 0, dtype, tuple(tensor.shape), tensor.data_ptr())
