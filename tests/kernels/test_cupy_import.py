"""Finding CuPy and NVRTC, and the folder of compiled kernels."""

import json

import pytest

from cupymoe.kernels import cupy_import
from tests.helpers import run_python


def test_two_cupys_over_each_other(monkeypatch):
    monkeypatch.setattr(cupy_import, "installed_cupys", lambda: {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"})
    with pytest.raises(ImportError, match=r"cupy-cuda12x and cupy-cuda13x are installed over each other") as caught:
        cupy_import.import_cupy.__wrapped__()
    assert "pip uninstall -y cupy-cuda12x cupy-cuda13x" in str(caught.value)


def test_no_cupy(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(cupy_import.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"need CuPy: pip install cupy-cuda12x \(No module named 'cupy'\)"):
        cupy_import.import_cupy.__wrapped__()


def test_installed_cupys():
    assert len(cupy_import.installed_cupys()) == 1
    assert cupy_import.import_cupy().__version__ in cupy_import.installed_cupys().values()


IMPORT = """
import json, os, sys
import torch
import cupymoe
cupymoe.route(torch.randn(3, 4), 2)
print(json.dumps({
    "cupy": sorted(name for name in sys.modules if name.partition(".")[0] in ("cupy", "cupyx", "cupy_backends")),
    "initialized": torch.cuda.is_initialized(),
    "written": [os.path.join(path, name) for path, _, names in os.walk(os.environ["HOME"]) for name in names],
}))
"""


def test_import_takes_no_cupy_touches_no_gpu_and_writes_nothing(tmp_path):
    seen = json.loads(run_python(IMPORT, HOME=str(tmp_path), TMPDIR=str(tmp_path)))
    assert seen == {"cupy": [], "initialized": False, "written": []}
    assert list(tmp_path.iterdir()) == []


# Warnings about the cache, in a process whose cache folder can't be written (root may write anywhere but below a file).
UNWRITABLE = """
import json, os, warnings
import torch
from cupymoe import moe_activation
from cupymoe.kernels import catalog, cupy_import, jit

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert cupy_import.import_cupy().__name__ == "cupy"
    if {lost}:
        os.rmdir(cupy_import.cache_folder())
        open(cupy_import.cache_folder(), "w").close()
    for variant in list(catalog.variants())[:2]:
        assert jit.compile_offline(variant, "sm_80").registers
    if torch.cuda.is_available():
        for columns in (8, 16):
            assert moe_activation("relu2_no_mul", torch.ones(2, columns, device="cuda")).sum() == 2 * columns
print(json.dumps([str(warning.message) for warning in caught if "cache" in str(warning.message)]))
"""


def test_unwritable_cache_folder_degrades_with_one_warning(tmp_path):
    (tmp_path / "file").touch()
    messages = json.loads(run_python(UNWRITABLE.format(lost=False), CUPY_CACHE_DIR=str(tmp_path / "file" / "cache")))
    assert len(messages) == 1
    assert "can't be written" in messages[0]
    assert "Set CUPY_CACHE_DIR to a writable folder" in messages[0]
    assert str(tmp_path / "file" / "cache") in messages[0]


@pytest.mark.gpu
def test_cache_folder_lost_after_import_degrades_with_one_warning(tmp_path):
    messages = json.loads(run_python(UNWRITABLE.format(lost=True), CUPY_CACHE_DIR=str(tmp_path / "cache")))
    assert len(messages) == 1
    assert "kernels are compiled anew in every process" in messages[0]
