"""How much memory is free, and whether something fits into it."""

from pathlib import Path

import psutil
import torch

from stream_generator.errors import CheckpointError


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)


def refuse_if_too_large(what: Path, size: int, free: int) -> None:
    """Raise `CheckpointError`, with the numbers, where `size` bytes of weights do not fit."""
    if size > free:
        raise CheckpointError(
            f"the weights of {what} take {size / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB "
            "are free; use a machine with more memory, or a smaller model"
        )
