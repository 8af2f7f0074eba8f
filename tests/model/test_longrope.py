"""The frequencies of longrope are chosen once, by the context, and not by the length of a text."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from support.models import COMMON
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

from stream_generator.engine.model_runner import ModelRunner
from stream_generator.engine.runners import runner_for
from stream_generator.model.longrope import fix_frequencies

ORIGINAL, CONTEXT = 24, 96  # tokens
SHORT, LONG = [1.0, 1.2, 1.5, 2.0], [2.0, 4.0, 8.0, 16.0]
CHUNK = 5  # not a divisor of `ORIGINAL`
assert_close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)


@dataclass
class Row:
    slot: int | None
    num_computed_tokens: int


def phi3(short: list[float] = SHORT, long: list[float] = LONG) -> PreTrainedModel:
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long,
        "attention_factor": 1.2, "original_max_position_embeddings": ORIGINAL,
        "partial_rotary_factor": 1.0,
    }  # fmt: skip
    changes = {"max_position_embeddings": CONTEXT, "rope_parameters": rope}
    config = Phi3Config(**COMMON | changes, original_max_position_embeddings=ORIGINAL)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


@torch.inference_mode()
def plain(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """The logits after `ids` by transformers, in one forward."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


def in_chunks(runner: ModelRunner, slot: int, ids: list[int]) -> torch.Tensor:
    """The logits after `ids` in a slot, computed in chunks and then token by token."""
    row, logits = Row(slot, 0), torch.empty(0)
    bounds = [*range(0, len(ids) - 4, CHUNK), *range(len(ids) - 4, len(ids) + 1)]
    for start, end in pairwise(bounds):
        logits = runner.forward([row], [ids[start:end]])[0]
        row.num_computed_tokens = end
    return logits


@pytest.mark.parametrize("length", [8, ORIGINAL - 1, ORIGINAL])
def test_a_context_up_to_the_original_one_has_the_short_factors(length: int) -> None:
    runner = runner_for(phi3(), CONTEXT, max_concurrent=2, max_context=ORIGINAL)
    assert isinstance(runner, ModelRunner)
    ids = [n % 250 for n in range(7, 7 + length)]
    assert_close(in_chunks(runner, 1, ids), plain(phi3(), ids))


@pytest.mark.parametrize("length", [8, ORIGINAL, ORIGINAL + 1, ORIGINAL + 9, CONTEXT])
def test_a_longer_context_has_the_long_factors_at_each_length(length: int) -> None:
    runner = runner_for(phi3(), CONTEXT, max_concurrent=2)
    assert isinstance(runner, ModelRunner)
    ids = [n % 250 for n in range(7, 7 + length)]
    # transformers itself takes the long factors only for texts that are longer.
    model = phi3() if length > ORIGINAL else phi3(short=LONG)
    assert_close(in_chunks(runner, 1, ids), plain(model, ids))


def test_a_long_request_does_not_change_a_short_one_beside_it() -> None:
    runner = runner_for(phi3(), CONTEXT, max_concurrent=2)
    assert isinstance(runner, ModelRunner)
    long, short = list(range(60)), [9, 8, 7, 6]
    in_chunks(runner, 0, long)
    alone = in_chunks(runner, 1, short)
    rows = [Row(0, len(long) - 1), Row(1, len(short) - 1)]
    together = runner.forward(rows, [[long[-1]], [short[-1]]])
    assert_close(together[1], alone)
    assert_close(together[0], plain(phi3(), long))


def test_the_choice_can_be_made_again() -> None:
    model, ids = phi3(), list(range(9))
    fix_frequencies(model, CONTEXT)
    assert not torch.allclose(plain(model, ids), plain(phi3(), ids))
    fix_frequencies(model, ORIGINAL)
    assert_close(plain(model, ids), plain(phi3(), ids))


def test_a_model_without_longrope_stays_as_it_is() -> None:
    model = AutoModelForCausalLM.from_config(Phi3Config(**COMMON)).eval()
    before = plain(model, [1, 2, 3])
    fix_frequencies(model, 1)
    assert torch.equal(plain(model, [1, 2, 3]), before)
