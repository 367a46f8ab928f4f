"""Compilations without a GPU, kept on disk where ``CUPYMOE_OFFLINE_CACHE`` names a folder.

``cupymoe verify`` and the tests compile the same kernels in processes of their own; ``.ci/run`` sets the variable, so
that each is compiled once. Without it nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from cupymoe.kernels import cuda_sources, jit
from cupymoe.kernels.cupy_import import import_nvrtc
from cupymoe.kernels.jit import CompileReport, Variant


def compile_offline(variant: Variant, arch: str) -> CompileReport:
    """As :func:`cupymoe.kernels.jit.compile_offline`, or what it gave before for the same text, the same options, which
    name defines and architecture, and the same version of NVRTC.

    Raises:
        CompileError: NVRTC refused the source; that is not kept.
    """
    folder = os.environ.get("CUPYMOE_OFFLINE_CACHE")
    if not folder:
        return jit.compile_offline(variant, arch)
    options = jit.offline_options(variant, arch)
    what = json.dumps([cuda_sources.expanded(variant.source), options, import_nvrtc().getVersion()])
    path = Path(folder) / f"{hashlib.sha256(what.encode()).hexdigest()}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return CompileReport(**{**kept, "cubin": bytes.fromhex(kept["cubin"])})
    report = jit.compile_offline(variant, arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process never sees a file that is half written.
    with tempfile.NamedTemporaryFile("w", dir=folder, encoding="utf-8", delete=False) as file:
        json.dump({**report._asdict(), "cubin": report.cubin.hex()}, file)
    os.replace(file.name, path)
    return report
