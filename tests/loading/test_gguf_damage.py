"""A GGUF file with a wrong value in its metadata is rejected, and does nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue
from support.gguf_families import FAMILIES, Tensors, family_model, write_family

from stream_generator.errors import CheckpointError
from stream_generator.loading.gguf.file import GgufFile

WRONG = [
    GGUFValue("x", GGUFValueType.STRING),
    GGUFValue([1, 2, 3], GGUFValueType.ARRAY, GGUFValueType.UINT32),
    GGUFValue(0, GGUFValueType.UINT32),
    GGUFValue(2**32 - 1, GGUFValueType.UINT32),
]


def with_value(key: str, value: GGUFValue) -> Callable[[GGUFWriter, Tensors], None]:
    def change(writer: GGUFWriter, tensors: Tensors) -> None:
        writer.kv_data[0][key] = value

    return change


@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3"])
def test_a_wrong_value_is_no_other_error_than_a_rejection(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    family, model = FAMILIES[name], family_model(FAMILIES[name])
    keys: list[str] = []
    whole = tmp_path / "whole.gguf"
    write_family(family, model, whole, change=lambda writer, _: keys.extend(writer.kv_data[0]))
    keys = [key for key in keys if not key.startswith("tokenizer.")]
    rejected = 0
    for number, key in enumerate(keys):
        for variant, value in enumerate(WRONG):
            path = tmp_path / f"{number}-{variant}.gguf"
            write_family(family, model, path, change=with_value(key, value))
            try:
                GgufFile(path).facts()  # some values are valid, such as a huge context
            except CheckpointError:
                rejected += 1
    assert rejected > 2 * len(keys)
