"""experts_up and experts_down on quantised weights: on CUDA against float64 of the exactly dequantised weights; without
a GPU what a stage looks like, the words that a lane makes operands of, and what the kernels compile to."""

import os
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from cupymoe import MoEActivation, reference
from cupymoe.kernels import experts_down, experts_up, sort_by_expert
from cupymoe.kernels.arch import ARCHITECTURES, BUILDS, RESERVED_BYTES, Arch
from cupymoe.kernels.combine import combine_workspace
from cupymoe.kernels.expert_stream import shape_of
from cupymoe.kernels.load import Load
from cupymoe.kernels.plan_chunks import plan_chunks
from cupymoe.kernels.plan_experts import plan_experts
from cupymoe.kernels.stored_weight import PLAIN_WEIGHT, stored_weight, unsupported_reason
from cupymoe.kernels.stream_regimes import Tiling, regime
from cupymoe.kernels.stream_workspace import new_workspace
from cupymoe.weights.format import FORMATS
from tests.helpers import compiled, max_error, poison_free_memory, random_routing, relative_error
from tests.kernels.quantised import Quantised, packed, random_weight

BUILD = BUILDS[os.environ["CUPYMOE_TEST_BUILD"]] if "CUPYMOE_TEST_BUILD" in os.environ else None
INT4 = [
    stored_weight(f"int4_g{group}{zero}", dtype)
    for group, dtype in ((32, torch.bfloat16), (32, torch.float32), (64, torch.float16), (128, torch.bfloat16))
    for zero in ("", "_zero")
]
STORED = INT4 + [
    stored_weight(name, dtype)
    for name, dtype in (
        ("int8", None),
        ("fp8", None),
        ("fp8_g128", torch.float32),
        ("nvfp4", torch.float8_e4m3fn),
        ("mxfp4", torch.float8_e8m0fnu),
    )
]
# (hidden, intermediate) of each group: no whole stage, and fewer units than blocks. Groups of fp8 may be cut.
ODD_SIZES = {None: (328, 176), 16: (336, 176), 32: (352, 96), 64: (320, 192), 128: (384, 128)}
CUT_SIZES = (328, 176)


def odd_sizes(stored):
    return CUT_SIZES if stored.format.cuts_groups else ODD_SIZES[stored.format.group]


def name_of(stored):
    return f"{stored.format.name}-{stored.scale_dtype}"


# Of 16 experts and 8 choices a token. The regime of more than 32 pairs, each of another expert, wants more experts.
TOKENS = (1, 4, 8, 16, 32, 64, 128)


class Case(NamedTuple):
    hidden_states: torch.Tensor
    gate_up: Quantised
    down: Quantised
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor


def random_case(num_tokens, stored, hidden, intermediate, dtype, activation=MoEActivation.GELU_TANH, num_experts=16):
    """Masked pairs, an expert without tokens, and one with more than others."""
    torch.manual_seed(num_tokens)
    weights, index = random_routing(num_tokens, num_experts, 8, "cuda")
    index[index == 1] = 2
    index[3::7, 0], index[2::9, 1] = -1, num_experts
    rows = (2 if activation.is_gated else 1) * intermediate
    return Case(
        torch.randn(num_tokens, hidden, dtype=dtype, device="cuda"),
        random_weight(stored, num_experts, rows, hidden).to("cuda"),
        random_weight(stored, num_experts, hidden, intermediate, seed=1).to("cuda"),
        index,
        weights,
    )


