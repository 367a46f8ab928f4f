"""Faults of the tiles, of plain weights and of codes."""

from __future__ import annotations

from scripts.mutations.mutation import cuda, launcher

BATCHES = ("tests/test_batched_experts.py::test_counted_rows_and_no_others",)
TILES = ("tests/kernels/test_experts_wgmma.py",)
UNSORTED_TILES = (
    "tests/kernels/test_unsorted_pairs.py::test_every_slot",
    "tests/kernels/test_unsorted_pairs.py::test_masked_pairs",
)
UNSORTED_GEMMA_4 = ("tests/kernels/test_unsorted_pairs.py::test_gemma_4_s_sizes",)
CODED_TILES = ("tests/kernels/test_experts_codes_wgmma.py",)
BIASED_TILES = ("tests/kernels/test_experts_wgmma.py::test_one_transposed_weight_one_bias_and_float16",)
TRANSPOSED_TILES = ("tests/kernels/test_experts_wgmma.py::test_a_transposed_weight_gives_the_same_bits",)
PARAMETERS = ("tests/test_module_states.py::test_the_next_call_sees_new_parameters",)


FAULTS = (
    cuda(
        "the first pair's slot left out of its expert's",
        "common/tiles/inline_plan.cuh",
        "keys_below(e * INLINE_PAIRS);",
        "keys_below(e * INLINE_PAIRS + 1);",
        UNSORTED_TILES,
        source="experts_up_wgmma",
        defines=("INLINE_PAIRS=128",),
    ),
    cuda(
        "the last keys not compared, where they are less than four",
        "common/tiles/inline_plan.cuh",
        "i < num_pairs; i += 4",
        "i + 4 <= num_pairs; i += 4",
        UNSORTED_TILES,
        source="experts_down_wgmma",
        defines=("INLINE_PAIRS=128",),
    ),
    cuda(
        "a slot for masked pairs of the tiles",
        "common/tiles/inline_plan.cuh",
        "expert < 0 ? -1 : keys_below(key);",
        "keys_below(key);",
        UNSORTED_TILES,
        source="experts_up_wgmma",
        defines=("INLINE_PAIRS=128",),
    ),
    cuda(
        "the first tile after those that each block has dealt to nobody",
        "common/tiles/schedule.cuh",
        "next_ticket = ticket + cluster_count();",
        "next_ticket = ticket + cluster_count() + 1;",
        UNSORTED_GEMMA_4,
        source="experts_up_wgmma",
        defines=("INLINE_PAIRS=128",),
    ),
    cuda(
        "rows of a batch stored in slot order",
        "experts_down_wgmma.cu",
        "of_rows.first_slot = row_of_slot[tile.first_slot];",
        "of_rows.first_slot = tile.first_slot;",
        BATCHES,
        defines=("SCATTERS=1",),
    ),
    cuda(
        "gate for up in the tiles",
        "experts_up_wgmma.cu",
        "(gate[0], gate[TRANSPOSED ? BLOCK_N / 4 : 4])",
        "(gate[TRANSPOSED ? BLOCK_N / 4 : 4], gate[0])",
        TILES,
    ),
    cuda(
        "a wait for a stage that may be filled and emptied already",
        "common/tiles/producer.cuh",
        "if (step >= ahead) {",
        "wait_barrier(pipeline.emptied(turn.stage), turn.parity); if (step >= ahead) {",
        TILES,
        source="experts_down_wgmma",
        defines=("BLOCKS=2",),
        hangs=True,
    ),
    cuda(
        "the upper half of a tile's rows stored twice",
        "experts_down_wgmma.cu",
        "i / 2 * 4 + half * 2 + i % 2",
        "i / 2 * 4 + i % 2",
        TILES,
    ),
    cuda(
        "the scales of a row's first groups of a stage for the others",
        "common/coded_tiles.cuh",
        "u32 group = (step * BLOCK_K + chunk * CHUNK_K) / GROUP_K;",
        "u32 group = step * BLOCK_K / GROUP_K;",
        CODED_TILES,
        source="experts_down_codes_wgmma",
        defines=("GROUP=32",),
    ),
    cuda(
        "codes that are read where the copy engine would put them without a swizzle",
        "common/coded_tiles.cuh",
        "codes = first * CODE_ROW_BYTES + (CODE_ROW_BYTES == 64 ? first / 2 % 4 : first % 8) * 16;",
        "codes = first * CODE_ROW_BYTES;",
        CODED_TILES,
        source="experts_down_codes_wgmma",
        defines=("WEIGHTS=INT4",),
    ),
    cuda(
        "a stage that is given back while products read it",
        "common/coded_tiles.cuh",
        "if (chunk == 0 && first == 0 && step > 0 && lane == 0) arrive(pipeline.emptied(previous));",
        "if (chunk == 0 && first == 0 && step > 0 && lane == 0) arrive(pipeline.emptied(stage));",
        CODED_TILES,
        source="experts_down_codes_wgmma",
        defines=("WEIGHTS=INT4",),
        hangs=True,
    ),
    cuda(
        "the factors of the first tile's slots for those of all",
        "experts_up_codes_wgmma.cu",
        "return token_factors[slot];",
        "return token_factors[slot % TILE_SLOTS];",
        CODED_TILES,
        defines=("SCALED_TOKENS=1",),
    ),
    cuda(
        "the scales of the first expert's rows for all",
        "common/coded_tiles.cuh",
        "to_float(tensor[(u64)tile.expert * Gemm::kRows + row])",
        "to_float(tensor[row])",
        CODED_TILES,
        source="experts_down_codes_wgmma",
        defines=("HAS_ROW_SCALES=1",),
    ),
    cuda(
        "no row for a token's first expert",
        "operand_rows.cu",
        "for (int k = 0; k < (BY_SLOT ? 1 : TOP_K); k++) {",
        "for (int k = 1; k < (BY_SLOT ? 1 : TOP_K); k++) {",
        ("tests/kernels/test_operand_rows.py",),
    ),
    cuda(
        "a row's factor twice too large",
        "operand_rows.cu",
        "(exponent - 14) << 23",
        "(exponent - 13) << 23",
        ("tests/kernels/test_operand_rows.py",),
        defines=("NARROWED=1",),
    ),
    cuda(
        "the bias of the first expert for all in the tiles",
        "common/expert_tiles.cuh",
        "const SCALAR* of_expert = gemm.bias + (u64)expert * Gemm::kRows;",
        "const SCALAR* of_expert = gemm.bias;",
        BIASED_TILES,
        source="experts_down_wgmma",
        defines=("HAS_BIAS=1",),
    ),
    cuda(
        "the bias of gate for that of up in the tiles",
        "experts_up_wgmma.cu",
        "column + up * INTERMEDIATE",
        "column",
        BIASED_TILES,
        defines=("GATED=1", "INTERLEAVED=0", "HAS_BIAS=1"),
    ),
    cuda(
        "the next pack of transposed weights for the next 16 k",
        "common/wgmma.cuh",
        "#define NEXT_16_K_OF_B NEXT_16_LINES",
        "#define NEXT_16_K_OF_B 1",
        TRANSPOSED_TILES,
        source="experts_down_wgmma",
        defines=("TRANSPOSED=1",),
    ),
    cuda(
        "the up columns of transposed weights in the place of the gate columns",
        "experts_up_wgmma.cu",
        "box * 64, k, 0, expert}",
        "box * 64, k, kHalves, expert}",
        TRANSPOSED_TILES,
        defines=("GATED=1", "INTERLEAVED=0", "TRANSPOSED=1"),
    ),
    cuda(
        "each of two lanes stores the columns of the other",
        "experts_up_wgmma.cu",
        "threadIdx.x % 2 ? __byte_perm(got, own, 0x7632) : __byte_perm(own, got, 0x5410)",
        "threadIdx.x % 2 ? __byte_perm(own, got, 0x5410) : __byte_perm(got, own, 0x7632)",
        TRANSPOSED_TILES,
        defines=("INTERLEAVED=1", "TRANSPOSED=1"),
    ),
    cuda(
        "a block's rank in the distance of its groups of transposed weights",
        "common/wgmma.cuh",
        "(address & 0x3ffff) >> 4",
        "address >> 4",
        TRANSPOSED_TILES,
        source="experts_down_wgmma",
        defines=("BLOCKS=2", "TRANSPOSED=1"),
    ),
    launcher(
        "the tickets that another kernel has used up",
        "kernels/experts_down_wgmma.py",
        "pairs.tickets.data_ptr() + 4",
        "pairs.tickets.data_ptr()",
        TILES,
    ),
    launcher(
        "a stale map of the weights",
        "kernels/experts_up_wgmma.py",
        "*_gate_up_map(gate_up_proj.data_ptr(), shape, shape.hidden_size),",
        "*vars(_prepared).setdefault(shape, _gate_up_map(gate_up_proj.data_ptr(), shape, shape.hidden_size)),",
        PARAMETERS,
    ),
)
