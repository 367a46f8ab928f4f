"""What is known of an architecture: of those that are listed, of those that are not, and in the sources."""

import re
import shutil

import pytest
import torch

from cupymoe.kernels import catalog, cuda_sources, jit
from cupymoe.kernels.arch import ARCHITECTURES, BUILDS, HOPPER, RESERVED_BYTES, Arch
from cupymoe.kernels.jit import CompileError, Variant
from tests.helpers import compiled


@pytest.fixture
def arch_of(monkeypatch):
    """Arch.of a device of some compute capability."""

    def arch_of(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        return Arch.of(0)

    return arch_of


# name, capability, KB of shared memory of a block and of a multiprocessor, and whether it is as Hopper is but for wgmma
EXPECTED = [
    ("sm_75", (7, 5), (48, 48), False),
    ("sm_80", (8, 0), (163, 164), False),
    ("sm_86", (8, 6), (99, 100), False),
    ("sm_87", (8, 7), (99, 100), False),
    ("sm_89", (8, 9), (99, 100), False),
    ("sm_90a", (9, 0), (227, 228), True),
    ("sm_91", (9, 1), (227, 228), True),
    ("sm_100", (10, 0), (227, 228), True),
    ("sm_103", (10, 3), (227, 228), True),
    ("sm_120", (12, 0), (99, 100), True),
    ("sm_121", (12, 1), (99, 100), True),
]


@pytest.mark.parametrize(("name", "capability", "kilobytes", "newer"), EXPECTED)
def test_every_capability_has_an_architecture(arch_of, name, capability, kilobytes, newer):
    shared_bytes = [1024 * each for each in kilobytes]
    assert arch_of(capability) == Arch(name, capability, *shared_bytes, newer, newer, newer, capability == (9, 0))


def test_every_architecture_is_found_and_expected(arch_of):
    for arch in ARCHITECTURES:
        assert arch_of(arch.capability) is arch
        assert (arch.name, arch.capability) in [row[:2] for row in EXPECTED]
    assert [*ARCHITECTURES] == sorted(ARCHITECTURES, key=lambda arch: arch.capability)
    assert HOPPER in ARCHITECTURES


@pytest.mark.parametrize("device", [1, torch.device("cuda", 1), torch.device("cuda")])
def test_the_device_that_is_asked_for(monkeypatch, device):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    assert Arch.of(device) is HOPPER
    assert asked == [device]


def test_a_device_without_index_is_the_current_one(monkeypatch):
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, its=capability: its)
        assert Arch.of(torch.device("cuda")).capability == capability


@pytest.mark.gpu
def test_the_current_device_s_architecture_is_listed():
    assert Arch.of(torch.cuda.current_device()) in ARCHITECTURES


@pytest.mark.gpu
def test_a_block_may_have_as_much_shared_memory():
    device = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(device)
    assert Arch.of(device).shared_bytes_of_block == properties.shared_memory_per_block_optin
    assert Arch.of(device).shared_bytes_of_multiprocessor == properties.shared_memory_per_multiprocessor


# --- builds -----------------------------------------------------------------------------------------------------------


