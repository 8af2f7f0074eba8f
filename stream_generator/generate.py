"""Streams for Python programs: `stream_generate`, and `do_stream` for transformers' `generate`."""

import copy
import functools
import inspect
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast, overload
from weakref import WeakKeyDictionary

from transformers import (
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from stream_generator.engine.engine import Engine
from stream_generator.engine.runners import runner_of
from stream_generator.engine.token_stream import TokenStream
from stream_generator.errors import InvalidRequest, QueueFull
from stream_generator.loaded_model import Checkpoint
from stream_generator.loop import stream_request, stream_sample
from stream_generator.request import TokenOutput
from stream_generator.sampling_params import SamplingParams

Prompt = Iterable[Mapping[str, object]] | Iterable[int]  # messages, or ids
SLOTS = 4  # for each checkpoint; more would take memory that the program may need


@overload
def stream_generate(
    model: Checkpoint, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any
) -> Iterator[TokenOutput]: ...


@overload
def stream_generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Prompt,
    params: SamplingParams | None = None,
    **sampling: Any,
) -> Iterator[TokenOutput]: ...


def stream_generate(model: Any, *arguments: Any, **keywords: Any) -> Iterator[TokenOutput]:
    """Yield the reply to `prompt` as outputs with text deltas. The last has the finish reason.

    model: a checkpoint, or any transformers model followed by its tokenizer. A checkpoint runs as
    in the service: packed weights on their step graph, several replies in the slots of one cache.
    If a program reads several of these streams alternately, their replies are computed together. A
    transformers model runs in its own `generate`, one reply at a time. Packed and dense weights
    round differently, so their replies may differ.

    prompt: messages, rendered by the checkpoint's chat template, or prompt ids.
    params: a `SamplingParams`, or its fields as keywords, e.g. `temperature=0`. Missing values come
        from the checkpoint's generation config.

    Raises `InvalidRequest` for a prompt that does not fit, and pydantic's `ValidationError` for
    parameters out of bounds, both before anything is computed. The iterator raises
    `GenerationFailed` if computing fails.

        >>> for output in stream_generate(checkpoint, [{"role": "user", "content": "Hi"}]):
        ...     print(output.delta, end="", flush=True)
    """
    if isinstance(model, Checkpoint):
        return _stream_checkpoint(model, *arguments, **keywords)
    return _stream_model(model, *arguments, **keywords)


def _stream_model(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Prompt,
    params: SamplingParams | None = None,
    **sampling: Any,
) -> Iterator[TokenOutput]:
    checkpoint = Checkpoint.of(model, tokenizer)
    ids, resolved = _prompt_ids(checkpoint, prompt), _params_of(params, sampling)
    request = checkpoint.new_request(ids, resolved, request_id=uuid.uuid4().hex)
    return stream_request(model, request)


def _stream_checkpoint(
    checkpoint: Checkpoint,
    prompt: Prompt,
    params: SamplingParams | None = None,
    **sampling: Any,
) -> Iterator[TokenOutput]:
    ids, resolved = _prompt_ids(checkpoint, prompt), _params_of(params, sampling)
    shared = _engine_of(checkpoint)
    shared.engine.intake.new_request(ids, resolved, request_id="check")  # raises if it is invalid
    return shared.reply(ids, resolved)


def _prompt_ids(checkpoint: Checkpoint, prompt: Prompt) -> list[int]:
    items: list[Any] = list(prompt)
    return checkpoint.chat.encode(items) if items and isinstance(items[0], dict) else items


def _params_of(params: SamplingParams | None, sampling: dict[str, Any]) -> SamplingParams:
    if params is not None and sampling:
        raise TypeError("give either params or keywords such as temperature=0, not both")
    return params or SamplingParams(**sampling)


