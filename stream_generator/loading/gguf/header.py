"""Checks the header of a GGUF file before anything else reads the file.

Source: the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md).
"""

import math
import struct
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

MAGIC_BYTES = 4
MAX_DIMENSIONS = 4
# Bytes of a metadata value. Strings and arrays store their length.
_VALUE_BYTES = {
    GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2, GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip


def checked_parameters(path: Path) -> int:
    """Check the header of a file; return how many numbers its tensors hold.

    Compares every length with the bytes that follow, so that a damaged length cannot make a reader
    allocate or loop without end. Raises `ValueError` if the header is not valid.
    """
    with path.open("rb") as file:
        return _Header(file, path.stat().st_size).parameters


class _Header:
    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size
        self._skip(MAGIC_BYTES)
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its GGUF version {version} is not supported; 2 and 3 are")
        tensors, values = self._number("Q"), self._number("Q")
        alignment = 32
        for _ in range(self._checked_count(values, 12)):  # at least a key's length and a type
            key = self._string()
            number = self._value()
            if key == b"general.alignment" and number is not None:
                alignment = number
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment {alignment} is not a power of two")
        if not tensors:
            raise ValueError("it holds no tensors")
        found = [self._tensor() for _ in range(self._checked_count(tensors, 24))]
        start = math.ceil(file.tell() / alignment) * alignment
        for name, offset, length, _ in found:
            if start + offset + length > size:
                raise ValueError(f"tensor {name} lies outside the file")
        self.parameters = sum(count for *_, count in found)

    def _tensor(self) -> tuple[str, int, int, int]:
        """Read a tensor's name, offset, length in bytes, and count of numbers."""
        name = self._string().decode(errors="replace")
        dimensions = self._number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions; 1 to 4 are valid")
        count = math.prod(self._number("Q") for _ in range(dimensions))
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self._number("I"))]
        if not count or count % block:
            raise ValueError(f"tensor {name} holds {count} numbers, not full blocks of {block}")
        return name, self._number("Q"), count // block * block_bytes, count

    def _value(self) -> int | None:
        """Skip a metadata value; return it if it is an unsigned number of 32 bits."""
        kind = GGUFValueType(self._number("I"))
        if kind is GGUFValueType.UINT32:
            return self._number("I")
        if kind is GGUFValueType.STRING:
            self._string()
        elif kind is GGUFValueType.ARRAY:
            kind, count = GGUFValueType(self._number("I")), self._number("Q")
            if kind is GGUFValueType.STRING:
                for _ in range(self._checked_count(count, 8)):
                    self._string()
            elif kind is GGUFValueType.ARRAY:
                raise ValueError("its metadata has arrays of arrays, which are not supported")
            else:
                self._skip(count * _VALUE_BYTES[kind])
        else:
            self._skip(_VALUE_BYTES[kind])
        return None

    def _string(self) -> bytes:
        return self._file.read(self._checked_count(self._number("Q"), 1))

    def _number(self, form: str) -> int:
        size = struct.calcsize("<" + form)
        self._checked_count(size, 1)
        number: int = struct.unpack("<" + form, self._file.read(size))[0]
        return number

    def _skip(self, count: int) -> None:
        self._file.seek(self._checked_count(count, 1), 1)

    def _checked_count(self, count: int, size: int) -> int:
        """Return `count`. Raises `ValueError` if fewer than `count * size` bytes follow."""
        if count * size > self._size - self._file.tell():
            raise ValueError(
                f"{count * size} bytes at byte {self._file.tell()} reach past the end of the file"
            )
        return count
