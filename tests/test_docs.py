"""The examples in docs/api.md and docs/clients.md work unchanged."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.processes import ROOT
from support.service import RunningService, running_service
from support.waiting import TIMEOUT

from stream_generator.loaded_model import Checkpoint

EXAMPLES = [
    pytest.param(language, code, id=f"{name}-{number}-{language}")
    for name in ("api.md", "clients.md")
    for number, (language, code) in enumerate(
        re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
    )
]


@pytest.fixture(scope="module")
def service(demo: Checkpoint) -> Iterator[RunningService]:
    with running_service(demo) as running:
        yield running


@pytest.mark.parametrize(("language", "code"), EXAMPLES)
def test_a_documented_example_works(service: RunningService, language: str, code: str) -> None:
    assert "localhost:8800" in code
    run_example(service, language, code)


def run_example(service: RunningService, language: str, code: str) -> None:
    """Run an example against `service`, in its own process; the example must print something."""
    code = code.replace("localhost:8800", service.url.removeprefix("http://"))
    if language == "bash":
        code = re.sub(r"\bcurl (?!-s)", "curl -sS --fail-with-body ", code)
    command = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*command, code],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert "broken off" not in done.stdout


def test_every_route_has_an_example_for_curl_and_for_python(service: RunningService) -> None:
    """An example uses a route by its address, or by a method of a Python client."""
    codes: dict[str, str] = {"bash": "", "python": ""}
    for example in EXAMPLES:
        language, code = example.values
        codes[language] += code
    by_method = {
        "/stop/<request_id>": "client.stop(",
        "/v1/chat/completions": "client.chat.completions.create(",
        "/v1/completions": "client.completions.create(",
        "/v1/models/<path:name>": "/v1/models/{models[0]['id']}",
    }
    for rule in service.app.url_map.iter_rules():
        path = rule.rule.replace("<request_id>", "my-1").replace("<path:name>", "SmolLM2")
        assert f"localhost:8800{path}" in codes["bash"], path
        wanted = by_method.get(rule.rule, f'localhost:8800{path}"')
        assert wanted in codes["python"], path
