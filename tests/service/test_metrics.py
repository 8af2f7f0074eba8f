"""The log line and the metrics of each request, which never hold texts or keys."""

import json
import logging
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from support.fakes import fake_checkpoint, says
from support.service import ServiceFactory
from support.waiting import TIMEOUT

import llama3_service
from stream_service.settings import ServiceSettings

SECRET_KEY, SECRET_QUERY, SECRET_REPLY = "key-of-gold", "query-of-silver", "reply-of-bronze"


def ask(url: str, path: str = "/chat", **body: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {SECRET_KEY}", "X-Request-Id": "me-1"}
    return requests.post(url + path, json=body, headers=headers, timeout=TIMEOUT)


def figures(url: str) -> dict[str, float]:
    headers = {"Authorization": f"Bearer {SECRET_KEY}"}
    text = requests.get(f"{url}/metrics", headers=headers, timeout=TIMEOUT).text
    return {
        sample.name + "".join(f",{k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def url(serve: ServiceFactory) -> str:
    return serve(fake_checkpoint(says(SECRET_REPLY)), settings=ServiceSettings((SECRET_KEY,))).url


def test_the_log_has_one_line_per_request_without_texts_or_keys(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert ask(url, query=SECRET_QUERY).json()["response"] == SECRET_REPLY
    assert ask(url, query=SECRET_QUERY, temperature="x" + SECRET_QUERY).status_code == 400
    figures(url)  # answered only after the other requests were logged
    lines = [r for r in caplog.records if r.name == "stream_service.requests"]
    served, rejected = (r for r in lines if r.route == "/chat")
    assert served.getMessage().startswith("request_id=me-1 route=/chat status=200 ms=")
    assert served.finish_reason == "stop"
    assert served.prompt_tokens == len("user:<assistant:") + len(SECRET_QUERY)
    assert served.reply_tokens == len(SECRET_REPLY)
    assert served.ttft_ms > 0
    assert served.queue_ms >= 0
    assert served.tokens_per_second > 0
    assert rejected.status == 400
    for secret in (SECRET_KEY, SECRET_QUERY, SECRET_REPLY):
        assert secret not in caplog.text


def test_every_line_of_the_json_log_is_json(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    llama3_service.start_log(as_json=True)
    ask(url, query="hi")
    figures(url)
    logging.getLogger("stream_generator").warning("two\nlines")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    served = next(line for line in lines if line.get("route") == "/chat")
    assert (served["status"], served["reply_tokens"]) == (200, len(SECRET_REPLY))
    assert lines[-1]["message"] == "two\nlines"


def test_the_metrics_count_the_served_requests(url: str) -> None:
    for _ in range(2):
        ask(url, query="hi")
    ask(url, path="/nowhere")
    found = figures(url)
    prompt, reply = len("user:hi<assistant:"), len(SECRET_REPLY)
    assert found["llm_requests_total,route=/chat,status=200"] == 2
    assert found["llm_requests_total,route=none,status=404"] == 1
    assert found["llm_replies_total,finish_reason=stop"] == 2
    assert found["llm_prompt_tokens_total"] == 2 * prompt
    assert found["llm_prefix_cached_tokens_total"] == prompt - 1
    assert found["llm_prefix_hits_total"] == 1
    assert found["llm_reply_tokens_total"] == 2 * reply
    for name in ("time_to_first_token", "time_per_token", "queue"):
        assert found[f"llm_{name}_seconds_count"] == 2
    assert found["llm_requests_running"] == found["llm_requests_waiting"] == 0
    assert found["llm_engine_healthy"] == 1
