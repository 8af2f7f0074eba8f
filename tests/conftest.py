"""What several test files share: models, tokenizers, and a running service."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from stream_generator.threads import settle_threads

settle_threads()  # as the command does: beside a service that computes, busy waiting costs both

import torch
from support.fakes import engine_of
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from stream_generator.engine.engine import Engine
from stream_generator.loaded_model import Checkpoint
from stream_generator.loading.load import load_checkpoint
from stream_generator.loading.pypi_file import PypiFile, bring
from stream_service.loopback import bypass_proxies

bypass_proxies()  # the tests' own requests, and those of the programs that they start

LLAMA3_TOKENIZER = PypiFile(
    package="llama-models",
    version="0.3.0",
    member="llama_models/llama3/tokenizer.model",
    sha256="82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    """The real demo model, brought and converted if it isn't there."""
    return load_checkpoint()


@pytest.fixture(scope="session")
def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's real vocabulary, out of Meta's own tokenizer file."""
    return build_llama3_tokenizer()


def build_llama3_tokenizer() -> PreTrainedTokenizerFast:
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    special = [named.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)]
    path = bring(LLAMA3_TOKENIZER)
    backend = TikTokenConverter(str(path), extra_special_tokens=special).converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[9]
    )
    tokenizer.chat_template = LLAMA3_TEMPLATE
    return tokenizer


def tiny_llama(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random Llama in float32. The large initialisation keeps its scores well apart."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@dataclass
class RunningService:
    """A service on a port of its own, with the engine behind it."""

    url: str
    engine: Engine
    app: Any


ServiceFactory = Callable[..., RunningService]


@contextmanager
def running_service(
    checkpoint: Checkpoint, *, max_waiting: int = 8, slots: int | None = 8, settings: Any = None
) -> Iterator[RunningService]:
    """The real server on a free port, for as long as the block lasts."""
    # Imported here, so that the tests of `stream_generator` run where there is no Flask.
    from stream_service.app import create_app
    from stream_service.server import Server, bind
    from stream_service.settings import Settings

    settings = settings or Settings()
    engine = engine_of(checkpoint, max_waiting=max_waiting, slots=slots).start()
    server = Server(bind("127.0.0.1", 0), max_body=settings.max_body).start()
    app = create_app(engine, settings)
    server.open(app, max_open=engine.intake.requests)
    try:
        yield RunningService(f"http://127.0.0.1:{server.port}", engine, app)
    finally:
        engine.close()
        server.close()


@pytest.fixture
def proxy_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment as in many companies, but that nothing listens where the proxy should be."""
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        for spelling in (name, name.lower()):
            monkeypatch.setenv(spelling, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[ServiceFactory]:
    """Start services that end with the test."""
    with ExitStack() as stack:
        yield lambda *a, **k: stack.enter_context(running_service(*a, **k))
