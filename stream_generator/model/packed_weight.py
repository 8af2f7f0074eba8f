"""A weight matrix in four or eight bits: values, and a scale for each group of inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

GROUP = 32  # consecutive inputs that share a scale, as in most of GGUF's blocks
MIDDLE = {4: 8, 8: 128}  # what kernels subtract from a value that is stored without a sign
SLICE_BYTES = 8_000_000  # of a weight that are packed at a time

BYTES = {4: 0.5 + 8 / GROUP, 8: 1 + 4 / GROUP}  # of a number, by its bits, with its group's scale
BITS = {"int8": 8, "int4": 4}  # of weights that are packed on request
FAMILIES = "Llama, Mistral, Qwen2 and Qwen3"  # whose weights can be packed
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # the same, as configurations say it


def packed_size(config: Any, numbers: int, bits: int) -> int:
    """Bytes of a model of so many numbers when its layers are packed in so many bits.

    Its embedding stays bfloat16, and its output matrix gets eight bits.
    """
    embedding = config.vocab_size * config.hidden_size
    layers = numbers - embedding * (1 if config.tie_word_embeddings else 2)
    return int((2 + BYTES[8]) * embedding + BYTES[bits] * layers)


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] in groups of inputs: values * scale + zero.

    values: int8 [out, in], -8 to 7 for four bits. scales: float32 [out, in / group]. zeros: the
    same; None: all 0.
    """

    bits: int
    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def group(self) -> int:
        """How many consecutive inputs share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    @classmethod
    def of(cls, weight: torch.Tensor, bits: int) -> Self:
        """Pack a weight [out, in], with `in` a multiple of 32.

        A group's values span its least and greatest weight. With eight bits they span the greatest
        magnitude and its negative, so that there are no zeros.
        """
        rows = max(SLICE_BYTES // weight.shape[1], 1)
        return cls.joined([cls._of_some(part, bits) for part in weight.detach().split(rows)])

    @classmethod
    def _of_some(cls, weight: torch.Tensor, bits: int) -> Self:
        groups = weight.float().unflatten(1, (-1, GROUP))
        if bits == 8:
            scales = (groups.abs().amax(dim=2) / 127).clamp_min(1e-8)
            values = (groups / scales[..., None]).round()
            return cls(8, values.to(torch.int8).flatten(1), scales)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scales = ((high - low) / 15).clamp_min(1e-8)
        zeros = low + MIDDLE[4] * scales
        values = ((groups - zeros[..., None]) / scales[..., None]).round().clamp(-8, 7)
        return cls(4, values.to(torch.int8).flatten(1), scales, zeros)

    @classmethod
    def joined(cls, weights: "list[PackedWeight]") -> Self:
        """Join weights with the same inputs and format into one with all their outputs."""
        first = weights[0]
        assert {w.format for w in weights} == {first.format}
        return cls(
            first.bits,
            torch.cat([w.values for w in weights]),
            torch.cat([w.scales for w in weights]),
            None
            if first.zeros is None
            else torch.cat([w.zeros for w in weights if w.zeros is not None]),
        )

    @property
    def format(self) -> tuple[int, int, bool]:
        """Bits, group, and whether there are zeros: one product takes weights of one format."""
        return self.bits, self.group, self.zeros is not None

    def stored(self) -> torch.Tensor:
        """The values without a sign, two to a byte for four bits, the first one lower: uint8
        [out, groups, bytes of a group]."""
        raw = (self.values.to(torch.int16) + MIDDLE[self.bits]).to(torch.uint8)
        if self.bits == 4:
            raw = raw[:, ::2] | raw[:, 1::2] << 4
        stored: torch.Tensor = raw.unflatten(1, (self.scales.shape[1], -1))
        return stored

    def to(self, device: torch.device) -> "PackedWeight":
        """The same on a device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return PackedWeight(self.bits, self.values.to(device), self.scales.to(device), zeros)

    def dense(self) -> torch.Tensor:
        """float32 [out, in]"""
        values = self.values.float().unflatten(1, (-1, self.group))
        return scaled(values, self.scales, self.zeros)


def scaled(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """What values stand for: [out, in]. values: float32 [out, groups, group]."""
    groups = values * scales[..., None]
    if zeros is not None:
        groups += zeros[..., None]
    return groups.flatten(1)


def same_format_runs(weights: list[PackedWeight]) -> Iterator[list[PackedWeight]]:
    """Split a list of weights into runs of neighbours of one format."""
    run: list[PackedWeight] = []
    for weight in weights:
        if run and run[-1].format != weight.format:
            yield run
            run = []
        run.append(weight)
    if run:
        yield run


class Weights(Protocol):
    """A checkpoint's weights, by transformers' names."""

    def packed(self, module: str) -> PackedWeight | None:
        """The weight of a linear layer or an embedding; None if it is not packed."""

    def dense(self, parameter: str) -> torch.Tensor:
        """What a parameter stands for, in the dtype that it has. Raises `KeyError`."""


class NotBuildable(Exception):
    """Weights, or a model, cannot be packed or have no step graph."""
