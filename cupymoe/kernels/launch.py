"""Launches a compiled kernel through the driver: raw pointers, any stream, no copy of anything but the parameters."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from typing import Any

import torch

from cupymoe.kernels.cupy_import import import_cupy

_MAX_WORDS = 80
MAP_BYTES = 128
_PACK = [struct.Struct(f"{count}Q").pack_into for count in range(_MAX_WORDS + 1)]
# enum values of cuda.h
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_PARAM_BUFFER_POINTER, _PARAM_BUFFER_SIZE, _PARAM_END = 1, 2, 0


def word_of(value: float) -> int:
    """A float32 as a parameter of a kernel: its bits, which ``__uint_as_float`` takes."""
    return ctypes.c_uint32.from_buffer(ctypes.c_float(value)).value


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, then 64 bytes of value at offset 8."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_uint),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4
    library.cuGetErrorName.argtypes = (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
    return library


def error_name(status: int) -> str:
    """The driver's name of an error."""
    name = ctypes.c_char_p()
    driver().cuGetErrorName(status, ctypes.byref(name))
    return (name.value or b"?").decode()


class _Launch:
    """Configuration and parameters of one kernel; the driver copies both before a launch returns."""

    def __init__(self, shared_bytes: int, dependent: bool, tensor_maps: int) -> None:
        _make_context_current()
        self.values = (ctypes.c_uint64 * _MAX_WORDS)()
        self.size = ctypes.c_size_t()
        self._extra = (ctypes.c_void_p * 5)(
            _PARAM_BUFFER_POINTER,
            ctypes.addressof(self.values),
            _PARAM_BUFFER_SIZE,
            ctypes.addressof(self.size),
            _PARAM_END,
        )
        self.extra: int | None = ctypes.addressof(self._extra)
        self.parameters: int | None = None
        if tensor_maps:
            # Where a map, which is aligned to 64 bytes, lies among the parameters is the driver's to know.
            starts = [*range(0, MAP_BYTES * tensor_maps, MAP_BYTES)]
            starts += range(MAP_BYTES * tensor_maps, 8 * _MAX_WORDS, 8)
            base = ctypes.addressof(self.values)
            self._parameters = (ctypes.c_void_p * len(starts))(*[base + start for start in starts])
            self.parameters, self.extra = ctypes.addressof(self._parameters), None
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self.config = _Config(
            grid_z=1,
            block_y=1,
            block_z=1,
            shared_bytes=shared_bytes,
            attributes=ctypes.addressof(self._attribute),
            num_attributes=int(dependent),
        )
        self.config_address = ctypes.addressof(self.config)


class _OwnLaunch(threading.local):
    """Each thread's own, behind one look-up: those of a thread's local cost more than others."""

    def __init__(self, *arguments: Any) -> None:
        self.launch = _Launch(*arguments)


def _make_context_current() -> None:
    # A thread that took its tensors from torch's cache has made no context current yet, and the driver wants one.
    import_cupy().cuda.runtime.setDevice(torch.cuda.current_device())


class Kernel:
    """A compiled entry point on one device. Every parameter is 8 bytes wide, a pointer or a u64, but tensor maps.

    Args:
        raw_kernel: CuPy's ``RawKernel``; it keeps the module loaded.
        shared_bytes: dynamic shared memory of a block.
        dependent: whether a launch may begin before the kernel before it has ended, which takes an architecture with
            ``Arch.dependent_launch``; the source then waits for it where it must.
        tensor_maps: how many of the first parameters are tensor maps; each is given as its words.

    Attributes:
        function: the driver's handle.
        shared_bytes: as given.
    """

    def __init__(self, raw_kernel: Any, shared_bytes: int = 0, dependent: bool = False, tensor_maps: int = 0) -> None:
        # Never lowered: builds of several cards may share a function, and ask for more of it each.
        if shared_bytes > raw_kernel.max_dynamic_shared_size_bytes:
            raw_kernel.max_dynamic_shared_size_bytes = shared_bytes
            # All that there is, whatever this kernel needs: with less no block of the next one could begin beside it.
            raw_kernel.preferred_shared_memory_carveout = 100
        self.shared_bytes = shared_bytes
        self.function = raw_kernel.kernel.ptr
        self._raw_kernel = raw_kernel
        self._own = _OwnLaunch(shared_bytes, dependent, tensor_maps)
        self._launch = driver().cuLaunchKernelEx

    def __call__(self, grid: tuple[int, int], block: int, stream: int, *arguments: int) -> None:
        """Launch; the tensors behind the pointers must live until the stream has passed the kernel.

        Raises:
            RuntimeError: the driver refused the launch.
        """
        own = self._own.launch
        _PACK[len(arguments)](own.values, 0, *arguments)
        own.size.value = 8 * len(arguments)
        config = own.config
        config.grid_x, config.grid_y = grid
        config.block_x = block
        config.stream = stream
        if status := self._launch(own.config_address, self.function, own.parameters, own.extra):
            raise RuntimeError(f"launch of {self._raw_kernel.name} failed: {error_name(status)}")
