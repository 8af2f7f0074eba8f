"""Bodies become validated requests, and an error names the wrong field."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_generator.errors import InvalidRequest
from stream_service.json_body import parse_body
from stream_service.schemas import (
    StreamRequest,
    sampling_bounds,
)


def parse(**body: Any) -> Any:
    return parse_body(json.dumps(body).encode(), StreamRequest)


def test_query_history_and_prompt_make_a_conversation() -> None:
    request = parse(query="c", history=[["a", "b"]], prompt="p", max_tokens=5)
    assert request.conversation() == [
        {"role": "system", "content": "p"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert request.sampling().max_new_tokens == 5
    assert request.history_after("d") == [["a", "b"], ["c", "d"]]


def test_the_history_may_hold_messages_and_content_may_be_a_list_of_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
    expected = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "x"}]
    request = parse(query="c", history=turns, prompt="p")
    assert request.conversation()[1:-1] == expected
    assert request.history_after("d") == [
        *expected,
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]


def test_a_system_message_in_the_history_stays_there() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    turns.append({"role": "assistant", "content": "b"})
    for prompt in ({}, {"prompt": "p"}):
        after = parse(query="c", history=turns, **prompt).history_after("d")
        assert after[:3] == turns
        assert len(after) == 5


def test_the_returned_history_includes_the_reply_and_joins_a_continued_message() -> None:
    asked = [{"role": "user", "content": "a"}]
    reply = {"role": "assistant", "content": "bc"}
    assert parse(messages=asked).history_after("bc") == [*asked, reply]
    begun = [*asked, {"role": "assistant", "content": "b"}]
    assert parse(messages=begun).history_after("c") == [*asked, reply]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, None, "either query or messages"),
        ({"query": "a", "messages": [{"role": "user", "content": "a"}]}, None, "either"),
        ({"messages": [{"role": "user", "content": "a"}], "prompt": "p"}, "prompt", "messages"),
        ({"query": ""}, "query", "at least 1 character"),
        ({"query": 5}, "query", "valid string"),
        ({"query": "a", "temprature": 1}, "temprature", "did you mean temperature?"),
        ({"query": "a", "tools": []}, "tools", "is not supported; leave it out"),
        ({"query": "a", "temperature": "hot"}, "temperature", "valid number"),
        ({"query": "a", "temperature": 9}, "temperature", "less than or equal to 5"),
        ({"query": "a", "temperature": 0.001}, "temperature", "at least 0.01"),
        ({"query": "a", "do_sample": False, "top_p": 0.5}, "do_sample", "no effect"),
        ({"query": "a", "max_tokens": 5, "max_new_tokens": 5}, "max_tokens", "one of them"),
        ({"query": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"query": "a", "stop": ["b"] * 17}, "stop", "a list should have at most 16 items, not 17"),
        ({"query": "a", "stop": ["b", 7]}, "stop.1", "valid string"),
        ({"query": "a", "logit_bias": {"x": 1}}, "logit_bias.x", "valid integer"),
        ({"query": "a", "history": [["a"]]}, "history.0", ""),
        ({"query": "a", "history": [["a", 5]]}, "history.0", ""),
        ({"query": "a", "history": 5}, "history", "valid list"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "Field required"),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages.0.x", "unknown"),
        (
            {"messages": [{"role": "user", "contnt": "a"}]},
            "messages.0",
            "",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "rolle": "x"}]},
            "messages.0.rolle",
            "did you mean role?",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.conte", ""),
    ],
)
def test_body_errors_name_the_field(body: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse(**body)
    assert words in str(error.value)
    assert (error.value.param or "").startswith(param or "")
    assert bool(error.value.param) == bool(param)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"a"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"query": "a", "temperature": NaN}', "NaN is not valid JSON"),
        (b'{"query": "a", "temperature": -Infinity}', "-Infinity is not valid JSON"),
        (b'{"query": "a", "temperature": 1e999}', "finite"),
        (b'{"query": "a", "query": "b"}', "given twice"),
        (b'{"query": "a", "seed": ' + b"9" * 5000 + b"}", "too long"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        ('{"query": "a"}'.encode("utf-16"), "UTF-8"),
        (b'{"query": "\xff"}', "UTF-8"),
        (b'\xef\xbb\xbf{"query": "a"}', "not valid JSON"),
        (b'{"query": "\\ud800"}', "query"),
        (b'{"\\ud800": 1, "query": "a"}', "unknown field"),
    ],
)
def test_a_body_that_is_not_strict_json_in_utf8_is_rejected(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse_body(body, StreamRequest)
    assert words in str(error.value)


keys = st.one_of(st.sampled_from(["query", "messages", "history", "stop", "top_k"]), st.text())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(st.one_of(st.binary(max_size=60), st.dictionaries(keys, json_values).map(json.dumps)))
@settings(deadline=None, max_examples=1000)
def test_any_body_is_accepted_or_rejected_and_never_breaks_the_parser(body: bytes | str) -> None:
    raw = body if isinstance(body, bytes) else body.encode()
    try:
        parse_body(raw, StreamRequest).conversation()
    except InvalidRequest as error:
        assert str(error)


def test_the_published_bounds_are_enforced() -> None:
    bounds = sampling_bounds()
    assert bounds["temperature"] == {"type": "number", "minimum": 0, "maximum": 5}
    assert bounds["top_p"]["exclusiveMinimum"] == 0
    with pytest.raises(InvalidRequest):
        parse(query="a", top_k=bounds["top_k"]["maximum"] + 1)
    parse(query="a", top_k=bounds["top_k"]["maximum"])
