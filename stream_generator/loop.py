"""The generation loop of one model: one forward, one id per row, one yield. Start reading here.

transformers' `generate` prepares inputs, cache, logits processors and stopping criteria, and then
calls a decoding method. If `custom_generate` is a callable, `generate` calls it and returns its
result: here, a generator. The caller gets ids step by step, and all sampling parameters of
transformers work. Tests compare the engine with this loop.
"""

import copy
import math
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode

from stream_generator.errors import InvalidRequest
from stream_generator.request import Choice, Request, TokenOutput
from stream_generator.sampling.processors import (
    ADJUST,
    NOT_IN_TRANSFORMERS,
    RESTRICT,
    processors,
)
from stream_generator.sampling.sampler import check_scores, draw, generator_for, uniform

# The names that model families give to the cache in the outputs of a forward.
_CACHE_NAMES = ("past_key_values", "cache_params", "state")


def stream_sample(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    generators: list[torch.Generator] | None = None,
    seed: int | None = None,
    **model_kwargs: Any,
) -> Iterator[torch.Tensor]:
    """Yield the ids of each step as soon as they exist: int64 `[rows]`.

    A decoding method for `model.generate(..., custom_generate=stream_sample)`, greedy or sampling.
    input_ids: int64 [rows, prompt length], padded on the left.
    generators: one CPU generator per row. By default they are seeded with `seed + row`, or from
    torch's global generator if there is no seed.

    A finished row yields the pad id, and the loop ends when all rows have finished. The stopping
    criteria set a boolean mask of finished rows, for any number of end ids. (Older projects keep an
    integer mask. With the two end ids of Llama 3 it doubles at each step, never becomes 0, and
    gives ids outside the vocabulary; docs/design.md explains this.)

    Raises `InvalidRequest` at once for a mode that does not choose one id per step and row, and
    `GenerationFailed` at the step whose logits are not finite.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InvalidRequest(
            f"{mode.value} cannot be streamed id by id; use greedy search or sampling"
        )
    if generation_config.return_dict_in_generate:
        raise InvalidRequest(
            "a stream yields only ids; leave out return_dict_in_generate",
            param="return_dict_in_generate",
        )
    if model.config.is_encoder_decoder:
        raise InvalidRequest("encoder-decoder models cannot be streamed; use a decoder-only model")
    if generation_config.do_sample and generators is None:
        generators = _generators(len(input_ids), seed)
    return _loop(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        _pad_id(generation_config),
        generators if generation_config.do_sample else None,
        model_kwargs,
    )


@torch.inference_mode()  # torch enters it again whenever a thread resumes the generator
def _loop(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    pad_id: int,
    generators: list[torch.Generator] | None,
    model_kwargs: dict[str, Any],
) -> Iterator[torch.Tensor]:
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    inputs = model.prepare_inputs_for_generation(
        input_ids,
        next_sequence_length=_uncached_length(input_ids, model_kwargs),
        is_first_iteration=True,
        **model_kwargs,
    )
    while True:
        outputs = model(**inputs, return_dict=True)
        # Copied, because a slice would keep the logits of the whole prompt in memory.
        logits = outputs.logits[:, -1].to(device=input_ids.device, dtype=torch.float32, copy=True)
        _carry_over(outputs, model_kwargs)
        del outputs
        scores = logits_processor(input_ids, logits)
        check_scores(scores[~finished])
        if generators is None:
            ids = scores.argmax(dim=-1)
        else:
            ids = draw(scores, torch.tensor([uniform(g) for g in generators], dtype=torch.float64))
        ids = ids.masked_fill(finished, pad_id if 0 <= pad_id < scores.shape[-1] else 0)
        input_ids = torch.cat([input_ids, ids[:, None]], dim=-1)
        finished = finished | stopping_criteria(input_ids, cast(Any, None))
        yield ids
        if finished.all():
            return
        inputs = model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=1 if model_kwargs.get("use_cache") else None,
            **model_kwargs,
        )


def _uncached_length(input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> int | None:
    """How many of the last ids the caller's cache lacks; None if the cache is empty or missing."""
    cache = model_kwargs.get("past_key_values")
    cached = cache.get_seq_length() if cache is not None else 0
    return input_ids.shape[1] - cached if cached else None


def _carry_over(outputs: Any, model_kwargs: dict[str, Any]) -> None:
    """Prepare `model_kwargs` for the next forward: the cache, and one more position."""
    for name in _CACHE_NAMES:
        if outputs.get(name) is not None:
            model_kwargs[name] = outputs[name]
    if (mask := model_kwargs.get("attention_mask")) is not None:
        model_kwargs["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
    if (positions := model_kwargs.get("position_ids")) is not None:
        model_kwargs["position_ids"] = torch.cat([positions, positions[..., -1:] + 1], dim=-1)


def _generators(rows: int, seed: int | None) -> list[torch.Generator]:
    if seed is None:
        return [generator_for(int(torch.randint(2**62, ()))) for _ in range(rows)]
    return [generator_for(seed + row) for row in range(rows)]


def _pad_id(config: GenerationConfig) -> int:
    """The configured pad id, or else an end id, as in transformers."""
    for ids in (config.pad_token_id, config.eos_token_id):
        if ids is not None and ids != []:
            return int(ids[0] if isinstance(ids, list) else ids)
    return 0


def stream_request(model: PreTrainedModel, request: Request) -> Iterator[TokenOutput]:
    """Run one request alone until it finishes. Yields one output per step.

    Raises `InvalidRequest` if the request wants log-probabilities, which this loop does not have.
    """
    if request.params.logprobs is not None:
        raise InvalidRequest("logprobs need the engine; leave them out here", param="logprobs")
    return _outputs(model, request)


def _outputs(model: PreTrainedModel, request: Request) -> Iterator[TokenOutput]:
    with closing(stream_ids(model, request)) as ids:
        for token_id in ids:
            output = request.append(Choice(token_id))
            yield output
            if output.finish_reason is not None:
                return


def stream_ids(model: PreTrainedModel, request: Request) -> Generator[int, None, None]:
    """Yield the ids of one request that runs alone. The caller decides when the reply ends."""
    ids = torch.tensor([request.prompt_ids], device=model.device)
    steps = cast(Any, model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=_generation_config(model, request),
        logits_processor=processors(NOT_IN_TRANSFORMERS, request),
        custom_generate=stream_sample,
        generators=[request.generator],
    )
    with closing(steps):
        for step in steps:
            yield int(step)


def _generation_config(model: PreTrainedModel, request: Request) -> GenerationConfig:
    """The request's parameters, in the form that transformers' processors read.

    An unused parameter gets its neutral value, because transformers replaces None by a default of
    the checkpoint or its own.
    """
    params = request.params
    table = {**ADJUST, **RESTRICT}
    values = {n: p.value(n, params) for n, p in table.items() if n not in NOT_IN_TRANSFORMERS}
    biases = values.pop("logit_bias")
    if params.greedy:  # unused, but transformers warns of values that are not its defaults
        values |= {"top_k": 50, "min_p": None}
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    config.update(
        **values,
        do_sample=not params.greedy,
        max_new_tokens=params.max_new_tokens or 1,
        max_length=None,
        max_time=None if config.max_time is None else math.inf,
        num_beams=1,
        eos_token_id=sorted(request.all_end_ids) or None,
        pad_token_id=max(_pad_id(config), 0),  # one row has no pads, but transformers wants an id
        return_dict_in_generate=False,
        num_return_sequences=1,
    )
    if biases:
        config.sequence_bias = [[[i], float(bias)] for i, bias in biases.items()]
    return config
