"""Every layout of a checkpoint gives the same model, and damaged ones are rejected."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gguf_files import interleave_rotary_pairs, write_gguf
from support.llama3 import (
    BEGIN,
    END,
    END_OF_MESSAGE,
    END_OF_TURN,
    VOCABULARY,
    tokenizer_file,
)
from support.models import tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from stream_generator.errors import CheckpointError
from stream_generator.loaded_model import Checkpoint
from stream_generator.loading.graph_build import build_graph
from stream_generator.loading.layout import locate, weights_in
from stream_generator.loading.load import load_checkpoint
from stream_generator.loading.meta_checkpoint import meta_tokenizer
from stream_generator.loading.untrusted import reject_unsafe
from stream_generator.loading.weights import PackedOnRead, SafetensorsWeights
from stream_generator.model.packed_weight import packed_size
from stream_generator.model.saved_graph import WEIGHTS

HEADS, KEY_HEADS, SIZE, LAYERS, HIDDEN = 4, 2, 16, 2, 64
SCALED = {
    "rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": 8192,
    },
    "llama-3.1": {
        "rope_parameters": {**SCALED, "factor": 8.0}, "max_position_embeddings": 131072,
    },
    "llama-3.2": {
        "rope_parameters": {**SCALED, "factor": 32.0}, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
MESSAGES: Any = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "\n彩虹 🌈 is <|eot_id|> what?  "},
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return meta_tokenizer(tokenizer_file(tmp_path_factory.mktemp("words") / "tokenizer.model"))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    """A small Llama 3 whose weights bfloat16 represents exactly."""
    made = tiny_llama(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, bos_token_id=BEGIN,
        eos_token_id=[END, END_OF_MESSAGE, END_OF_TURN], pad_token_id=None, rms_norm_eps=1e-5,
        **FAMILIES[family],
    )  # fmt: skip
    for parameter in made.parameters():  # not the rotary frequencies, which are buffers
        parameter.data = parameter.data.bfloat16().float()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, family: str) -> Path:
    return tmp_path_factory.mktemp(family)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_hugging_face(model: PreTrainedModel, tokenizer: Any, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    tokenizer.save_pretrained(path)
    return path


def write_meta(model: PreTrainedModel, path: Path, shards: int) -> Path:
    path.mkdir()
    config, state = model.config, model.state_dict()
    tokenizer_file(path / "tokenizer.model")
    params = {
        "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KEY_HEADS,
        "vocab_size": VOCABULARY, "norm_eps": 1e-5, "rope_theta": 500000.0, "multiple_of": 32,
        "use_scaled_rope": config.rope_parameters["rope_type"] == "llama3",
    }  # fmt: skip
    (path / "params.json").write_text(json.dumps(params))
    whole: dict[str, tuple[torch.Tensor, int | None]] = {
        "tok_embeddings": (state["model.embed_tokens.weight"], 0),
        "norm": (state["model.norm.weight"], None),
        "output": (state["lm_head.weight"], 0),
    }
    for n in range(LAYERS):
        theirs, ours = f"layers.{n}.", f"model.layers.{n}."
        for name, source, along in (
            ("attention.wv", "self_attn.v_proj", 0), ("attention.wo", "self_attn.o_proj", 1),
            ("feed_forward.w1", "mlp.gate_proj", 0), ("feed_forward.w2", "mlp.down_proj", 1),
            ("feed_forward.w3", "mlp.up_proj", 0), ("attention_norm", "input_layernorm", None),
            ("ffn_norm", "post_attention_layernorm", None),
        ):  # fmt: skip
            whole[theirs + name] = (state[f"{ours}{source}.weight"], along)
        queries, keys = (state[f"{ours}self_attn.{k}_proj.weight"] for k in "qk")
        whole[theirs + "attention.wq"] = (interleave_rotary_pairs(queries, HEADS), 0)
        whole[theirs + "attention.wk"] = (interleave_rotary_pairs(keys, KEY_HEADS), 0)
    for number in range(shards):
        part = {
            f"{name}.weight": (w if along is None else w.chunk(shards, along)[number]).clone()
            for name, (w, along) in whole.items()
        }
        part["rope.freqs"] = torch.zeros(SIZE // 2)
        torch.save({k: v.bfloat16() for k, v in part.items()}, path / f"consolidated.0{number}.pth")
    return path


def write(layout: str, model: PreTrainedModel, tokenizer: Any, folder: Path) -> str:
    path = folder / layout.replace(" ", "-")
    if layout == "hugging face":
        return str(write_hugging_face(model, tokenizer, path))
    if layout == "sharded":
        return str(write_hugging_face(model, tokenizer, path, max_shard_size="5MB"))
    if layout.startswith("meta"):
        return str(write_meta(model, path, shards=int(layout[-1])))
    return str(write_gguf(model, tokenizer, folder / "tiny.gguf"))


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], steps: int = 24) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


LAYOUTS = ["hugging face", "sharded", "meta 1", "meta 2", "gguf"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(
    layout: str, family: str, model: PreTrainedModel, tokenizer: Any, folder: Path
) -> None:
    loaded = load_checkpoint(write(layout, model, tokenizer, folder), "none", dtype="float32")
    prompt = tokenizer.encode("The rainbow 彩虹 " * 40)  # long enough to show wrong rotations
    assert loaded.tokenizer.encode("The rainbow 彩虹 " * 40) == prompt
    assert prompt.count(BEGIN) == 1
    assert greedy(loaded.model, prompt) == greedy(model, prompt)
    assert {END, END_OF_MESSAGE, END_OF_TURN} <= loaded.end_ids
    assert loaded.context_length == FAMILIES[family]["max_position_embeddings"]
    assert loaded.model.config.rope_parameters["rope_type"] == (
        "default" if family == "llama-3" else "llama3"
    )
    assert bool(loaded.model.config.tie_word_embeddings) == (family == "llama-3.2")
    description = loaded.describe()
    assert "LlamaForCausalLM" in description
    assert "float32 on cpu" in description
    assert "<|eot_id|>" in description


def test_transformers_loads_the_same_model_from_a_converted_meta_checkpoint(
    model: PreTrainedModel, tokenizer: Any, tmp_path: Path
) -> None:
    converted = locate(str(write_meta(model, tmp_path / "Meta-Tiny", shards=2))).directory
    plain = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert plain.state_dict()[name].equal(weight), name


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_llama(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, rms_norm_eps=1e-5,
        **FAMILIES["llama-3"],
    )  # fmt: skip
    return write_meta(made, tmp_path_factory.mktemp("meta") / "Meta-Llama-3-Tiny", shards=1)


def test_a_meta_checkpoint_uses_metas_chat_format(meta: Path) -> None:
    loaded = load_checkpoint(str(meta), "none")
    assert loaded.name == "Meta-Llama-3-Tiny"
    assert "Meta's original layout" in loaded.describe()
    assert "built in (Llama 3)" in loaded.describe()
    assert (loaded.defaults.temperature, loaded.defaults.top_p) == (0.6, 0.9)
    text = loaded.tokenizer.decode(loaded.chat.encode(MESSAGES))
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n Be brief.\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n\n彩虹 🌈 is <|eot_id|> what?  <|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = loaded.chat.encode(MESSAGES)
    assert ids.count(END_OF_TURN) == 2, "a name in a message is text"
    continued = loaded.chat.encode([*MESSAGES, {"role": "assistant", "content": "It"}])
    assert loaded.tokenizer.decode(continued).endswith("\n\nIt")


def damaged(meta: Path, target: Path, **changes: bytes | None) -> str:
    target.mkdir()
    for file in meta.iterdir():
        data = changes.get(file.name.replace(".", "_"), file.read_bytes())
        if data is not None:
            (target / file.name).write_bytes(data)
    return str(target)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer_model": None}, "lacks tokenizer.model"),
        ({"params_json": b"{"}, "not a Llama 3 checkpoint"),
        ({"params_json": b"{}"}, "not a Llama 3 checkpoint"),
        ({"consolidated_00_pth": b"cut"}, "not a Llama 3 checkpoint"),
        ({"consolidated_00_pth": b"PK\x03\x04" + b"\0" * 500}, "not a Llama 3 checkpoint"),
    ],
)
def test_a_damaged_meta_checkpoint_is_a_clear_error_and_leaves_nothing_in_the_cache(
    meta: Path, tmp_path: Path, changes: dict[str, bytes | None], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(damaged(meta, tmp_path / "damaged", **changes))
    kept = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert kept == []


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploited"),))


def test_code_in_a_meta_checkpoint_is_not_run(
    meta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = damaged(meta, tmp_path / "hostile")
    torch.save({"tok_embeddings.weight": Exploit()}, Path(path) / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="not a Llama 3 checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "exploited").exists()


def test_a_directory_of_ggufs_is_accepted_only_if_it_holds_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"name one of them: a\.gguf, b\.gguf"):
        locate(str(tmp_path))
    (tmp_path / "b.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"a\.gguf could not be read"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "could not be read"),
        (b"GGUF\x03\0\0\0" + b"\0" * 16, "could not be read"),
        (b"not a GGUF", "is not a GGUF file; --ckpts takes"),
    ],
)
def test_a_file_that_is_no_valid_gguf_is_a_clear_error(
    data: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(str(tmp_path / "model.gguf"))


def test_a_meta_checkpoint_is_converted_once(meta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = locate(str(meta))

    def reject(*args: Any, **options: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(torch, "load", reject)
    assert locate(str(meta)) == first


def checkpoint_with(tmp_path: Path, name: str, content: object) -> str:
    path = tmp_path / "model"
    tiny_llama().save_pretrained(path)
    file = path / name
    old = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(old | content if isinstance(content, dict) else content))
    return str(path)


def test_links_out_of_a_checkpoint_are_rejected_outside_the_hub_cache(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("{}")
    path = Path(checkpoint_with(tmp_path, "config.json", {}))
    (path / "extra.txt").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        load_checkpoint(str(path))
    (path / "extra.txt").unlink()
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in path.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / file.name)
    reject_unsafe(snapshot)


# The model takes 328,000 bytes in bfloat16, 191,000 in eight bits and 136,000 in four.
PACKABLE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
OTHER_HEADS = {"num_attention_heads": 8}
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
NONE = r"use a machine with more memory, or a smaller model$"


@pytest.mark.parametrize(
    ("free", "shape", "options", "remedy"),
    [
        (200_000, {}, {}, r"use --quantize int8 \(0\.0 GB\) or --quantize int4 \(0\.0 GB\)$"),
        (150_000, {}, {}, r"use --quantize int4 \(0\.0 GB\)$"),
        (150_000, {}, {"dtype": "bfloat16"}, r"use --quantize int4 \(0\.0 GB\) without --dtype$"),
        (100_000, {}, {}, NONE),
        (200_000, {}, {"device_map": "cpu"}, NONE),
        (200_000, OTHER_HEADS, {}, NONE),
        (200_000, DYNAMIC, {}, NONE),
    ],
)
def test_a_model_that_exceeds_the_memory_is_rejected_with_the_options_that_fit(
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    shape: dict[str, Any],
    options: dict[str, Any],
    remedy: str,
) -> None:
    tiny_llama(**PACKABLE | shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(
        "stream_generator.loading.transformers_model.free_memory", lambda device: free
    )
    with pytest.raises(CheckpointError, match=r"0\.\d GB of memory, but 0\.\d GB.*; " + remedy):
        load_checkpoint(str(tmp_path), **{"device": "cpu", **options})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_size_predicts_the_size_of_the_packed_weights(
    tmp_path: Path, bits: int, tied: bool
) -> None:
    model = tiny_llama(**PACKABLE | {"vocab_size": 1024, "tie_word_embeddings": tied})
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    weights = PackedOnRead(SafetensorsWeights(weights_in(tmp_path), tied=tied), bits)
    build_graph(model.config, weights, tmp_path / "graph")
    taken = (tmp_path / "graph" / WEIGHTS).stat().st_size
    assert packed_size(model.config, model.num_parameters(), bits) == pytest.approx(taken, rel=0.05)


def test_load_checkpoint_accepts_a_name_and_a_dtype(tmp_path: Path, tokenizer: Any) -> None:
    path = checkpoint_with(tmp_path, "config.json", {})
    tokenizer.save_pretrained(path)
    loaded: Checkpoint = load_checkpoint(path, name="mine", dtype="float16", device="cpu")
    assert loaded.name == "mine"
    assert loaded.model.dtype is torch.float16
