"""Harmful or truncated checkpoints: each is rejected with a clear message, and none runs code."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import byte_tokenizer
from support.models import tiny_llama

from stream_generator.errors import CheckpointError
from stream_generator.loading.gguf.header import checked_parameters
from stream_generator.loading.load import load_checkpoint
from stream_generator.text.chat import ChatFormat

Harm = Callable[[Path], object]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A valid checkpoint in Hugging Face format, which a test then damages."""
    folder = tmp_path / "model"
    tiny_llama(vocab_size=258).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def config(name: str = "config.json", **content: Any) -> Harm:
    def harm(folder: Path) -> None:
        file = folder / name
        old = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(old | content))

    return harm


def text(name: str, content: str) -> Harm:
    return lambda folder: (folder / name).write_text(content)


def weights(change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> Harm:
    """Rewrite the header of model.safetensors, or the data after it."""

    def harm(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header, rest = change(json.loads(data[8 : 8 + length]), data[8 + length :])
        encoded = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + rest)

    return harm


def raw_weights(data: Callable[[bytes], bytes]) -> Harm:
    def harm(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(data(file.read_bytes()))

    return harm


NORM = "model.norm.weight"


def lies(**fields: Any) -> Harm:
    """Change fields of one tensor in the header."""
    return weights(lambda header, rest: (header | {NORM: header[NORM] | fields}, rest))


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploited"),))


def pickled(content: Callable[[], object]) -> Harm:
    def harm(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content(), folder / "pytorch_model.bin")

    return harm


HARMS: dict[str, tuple[Harm, str]] = {
    "code in the config": (config(auto_map={"AutoConfig": "x.Y"}), "auto_map"),
    "code deep in the config": (config(text_config={"a": [{"auto_map": {}}]}), "auto_map"),
    "code for the tokenizer": (
        config("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}), "auto_map",
    ),
    "an index that leads up": (
        config("model.safetensors.index.json", weight_map={"a": "../../b"}), "plain file name",
    ),
    "an index that leads to the root": (
        config("model.safetensors.index.json", weight_map={"a": "/etc/passwd"}), "plain file name",
    ),
    "an index that asks for everything": (
        config("model.safetensors.index.json", weight_map={"a": "*"}), "plain file name",
    ),
    "an index of something else": (
        config("model.safetensors.index.json", weight_map=["a"]), "not an index of weights",
    ),
    "a config that is no JSON": (text("config.json", "{"), "is not JSON"),
    "a config nested without end": (text("config.json", "[" * 100_000), "is not JSON"),
    "an unknown architecture": (
        config(architectures=["Skynet"], model_type="skynet"), "could not load.*skynet",
    ),
    "an architecture that does not write": (
        config(architectures=["CLIPModel"], model_type="clip"), "no causal language model",
    ),
    "a kernel of the hub's": (
        config(attn_implementation="kernels-community/flash-attn"), "code from the hub",
    ),
    "an adapter of another model": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "adapter_model.safetensors"),
            text("adapter_config.json", "[]")(folder),
        ),
        "an adapter of an unnamed base model",
    ),
    "pickled weights": (pickled(dict), "--allow-pickle"),
    "a template that loops": (
        text("chat_template.jinja", "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3),
        "never finishes",
    ),
    "a template that loops in a long conversation": (
        text(
            "chat_template.jinja",
            "{% if messages|length > 5 %}" + "{% for i in range(99999) %}" * 3
            + "{% endfor %}" * 3 + "{% endif %}",
        ),
        "never finishes",
    ),
    "a template with a power": (text("chat_template.jinja", "{{ 9**(9**9) }}"), "never finishes"),
    "a template with a large product": (
        text("chat_template.jinja", "{{ (range(99999)|list * 30000)|sum }}"), "never finishes",
    ),
    "a template that makes a book": (
        text("chat_template.jinja", "{{ 'word ' * 1000000 }}"), "never finishes",
    ),
    "cut off weights": (raw_weights(lambda data: data[:5000]), "is cut off"),
    "weights cut off early": (raw_weights(lambda data: data[:50]), "is cut off"),
    "empty weights": (raw_weights(lambda data: b""), "is cut off"),
    "a header longer than the file": (
        raw_weights(lambda data: struct.pack("<Q", 2**62) + data[8:]), "header too large",
    ),
    "a header that is no JSON": (
        raw_weights(lambda data: struct.pack("<Q", 9) + b"\xff" * 9), "invalid UTF-8 in header",
    ),
    "a tensor outside the file": (lies(data_offsets=[2**40, 2**40 + 128]), "is cut off"),
    "a tensor backwards": (lies(data_offsets=[128, 0]), "invalid offset"),
    "a shape that is not its size": (lies(shape=[2**40]), "invalid shape"),
    "a type that there is not": (lies(dtype="F1024"), "unknown variant"),
    "data that nothing names": (
        weights(lambda header, rest: (header, rest + b"more")), "incomplete metadata",
    ),
    "a size that is no number": (config(hidden_size="large"), "could not load .*hidden_size"),
    "another model's shapes": (config(hidden_size=48), "other shapes than config.json says"),
    "another model's layers": (config(num_hidden_layers=5), "lacks 27 of its weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMS)
def test_a_harmful_checkpoint_is_rejected_with_the_reason(model: Path, name: str) -> None:
    harm, words = HARMS[name]
    harm(model)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(str(model))


def test_pickled_weights_are_read_on_request_and_their_code_never_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickled(lambda: tiny_llama(vocab_size=258).state_dict())(model)
    assert load_checkpoint(str(model), allow_pickle=True).parameters
    torch.save({"model.norm.weight": Exploit()}, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than plain tensors"):
        load_checkpoint(str(model), allow_pickle=True)
    assert not (tmp_path / "exploited").exists()


def test_ordinary_chat_templates_pass_the_check() -> None:
    ChatFormat(byte_tokenizer()).check_template()
    rejecting = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    )
    ChatFormat(byte_tokenizer(chat_template=rejecting)).check_template()
    ChatFormat(byte_tokenizer(chat_template=None)).check_template()


@pytest.mark.parametrize(
    "template",
    [
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% if messages %}never closed",
        "{{ raise_exception('nothing') }}",
    ],
)
def test_a_template_that_no_conversation_passes_is_rejected(model: Path, template: str) -> None:
    text("chat_template.jinja", template)(model)
    with pytest.raises(CheckpointError, match=r"every conversation fails: .*chat_template\.jinja"):
        load_checkpoint(str(model))


def test_a_valid_chat_template_may_be_large() -> None:
    """Templates that describe tools are large, but a chat runs only a small part of them."""
    branches = "".join(
        f"{{% if messages[0]['content'] == '{n}' %}}{{{{ 'tool {n}' }}}}{{% endif %}}\n"
        for n in range(800)
    )
    assert len(branches) > 40_000
    ChatFormat(byte_tokenizer(chat_template=branches)).check_template()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    for name in ("one", "two"):
        writer.add_tensor(name, torch.ones(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def put(data: bytes, at: int, number: int, form: str = "<Q") -> bytes:
    packed = struct.pack(form, number)
    return data[:at] + packed + data[at + len(packed) :]


def after(data: bytes, name: bytes) -> int:
    return data.index(name) + len(name)


GGUF_HARMS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda d: d[:-1], "tensor two lies outside the file"),
    "cut off in its header": (lambda d: d[:60], "past the end of the file"),
    "of a version to come": (lambda d: put(d, 4, 9, "<I"), "version 9"),
    "with tensors without end": (lambda d: put(d, 8, 2**60), "past the end of the file"),
    "with values without end": (lambda d: put(d, 16, 2**60), "past the end of the file"),
    "with a key without end": (lambda d: put(d, 24, 2**63), "past the end of the file"),
    # after an array's name: its type, the type of its items, and their number
    "with words without end": (
        lambda d: put(d, after(d, b"tokenizer.ggml.tokens") + 8, 2**50), "past the end of the file",
    ),
    "with numbers without end": (
        lambda d: put(d, after(d, b"numbers") + 8, 2**50), "past the end of the file",
    ),
    "with an array of arrays": (
        lambda d: put(d, after(d, b"numbers") + 4, 9, "<I"), "arrays of arrays",
    ),
    "with a type that there is not": (lambda d: put(d, after(d, b"numbers"), 99, "<I"), "99"),
    # after a tensor's name: the number of dimensions, each length, the type, the offset
    "with a tensor of many dimensions": (
        lambda d: put(d, after(d, b"two"), 2**31, "<I"), "dimensions",
    ),
    "with a tensor larger than the file": (
        lambda d: put(d, after(d, b"two") + 4, 2**50), "outside the file",
    ),
    "with a tensor of nothing": (lambda d: put(d, after(d, b"two") + 4, 0), "holds 0 numbers"),
    "with a tensor elsewhere": (
        lambda d: put(d, after(d, b"two") + 24, 2**60), "outside the file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF_HARMS)
def test_a_gguf_with_a_false_header_is_rejected_before_its_data_is_read(
    gguf: bytes, name: str, tmp_path: Path
) -> None:
    harm, words = GGUF_HARMS[name]
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf)
    assert checked_parameters(file) == 2 * 4 * 32
    file.write_bytes(harm(gguf))
    with pytest.raises(CheckpointError, match=f"could not be read.*{words}"):
        load_checkpoint(str(file))


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_gguf_header_gives_an_error_or_plausible_sizes(
    gguf: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    end = after(gguf, b"two") + 32
    damaged = bytearray(gguf)
    for at in data.draw(st.lists(st.integers(4, end - 1), min_size=1, max_size=6)):
        damaged[at] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(bytes(damaged))
    try:
        assert 0 < checked_parameters(file) <= 2 * 8 * len(gguf), "two tensors, one bit per weight"
    except ValueError as error:
        assert str(error)


def test_one_part_of_a_split_gguf_is_rejected(gguf: bytes, tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00003.gguf").write_bytes(gguf)
    with pytest.raises(CheckpointError, match=r"is one of 3 parts, and model-00002-of-00003\.gguf"):
        load_checkpoint(str(tmp_path / "model-00001-of-00003.gguf"))


def test_a_gguf_larger_than_the_free_memory_is_rejected_with_both_sizes(
    gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(gguf)
    monkeypatch.setattr("stream_generator.loading.gguf.file.free_memory", lambda device: 10)
    with pytest.raises(CheckpointError, match=r"take .* GB of memory, but 0\.0 GB are free"):
        load_checkpoint(str(tmp_path / "model.gguf"))
