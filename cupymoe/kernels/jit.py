"""Compiles a CUDA source on its first use.

One compile per (source, defines, device), under a lock; CuPy keeps the cubin on disk for the next process.
This is the only module that knows NVRTC's options and CuPy's habits.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch

from cupymoe.kernels import cuda_sources
from cupymoe.kernels.launch import Kernel

SUPPORTED_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")

# Distributions that install the module `cupy`; two of them overwrite each other's files.
_CUPY_DISTRIBUTIONS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")

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


def installed_cupys() -> dict[str, str]:
    """Versions of the installed distributions that provide the module ``cupy``."""
    found = {}
    for name in _CUPY_DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def import_cupy() -> ModuleType:
    """The module ``cupy``, imported when a kernel is first needed.

    Raises:
        ImportError: CuPy is missing, or two distributions of it are installed over each other.
    """
    found = installed_cupys()
    if len(found) > 1:
        raise ImportError(
            f"{' and '.join(found)} are installed over each other, both as the module cupy. Keep the one of your CUDA "
            f"major: pip uninstall -y {' '.join(found)} && pip install cupy-cuda12x  (or cupy-cuda13x)"
        )
    _ensure_cache_folder()
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise ImportError(f"cupymoe's CUDA kernels need CuPy: pip install cupy-cuda12x ({error})") from error
    return cupy


def _check_cuda_major(cupy: ModuleType) -> None:
    """
    Raises:
        ImportError: CuPy is for an older CUDA than cupymoe needs, or for a newer one than the driver serves.
    """
    runtime = cupy.cuda.runtime
    major, driver = (version // 1000 for version in (runtime.runtimeGetVersion(), runtime.driverGetVersion()))
    if not 12 <= major <= driver:
        found = " ".join(installed_cupys())
        raise ImportError(
            f"{found} is for CUDA {major}; cupymoe needs 12 at least, and this machine's driver serves up to {driver}: "
            f"pip uninstall -y {found} && pip install cupy-cuda{max(12, driver)}x, or update the driver"
        )


def import_nvrtc() -> ModuleType:
    """CuPy's binding of NVRTC, with the library behind it loaded.

    Raises:
        ImportError: the library is not there; or see :func:`import_cupy`.
    """
    import_cupy()
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        raise ImportError(
            "cupymoe's CUDA kernels are compiled by NVRTC, which CuPy did not find: pip install nvidia-cuda-nvrtc-cu12 "
            f"(nvidia-cuda-nvrtc for cupy-cuda13x) ({error})"
        ) from error
    return cast(ModuleType, nvrtc)


def cache_folder() -> str:
    """The folder in which CuPy keeps compiled kernels."""
    return os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))


def _ensure_cache_folder() -> None:
    # CuPy creates its cache folder at import and fails where it can't (nixpkgs#551032).
    try:
        os.makedirs(cache_folder(), exist_ok=True)
    except OSError as error:
        _warn_about_cache(error)
        os.environ["CUPY_CACHE_DIR"] = tempfile.mkdtemp(prefix="cupymoe-")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _warn_about_cache(error: OSError) -> None:
    _warn_once(
        f"CuPy's kernel cache {cache_folder()} can't be written ({error.strerror}): kernels are compiled anew in every "
        "process. Set CUPY_CACHE_DIR to a writable folder."
    )


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


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of a compute capability; Hopper's is the one with wgmma and TMA."""
    name = f"sm_{capability[0]}{capability[1]}"
    return "sm_90a" if name == "sm_90" else name


def _options(variant: Variant, arch: str) -> tuple[str, ...]:
    return (f"-arch={arch}", "-std=c++17", "-lineinfo", *(f"-D{define}" for define in variant.defines))


def _compile_error(variant: Variant, arch: str, log: str) -> CompileError:
    return CompileError(f"{variant.source}.cu does not compile with {' '.join(_options(variant, arch))}:\n{log}")


@functools.cache
def _load(variant: Variant, device: int) -> Any:
    """The loaded module; callers hold the lock, so that each is compiled once."""
    cupy = import_cupy()
    _check_cuda_major(cupy)
    import_nvrtc()
    arch = architecture(torch.cuda.get_device_capability(device))
    code = cuda_sources.expanded(variant.source)
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=code, options=_options(variant, arch))
        try:
            try:
                module.compile()
            except OSError as error:
                _warn_about_cache(error)
                with _in_memory_cache():
                    module = cupy.RawModule(code=code, options=_options(variant, arch))
                    module.compile()
        except cupy.cuda.compiler.CompileException as error:
            raise _compile_error(variant, arch, error.get_message()) from error
    _loaded_sources.add(variant.source)
    return module


@functools.cache
def _kernel(variant: Variant, entry: str, device: int, shared_bytes: int, dependent: bool, tensor_maps: int) -> Kernel:
    module = _load(variant, device)
    dependent = dependent and torch.cuda.get_device_capability(device) >= (9, 0)
    with import_cupy().cuda.Device(device):
        return Kernel(module.get_function(entry), shared_bytes, dependent, tensor_maps)


def kernel(
    variant: Variant,
    entry: str,
    device: int,
    *,
    shared_bytes: int = 0,
    dependent: bool = False,
    tensor_maps: int = 0,
) -> Kernel:
    """The entry point of a variant on a device, compiled and loaded when first asked for; see :class:`Kernel`.

    Raises:
        CompileError: NVRTC refused the source.
        ImportError: CuPy or NVRTC is missing, or CuPy is not the one of this machine's CUDA; the message says what to
            install.
    """
    with _lock:
        return _kernel(variant, entry, device, shared_bytes, dependent, tensor_maps)


def compiled_variants() -> int:
    """How many variants this process has compiled or loaded."""
    return _load.cache_info().currsize


def loaded_sources() -> frozenset[str]:
    """The sources, by their stems, of which this process has compiled or loaded a variant."""
    return frozenset(_loaded_sources)


def compile_offline(variant: Variant, arch: str) -> CompileReport:
    """Compile for an architecture with NVRTC alone; needs no GPU and caches nothing.

    Raises:
        CompileError: NVRTC refused the source.
    """
    nvrtc = import_nvrtc()
    # What CuPy adds on its own, so that this compiles what a device would run.
    options = (*_options(variant, arch), "-ftz=true", "--ptxas-options=-v")
    if nvrtc.getVersion() >= (12, 9):
        # Where there is a driver, NVRTC may take the cubin from the driver's cache, and its log is then empty.
        options += ("-no-cache",)
    program = nvrtc.createProgram(cuda_sources.expanded(variant.source), f"{variant.source}.cu", [], [])
    start = time.perf_counter()
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:
        raise _compile_error(variant, arch, nvrtc.getProgramLog(program)) from error
    else:
        seconds = time.perf_counter() - start
        # CuPy takes the cubin's last byte for the end of a string and drops it.
        log, cubin = nvrtc.getProgramLog(program), nvrtc.getCUBIN(program) + b"\0"
    finally:
        nvrtc.destroyProgram(program)
    return CompileReport(
        registers=max(map(int, re.findall(r"Used (\d+) registers", log)), default=0),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        seconds=seconds,
        log=log,
        cubin=cubin,
    )
