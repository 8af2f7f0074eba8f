"""`--check` says what a start would serve, or why it could not, and opens no port."""

import re
import socket
import subprocess
import sys
from pathlib import Path

from support.fakes import byte_tokenizer
from support.models import tiny_llama
from support.processes import ROOT


def check(*arguments: str) -> tuple[int, str]:
    """Run the command. Returns its status, and what it printed on both streams."""
    done = subprocess.run(
        [sys.executable, "llama3_service.py", "--check", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_the_demo_model_is_described_while_another_service_has_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, printed = check("--port", port, "--max-concurrent", "3", "--max-context", "512")
    assert status == 0, printed
    for part in (
        "the demo model",
        "LlamaForCausalLM",
        "135 M parameters",
        "packed weights and float32 on cpu",
        "end tokens: <|im_end|>",
        "chat template: from the GGUF file's metadata",
        "one ONNX graph runs up to 3 requests at a time, with up to 512 tokens each",
    ):
        assert part in printed
    assert re.search(r"one stream gets [\d.]+ tokens per second", printed)
    assert "is ready at" not in printed


def test_a_directory_without_a_template_is_described(tmp_path: Path) -> None:
    tiny_llama(vocab_size=258).save_pretrained(tmp_path)
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path)
    status, printed = check("--ckpts", str(tmp_path), "--device", "cpu")
    assert status == 0, printed
    assert "fused layers run up to" in printed
    assert "chat template: none, so only completions work" in printed


def test_a_directory_that_cannot_be_served_ends_with_the_reason_and_status_1(
    tmp_path: Path,
) -> None:
    tiny_llama(vocab_size=258).save_pretrained(tmp_path)
    status, printed = check("--ckpts", str(tmp_path))
    assert status == 1
    assert "tokenizer" in printed.splitlines()[-1]
    assert "Traceback" not in printed
