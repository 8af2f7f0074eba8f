"""Weights that were packed on request are kept, and used only for what they were made of."""

import os
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from fakes import byte_tokenizer

from stream_generator.checkpoint import Checkpoint, load_checkpoint
from stream_generator.loading.packed_cache import PackedCache
from stream_generator.quantization import PackedWeight

WEIGHT = PackedWeight.of(torch.randn(16, 32), 4)
TENSORS = WEIGHT.tensors("layer")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint as far as the cache looks at it."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    return made


def test_what_was_kept_is_found_again(directory: Path, tmp_path: Path) -> None:
    assert PackedCache(directory, 4, tmp_path).load() == {}
    PackedCache(directory, 4, tmp_path).save(TENSORS)
    found = PackedCache(directory, 4, tmp_path).load()
    assert torch.equal(found["layer"].dense(), WEIGHT.dense())
    assert PackedCache(directory, 8, tmp_path).load() == {}


def test_another_download_in_the_same_place_is_packed_anew_and_replaces_it(
    directory: Path, tmp_path: Path
) -> None:
    PackedCache(directory, 4, tmp_path).save(TENSORS)
    PackedCache(directory, 8, tmp_path).save(TENSORS)
    os.utime(directory / "model.safetensors", ns=(1, 1))
    cache = PackedCache(directory, 4, tmp_path)
    assert cache.load() == {}
    cache.save(TENSORS)
    assert [*cache.load()] == ["layer"]
    assert len(list((tmp_path / "packed").iterdir())) == 2, "of four bits and of eight"


def test_a_damaged_file_is_packed_anew(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    PackedCache(directory, 4, tmp_path).save(TENSORS)
    (file,) = (tmp_path / "packed").iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert PackedCache(directory, 4, tmp_path).load() == {}
    assert "packing again" in caplog.text


def test_where_nothing_can_be_written_the_model_runs_all_the_same(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "packed").write_text("in the way")
    PackedCache(directory, 4, tmp_path).save(TENSORS)
    assert "are not kept" in caplog.text


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.inference_mode():
        return checkpoint.model(torch.tensor([[5, 6, 7]])).logits


@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_a_later_start_packs_nothing_and_computes_the_same(
    quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "tiny"
    tiny_llama(vocab_size=258).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    first = logits(load_checkpoint(str(model), quantize))

    def refuse(*args: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(PackedWeight, "of", refuse)
    again = logits(load_checkpoint(str(model), quantize))
    assert torch.equal(first, again)
    assert not torch.equal(first, logits(load_checkpoint(str(model), "none")))
