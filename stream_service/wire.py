"""The events of a stream, and the three forms that write them as bytes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stream_generator.engine.token_stream import TokenStream
from stream_generator.errors import StreamGeneratorError
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import Choice, QueuePosition, Request
from stream_generator.text.chat import Prompt
from stream_service.errors import answer

HEARTBEAT_SECONDS = 10.0  # time without an event before a heartbeat

Event = dict[str, Any]


class StreamTruncated(Exception):
    """Raised inside a plain text answer, to end it without its final chunk."""


@dataclass(frozen=True)
class Form:
    """A way to write events as bytes. heartbeat: sent while there is no event; empty for none."""

    content_type: str
    encode: Callable[[Event], bytes]
    heartbeat: bytes = b""


def json_line(event: Event) -> str:
    """Write an event as compact JSON, without escapes for non-ASCII characters."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"))


def _as_text(event: Event) -> bytes:
    if event["event"] == "error":
        # The status is sent already, so only a missing final chunk can report the failure.
        raise StreamTruncated(event["error"]["message"])
    return str(event.get("delta", "")).encode()


def _as_ndjson(event: Event) -> bytes:
    return (json_line(event) + "\n").encode()


def _as_sse(event: Event) -> bytes:
    return f"event: {event['event']}\ndata: {json_line(event)}\n\n".encode()


TEXT = Form("text/plain", _as_text)
NDJSON = Form("application/x-ndjson", _as_ndjson)
SSE = Form("text/event-stream", _as_sse, heartbeat=b": still here\n\n")
FORMS = {form.content_type: form for form in (TEXT, NDJSON, SSE)}


def events(
    stream: TokenStream,
    checkpoint: Checkpoint,
    prompt: Prompt,
    history_after: Callable[[str], list[Any]],
) -> Iterator[Event | None]:
    """Yield the events of one request in order. None: no event for `HEARTBEAT_SECONDS`.

    history_after: makes the history for the next query from the text of the reply.
    The last event is "end" or "error".
    """
    yield start_event(stream.request, checkpoint.name, prompt)
    is_first = True
    while True:
        try:
            output = stream.get(timeout=HEARTBEAT_SECONDS)
        except StreamGeneratorError as error:
            body, _ = answer(error, stream.id)
            yield {"event": "error", **body}
            return
        if output is None:
            yield None
        elif isinstance(output, QueuePosition):
            yield {"event": "queue", "position": output.position}
        else:
            if output.choice is not None or output.delta:
                delta: Event = {"event": "delta", "delta": output.delta, "finished": False}
                delta |= logprobs(output.choice, checkpoint)
                if is_first:
                    delta["cached_tokens"] = stream.request.num_cached_tokens
                    is_first = False
                yield delta
            if output.finish_reason is not None:
                yield end_event(stream.request, history_after)
                return


def logprobs(choice: Choice | None, checkpoint: Checkpoint) -> Event:
    """Return the token, its log-probability and alternatives if requested, else nothing."""
    if choice is None or choice.logprob is None:
        return {}

    def token(token_id: int, logprob: float) -> Event:
        # A token may be part of a character, which has no text by itself.
        text = checkpoint.token_bytes(token_id).decode(errors="replace")
        return {"id": token_id, "token": text, "logprob": round(logprob, 6)}

    alternatives = [token(i, p) for i, p in choice.alternatives]
    return {**token(choice.token_id, choice.logprob), "alternatives": alternatives}


def start_event(request: Request, model: str, prompt: Prompt) -> Event:
    return {
        "event": "start",
        "id": request.id,
        "model": model,
        "prompt_tokens": len(request.prompt_ids),
        "trimmed": {"messages": prompt.trimmed_messages, "tokens": prompt.trimmed_tokens},
    }


def end_event(request: Request, history_after: Callable[[str], list[Any]]) -> Event:
    return {
        "event": "end",
        "delta": "",
        "finished": True,
        **reply(request, history_after),
        "timings": timings(request),
        "seed": request.params.seed,
        "params": request.params.model_dump(exclude_none=True),
    }


def reply(request: Request, history_after: Callable[[str], list[Any]]) -> dict[str, Any]:
    """Return the whole reply, and the history for the next query."""
    return {
        "response": request.text,
        "history": history_after(request.text),
        "finish_reason": request.finish_reason,
        "usage": usage([request]),
    }


def usage(requests: list[Request], n: int = 1) -> dict[str, int]:
    """Count tokens. requests: the engine's requests, `n` for each prompt. The tokens of a prompt
    count once."""
    prompt = sum(len(r.prompt_ids) for r in requests[::n])
    completion = sum(len(r.output_ids) for r in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def timings(request: Request) -> dict[str, float | None]:
    """Return the milliseconds in the queue and to the first token, and the tokens per second.

    The rate is one over the mean gap between tokens, so it needs at least two tokens.
    """
    started, first, last = request.started_at, request.first_token_at, request.last_token_at
    gaps = len(request.output_ids) - 1
    rate = None
    if first is not None and last is not None and last > first:
        rate = round(gaps / (last - first), 2)
    return {
        "queue_ms": _milliseconds(request.submitted_at, started),
        "ttft_ms": _milliseconds(request.submitted_at, first),
        "tokens_per_second": rate,
    }


def _milliseconds(start: float, end: float | None) -> float | None:
    return None if end is None else round((end - start) * 1000, 1)
