"""The programs in examples/, each in its own process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.fakes import Gate, fake_checkpoint, says
from support.service import ServiceFactory

from stream_generator.loaded_model import Checkpoint

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TIMEOUT = 120
REPLY = "One word, 二, three."


@contextmanager
def running(name: str, *arguments: str, address: str = "") -> Iterator["subprocess.Popen[bytes]"]:
    """Start an example as a user does who has installed this clone."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LLAMA3_ADDRESS": address}
    for variable in ("LLAMA3_API_KEY", "PYTHONUNBUFFERED"):  # an example must flush by itself
        environment.pop(variable, None)
    command = [sys.executable, EXAMPLES / name, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: "subprocess.Popen[bytes]", text: str) -> None:
    """Read the output as soon as it is printed, until `text` comes."""
    assert process.stdout is not None
    printed = b""
    while not printed.endswith(text.encode()):
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece, f"the example ended after {printed!r}"
        printed += piece


@pytest.mark.parametrize(
    ("name", "arguments", "typed"),
    [("requests_stream.py", ["Count."], b""), ("openai_chat.py", [], b"Count.\n\n")],
)
def test_an_example_client_prints_the_first_word_before_the_second_is_computed(
    name: str, arguments: list[str], typed: bytes, serve: ServiceFactory
) -> None:
    gate = Gate(says(REPLY))
    service = serve(fake_checkpoint(gate))
    with running(name, *arguments, address=service.url) as process:
        assert process.stdin is not None
        process.stdin.write(typed)
        process.stdin.flush()
        gate.allow(len("One"))
        read_until(process, "One")
        assert gate.num_computed_tokens == len("One")
        gate.allow(100)
        printed, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert printed.decode().removesuffix("> ") == REPLY.removeprefix("One") + "\n"


def test_the_example_chat_sends_the_whole_conversation(serve: ServiceFactory) -> None:
    """The fake model answers with the number of turns in its prompt."""
    service = serve(fake_checkpoint(lambda ids: says(str(ids.count(257)))(ids)))
    with running("openai_chat.py", address=service.url) as process:
        printed, _ = process.communicate(b"One.\nTwo.\n\n", timeout=TIMEOUT)
    assert process.returncode == 0
    assert printed == b"> 1\n> 3\n> "


def test_the_requests_example_prints_why_a_prompt_is_rejected(serve: ServiceFactory) -> None:
    service = serve(fake_checkpoint(says(REPLY)))
    environment = {**os.environ, "LLAMA3_ADDRESS": service.url}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "requests_stream.py", "x" * 1000],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 1
    assert "tokens" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_local_example_streams_the_demo_model_without_a_service(demo: Checkpoint) -> None:
    with running("local_stream.py") as process:
        printed, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    words = printed.decode().split()
    assert len(words) > 5
    assert words[-1] in ("(stop)", "(length)")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_names_its_own_command(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    assert f"python examples/{path.name}" in text
    assert path.name in Path(__file__).read_text(), "no test runs this example"
