"""CuPy and NVRTC, imported when a kernel is first needed, and the folder in which CuPy keeps compiled kernels.

What is missing or does not fit is said here, with what to install.
"""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
import warnings
from importlib import metadata
from types import ModuleType
from typing import cast

# Distributions that install the module `cupy`; two of them overwrite each other's files.
_CUPY_DISTRIBUTIONS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")


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


def check_cuda_major(cupy: ModuleType) -> None:
    """Refuse a CuPy whose CUDA is too old for cupymoe or too new for this machine's driver.

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
        warn_about_cache(error)
        os.environ["CUPY_CACHE_DIR"] = tempfile.mkdtemp(prefix="cupymoe-")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def warn_about_cache(error: OSError) -> None:
    """Warn, once in a process, that CuPy can't keep compiled kernels, and say what to do."""
    _warn_once(
        f"CuPy's kernel cache {cache_folder()} can't be written ({error.strerror}): kernels are compiled anew in every "
        "process. Set CUPY_CACHE_DIR to a writable folder."
    )
