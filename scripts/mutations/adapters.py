"""Faults of what adapters add: narrow products, packed copies, and their part in the stream and the tiles."""

from __future__ import annotations

from scripts.mutations.mutation import cuda

SHRINK = ("tests/kernels/test_lora_shrink.py",)
SHRINK_CHUNKS = ("tests/kernels/test_lora_shrink_chunks.py::test_every_slot",)
PACK = ("tests/kernels/test_pack_adapter.py",)
LOW_RANK_OUTER = ("tests/kernels/test_lora_outer.py",)
LOW_RANK_BACK = ("tests/kernels/test_lora_back.py::test_columns_rows_and_weights",)
STREAMED_ADAPTERS = (
    "tests/kernels/test_experts_stream_adapters.py::test_every_kind_of_experts",
    "tests/kernels/test_experts_stream_adapters.py::test_gemma_4_s_sizes",
)
ADAPTERS = ("tests/kernels/test_experts_wgmma_adapters.py::test_every_slot",)


FAULTS = (
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
)
