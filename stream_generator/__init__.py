"""Token-by-token generation: ids in, ids and text out. Knows nothing of HTTP.

Each public name is imported when it is first used. To read the code, start with `loop` (one model,
one request), then read `engine.engine` (many requests).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stream_generator.engine.engine import Engine
    from stream_generator.generate import init_stream_support, stream_generate
    from stream_generator.loading.load import load_checkpoint
    from stream_generator.sampling_params import SamplingParams

__all__ = ["Engine", "SamplingParams", "init_stream_support", "load_checkpoint", "stream_generate"]

_MODULES = {
    "Engine": "engine.engine",
    "SamplingParams": "sampling_params",
    "init_stream_support": "generate",
    "load_checkpoint": "loading.load",
    "stream_generate": "generate",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
