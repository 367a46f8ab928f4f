"""Compiling when something is in the way: the cache folder, NVRTC, the wrong CuPy, an interrupt.

On a GPU these compile and load; without one CuPy's own compiler and cache run all the same, and nothing is loaded.
"""

import errno
import gc
import os
import resource
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch

from cupymoe import moe_activation
from cupymoe.kernels import cuda_sources, cupy_import, jit, raw_read
from cupymoe.kernels.cupy_import import import_cupy
from cupymoe.kernels.jit import Variant

VARIANT = raw_read.variant()


class UnloadedModule:
    """CuPy's module of machine code, without a driver."""

    def load(self, cubin):
        assert cubin.startswith(b"\x7fELF")

    def _set_mapping(self, mapping):
        pass


class UnloadedRawModule:
    """CuPy's RawModule, for Hopper and without a driver."""

    def __init__(self, code, options):
        self.code, self.options = code, options

    def compile(self):
        import_cupy().cuda.compiler._compile_module_with_cache(self.code, self.options, arch="90")

    def get_function(self, entry):
        return entry


@pytest.fixture
def cupy(monkeypatch):
    cupy = import_cupy()
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: 13000)
        monkeypatch.setattr(cupy.cuda, "Device", lambda device: nullcontext())
        monkeypatch.setattr(cupy, "RawModule", UnloadedRawModule)
        monkeypatch.setattr(cupy.cuda.compiler.function, "Module", UnloadedModule)
        nvrtc_options = ("-arch=sm_90", "cubin")
        monkeypatch.setattr(cupy.cuda.compiler, "_get_arch_for_options_for_nvrtc", lambda arch: nvrtc_options)
        monkeypatch.setattr(jit, "Kernel", lambda *arguments: arguments)
    return cupy


