"""Finding, expanding and hashing the CUDA sources."""

import re
import shutil
from pathlib import Path

import pytest

from cupymoe.kernels import cuda_sources, jit
from cupymoe.kernels.jit import CompileError, Variant
from tests.helpers import ROOT, run_python


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of cuda_src that a test may change."""
    folder = tmp_path / "cuda_src"
    shutil.copytree(cuda_sources.directory(), folder)
    monkeypatch.setattr(cuda_sources, "directory", lambda: folder)
    clear_caches()
    yield folder
    clear_caches()


def clear_caches():
    cuda_sources.expanded.cache_clear()
    cuda_sources.kernel_hash.cache_clear()


def test_directory_and_names():
    folder = cuda_sources.directory()
    assert cuda_sources.names() == sorted(path.stem for path in folder.glob("*.cu"))
    assert {"gated_activation", "route", "sort_by_expert", "gather", "combine"} <= set(cuda_sources.names())
    assert (folder / "common" / "dtypes.cuh").is_file()


@pytest.mark.parametrize("name", cuda_sources.names())
def test_expanded_holds_every_include(name):
    text = cuda_sources.expanded(name)
    assert "#include" not in text
    assert "#pragma once" not in text
    first_lines = re.findall(r'^#line 1 "(.*)"$', text, re.MULTILINE)
    assert first_lines[0] == f"{name}.cu"
    assert "common/dtypes.cuh" in first_lines


GUARD = re.compile(r"#(ifndef|define|endif  //) CUPYMOE_\w+_CUH")


@pytest.mark.parametrize("name", cuda_sources.names())
def test_line_directives_name_the_line_that_follows(name):
    """What a compile error will point at is the line in the file; the guards around a header are lines of none."""
    lines_of = {}
    shown, number = None, 0
    for line in cuda_sources.expanded(name).splitlines():
        if match := re.fullmatch(r'#line (\d+) "(.*)"', line):
            number, shown = int(match[1]), match[2]
            lines_of.setdefault(shown, (cuda_sources.directory() / shown).read_text().splitlines())
        elif GUARD.fullmatch(line):
            shown = None  # until the #line that must come before the next line of a file
        else:
            assert not line or line == lines_of[shown][number - 1]
            number += 1


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes CUDA sources, among them probe.cu, and compiles that."""

    def compile_probe(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return jit.compile_offline(Variant("probe", ()), "sm_80")

    monkeypatch.setattr(cuda_sources, "directory", lambda: tmp_path)
    cuda_sources.expanded.cache_clear()
    yield compile_probe
    cuda_sources.expanded.cache_clear()


KERNEL = 'extern "C" __global__ void probe(int* x) { *x = value(); }\n'
VALUE = "#pragma once\n__device__ int value() { return 1; }\n"


@pytest.mark.parametrize(
    "includes",
    [
        '#if 0\n#include "common/value.cuh"\n#endif\n#include "common/value.cuh"\n',
        '#include "common/value.cuh"\n#if 0\n#include "common/value.cuh"\n#endif\n',
        '#include "common/value.cuh"\n#include "common/value.cuh"\n#include "common/other.cuh"\n',
        '#if 0\n#include "common/other.cuh"\n#else\n#include "common/value.cuh"\n#endif\n',
    ],
    ids=["first switched off", "second switched off", "several times", "switched off through another header"],
)
def test_a_header_is_there_once_wherever_it_is_not_switched_off(written, includes):
    other = '#pragma once\n#include "value.cuh"\n'
    report = written({"probe.cu": includes + KERNEL, "common/value.cuh": VALUE, "common/other.cuh": other})
    assert report.registers > 0


@pytest.mark.parametrize(
    ("before", "line"),
    [
        ('#if 0\n#include "common/value.cuh"\n#endif\n', 4),
        ('#if 0\n#include "common/value.cuh"\n#else\n', 4),
        ('#if 0\n#include "common/value.cuh"\n#elif 1\n', 4),
        ('#if 0\n#include "common/value.cuh"\n#elif 1 || \\\n 0\n', 5),
        ('#if 0\n#if 1\n#include "common/value.cuh"\n#endif\n#endif\n', 6),
    ],
    ids=["if", "else", "elif", "elif over two lines", "if within if"],
)
def test_a_header_that_is_switched_off_is_not_there_and_moves_no_line(written, before, line):
    source = before + KERNEL + ("#endif\n" if "el" in before else "")
    with pytest.raises(CompileError, match=rf'probe.cu\({line}\): error: identifier "value" is undefined'):
        written({"probe.cu": source, "common/value.cuh": VALUE})


def test_a_compile_error_of_a_header_that_is_included_again_names_its_line(written):
    includes = '#if 0\n#include "common/value.cuh"\n#endif\n#include "common/value.cuh"\n'
    with pytest.raises(CompileError, match=r'common/value.cuh\(3\): error: identifier "unknown" is undefined'):
        written({"probe.cu": includes + KERNEL, "common/value.cuh": VALUE + "int other() { return unknown; }\n"})


@pytest.mark.parametrize(
    ("second", "shown"),
    [
        ('#include "first.cuh"\n', "common/first.cuh -> common/second.cuh -> common/first.cuh"),
        ('#include "second.cuh"\n', "common/first.cuh -> common/second.cuh -> common/second.cuh"),
        ('#include "../probe.cu"\n', "common/first.cuh -> common/second.cuh -> probe.cu"),
    ],
    ids=["two headers", "itself", "the source"],
)
def test_includes_in_a_circle_are_refused(written, second, shown):
    includes = {"probe.cu": '#include "common/first.cuh"\n', "common/first.cuh": '#include "second.cuh"\n'}
    with pytest.raises(ValueError, match=f"^an include leads back to its own file: probe.cu -> {shown}$"):
        written({**includes, "common/second.cuh": second})


def test_expanded_and_hash_follow_a_header(copied):
    before_text, before_hash = cuda_sources.expanded("route"), cuda_sources.sha256()
    assert re.fullmatch(r"[0-9a-f]{64}", before_hash)
    header = copied / "common" / "dtypes.cuh"
    header.write_text(header.read_text() + "// changed\n")
    clear_caches()
    assert cuda_sources.expanded("route") != before_text
    assert cuda_sources.sha256() != before_hash


def test_hash_follows_a_name(copied):
    before = cuda_sources.sha256()
    (copied / "route.cu").rename(copied / "router.cu")
    assert cuda_sources.sha256() != before


@pytest.mark.parametrize(
    ("files", "others"),
    [
        ({"a.cu": "h"}, {"a.cuh": ""}),
        ({"a.cu": "x", "b.cu": ""}, {"a.cu": "", "xb.cu": ""}),
        ({"common/a.cuh": ""}, {"a.cuh": ""}),
    ],
    ids=["name and bytes", "bytes and the next name", "folder"],
)
def test_hash_keeps_names_and_bytes_apart(tmp_path, monkeypatch, files, others):
    hashes = set()
    for number, content in enumerate((files, others)):
        folder = tmp_path / str(number)
        for name, text in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        monkeypatch.setattr(cuda_sources, "directory", lambda folder=folder: folder)
        hashes.add(cuda_sources.sha256())
    assert len(hashes) == 2


def test_hash_does_not_follow_the_order_in_which_a_folder_lists_its_files(monkeypatch):
    before, listed = cuda_sources.sha256(), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: reversed([*listed(folder, pattern)]))
    assert cuda_sources.sha256() == before


