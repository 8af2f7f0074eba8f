"""The dtype of dense weights: what --dtype means on this machine."""

import logging
from dataclasses import dataclass

import torch

from stream_generator.model import processor

logger = logging.getLogger(__name__)

# The most of the free memory that dense weights may take without being asked for: keys, values and
# intermediate results need some too.
DENSE_FITS = 0.8


@dataclass(frozen=True)
class Room:
    """The memory for dense weights. numbers: how many they are. free: bytes of memory."""

    numbers: int
    free: int

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether weights of this dtype fit, with room for all that is not weights."""
        return self.numbers * dtype.itemsize <= self.free * DENSE_FITS

    def describe(self, dtype: torch.dtype) -> str:
        """The sizes, for a log."""
        size = self.numbers * dtype.itemsize
        return (
            f"dense weights in {str(dtype).removeprefix('torch.')} take {size / 1e9:.1f} GB, and "
            f"may take {self.free * DENSE_FITS / 1e9:.1f} of the {self.free / 1e9:.1f} GB that are "
            "free"
        )


def choose_dtype(dtype: str, *, numbers: int, on_cpu: bool, free: int) -> torch.dtype:
    """The dtype of dense weights; the log reports a choice that costs something.

    dtype: as `load_checkpoint` takes it. numbers: how many the weights are. free: bytes of memory.
    """
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    wanted = preferred_dtype(on_cpu=on_cpu)
    room = Room(numbers, free)
    if on_cpu and wanted is torch.float32 and not room.holds(wanted):
        logger.warning(
            "loading in bfloat16, which is slow on this processor: %s", room.describe(wanted)
        )
        return torch.bfloat16
    return wanted


def preferred_dtype(*, on_cpu: bool) -> torch.dtype:
    """bfloat16 where the device has kernels made for it, else float32."""
    if on_cpu:
        fast = processor.has_fast_bfloat16()
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32
