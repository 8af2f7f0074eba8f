"""A directory that is no causal language model is rejected by what it is, with the remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fakes import byte_tokenizer
from support.models import tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from stream_generator.errors import CheckpointError
from stream_generator.loading.load import load_checkpoint
from stream_generator.loading.weights import SafetensorsWeights
from stream_generator.model.graph_session import GraphSession
from stream_generator.model.saved_graph import STEP

SHAPE: dict[str, Any] = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128}
POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f"
    "32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
UP = "model.layers.1.mlp.up_proj.weight"
EXECUTORS = ["none", "int8"]  # dense, and the packed graph

Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, tied in (("plain", False), ("tied", True)):
        tiny_llama(**SHAPE, tie_word_embeddings=tied).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "plain", tmp_path / "model")


@pytest.fixture
def tied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "tied", tmp_path / "tied")


def load(directory: Path, quantize: str) -> Any:
    return load_checkpoint(
        str(directory), quantize, dtype="float32" if quantize == "none" else "auto"
    )


def reason(directory: Path, quantize: str = "none", **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(directory), quantize, **options)
    message = str(caught.value)
    assert "download it again" not in message
    return message


def change_weights(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.inference_mode()
def logits(checkpoint: Any) -> torch.Tensor:
    return checkpoint.model(torch.tensor([[5, 6, 7]])).logits


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"]
)
def test_a_git_lfs_pointer_is_named_with_the_command(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    assert f"{name} is a git-lfs pointer" in (message := reason(model))
    assert "git lfs pull" in message


def test_a_pointer_among_several_weight_files_is_named(tmp_path: Path) -> None:
    model = tiny_llama(**SHAPE)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    last = sorted((tmp_path / "model").glob("model-*.safetensors"))[-1]
    last.write_text(POINTER)
    assert f"{last.name} is a git-lfs pointer" in reason(tmp_path / "model")


def test_a_pointer_in_place_of_a_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text(POINTER)
    assert "is a git-lfs pointer" in reason(tmp_path / "model.gguf")


def test_a_web_page_in_place_of_a_file_is_named(model: Path) -> None:
    (model / "tokenizer.json").write_text("<!DOCTYPE html>\n<html></html>")
    assert "tokenizer.json is a web page" in reason(model)


@pytest.mark.parametrize("quantize", EXECUTORS)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name}",
    ],
)
def test_names_of_wrappers_are_removed_from_the_names_of_weights(
    model: Path, saved: Path, quantize: str, wrap: Callable[[str], str]
) -> None:
    change_weights(model, lambda weights: {wrap(name): w for name, w in weights.items()})
    assert load(model, quantize).parameters
    assert logits(load(model, "none")).equal(logits(load(saved / "plain", "none")))


def test_names_of_wrappers_are_removed_from_pickled_weights(model: Path, saved: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        wrapped = {f"module.{name}": weight for name, weight in weights.items()}
        torch.save(wrapped, model / "pytorch_model.bin", **options)
        loaded = load_checkpoint(str(model), "none", dtype="float32", allow_pickle=True)
        assert logits(loaded).equal(logits(load(saved / "plain", "none")))
    message = reason(model, "int8", allow_pickle=True)
    assert "its weights are pickled" in message
    assert "leave --quantize out" in message


def config_of(kind: str, **changes: Any) -> Any:
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_layers": 1, "d_ff": 32,
             "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "d_kv": 8,
             "intermediate_size": 32, "num_heads": 4, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4}  # fmt: skip
    return AutoConfig.for_model(kind, vocab_size=258, **small | changes)


OTHER_KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "a reward model": (
        lambda: LlamaForSequenceClassification(tiny_llama(**SHAPE).config),
        "a reward or classification model (LlamaForSequenceClassification)",
    ),
    "a token classifier": (
        lambda: LlamaForTokenClassification(tiny_llama(**SHAPE).config), "classifies tokens",
    ),
    "an embedding model": (lambda: LlamaModel(tiny_llama(**SHAPE).config), "for embeddings"),
    "BERT": (lambda: AutoModelForMaskedLM.from_config(config_of("bert")), "an encoder"),
    "BART": (
        lambda: AutoModelForSeq2SeqLM.from_config(config_of("bart")), "an encoder-decoder model",
    ),
    "T5": (
        lambda: AutoModelForSeq2SeqLM.from_config(config_of("t5")), "an encoder-decoder model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_model_of_another_kind_is_rejected_by_what_it_is(tmp_path: Path, kind: str) -> None:
    make, words = OTHER_KINDS[kind]
    make().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    for architectures in ({}, {"architectures": None}):
        change_config(tmp_path / "model", **architectures)
        message = reason(tmp_path / "model")
        if not architectures:
            assert words in message
            assert "no causal language model" in message


def test_an_encoder_without_named_classes_is_rejected(tmp_path: Path) -> None:
    AutoModelForMaskedLM.from_config(config_of("roberta")).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    change_config(tmp_path / "model", architectures=None)
    assert "an encoder (roberta)" in reason(tmp_path / "model")


def test_a_model_for_sentence_transformers_is_rejected(tied: Path) -> None:
    (tied / "config_sentence_transformers.json").write_text("{}")
    assert "an embedding model" in reason(tied)


@pytest.mark.parametrize("quantize", EXECUTORS)
@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("score.weight", (1, 64), "a reward or classification model (score.weight)"),
        ("classifier.weight", (2, 64), "a reward or classification model"),
        ("model.layers.0.self_attn.q_proj.bias", (64,), "attention_bias"),
        ("model.layers.0.mlp.up_proj.bias", (128,), "mlp_bias"),
        ("model.layers.2.mlp.up_proj.weight", (128, 64), "that its config.json does not use"),
        ("model.layers.0.self_attn.q_norm.weight", (16,), "that its config.json does not use"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (8, 64), "an adapter that is not merged"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", (1, 1), "packed weights"),
    ],
)
def test_weights_that_would_be_dropped_are_rejected(
    tied: Path, quantize: str, name: str, shape: tuple[int, ...], words: str
) -> None:
    """The model is tied, so that no weight is missing."""
    change_weights(tied, lambda weights: weights | {name: torch.ones(shape)})
    assert words in (message := reason(tied, quantize))
    assert name in message


@pytest.mark.parametrize("quantize", EXECUTORS)
@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight"]
)
def test_weights_that_no_reply_needs_are_ignored(tied: Path, quantize: str, name: str) -> None:
    change_weights(tied, lambda weights: weights | {name: torch.ones(8)})
    assert load(tied, quantize).parameters


@pytest.mark.parametrize("quantize", EXECUTORS)
def test_missing_weights_are_rejected_by_name(model: Path, quantize: str) -> None:
    change_weights(model, lambda weights: {n: w for n, w in weights.items() if n != UP})
    assert f"lacks 1 of its weights ({UP}" in reason(model, quantize)


@pytest.mark.parametrize("quantize", EXECUTORS)
def test_a_missing_output_matrix_is_rejected_if_it_is_not_the_embedding(
    tied: Path, quantize: str
) -> None:
    assert load(tied, quantize).parameters
    change_config(tied, tie_word_embeddings=False)
    assert "lacks lm_head.weight" in (message := reason(tied, quantize))
    assert "tie_word_embeddings" in message


def test_a_stored_output_matrix_is_used_though_the_config_calls_it_the_embedding(
    model: Path, saved: Path
) -> None:
    """transformers uses both matrices if their values differ, and so does the graph."""
    change_config(model, tie_word_embeddings=True)
    assert logits(load(model, "none")).equal(logits(load(saved / "plain", "none")))
    graphs = [load(path, "int8").graph for path in (model, saved / "plain")]
    weights = [(graph / "weights.bin") for graph in graphs]
    assert all(GraphSession(graph / STEP) for graph in graphs)
    assert weights[0].read_bytes() == weights[1].read_bytes()


def write_adapter(directory: Path, *, weights: bool, base: str | None = "org/Base-7B") -> None:
    directory.mkdir(exist_ok=True)
    content = {"peft_type": "LORA", "base_model_name_or_path": base}
    (directory / "adapter_config.json").write_text(json.dumps(content))
    if weights:
        save_file({"a": torch.ones(1)}, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(("base", "named"), [("org/Base-7B", "org/Base-7B"), (None, "an unnamed")])
def test_an_adapter_is_rejected_with_its_base_model_and_the_remedy(
    tmp_path: Path, weights: bool, base: str | None, named: str
) -> None:
    write_adapter(tmp_path / "adapter", weights=weights, base=base)
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    message = reason(tmp_path / "adapter")
    assert f"holds an adapter of {named}" in message
    assert "merge_and_unload" in message


def test_an_adapter_with_the_configuration_of_its_base_is_rejected(model: Path) -> None:
    (model / "model.safetensors").unlink()
    write_adapter(model, weights=True)
    assert "holds an adapter of org/Base-7B" in reason(model)


def test_a_merged_model_may_hold_the_configuration_of_its_adapter(
    model: Path, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(model, weights=False)
    with caplog.at_level("INFO"):
        loaded = load(model, "none")
    assert "ignoring adapter_config.json" in caplog.text
    assert logits(loaded).equal(logits(load(saved / "plain", "none")))


def test_a_whole_model_with_an_adapter_beside_it_is_rejected(model: Path) -> None:
    """Whether the adapter applies to the model cannot be known."""
    write_adapter(model, weights=True)
    assert "a whole model and an adapter" in reason(model)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_only_weights_that_are_cut_off_are_to_be_downloaded_again(model: Path, kept: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut off.*download it again"):
        load_checkpoint(str(model))


def test_the_embedding_is_read_as_the_output_matrix_only_if_they_are_tied(tied: Path) -> None:
    files = [tied / "model.safetensors"]
    weights = SafetensorsWeights(files, tied=True)
    assert weights.dense("lm_head.weight").equal(weights.dense("model.embed_tokens.weight"))
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        SafetensorsWeights(files).dense("lm_head.weight")
