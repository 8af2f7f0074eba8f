"""A source in another format is rejected by what it is, or by where its model lies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from gguf import GGUFWriter
from support.models import tiny_llama

from stream_generator.errors import CheckpointError
from stream_generator.loading.load import load_checkpoint

Write = Callable[[Path], Any]


def files(*names: str, content: str = "{}") -> Write:
    def write(directory: Path) -> None:
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(content)

    return write


MLX = json.dumps({"model_type": "llama", "quantization": {"group_size": 64, "bits": 4}})

OTHERS: dict[str, tuple[Write, str]] = {
    "a directory of directories": (files("Tiny-1B/config.json"), r"name one of these: .*Tiny-1B$"),
    "the hub's cache": (
        files("refs/main", "snapshots/abc/config.json"), r"name one of these: .*snapshots/abc$",
    ),
    "Mistral's own": (files("params.json", "consolidated.safetensors"), "Mistral's own format"),
    "images": (files("model_index.json", "unet/weights.bin"), "makes images"),
    "ONNX": (files("model.onnx"), "format of ONNX"),
    "TensorFlow": (files("tf_model.h5"), "format of TensorFlow"),
    "MLX": (files("config.json", "model.safetensors", content=MLX), "packed for MLX"),
    "something else": (files("notes.txt"), "holds no checkpoint .found: notes.txt"),
    "nothing": (lambda directory: None, "holds no checkpoint .found: nothing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_a_directory_in_another_format_is_rejected_by_what_it_is(tmp_path: Path, kind: str) -> None:
    write, words = OTHERS[kind]
    write(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(str(tmp_path))
    assert "again" not in str(caught.value)


def gguf(file: Path, architecture: str, kind: str | None, *, late: bool = False) -> Path:
    writer = GGUFWriter(file, architecture)
    if late:
        for number in range(20):
            writer.add_uint32(f"other.{number}", number)
            writer.add_bool(f"flag.{number}", True)
            writer.add_float32(f"real.{number}", 0.5)
    if kind is not None:
        writer.add_type(kind)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("one", numpy.ones((4, 32), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("in_directory", [False, True])
@pytest.mark.parametrize(
    ("architecture", "kind", "words"),
    [
        ("llama", "adapter", r"is an adapter \(LoRA\).*llama-export-lora"),
        ("clip", "mmproj", "reads images for another model"),
        ("clip", None, "reads images for another model"),
    ],
)
def test_a_gguf_of_another_kind_is_rejected_by_what_it_is(
    tmp_path: Path, architecture: str, kind: str | None, words: str, in_directory: bool, late: bool
) -> None:
    file = gguf(tmp_path / "file.gguf", architecture, kind, late=late)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(str(tmp_path if in_directory else file))


@pytest.mark.parametrize("length", [4, 20, 24, 40, 60])
def test_a_gguf_that_is_cut_off_is_a_clear_error(tmp_path: Path, length: int) -> None:
    file = gguf(tmp_path / "file.gguf", "llama", "model")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="could not be read"):
        load_checkpoint(str(file))


def test_a_directory_that_holds_a_model_beside_others_is_loaded(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    files("onnx/model.onnx", "model.onnx", "older/config.json")(tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_checkpoint(str(tmp_path))