def streamed(case, activation=MoEActivation.GELU_TANH, gate_up_bias=None, down_bias=None, build=BUILD, codes=None):
    """What backends.fused.stream launches. codes: the tile, in the place of the regime's."""
    hidden_states, gate_up, down, index, weights = case
    (num_tokens, hidden), (num_experts, _, intermediate) = hidden_states.shape, down.values.shape
    arch = build or Arch.of(hidden_states.device)
    load = Load.of(num_tokens, index.shape[1], num_experts)
    chosen = regime(load, intermediate, arch, has_codes=True)
    if codes is not None:
        chosen = replace(chosen, four_bits=codes, eight_bits=codes)
    shape = shape_of(
        chosen,
        hidden_states.dtype,
        index.dtype,
        activation,
        num_experts,
        hidden,
        intermediate,
        index.shape[1],
        has_gate_up_bias=gate_up_bias is not None,
        has_down_bias=down_bias is not None,
        arch=arch,
        sorted_pairs=index.numel() > 8192,
        gate_up_stored=gate_up.stored,
        down_stored=down.stored,
    )
    workspace = new_workspace(hidden_states, shape, index.numel())
    output = torch.empty_like(hidden_states)
    if shape.sorted_pairs:
        pairs = sort_by_expert.sort_by_expert(index, num_experts)
        plan_chunks(pairs.expert_offsets, chosen.tokens, workspace, arch)
        workspace = workspace.of_sorted(pairs.token_of_slot, pairs.slot_of_pair)
    elif not chosen.inline_pairs:
        plan_experts(index, num_experts, chosen.tokens, workspace, arch)
    of_gate_up, of_down = ({"scales": w.scales, "zeros": w.zeros, "row_scales": w.row_scales} for w in (gate_up, down))
    experts_up.experts_up(hidden_states, gate_up.codes, index, shape, workspace, gate_up_bias, **of_gate_up)
    experts_down.experts_down(down.codes, index, shape, workspace, down_bias, **of_down)
    combine_workspace(shape, workspace, weights, output)
    return output


def check(output, case, activation=MoEActivation.GELU_TANH, **biases):
    """Group scales multiply sums, so the error is that of plain weights: two roundings."""
    truth = reference.experts(
        case.hidden_states.double(),
        case.gate_up.values,
        case.down.values,
        case.top_k_index,
        case.top_k_weights,
        activation,
        **biases,
    )
    assert output.isfinite().all()
    assert relative_error(output, truth) <= 0.0030
    assert max_error(output, truth) <= 2**-7 * truth.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("stored", INT4[:1] + INT4[-1:] + STORED[len(INT4) :], ids=name_of)
def test_sizes_of_gemma_4(stored, num_tokens):
    sizes = (2816, 768) if stored.format.group == 128 and not stored.format.cuts_groups else (2816, 704)
    case = random_case(num_tokens, stored, *sizes, torch.bfloat16)
    poison_free_memory()
    output = streamed(case)
    check(output, case)
    assert torch.equal(streamed(case), output)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [MoEActivation.SILU, MoEActivation.RELU2_NO_MUL], ids=str)
@pytest.mark.parametrize("stored", STORED, ids=name_of)
def test_every_format(stored, activation, dtype):
    """In every regime, at sizes that fit no stage; what no kernel wrote is NaN."""
    hidden, intermediate = odd_sizes(stored)
    for num_tokens in TOKENS:
        case = random_case(num_tokens, stored, hidden, intermediate, dtype, activation)
        biases = {
            "gate_up_bias": torch.randn(case.gate_up.values.shape[:2], dtype=dtype, device="cuda"),
            "down_bias": torch.randn(case.down.values.shape[:2], dtype=dtype, device="cuda"),
        }
        poison_free_memory()
        check(streamed(case, activation, **biases), case, activation, **biases)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [*TOKENS, 1100])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("stored", INT4[:1] + STORED[len(INT4) :], ids=name_of)
