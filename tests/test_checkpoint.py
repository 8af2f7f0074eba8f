"""What --ckpts takes, what it refuses, and the facts read off a model."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from fakes import END, FakeModel, byte_tokenizer, fake_checkpoint, says
from safetensors.torch import load_file, save_file

from stream_generator.checkpoint import Checkpoint, load_checkpoint, preferred_dtype
from stream_generator.errors import CheckpointError
from stream_generator.generate import stream_generate
from stream_generator.sampling_params import SamplingParams

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as people have it on disk."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    model = tiny_llama(vocab_size=258, eos_token_id=[END, 99])
    model.generation_config.update(temperature=0.7, top_p=0.8, top_k=-5, do_sample=True)
    # The odd value is written behind transformers' back, as it is in some real checkpoints.
    model.generation_config.top_k = None
    model.save_pretrained(directory)
    config = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps({**config, "top_k": -5}))
    byte_tokenizer().save_pretrained(directory)
    return directory


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
    assert checkpoint.model.dtype == preferred_dtype()
    assert not checkpoint.model.training
    assert checkpoint.context_length == 256
    assert checkpoint.vocab_size == 258
    assert checkpoint.end_ids == {END, 99}
    assert checkpoint.defaults == SamplingParams.model_construct(
        temperature=0.7, top_p=0.8, do_sample=True
    )
    assert "top_k=-5" in caplog.text
    outputs = stream_generate(checkpoint.model, checkpoint.tokenizer, [1, 2, 3], max_new_tokens=3)
    assert len(list(outputs)) == 3


def test_the_end_ids_are_those_of_all_sources_together() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    model = FakeModel(says(""))
    model.generation_config.eos_token_id = [7, 8]
    model.config.eos_token_id = 9
    assert Checkpoint.of(model, tokenizer).end_ids == {7, 8, 9, END, END + 2}


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
        (("tokenizer.json", "tokenizer_config.json"), "could not load"),
    ],
)
def test_an_incomplete_directory_is_refused_with_what_is_taken(
    saved: Path, tmp_path: Path, missing: tuple[str, ...], words: str
) -> None:
    directory = copy_without(saved, tmp_path / "model", *missing)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(str(directory))


def test_pickled_weights_are_not_loaded(saved: Path, tmp_path: Path) -> None:
    directory = copy_without(saved, tmp_path / "model", "model.safetensors")
    torch.save(tiny_llama(vocab_size=258).state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_checkpoint(str(directory))


def test_code_of_a_checkpoint_is_not_run(saved: Path, tmp_path: Path) -> None:
    directory = copy_without(saved, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError):
        load_checkpoint(str(directory))
    assert not (tmp_path / "ran").exists()


def test_damaged_weights_are_a_clear_error(saved: Path, tmp_path: Path) -> None:
    directory = copy_without(saved, tmp_path / "model")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="could not load"):
        load_checkpoint(str(directory))


def test_weights_that_are_not_there_are_not_made_up(saved: Path, tmp_path: Path) -> None:
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
        (__file__, "is no GGUF file"),
        ("not a valid id!", "does not exist"),
    ],
)
def test_what_is_no_model_is_named(source: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(source)


class Hub(SimpleHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download needs, over a directory of models."""

    commit = "0" * 40

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        root = Path(self.directory)
        if self.path.startswith("/api/models/"):
            name = self.path.removeprefix("/api/models/").split("/")[1].split("?")[0]
            files = [{"rfilename": p.name} for p in (root / name).glob("*")]
            listing: Any = {"id": f"org/{name}", "sha": self.commit, "siblings": files}
            if "/tree/" in self.path:
                listing = []
            return self._send(200, json.dumps(listing).encode(), with_body)
        _, _, name, _, _, file = self.path.split("?")[0].split("/", 5)
        path = root / name / file
        if not path.is_file():
            return self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{hash(data) & 0xFFFF:x}"'}
        return self._send(200, data, with_body, headers)

    def _send(
        self, status: int, data: bytes, with_body: bool, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(saved: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(saved.parent)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def load_elsewhere(source: str, tmp_path: Path, **environment: str) -> Any:
    """Load in a process of its own: the hub's address is read when its library is imported."""
    script = (
        "import sys; from stream_generator.checkpoint import load_checkpoint\n"
        "from stream_generator.errors import CheckpointError\n"
        "try: print('loaded', load_checkpoint(sys.argv[1]).name)\n"
        "except CheckpointError as error: print('refused', error)"
    )
    return subprocess.run(
        [sys.executable, "-c", script, source],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_hub_id_is_downloaded_and_then_found_offline(hub: str, tmp_path: Path) -> None:
    first = load_elsewhere("org/tiny-llama", tmp_path, HF_ENDPOINT=hub)
    assert first.stdout.splitlines()[-1:] == ["loaded org/tiny-llama"], first.stderr
    again = load_elsewhere("org/tiny-llama", tmp_path, HF_HUB_OFFLINE="1")
    assert again.stdout.splitlines()[-1:] == ["loaded org/tiny-llama"], again.stderr


def test_a_hub_id_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    result = load_elsewhere("org/tiny-llama", tmp_path, HF_HUB_OFFLINE="1")
    assert result.stdout.startswith("refused could not load org/tiny-llama"), result.stderr
    assert "--ckpts takes a directory" in result.stdout


def test_a_base_model_has_no_chat_but_its_facts_are_there() -> None:
    checkpoint = Checkpoint.of(FakeModel(says("")), byte_tokenizer(chat_template=None))
    assert checkpoint.context_length == 512
    assert fake_checkpoint(says("")).defaults.do_sample is False