class _SharedEngine:
    """An engine for all replies of one checkpoint. It has no thread of its own: readers compute.

    One reader at a time computes a step for all readers, and each reader gets its outputs at once.
    A single reader should be on the thread that loaded the model (see `Engine`).
    """

    def __init__(self, checkpoint: Checkpoint):
        self.engine = Engine(checkpoint, runner=runner_of(checkpoint, max_concurrent=SLOTS))
        self._changed = threading.Condition()
        self._stepping = False

    def reply(self, ids: list[int], params: SamplingParams) -> Iterator[TokenOutput]:
        with self._submit(ids, params) as stream:
            stream.on_output(self._notify)
            ended = False
            while not ended:
                while (output := stream.get(timeout=0)) is None:
                    self._step(stream)
                if isinstance(output, TokenOutput):
                    ended = output.finish_reason is not None
                    yield output

    def _submit(self, ids: list[int], params: SamplingParams) -> TokenStream:
        while True:
            try:
                return self.engine.submit(ids, params)
            except QueueFull:
                self._step()

    def _step(self, stream: TokenStream | None = None) -> None:
        """Compute a step. If another reader computes one, wait for its end or for an output."""
        with self._changed:
            if self._stepping:
                self._changed.wait_for(lambda: not self._stepping or (stream and stream.ready))
                return
            self._stepping = True
        try:
            self.engine.step()
        except BaseException:  # such as Ctrl+C: the step may be half done
            self.engine.close("a step was interrupted; call stream_generate again")
            raise
        finally:
            self._stepping = False
            self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


_engines: WeakKeyDictionary[Checkpoint, _SharedEngine] = WeakKeyDictionary()
_engines_lock = threading.Lock()


def _engine_of(checkpoint: Checkpoint) -> _SharedEngine:
    with _engines_lock:
        shared = _engines.get(checkpoint)
        if shared is None or not shared.engine.life.is_accepting:
            shared = _engines[checkpoint] = _SharedEngine(checkpoint)
        return shared


def init_stream_support() -> Callable[[], None]:
    """Add a `do_stream` argument to every model's `generate`. Returns a function that removes it.

    A drop-in replacement for the package transformers-stream-generator: calls stay as they are.
    This then prints a reply token by token:

        >>> for ids in model.generate(input_ids, do_stream=True, do_sample=True):
        ...     print(tokenizer.decode(ids), end="", flush=True)

    `generate` returns a generator of id tensors, int64 `[rows]`.
    `seed`, `tokenizer` with `stop_strings` and all sampling parameters work. Beam search, an
    assistant model, a streamer and `return_dict_in_generate` raise `InvalidRequest`, because they
    give no stream of ids. Without `do_stream`, calls go to transformers unchanged.
    """
    original = GenerationMixin.generate
    if hasattr(original, "undo_stream_support"):
        return cast(Callable[[], None], original.undo_stream_support)

    @functools.wraps(original)
    def generate(self: Any, *args: Any, do_stream: bool = False, **kwargs: Any) -> Any:
        if not do_stream:
            return original(self, *args, **kwargs)
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.update(arguments.pop("kwargs", {}))
        return original(**_streaming_arguments(arguments))

    def undo() -> None:
        cast(Any, GenerationMixin).generate = original

    cast(Any, generate).undo_stream_support = undo
    cast(Any, GenerationMixin).generate = generate
    return undo


def _streaming_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` for a stream.

    With a callable `custom_generate`, transformers ignores stop strings, and arguments that cannot
    work in a stream. Here stop strings become a criterion, and such arguments are rejected.
    """
    for name in ("assistant_model", "streamer", "custom_generate"):
        if arguments.pop(name, None) is not None:
            raise InvalidRequest(f"{name} cannot be used with do_stream; leave it out", param=name)
    tokenizer = arguments.pop("tokenizer", None)
    config = arguments.get("generation_config")
    stops = arguments.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if stops:
        if tokenizer is None:
            raise InvalidRequest("stop_strings need tokenizer=...", param="tokenizer")
        criteria = StoppingCriteriaList(arguments.get("stopping_criteria") or [])
        criteria.append(StopStringCriteria(tokenizer, stops))
        arguments["stopping_criteria"] = criteria
        if config is not None:
            arguments["generation_config"] = copy.deepcopy(config)
            arguments["generation_config"].stop_strings = None
    return {**arguments, "custom_generate": stream_sample}