def fit(card, *shared_bytes):
    """Whether a multiprocessor has room for these blocks together."""
    taken = sum(-(-(each + RESERVED_BYTES) // 128) * 128 for each in shared_bytes)
    return taken <= card.shared_bytes_of_multiprocessor


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("static_bytes", [0, 40, 4160])
def test_blocks_of_a_build_share_a_multiprocessor_as_on_its_card(build, static_bytes):
    whole = build.shared_bytes_of_block
    half, third = (build.shared_bytes_of_multiprocessor // count - RESERVED_BYTES for count in (2, 3))
    together = [(whole,), (half, half), (third, third, third), (whole - 32 * 1024, 31 * 1024)]
    apart = [(whole, 0), (half + 1024, half), (third + 2048, third, third), (whole - 32 * 1024, 33 * 1024)]
    for blocks in together + apart:
        own = [max(0, each - each % 128 - static_bytes) for each in blocks]
        there = [static_bytes + build.shared_bytes_on(HOPPER, static_bytes, each) for each in own]
        assert fit(build, *(static_bytes + each for each in own)) == (blocks in together)
        assert fit(HOPPER, *there) == (blocks in together)
        assert all(static_bytes + used <= asked for used, asked in zip(own, there, strict=True))
        assert max(there) <= HOPPER.shared_bytes_of_block


def test_a_build_never_asks_for_less_than_it_uses():
    for card in ARCHITECTURES[:2]:
        assert BUILDS["sm_80"].shared_bytes_on(card, 40, 120 * 1024) >= 120 * 1024


# --- in the sources ---------------------------------------------------------------------------------------------------


@pytest.fixture
def compile_probe(monkeypatch, tmp_path):
    """Compiles a kernel that a test writes, and that may include any header, for an architecture."""
    shutil.copytree(cuda_sources.directory() / "common", tmp_path / "common")

    def compile_probe(before, body, arch):
        (tmp_path / "probe.cu").write_text(f'{before}\nextern "C" __global__ void probe() {{ {body} }}\n')
        cuda_sources.expanded.cache_clear()
        return jit.compile_offline(Variant("probe", ()), arch)

    monkeypatch.setattr(cuda_sources, "directory", lambda: tmp_path)
    yield compile_probe
    cuda_sources.expanded.cache_clear()


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.name)
def test_the_sources_are_told_the_same(compile_probe, arch):
    said = {
        "HAS_PDL": arch.dependent_launch,
        "HAS_BULK_COPY": arch.bulk_copies,
        "HAS_CLUSTERS": arch.clusters,
        "HAS_WGMMA": arch.wgmma,
    }
    header = cuda_sources.directory() / "common" / "arch.cuh"
    assert set(re.findall(r"HAS_\w+", header.read_text())) == set(said)
    checks = [f'static_assert({name} == {int(value)}, "{name}");' for name, value in said.items()]
    assert compile_probe("\n".join(['#include "common/arch.cuh"', *checks]), "", arch.name).registers > 0


def variant_of(source, whole_rows=None):
    """One of the catalogue, with a stage of whole rows or without, where the source has such."""
    return next(
        variant
        for variant in catalog.variants()
        if variant.source == source and (whole_rows is None or f"WHOLE_ROWS={whole_rows}" in variant.defines)
    )


@pytest.mark.parametrize(
    ("source", "whole_rows", "arch", "sentence"),
    [
        ("experts_down", 1, "sm_80", "WHOLE_ROWS needs bulk copies, which begin with sm_90"),
        ("experts_down", 1, "sm_89", "WHOLE_ROWS needs bulk copies, which begin with sm_90"),
        ("experts_up_wgmma", None, "sm_80", "clusters of blocks begin with sm_90"),
        ("experts_up_wgmma", None, "sm_80", "boxes of a tensor need bulk copies, which begin with sm_90"),
        ("experts_up_wgmma", None, "sm_80", "wgmma needs sm_90a"),
        ("experts_down_wgmma", None, "sm_90", "wgmma needs sm_90a"),
        ("experts_down_wgmma", None, "sm_100", "wgmma needs sm_90a"),
    ],
)
def test_a_kernel_that_needs_more_than_an_architecture_has_is_not_compiled(source, whole_rows, arch, sentence):
    """Below sm_90 a bulk copy would otherwise be nothing, and experts_down would wait for its bytes for ever."""
    with pytest.raises(CompileError, match=f'static assertion failed with "{sentence}'):
        jit.compile_offline(variant_of(source, whole_rows), arch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
def test_the_weight_stream_without_bulk_copies_is_compiled_before_hopper(arch):
    for variant in (variant_of("experts_up"), variant_of("experts_down", 0)):
        assert compiled(variant, arch).registers > 0


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("arrive_expecting", "0, 0"),
        ("copy_bulk", "0, nullptr, 0, 0, 0"),
        ("order_writes_before_bulk_copies", ""),
    ],
)
def test_no_bulk_copy_is_compiled_to_nothing(compile_probe, function, arguments):
    """Where there are none, no source can call one, whatever it says of its needs."""
    probe = ('#include "common/async_copy.cuh"', f"{function}({arguments});")
    assert compile_probe(*probe, "sm_90a").registers > 0
    with pytest.raises(CompileError, match=rf'probe.cu\(2\): error: identifier "{function}" is undefined'):
        compile_probe(*probe, "sm_89")
