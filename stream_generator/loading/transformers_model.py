"""Loads a transformers model: dense, or packed on a GPU."""

import ctypes
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stream_generator.errors import CheckpointError
from stream_generator.loading.layout import Located, could_not_load, weights_in
from stream_generator.memory import free_memory, refuse_if_too_large
from stream_generator.model.fused import fuse
from stream_generator.model.packed_weight import BITS, FAMILIES, Weights
from stream_generator.model.precision import choose_dtype
from stream_generator.model.quantization import Packing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelLoader:
    """Loads one source's transformers model; see `load_checkpoint` for its fields.

    packed_size: bytes in so many bits, where packed weights could run instead, of so many numbers.
    """

    found: Located
    source: str | None
    packed_size: Callable[[int, int], int] | None
    dtype: str
    device: str | None
    device_map: str | Mapping[str, str | int] | None
    on_cpu: bool
    allow_pickle: bool

    def load(self, quantize: str) -> tuple[PreTrainedModel, int]:
        """Load it, fused where it is of a known shape.

        Returns how many numbers it is made of, too, before any was packed. Raises
        `CheckpointError`.
        """
        directory = self.found.dense_directory()
        weights = sum(file.stat().st_size for file in weights_in(directory))
        numbers = weights // _stored_bytes(directory)
        free = _free_for_weights(self.device, spread=self.device_map is not None)
        dtype = choose_dtype(self.dtype, numbers=numbers, on_cpu=self.on_cpu, free=free)
        size, packed = numbers * dtype.itemsize, self._packed(numbers, free)
        refuse_if_too_large(directory, size, free, remedy=packed)
        logger.info("loading %.1f GB of dense weights", size / 1e9)
        if packed and dtype is torch.float32:
            logger.info("each token reads them all; several times as fast is %s", packed)
        model = self._loaded(directory, dtype)
        parameters = model.num_parameters()
        model.generation_config.stop_strings = None  # the checkpoint's defaults have them
        saved = self.found.gguf.weights() if self.found.gguf and quantize != "none" else None
        make_lean(model, quantize, saved)
        _return_freed_memory()
        return model, parameters

    def _packed(self, numbers: int, free: int) -> str:
        """What could be given for packed weights that fit, and their size; "" for nothing."""
        if self.packed_size is None:
            return ""
        sizes = {name: self.packed_size(numbers, bits) for name, bits in BITS.items()}
        offers = [
            f"--quantize {name} ({size / 1e9:.1f} GB)"
            for name, size in sizes.items()
            if size <= free
        ]
        half = self.dtype in ("bfloat16", "float16")  # which packed weights exclude
        return " or ".join(offers) + (" without --dtype" if offers and half else "")

    def _loaded(self, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                device_map=self.device_map or self.device,
                use_safetensors=None if self.allow_pickle else True,
                weights_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except UnpicklingError as error:
            raise CheckpointError(
                f"the pickled weights of {directory} hold more than plain tensors, and are not "
                "read; use a version in safetensors"
            ) from error
        except Exception as error:  # whatever a foreign checkpoint makes transformers raise
            if "ignore_mismatched_sizes" in str(error):
                raise CheckpointError(
                    f"the weights in {directory} have other shapes than config.json says; download "
                    "both again"
                ) from error
            raise could_not_load(self.source, error) from error
        if missing := sorted(report["missing_keys"]):
            # transformers would fill them with random numbers, and the model would talk nonsense.
            raise CheckpointError(
                f"{self.source} lacks {len(missing)} of its weights ({missing[0]}, ...); download "
                "it again"
            )
        loaded: PreTrainedModel = model
        return loaded


def _stored_bytes(directory: Path) -> int:
    """Bytes of a number in the files of weights, as far as the configuration tells."""
    config = json.loads((directory / "config.json").read_text())
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    stored = getattr(torch, str(name), None)
    return stored.itemsize if isinstance(stored, torch.dtype) else 2


def _free_for_weights(device: str | None, *, spread: bool) -> int:
    """spread: over all GPUs, and the CPU for what they do not hold."""
    free = free_memory(torch.device("cpu" if spread else device or "cpu"))
    if spread and torch.cuda.is_available():
        free += sum(free_memory(torch.device("cuda", n)) for n in range(torch.cuda.device_count()))
    return free


def make_lean(
    model: PreTrainedModel, quantize: str = "none", weights: Weights | None = None
) -> None:
    """Fuse the layers of `model` where they are of a known shape, and pack them on a GPU.

    quantize: as `load_checkpoint` takes it. weights: some of which may be packed already.
    """
    packing = Packing()
    if quantize != "none" and model.device.type == "cuda":
        saved = weights.packed if weights else packing.saved
        packing = Packing(BITS.get(quantize, 0), saved)
    fused = fuse(model, packing)
    if quantize in BITS and not fused:
        raise CheckpointError(
            f"--quantize {quantize} packs models of the families {FAMILIES}, and this is none; "
            "leave --quantize out"
        )
    for parameter in model.parameters():
        # What is left is a part of the file that is mapped to memory: let go of the rest of it.
        parameter.data = parameter.data.clone()


def _return_freed_memory() -> None:
    """Give what loading has freed back to the system: GNU's allocator keeps it (135 MB here)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
