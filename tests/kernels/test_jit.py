"""Compiling: every source for every architecture, and what happens when something is in the way."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from cupymoe import Gemma4MoEConfig, MoEActivation, moe_activation
from cupymoe.kernels import catalog, cuda_sources, expert_stream, experts_down, experts_up, gated_activation, jit
from cupymoe.kernels.activation_defines import activation_defines
from cupymoe.kernels.arch import ARCHITECTURES, BUILDS, HOPPER
from cupymoe.kernels.catalog_shapes import quantised_stream_shapes
from cupymoe.kernels.expert_tiles import CUTS, down_back_cut, down_cut
from cupymoe.kernels.jit import CompileError, Variant
from cupymoe.kernels.load import Load
from cupymoe.kernels.stream_regimes import regime
from tests.helpers import WITH_PARAMETERS, compiled, run_python


def test_catalog_holds_every_source():
    assert sorted({variant.source for variant in catalog.variants()}) == cuda_sources.names()


def test_catalog_holds_nothing_twice():
    variants = list(catalog.variants())
    assert len(set(variants)) == len(variants)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("intermediate", [704, 176])
def test_catalog_holds_every_regime(intermediate, dtype):
    config = Gemma4MoEConfig.gemma4_26b_a4b()
    loads = [Load.of(num_tokens, config.top_k_experts, config.num_experts) for num_tokens in range(1, 1025)]
    regimes = {regime(load, intermediate) for load in loads}
    experts, hidden, top_k = config.num_experts, config.hidden_size, config.top_k_experts
    shapes = [
        expert_stream.Shape(each, dtype, torch.int64, config.activation, experts, hidden, intermediate, top_k)
        for each in regimes
    ]
    held = set(catalog.variants())
    assert {experts_up.variant(shape) for shape in shapes} <= held
    assert {experts_down.variant(shape) for shape in shapes} <= held


def defines_in_catalog(source, *names):
    """The values that its variants give these defines together."""
    defines = [
        dict(define.split("=") for define in each.defines) for each in catalog.variants() if each.source == source
    ]
    return {tuple(values[name] for name in names) for values in defines}


def test_catalog_holds_every_cut():
    """The way back through gate_up is a down projection as deep as gate_up has rows, of the transposed weight."""
    sizes = [*product(("bf16", "fp16"), (704, 176), CUTS)]
    expected = {
        "experts_up_wgmma": {(scalar, size, *cut) for scalar, size, cut in sizes},
        "experts_down_wgmma": {
            (scalar, depth, *down_cut(cut, depth, transposed))
            for scalar, size, cut in sizes
            for depth, transposed in ((size, False), (2 * size, True))
        },
        "experts_down_back_wgmma": {(scalar, size, *down_back_cut(cut)) for scalar, size, cut in sizes},
    }
    for source, cuts in expected.items():
        held = defines_in_catalog(source, "SCALAR", "INTERMEDIATE", "BLOCKS", "PRODUCTS")
        assert held >= {tuple(map(str, each)) for each in cuts}, source


@pytest.mark.parametrize("suffix", ["", "_wgmma"])
def test_catalog_holds_every_kind_of_experts(suffix):
    kinds = defines_in_catalog(f"experts_up{suffix}", "GATED", "INTERLEAVED", "TRANSPOSED", "HAS_BIAS")
    assert kinds == {(*rows, *rest) for rows in ("10", "11", "00") for rest in product("01", repeat=2)}
    assert defines_in_catalog(f"experts_down{suffix}", "TRANSPOSED", "HAS_BIAS") == {*product("01", repeat=2)}


@pytest.mark.parametrize("source", ["experts_up", "experts_down"])
def test_catalog_holds_transposed_weights_in_every_regime(source):
    held = defines_in_catalog(source, "TRANSPOSED", "TOKENS")
    of_codes = {("0", "1"), ("0", "16"), ("0", "24")}
    assert held - of_codes == {*product("01", ("8", "32", "48", "80"))}


@pytest.mark.parametrize("source", ["gated_activation", "gather", "combine"])
def test_catalog_holds_every_vector_width(source):
    widths = {("bf16", "8"), ("fp16", "8"), ("fp32", "4"), ("bf16", "1"), ("fp16", "1"), ("fp32", "1")}
    assert widths <= defines_in_catalog(source, "SCALAR", "VEC")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", WITH_PARAMETERS, ids=lambda activation: activation.value)
def test_an_activation_is_compiled_with_its_parameters(activation, dtype):
    theirs, ours = (
        compiled(gated_activation.variant(dtype, member, 704, 4), "sm_90a")
        for member in (activation.member, activation)
    )
    assert ours.cubin != theirs.cubin
    assert ours.spill_bytes == 0


@pytest.mark.parametrize("source", ["experts_up", "experts_up_wgmma"])
def test_experts_are_compiled_with_the_parameters_of_their_activation(source):
    variant = next(variant for variant in catalog.variants() if variant.source == source)
    others = tuple(define for define in variant.defines if "ACTIVATION" not in define)
    cubins = {
        compiled(Variant(source, others + defines), "sm_90a").cubin
        for defines in map(activation_defines, (MoEActivation.SILU, WITH_PARAMETERS[0], WITH_PARAMETERS[1]))
    }
    assert len(cubins) == 3


def test_a_limit_beyond_float32_is_no_define():
    assert activation_defines(MoEActivation.SWIGLUSTEP.with_parameters(limit=1e39)) == ("ACTIVATION=SWIGLUSTEP",)
    assert activation_defines(MoEActivation.GELU_TANH) == ("ACTIVATION=GELU_TANH",)
    assert activation_defines(MoEActivation.SILU) == ("ACTIVATION=SILU", "ACTIVATION_ALPHA=1.0")
    assert activation_defines(MoEActivation.SWIGLUOAI.with_parameters(limit=1e-6)) == (
        "ACTIVATION=SWIGLUOAI",
        "ACTIVATION_LIMIT=1e-06",
        "ACTIVATION_ALPHA=1.702",
    )


def test_hopper_alone_has_the_tiles():
    everywhere = tuple(arch.name for arch in ARCHITECTURES)
    hopper = {name for name in cuda_sources.names() if catalog.architectures(name) != everywhere}
    training = {"experts_down_back_wgmma", "experts_outer_wgmma", "sum_parts", "lora_shrink", "lora_outer", "lora_back"}
    of_codes = {"experts_up_codes_wgmma", "experts_down_codes_wgmma", "operand_rows"}
    assert hopper == {"experts_up_wgmma", "experts_down_wgmma"} | of_codes | training
    assert {catalog.architectures(name) for name in hopper} == {("sm_90a",)}


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.name)
def test_an_architecture_s_catalog_holds_every_regime_of_codes(arch):
    every = {regime(Load.of(tokens, 8, 128), 704, arch, has_codes=True) for tokens in range(1, 5000)}
    assert {shape.regime for shape in quantised_stream_shapes(arch)} == every


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.name)
def test_an_architecture_s_catalog_holds_what_it_is_served(arch):
    held = {variant.source for variant in catalog.variants(arch)}
    assert held == {name for name in cuda_sources.names() if catalog.is_served(name, arch)}
    whole_rows = [variant for variant in catalog.variants(arch) if "WHOLE_ROWS=1" in variant.defines]
    assert bool(whole_rows) == (arch.shared_bytes_of_block == HOPPER.shared_bytes_of_block)


SOURCES_AND_ARCHITECTURES = [
    (source, arch) for source in cuda_sources.names() for arch in catalog.architectures(source)
]


def variants_of(source):
    return [variant for variant in catalog.variants() if variant.source == source]


def assert_compiles(variant, arch):
    report = compiled(variant, arch)
    assert report.registers > 0, report.log
    assert report.spill_bytes == 0, f"{variant.defines}\n{report.log}"
    assert "warning" not in report.log, f"{variant.defines}\n{report.log}"


@pytest.mark.parametrize(("source", "arch"), SOURCES_AND_ARCHITECTURES)
def test_a_variant_of_each_source_compiles_without_a_gpu(source, arch):
    """The stream's kernels as an architecture's own shared memory has them."""
    assert_compiles(*next(each for each in catalog.compilations(source) if each[1] == arch))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "arch"), [each for each in SOURCES_AND_ARCHITECTURES if each[1] in ("sm_80", "sm_90a")]
)
def test_every_variant_compiles_without_a_gpu(source, arch):
    compilations = [each for each in catalog.compilations(source) if each[1] == arch]
    assert len(compilations) > 1 or source in ("plan_batch", "raw_read", "sum_parts")
    for each in compilations:
        assert_compiles(*each)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A header of route.cu with an error in its last line; gives that line's number."""
    folder = tmp_path / "cuda_src"
    shutil.copytree(cuda_sources.directory(), folder)
    header = folder / "common" / "dtypes.cuh"
    header.write_text(header.read_text() + "float broken() { return undeclared_name; }\n")
    monkeypatch.setattr(cuda_sources, "directory", lambda: folder)
    cuda_sources.expanded.cache_clear()
    yield len(header.read_text().splitlines())
    cuda_sources.expanded.cache_clear()


