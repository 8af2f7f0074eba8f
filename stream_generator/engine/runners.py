"""Choose the runner that fits a checkpoint and the free memory."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stream_generator.engine.runner import Runner
from stream_generator.errors import CheckpointError, first_line
from stream_generator.loaded_model import Checkpoint
from stream_generator.memory import slots_and_context
from stream_generator.model.saved_graph import SavedGraph, cannot_run

if TYPE_CHECKING:  # see the comment on imports below
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def runner_of(
    checkpoint: Checkpoint, *, max_concurrent: int | None = None, max_context: int | None = None
) -> Runner:
    """Create the runner of a checkpoint.

    max_concurrent: number of slots. max_context: tokens per slot. By default, both depend on the
    free memory. Raises `CheckpointError` if the slots do not fit into memory, or the graph cannot
    run.
    """
    limits = {"max_concurrent": max_concurrent, "max_context": max_context}
    if checkpoint.graph is None:
        return runner_for(checkpoint.model, checkpoint.context_length, **limits)
    return _graph_runner(checkpoint, checkpoint.graph, **limits)


# Each runner is imported where it is used. A graph does not need transformers' models, which take a
# second to import. A PyTorch model does not need ONNX Runtime.


def _graph_runner(
    checkpoint: Checkpoint, directory: Path, *, max_concurrent: int | None, max_context: int | None
) -> Runner:
    from stream_generator.engine.graph_runner import GraphRunner
    from stream_generator.engine.row_check import find_least_rows
    from stream_generator.model.graph_session import GraphFailed

    graph = SavedGraph.load(directory)
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
            logger.warning("on this processor, concurrent requests change the bits of a reply")
        return GraphRunner(graph, slots, context, least_rows=least_rows)
    except GraphFailed as error:
        raise cannot_run(directory, error) from error
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            f"the free memory does not hold the graph in {directory} ({first_line(error)}); use a "
            "machine with more memory, or a smaller model"
        ) from error


def runner_for(
    model: "PreTrainedModel",
    context_length: int,
    *,
    max_concurrent: int | None = None,
    max_context: int | None = None,
) -> Runner:
    """Create the runner of a PyTorch model.

    A model that does not fit the slot cache runs one request at a time. context_length: the model's
    limit, in tokens. `runner_of` documents the other parameters.
    """
    from stream_generator.engine.model_runner import ModelRunner
    from stream_generator.engine.slot_check import filled_cache
    from stream_generator.engine.solo_runner import SoloRunner
    from stream_generator.model.kv_cache import bytes_per_token
    from stream_generator.model.longrope import fix_frequencies

    context = min(context_length, max_context or context_length)
    # cuDNN's attention prepares itself for each new key length, and each step has a new length. A
    # step of 10 ms then takes 60 ms (docs/performance.md).
    torch.backends.cuda.enable_cudnn_sdp(False)
    fix_frequencies(model, context)
    try:
        filled = filled_cache(model)
    except Exception as error:  # a model of an unknown kind can raise any error
        logger.warning(
            "%s runs one request at a time: it does not fit the slot cache (%s)",
            type(model).__name__,
            error,
        )
        return SoloRunner(model, context)
    slots, context = slots_and_context(
        model.device, bytes_per_token(filled), context, max_concurrent, max_context
    )
    fix_frequencies(model, context)  # which may be shorter now
    return ModelRunner(model, filled, slots, context)


def reject_if_not_reproducible(runner: Runner) -> None:
    """Raise `CheckpointError` if concurrent requests can change the replies of this runner."""
    if not runner.reproducible:
        raise CheckpointError(
            "--reproducible needs packed weights on a CPU (see --quantize), and a processor on "
            "which concurrent requests do not change a reply; start without --reproducible"
        )