@pytest.mark.parametrize("where", [["cupymoe"], ["."], ["cupymoe", "."]], ids=["inside", "beside", "both"])
def test_sources_inside_the_package_go_before_those_beside_it(tmp_path, monkeypatch, where):
    for folder in where:
        header = tmp_path / folder / "cuda_src" / "common" / "dtypes.cuh"
        header.parent.mkdir(parents=True)
        header.touch()
    monkeypatch.setattr(cuda_sources, "files", lambda package: tmp_path / "cupymoe")
    assert cuda_sources.directory.__wrapped__() == tmp_path / where[0] / "cuda_src"


def test_missing_sources_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_sources, "files", lambda package: tmp_path / "cupymoe")
    with pytest.raises(FileNotFoundError, match=r"CUDA sources are neither in .*cupymoe nor beside it: reinstall"):
        cuda_sources.directory.__wrapped__()


def test_a_checkout_behind_a_symbolic_link(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(ROOT)
    code = "from cupymoe.kernels import cuda_sources; print(len(cuda_sources.expanded('route')))"
    assert int(run_python(code, PYTHONPATH=str(link))) > 1000


TEXT = """\
#pragma once
__device__ float twice(float x) {
    return 2 * x;
}

__device__ float half(float x) {
    asm("fma.rn.f32  %0; // a string, no comment" ::);
    return x / 2'000;
}
#define COLS 4
"""


def hash_of(folder, text, **headers):
    """Of a kernel that includes a header of this text."""
    (folder / "probe.cu").write_text('#include "common/probe.cuh"\n__global__ void probe() {}\n')
    (folder / "common" / "probe.cuh").write_text(text)
    for name, header in headers.items():
        (folder / "common" / f"{name}.cuh").write_text(header)
    clear_caches()
    return cuda_sources.kernel_hash("probe")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    return 2", "return  2"),
        ("return 2 * x;\n", "return 2 *\n    x;\n"),
        ("2 * x;", "2 * x;  // it's twice \"x"),
        ("2 * x;", "/* of\ntwo lines */ 2 * x;"),
        ("2 * x;", '2 * /* " */ x;'),
        ("#define COLS 4", "#define COLS  4  // columns"),
        ("#define COLS 4", "#define COLS \\\n    4"),
        ("}\n\n__device__", "}\n__device__"),
        ("}\n\n__device__", "}\n\n// Half of x.\n\n__device__"),
    ],
)
def test_a_kernel_s_hash_does_not_follow_comments_and_layout(copied, old, new):
    changed = TEXT.replace(old, new)
    assert changed != TEXT
    assert hash_of(copied, changed) == hash_of(copied, TEXT)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * x", "3 * x"),
        ("return 2 * x", "return2 * x"),
        ("2'000", "2'001"),
        ("f32  %0", "f32 %0"),
        ("a string, no comment", "another"),
        ("#define COLS 4", "#define COLS 5"),
        ("#define COLS 4\n", "#define COLS\n4\n"),
        ("#define COLS 4\n", ""),
    ],
)
def test_a_kernel_s_hash_follows_every_token(copied, old, new):
    changed = TEXT.replace(old, new)
    assert changed != TEXT
    assert hash_of(copied, changed) != hash_of(copied, TEXT)


def test_a_kernel_s_hash_follows_the_order_of_functions(copied):
    twice, half = "void twice() {}\n", "void half() {}\n"
    assert hash_of(copied, twice + half) != hash_of(copied, half + twice)


def test_a_kernel_s_hash_does_not_follow_code_that_moves_to_a_header_of_its_own(copied):
    before = hash_of(copied, TEXT)
    first, _, rest = TEXT.partition("__device__ float half")
    rest = f"#pragma once\n// Half of something.\n__device__ float half{rest}"
    assert hash_of(copied, f'{first}#include "half.cuh"\n', half=rest) == before


def test_a_kernel_s_hash_does_not_follow_other_kernels(copied):
    before = {name: cuda_sources.kernel_hash(name) for name in cuda_sources.names()}
    source = copied / "route.cu"
    source.write_text(source.read_text() + "__global__ void another() {}\n")
    shutil.copy(source, copied / "another.cu")
    clear_caches()
    after = {name: cuda_sources.kernel_hash(name) for name in cuda_sources.names()}
    assert {name for name in after if after[name] != before.get(name)} == {"route", "another"}
    assert len(set(after.values())) == len(before)  # the two new ones are the same
