"""The faults that ``mutate.py`` makes, one line each: in the activations, in the other kernels, in the launchers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ACTIVATION = ("tests/kernels/test_gated_activation.py",)
GATHER = ("tests/kernels/test_gather.py",)
DEQUANTIZE = ("tests/kernels/test_dequantize.py::test_the_bits_are_torchs",)
COMBINE = ("tests/kernels/test_combine.py",)
ROUTE = ("tests/kernels/test_route.py",)
LOGITS = ("tests/kernels/test_router_logits.py",)
MANY_LOGITS = ("tests/kernels/test_router_logits_many.py",)
SORT = ("tests/kernels/test_sort_by_expert.py",)
LINEAR = ("tests/kernels/test_grouped_linear.py",)
OUTER = ("tests/kernels/test_grouped_outer.py",)
SHRINK = ("tests/kernels/test_lora_shrink.py",)
SHRINK_CHUNKS = ("tests/kernels/test_lora_shrink_chunks.py::test_every_slot",)
PACK = ("tests/kernels/test_pack_adapter.py",)
LOW_RANK_OUTER = ("tests/kernels/test_lora_outer.py",)
LOW_RANK_BACK = ("tests/kernels/test_lora_back.py::test_columns_rows_and_weights",)
EXPERTS = (
    "tests/test_experts_cuda.py::test_every_activation",
    "tests/test_experts_cuda.py::test_masked_ids",
    "tests/test_experts_cuda.py::test_all_tokens_to_one_expert_and_the_rest_empty",
    "tests/test_experts_cuda.py::test_intermediate_sizes_of_tensor_parallel_gemma_4",
)
KINDS = ("tests/kernels/test_experts_stream.py::test_every_kind_of_experts",)
QUANTISED = ("tests/kernels/test_experts_stream_quantised.py",)
MAPS = ("tests/test_expert_map.py::test_parts_sum_to_the_whole_in_every_backend",)
PLAN_BATCH = ("tests/kernels/test_plan_batch.py",)
BATCHES = ("tests/test_batched_experts.py::test_counted_rows_and_no_others",)
PORTABLE = ("tests/kernels/test_experts_portable.py::test_every_regime",)
STREAMED_ADAPTERS = (
    "tests/kernels/test_experts_stream_adapters.py::test_every_kind_of_experts",
    "tests/kernels/test_experts_stream_adapters.py::test_gemma_4_s_sizes",
)
TILES = ("tests/kernels/test_experts_wgmma.py",)
ADAPTERS = ("tests/kernels/test_experts_wgmma_adapters.py::test_every_slot",)
CODED_TILES = ("tests/kernels/test_experts_codes_wgmma.py",)
BIASED_TILES = ("tests/kernels/test_experts_wgmma.py::test_one_transposed_weight_one_bias_and_float16",)
TRANSPOSED_TILES = ("tests/kernels/test_experts_wgmma.py::test_a_transposed_weight_gives_the_same_bits",)
OUTER_OF_SLOTS = ("tests/kernels/test_experts_outer_wgmma.py",)
SUMS = ("tests/kernels/test_sum_parts.py",)
SLOPES = ("tests/kernels/test_activation_slopes.py",)
GRADIENTS = ("tests/test_experts_backward.py::test_experts_of_any_number_of_slots",)
TRAINING = ("tests/test_experts_backward.py::test_the_training_forward_has_the_bits_of_inference",)
KEPT = ("tests/test_experts_backward.py::test_what_is_kept",)
PARAMETERS = ("tests/test_module_states.py::test_the_next_call_sees_new_parameters",)
INVARIANT = ("tests/test_invariance.py::test_every_token_at_every_number_of_tokens_up_to_512",)
INVARIANT_STREAM = ("tests/test_invariance.py::test_other_cards",)
BITS = ("tests/test_experts_runtime.py::test_same_bits_whatever_the_memory_held",)
STREAMS = (
    "tests/test_experts_runtime.py::test_runs_on_the_current_stream",
    "tests/test_concurrency.py::test_two_modules_on_two_streams_at_once",
)
QUANTISED = ("tests/weights/test_experts.py::test_on_gpu",)


class Mutation(NamedTuple):
    """One fault: ``old``, which stands once in ``path``, becomes ``new``."""

    fault: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    """That have to see it."""
    source: str = ""
    """Of what is CUDA: a source that holds it,"""
    defines: tuple[str, ...] = ()
    """and what the compilations in which it makes a difference define."""
    hangs: bool = False
    """Whether it shows in tests that never end; of another, a test that runs out of time says nothing."""

    def apply(self, folder: Path) -> None:
        """
        Raises:
            ValueError: ``old`` does not stand in the file exactly once.
        """
        file = folder / self.path
        text = file.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.fault}: stands {count} times in {self.path}, not once: {self.old!r}")
        file.write_text(text.replace(self.old, self.new), encoding="utf-8")


def cuda(
    fault: str,
    file: str,
    old: str,
    new: str,
    tests: tuple[str, ...],
    source: str = "",
    defines: tuple[str, ...] = (),
    **more: bool,
) -> Mutation:
    """A fault in a CUDA source or header."""
    return Mutation(fault, f"cuda_src/{file}", old, new, tests, source or Path(file).stem, defines, **more)


def launcher(fault: str, file: str, old: str, new: str, tests: tuple[str, ...]) -> Mutation:
    """A fault in the Python that launches."""
    return Mutation(fault, f"cupymoe/{file}", old, new, tests)


def activation(fault: str, old: str, new: str, function: str) -> Mutation:
    """A fault in one activation function, compiled into the 16-bit kernel."""
    return cuda(
        fault,
        "common/activations.cuh",
        old,
        new,
        ACTIVATION,
        source="gated_activation",
        defines=(f"ACTIVATION={function}",),
    )


MUTATIONS = (
    activation(
        "erf for tanh", "mul_rn(gelu_tanh<kPrecise>(gate), up)", "mul_rn(gelu<kPrecise>(gate), up)", "GELU_TANH"
    ),
    activation("tanh for erf", "mul_rn(gelu<kPrecise>(gate), up)", "mul_rn(gelu_tanh<kPrecise>(gate), up)", "GELU"),
    activation(
        "gate for up in one activation",
        "mul_rn(gelu_tanh<kPrecise>(gate), up)",
        "mul_rn(gelu_tanh<kPrecise>(up), gate)",
        "GELU_TANH",
    ),
    activation("a coefficient to four digits", "fma_rn(a * a, 0.10294324f,", "fma_rn(a * a, 0.1029f,", "GELU_TANH"),
    activation("a clamp without its lower end", ": up < -limit ? -limit : up;", ": up;", "SWIGLUSTEP"),
    activation("the limit of another activation", "gate > limit ?", "gate > 2 * limit ?", "SWIGLUOAI"),
    cuda(
        "truncation for rounding",
        "common/dtypes.cuh",
        "cvt.rn.bf16.f32",
        "cvt.rz.bf16.f32",
        ACTIVATION,
        source="gated_activation",
        defines=("SCALAR=bf16",),
    ),
    cuda(
        "the gate read as the up",
        "gated_activation.cu",
        "(INTERLEAVED ? 2 * col + VEC : COLS + col)",
        "(INTERLEAVED ? 2 * col + VEC : col)",
        ACTIVATION,
    ),
    cuda("one row too many", "gated_activation.cu", "if (row >= (num_rows ?", "if (row > (num_rows ?", ACTIVATION),
    cuda("zero points added", "dequantize.cu", "value -= zero", "value += zero", DEQUANTIZE, defines=("HAS_ZEROS=1",)),
    cuda(
        "the scale of a row's first group for all",
        "dequantize.cu",
        "scales[row * scale_pitch + column / kGroup]",
        "scales[row * scale_pitch]",
        DEQUANTIZE,
        defines=("BITS=4",),
    ),
    cuda("slot 0 taken for masked in gather", "gather.cu", "if (slot >= 0)", "if (slot > 0)", GATHER),
    cuda(
        "slots of the first choice for all",
        "gather.cu",
        "slot_of_pair[token * TOP_K + k]",
        "slot_of_pair[token * TOP_K]",
        GATHER,
    ),
    cuda(
        "slot 0 taken for masked in combine",
        "combine.cu",
        "choices.slots[group + i] < 0",
        "choices.slots[group + i] <= 0",
        COMBINE,
    ),
    cuda(
        "the first choices for all",
        "combine.cu",
        "load_from_l2(slot_of_pair + first + i)",
        "load_from_l2(slot_of_pair + i % ROWS_IN_FLIGHT)",
        COMBINE,
        defines=("ROWS_IN_FLIGHT=2",),
    ),
    cuda(
        "a wait dropped: combine before the experts have ended",
        "combine.cu",
        "    wait_for_previous_grid();\n",
        "\n",
        BITS,
    ),
    cuda(
        "ties to the higher lane",
        "route.cu",
        "__ffs(__ballot_sync(FULL_WARP, local == top)) - 1",
        "31 - __clz(__ballot_sync(FULL_WARP, local == top))",
        ROUTE,
    ),
    cuda("ties to the higher index", "route.cu", "if (keys[i] > local)", "if (keys[i] >= local)", ROUTE),
    cuda("-0 below +0", "route.cu", "if (bits == 0x80000000u) bits = 0;", "", ROUTE),
    cuda("an expert chosen twice", "route.cu", "/ sum, keys[i] = 0;", "/ sum;", ROUTE),
    cuda(
        "renormalised where it was not asked for",
        "route.cu",
        "if (RENORMALIZE) weight",
        "if (!RENORMALIZE) weight",
        ROUTE,
    ),
    cuda("the scale of the place", "route.cu", "per_expert_scale[experts[j]]", "per_expert_scale[k]", ROUTE),
    cuda(
        "half of a sum", "common/warp.cuh", "int offset = 16; offset;", "int offset = 8; offset;", ROUTE, source="route"
    ),
    cuda(
        "wrong scale",
        "common/router_input.cuh",
        "to_float(scale))), ROOT)",
        "to_float(scale))), 2 * ROOT)",
        LOGITS,
        source="router_logits",
    ),
    cuda(
        "the sign of epsilon",
        "common/router_input.cuh",
        "/ HIDDEN + EPS",
        "/ HIDDEN - EPS",
        LOGITS,
        source="router_logits",
    ),
    cuda(
        "another lane's logit",
        "router_logits_many.cu",
        "if (lane == t * EXPERTS + e) own",
        "if (lane == e * TOKENS + t) own",
        MANY_LOGITS,
    ),
    cuda(
        "a lane counts itself",
        "sort_by_expert.cu",
        "u32 earlier = same & ((1u << lane) - 1);",
        "u32 earlier = same & ((2u << lane) - 1);",
        SORT,
    ),
    cuda(
        "a barrier dropped: offsets read while they are summed",
        "sort_by_expert.cu",
        "    __syncthreads();\n    for (int expert = threadIdx.x; blockIdx.x == 0",
        "\n    for (int expert = threadIdx.x; blockIdx.x == 0",
        SORT,
    ),
    cuda(
        "expert E taken for valid",
        "common/pairs.cuh",
        "expert < GLOBAL_EXPERTS ?",
        "expert <= GLOBAL_EXPERTS ?",
        SORT,
        source="sort_by_expert",
    ),
    cuda(
        "an expert that the map puts past those here taken for valid",
        "common/pairs.cuh",
        "expert < NUM_EXPERTS ?",
        "expert <= NUM_EXPERTS ?",
        MAPS,
        source="sort_by_expert",
        defines=("HAS_EXPERT_MAP=1",),
    ),
    cuda(
        "int64 ids cut to 32 bits",
        "common/pairs.cuh",
        "INDEX expert = load_from_l2(top_k_index + pair);",
        "int expert = (int)load_from_l2(top_k_index + pair);",
        SORT,
        source="sort_by_expert",
        defines=("INDEX=long long",),
    ),
    cuda(
        "the first expert's weight for all",
        "grouped_linear.cu",
        "weight + expert * expert_stride",
        "weight",
        LINEAR,
    ),
    cuda(
        "the last, unfilled step of a sum forgotten",
        "common/simt_product.cuh",
        "from < depth; from += STEP",
        "from + STEP <= depth; from += STEP",
        LINEAR,
        source="grouped_linear",
    ),
    cuda(
        "a barrier dropped: a stage read before it is filled",
        "common/simt_product.cuh",
        "        __syncthreads();\n#pragma unroll 8",
        "#pragma unroll 8",
        LINEAR,
        source="grouped_linear",
    ),
    cuda("the slots of the first expert for all", "grouped_outer.cu", "right + first * num_columns", "right", OUTER),
    cuda("the factor of the first expert for all", "lora_shrink.cu", "factor += expert * RANK * depth;", "", SHRINK),
    cuda(
        "a factor read past its last k",
        "lora_shrink.cu",
        "source, k < depth ? 16 : 0, policy",
        "source, 16, policy",
        SHRINK,
    ),
    cuda(
        "the factor of the first expert for all chunks",
        "lora_shrink_chunks.cu",
        "factor += (u64)chunk.expert * RANK * DEPTH;",
        "",
        SHRINK_CHUNKS,
    ),
    cuda(
        "rows and factors read past their last k",
        "lora_shrink_chunks.cu",
        "return k < DEPTH ?",
        "return true ?",
        SHRINK_CHUNKS,
    ),
    cuda(
        "a barrier dropped: the warps' sums added before they are there",
        "lora_shrink_chunks.cu",
        "    __syncthreads();\n    u32 slot",
        "    u32 slot",
        SHRINK_CHUNKS,
    ),
    cuda(
        "the odd column of a transposed factor in the place of the even one",
        "lora_shrink_chunks.cu",
        "0x5410",
        "0x7632",
        SHRINK_CHUNKS,
        defines=("TRANSPOSED=1",),
    ),
    cuda(
        "an adapter's product of intermediates that are still being written",
        "lora_shrink_chunks.cu",
        "    if (!GATHERED) wait_for_previous_grid();\n",
        "",
        STREAMED_ADAPTERS,
        defines=("GATHERED=0",),
    ),
    cuda(
        "low of the first slots for all chunks",
        "common/stream/consumer.cuh",
        "gemm.low + (u64)(tile.chunk.first_slot + token)",
        "gemm.low + (u64)token",
        STREAMED_ADAPTERS,
        source="experts_up",
        defines=("LOW_RANK=16",),
    ),
    cuda(
        "the adapter of the tile before",
        "common/stream/consumer.cuh",
        " rank_step = load_rank_step(gemm, cursor, 0);\n        store_tile(",
        ";\n        store_tile(",
        STREAMED_ADAPTERS,
        source="experts_up",
        defines=("LOW_RANK=16", "TRANSPOSED=0"),
    ),
    cuda(
        "neighbouring rows of a transposed factor in the place of neighbouring k",
        "common/stream/consumer.cuh",
        "from + (u64)i * (2 * Gemm::kUnits)));",
        "from + i));",
        STREAMED_ADAPTERS,
        source="experts_up",
        defines=("LOW_RANK=16", "TRANSPOSED=1"),
    ),
    cuda(
        "low taken before it is written",
        "common/expert_stream.cuh",
        "if (kTokensAreNew || LOW_RANK) wait_for",
        "if (kTokensAreNew) wait_for",
        STREAMED_ADAPTERS,
        source="experts_up",
        defines=("LOW_RANK=16",),
    ),
    cuda("padding that is read", "pack_adapter.cu", "load_where(first + own + step < end,", "load_where(true,", PACK),
    cuda(
        "a barrier dropped: a tile read before it is filled",
        "pack_adapter.cu",
        "        __syncthreads();\n",
        "",
        PACK,
    ),
    cuda("copies that begin late", "pack_adapter.cu", "copies.of[which++].tiles", "copies.of[++which].tiles", PACK),
    cuda("the scaling of an adapter left out", "pack_adapter.cu", "mul_rn(scale, values[i])", "values[i]", PACK),
    cuda(
        "the scaling of a gradient left out",
        "common/low_rank.cuh",
        "float sum = scale * sums",
        "float sum = sums",
        LOW_RANK_OUTER,
        source="lora_outer",
    ),
    cuda(
        "slots past the last that are not cleared",
        "lora_back.cu",
        "if (lines < STEP) {",
        "if (false) {",
        LOW_RANK_BACK,
    ),
    cuda(
        "one block's sums of low for the cluster's",
        "lora_back.cu",
        "other < CLUSTER; other++",
        "other < 1; other++",
        LOW_RANK_BACK,
        defines=("CLUSTER=4",),
    ),
    cuda(
        "low weighted as the slots of the step before",
        "lora_back.cu",
        "load_weights(step + 1);",
        "load_weights(step);",
        LOW_RANK_BACK,
        defines=("WEIGHTED=1",),
    ),
    cuda(
        "rows of the slots of the step before",
        "lora_outer.cu",
        "look_up(step + 1);",
        "look_up(step);",
        LOW_RANK_OUTER,
        defines=("GATHERED=1",),
    ),
    cuda(
        "low of the slots past the last",
        "lora_outer.cu",
        "source, from + slot < slots ? 16 : 0, policy",
        "source, 16, policy",
        LOW_RANK_OUTER,
    ),
    cuda(
        "the words of a left square in the order of a right one",
        "common/squares.cuh",
        "kLeft != kTransposed;",
        "kTransposed;",
        LOW_RANK_OUTER,
        source="lora_outer",
    ),
    cuda(
        "the first k of an adapter again for the others",
        "common/tiles/producer.cuh",
        "k = step * BLOCK_K + threadIdx.x % 8 * 8, to",
        "k = threadIdx.x % 8 * 8, to",
        ADAPTERS,
        source="experts_up_wgmma",
        defines=("LOW_RANK=16",),
    ),
    cuda(
        "an adapter's rank to the last whole step",
        "common/tiles/schedule.cuh",
        "kDepthSteps<Gemm> + (LOW_RANK + BLOCK_K - 1) / BLOCK_K;",
        "kDepthSteps<Gemm> + LOW_RANK / BLOCK_K;",
        ADAPTERS,
        source="experts_down_wgmma",
        defines=("LOW_RANK=16",),
    ),
    cuda(
        "gate for up in the fused experts",
        "experts_up.cu",
        "(one.values[i], other.values[i])",
        "(other.values[i], one.values[i])",
        EXPERTS,
    ),
    cuda(
        "gate for up in experts where they are interleaved",
        "experts_up.cu",
        "(gate_up.values[0], gate_up.values[1])",
        "(gate_up.values[1], gate_up.values[0])",
        KINDS,
        defines=("INTERLEAVED=1",),
    ),
    cuda(
        "the bias of the first expert for all",
        "common/stream/consumer.cuh",
        "gemm.bias + Gemm::row_of(tile.chunk.expert,",
        "gemm.bias + Gemm::row_of(0,",
        KINDS,
        source="experts_up",
        defines=("HAS_BIAS=1",),
    ),
    cuda(
        "matrix rows in another order than the tokens' elements",
        "common/mma.cuh",
        "lane % 8 / 2 * 8 + lane % 2 + lane / 16 * 2",
        "lane % 8 / 2 * 8 + lane % 2 * 2 + lane / 16",
        KINDS,
        source="experts_down",
        defines=("TRANSPOSED=1",),
    ),
    cuda(
        "a row stored twice",
        "experts_down.cu",
        "from_float<SLOT_SCALAR>(second.values[i])",
        "from_float<SLOT_SCALAR>(first.values[i])",
        EXPERTS,
    ),
    cuda(
        "only the first chunk of an expert",
        "common/expert_plan.cuh",
        "rank % TOKENS == 0;",
        "rank == 0;",
        EXPERTS,
        source="experts_up",
        defines=("INLINE_PAIRS=128",),
    ),
    cuda(
        "the last, unfilled chunk forgotten",
        "plan_experts.cu",
        "block_exclusive_sum((count + TOKENS - 1) / TOKENS,",
        "block_exclusive_sum(count / TOKENS,",
        EXPERTS,
    ),
    cuda(
        "the first slot of the next expert",
        "plan_batch.cu",
        "lower < expert; lower += 32",
        "lower <= expert; lower += 32",
        PLAN_BATCH,
    ),
    cuda(
        "more rows than there is room for",
        "plan_batch.cu",
        "min(max(expert_num_tokens[expert], 0), max_tokens)",
        "max(expert_num_tokens[expert], 0)",
        PLAN_BATCH,
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
        "the last, unfilled chunk of sorted pairs forgotten",
        "plan_chunks.cu",
        "- expert_offsets[expert] + TOKENS - 1) / TOKENS;",
        "- expert_offsets[expert]) / TOKENS;",
        PORTABLE,
    ),
    cuda(
        "the chunks of an expert without slots",
        "plan_chunks.cu",
        "if (first_chunks[middle] <= index) expert = middle;",
        "if (first_chunks[middle] < index) expert = middle;",
        PORTABLE,
    ),
    cuda(
        "both warps of a row with the same tokens",
        "common/stream/consumer.cuh",
        "FIRST_TOKEN + (place.token_warp * 8 + lane / 4) * TOKEN_ROW_BYTES",
        "FIRST_TOKEN + lane / 4 * TOKEN_ROW_BYTES",
        PORTABLE,
        source="experts_up",
        defines=("TOKEN_WARPS=2",),
    ),
    cuda(
        "the scale of a stage's first group for all",
        "common/weights/groups.cuh",
        "if (kWholePacks) return more / GROUP * kSize;",
        "if (kWholePacks) return 0;",
        ("tests/kernels/test_experts_stream_quantised.py::test_every_format",),
        source="experts_up",
        defines=("WEIGHTS=INT4", "GROUP=32", "BLOCK_K=256"),
    ),
    cuda(
        "a group of one stage for the next's",
        "common/weights/groups.cuh",
        "more / GROUP * kSize + k / GROUP * kSize % 16;",
        "more / GROUP * kSize;",
        ("tests/kernels/test_experts_stream_quantised.py::test_sizes_of_gemma_4",),
        source="experts_up",
        defines=("WEIGHTS=INT4", "GROUP=32", "BLOCK_K=704"),
    ),
    cuda(
        "8 for every zero point",
        "common/weights/codes.cuh",
        "stage + FIRST_ZERO + row * Zeros::kStageRowBytes + Zeros::place(k, of_part));",
        "stage + FIRST_ZERO) / 256 + 8;",
        QUANTISED,
        source="experts_down",
        defines=("WEIGHTS=INT4", "HAS_ZEROS=1"),
    ),
    cuda(
        "a warp's second block of rows stored over its first",
        "common/stream/store.cuh",
        "mine + group * 8 * SUMS_PITCH + b * 16",
        "mine + group * 8 * SUMS_PITCH",
        PORTABLE,
        source="experts_down",
        defines=("ROW_BLOCKS=2",),
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
        "u32 group = (step * BLOCK_K + k16 * 16) / GROUP_K;",
        "u32 group = step * BLOCK_K / GROUP_K;",
        CODED_TILES,
        source="experts_down_codes_wgmma",
        defines=("GROUP=32",),
    ),
    cuda(
        "codes that are read where the copy engine would put them without a swizzle",
        "common/coded_tiles.cuh",
        "codes = first * CODE_ROW_BYTES + first / 2 % 4 * 16;",
        "codes = first * CODE_ROW_BYTES;",
        CODED_TILES,
        source="experts_down_codes_wgmma",
        defines=("WEIGHTS=INT4",),
    ),
    cuda(
        "a stage that is given back while products read it",
        "common/coded_tiles.cuh",
        "if (k16 == 0 && step > 0 && lane == 0) arrive(pipeline.emptied(previous));",
        "if (k16 == 0 && step > 0 && lane == 0) arrive(pipeline.emptied(stage));",
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
    cuda(
        "gate kept for up",
        "experts_up.cu",
        "store_pack(row + INTERMEDIATE + unit, rounded(other));",
        "store_pack(row + INTERMEDIATE + unit, rounded(one));",
        TRAINING,
        defines=("GATED=1", "INTERLEAVED=0", "KEEPS_GATE_UP=1"),
    ),
    cuda(
        "up kept for gate in the tiles",
        "experts_up_wgmma.cu",
        "eight * 2 + up, half);",
        "eight * 2 + 1, half);",
        TRAINING,
        defines=("GATED=1", "INTERLEAVED=0", "TRANSPOSED=0", "KEEPS_GATE_UP=1"),
    ),
    cuda(
        "the routing weight in its own gradient",
        "experts_down_back_wgmma.cu",
        "dot = fma_rn(of.value, grads[i], dot);",
        "dot = fma_rn(of.value, grad, dot);",
        GRADIENTS,
    ),
    cuda(
        "the gradient of down_proj without the routing weights",
        "experts_down_back_wgmma.cu",
        "from_float<scalar_t>(of.value * weight)",
        "from_float<scalar_t>(of.value)",
        GRADIENTS,
        defines=("STORES_WEIGHTED=1",),
    ),
    cuda(
        "gate_up of the columns before",
        "experts_down_back_wgmma.cu",
        "load(group + 1);",
        "load(group);",
        GRADIENTS,
    ),
    cuda(
        "the slopes of gate and up exchanged",
        "common/activation_slopes.cuh",
        "of_gate.slope * of_up.value, of_gate.value * of_up.slope",
        "of_gate.value * of_up.slope, of_gate.slope * of_up.value",
        GRADIENTS,
        source="experts_down_back_wgmma",
    ),
    cuda(
        "a slope beyond the clamp",
        "common/activation_slopes.cuh",
        "fabsf(up) <= limit ? 1.0f : 0.0f",
        "1.0f",
        SLOPES,
        source="experts_down_back_wgmma",
        defines=("ACTIVATION=SWIGLUOAI",),
    ),
    cuda(
        "the sums of the expert before for one without slots",
        "experts_outer_wgmma.cu",
        "if (slots > 0) return;",
        "return;",
        OUTER_OF_SLOTS,
    ),
    cuda(
        "tokens past an expert's last slot",
        "experts_outer_wgmma.cu",
        "slot(i) < tile.past ? problem.token_of_slot[slot(i)] : -1",
        "problem.token_of_slot[slot(i)]",
        OUTER_OF_SLOTS,
    ),
    cuda("slot 0 taken for masked in the sums of parts", "sum_parts.cu", "slot >= 0 && i", "slot > 0 && i", SUMS),
    cuda(
        "routing weights in the order of the pairs",
        "sort_by_expert.cu",
        "weight_of_slot[slot] = top_k_weights[pair];",
        "weight_of_slot[pair] = top_k_weights[pair];",
        SORT,
        defines=("HAS_WEIGHTS=1",),
    ),
    cuda(
        "tickets not set to zero",
        "sort_by_expert.cu",
        "tickets[threadIdx.x] = 0;",
        "tickets[threadIdx.x] += 0;",
        BITS,
    ),
    launcher(
        "the tickets that another kernel has used up",
        "kernels/experts_down_wgmma.py",
        "pairs.tickets.data_ptr() + 4",
        "pairs.tickets.data_ptr()",
        TILES,
    ),
    launcher(
        "the tickets that the way back through the down projection has used up",
        "backends/fused_backward.py",
        "_THIRD_TICKET = 2",
        "_THIRD_TICKET = 1",
        GRADIENTS,
    ),
    launcher(
        "the gradient of a transposed weight as of a contiguous one",
        "backends/fused_backward.py",
        "slots_first = is_out_of_slots == weight.is_contiguous()",
        "slots_first = is_out_of_slots",
        TRAINING,
    ),
    launcher(
        "what was kept for the gradients dropped",
        "ops/experts.py",
        "ctx.save_for_backward(*inputs[:_NUM_TENSORS], *kept)",
        "ctx.save_for_backward(*inputs[:_NUM_TENSORS], *_NOTHING_KEPT)",
        KEPT,
    ),
    launcher(
        "a stale map of the weights",
        "kernels/experts_up_wgmma.py",
        "*_gate_up_map(gate_up_proj.data_ptr(), shape, shape.hidden_size),",
        "*vars(_prepared).setdefault(shape, _gate_up_map(gate_up_proj.data_ptr(), shape, shape.hidden_size)),",
        PARAMETERS,
    ),
    launcher(
        "a grid too small by its last block",
        "kernels/combine.py",
        "-(-columns // (width * tuning[1]))",
        "columns // (width * tuning[1])",
        EXPERTS,
    ),
    launcher(
        "the last tokens without a block",
        "kernels/route.py",
        "(-(-num_tokens // WARPS), 1)",
        "(max(1, num_tokens // WARPS), 1)",
        ROUTE,
    ),
    launcher(
        "the alignment of the output forgotten",
        "kernels/gated_activation.py",
        "(source | target) % 16 == 0",
        "source % 16 == 0",
        ACTIVATION,
    ),
    launcher(
        "the alignment of rows forgotten",
        "kernels/rows.py",
        "return width if aligned and columns % width == 0 else 1",
        "return width if columns % width == 0 else 1",
        GATHER,
    ),
    launcher(
        "the last expert without a block",
        "kernels/grouped_linear.py",
        "num_slots // TILE + num_experts",
        "num_slots // TILE + num_experts - 1",
        LINEAR,
    ),
    launcher("the counts of two blocks missing", "kernels/sort_by_expert.py", "if blocks > 1:", "if blocks > 2:", SORT),
    launcher("always the default stream", "kernels/launch.py", "config.stream = stream", "config.stream = 0", STREAMS),
    launcher(
        "stale parameters",
        "kernels/launch.py",
        "        _PACK[len(arguments)](own.values, 0, *arguments)",
        "        any(own.values) or _PACK[len(arguments)](own.values, 0, *arguments)",
        ACTIVATION,
    ),
    launcher(
        "a stale workspace, shared by all streams",
        "kernels/expert_stream.py",
        "memory = like.new_empty(size, dtype=torch.uint8)",
        "memory = vars(new_workspace).setdefault(size, like.new_empty(size, dtype=torch.uint8))",
        STREAMS,
    ),
    launcher(
        "the last expert's rows not activated",
        "backends/expert_rows.py",
        "num_rows=self.offsets[-1:]",
        "num_rows=self.offsets[-2:-1]",
        EXPERTS,
    ),
    launcher(
        "the first row of a step given to the expert before it",
        "backends/expert_rows.py",
        "torch.where(slots < self.offsets[first], output, product)",
        "torch.where(slots <= self.offsets[first], output, product)",
        QUANTISED,
    ),
    launcher(
        "few tokens streamed although their bits are to be those of many",
        "backends/fused.py",
        "prefers = is_invariant or prefers_tiles",
        "prefers = prefers_tiles",
        INVARIANT,
    ),
    launcher(
        "a regime that splits k for bits that may not depend on the load",
        "kernels/expert_stream.py",
        "return planned[-1]",
        "return planned[bisect.bisect_left(bounds, pairs)]",
        INVARIANT_STREAM,
    ),
)
