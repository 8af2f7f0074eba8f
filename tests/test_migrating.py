"""The examples in docs/migrating.md work unchanged."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import requests
from requests.adapters import HTTPAdapter
from support.processes import ROOT
from support.service import RunningService, running_service
from support.waiting import TIMEOUT
from test_docs import run_example
from urllib3.util import Retry

from stream_generator.loaded_model import Checkpoint

BLOCKS = re.findall(
    r"```(bash|python)\n(.*?)```", (ROOT / "docs" / "migrating.md").read_text(), re.DOTALL
)
WEB = next(code for _, code in BLOCKS if "inference_stream" in code)


@pytest.fixture(scope="module")
def service(demo: Checkpoint) -> Iterator[RunningService]:
    with running_service(demo) as running:
        yield running


@pytest.mark.parametrize(("language", "code"), [block for block in BLOCKS if block[1] != WEB])
def test_a_migration_example_works(service: RunningService, language: str, code: str) -> None:
    run_example(service, language, code)


def test_the_web_example_of_transformers_stream_generator_serves_its_client() -> None:
    assert len([line for line in WEB.splitlines() if line.strip()]) <= 20
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", WEB.replace("port=8000", f"port={port}")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    data = {  # the body in its client
        "prompt": "hello? How can I help you?\n",
        "parameters": {
            "max_tokens": 20,
            "do_sample": True,
            "top_k": 30,
            "top_p": 0.85,
            "temperature": 0.35,
            "repetition_penalty": 1.2,
            "seed": 0,
        },
    }
    session = requests.Session()  # retries until the example listens
    session.mount(
        "http://", HTTPAdapter(max_retries=Retry(total=300, backoff_factor=0.1, backoff_max=0.2))
    )
    with subprocess.Popen(command, env=environment) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            answer = session.post(f"{url}/inference", json=data, timeout=TIMEOUT)
            result = answer.json()["result"]
            streamed = session.post(
                f"{url}/inference_stream", json=data, stream=True, timeout=TIMEOUT
            )
            pieces = list(streamed.iter_content(None))
        finally:
            process.kill()
    assert b"".join(pieces).decode() == result
    assert len(pieces) > 5
