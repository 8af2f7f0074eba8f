"""Llama 3's tokenizer: the real one, and a small one in the same format."""

import base64
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from stream_generator.loading.pypi_file import PypiFile, fetch

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
    path = fetch(LLAMA3_TOKENIZER)
    backend = TikTokenConverter(str(path), extra_special_tokens=special).converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[9]
    )
    tokenizer.chat_template = LLAMA3_TEMPLATE
    return tokenizer


def tokenizer_file(path: Path) -> Path:
    """Write a small file in Meta's format, with each byte and each pair of small letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [bytes([b]) for b in range(256)] + [(a + b).encode() for a in letters for b in letters]
    lines = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(words)]
    path.write_text("\n".join(lines) + "\n")
    return path


WORDS = 256 + 26 * 26
VOCABULARY = WORDS + 256
BEGIN, END, END_OF_MESSAGE, END_OF_TURN = WORDS, WORDS + 1, WORDS + 8, WORDS + 9
