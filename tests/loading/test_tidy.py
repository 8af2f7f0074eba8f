"""Byte order marks, templates of old processors and files left by a merge change nothing."""

import codecs
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fakes import CHAT_TEMPLATE, byte_tokenizer
from support.models import tiny_llama

from stream_generator.errors import CheckpointError
from stream_generator.loading.cache import entries
from stream_generator.loading.load import load_checkpoint
from stream_generator.loading.tidy import tidy
from stream_generator.text.chat import Message

MESSAGES: list[Message] = [{"role": "user", "content": "Hello 彩虹."}]
CLEAN = [
    "config.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
    "tokenizer.json",
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "model"
    model = tiny_llama(vocab_size=258)
    model.generation_config.update(temperature=0.7, do_sample=True)
    model.save_pretrained(directory, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(directory)
    assert all((directory / name).is_file() for name in CLEAN)
    return directory


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


@torch.inference_mode()
def facts(directory: Path) -> tuple[Any, ...]:
    """What a checkpoint computes and says."""
    loaded = load_checkpoint(str(directory), "none", dtype="float32")
    logits = loaded.model(torch.tensor([[5, 6, 7]])).logits
    ids = loaded.chat.encode(MESSAGES) if loaded.chat.can_chat else None
    return loaded.name, logits.tolist(), ids, loaded.end_ids, loaded.defaults


@pytest.mark.parametrize("names", [*([name] for name in CLEAN), None])
def test_a_byte_order_mark_changes_nothing(
    model: Path, saved: Path, names: list[str] | None
) -> None:
    texts = [*model.glob("*.json"), *model.glob("*.jinja")]
    for file in texts if names is None else [model / name for name in names]:
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    before = {file: file.read_bytes() for file in model.iterdir()}
    assert facts(model) == facts(saved)
    assert {file: file.read_bytes() for file in model.iterdir()} == before


def test_a_file_in_another_encoding_of_unicode_changes_nothing(model: Path, saved: Path) -> None:
    """Windows PowerShell writes UTF-16."""
    for name in CLEAN:
        (model / name).write_bytes((model / name).read_text().encode("utf-16"))
    assert facts(model) == facts(saved)


def test_a_tidy_directory_is_used_as_it_is(saved: Path, cache: Path) -> None:
    assert tidy(saved) == saved
    assert not cache.exists()


def test_a_tidy_copy_is_made_once_and_again_after_a_change(model: Path) -> None:
    file = model / "config.json"
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    first = tidy(model)
    assert tidy(model) == first
    assert all(path.is_symlink() for path in first.glob("*.safetensors"))
    file.write_bytes(file.read_bytes() + b"\n")
    assert tidy(model) != first
    assert not first.exists()


def test_the_size_of_a_cached_copy_does_not_include_what_its_links_lead_to(model: Path) -> None:
    file = model / "chat_template.jinja"
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    tidy(model)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert [entry.size < weights for entry in entries()] == [True]


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        CHAT_TEMPLATE,
        [{"name": "tools", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}],
    ],
)
def test_the_template_of_an_old_processor_is_used_if_there_is_no_other(
    model: Path, saved: Path, name: str, content: Any
) -> None:
    (model / "chat_template.jinja").unlink()
    assert facts(model)[2] is None
    (model / name).write_text(json.dumps({"chat_template": content}))
    assert facts(model) == facts(saved)
    assert load_checkpoint(str(model)).chat.describe() == f"from {name}"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_tokenizers_own_template_comes_before_a_processors(
    model: Path, saved: Path, place: str
) -> None:
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "wrong"}))
    if place == "tokenizer_config.json":
        (model / "chat_template.jinja").unlink()
        config = json.loads((model / place).read_text())
        (model / place).write_text(json.dumps(config | {"chat_template": CHAT_TEMPLATE}))
    assert facts(model) == facts(saved)
    assert load_checkpoint(str(model)).chat.describe() == f"from {place}"


def test_a_template_of_a_processor_is_checked_too(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 9**(9**9) }}"}))
    with pytest.raises(CheckpointError, match="never finishes"):
        load_checkpoint(str(model))


def test_a_byte_order_mark_hides_no_code(model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoConfig": "x.Y"}}
    (model / "config.json").write_bytes(codecs.BOM_UTF8 + json.dumps(config).encode())
    with pytest.raises(CheckpointError, match="auto_map"):
        load_checkpoint(str(model))


def test_a_configuration_of_a_merged_adapter_is_left_out(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    assert not (tidy(model) / "adapter_config.json").exists()
    assert (tidy(model) / "config.json").is_file()
