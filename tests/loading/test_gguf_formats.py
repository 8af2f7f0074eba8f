"""A loaded GGUF is as close to the original model as its format allows."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gguf import GGUFWriter, RopeScalingType
from support.fakes import byte_tokenizer
from support.gguf_files import Encode, as_file_type, gguf_name, round_trip, write_gguf
from support.llama3 import BEGIN, END_OF_TURN, VOCABULARY, tokenizer_file
from support.llama_cpp import llama_cpp_scores
from support.models import tiny_llama
from transformers import PreTrainedModel

from stream_generator.engine.graph_runner import GraphRunner
from stream_generator.errors import CheckpointError
from stream_generator.loaded_model import Checkpoint
from stream_generator.loading.load import load_checkpoint
from stream_generator.loading.meta_checkpoint import meta_tokenizer
from stream_generator.model.saved_graph import SavedGraph

FILE_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_1", "Q4_0"]
FLOATS = {"F32", "F16", "BF16"}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A Llama wide enough for blocks of 256 weights, with fewer key heads than query heads."""
    return tiny_llama(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=BEGIN,
        eos_token_id=END_OF_TURN, rms_norm_eps=1e-5, initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return meta_tokenizer(tokenizer_file(tmp_path_factory.mktemp("words") / "tokenizer.model"))


@torch.inference_mode()
def logits(checkpoint: Checkpoint | PreTrainedModel) -> torch.Tensor:
    """The logits after each of 60 ids, computed by the checkpoint's graph if it has one."""
    ids = torch.arange(200, 260)
    if isinstance(checkpoint, PreTrainedModel):
        return checkpoint(input_ids=ids[None]).logits[0].float()
    if checkpoint.graph is None:
        return logits(checkpoint.model)
    runner = GraphRunner(SavedGraph.load(checkpoint.graph), slots=1, context=len(ids))
    return runner.chunk(0, 0, ids.tolist(), range(len(ids)))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The standard deviation of the difference, relative to that of `theirs`."""
    return float((ours - theirs).std() / theirs.std())


def of_blocks(model: PreTrainedModel, encode: Encode) -> PreTrainedModel:
    """The model with the weights of a file's blocks, decoded by the gguf package."""
    blocks = copy.deepcopy(model)
    for name, weight in blocks.state_dict().items():
        data = round_trip(encode, gguf_name(name), weight.numpy())
        weight.copy_(torch.from_numpy(data).view_as(weight))
    return blocks


def test_llama_cpp_gives_the_logits_of_every_formats_blocks(
    model: PreTrainedModel, tokenizer: Any, tmp_path: Path
) -> None:
    encoders = {file_type: as_file_type(file_type) for file_type in FILE_TYPES}
    files = [
        write_gguf(model, tokenizer, tmp_path / f"{file_type}.gguf", encode)
        for file_type, encode in encoders.items()
    ]
    theirs = llama_cpp_scores(files, range(200, 260), VOCABULARY)
    for scores, (file_type, encode) in zip(theirs, encoders.items(), strict=True):
        assert scores is not None, file_type
        expected = logits(of_blocks(model, encode))[-1].log_softmax(dim=-1)
        # llama.cpp rounds the inputs of packed products to eight bits.
        assert error(scores, expected) < (0.03 if file_type in FLOATS else 0.06), file_type


@pytest.mark.parametrize("quantize", ["none", "auto"])
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_a_gguf_of_every_format_gives_the_logits_of_its_blocks(
    file_type: str,
    quantize: str,
    model: PreTrainedModel,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encode = as_file_type(file_type)
    path = write_gguf(model, tokenizer, tmp_path / f"{file_type}.gguf", encode)
    loaded = load_checkpoint(str(path), quantize, dtype="float32")
    ideal, original = logits(of_blocks(model, encode)), logits(model)
    ours = logits(loaded)
    runs_packed = quantize == "auto" and file_type not in FLOATS
    assert (loaded.graph is not None) == runs_packed
    # The graph rounds inputs of products to eight bits. Dense weights are rounded to bfloat16.
    assert error(ours, ideal) < (0.06 if runs_packed else 0.03)
    assert error(ours, original) < 1.1 * error(ideal, original) + (0.03 if runs_packed else 0.01)


def test_a_gguf_is_recognised_by_its_content_and_not_by_its_name(
    model: PreTrainedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ollama keeps GGUF files under such names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_gguf(model, tokenizer, tmp_path / "tiny.gguf", as_file_type("Q4_K_M"))
    blob = (tmp_path / "tiny.gguf").rename(tmp_path / "sha256-6a0746a1ec1a")
    loaded = load_checkpoint(str(blob), name="tiny")
    assert (loaded.name, loaded.layout) == ("tiny", "a GGUF file")


def test_files_beside_a_gguf_are_not_read(
    model: PreTrainedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    path = write_gguf(model, tokenizer, folder / "tiny.gguf", as_file_type("F16"))
    byte_tokenizer().save_pretrained(folder)
    config = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "config.json").write_text("{}")
    text = "hello 彩虹"
    for source in (path, folder):  # a directory with a config, but no other weights
        assert load_checkpoint(str(source)).encode(text) == tokenizer.encode(text)
    assert not (tmp_path / "ran").exists()


Change = Callable[[GGUFWriter, dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda writer, tensors: tensors.pop("blk.1.ffn_down.weight"), "lacks 1 of its weights"),
        (
            lambda writer, tensors: tensors.update({"blk.0.attn_q.bias": numpy.ones(256, "f4")}),
            r"lacks \d of its weights \(blk\.0\.attn_k\.bias",
        ),
        (
            lambda writer, tensors: tensors.update({"blk.0.attn_x.weight": numpy.ones(256, "f4")}),
            r"not known \(blk\.0\.attn_x\.weight",
        ),
        (
            lambda writer, tensors: writer.add_rope_scaling_type(RopeScalingType.LONGROPE),
            "scaled in an unknown way",
        ),
    ],
)
def test_a_gguf_with_missing_or_unsupported_parts_is_rejected(
    change: Change, words: str, model: PreTrainedModel, tokenizer: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write_gguf(model, tokenizer, tmp_path / "tiny.gguf", change=change)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(str(path))


def test_llama_3_texts_begin_with_the_begin_token_even_if_the_gguf_does_not_say_so(
    model: PreTrainedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def silent(writer: GGUFWriter, tensors: dict[str, Any]) -> None:
        del writer.kv_data[0]["tokenizer.ggml.add_bos_token"]

    path = write_gguf(model, tokenizer, tmp_path / "tiny.gguf", change=silent)
    assert load_checkpoint(str(path)).encode("hello")[0] == BEGIN
