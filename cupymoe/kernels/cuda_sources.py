"""Where the CUDA sources are, and their text with every include expanded."""

from __future__ import annotations

import functools
import hashlib
import re
from importlib.resources import files
from pathlib import Path

_INCLUDE = re.compile(r'^#include "(?P<path>[^"]+)"\s*$')


@functools.cache
def directory() -> Path:
    """The folder ``cuda_src``: inside an installed package, beside it in a checkout.

    Raises:
        FileNotFoundError: neither holds it, so the installation is broken.
    """
    package = Path(str(files("cupymoe")))
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if (folder / "common" / "dtypes.cuh").is_file():
            return folder.resolve()
    raise FileNotFoundError(f"cupymoe's CUDA sources are neither in {package} nor beside it: reinstall cupymoe")


def names() -> list[str]:
    """Every compilable source, by its stem."""
    return sorted(path.stem for path in directory().glob("*.cu"))


def sha256() -> str:
    """Hash over names and bytes of all sources and headers; reports carry it, so that a stale one is seen."""
    digest = hashlib.sha256()
    for path in sorted(directory().rglob("*.cu*")):
        digest.update(path.relative_to(directory()).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def expanded(name: str) -> str:
    """Text of ``<name>.cu`` with its includes pasted in, once each.

    CuPy's cache key covers this text, and so every header; ``#line`` keeps file and line of a compile error.
    """
    return _expand(directory() / f"{name}.cu", set())


def _expand(path: Path, seen: set[Path]) -> str:
    seen.add(path)
    shown = path.relative_to(directory()).as_posix()
    lines = [f'#line 1 "{shown}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if match := _INCLUDE.match(line):
            included = (path.parent / match["path"]).resolve()
            if included not in seen:
                lines.append(_expand(included, seen))
            lines.append(f'#line {number + 1} "{shown}"')
        else:
            lines.append("" if line.startswith("#pragma once") else line)
    return "\n".join(lines) + "\n"
