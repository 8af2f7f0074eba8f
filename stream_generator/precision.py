"""How many bits a model's numbers get: what --dtype and --quantize mean on this machine."""

import logging
from dataclasses import dataclass

import torch

from stream_generator import processor
from stream_generator.quantization import product_milliseconds

logger = logging.getLogger(__name__)

# The most of the free memory that dense weights may take without being asked for: keys, values and
# intermediate results need some too.
DENSE_FITS = 0.8


@dataclass(frozen=True)
class Precision:
    """dtype: of all numbers that are not packed. quantize: "auto", "none", "int8" or "int4"."""

    dtype: torch.dtype
    quantize: str


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


def choose_precision(
    dtype: str, quantize: str, *, numbers: int, is_packed: bool, on_cpu: bool, free: int
) -> Precision:
    """Settle both flags for a checkpoint; the log reports each choice that costs something.

    dtype, quantize: as `load_checkpoint` takes them. numbers: how many the weights are. is_packed:
    whether the checkpoint has packed weights. free: bytes of memory.
    """
    room = Room(numbers, free)
    wanted = preferred_dtype(on_cpu=on_cpu) if dtype == "auto" else getattr(torch, dtype)
    if on_cpu and dtype == "auto" and wanted is torch.float32 and not room.holds(wanted):
        logger.warning(
            "loading in bfloat16, which is slow on this processor: %s", room.describe(wanted)
        )
        wanted = torch.bfloat16
    will_pack = quantize in ("int8", "int4") or (quantize == "auto" and is_packed)
    if not will_pack or not on_cpu or processor.has_packed_kernels():
        return Precision(wanted, quantize)
    if quantize == "auto" and room.holds(wanted):
        logger.info(
            "--quantize auto means none here: this processor has %s and is slow at packed weights; "
            "%s",
            processor.describe(),
            room.describe(wanted),
        )
        return Precision(wanted, "none")
    packed, dense = product_milliseconds(wanted)
    logger.warning(
        "replies will be slow: this processor has %s, so that a product takes %.2f ms with packed "
        "weights and %.2f ms with dense ones; %s",
        processor.describe(),
        packed,
        dense,
        "give --quantize none" if room.holds(wanted) else room.describe(wanted),
    )
    return Precision(wanted, quantize)


def preferred_dtype(*, on_cpu: bool) -> torch.dtype:
    """bfloat16 where the device has kernels made for it, else float32."""
    if on_cpu:
        fast = processor.has_fast_bfloat16()
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32
