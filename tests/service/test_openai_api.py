"""The routes under /v1, used by OpenAI's own client."""

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engines import free_slots
from support.fakes import FakeModel, Gate, byte_tokenizer, fake_checkpoint, says
from support.models import tiny_llama
from support.service import RunningService, ServiceFactory, running_service
from support.waiting import TIMEOUT, wait_for

from stream_generator.loaded_model import Checkpoint
from stream_service.settings import ServiceSettings

HI: Any = [{"role": "user", "content": "hi"}]


def client_of(service: RunningService, **options: Any) -> openai.OpenAI:
    defaults = {"api_key": "none", "max_retries": 0, "timeout": TIMEOUT}
    return openai.OpenAI(base_url=f"{service.url}/v1", **{**defaults, **options})


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """One service for all tests that need no settings of their own."""
    with running_service(fake_checkpoint(says("彩虹 🌈!"))) as running:
        yield running


@pytest.fixture
def client(service: RunningService) -> Iterator[openai.OpenAI]:
    with client_of(service) as made:
        yield made


def test_a_chat_completion_has_the_reply_and_its_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HI)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "fake"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "彩虹 🌈!")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (18, 12)
    assert answer.usage.total_tokens == 30


def test_chunks_of_a_chat_follow_openais_protocol(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="fake", messages=HI, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert {(c.object, c.id, c.created, c.model) for c in chunks} == {
        ("chat.completion.chunk", chunks[0].id, chunks[0].created, "fake")
    }
    *body, last = chunks
    assert [c.choices[0].delta.role for c in body] == ["assistant", *[None] * (len(body) - 1)]
    assert "".join(c.choices[0].delta.content or "" for c in body) == "彩虹 🌈!"
    assert [c.choices[0].finish_reason for c in body] == [*[None] * (len(body) - 1), "stop"]
    assert all(c.usage is None for c in body)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12


def test_chunks_of_a_chat_have_no_usage_unless_requested(service: RunningService) -> None:
    body = {"messages": HI, "stream": True}
    response = requests.post(f"{service.url}/v1/chat/completions", json=body, timeout=TIMEOUT)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    *events, end, rest = response.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    assert not any("usage" in json.loads(e.removeprefix("data: ")) for e in events)


def test_chat_log_probabilities_include_the_bytes_of_each_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=HI, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    data = bytes(b for token in logprobs.content for b in token.bytes or ())
    assert data.decode() == "彩虹 🌈!"
    for token in logprobs.content:
        assert math.isclose(token.logprob, 0.0, abs_tol=1e-3)
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].bytes == token.bytes


