"""GGUF files: the header, and tensors mapped to the file. No more of it than weights of experts need."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cupymoe.checkpoint.errors import CheckpointError

SUFFIX = ".gguf"

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), "general.alignment"
_LARGEST_COUNT = 1 << 24
"""Of keys, tensors, elements of an array or bytes of a string: a damaged file has more."""
# The scalars of the header by their number; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


class _Type(NamedTuple):
    """A type of tensors that is read: in the words of safetensors, or GGUF's own."""

    name: str
    block: int
    """How many elements belong together."""
    block_bytes: int
    dtype: torch.dtype


_TYPES = {
    0: _Type("F32", 1, 4, torch.float32),
    1: _Type("F16", 1, 2, torch.float16),
    2: _Type("Q4_0", 32, 18, torch.uint8),
    28: _Type("F64", 1, 8, torch.float64),
    30: _Type("BF16", 1, 2, torch.bfloat16),
}


_UNREAD = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
_UNREAD |= {20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4"}
"""The names of other types that files of experts have, for messages."""


class _Info(NamedTuple):
    """What the header says of a tensor; it is also what ``safetensors`` calls a slice."""

    type: int
    shape: tuple[int, ...]
    """Rows first, as torch has it."""
    offset: int

    def get_dtype(self) -> str:
        return _TYPES[self.type].name if self.type in _TYPES else _UNREAD.get(self.type, f"GGML type {self.type}")

    def get_shape(self) -> list[int]:
        return [*self.shape]


class GgufFile:
    """An open file with the methods of a ``safetensors.safe_open`` that are used here.

    Blocks of quantised numbers are read as bytes: ``[..., blocks of a row, bytes of a block]`` uint8, where
    ``get_slice`` gives the shape of the weight.

    Raises:
        CheckpointError: it is no GGUF file, or its header is damaged.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._bytes = np.memmap(file, dtype=np.uint8, mode="c")
            self._infos, self._data = _Header(self._bytes).read()
        except (OSError, ValueError, struct.error) as error:
            raise CheckpointError(f"{file}: not a readable GGUF file: {error}") from error

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *error: object) -> None:
        """The file stays mapped as long as a tensor of it lives."""

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return [*self._infos]

    def get_slice(self, key: str) -> _Info:
        """What the header says of a tensor."""
        return self._infos[key]

    def get_tensor(self, key: str) -> torch.Tensor:
        """A tensor, mapped to the file; writing to it leaves the file alone.

        Raises:
            OSError: the file ends before it.
        """
        info = self._infos[key]
        type = _TYPES[info.type]
        *rows, columns = info.shape or (1,)
        start, size = self._data + info.offset, math.prod(rows) * columns // type.block * type.block_bytes
        if start + size > len(self._bytes):
            raise OSError(f"it has {size} bytes from {start} on, and the file ends at {len(self._bytes)}")
        data = torch.from_numpy(self._bytes[start : start + size])
        if type.block > 1:
            return data.reshape(*rows, columns // type.block, type.block_bytes)
        if start % type.block_bytes:
            data = data.clone()
        return data.view(type.dtype).reshape(info.shape)


class _Header:
    """Reads from the beginning of a file; every number is checked before it is believed."""

    def __init__(self, data: Any) -> None:
        self._data, self._at = data, 0

    def read(self) -> tuple[dict[str, _Info], int]:
        """The tensors by name, and where their data begins."""
        magic = self._take(4)
        if magic != _MAGIC:
            raise ValueError(f"it must begin with {_MAGIC!r}, got {magic!r}")
        if (version := self._scalar("I")) not in _VERSIONS:
            raise ValueError(f"its version must be one of {_VERSIONS}, got {version}")
        num_tensors, num_values = self._count("Q"), self._count("Q")
        alignment = 32
        for _ in range(num_values):
            name = self._string()
            value = self._value(self._scalar("I"))
            if name == _ALIGNMENT:
                alignment = value
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{_ALIGNMENT} must be a power of two, got {alignment!r}")
        infos: dict[str, _Info] = {}
        for _ in range(num_tensors):
            name = self._string()
            if name in infos:
                raise ValueError(f"{name} is there twice")
            infos[name] = self._info(name, alignment)
        return infos, -(-self._at // alignment) * alignment

    def _info(self, name: str, alignment: int) -> _Info:
        num_dimensions = self._scalar("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{name} must have at most {_MAX_DIMENSIONS} dimensions, got {num_dimensions}")
        shape = tuple(self._scalar("Q") for _ in range(num_dimensions))[::-1]
        type, offset = self._scalar("I"), self._scalar("Q")
        if offset % alignment:
            raise ValueError(f"{name} must begin at a multiple of {alignment}, got {offset}")
        if type in _TYPES and shape and shape[-1] % _TYPES[type].block:
            raise ValueError(f"{name} must have whole blocks of {_TYPES[type].block} in a row, got {shape[-1]}")
        return _Info(type, shape, offset)

    def _value(self, type: int) -> Any:
        if type in _SCALARS:
            return self._scalar(_SCALARS[type])
        if type == _STRING:
            return self._string()
        if type != _ARRAY:
            raise ValueError(f"the type of a value must be at most 12, got {type}")
        element, count = self._scalar("I"), self._count("Q")
        if element in _SCALARS:
            self._take(count * struct.calcsize(_SCALARS[element]))
        else:
            for _ in range(count):
                self._value(element)
        return None  # no array is asked for

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _count(self, code: str) -> int:
        count: int = self._scalar(code)
        if count > _LARGEST_COUNT:
            raise ValueError(f"a count must be at most {_LARGEST_COUNT}, got {count}")
        return count

    def _string(self) -> str:
        return self._take(self._count("Q")).decode()

    def _take(self, count: int) -> bytes:
        taken = bytes(self._data[self._at : self._at + count])
        if len(taken) < count:
            raise ValueError(f"it ends within its header, after {self._at + len(taken)} bytes")
        self._at += count
        return taken
