"""What the header of a GGUF file says, checked against the file before anything else reads it.

Source: the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md).
"""

import math
import struct
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

MAGIC_BYTES = 4
MOST_DIMENSIONS = 4
# Bytes of a value of metadata; strings and arrays carry their length.
_SIZES = {
    GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2, GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip


def checked_parameters(path: Path) -> int:
    """How many numbers the tensors of a file hold.

    Raises `ValueError` where the header claims more than the file has: every length in it is
    compared with what is left, so that none makes a reader allocate, or go round, without end.
    """
    with path.open("rb") as file:
        return _Header(file, path.stat().st_size).parameters


class _Header:
    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size
        self._skip(MAGIC_BYTES)
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}; 2 and 3 can be read")
        tensors, values = self._number("Q"), self._number("Q")
        alignment = 32
        for _ in range(self._within(values, 12)):  # a key's length and a type, at least
            key = self._string()
            number = self._value()
            if key == b"general.alignment" and number is not None:
                alignment = number
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}, not a power of two")
        if not tensors:
            raise ValueError("it holds no tensors")
        claims = [self._tensor() for _ in range(self._within(tensors, 24))]
        start = math.ceil(file.tell() / alignment) * alignment
        for name, offset, length, _ in claims:
            if start + offset + length > size:
                raise ValueError(f"tensor {name} lies outside the file")
        self.parameters = sum(count for *_, count in claims)

    def _tensor(self) -> tuple[str, int, int, int]:
        """Name, offset, bytes, and how many numbers."""
        name = self._string().decode(errors="replace")
        dimensions = self._number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        count = math.prod(self._number("Q") for _ in range(dimensions))
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self._number("I"))]
        if not count or count % block:
            raise ValueError(f"tensor {name} holds {count} numbers, not blocks of {block}")
        return name, self._number("Q"), count // block * block_bytes, count

    def _value(self) -> int | None:
        """Skip a value of metadata; returns it if it is one of 32 bits without a sign."""
        kind = GGUFValueType(self._number("I"))
        if kind is GGUFValueType.UINT32:
            return self._number("I")
        if kind is GGUFValueType.STRING:
            self._string()
        elif kind is GGUFValueType.ARRAY:
            kind, count = GGUFValueType(self._number("I")), self._number("Q")
            if kind is GGUFValueType.STRING:
                for _ in range(self._within(count, 8)):
                    self._string()
            elif kind is GGUFValueType.ARRAY:
                raise ValueError("it has arrays of arrays")
            else:
                self._skip(count * _SIZES[kind])
        else:
            self._skip(_SIZES[kind])
        return None

    def _string(self) -> bytes:
        return self._file.read(self._within(self._number("Q"), 1))

    def _number(self, form: str) -> int:
        size = struct.calcsize("<" + form)
        self._within(size, 1)
        number: int = struct.unpack("<" + form, self._file.read(size))[0]
        return number

    def _skip(self, count: int) -> None:
        self._file.seek(self._within(count, 1), 1)

    def _within(self, count: int, each: int) -> int:
        """`count`, if so many things of so many bytes at least can still follow."""
        if count * each > self._size - self._file.tell():
            raise ValueError(
                f"it claims {count} of something at byte {self._file.tell()}, past its end"
            )
        return count