def test_completions_use_no_chat_template_and_keep_prompt_order(serve: ServiceFactory) -> None:
    def echo(ids: list[int]) -> int:
        return ids[0] if len(ids) < 35 else 256

    with client_of(serve(fake_checkpoint(echo))) as client:
        answer = client.completions.create(model="fake", prompt="A" + " " * 31)
        assert answer.object == "text_completion"
        assert answer.choices[0].text == "AAA"
        prompts = ["B" + " " * 33, [67, *[32] * 33]]
        for prompt in prompts:
            client.completions.create(model="fake", prompt=prompt)
        several: Any = ["B" + " " * 33, "C" + " " * 31]
        answer = client.completions.create(model="fake", prompt=several, n=2)
        assert [(c.index, c.text) for c in answer.choices] == [
            (0, "B"), (1, "B"), (2, "CCC"), (3, "CCC"),
        ]  # fmt: skip
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 34 + 32, "each prompt counts once, whatever n is"
        texts = ["", "", "", ""]
        for chunk in client.completions.create(model="fake", prompt=several, n=2, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == ["B", "B", "CCC", "CCC"]


def test_completion_log_probabilities_have_tokens_and_text_offsets(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="assistant:", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert logprobs.tokens[-1] == "!"
    assert logprobs.text_offset[-1] == len("彩虹 🌈")
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[-1].keys() == {"!"}


def test_the_served_model_is_listed_and_other_models_are_not_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "local"
    with pytest.raises(openai.NotFoundError, match="use 'fake'"):
        client.models.retrieve("org/other")
    with pytest.raises(openai.NotFoundError, match="model 'other' is not served") as error:
        client.chat.completions.create(model="other", messages=HI)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"temperature": 9}, "temperature", "less than or equal to 5"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"user": "me"}, "user", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, None, "mean the same"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "Input should be"),
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean temperature?"),
        ({"extra_body": {"min_new_tokens": 9}, "max_tokens": 5}, None, "must not exceed"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "616"),
    ],
)
def test_a_wrong_or_unsupported_field_gives_a_400_that_names_it(
    client: openai.OpenAI, wrong: dict[str, Any], param: str | None, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as error:
        client.chat.completions.create(**{"model": "fake", "messages": HI, **wrong})
    if param:
        assert error.value.param == param


def test_openais_and_our_sampling_parameters_work_together(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=[{"role": "developer", "content": "x"}, *HI],
        max_completion_tokens=4, seed=1, temperature=0.5, top_p=0.9, frequency_penalty=0.1,
        presence_penalty=0.1, logit_bias={"65": -100}, stop=["zzz"],
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "彩�"


def test_a_message_from_a_reply_can_be_sent_back_unchanged(client: openai.OpenAI) -> None:
    messages: list[Any] = [*HI]
    for _ in range(2):
        answer = client.chat.completions.create(model="fake", messages=messages)
        messages += [answer.choices[0].message, {"role": "user", "content": "and?"}]
    assert answer.choices[0].message.content == "彩虹 🌈!"


def test_a_null_field_counts_as_absent(service: RunningService) -> None:
    names = ("n", "stream", "tools", "response_format", "user", "stop", "temperature", "seed")
    body = {"messages": HI, **dict.fromkeys(names), "stream_options": None}
    response = requests.post(f"{service.url}/v1/chat/completions", json=body, timeout=TIMEOUT)
    assert response.status_code == 200, response.text


def test_the_largest_seed_works_for_several_replies(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=HI, seed=2**63 - 1, n=2, temperature=1
    )
    assert len(answer.choices) == 2


@pytest.mark.parametrize(
    ("prompt", "param", "words"),
    [
        (3, "prompt", "valid"),
        ([1, -1], "prompt.1", "greater than or equal to 0"),
        ("", "prompt", "empty"),
        ([70000], "prompt", "not in the vocabulary"),
        ("x" * 600, "prompt", "600 tokens"),
    ],
)
def test_an_invalid_completion_prompt_gives_a_400_that_names_it(
    client: openai.OpenAI, prompt: Any, param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as error:
        client.completions.create(model="fake", prompt=prompt)
    assert error.value.param == param


def test_a_wrong_api_key_raises_openais_authentication_error(serve: ServiceFactory) -> None:
    service = serve(
        fake_checkpoint(says("a")), settings=ServiceSettings(api_keys=("right", "other"))
    )
    with client_of(service, api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError, match="valid API key"):
            client.chat.completions.create(model="fake", messages=HI)
    with client_of(service, api_key="other") as client:
        answer = client.chat.completions.create(model="fake", messages=HI)
        assert answer.choices[0].message.content == "a"


def test_a_full_queue_is_a_rate_limit_error_and_a_retry_succeeds(serve: ServiceFactory) -> None:
    gate = Gate(says("abc"))
    service = serve(fake_checkpoint(gate), slots=1, max_waiting=1)
    streams = [
        requests.post(f"{service.url}/stream", json={"query": "hi"}, stream=True, timeout=TIMEOUT,
                      headers={"Accept": "application/x-ndjson"})
        for _ in range(2)
    ]  # fmt: skip
    with client_of(service) as client:
        with pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(model="fake", messages=HI)
        assert int(error.value.response.headers["Retry-After"]) >= 1
    responses: list[httpx.Response] = []

    def let_others_finish(response: httpx.Response) -> None:
        responses.append(response)
        gate.allow(100)

    http = httpx.Client(event_hooks={"response": [let_others_finish]})
    with client_of(service, max_retries=5, http_client=http) as client:
        answer = client.chat.completions.create(model="fake", messages=HI)
    assert answer.choices[0].message.content == "abc"
    assert responses[0].status_code == 429
    assert responses[-1].status_code == 200
    for stream in streams:
        stream.close()


def fails_after_two_tokens(ids: list[int]) -> int:
    if len(ids) > 19:
        raise RuntimeError("secret path")
    return says("abcdef")(ids)


def test_a_failed_chat_gives_a_500_or_an_error_in_its_stream(serve: ServiceFactory) -> None:
    service = serve(fake_checkpoint(fails_after_two_tokens))
    with client_of(service) as client:
        with pytest.raises(openai.InternalServerError, match="generation failed"):
            client.chat.completions.create(model="fake", messages=HI)
        seen = ""
        with pytest.raises(openai.APIError, match="generation failed") as error:
            for chunk in client.chat.completions.create(model="fake", messages=HI, stream=True):
                seen += chunk.choices[0].delta.content or ""
        assert seen == "ab"
        assert "secret" not in str(error.value)
    body = {"messages": HI, "stream": True}
    text = requests.post(f"{service.url}/v1/chat/completions", json=body, timeout=TIMEOUT).text
    assert "[DONE]" not in text


def test_a_client_timeout_aborts_the_request_and_frees_its_slot(serve: ServiceFactory) -> None:
    gate = Gate(says("abc"))
    service = serve(fake_checkpoint(gate), slots=1)
    with client_of(service, timeout=1) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="fake", messages=HI)
    wait_for(gate.arrived)
    (request,) = service.engine.requests
    service.wait_for_abort(request)
    gate.allow(100)
    wait_for(lambda: request.finish_reason == "abort", service.engine)
    assert free_slots(service.engine) == 1


TINY = Checkpoint.of(tiny_llama(vocab_size=258), byte_tokenizer(), "tiny")
bodies = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**31), "max_tokens": st.integers(1, 12)},
    optional={
        "temperature": st.floats(0.1, 2),
        "top_k": st.integers(0, 50),
        "repetition_penalty": st.floats(0.5, 2),
        "n": st.integers(1, 3),
        "stop": st.lists(st.text(min_size=1, max_size=2), min_size=1, max_size=3),
        "logprobs": st.just(True),
        "messages": st.just([{"role": "user", "content": "Hello, 你好"}]),
    },
)


