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


def choose_precision(
    dtype: str, quantize: str, *, numbers: int, is_packed: bool, on_cpu: bool, free: int
) -> Precision:
    """Settle both flags for a checkpoint; the log reports each choice that costs something.

    dtype, quantize: as `load_checkpoint` takes them. numbers: how many the weights are. is_packed:
    whether the checkpoint has packed weights. free: bytes of memory.
    """
    wanted = preferred_dtype(on_cpu=on_cpu) if dtype == "auto" else getattr(torch, dtype)
    needed = numbers * wanted.itemsize
    dense_fits = needed <= free * DENSE_FITS
    sizes = f"the dense model takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    if dtype == "auto" and wanted is torch.float32 and not dense_fits:
        logger.warning("loading in bfloat16, which is slow on this processor: in float32 %s", sizes)
        wanted = torch.bfloat16
    will_pack = quantize in ("int8", "int4") or (quantize == "auto" and is_packed)
    if not will_pack or not on_cpu or processor.has_packed_kernels():
        return Precision(wanted, quantize)
    if quantize == "auto" and dense_fits:
        logger.info(
            "--quantize auto means none here: this processor (%s) is slow at packed weights; %s",
            processor.describe(),
            sizes,
        )
        return Precision(wanted, "none")
    packed, dense = product_milliseconds()
    logger.warning(
        "replies will be slow: on this processor (%s) a product takes %.2f ms with packed weights "
        "and %.2f ms with dense ones; %s",
        processor.describe(),
        packed,
        dense,
        "give --quantize none" if dense_fits else sizes,
    )
    return Precision(wanted, quantize)


def preferred_dtype(*, on_cpu: bool) -> torch.dtype:
    """bfloat16 where the device has kernels made for it, else float32."""
    if on_cpu:
        fast = processor.has_fast_bfloat16()
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32
