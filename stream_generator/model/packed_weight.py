"""Weights in four or eight bits, with one scale for each group of inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

GROUP = 32  # consecutive inputs that share a scale, as in most of GGUF's blocks
UNSIGNED_OFFSET = {4: 8, 8: 128}  # what kernels subtract from an unsigned value, by bits
SLICE_NUMBERS = 8_000_000  # how many numbers of a weight are packed at a time

BYTES = {4: 0.5 + 8 / GROUP, 8: 1 + 4 / GROUP}  # bytes per number, by bits; with scale and zero
BITS = {"int8": 8, "int4": 4}  # bits per number, by the value of --quantize
FAMILIES = "Llama, Mistral, Qwen2 and Qwen3"  # model families whose weights can be packed
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # their model_type in a configuration


def packed_size(config: Any, numbers: int, bits: int) -> int:
    """Bytes of a model of `numbers` parameters whose layers are packed in four or eight bits.

    The embedding stays in bfloat16, and the output matrix gets eight bits.
    """
    embedding = config.vocab_size * config.hidden_size
    layers = numbers - embedding * (1 if config.tie_word_embeddings else 2)
    return int((2 + BYTES[8]) * embedding + BYTES[bits] * layers)


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] in groups of inputs: value * scale + zero.

    bits: 4 or 8. values: int8 [out, in], -8 to 7 for four bits.
    scales, zeros: float32 [out, in / group] each; None for `zeros` means 0.
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
        """Pack a weight, float [out, in], in groups of 32. `in` must be a multiple of 32.

        With four bits, a group's values span the range from its least to its greatest weight. With
        eight bits, the range is symmetric around 0, so `zeros` is None.
        """
        rows = max(SLICE_NUMBERS // weight.shape[1], 1)
        return cls.concatenate([cls._pack_rows(part, bits) for part in weight.detach().split(rows)])

    @classmethod
    def _pack_rows(cls, weight: torch.Tensor, bits: int) -> Self:
        groups = weight.float().unflatten(1, (-1, GROUP))
        if bits == 8:
            scales = (groups.abs().amax(dim=2) / 127).clamp_min(1e-8)
            values = (groups / scales[..., None]).round()
            return cls(8, values.to(torch.int8).flatten(1), scales)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scales = ((high - low) / 15).clamp_min(1e-8)
        zeros = low + UNSIGNED_OFFSET[4] * scales
        values = ((groups - zeros[..., None]) / scales[..., None]).round().clamp(-8, 7)
        return cls(4, values.to(torch.int8).flatten(1), scales, zeros)

    @classmethod
    def concatenate(cls, weights: "list[PackedWeight]") -> Self:
        """Concatenate the outputs of weights that have the same inputs and the same format."""
        first = weights[0]
        assert {w.format for w in weights} == {first.format}
        zeros = [w.zeros for w in weights if w.zeros is not None]
        return cls(
            first.bits,
            torch.cat([w.values for w in weights]),
            torch.cat([w.scales for w in weights]),
            torch.cat(zeros) if zeros else None,
        )

    @property
    def format(self) -> tuple[int, int, bool]:
        """Bits, group, and whether there are zeros. One product needs weights of one format."""
        return self.bits, self.group, self.zeros is not None

    def stored(self) -> torch.Tensor:
        """The values, shifted so that none is negative: uint8 [out, groups, bytes per group].

        A byte holds two values of four bits, the first in its lower half.
        """
        raw = (self.values.to(torch.int16) + UNSIGNED_OFFSET[self.bits]).to(torch.uint8)
        if self.bits == 4:
            raw = raw[:, ::2] | raw[:, 1::2] << 4
        stored: torch.Tensor = raw.unflatten(1, (self.scales.shape[1], -1))
        return stored

    def to(self, device: torch.device) -> "PackedWeight":
        """The same weight on a device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return PackedWeight(self.bits, self.values.to(device), self.scales.to(device), zeros)

    def dense(self) -> torch.Tensor:
        """Unpack the weight: float32 [out, in]."""
        values = self.values.float().unflatten(1, (-1, self.group))
        return scaled(values, self.scales, self.zeros)


def scaled(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """values * scales + zeros: float32 [out, in]. values: float32 [out, groups, group]."""
    groups = values * scales[..., None]
    if zeros is not None:
        groups += zeros[..., None]
    return groups.flatten(1)


def same_format_runs(weights: list[PackedWeight]) -> Iterator[list[PackedWeight]]:
    """Split a list of weights into runs of adjacent weights with one format."""
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
        """The packed weight of a linear layer or an embedding; None if it is not packed."""

    def dense(self, parameter: str) -> torch.Tensor:
        """A parameter as a dense float tensor. Raises `KeyError` if it is missing."""


class NotBuildable(Exception):
    """A model cannot be packed, or a step graph cannot compute it."""
