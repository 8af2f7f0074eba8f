"""GGUF files in several parts are found by their names, from any part."""

import shutil
from pathlib import Path

import pytest
import torch
from support.gguf_families import FAMILIES, difference, family_logits, family_model, write_family
from transformers import PreTrainedModel

from stream_generator.errors import CheckpointError
from stream_generator.loading.gguf.parts import part_names, whole_name
from stream_generator.loading.load import load_checkpoint

FAMILY = FAMILIES["qwen2"]
IDS = torch.arange(20, 60)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return family_model(FAMILY)


@pytest.fixture(scope="module")
def parts(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("split")
    write_family(FAMILY, model, folder / "tiny.gguf", split_max_tensors=10)
    found = sorted(folder.iterdir())
    assert [path.name for path in found] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return found


@pytest.mark.parametrize("number", [0, 1, 2, None])
def test_a_split_file_is_loaded_from_any_part_and_from_its_directory(
    number: int | None, model: PreTrainedModel, parts: list[Path]
) -> None:
    source = parts[0].parent if number is None else parts[number]
    loaded = load_checkpoint(str(source), "none", dtype="float32")
    assert loaded.name == "tiny"
    assert difference(family_logits(loaded, IDS), family_logits(model, IDS)) < 1e-5


def test_the_missing_part_is_named(parts: list[Path], tmp_path: Path) -> None:
    for part in (parts[0], parts[2]):
        shutil.copy(part, tmp_path)
    for source in (tmp_path, tmp_path / parts[2].name):
        with pytest.raises(CheckpointError, match=r"3 parts, and tiny-00002-of-00003.gguf is miss"):
            load_checkpoint(str(source))


def test_a_part_of_another_file_is_rejected(
    model: PreTrainedModel, parts: list[Path], tmp_path: Path
) -> None:
    for part in parts:
        shutil.copy(part, tmp_path)
    shutil.copy(parts[1], tmp_path / parts[2].name)
    with pytest.raises(CheckpointError, match=r"tiny-00003-of-00003\.gguf is part 2 of 3"):
        load_checkpoint(str(tmp_path))


def test_a_whole_file_may_be_named_as_the_only_part(model: PreTrainedModel, tmp_path: Path) -> None:
    path = write_family(FAMILY, model, tmp_path / "tiny-00001-of-00001.gguf")
    loaded = load_checkpoint(str(path), "none", dtype="float32")
    assert loaded.name == "tiny"
    assert difference(family_logits(loaded, IDS), family_logits(model, IDS)) < 1e-5


def test_the_name_of_each_part_is_known() -> None:
    names = ["m/a-00001-of-00002.gguf", "m/a-00002-of-00002.gguf"]
    assert part_names(names[0]) == part_names(names[1]) == names
    assert part_names("a.gguf") == ["a.gguf"]
    assert part_names("a-00001-of-00000.gguf") == ["a-00001-of-00000.gguf"]
    assert [whole_name(name) for name in ("a.gguf", "a-00001-of-00002.gguf", "b")] == [
        "a",
        "a",
        "b",
    ]
