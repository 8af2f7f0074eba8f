"""The routes under `/v1`: OpenAI's protocol, for existing clients.

Source: https://platform.openai.com/docs/api-reference (chat, completions, models).
"""

import time
from collections.abc import Iterator
from typing import Any, Protocol

from flask import Blueprint, Response, g, jsonify

from stream_generator.engine.token_stream import TokenStream, interleaved
from stream_generator.errors import InvalidRequest, StreamGeneratorError
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import Choice, FinishReason, Request, TokenOutput
from stream_service.errors import ModelNotFound, answer
from stream_service.exchange import admit, read_body, streamed
from stream_service.openapi import describes
from stream_service.schemas import ChatCompletionRequest, CompletionRequest, OpenAIRequest
from stream_service.wire import HEARTBEAT_SECONDS, SSE, json_line, usage


class AnswerFormat(Protocol):
    """Writes replies for one of the two routes."""

    id_prefix: str
    object: str
    chunk_object: str

    def piece(self, index: int, output: TokenOutput, is_first: bool) -> dict[str, Any]:
        """Return the choice of a chunk."""

    def whole(self, index: int, reply: Request, outputs: list[TokenOutput]) -> dict[str, Any]:
        """Return the choice of a complete answer."""


def create_blueprint(checkpoint: Checkpoint) -> Blueprint:
    """Create the routes under `/v1` for one model."""
    v1 = Blueprint("openai", __name__, url_prefix="/v1")
    started = int(time.time())
    model = {"id": checkpoint.name, "object": "model", "created": started, "owned_by": "local"}

    @v1.get("/models")
    def models() -> Response:
        """List the served model."""
        return jsonify(object="list", data=[model])

    @v1.get("/models/<path:name>")
    def one_model(name: str) -> Response:
        """Describe the served model."""
        _check_model(name, checkpoint)
        return jsonify(model)

    @v1.post("/chat/completions")
    @describes(body=ChatCompletionRequest, answers=("application/json", "text/event-stream"))
    def chat_completions() -> Response:
        """Reply to a conversation, in OpenAI's protocol."""
        admission = admit()
        body = read_body(ChatCompletionRequest)
        _check_model(body.model, checkpoint)
        prompt = checkpoint.chat.encode(body.conversation())
        streams = admission.submit([prompt], body.sampling(), body.n)
        return _answer(ChatFormat(checkpoint), body, streams, checkpoint)

    @v1.post("/completions")
    @describes(body=CompletionRequest, answers=("application/json", "text/event-stream"))
    def completions() -> Response:
        """Continue texts or token ids, without a chat template."""
        admission = admit()
        body = read_body(CompletionRequest)
        _check_model(body.model, checkpoint)
        prompts = [
            checkpoint.encode(prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompts()
        ]
        try:
            streams = admission.submit(prompts, body.sampling(), body.n)
        except InvalidRequest as error:
            if error.param == "messages":  # the prompt of other routes
                error.param = "prompt"
            raise
        return _answer(CompletionFormat(checkpoint), body, streams, checkpoint)

    return v1


def _check_model(name: str | None, checkpoint: Checkpoint) -> None:
    if name is not None and name != checkpoint.name:
        raise ModelNotFound(f"model {name!r} is not served; use {checkpoint.name!r}", "model")


def _answer(
    form: AnswerFormat, body: OpenAIRequest, streams: list[TokenStream], checkpoint: Checkpoint
) -> Response:
    head = {
        "id": form.id_prefix + g.request_id,
        "object": form.chunk_object if body.stream else form.object,
        "created": int(time.time()),
        "model": checkpoint.name,
    }
    if body.stream:
        return streamed(_chunks(form, body, head, streams, g.request_id), SSE)
    choices = [form.whole(i, stream.request, list(stream)) for i, stream in enumerate(streams)]
    return jsonify({**head, "choices": choices, "usage": _usage(streams, body.n)})


def _chunks(
    form: AnswerFormat,
    body: OpenAIRequest,
    head: dict[str, Any],
    streams: list[TokenStream],
    request_id: str,
) -> Iterator[bytes]:
    """Yield the events of a stream. A stream that fails has no [DONE]."""
    if body.include_usage:
        head = {**head, "usage": None}
    begun: set[int] = set()
    try:
        for piece in interleaved(streams, HEARTBEAT_SECONDS):
            if piece is None:
                yield SSE.heartbeat
                continue
            index, output = piece
            is_first = index not in begun
            begun.add(index)
            yield _data({**head, "choices": [form.piece(index, output, is_first)]})
    except StreamGeneratorError as error:
        yield _data(answer(error, request_id)[0])
        return
    if body.include_usage:
        yield _data({**head, "choices": [], "usage": _usage(streams, body.n)})
    yield b"data: [DONE]\n\n"


def _data(value: dict[str, Any]) -> bytes:
    return f"data: {json_line(value)}\n\n".encode()


def _usage(streams: list[TokenStream], n: int) -> dict[str, Any]:
    replies = [stream.request for stream in streams]
    cached = sum(r.num_cached_tokens for r in replies[::n])
    return {**usage(replies, n), "prompt_tokens_details": {"cached_tokens": cached}}


def _choice(
    index: int,
    body: dict[str, Any],
    logprobs: dict[str, Any] | None,
    reason: FinishReason | None,
) -> dict[str, Any]:
    """Add the fields that the choices of both routes share."""
    # OpenAI's protocol has no finish reason for an aborted reply.
    word = FinishReason.STOP if reason is FinishReason.ABORT else reason
    return {"index": index, **body, "logprobs": logprobs, "finish_reason": word}


class ChatFormat:
    """Writes replies for `/v1/chat/completions`."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def piece(self, index: int, output: TokenOutput, is_first: bool) -> dict[str, Any]:
        delta = {"role": "assistant"} if is_first else {}
        if output.delta or is_first:
            delta["content"] = output.delta
        logprobs = self._logprobs([output])
        return _choice(index, {"delta": delta}, logprobs, output.finish_reason)

    def whole(self, index: int, reply: Request, outputs: list[TokenOutput]) -> dict[str, Any]:
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        logprobs = self._logprobs(outputs)
        return _choice(index, {"message": message}, logprobs, reply.finish_reason)

    def _logprobs(self, outputs: list[TokenOutput]) -> dict[str, Any] | None:
        content = [
            {
                **self._token(choice.token_id, choice.logprob),
                "top_logprobs": [self._token(i, p) for i, p in choice.alternatives],
            }
            for choice in _with_logprobs(outputs)
        ]
        return {"content": content, "refusal": None} if content else None

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        data = self._checkpoint.token_bytes(token_id)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": _rounded(logprob), "bytes": list(data)}


class CompletionFormat:
    """Writes replies for `/v1/completions`."""

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._offsets: dict[int, int] = {}  # characters so far, by index of the choice

    def piece(self, index: int, output: TokenOutput, is_first: bool) -> dict[str, Any]:
        logprobs = self._logprobs(index, [output])
        return _choice(index, {"text": output.delta}, logprobs, output.finish_reason)

    def whole(self, index: int, reply: Request, outputs: list[TokenOutput]) -> dict[str, Any]:
        logprobs = self._logprobs(index, outputs)
        return _choice(index, {"text": reply.text}, logprobs, reply.finish_reason)

    def _logprobs(self, index: int, outputs: list[TokenOutput]) -> dict[str, Any] | None:
        made: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for output in outputs:
            for choice in _with_logprobs([output]):
                made["tokens"].append(self._text(choice.token_id))
                made["token_logprobs"].append(_rounded(choice.logprob))
                top = {self._text(i): _rounded(p) for i, p in reversed(choice.alternatives)}
                made["top_logprobs"].append(top)
                made["text_offset"].append(self._offsets.get(index, 0))
            self._offsets[index] = self._offsets.get(index, 0) + len(output.delta)
        return made if made["tokens"] else None

    def _text(self, token_id: int) -> str:
        return self._checkpoint.token_bytes(token_id).decode(errors="replace")


def _with_logprobs(outputs: list[TokenOutput]) -> list[Choice]:
    """Return the choices that have a log-probability."""
    return [o.choice for o in outputs if o.choice is not None and o.choice.logprob is not None]


def _rounded(logprob: float | None) -> float | None:
    return None if logprob is None else round(logprob, 6)