def test_builds_of_other_cards(stored, build, num_tokens):
    case = random_case(num_tokens, stored, *odd_sizes(stored), torch.bfloat16)
    poison_free_memory()
    check(streamed(case, build=build), case)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "codes", [Tiling(704, 2, k_warps=2), Tiling(704, 2, k_warps=4, row_blocks=2), Tiling(256, 2), Tiling(64, 2)]
)
@pytest.mark.parametrize("stored", [INT4[0], STORED[len(INT4)]], ids=name_of)
def test_other_tiles(stored, codes):
    """Stages that the threads of a pass don't fill, and rows of an odd number of packs."""
    case = random_case(8, stored, 1408, 704, torch.bfloat16)
    check(streamed(case, codes=codes), case)


@pytest.mark.gpu
@pytest.mark.parametrize(("few", "many"), [(2, 4), (5, 8), (9, 32), (33, 64)])
def test_a_token_does_not_depend_on_the_others_of_its_regime(few, many):
    case = random_case(many, INT4[0], *ODD_SIZES[32], torch.bfloat16)
    first = case._replace(
        hidden_states=case.hidden_states[:few],
        top_k_index=case.top_k_index[:few].contiguous(),
        top_k_weights=case.top_k_weights[:few].contiguous(),
    )
    assert torch.equal(streamed(first), streamed(case)[:few])


