"""What a report says of its origin: the versions it was made with, and the kernels that a benchmark timed."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

import cupymoe
from cupymoe.kernels import cuda_sources, cupy_import


def versions() -> dict[str, str]:
    """Versions of everything that bears on what is computed and how fast.

    CuPy is named by its distribution, ``cupy-cuda12x`` or ``cupy-cuda13x``. Packages that cupymoe is only measured
    against are left out where they are not installed.
    """
    found = {
        "cupymoe": cupymoe.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none in this torch",
        **(cupy_import.installed_cupys() or {"cupy": "not installed"}),
        "transformers": "not installed",
    }
    for package in ("transformers", "peft", "vllm", "sglang", "sonic-moe"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def kernel_hashes(names: Iterable[str]) -> dict[str, str]:
    """:func:`cupymoe.kernels.cuda_sources.kernel_hash` of each source, in alphabetical order: a benchmark's
    ``"kernels"``.
    """
    return {name: cuda_sources.kernel_hash(name) for name in sorted(names)}


def committed() -> list[Path]:
    """The benchmark reports ``benchmarks/<device>/<name>.json`` of a checkout; none in an installed wheel."""
    return sorted((cuda_sources.directory().parent / "benchmarks").glob("*/*.json"))


def stale_reason(path: Path) -> str | None:
    """Why a benchmark report says nothing of the present kernels; None if every kernel that it timed is unchanged.

    A kernel that the report did not time does not matter, whether it changed, came or went.
    """
    try:
        timed = dict(json.loads(path.read_text(encoding="utf-8"))["kernels"])
    except (ValueError, KeyError, TypeError) as error:
        return f"it does not say which kernels it timed ({type(error).__name__}: {error})"
    if not timed:
        return "it timed no kernel of cupymoe"
    present = cuda_sources.names()
    gone = [name for name in timed if name not in present]
    changed = [name for name in timed if name in present and timed[name] != cuda_sources.kernel_hash(name)]
    reasons = [
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {what} since"
        for names, what in ((changed, "changed"), (gone, "gone"))
        if names
    ]
    return "; ".join(reasons) or None
