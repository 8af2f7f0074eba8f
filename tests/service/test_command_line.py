"""The service's command line: its flags, its mistakes, and what the service prints at start."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

import pytest
from support.engines import engine_of
from support.fakes import FakeModel, byte_tokenizer, fake_checkpoint, says

import llama3_service
from stream_generator.loaded_model import Checkpoint
from stream_service.command_line import parse_arguments
from stream_service.settings import LOOPBACK_NAMES


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA3_API_KEY", raising=False)


def test_api_keys_come_from_flags_the_environment_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("four\n\nfive\n")
    monkeypatch.setenv("LLAMA3_API_KEY", "three")
    args = parse_arguments(["--api-key", "one", "--api-key", "two", "--api-key-file", str(file)])
    assert args.settings.api_keys == ("one", "two", "three", "four", "five")
    monkeypatch.delenv("LLAMA3_API_KEY")
    assert parse_arguments([]).settings.api_keys == ()


@pytest.mark.parametrize(
    ("arguments", "hosts"),
    [
        ([], LOOPBACK_NAMES),
        (["-H", "localhost"], LOOPBACK_NAMES),
        (["-H", "127.0.0.7"], LOOPBACK_NAMES | {"127.0.0.7"}),
        (["--allow-host", "My.Example"], LOOPBACK_NAMES | {"my.example"}),
        (["-H", "0.0.0.0"], None),
        (["-H", "0.0.0.0", "--allow-host", "my.example"], LOOPBACK_NAMES | {"my.example"}),
    ],
)
def test_the_listening_address_and_allow_host_decide_the_allowed_hosts(
    arguments: list[str], hosts: set[str] | None
) -> None:
    assert parse_arguments(arguments).settings.allowed_hosts == hosts


def test_a_device_map_is_a_word_or_a_json_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse_arguments(["--device-map", "balanced"]).device_map == "balanced"
    file = tmp_path / "map.json"
    file.write_text('{"model.embed_tokens": "cpu", "model.layers": 0}')
    devices = {"model.embed_tokens": "cpu", "model.layers": 0}
    assert parse_arguments(["--device-map", str(file)]).device_map == devices
    file.write_text('["cpu"]')
    with pytest.raises(SystemExit):
        parse_arguments(["--device-map", str(file)])
    assert "must contain a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-P", "70000"], "70000 is not a port"),
        (["--max-queue", "0"], "0 is not a positive integer"),
        (["--max-time", "soon"], "soon is not a number of seconds"),
        (["--drain", "-1"], "-1 is not a number of seconds"),
        (["--api-key-file", "/no/such/file"], "/no/such/file"),
        (["--api-key", "k", "--cors-origin", "*"], "name each origin"),
        (["--quantize", "int3"], "int3"),
        (["--device-map", "everywhere"], "everywhere is neither auto, balanced"),
        (["--device-map", "auto", "--device", "cpu"], "cannot be combined"),
    ],
)
def test_a_wrong_flag_ends_the_command_with_status_2_and_a_clear_message(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments(arguments)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_an_empty_key_file_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(SystemExit):
        parse_arguments(["--api-key-file", str(tmp_path / "keys")])
    assert "contains no key" in capsys.readouterr().err


def test_an_empty_key_in_the_environment_is_rejected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMA3_API_KEY", " ")
    with pytest.raises(SystemExit):
        parse_arguments([])
    assert "LLAMA3_API_KEY is empty" in capsys.readouterr().err
    monkeypatch.setenv("LLAMA3_API_KEY", " k ")
    assert parse_arguments([]).settings.api_keys == ("k",)


OutputOf = Callable[[list[str], Checkpoint], str]


@pytest.fixture
def output_of(capsys: pytest.CaptureFixture[str]) -> Iterator[OutputOf]:
    """Serve with a drained engine, which ends at once, and return what the service printed."""
    handlers = {number: signal.getsignal(number) for number in (SIGHUP, SIGINT, SIGTERM)}

    def serve_and_read(arguments: list[str], checkpoint: Checkpoint) -> str:
        engine = engine_of(checkpoint, slots=1)
        engine.drain(0)
        server = llama3_service.listen(parse_arguments(["-P", "0"]))
        assert llama3_service.serve(parse_arguments(arguments), server, engine) == 0
        return capsys.readouterr().out

    yield serve_and_read
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "is_warned"),
    [
        (["-H", "0.0.0.0"], True),
        (["-H", "0.0.0.0", "--allow-host", "my.example"], True),
        (["-H", "0.0.0.0", "--api-key", "k"], False),
        ([], False),
    ],
)
def test_a_service_without_a_key_warns_if_other_machines_can_reach_it(
    arguments: list[str], is_warned: bool, output_of: OutputOf
) -> None:
    assert ("WARNING" in output_of(arguments, fake_checkpoint(says("")))) == is_warned


@pytest.mark.parametrize(
    ("host", "bypasses_proxy"),
    [("127.0.0.1", True), ("::1", True), ("0.0.0.0", True), ("10.0.0.1", False)],
)
def test_the_printed_curl_command_bypasses_a_proxy_to_this_machine(
    host: str, bypasses_proxy: bool, output_of: OutputOf, unreachable_proxy: None
) -> None:
    printed = output_of(["-H", host], fake_checkpoint(says("")))
    assert ("--noproxy '*'" in printed) == bypasses_proxy


def test_the_printed_curl_command_fits_the_model(output_of: OutputOf) -> None:
    chat_model = fake_checkpoint(says(""))
    assert re.search(r"curl .* http://127\.0\.0\.1:\d+/stream\n", output_of([], chat_model))
    base = Checkpoint.of(FakeModel(says("")), byte_tokenizer(chat_template=None))
    assert re.search(r"curl .* http://127\.0\.0\.1:\d+/v1/completions\n", output_of([], base))
