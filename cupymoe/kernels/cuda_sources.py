"""Where the CUDA sources are, and their text with every include expanded."""

from __future__ import annotations

import functools
import hashlib
import re
from importlib.resources import files
from pathlib import Path

_INCLUDE = re.compile(r'^#include "(?P<path>[^"]+)"\s*$')
# A #line in a branch that is switched off does nothing: without another after the branch, the numbers of the lines that
# follow would count what was pasted into it.
_BRANCH_ENDS = re.compile(r"\s*#\s*(elif|else|endif)\b")
# A literal or a number is matched as a whole, so that no comment begins and no space is dropped within it.
_GAP_OR_WHOLE = re.compile(
    r"""(?P<gap>(?:\s|//[^\n]*|/\*.*?\*/)+)|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\b\d[\w.']*""", re.DOTALL
)


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
    """Hash over names and bytes of all sources and headers: the state of ``cuda_src``, for the record.

    Whether a benchmark report is still of the present kernels is decided by :func:`kernel_hash`.
    """
    digest = hashlib.sha256()
    for path in sorted(directory().rglob("*.cu*")):
        digest.update(path.relative_to(directory()).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def expanded(name: str) -> str:
    """Text of ``<name>.cu`` with its includes pasted in, so that CuPy's cache key covers every header.

    A header is pasted at each of its includes, between include guards: the preprocessor takes the first that no ``#if``
    has switched off, as it does for ``#pragma once``. ``#line`` keeps file and line of a compile error.

    Raises:
        ValueError: a header includes itself, by way of others or directly.
    """
    return _expand(directory() / f"{name}.cu", ()) + "\n"


@functools.cache
def kernel_hash(name: str) -> str:
    """Hash of what the compiler reads of ``<name>.cu`` and its headers; a benchmark report carries it for each source
    that it timed, and is stale once one of them has another.

    A change is another sequence of tokens, that of parts which the kernel does not use included.
    No change is what only moves, such as code into a header that is included at the same place, nor a comment, an
    indent, or a line that is broken elsewhere (but for preprocessor directives, which are lines). Functions in another
    order are a change, and so is a space where there was none.
    """
    text = "\n".join(_pasted_once(directory() / f"{name}.cu", set()))
    return hashlib.sha256(_normalised(text).encode()).hexdigest()


def _pasted_once(path: Path, seen: set[Path]) -> list[str]:
    """The lines of a file with each header where it is included first; what the expansion puts around it is no code."""
    seen.add(path)
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := _INCLUDE.match(line):
            included = (path.parent / match["path"]).resolve()
            lines += [] if included in seen else _pasted_once(included, seen)
        elif not line.startswith("#pragma once"):
            lines.append(line)
    return lines


def _normalised(text: str) -> str:
    """The text without comments, each run of whitespace one space, each directive on its own line."""

    def replace(match: re.Match[str]) -> str:
        gap = match["gap"]
        if gap is None:
            return match[0]
        return "\n" if "\n" in gap else " "

    text = text.replace("\\\n", " ")
    lines = _GAP_OR_WHOLE.sub(replace, text).strip().split("\n")
    return "".join(f"\n{line}\n" if line.startswith("#") else f"{line} " for line in lines)


def _expand(path: Path, includers: tuple[Path, ...]) -> str:
    shown = _shown(path)
    if path in includers:
        raise ValueError(f"an include leads back to its own file: {' -> '.join(map(_shown, (*includers, path)))}")
    lines, renumber = [f'#line 1 "{shown}"'], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if match := _INCLUDE.match(line):
            included = (path.parent / match["path"]).resolve()
            guard = "CUPYMOE_" + re.sub(r"\W", "_", _shown(included)).upper()
            lines += [
                f"#ifndef {guard}",
                f"#define {guard}",
                _expand(included, (*includers, path)),
                f"#endif  // {guard}",
            ]
        else:
            lines.append("" if line.startswith("#pragma once") else line)
        renumber = renumber or match is not None or _BRANCH_ENDS.match(line) is not None
        if renumber and not line.endswith("\\"):
            lines.append(f'#line {number + 1} "{shown}"')
            renumber = False
    return "\n".join(lines)


def _shown(path: Path) -> str:
    return path.relative_to(directory()).as_posix()
