"""Free memory, and how many slots fit into it."""

from pathlib import Path

import psutil
import torch

from stream_generator.errors import CheckpointError

MAX_SLOTS = 32
TARGET_SLOTS = 4  # if fewer fit, slots get shorter, down to `MIN_CONTEXT`
MIN_CONTEXT = 2048
MEMORY_SHARE = {"cpu": 0.4, "cuda": 0.8}  # for slots, of the memory that a loaded model leaves free


def free_memory(device: torch.device) -> int:
    """The number of bytes that are free on a device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)


def reject_if_too_large(what: Path, size: int, free: int, remedy: str = "") -> None:
    """Raise `CheckpointError` if weights of `size` bytes do not fit into `free` bytes.

    remedy: what to use instead; by default another machine or model.
    """
    if size > free:
        raise CheckpointError(
            f"the weights of {what} take {size / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB "
            f"are free; use {remedy or 'a machine with more memory, or a smaller model'}"
        )


def slots_and_context(
    device: torch.device,
    token_bytes: int,
    context: int,
    max_concurrent: int | None,
    max_context: int | None,
) -> tuple[int, int]:
    """The number of slots that fit into the free memory, and their length in tokens.

    token_bytes: the bytes of one token's keys and values. Raises `CheckpointError` if too few fit.
    """
    free = free_memory(device)
    budget = int(free * MEMORY_SHARE.get(device.type, 0.4))
    wanted = max_concurrent or TARGET_SLOTS
    while not max_context and context > MIN_CONTEXT and wanted * context * token_bytes > budget:
        context = max(context // 2, MIN_CONTEXT)
    slots = max_concurrent or min(MAX_SLOTS, max(1, budget // (context * token_bytes)))
    if slots * context * token_bytes > free:
        raise CheckpointError(
            f"{slots} requests of {context} tokens need {slots * context * token_bytes / 1e9:.1f} "
            f"GB for keys and values, but {free / 1e9:.1f} GB are free; lower --max-concurrent or "
            "--max-context"
        )
    return slots, context
