"""A step graph in a directory: its files and its manifest."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from stream_generator.errors import CheckpointError, first_line

MANIFEST, WEIGHTS = "graph.json", "weights.bin"
STEP = "step.onnx"  # the whole model
CHECK = "check.onnx"  # the model with one layer of each weight format


@dataclass(frozen=True)
class SavedGraph:
    """A graph in a directory, with the fields of its manifest.

    size: of a head. parameters: the number of the model's parameters.
    frequencies, rotation_scale: of the rotary positions, see `rotation`.
    """

    directory: Path
    layers: int
    key_heads: int
    size: int
    vocabulary: int
    parameters: int
    frequencies: list[float]
    rotation_scale: float

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the manifest. Raises `CheckpointError` if it is missing or damaged."""
        try:
            return cls(directory=directory, **json.loads((directory / MANIFEST).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise cannot_run(directory, error) from error

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values per position, over all layers."""
        return self.layers * 2 * self.key_heads * self.size * torch.float32.itemsize

    def rotation(self, context: int) -> dict[str, torch.Tensor]:
        """The graph's inputs `cosines` and `sines`, for `context` positions."""
        return rotation(torch.tensor(self.frequencies), self.rotation_scale, context)


def cannot_run(directory: Path, error: Exception) -> CheckpointError:
    """The error for a cached graph that is damaged."""
    name = shlex.quote(directory.parent.name)
    return CheckpointError(
        f"the graph in {directory} cannot be run ({first_line(error)}); delete it with "
        f"--cache {name}, and the next start builds it again"
    )


def rotation(frequencies: torch.Tensor, scale: float, context: int) -> dict[str, torch.Tensor]:
    """Compute the rotary cosines and sines of positions: float32 [context, head size / 2] each.

    frequencies: float32 [head size / 2]. scale: factor of the cosines and sines.
    """
    angles = torch.arange(context).float()[:, None] * frequencies
    return {"cosines": angles.cos() * scale, "sines": angles.sin() * scale}
