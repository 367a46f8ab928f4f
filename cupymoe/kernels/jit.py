"""Compiles a CUDA source on its first use.

One compile per (source, defines, device), under a lock; CuPy keeps the cubin on disk for the next process.
This is the only module that knows NVRTC's options and how CuPy compiles.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cupymoe.kernels import cuda_sources
from cupymoe.kernels.arch import Arch
from cupymoe.kernels.cupy_import import (
    cache_folder,
    check_cuda_major,
    import_cupy,
    import_nvrtc,
    warn_about_cache,
)
from cupymoe.kernels.launch import Kernel

_lock = threading.RLock()
_loaded_sources: set[str] = set()


class CompileError(RuntimeError):
    """NVRTC refused a source; the message shows the source, the options and the log with file and line."""


class Variant(NamedTuple):
    """One compilation of a source: ``<source>.cu`` under ``-D`` defines."""

    source: str
    defines: tuple[str, ...]


class CompileReport(NamedTuple):
    """What NVRTC said of a compilation without a GPU."""

    registers: int
    spill_bytes: int
    seconds: float
    log: str
    cubin: bytes


@contextmanager
def _in_memory_cache() -> Iterator[None]:
    before = os.environ.get("CUPY_CACHE_IN_MEMORY")
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUPY_CACHE_IN_MEMORY"]
        else:
            os.environ["CUPY_CACHE_IN_MEMORY"] = before


def _options(variant: Variant, arch: str) -> tuple[str, ...]:
    return (f"-arch={arch}", "-std=c++17", "-lineinfo", *(f"-D{define}" for define in variant.defines))


def _compile_error(variant: Variant, arch: str, log: str) -> CompileError:
    return CompileError(f"{variant.source}.cu does not compile with {' '.join(_options(variant, arch))}:\n{log}")


@functools.cache
def _load(variant: Variant, device: int, build: Arch | None = None) -> Any:
    """The loaded module; callers hold the lock, so that each is compiled once."""
    cupy = import_cupy()
    check_cuda_major(cupy)
    import_nvrtc()
    if build is not None:
        with cupy.cuda.Device(device):
            module = cupy.RawModule(path=str(_ptx_file(variant, build)))
            _loaded_sources.add(variant.source)
            return module
    arch = Arch.of(device).name
    code = cuda_sources.expanded(variant.source)
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=code, options=_options(variant, arch))
        try:
            try:
                module.compile()
            except OSError as error:
                warn_about_cache(error)
                with _in_memory_cache():
                    module = cupy.RawModule(code=code, options=_options(variant, arch))
                    module.compile()
        except cupy.cuda.compiler.CompileException as error:
            raise _compile_error(variant, arch, error.get_message()) from error
    _loaded_sources.add(variant.source)
    return module


def _ptx_file(variant: Variant, build: Arch) -> Path:
    """The variant as PTX for one of ``arch.BUILDS``, beside what CuPy keeps compiled.

    CuPy asks NVRTC for machine code, and would not let another architecture's pass for the device's.
    """
    options = (*_options(variant, build.name), "-ftz=true")  # as CuPy
    what = json.dumps([cuda_sources.expanded(variant.source), options, import_nvrtc().getVersion()])
    path = Path(cache_folder()) / f"{hashlib.sha256(what.encode()).hexdigest()}.ptx"
    if not path.is_file():
        with _compiled_by_nvrtc(variant, build.name, options) as program:
            ptx = import_nvrtc().getPTX(program)
        # Another process never sees a file that is half written.
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(ptx)
        os.replace(file.name, path)
    return path


@functools.cache
def _kernel(
    variant: Variant,
    entry: str,
    device: int,
    shared_bytes: int,
    dependent: bool,
    tensor_maps: int,
    build: Arch | None = None,
) -> Kernel:
    module = _load(variant, device, build)
    card = Arch.of(device)
    dependent = dependent and (build or card).dependent_launch
    with import_cupy().cuda.Device(device):
        function = module.get_function(entry)
        if build is not None:
            shared_bytes = build.shared_bytes_on(card, function.shared_size_bytes, shared_bytes)
        return Kernel(function, shared_bytes, dependent, tensor_maps)


def kernel(
    variant: Variant,
    entry: str,
    device: int,
    *,
    shared_bytes: int = 0,
    dependent: bool = False,
    tensor_maps: int = 0,
    arch: Arch | None = None,
) -> Kernel:
    """The entry point of a variant on a device, compiled and loaded when first asked for; see :class:`Kernel`.

    Args:
        variant, entry: what is launched.
        device: where.
        shared_bytes, dependent, tensor_maps: of :class:`Kernel`.
        arch: one of ``arch.BUILDS``, as which it is then compiled, and launched with more shared memory, so that blocks
            share a multiprocessor as they would on its card; the device's own or None: as always.

    Raises:
        CompileError: NVRTC refused the source.
        ImportError: CuPy or NVRTC is missing, or CuPy is not the one of this machine's CUDA; the message says what to
            install.
    """
    with _lock:
        build = arch if arch is not None and arch.is_build else None
        return _kernel(variant, entry, device, shared_bytes, dependent, tensor_maps, build)


def compiled_variants() -> int:
    """How many variants this process has compiled or loaded."""
    return _load.cache_info().currsize


def loaded_sources() -> frozenset[str]:
    """The sources, by their stems, of which this process has compiled or loaded a variant."""
    return frozenset(_loaded_sources)


def offline_options(variant: Variant, arch: str) -> tuple[str, ...]:
    """NVRTC's options of :func:`compile_offline`."""
    # What CuPy adds on its own, so that this compiles what a device would run.
    options = (*_options(variant, arch), "-ftz=true", "--ptxas-options=-v")
    if import_nvrtc().getVersion() >= (12, 9):
        # Where there is a driver, NVRTC may take the cubin from the driver's cache, and its log is then empty.
        options += ("-no-cache",)
    return options


@contextmanager
def _compiled_by_nvrtc(variant: Variant, arch: str, options: tuple[str, ...]) -> Iterator[Any]:
    """NVRTC's program, compiled.

    Raises:
        CompileError: NVRTC refused the source.
    """
    nvrtc = import_nvrtc()
    program = nvrtc.createProgram(cuda_sources.expanded(variant.source), f"{variant.source}.cu", [], [])
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:
        raise _compile_error(variant, arch, nvrtc.getProgramLog(program)) from error
    else:
        yield program
    finally:
        nvrtc.destroyProgram(program)


def compile_offline(variant: Variant, arch: str) -> CompileReport:
    """Compile for an architecture with NVRTC alone; needs no GPU and caches nothing.

    Raises:
        CompileError: NVRTC refused the source.
    """
    nvrtc = import_nvrtc()
    start = time.perf_counter()
    with _compiled_by_nvrtc(variant, arch, offline_options(variant, arch)) as program:
        seconds = time.perf_counter() - start
        # CuPy takes the cubin's last byte for the end of a string and drops it.
        log, cubin = nvrtc.getProgramLog(program), nvrtc.getCUBIN(program) + b"\0"
    return CompileReport(
        registers=max(map(int, re.findall(r"Used (\d+) registers", log)), default=0),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        seconds=seconds,
        log=log,
        cubin=cubin,
    )
