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
from stream_generator.loading.layout import LocatedModel, could_not_load, weights_in
from stream_generator.loading.weight_names import check_names, key_mapping, stored_names
from stream_generator.memory import free_memory, reject_if_too_large
from stream_generator.model.fused import fuse
from stream_generator.model.packed_weight import BITS, FAMILIES, Weights
from stream_generator.model.precision import choose_dtype
from stream_generator.model.quantization import Packing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelLoader:
    """Loads the transformers model of one source; see `load_checkpoint` for the fields.

    packed_size: a function from (parameters, bits) to the bytes of the packed weights. With it,
    messages about large weights advise `--quantize`. None if the model cannot be packed.
    """

    found: LocatedModel
    source: str | None
    packed_size: Callable[[int, int], int] | None
    dtype: str
    device: str | None
    device_map: str | Mapping[str, str | int] | None
    on_cpu: bool
    allow_pickle: bool

    def load(self, quantize: str) -> tuple[PreTrainedModel, int]:
        """Load the model, and fuse its layers if their shape is known.

        Returns the model and its number of parameters before packing. Raises `CheckpointError`.
        """
        directory = self.found.dense_directory()
        files = weights_in(directory)
        weights = sum(file.stat().st_size for file in files)
        numbers = weights // _bytes_per_number(directory)
        free = _free_for_weights(self.device, spread=self.device_map is not None)
        dtype = choose_dtype(self.dtype, numbers=numbers, on_cpu=self.on_cpu, free=free)
        size, advice = numbers * dtype.itemsize, self._packing_advice(numbers, free)
        reject_if_too_large(directory, size, free, remedy=advice)
        logger.info("loading %.1f GB of dense weights", size / 1e9)
        if advice and dtype is torch.float32:
            logger.info("each token reads all weights; for several times the speed, use %s", advice)
        model = self._load_dense(directory, dtype)
        parameters = model.num_parameters()
        model.generation_config.stop_strings = None  # already in `Checkpoint.defaults`
        saved = self.found.gguf.weights() if self.found.gguf and quantize != "none" else None
        fuse_and_pack(model, quantize, saved)
        _return_freed_memory()
        return model, parameters

    def _packing_advice(self, numbers: int, free: int) -> str:
        """List the options whose packed weights fit into `free`, with sizes; "" if none do."""
        if self.packed_size is None:
            return ""
        offers = [
            f"--quantize {name} ({size / 1e9:.1f} GB)"
            for name, bits in BITS.items()
            if (size := self.packed_size(numbers, bits)) <= free
        ]
        half = self.dtype in ("bfloat16", "float16")  # not with packed weights
        return " or ".join(offers) + (" without --dtype" if offers and half else "")

    def _load_dense(self, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                device_map=self.device_map or self.device,
                use_safetensors=None if self.allow_pickle else True,
                weights_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                key_mapping=key_mapping(stored_names(weights_in(directory))) or None,
            )
        except UnpicklingError as error:
            raise CheckpointError(
                f"the pickled weights in {directory} hold more than plain tensors, so they may run "
                "code; use a version in safetensors"
            ) from error
        except Exception as error:  # a damaged checkpoint can make transformers raise anything
            if "ignore_mismatched_sizes" in str(error):
                raise CheckpointError(
                    f"the weights in {self.found.origin} have other shapes than config.json says; "
                    "take all files from the same version of the model"
                ) from error
            raise could_not_load(self.source, error) from error
        # transformers would fill missing weights with random numbers, and drop those left over.
        check_names(self.found.origin, report["missing_keys"], report["unexpected_keys"])
        loaded: PreTrainedModel = model
        return loaded


def _bytes_per_number(directory: Path) -> int:
    """Return the bytes per number in the weight files, from config.json; 2 by default."""
    config = json.loads((directory / "config.json").read_text())
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    stored = getattr(torch, str(name), None)
    return stored.itemsize if isinstance(stored, torch.dtype) else 2


def _free_for_weights(device: str | None, *, spread: bool) -> int:
    """Return the free bytes on the device, or on all GPUs and the CPU if the model is spread."""
    free = free_memory(torch.device("cpu" if spread else device or "cpu"))
    if spread and torch.cuda.is_available():
        free += sum(free_memory(torch.device("cuda", n)) for n in range(torch.cuda.device_count()))
    return free


def fuse_and_pack(
    model: PreTrainedModel, quantize: str = "none", weights: Weights | None = None
) -> None:
    """Fuse layers of a known shape in place. On a GPU, pack them as `quantize` says.

    quantize: as in `load_checkpoint`. weights: the source's, for layers that it has packed.
    Raises `CheckpointError` for "int8" or "int4" if the model cannot be fused.
    """
    packing = Packing()
    if quantize != "none" and model.device.type == "cuda":
        saved = weights.packed if weights else packing.saved
        packing = Packing(BITS.get(quantize, 0), saved)
    fused = fuse(model, packing)
    if quantize in BITS and not fused:
        raise CheckpointError(
            f"--quantize {quantize} works for the families {FAMILIES}, but not for this model; "
            "leave --quantize out"
        )
    for parameter in model.parameters():
        # A parameter that was not replaced is a view of the mapped file. A copy frees the mapping.
        parameter.data = parameter.data.clone()


def _return_freed_memory() -> None:
    """Return freed memory to the system, because GNU's allocator keeps it (135 MB here)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