def route_variant():
    return next(variant for variant in catalog.variants() if variant.source == "route")


def test_compile_error_shows_file_line_options_and_log(broken):
    with pytest.raises(CompileError) as caught:
        jit.compile_offline(route_variant(), "sm_90a")
    message = str(caught.value)
    assert message.startswith("route.cu does not compile with -arch=sm_90a -std=c++17")
    assert "-DNUM_EXPERTS=128" in message
    assert f"common/dtypes.cuh({broken}): error" in message
    assert 'identifier "undeclared_name" is undefined' in message


@pytest.mark.gpu
def test_compile_error_on_a_device(broken):
    variant = Variant("route", (*route_variant().defines, "NEVER_COMPILED_BEFORE"))
    with pytest.raises(CompileError, match=rf"(?s)route.cu does not compile with .*dtypes.cuh\({broken}\): error"):
        jit.kernel(variant, "route", 0)


@pytest.mark.parametrize(
    ("capability", "dependent"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)]
)
def test_only_hopper_and_newer_begin_before_the_kernel_before(monkeypatch, capability, dependent):
    """Elsewhere the driver refuses the attribute, and the source would not wait."""
    made = []
    monkeypatch.setattr(jit, "_load", lambda *_: SimpleNamespace(get_function=lambda entry: entry))
    monkeypatch.setattr(jit, "Kernel", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(
        jit, "import_cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(Device=lambda device: nullcontext()))
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    jit._kernel.__wrapped__(Variant("route", ()), "route", 0, 0, True, 0)
    assert made == [("route", 0, dependent, 0)]


@pytest.mark.parametrize(
    ("build", "used", "asked"),
    [
        (None, 20480, 20480),
        (BUILDS["sm_86"], 99 * 1024 - 512, 227 * 1024 - 512),
        (BUILDS["sm_120"], 49 * 1024 - 512, 113 * 1024 - 512),
        (BUILDS["sm_80"], 163 * 1024 - 512, 227 * 1024 - 512),
    ],
)
def test_a_build_asks_for_its_card_s_share_of_a_multiprocessor(monkeypatch, build, used, asked):
    made = []
    function = SimpleNamespace(shared_size_bytes=512)
    monkeypatch.setattr(jit, "_load", lambda *_: SimpleNamespace(get_function=lambda entry: function))
    monkeypatch.setattr(jit, "Kernel", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(
        jit, "import_cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(Device=lambda device: nullcontext()))
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    jit._kernel.__wrapped__(Variant("route", ()), "route", 0, used, False, 0, build)
    assert made == [(function, asked, False, 0)]


def test_missing_defines_are_named():
    with pytest.raises(CompileError, match=r"route.cu\(\d+\): .*error: #error( directive)?:? .*NUM_EXPERTS"):
        jit.compile_offline(Variant("route", ("SCALAR=bf16",)), "sm_80")


class AnsweringNvrtc:
    """CuPy's binding of NVRTC, which answers with a given log and keeps what it was asked."""

    class NVRTCError(Exception):
        pass

    def __init__(self, log="", version=(13, 0), refuses=False):
        self.log, self.version, self.refuses = log, version, refuses
        self.options, self.programs = None, 0

    def getVersion(self):
        return self.version

    def createProgram(self, source, name, headers, include_names):
        self.programs += 1
        return self.programs

    def compileProgram(self, program, options):
        self.options = options
        if self.refuses:
            raise self.NVRTCError

    def getProgramLog(self, program):
        return self.log

    def getCUBIN(self, program):
        return b"all but the last byt"

    def destroyProgram(self, program):
        self.programs -= 1


def compile_with(nvrtc, monkeypatch):
    monkeypatch.setattr(jit, "import_nvrtc", lambda: nvrtc)
    return jit.compile_offline(Variant("route", ("SCALAR=bf16",)), "sm_80")


LOG = """ptxas info    : Compiling entry function 'count' for 'sm_80'
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 12 registers, 4 bytes smem
ptxas info    : Compiling entry function 'sort' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 30 registers
ptxas info    : Compiling entry function 'clear' for 'sm_80'
ptxas info    : Used 9 registers
"""


@pytest.mark.parametrize(
    ("log", "registers", "spill_bytes"), [(LOG, 30, 28), ("", 0, 0)], ids=["three entries", "none"]
)
def test_a_report_has_the_most_registers_and_the_sum_of_all_spills(monkeypatch, log, registers, spill_bytes):
    report = compile_with(AnsweringNvrtc(log), monkeypatch)
    assert (report.registers, report.spill_bytes, report.log) == (registers, spill_bytes, log)


@pytest.mark.parametrize(("version", "last"), [((12, 8), ()), ((12, 9), ("-no-cache",)), ((13, 0), ("-no-cache",))])
def test_offline_has_the_options_of_a_device(monkeypatch, version, last):
    """And -no-cache where NVRTC knows it: the log of a cubin out of the driver's cache is empty."""
    nvrtc = AnsweringNvrtc(version=version)
    compile_with(nvrtc, monkeypatch)
    ours = ("-arch=sm_80", "-std=c++17", "-lineinfo", "-DSCALAR=bf16")
    assert nvrtc.options == (*ours, "-ftz=true", "--ptxas-options=-v", *last)


def test_a_report_has_the_last_byte_of_the_cubin_that_cupy_drops(monkeypatch):
    assert compile_with(AnsweringNvrtc(), monkeypatch).cubin == b"all but the last byt\0"


def test_no_program_is_left_behind(monkeypatch):
    nvrtc = AnsweringNvrtc()
    compile_with(nvrtc, monkeypatch)
    assert nvrtc.programs == 0


def test_no_program_is_left_behind_by_an_error(monkeypatch):
    nvrtc = AnsweringNvrtc("line 7: error", refuses=True)
    with pytest.raises(CompileError, match=r"route.cu does not compile with -arch=sm_80 .*:\nline 7: error"):
        compile_with(nvrtc, monkeypatch)
    assert nvrtc.programs == 0


@pytest.mark.gpu
def test_each_variant_is_compiled_once():
    variant = route_variant()
    first = jit.kernel(variant, "route", 0)
    compiled = jit.compiled_variants()
    assert jit.kernel(variant, "route", 0) is first
    assert jit.compiled_variants() == compiled


@pytest.mark.gpu
def test_the_next_process_finds_the_cubin_on_disk(tmp_path):
    code = """
import os, torch
from cupymoe import moe_activation
from cupymoe.kernels import cupy_import
moe_activation("silu", torch.ones(2, 8, device="cuda"))
print(len(os.listdir(cupy_import.cache_folder())))
"""
    counts = [int(run_python(code, CUPY_CACHE_DIR=str(tmp_path))) for _ in range(2)]
    assert counts[0] >= 1
    assert counts[1] == counts[0]


@pytest.mark.gpu
def test_launch_from_a_fresh_thread():
    """A thread in which nothing has made a CUDA context current: its memory comes from the allocator's cache."""
    input = torch.randn(4, 64, device="cuda")
    expected = moe_activation("silu", input).clone()
    with ThreadPoolExecutor(1) as pool:
        output = pool.submit(moe_activation, "silu", input).result()
    assert torch.equal(output, expected)


@pytest.mark.gpu
def test_threads_compile_once_and_launch_at_the_same_time():
    """Columns that no other test has; each thread packs parameters of its own."""
    inputs = [torch.full((4, 2 * 1048), float(i), device="cuda") for i in range(16)]
    before = jit.compiled_variants()
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda input: moe_activation("relu2", input), inputs))
    assert jit.compiled_variants() == before + 1
    for i, output in enumerate(outputs):
        assert (output == float(i) ** 3).all()
