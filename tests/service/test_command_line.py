"""The flags, and what becomes of them."""

from pathlib import Path

import pytest
from support.fakes import FakeModel, byte_tokenizer, fake_checkpoint, says

import llama3_service
from stream_generator.loaded_model import Checkpoint
from stream_service.command_line import parse_arguments
from stream_service.settings import LOOPBACK_NAMES


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA3_API_KEY", raising=False)


def test_keys_come_from_flags_the_environment_and_a_file(
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
def test_which_hosts_are_answered_follows_from_where_it_listens(
    arguments: list[str], hosts: set[str] | None
) -> None:
    assert parse_arguments(arguments).settings.allowed_hosts == hosts


def test_a_device_map_is_a_word_or_a_file(
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
    assert "must hold an object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-P", "70000"], "70000 is not a port"),
        (["--max-queue", "0"], "0 is not a positive number"),
        (["--max-time", "soon"], "soon is not a number of seconds"),
        (["--drain", "-1"], "-1 is not a number of seconds"),
        (["--api-key-file", "/no/such/file"], "/no/such/file"),
        (["--api-key", "k", "--cors-origin", "*"], "name them instead of *"),
        (["--quantize", "int3"], "int3"),
        (["--device-map", "everywhere"], "everywhere is none of auto, balanced"),
        (["--device-map", "auto", "--device", "cpu"], "exclude each other"),
    ],
)
def test_a_wrong_flag_is_one_clear_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments(arguments)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_an_empty_file_of_keys_does_not_open_the_door(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(SystemExit):
        parse_arguments(["--api-key-file", str(tmp_path / "keys")])
    assert "there is no key" in capsys.readouterr().err


def test_an_empty_key_in_the_environment_does_not_open_the_door(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMA3_API_KEY", " ")
    with pytest.raises(SystemExit):
        parse_arguments([])
    assert "set but empty" in capsys.readouterr().err
    monkeypatch.setenv("LLAMA3_API_KEY", " k ")
    assert parse_arguments([]).settings.api_keys == ("k",)


@pytest.mark.parametrize(
    ("arguments", "is_warned"),
    [
        (["-H", "0.0.0.0"], True),
        (["-H", "0.0.0.0", "--allow-host", "my.example"], True),
        (["-H", "0.0.0.0", "--api-key", "k"], False),
        ([], False),
    ],
)
def test_an_open_door_is_warned_of(arguments: list[str], is_warned: bool) -> None:
    welcome = llama3_service._welcome(
        parse_arguments(arguments), fake_checkpoint(says("")), "http://x"
    )
    assert ("WARNING" in welcome) == is_warned


@pytest.mark.parametrize(
    ("address", "goes_past"),
    [("http://127.0.0.1:8800", True), ("http://[::1]:8800", True), ("http://10.0.0.1:80", False)],
)
def test_the_first_thing_to_try_goes_past_a_proxy_to_this_machine(
    address: str, goes_past: bool, proxy_that_is_away: None
) -> None:
    """Also where the service listens on all addresses of the machine."""
    arguments = parse_arguments(["-H", "0.0.0.0"])
    welcome = llama3_service._welcome(arguments, fake_checkpoint(says("")), address)
    assert ("--noproxy '*'" in welcome) == goes_past


def test_the_first_thing_to_try_is_what_the_model_can_do() -> None:
    chats = fake_checkpoint(says(""))
    assert "http://x/stream" in llama3_service._welcome(parse_arguments([]), chats, "http://x")
    base = Checkpoint.of(FakeModel(says("")), byte_tokenizer(chat_template=None))
    welcome = llama3_service._welcome(parse_arguments([]), base, "http://x")
    assert "http://x/v1/completions" in welcome
