"""Run many requests on a step graph, in the slots of one cache.

Concurrent requests do not change the bits of a request's logits, because of two rules: a forward
has at least `least_rows` rows, and no forward contains both a prompt and a decode.
"""

from collections.abc import Sequence as Items
from typing import Any

import torch

from stream_generator.model.graph_session import GraphSession, bind
from stream_generator.model.kv_cache import describe_slots, zeros
from stream_generator.model.saved_graph import STEP, SavedGraph
from stream_generator.request import Request
from stream_generator.sampling.sampler import Sampled, sample

LONG_CHUNK = 64  # ids; a forward of this length or more returns its memory to the system


class GraphRunner:
    """Runs requests together, each in its own slot of one cache, on a CPU."""

    keeps_prefixes = True
    has_logprobs = True
    smallest_chunk = 2  # a chunk of one id would run on the kernels of a decode

    def __init__(
        self,
        graph: SavedGraph,
        slots: int,
        context: int,
        *,
        file: str = STEP,
        least_rows: int | None = 2,
    ):
        """file: which graph of the directory to run. least_rows: result of `find_least_rows`."""
        self.slots = slots
        self.context_length = context
        self.reproducible = least_rows is not None
        self.least_rows = least_rows or 1
        self._graph = graph
        self._session = GraphSession(graph.directory / file)
        self._rotation = graph.rotation(context)
        shape = (slots, graph.key_heads, context, graph.size)
        names = [n for n in self._session.inputs if n.startswith(("keys.", "values."))]
        self._states = {name: zeros(shape, torch.float32) for name in names}
        self._bindings: dict[tuple[int, int], Any] = {}

    def describe(self) -> str:
        slots = describe_slots(self.slots, self.context_length, self._graph.bytes_per_token)
        return f"one ONNX graph runs {slots}"

    def prefill(self, request: Request, chunk: int) -> Sampled | None:
        start, end = request.num_computed_tokens, request.num_computed_tokens + chunk
        logits = self.chunk(request.slot or 0, start, request.prompt_ids[start:end])
        request.num_computed_tokens = end
        if request.num_uncomputed_tokens:
            return None
        return _sample_on_one_thread(logits, [request])[0]

    def decode(self, requests: list[Request]) -> list[Sampled]:
        logits = self.step(
            [r.slot or 0 for r in requests],
            [r.num_computed_tokens for r in requests],
            [r.output_ids[-1] for r in requests],
        )
        sampled = _sample_on_one_thread(logits, requests)
        for request in requests:
            request.num_computed_tokens += 1
        return sampled

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        for states in self._states.values():
            states[target, :, :length] = states[source, :, :length]

    def release(self, request: Request, *, sound: bool) -> None:
        """Do nothing, because a row never reads beyond its own positions."""

    def chunk(
        self, slot: int, start: int, ids: Items[int], wanted: Items[int] = (-1,)
    ) -> torch.Tensor:
        """Compute `ids` in a slot, from position `start` on.

        wanted: indices in `ids`. Returns the logits after these ids: float32 [wanted, vocabulary].
        """
        rows = torch.arange(max(len(ids), self.least_rows)).clamp_max(len(ids) - 1)
        return self._run(
            self._binding(slot, 1),
            ids=torch.tensor(ids)[rows],
            rows_by_slot=torch.arange(len(ids))[None],
            slot_by_row=torch.stack((torch.zeros_like(rows), rows), dim=1),
            lengths=[len(ids)],
            last_keys=[start + len(ids) - 1],
            wanted=[index % len(ids) for index in wanted],
        )

    def step(self, slots: Items[int], starts: Items[int], ids: Items[int]) -> torch.Tensor:
        """Compute one id in each of `slots`. starts: the position of the id in each slot.

        Returns the logits after each id: float32 [slots, vocabulary].
        """
        # The inputs describe all slots up to the highest. Attention skips slots of length 0.
        count = max(slots) + 1
        rows = torch.arange(max(len(slots), self.least_rows)).clamp_max(len(slots) - 1)
        chosen = torch.tensor(slots)
        rows_by_slot = torch.zeros(count, 1, dtype=torch.int64)
        lengths = torch.zeros(count, dtype=torch.int32)
        last_keys = torch.zeros(count, dtype=torch.int32)
        rows_by_slot[chosen, 0] = torch.arange(len(slots))
        lengths[chosen] = 1
        last_keys[chosen] = torch.tensor(starts, dtype=torch.int32)
        return self._run(
            self._binding(0, count),
            ids=torch.tensor(ids)[rows],
            rows_by_slot=rows_by_slot,
            slot_by_row=torch.stack((chosen[rows], torch.zeros_like(rows)), dim=1),
            lengths=lengths,
            last_keys=last_keys,
            wanted=list(range(len(slots))),
        )

    def _run(
        self,
        binding: Any,
        *,
        ids: torch.Tensor,
        rows_by_slot: torch.Tensor,
        slot_by_row: torch.Tensor,
        lengths: Any,
        last_keys: Any,
        wanted: list[int],
    ) -> torch.Tensor:
        """Run the graph; see `StepGraph` for its inputs."""
        ends = torch.as_tensor(last_keys, dtype=torch.int32)
        padding = [wanted[-1]] * (self.least_rows - len(wanted))
        inputs = {
            "ids": ids,
            "rows_by_slot": rows_by_slot,
            "slot_by_row": slot_by_row,
            "lengths": torch.as_tensor(lengths, dtype=torch.int32),
            "last_keys": ends,
            "total": ends.max() + 1,
            "wanted": torch.tensor(wanted + padding),
        }
        logits = torch.empty(len(wanted) + len(padding), self._graph.vocabulary)
        self._session.run(
            binding, inputs, {"logits": logits}, shrink=rows_by_slot.shape[1] >= LONG_CHUNK
        )
        return logits[: len(wanted)]

    def _binding(self, first: int, count: int) -> Any:
        """Bind the keys and values of `count` slots, from slot `first` on. Bindings are cached."""
        if (first, count) in self._bindings:
            return self._bindings[first, count]
        binding = self._bindings[first, count] = self._session.binding()
        states = {name: held[first : first + count] for name, held in self._states.items()}
        bind(binding, states | self._rotation, {f"new_{n}": held for n, held in states.items()})
        return binding


def _sample_on_one_thread(logits: torch.Tensor, requests: list[Request]) -> list[Sampled]:
    # With a second sampling thread, a step takes 1.2 to 1.4 times as long (docs/performance.md).
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return sample(logits, requests)
    finally:
        torch.set_num_threads(threads)
