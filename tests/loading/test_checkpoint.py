"""Sources that --ckpts accepts and rejects, and the facts that are read from a model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fakes import END, TURN, FakeModel, byte_tokenizer, fake_checkpoint, says
from support.models import tiny_llama

from stream_generator.engine.engine import Engine
from stream_generator.engine.runners import runner_for
from stream_generator.errors import CheckpointError
from stream_generator.generate import stream_generate
from stream_generator.loaded_model import Checkpoint
from stream_generator.loading.load import load_checkpoint
from stream_generator.model.precision import preferred_dtype
from stream_generator.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a directory, as transformers saves it."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    model = tiny_llama(vocab_size=258, eos_token_id=[END, 99])
    model.generation_config.update(temperature=0.7, top_p=0.8, top_k=-5, do_sample=True)
    # Some real checkpoints have such a top_k, but transformers would not save it.
    model.generation_config.top_k = None
    model.save_pretrained(directory)
    config = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps({**config, "top_k": -5}))
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_a_device_map_may_place_layers_on_the_disk(saved: Path) -> None:
    """Every machine has a disk, and other devices use the same hooks."""
    parts = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]
    devices: dict[str, str | int] = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    devices["model.layers.1"] = "disk"
    distributed = load_checkpoint(str(saved), dtype="float32", device_map=devices)
    assert distributed.model.hf_device_map["model.layers.1"] == "disk"
    whole = load_checkpoint(str(saved), "none", dtype="float32")
    params = SamplingParams(temperature=0, max_new_tokens=12)
    ids = []
    for checkpoint in (distributed, whole):
        engine = Engine(checkpoint, runner=runner_for(checkpoint.model, 64))
        stream = engine.submit([1, 2, 3], params)
        while engine.step():
            pass
        ids.append([output.choice.token_id for output in stream if output.choice])
    assert ids[0] == ids[1]
    assert ids[0]


def test_a_device_map_does_not_change_the_dtype(saved: Path) -> None:
    placed = load_checkpoint(str(saved), device_map={"": "cpu"})
    assert placed.model.dtype is load_checkpoint(str(saved)).model.dtype


def test_an_unknown_device_is_a_clear_error(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="--device meteor cannot be used here"):
        load_checkpoint(str(saved), device="meteor")


def test_an_end_id_outside_the_vocabulary_is_described_by_its_number() -> None:
    model = FakeModel(says(""))
    model.generation_config.eos_token_id = [END, 300]
    assert "id 300" in Checkpoint.of(model, byte_tokenizer()).describe()


def test_the_memory_check_counts_only_loaded_weights_in_the_loaded_dtype(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of another program do not count. Weights that become twice as large count twice."""
    directory = copy_without(saved, tmp_path / "model")
    weights = (directory / "model.safetensors").stat().st_size
    (directory / "consolidated.safetensors").write_bytes(b"x" * weights)
    monkeypatch.setattr(
        "stream_generator.loading.transformers_model.free_memory", lambda device: weights
    )
    assert load_checkpoint(str(directory), dtype="float32").parameters
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with pytest.raises(CheckpointError, match="of memory"):
        load_checkpoint(str(directory), dtype="float32")


def test_a_missing_weights_file_is_named_in_the_error(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny_llama(vocab_size=258).save_pretrained(directory, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(directory)
    first = sorted(directory.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of \d+ weight files \({first.name}"):
        load_checkpoint(str(directory))


def test_a_checkpoint_without_read_permission_is_a_clear_error(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(directory: Path) -> None:
        raise PermissionError(13, "Permission denied", str(directory))

    monkeypatch.setattr("stream_generator.loading.load.reject_unsafe", reject)
    with pytest.raises(CheckpointError, match=r"could not read .*Permission denied"):
        load_checkpoint(str(saved))


def test_an_unknown_device_in_a_device_map_is_a_clear_error(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="could not load"):
        load_checkpoint(str(saved), device_map={"": "gpu:7"})


def copy_without(saved: Path, target: Path, *names: str) -> Path:
    target.mkdir()
    for file in saved.iterdir():
        if file.name not in names:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_directory_loads_and_its_facts_are_read(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = load_checkpoint(str(saved))
    assert checkpoint.name == "tiny-llama"
    assert checkpoint.model.dtype == preferred_dtype(on_cpu=not torch.cuda.is_available())
    assert not checkpoint.model.training
    assert checkpoint.context_length == 256
    assert checkpoint.vocab_size == 258
    assert checkpoint.end_ids == {END, TURN, 99}
    assert checkpoint.defaults == SamplingParams.model_construct(
        temperature=0.7, top_p=0.8, do_sample=True
    )
    assert "top_k=-5" in caplog.text
    outputs = stream_generate(checkpoint.model, checkpoint.tokenizer, [1, 2, 3], max_new_tokens=3)
    assert len(list(outputs)) == 3


def test_end_ids_come_from_the_tokenizer_and_both_configurations() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    model = FakeModel(says(""))
    model.generation_config.eos_token_id = [7, 8]
    model.config.eos_token_id = 9
    assert Checkpoint.of(model, tokenizer).end_ids == {7, 8, 9, END, TURN, TURN + 1}


def test_a_relative_path_and_a_home_path_work(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    monkeypatch.setenv("HOME", str(saved.parent))
    for source in ("tiny-llama", "./tiny-llama", "~/tiny-llama", "tiny-llama/"):
        assert load_checkpoint(source).name == "tiny-llama"


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (("config.json",), "holds no checkpoint"),
        (("model.safetensors",), "could not load"),
        (
            ("tokenizer.json", "tokenizer_config.json"),
            "has no tokenizer.*tokenizer.json, tokenizer.m",
        ),
    ],
)
def test_an_incomplete_directory_is_rejected(
    saved: Path, tmp_path: Path, missing: tuple[str, ...], words: str
) -> None:
    directory = copy_without(saved, tmp_path / "model", *missing)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(str(directory))


def test_code_in_a_checkpoint_is_not_run(saved: Path, tmp_path: Path) -> None:
    directory = copy_without(saved, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError):
        load_checkpoint(str(directory))
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_rejected(saved: Path, tmp_path: Path) -> None:
    directory = copy_without(saved, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 of its weights"):
        load_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/no/such/directory", "does not exist"),
        ("./nowhere", "does not exist"),
        (__file__, "is not a GGUF file"),
        ("not a valid id!", "does not exist"),
    ],
)
def test_a_source_that_is_no_model_is_a_clear_error(source: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(source)


def test_a_base_model_loads_without_a_chat_template() -> None:
    checkpoint = Checkpoint.of(FakeModel(says("")), byte_tokenizer(chat_template=None))
    assert not checkpoint.chat.can_chat
    assert "only completions work" in checkpoint.describe()


def test_a_greedy_generation_config_makes_greedy_defaults() -> None:
    assert fake_checkpoint(says("")).defaults.do_sample is False
