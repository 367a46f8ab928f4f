"""Machine code: what a fault of the assembler, or a load that the compiler moved, would break."""

import re
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import files

import pytest
import torch

from cupymoe import MoEActivation
from cupymoe.kernels import catalog, coded_tiles, experts_down, experts_up, experts_up_codes_wgmma, experts_up_wgmma
from cupymoe.kernels.expert_tiles import CUTS, tile_shape_of
from cupymoe.kernels.jit import Variant
from cupymoe.kernels.stored_weight import stored_weight
from tests.helpers import compiled
from tests.kernels import test_expert_stream as stream
from tests.kernels import test_expert_tiles as tiles


def machine_code(variant: Variant, folder, arch="sm_90a") -> str:
    (nvdisasm,) = (path.locate() for path in files("nvidia-cuda-nvdisasm") if path.name == "nvdisasm")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled(variant, arch).cubin)
    return subprocess.run([str(nvdisasm), "-c", "-ndf", str(cubin)], check=True, capture_output=True, text=True).stdout


def has_adapter(variant: Variant) -> bool:
    return "LOW_RANK=0" not in variant.defines


def copying_variants() -> Iterator[Variant]:
    """What copies 16 bytes at a time with a cache policy."""
    for sizes in stream.SIZES:
        for pairs_per_expert in stream.PAIRS_PER_EXPERT:
            num_experts, _, _, top_k = sizes
            shape = stream.shape(max(1, pairs_per_expert * num_experts // top_k), *sizes)
            yield experts_up.variant(shape)
            if not shape.regime.down.whole_rows:  # they come by bulk copies
                yield experts_down.variant(shape)
    for num_tokens in (4, 64, 128, 256, 512):
        for shape in stream.kinds(num_tokens, 32, 2880, 2880, 4):
            yield experts_up.variant(shape)
            yield experts_down.variant(shape)
    gathering = "experts_up", "experts_down", "experts_up_codes_wgmma"
    quantised = (each for each in catalog.variants() if any("GROUP=" in define for define in each.defines))
    yield from [each for each in quantised if each.source in gathering][::4]  # all of them take 20 minutes
    for sizes in tiles.SIZES:
        for cut in CUTS:
            yield experts_up_wgmma.variant(tiles.shape(cut, *sizes))
    # Of codes, with a hidden size that cuts the last stage off.
    int4 = stored_weight("int4_g32", torch.bfloat16)
    for slots in coded_tiles.SLOTS:
        of_codes = {"gate_up_stored": int4, "down_stored": int4, "coded_slots": slots}
        shape = tile_shape_of(*CUTS[0], torch.bfloat16, MoEActivation.GELU_TANH, 32, 2880, 2880, **of_codes)
        yield experts_up_codes_wgmma.variant(shape)
    # Of plain weights, every kind of experts.
    sources = ("experts_up_wgmma", "experts_down_back_wgmma", "experts_outer_wgmma", "lora_shrink", "lora_outer")
    yield from (each for each in catalog.variants() if each.source in sources)
    yield from (
        each
        for each in catalog.variants()
        if each.source in ("experts_up", "experts_down") and has_adapter(each) and "WHOLE_ROWS=0" in each.defines
    )


def first_of_each_source(variants: Iterable[Variant]):
    """The variants as parameters: the first of each source for every run of the tests, the others slow."""
    sources, parameters = set(), []
    for variant in dict.fromkeys(variants):
        parameters.append(pytest.param(variant, marks=[pytest.mark.slow] if variant.source in sources else []))
        sources.add(variant.source)
    return parameters


@pytest.mark.parametrize("variant", first_of_each_source(copying_variants()))
def test_no_copy_that_the_assembler_breaks(variant, tmp_path):
    """ptxas 12.9 and 13.0 can emit an LDGSTS with its cache policy in an odd uniform register, or its shared address
    split over two registers: an illegal instruction on the device (seen on an H100, 2026-11-24)."""
    copies = re.findall(r".*LDGSTS.*", machine_code(variant, tmp_path))
    assert copies
    assert not [copy for copy in copies if re.search(r"desc\[UR\d*[13579]\]|\[R\d+\+UR", copy)]


# Kernels that start under the grid before them, and the instruction from which on the first-level cache holds nothing
# old: the wait, or empty_l1. A block of experts_down* waits in one warp and goes on in others: there the wait won't do.
FRESH_FROM = {
    "combine": "ACQBULK",
    "count_by_expert": "ACQBULK",
    "experts_down": "CCTL.IVALL",
    "experts_down_codes_wgmma": "CCTL.IVALL",
    "experts_down_wgmma": "CCTL.IVALL",
    "experts_outer_wgmma": "ACQBULK",
    "experts_up": "ACQBULK",
    "experts_up_codes_wgmma": "CCTL.IVALL",
    "experts_up_wgmma": "ACQBULK",
    "lora_back": "ACQBULK",
    "lora_outer": "ACQBULK",
    "lora_shrink": "ACQBULK",
    "lora_shrink_chunks": "ACQBULK",
    "operand_rows": "ACQBULK",
    "pack_adapter": "ACQBULK",
    "plan_batch": "ACQBULK",
    "plan_batch_chunks": "ACQBULK",
    "plan_experts": "ACQBULK",
    "route": "ACQBULK",
    "router_logits": "ACQBULK",
    "router_logits_many": "ACQBULK",
    "sort_by_expert": "ACQBULK",
}


def fresh_from(variant: Variant) -> str:
    """With an adapter a block of experts_up waits in one warp and goes on in others, too; and between the projections
    lora_shrink_chunks reads a plan before it waits."""
    is_early = variant.source == "experts_up" and has_adapter(variant)
    is_between = variant.source == "lora_shrink_chunks" and {"GATHERED=0", "INLINE_PAIRS=0"} <= {*variant.defines}
    return "CCTL.IVALL" if is_early or is_between else FRESH_FROM[variant.source]


@pytest.mark.parametrize(
    "variant", first_of_each_source(each for each in catalog.variants() if each.source in FRESH_FROM)
)
def test_what_is_loaded_early_comes_from_l2(variant, tmp_path):
    """Through a pointer that is __restrict__ the compiler may move a load over the wait, to where the grid before has
    yet to write; and what is two grids back may lie in the first-level cache as it was in the call before."""
    for section in machine_code(variant, tmp_path).split("\n.text.")[1:]:
        entry, _, code = section.partition(":")
        early = code.split(fresh_from(variant) if entry == variant.source else FRESH_FROM[entry])[0]
        loads = re.findall(r"\bLDG\.\S*", early)
        assert not [load for load in loads if "STRONG" not in load]