@pytest.fixture
def cache(cupy, monkeypatch, tmp_path):
    """An empty cache folder of CuPy's, and a fresh start for what is warned of once."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
    disk = type(cupy.cuda.compiler._kernel_cache_backend)(str(folder))
    monkeypatch.setattr(cupy.cuda.compiler, "_kernel_cache_backend", disk)
    cupy_import._warn_once.cache_clear()
    yield folder
    cupy_import._warn_once.cache_clear()


def load(variant=VARIANT):
    """Compile, or find on disk, as the first call in a process does; gives the warnings."""
    import_cupy().clear_memo()  # it keeps what a process has loaded
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert jit._load.__wrapped__(variant, 0) is not None
    return [str(warning.message) for warning in caught]


def test_loaded_sources_are_those_of_the_variants_that_compiled(cache, monkeypatch):
    monkeypatch.setattr(jit, "_loaded_sources", set())
    with pytest.raises(jit.CompileError):
        load(Variant("route", ("SCALAR=no_type",)))
    assert jit.loaded_sources() == set()
    load()
    assert jit.loaded_sources() == {"raw_read"}


def entries(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def test_the_second_load_comes_from_the_folder(cache, cupy, monkeypatch):
    assert load() == []
    (entry,) = entries(cache).items()

    def compiled_again(*arguments):
        raise AssertionError("NVRTC was called")

    monkeypatch.setattr(cupy.cuda.compiler, "_compile_using_nvrtc_no_warning", compiled_again)
    assert load() == []
    assert list(entries(cache).items()) == [entry]


# What a process killed while writing, a full disk or a bad sector leaves of an entry.
DAMAGE = {
    "empty": lambda data: b"",
    "shorter than its hash": lambda data: data[:39],
    "its hash alone": lambda data: data[:40],
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one byte long": lambda data: data + b"\0",
    "a flipped bit in the hash": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "a flipped bit in the code": lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:],
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_compiled_anew_and_replaced(cache, damage):
    load()
    ((path, data),) = entries(cache).items()
    path.write_bytes(DAMAGE[damage](data))
    assert path.read_bytes() != data
    assert load() == []
    assert len(path.read_bytes()) == len(data)
    assert list(entries(cache)) == [path]


def check_degraded(messages, reason):
    """One warning that says what to do, and nothing left behind that changes a later compile."""
    assert len(messages) == 1
    assert f"can't be written ({os.strerror(reason)})" in messages[0]
    assert "Set CUPY_CACHE_DIR to a writable folder" in messages[0]
    assert "CUPY_CACHE_IN_MEMORY" not in os.environ


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_a_folder_that_takes_no_file(cache, monkeypatch, reason):
    """Read-only, forbidden, full, over quota, gone from under a network mount."""

    def refuse(*arguments, **kwargs):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    check_degraded(load(), reason)
    assert load() == []  # warned of once
    assert entries(cache) == {}


@contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_while_the_entry_is_written(cache):
    """The system refuses the bytes past a limit; the part before it stays under a name that no load looks for."""
    limit = len(cuda_sources.expanded(VARIANT.source)) + 1  # CuPy writes that first, elsewhere
    with files_of_at_most(limit):
        check_degraded(load(), errno.EFBIG)
    ((partial, data),) = entries(cache).items()
    assert len(data) == limit
    assert partial.suffix != ".cubin"
    assert load() == []
    (entry,) = set(entries(cache)) - {partial}
    assert len(entry.read_bytes()) > limit


def test_an_entry_that_can_not_be_read(cache):
    load()
    ((path, _),) = entries(cache).items()
    path.unlink()
    path.mkdir()
    check_degraded(load(), errno.EISDIR)


def test_an_interrupt_during_the_first_compile(cupy, monkeypatch):
    """The lock is free again, nothing half-made is kept, and the next call compiles."""
    variant = Variant("raw_read", (*VARIANT.defines, "INTERRUPTED"))
    compile = cupy.RawModule.compile

    class Interrupted(cupy.RawModule):
        interrupts = 1

        def compile(self):
            if Interrupted.interrupts:
                Interrupted.interrupts -= 1
                raise KeyboardInterrupt
            compile(self)

    monkeypatch.setattr(cupy, "RawModule", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        jit.kernel(variant, "raw_read", 0)
    with ThreadPoolExecutor(1) as pool:
        kernel = pool.submit(jit.kernel, variant, "raw_read", 0).result(timeout=60)
    assert jit.kernel(variant, "raw_read", 0) is kernel
    assert "CUPY_CACHE_IN_MEMORY" not in os.environ


@pytest.mark.gpu
def test_a_kernel_outlives_what_cupy_remembers():
    """CuPy's users may clear its memo; it holds the modules that our kernels are of."""
    input = torch.randn(4, 64, device="cuda")
    expected = moe_activation("silu", input)
    import_cupy().clear_memo()
    gc.collect()
    assert torch.equal(moe_activation("silu", input), expected)


# --- what is installed ------------------------------------------------------------------------------------------------


def test_no_nvrtc(cupy, monkeypatch):
    def missing():
        raise RuntimeError('Failure finding "libnvrtc.so.12"')

    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", missing)
    for compile in (lambda: jit._load.__wrapped__(VARIANT, 0), lambda: jit.compile_offline(VARIANT, "sm_80")):
        with pytest.raises(ImportError, match=r"NVRTC, which CuPy did not find: pip install .*libnvrtc.so.12"):
            compile()


@pytest.mark.parametrize(
    ("major", "driver", "message"),
    [
        (11, 13, r"cupy-cuda1\dx is for CUDA 11; cupymoe needs 12 .* pip install cupy-cuda13x"),
        (13, 12, r"is for CUDA 13; .* driver serves up to 12: pip uninstall -y cupy.* && pip install cupy-cuda12x"),
        (12, 11, r"is for CUDA 12; .* driver serves up to 11: .* pip install cupy-cuda12x, or update the driver"),
    ],
)
def test_a_cupy_of_the_wrong_cuda_major(cupy, monkeypatch, major, driver, message):
    monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: major * 1000 + 80)
    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: driver * 1000)
    with pytest.raises(ImportError, match=message):
        jit._load.__wrapped__(VARIANT, 0)


@pytest.mark.parametrize(("major", "driver"), [(12, 12), (12, 13), (13, 13)])
def test_a_driver_serves_older_majors(cupy, monkeypatch, major, driver):
    monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: major * 1000 + 80)
    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: driver * 1000)
    assert jit._load.__wrapped__(VARIANT, 0) is not None
