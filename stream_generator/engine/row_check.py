"""Find how to run a step graph so that concurrent requests do not change a request's bits."""

import torch

from stream_generator.engine.graph_runner import GraphRunner
from stream_generator.model.saved_graph import CHECK, SavedGraph

# Chunks of these sizes must give the same bits: the smallest, odd ones, and the largest.
CHUNK_SIZES = (2, 3, 33, 64, 512)


def find_least_rows(graph: SavedGraph, slots: int) -> int | None:
    """Find how many rows a forward must have so that no row's result depends on the other rows: 1,
    2 or `slots`.

    The check runs a graph with one layer of each kind. It tries every number of rows up to `slots`,
    and prompts in chunks of several sizes. Returns None if no number of rows helps.
    """
    longest = max(CHUNK_SIZES)
    runner = GraphRunner(graph, slots, context=longest + 1, file=CHECK)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(graph.vocabulary, (longest,), generator=generator).tolist()
    for least_rows in sorted({1, 2, slots}):
        runner.least_rows = least_rows
        if _chunks_agree(runner, ids) and _rows_agree(runner, ids):
            return least_rows
    return None


def _chunks_agree(runner: GraphRunner, ids: list[int]) -> bool:
    """Whether a prompt has the same logits in chunks of any size."""
    whole = runner.chunk(0, 0, ids, range(len(ids)))
    for size in CHUNK_SIZES[:-1]:
        parts = [runner.chunk(0, 0, ids[:size], range(size))]
        parts.append(runner.chunk(0, size, ids[size : 2 * size], range(size)))
        if not torch.equal(torch.cat(parts), whole[: 2 * size]):
            return False
    return True


def _rows_agree(runner: GraphRunner, ids: list[int]) -> bool:
    """Whether a request has the same logits beside any number of requests."""
    slots = list(range(runner.slots))
    lengths = [2 + slot for slot in slots]
    for slot, length in zip(slots, lengths, strict=True):
        runner.chunk(slot, 0, ids[:length])
    new = ids[: runner.slots]
    together = runner.step(slots, lengths, new)
    return all(
        torch.equal(runner.step(slots[first:], lengths[first:], new[first:]), together[first:])
        for first in slots[1:]
    )
