"""Find out how to run a step graph so that a request's bits do not depend on its neighbours."""

import torch

from stream_generator.engine.graph_runner import GraphRunner
from stream_generator.model.saved_graph import CHECK, SavedGraph

# Sizes of chunks that must give the same bits: the smallest, odd ones, and the largest.
CHUNKS = (2, 3, 33, 64, 512)


def find_least_rows(graph: SavedGraph, slots: int) -> int | None:
    """How many rows a forward needs, so that a row's bits do not depend on the others.

    Tries it, on a graph of one layer of each kind: for all numbers of rows up to `slots`, and for
    prompts in chunks of several sizes. None: the bits depend on the number of rows in any case.
    """
    longest = max(CHUNKS)
    runner = GraphRunner(graph, slots, context=longest + 1, file=CHECK)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(graph.vocabulary, (longest,), generator=generator).tolist()
    for least_rows in sorted({1, 2, slots}):
        runner.least_rows = least_rows
        if _chunks_agree(runner, ids) and _rows_agree(runner, ids):
            return least_rows
    return None


def _chunks_agree(runner: GraphRunner, ids: list[int]) -> bool:
    """Whether a prompt's logits do not depend on how it is cut into chunks."""
    whole = runner.chunk(0, 0, ids, range(len(ids)))
    for size in CHUNKS[:-1]:
        parts = [runner.chunk(0, 0, ids[:size], range(size))]
        parts.append(runner.chunk(0, size, ids[size : 2 * size], range(size)))
        if not torch.equal(torch.cat(parts), whole[: 2 * size]):
            return False
    return True


def _rows_agree(runner: GraphRunner, ids: list[int]) -> bool:
    """Whether a request's logits do not depend on how many others are computed beside it."""
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
