"""Captured decode steps give the logits of the steps that Python starts."""

import random
from types import SimpleNamespace

import pytest
import torch
from support.models import build
from transformers import PreTrainedModel

from stream_generator.engine.model_runner import ModelRunner
from stream_generator.engine.runners import runner_for
from stream_generator.model.captured_steps import SHORTEST_KEYS, tokens_of
from stream_generator.model.fused import fuse
from stream_generator.model.kv_cache import SlotLayer

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need an NVIDIA GPU")
FUSED = ["llama", "mistral", "qwen2", "qwen3"]


def test_a_token_of_a_slot_is_where_attention_looks_for_it() -> None:
    layer = SlotLayer(3, 5, (torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)))
    layer.store.copy_(torch.arange(layer.store.numel()).view_as(layer.store))
    for states in (layer.keys, layer.values):
        tokens = tokens_of(states)
        for slot in range(3):
            first = slot * layer.store.shape[1] * 5
            assert torch.equal(tokens[first : first + 5], states[slot].transpose(0, 1))


def half_precision(name: str, context: int = 256) -> PreTrainedModel:
    model = build(name, max_position_embeddings=context).to(torch.bfloat16)
    assert fuse(model)
    return model


def runners(name: str, slots: int, context: int = 256) -> tuple[ModelRunner, ModelRunner]:
    """A runner with captured steps, and one whose steps Python starts, with equal caches."""
    model = half_precision(name, context)
    pair = [runner_for(model, context, max_concurrent=slots) for _ in range(2)]
    captured, plain = pair
    assert isinstance(captured, ModelRunner)
    assert isinstance(plain, ModelRunner)
    assert captured.captured_steps is not None
    plain.captured_steps = None
    torch.manual_seed(0)
    for ours, theirs in zip(captured.cache.layers, plain.cache.layers, strict=True):
        ours.store.normal_()
        theirs.store.copy_(ours.store)
    return captured, plain


def rows_at(positions: dict[int, int]) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(slot=slot, num_computed_tokens=position)
        for slot, position in positions.items()
    ]


@ON_A_GPU
@pytest.mark.parametrize("name", FUSED)
def test_captured_steps_give_the_logits_of_plain_steps(name: str) -> None:
    captured, plain = runners(name, slots=7)
    rng = random.Random(0)
    for count in (1, 2, 3, 5, 7, 3, 1):  # graphs are captured, filled up, and used again
        slots = sorted(rng.sample(range(7), count))
        rows = rows_at({slot: rng.randrange(256) for slot in slots})
        ids = [[rng.randrange(256)] for _ in slots]
        ours, expected = captured.forward(rows, ids), plain.forward(rows, ids)
        assert ours.shape == expected.shape
        assert float((ours - expected).std() / expected.std()) < 0.05


@ON_A_GPU
def test_a_captured_step_writes_to_its_own_positions_alone() -> None:
    captured, _ = runners("llama", slots=6)
    before = [layer.store.clone() for layer in captured.cache.layers]
    written = {1: 3, 2: 255, 4: 0}
    captured.forward(rows_at(written), [[7], [8], [9]])
    for old, layer in zip(before, captured.cache.layers, strict=True):
        changed = (old != layer.store).any(dim=3).any(dim=1)  # [slots, context]
        assert {tuple(place) for place in changed.nonzero().tolist()} == set(written.items())


@ON_A_GPU
def test_a_long_row_gets_a_graph_for_long_keys() -> None:
    context = 4 * SHORTEST_KEYS
    captured, plain = runners("llama", slots=2, context=context)
    for position in (5, SHORTEST_KEYS - 1, SHORTEST_KEYS, context - 1, 6):
        rows = rows_at({0: 2, 1: position})
        ours, expected = captured.forward(rows, [[3], [4]]), plain.forward(rows, [[3], [4]])
        assert float((ours - expected).std() / expected.std()) < 0.05


@ON_A_GPU
def test_steps_run_on_without_graphs_when_memory_is_short(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, plain = runners("llama", slots=2)

    def no_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph", no_memory)
    captured.captured_steps.graphs.clear()  # type: ignore[union-attr]
    ours = captured.forward(rows_at({0: 2}), [[3]])
    assert torch.equal(ours, plain.forward(rows_at({0: 2}), [[3]]))
    assert "memory is short" in caplog.text
