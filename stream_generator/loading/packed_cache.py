"""Where weights that were packed on request are kept, so that a later start need not pack again."""

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError

from stream_generator.loading.cache import cache_directory, fingerprint, state_of
from stream_generator.loading.layout import weights_in
from stream_generator.loading.packed_file import PackedFile, save_packed
from stream_generator.quantization import PackedWeight

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when `PackedWeight.of` changes, so that older results are not used


class PackedCache:
    """The packed weights of one checkpoint, with so many bits.

    They belong to the checkpoint's weight files as they are, by name, size and time: another
    download in the same place is packed anew, and replaces them.
    """

    def __init__(self, checkpoint: Path, bits: int, cache: Path | None = None):
        """checkpoint: a directory in Hugging Face format."""
        self._folder = (cache or cache_directory()) / "packed"
        state = fingerprint(FORMAT, state_of(weights_in(checkpoint)))
        self._family = f"{fingerprint(checkpoint.resolve())}-int{bits}"
        self._path = self._folder / f"{self._family}-{state}.safetensors"

    def load(self) -> Mapping[str, PackedWeight]:
        """What was kept, by the names of the model's modules; empty if there is nothing."""
        if not self._path.is_file():
            return {}
        try:
            return PackedFile(self._path)
        except (OSError, SafetensorError) as error:
            logger.warning("packing again: %s cannot be read (%s)", self._path, error)
            return {}

    def save(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep what was `made` by a `Packing`; a full disk costs only the next start's time."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                save_packed(tensors, Path(folder) / "weights")
                os.replace(Path(folder) / "weights", self._path)
            for older in self._folder.glob(f"{self._family}-*"):
                if older != self._path:
                    older.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the packed weights are not kept in %s: %s", self._folder, error)
