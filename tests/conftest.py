"""Fixtures that tests of several packages share."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from stream_generator.threads import settle_threads

settle_threads()  # as the command does: busy waiting slows down the tests and their services

from support.llama3 import build_llama3_tokenizer
from support.service import ServiceFactory, running_service
from transformers import PreTrainedTokenizerFast

from stream_generator.loaded_model import Checkpoint
from stream_generator.loading.load import load_checkpoint
from stream_service.loopback import bypass_proxies

bypass_proxies()  # for requests of the tests and of the programs that they start


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    """The real demo model, downloaded and converted if the cache lacks it."""
    return load_checkpoint()


@pytest.fixture(scope="session")
def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's real vocabulary, from Meta's own tokenizer file."""
    return build_llama3_tokenizer()


@pytest.fixture
def unreachable_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that names a proxy, but nothing listens at its address."""
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
