"""Models of the hub: downloads, rejections before a download, and the cache."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fakes import byte_tokenizer
from support.gguf_families import CONTEXT, FAMILIES, family_model, write_family
from support.gguf_files import write_gguf
from support.llama3 import VOCABULARY, tokenizer_file
from support.models import tiny_llama
from support.processes import ROOT
from support.waiting import TIMEOUT, wait_for

from stream_generator.loading.meta_checkpoint import meta_tokenizer

TOKEN = "hf_of_a_test"
ROTARY = {"rope_type": "default", "rope_theta": 500000.0}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that downloads need. Serves `root`/name/revision."""

    def __init__(self, root: Path, requested: list[str], *args: Any):
        self._root, self._requested = root, requested
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        _, *parts = path.removeprefix("/api/models").split("/")
        name, what, revision, *rest_of_path = [*parts[1:], *["revision", "main"][len(parts) - 2 :]]
        rest = "/".join(rest_of_path)
        if name == "gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        by_commit = {commit(name, r.name): r for r in (self._root / name).glob("*")}
        folder = by_commit.get(revision, self._root / name / revision)
        if not folder.is_dir():
            missing = "RevisionNotFound" if by_commit else "RepoNotFound"
            return self._send(404, b"", {"X-Error-Code": missing})
        files = [p for p in folder.rglob("*") if p.is_file()]
        names = [str(p.relative_to(folder)) for p in files]
        facts = {"X-Repo-Commit": commit(name, folder.name)}
        if what == "revision":
            listed = [{"rfilename": n} for n in names]
            answer = {"id": f"org/{name}", "sha": commit(name, folder.name), "siblings": listed}
            return self._send(200, json.dumps(answer).encode(), facts)
        if what == "tree":
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": digest(p)}
                for n, p in zip(names, files, strict=True)
            ]
            return self._send(200, json.dumps(tree).encode(), facts)
        self._requested.append(f"{name}/{rest}")
        if rest not in names:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        facts["ETag"] = f'"{digest(folder / rest)}"'
        return self._send(200, (folder / rest).read_bytes(), facts)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def commit(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    model, tokenizer = tiny_llama(vocab_size=258), byte_tokenizer()

    def write(name: str, revision: str = "main", **options: Any) -> Path:
        folder = root / name / revision
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        return folder

    plain = write("plain")
    (plain / "onnx").mkdir()
    (plain / "onnx" / "model.safetensors").write_bytes(b"for another program")
    (plain / "pytorch_model.bin").write_bytes(b"the same again")
    write("sharded", max_shard_size="100KB")
    newer = write("plain", "v2")
    change(newer / "config.json", max_position_embeddings=99)
    write("gated")
    change(write("remote") / "config.json", deep=[{"auto_map": {"AutoConfig": "x.Y"}}])
    leading = write("leading") / "model.safetensors.index.json"
    leading.write_text(json.dumps({"weight_map": {"a": "../../b"}}))
    pickled = write("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    change(write("reward") / "config.json", architectures=["LlamaForSequenceClassification"])
    change(write("mlx") / "config.json", quantization={"group_size": 64, "bits": 4})
    (root / "adapter" / "main").mkdir(parents=True)
    adapter = json.dumps({"base_model_name_or_path": "org/base"})
    (root / "adapter" / "main" / "adapter_config.json").write_text(adapter)
    (root / "adapter" / "main" / "adapter_model.safetensors").write_bytes(b"an adapter")
    ggufs = root / "ggufs" / "main"
    ggufs.mkdir(parents=True)
    for n in "ab":
        (ggufs / f"{n}.gguf").write_bytes(b"GGUF but cut off")
    words = meta_tokenizer(tokenizer_file(root / "tokenizer.model"))
    tiny = tiny_llama(vocab_size=VOCABULARY, rms_norm_eps=1e-5, rope_parameters=ROTARY)
    (root / "converted" / "main" / "deeper").mkdir(parents=True)
    write_gguf(tiny, words, root / "converted" / "main" / "deeper" / "tiny.gguf")
    (root / "split" / "main").mkdir(parents=True)
    family = FAMILIES["qwen2"]
    path = root / "split" / "main" / "parts.gguf"
    write_family(family, family_model(family), path, split_max_tensors=10)
    return root


def change(file: Path, **content: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


@pytest.fixture
def requested() -> list[str]:
    """The files that were requested from the hub."""
    return []


@pytest.fixture
def hub(models: Path, requested: list[str]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, models, requested))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    wait_for(thread)
    server.server_close()


SCRIPT = """
import sys
from stream_generator.loading.load import load_checkpoint
from stream_generator.errors import CheckpointError
for source in sys.argv[1:]:
    name, _, pickle = source.partition(" ")
    try:
        made = load_checkpoint(name, allow_pickle=bool(pickle))
        print("loaded", made.name, made.context_length)
    except CheckpointError as error:
        print("rejected", str(error).replace("\\n", " "))
"""


def load(sources: list[str], home: Path, **environment: str) -> list[str]:
    """Load in a new process, because the hub's library reads its address on import."""
    own = {"HF_HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *sources],
        cwd=ROOT,
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(sources), done.stdout + done.stderr
    return lines


def test_a_hub_model_is_downloaded_once_and_loads_offline(
    hub: str, requested: list[str], tmp_path: Path
) -> None:
    sources = ["org/plain", "org/plain@v2", "org/sharded", "org/converted:deeper/tiny.gguf"]
    sources.append("org/split:parts-00002-of-00003.gguf")
    expected = ["loaded org/plain 256", "loaded org/plain 99", "loaded org/sharded 256"]
    expected += ["loaded tiny 256", f"loaded parts {CONTEXT}"]
    assert load(sources, tmp_path, HF_ENDPOINT=hub) == expected
    assert {"plain/model.safetensors", "sharded/model.safetensors.index.json"} <= {*requested}
    assert not {"plain/onnx/model.safetensors", "plain/pytorch_model.bin"} & {*requested}
    requested.clear()
    assert load(sources, tmp_path, HF_HUB_OFFLINE="1") == expected
    assert requested == []


def test_a_rejected_hub_model_has_a_clear_error_and_is_not_downloaded(
    hub: str, requested: list[str], tmp_path: Path
) -> None:
    expected = {
        "org/nothing": "could not download org/nothing from the hub",
        "org/plain@v3": "could not download org/plain from the hub",
        "org/gated": "set HF_TOKEN",
        "org/remote": "auto_map",
        "org/leading": "not a plain file name",
        "org/pickled": "--allow-pickle",
        "org/reward": "no causal language model",
        "org/mlx": "packed for MLX",
        "org/adapter": "holds an adapter of org/base",
        "org/ggufs": "name one of them: org/ggufs:a.gguf, org/ggufs:b.gguf",
        "org/ggufs:c.gguf": "holds no c.gguf",
        "org/ggufs:a.gguf": "could not be read",
    }
    lines = load([*expected], tmp_path, HF_ENDPOINT=hub)
    for line, words in zip(lines, expected.values(), strict=True):
        assert line.startswith("rejected"), line
        assert words in line
    downloaded = {file.partition("/")[2] for file in requested}
    assert not {"model.safetensors", "pytorch_model.bin"} & downloaded, "rejected too late"
    offline = load(["org/plain"], tmp_path, HF_HUB_OFFLINE="1")
    assert "could not download org/plain from the hub" in offline[0]


def test_a_token_loads_a_gated_model_and_allow_pickle_loads_pickled_weights(
    hub: str, tmp_path: Path
) -> None:
    lines = load(["org/gated", "org/pickled pickle"], tmp_path, HF_ENDPOINT=hub, HF_TOKEN=TOKEN)
    assert lines == ["loaded org/gated 256", "loaded org/pickled 256"]


def test_a_download_that_exceeds_the_free_disk_space_is_rejected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from stream_generator.errors import CheckpointError
    from stream_generator.loading import hub as module

    class Planned:
        file_size, will_download = 16_000_000_000, True

    def plan(*args: Any, dry_run: bool = False, **options: Any) -> Any:
        assert dry_run, "the model is downloaded in spite of the full disk"
        return [Planned()]

    monkeypatch.setattr(module, "snapshot_download", plan)
    monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5_000_000_000})
    )
    with pytest.raises(CheckpointError, match=r"takes 16\.0 GB of disk .* 5\.0 GB are free"):
        module.download_model("org/large", None)