@pytest.fixture(scope="module")
def tiny_service() -> Iterator[RunningService]:
    with running_service(TINY, slots=4) as running:
        yield running


@given(body=bodies)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_streamed_chat_equals_the_whole_answer(
    tiny_service: RunningService, body: dict[str, Any]
) -> None:
    url = f"{tiny_service.url}/v1/chat/completions"
    body = {"messages": HI, **body}
    whole = requests.post(url, json=body, timeout=TIMEOUT).json()
    streamed = requests.post(
        url, json={**body, "stream": True, "stream_options": {"include_usage": True}},
        timeout=TIMEOUT,
    )  # fmt: skip
    *events, done, _ = streamed.content.decode().split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert counts(chunks[-1]["usage"]) == counts(whole["usage"])
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        text = "".join(piece["delta"].get("content", "") for piece in own)
        assert text == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        tokens = [t for piece in own for t in (piece["logprobs"] or {"content": []})["content"]]
        expected = (choice["logprobs"] or {"content": []})["content"]
        assert [t["bytes"] for t in tokens] == [t["bytes"] for t in expected]
        for ours, theirs in zip(tokens, expected, strict=True):
            assert math.isclose(ours["logprob"], theirs["logprob"], abs_tol=1e-3)


def counts(usage: dict[str, Any]) -> list[int]:
    return [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]


def test_a_base_model_completes_texts_and_rejects_chats(serve: ServiceFactory) -> None:
    base = Checkpoint.of(FakeModel(says("abc")), byte_tokenizer(chat_template=None), "base")
    assert "none, so only completions work" in base.describe()
    service = serve(base)
    with client_of(service) as client:
        completion = client.completions.create(model="base", prompt="a", max_tokens=2)
        assert completion.choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match="/v1/completions"):
            client.chat.completions.create(model="base", messages=HI)
    for path, body in (("stream", {"query": "hi"}), ("chat", {"messages": HI})):
        rejected = requests.post(f"{service.url}/{path}", json=body, timeout=TIMEOUT)
        assert rejected.status_code == 400
        assert "base model" in rejected.text
