"""The dtype of dense weights: what --dtype means on this machine."""

import logging

import torch

from stream_generator.model import processor

logger = logging.getLogger(__name__)

# The share of free memory that float32 weights may take unless the user asks for float32. Keys,
# values and intermediate results need the rest.
DENSE_FITS = 0.8


def choose_dtype(dtype: str, *, numbers: int, on_cpu: bool, free: int) -> torch.dtype:
    """Choose the dtype of dense weights. The log reports a choice that makes the model slow.

    dtype: see `load_checkpoint`. numbers: how many weights there are. free: bytes of free memory.
    """
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    wanted = preferred_dtype(on_cpu=on_cpu)
    size, limit = numbers * wanted.itemsize, free * DENSE_FITS
    if on_cpu and wanted is torch.float32 and size > limit:
        logger.warning(
            "loading in bfloat16, which is slow on this processor: float32 takes %.1f GB, but "
            "dense weights may take only %.1f of the %.1f GB of free memory",
            size / 1e9,
            limit / 1e9,
            free / 1e9,
        )
        return torch.bfloat16
    return wanted


def preferred_dtype(*, on_cpu: bool) -> torch.dtype:
    """bfloat16 if the device has fast kernels for it, else float32."""
    if on_cpu:
        fast = processor.has_fast_bfloat16()
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32
