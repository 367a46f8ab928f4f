"""Faults of the weight stream and of its plans."""

from __future__ import annotations

from scripts.mutations.mutation import EXPERTS, STREAMS, cuda, launcher

KINDS = ("tests/kernels/test_experts_stream.py::test_every_kind_of_experts",)
PLAN_BATCH = ("tests/kernels/test_plan_batch.py",)
PORTABLE = ("tests/kernels/test_experts_portable.py::test_every_regime",)
INVARIANT_STREAM = ("tests/test_invariance.py::test_other_cards",)
QUANTISED = ("tests/kernels/test_experts_stream_quantised.py",)


FAULTS = (
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
        "the bound between the cuts of a batch",
        "plan_batch.cu",
        "(u64)slots >= NUM_EXPERTS * many_from",
        "(u64)slots > NUM_EXPERTS * many_from",
        PLAN_BATCH,
    ),
    cuda(
        "the rows of a batch in both of its plans",
        "plan_batch.cu",
        "offsets[expert] = threadIdx.x == taken ? first : 0;",
        "offsets[expert] = first;",
        PLAN_BATCH,
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
    launcher(
        "a stale workspace, shared by all streams",
        "kernels/expert_stream.py",
        "memory = like.new_empty(size, dtype=torch.uint8)",
        "memory = vars(new_workspace).setdefault(size, like.new_empty(size, dtype=torch.uint8))",
        STREAMS,
    ),
    launcher(
        "a regime that splits k for bits that may not depend on the load",
        "kernels/expert_stream.py",
        "return planned[-1]",
        "return planned[bisect.bisect_left(bounds, pairs)]",
        INVARIANT_STREAM,
    ),
)
