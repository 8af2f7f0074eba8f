"""Finds the runner that fits a checkpoint and the memory there is."""

import logging

import torch

from stream_generator.engine.runner import Runner
from stream_generator.errors import CheckpointError, first_line
from stream_generator.loaded_model import Checkpoint
from stream_generator.memory import slots_and_context
from stream_generator.model.saved_graph import SavedGraph, cannot_run

logger = logging.getLogger(__name__)


def runner_of(
    checkpoint: Checkpoint, *, max_concurrent: int | None = None, max_context: int | None = None
) -> Runner:
    """The runner of a checkpoint's step graph, or of its model.

    What is not given follows from the memory there is. Raises `CheckpointError` if the memory that
    is asked for is not there.
    """
    # Each is imported where it is used: a graph needs none of transformers' models, which take a
    # second, and without a graph ONNX Runtime need not be there.
    if checkpoint.graph is None:
        from stream_generator.engine.model_runner import runner_for

        return runner_for(
            checkpoint.model,
            checkpoint.context_length,
            max_concurrent=max_concurrent,
            max_context=max_context,
        )
    from stream_generator.engine.graph_runner import GraphRunner, find_least_rows
    from stream_generator.model.graph_session import GraphFailed

    graph = SavedGraph.load(checkpoint.graph)
    slots, context = slots_and_context(
        torch.device("cpu"),
        graph.bytes_per_token,
        min(checkpoint.context_length, max_context or checkpoint.context_length),
        max_concurrent,
        max_context,
    )
    try:
        least_rows = find_least_rows(graph, slots)
        if least_rows is None:
            logger.warning(
                "on this processor the bits of a reply depend on the requests that run beside it"
            )
        return GraphRunner(graph, slots, context, least_rows=least_rows)
    except GraphFailed as error:
        raise cannot_run(checkpoint.graph, error) from error
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            f"the memory that is free does not hold the graph in {checkpoint.graph} "
            f"({first_line(error)}); use a machine with more memory, or a smaller model"
        ) from error


def refuse_if_not_reproducible(runner: Runner) -> None:
    """Raise `CheckpointError` if a runner's replies depend on others that run beside them."""
    if not runner.reproducible:
        raise CheckpointError(
            "--reproducible cannot be kept here: it needs packed weights on a CPU (see "
            "--quantize), and a processor whose kernels compute each request by itself"
        )
