"""A GGUF file of each architecture, with each option, is loaded right, or is rejected by name."""

from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGUFWriter, Keys
from support.gguf_families import (
    END,
    FAMILIES,
    MESSAGE,
    ORIGINAL,
    TURN,
    Change,
    Kind,
    Tensors,
    difference,
    family_logits,
    family_model,
    rounded,
    write_family,
)
from support.gguf_options import CASES, OPTIONS, QWEN_AS_LLAMA

from stream_generator.errors import CheckpointError
from stream_generator.loading.gguf.architectures import ARCHITECTURES
from stream_generator.loading.load import load_checkpoint

IDS = torch.arange(20, 60)
EXACT = 1e-5  # the largest difference of logits, if the weights are equal
IN_EIGHT_BITS = 0.06  # if a graph rounds the inputs of products


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(("option", "family"), CASES)
def test_each_architecture_gives_the_logits_of_its_model_with_each_option(
    option: str, family: str, tmp_path: Path
) -> None:
    model = family_model(FAMILIES[family], **OPTIONS[option].config)
    path = tmp_path / "model.gguf"
    write_family(FAMILIES[family], model, path, change=OPTIONS[option].change)
    loaded = load_checkpoint(str(path), "none", dtype="float32")
    assert difference(family_logits(loaded, IDS), family_logits(model, IDS)) < EXACT


def test_the_long_factors_of_a_file_are_right_beyond_the_original_context(tmp_path: Path) -> None:
    family, option = FAMILIES["phi3"], OPTIONS["partial longrope"]
    model = family_model(family, **option.config)
    path = write_family(family, model, tmp_path / "model.gguf", change=option.change)
    loaded = load_checkpoint(str(path), "none", dtype="float32")
    for length in (ORIGINAL, ORIGINAL + 1):
        ids = torch.arange(length) % 250
        ours, theirs = family_logits(loaded, ids), family_logits(model, ids)
        assert difference(ours[-1], theirs[-1]) < EXACT


def test_every_known_architecture_is_tested() -> None:
    assert {family.architecture for family in FAMILIES.values()} == ARCHITECTURES.keys()


def test_a_llama_file_with_biases_in_three_products_is_right(tmp_path: Path) -> None:
    model = family_model(QWEN_AS_LLAMA)
    for kind in (Kind.F32, Kind.Q8_0):
        path = write_family(QWEN_AS_LLAMA, model, tmp_path / f"{kind.name}.gguf", kind)
        loaded = load_checkpoint(str(path), dtype="float32")
        rounded(model, kind)
        found = difference(family_logits(loaded, IDS), family_logits(model, IDS))
        assert found < (EXACT if kind is Kind.F32 else IN_EIGHT_BITS)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
def test_dense_weights_keep_the_dtype_of_floats(kind: Kind, tmp_path: Path) -> None:
    family = FAMILIES["gemma2"]
    path = write_family(family, family_model(family), tmp_path / "model.gguf", kind)
    dtypes = {Kind.F32: "float32", Kind.F16: "float16"}
    model = load_checkpoint(str(path), "none", dtype="auto").model
    assert model.config.dtype is not None
    config = next((tmp_path / "cache").rglob("dense-*/config.json")).read_text()
    assert f'"dtype": "{dtypes.get(kind, "bfloat16")}"' in config


def test_every_end_token_that_the_file_names_ends_a_reply(tmp_path: Path) -> None:
    family = FAMILIES["phi3"]

    def named(writer: GGUFWriter, tensors: Tensors) -> None:
        writer.add_eot_token_id(TURN)
        writer.add_eom_token_id(MESSAGE)

    path = write_family(family, family_model(family), tmp_path / "model.gguf", change=named)
    loaded = load_checkpoint(str(path))
    assert loaded.end_ids == {END, TURN, MESSAGE}
    assert set(loaded.config.eos_token_id) == {END, TURN, MESSAGE}
    assert set(loaded.generation_config.eos_token_id) == {END, TURN, MESSAGE}


def value(key: str, number: float) -> Change:
    return lambda writer, tensors: writer.add_float32(f"llama.{key}", number)


def without(writer: GGUFWriter, key: str) -> None:
    del writer.kv_data[0][key]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (value("rope.foo", 2), r"llama\.rope\.foo \(2\.0\) is not known"),
        (value("attention.foo", 2), r"llama\.attention\.foo \(2\.0\) is not known"),
        (value("attention.clamp_kqv", 8), r"clamp_kqv \(8\.0\) is not known"),
        (value("logit_scale", 2), r"llama\.logit_scale \(2\.0\) is not known"),
        (value("rope.scaling.yarn_log_multiplier", 2), "yarn_log_multiplier"),
        (lambda w, t: w.add_rope_scaling_type(_Type("su")), r"unknown way \(su\)"),
        (lambda w, t: w.add_value_length(8), "heads of different sizes"),
        (lambda w, t: w.kv_data[0].update(_heads(w)), "layers differ in llama.attention.head_coun"),
        (lambda w, t: _rotate(w, 8), "it rotates 8 of 16 numbers of each head"),
        (lambda w, t: without(w, "llama.embedding_length"), "lacks the value llama.embedding_len"),
        (lambda w, t: t.update({"blk.0.attn_q_norm.weight": numpy.ones(16, "f4")}), "attn_q_norm"),
        (lambda w, t: t.pop("blk.1.attn_k.weight"), r"lacks 1 of its weights \(blk\.1\.attn_k"),
        (lambda w, t: t.pop("token_embd.weight"), "lacks the tensor token_embd"),
        (lambda w, t: t.update({"rope_freqs.weight": numpy.arange(1, 9).astype("f4")}), "Llama 3"),
        (lambda w, t: t.update({"blk.0.ffn_up.weight": numpy.ones((32, 64), "f4")}), "the shape"),
    ],
)
def test_what_is_not_understood_is_rejected_by_its_name(
    change: Change, words: str, tmp_path: Path
) -> None:
    family = FAMILIES["llama"]
    path = write_family(family, family_model(family), tmp_path / "model.gguf", change=change)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(str(path))


def test_an_unknown_architecture_is_rejected_with_the_known_ones(tmp_path: Path) -> None:
    family = FAMILIES["llama"]

    def renamed(writer: GGUFWriter, tensors: Tensors) -> None:
        writer.kv_data[0][Keys.General.ARCHITECTURE].value = "falcon"

    path = write_family(family, family_model(family), tmp_path / "model.gguf", change=renamed)
    with pytest.raises(CheckpointError, match=r"falcon is not known; known are llama, .*Hugging"):
        load_checkpoint(str(path))


class _Type:
    """A kind of scaling that the `gguf` package does not know."""

    def __init__(self, value: str):
        self.value = value


def _rotate(writer: GGUFWriter, count: int) -> None:
    writer.kv_data[0]["llama.rope.dimension_count"].value = count


def _heads(writer: GGUFWriter) -> dict[str, object]:
    without(writer, "llama.attention.head_count_kv")
    writer.add_head_count_kv([2, 4])
    return {}