def lane_words(rows, step):
    """What ldmatrix gives each lane of 16 rows of packed codes: words [lane, part, high] of the step-th 64 k."""
    words = rows.view(torch.int32).long() & 0xFFFFFFFF
    lane = torch.arange(32)
    return torch.stack(
        [
            torch.stack([words[lane // 4 + 8 * high, (step * 2 + part) * 4 + lane % 4] for high in range(2)], -1)
            for part in range(2)
        ],
        1,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lane_s_words_are_the_operands_of_its_tokens_elements(dtype):
    """As the sources make them of a word, in the order of a fragment: k 8q..8q+7 of row lane / 4, q = lane % 4."""
    digits, shifted = (128, False) if dtype == torch.bfloat16 else (1024, True)
    codes = torch.randint(16, (1, 16, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = packed(codes, FORMATS["int4_g32"])[0]
    base = torch.tensor(float(digits), dtype=dtype).view(torch.int16).long().item()
    for step in range(2):
        words = lane_words(rows, step)
        for j in range(4):
            if shifted and j % 2:
                pairs, scale, minus = (words >> 4 * (j - 1)) & 0x00F000F0 | base * 0x10001, 1 / 16, 64 + 8
            else:
                pairs, scale, minus = (words >> 4 * j) & 0x000F000F | base * 0x10001, 1, digits + 8
            for half in range(2):
                operand = (pairs >> 16 * half & 0xFFFF).to(torch.int16).view(dtype).double() * scale - minus
                lane = torch.arange(32)
                for part in range(2):
                    for high in range(2):
                        k = (step * 2 + part) * 32 + lane % 4 * 8 + 2 * j + half
                        assert torch.equal(operand[:, part, high], codes[0, lane // 4 + 8 * high, k].double() - 8)


@pytest.mark.parametrize(("bits", "together"), [(4, 8), (8, 4)])
@pytest.mark.parametrize("block_k", [64, 128, 192, 256, 320, 512, 704])
def test_rows_that_are_read_together_are_in_different_banks(block_k, bits, together):
    """swap_of_row of codes.cuh: 8 rows of a pack, as a matrix of ldmatrix is, or 4 of two, as half a warp loads."""
    unit = 8 // together
    units = block_k * bits // 128 // unit
    same = together if units % together == 0 else units & -units
    rows = torch.arange(8)
    swaps = rows % together // (together // same) * unit
    for pack in range(units * unit):
        places = pack ^ swaps
        assert places.max() < units * unit
        for first in range(0, 8, together):
            banks = (rows * units * unit + places)[first : first + together] % 8 // unit
            assert len(set(banks.tolist())) == together


@pytest.mark.parametrize("stored", STORED, ids=name_of)
@pytest.mark.parametrize("block_k", [64, 128, 256, 704])
def test_a_stage_has_the_packs_of_its_groups(stored, block_k):
    group, most, sizes = stored.format.group, block_k * stored.format.bits // 8, []
    if group is not None:
        sizes = [stored.scale_dtype.itemsize] + [1] * stored.format.has_zeros
    for size in sizes:
        first = [k // group * size // 16 for k in range(0, 64 * block_k, block_k)]
        last = [(k + block_k - 1) // group * size // 16 for k in range(0, 64 * block_k, block_k)]
        most += 16 * max(b - a + 1 for a, b in zip(first, last, strict=True))
    assert most <= stored.stage_row_bytes(block_k) <= most + 16 * len(sizes)


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.name)
@pytest.mark.parametrize("stored", STORED, ids=name_of)
def test_rings_fit(stored, arch):
    for num_tokens in TOKENS:
        chosen = regime(Load.of(num_tokens, 8, 16), 704, arch, has_codes=True)
        index, activation = torch.int64, MoEActivation.GELU_TANH
        sizes = 16, 2816, 704, 8
        both = {"gate_up_stored": stored, "down_stored": stored}
        shape = shape_of(chosen, torch.bfloat16, index, activation, *sizes, arch=arch, **both)
        limit = arch.shared_bytes_of_block - (4096 if chosen.inline_pairs else 512)
        assert max(shape.up_shared_bytes, shape.down_shared_bytes) <= limit
        if shape.shares_multiprocessor:
            up, down = (bytes + 4096 + RESERVED_BYTES for bytes in (shape.up_shared_bytes, shape.down_shared_bytes))
            assert up + down <= arch.shared_bytes_of_multiprocessor < 2 * up
        assert shape.up.stages >= 2


def test_what_is_not_read_is_said():
    assert unsupported_reason("int4_g32") is None
    assert unsupported_reason("plain") is None
    assert unsupported_reason("nf4") == "its kernels read codes of int4, int8, e4m3, e2m1, not of nf4"
    assert stored_weight("plain") is PLAIN_WEIGHT
    with pytest.raises(ValueError, match="scales of int4_g32 must be one of"):
        stored_weight("int4_g32", torch.int8)


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.name)
def test_the_numbers_of_tokens_reach_every_regime(arch):
    """But that of more pairs than 32, each of another expert, which Gemma 4's 128 experts reach."""
    reached = {regime(Load.of(tokens, 8, 16), 704, arch, has_codes=True) for tokens in TOKENS}
    reached.add(regime(Load.of(16, 8, 128), 704, arch, has_codes=True))
    counts = range(1, 5000)
    every = {
        regime(Load.of(tokens, 8, experts), 704, arch, has_codes=True) for experts in (16, 128) for tokens in counts
    }
    assert reached == every


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a"])
@pytest.mark.parametrize("stored", STORED, ids=name_of)
def test_every_format_compiles_without_spills(stored, arch):
    """For the fewest and the most tokens; `cupymoe verify` compiles some formats in every regime, and in float16."""
    (its_arch,) = (each for each in ARCHITECTURES if each.name == arch)
    dtype = torch.bfloat16
    for num_tokens in (TOKENS[0], TOKENS[-1]):
        chosen = regime(Load.of(num_tokens, 8, 16), 704, its_arch, has_codes=True)
        activation, sizes = MoEActivation.GELU_TANH, (16, 2816, 704, 8)
        both = {"gate_up_stored": stored, "down_stored": stored}
        shape = shape_of(chosen, dtype, torch.int64, activation, *sizes, arch=its_arch, **both)
        for variant in (experts_up.variant(shape), experts_down.variant(shape)):
            report = compiled(variant, arch)
            assert report.registers > 0
            # Outside of the loops over k, where most tokens meet scales of 4 bytes for each 32 weights.
            is_full = chosen.tokens == 80 and (stored.format.group, stored.scale_dtype) == (32, torch.float32)
            assert report.spill_bytes <= (64 if is_full else 0), report.log
            assert "warning" not in report.log, report.log
