"""The wheel holds the CUDA sources and works from an empty folder, without the checkout."""

import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

from cupymoe.kernels import cuda_sources

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_every_cuda_source(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("cupymoe/cuda_src/")}
    sources = cuda_sources.directory()
    assert packed == {f"cupymoe/cuda_src/{path.relative_to(sources)}" for path in sources.rglob("*.cu*")}


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert [line for line in text.splitlines() if line.startswith("Requires-Dist: cupy") and "extra" not in line] == [
        "Requires-Dist: cupy-cuda12x>=14"
    ]


def test_wheel_works_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import cupymoe, torch\n"
        "from cupymoe.kernels import cuda_sources, jit, catalog\n"
        f"assert str(cuda_sources.directory()).startswith({str(site)!r}), cuda_sources.directory()\n"
        "print(cuda_sources.sha256())\n"
        "print(jit.compile_offline(next(catalog.variants()), 'sm_90a').registers > 0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=empty, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [cuda_sources.sha256(), "True"]


def test_what_pytest_benchmark_says_under_xdist_is_no_error():
    """It warns outside of every test, where an error of pytest's own configuration ends the whole run."""
    with warnings.catch_warnings(record=True) as caught:  # under the filters of pyproject.toml
        warnings.warn("Benchmarks are automatically disabled because xdist plugin is active.Benchmarks", stacklevel=1)
    assert caught == []
    with pytest.raises(UserWarning, match="another"):
        warnings.warn("another", stacklevel=1)
