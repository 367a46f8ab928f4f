// combine: each token's expert outputs, weighted and summed over k = 0, 1, ... in fp32: a fixed order, no atomics.
//
// Reads  expert_output [T * TOP_K, COLS] SLOT_SCALAR   rows in expert order
//        slot_of_pair  [T, TOP_K] i32             row of each pair; -1: masked, contributes nothing and is not read
//        top_k_weights [T, TOP_K] fp32
// Writes output        [T, COLS] SCALAR           zeros where every pair of a token is masked
// Grid   (T, ceil(COLS / VEC / BLOCK_THREADS)). One thread owns VEC neighbouring outputs of one token.
// Needs  COLS % VEC == 0, pointers aligned to VEC elements.
#include "common/async_copy.cuh"

#if !defined(SCALAR) || !defined(SLOT_SCALAR) || !defined(COLS) || !defined(VEC) || !defined(TOP_K) || \
    !defined(ROWS_IN_FLIGHT) || !defined(BLOCK_THREADS)
#error "define SCALAR, SLOT_SCALAR, COLS, VEC, TOP_K, ROWS_IN_FLIGHT and BLOCK_THREADS"
#endif

typedef Pack<SLOT_SCALAR, VEC> slot_pack_t;

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
combine(const SLOT_SCALAR* expert_output, const int* slot_of_pair, const float* __restrict__ top_k_weights,
        SCALAR* __restrict__ output) {
    u64 token = blockIdx.x;
    u32 col = (blockIdx.y * BLOCK_THREADS + threadIdx.x) * VEC;
    wait_for_previous_grid();
    release_next_grid();
    if (col >= COLS) return;
    float sum[VEC] = {};
    // More rows in registers hide latency where blocks are few, and cost occupancy, so bandwidth, where they are many.
#pragma unroll
    for (int k0 = 0; k0 < TOP_K; k0 += ROWS_IN_FLIGHT) {
        slot_pack_t rows[ROWS_IN_FLIGHT];
        int slots[ROWS_IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < ROWS_IN_FLIGHT; i++) {
            slots[i] = k0 + i < TOP_K ? slot_of_pair[token * TOP_K + k0 + i] : -1;
            if (slots[i] >= 0) rows[i] = load_pack<SLOT_SCALAR, VEC>(expert_output + (u64)slots[i] * COLS + col);
        }
#pragma unroll
        for (int i = 0; i < ROWS_IN_FLIGHT; i++) {
            if (slots[i] < 0) continue;
            float weight = top_k_weights[token * TOP_K + k0 + i];
#pragma unroll
            for (int v = 0; v < VEC; v++) sum[v] = fma_rn(weight, to_float(rows[i].values[v]), sum[v]);
        }
    }
    Pack<SCALAR, VEC> result;
#pragma unroll
    for (int v = 0; v < VEC; v++) result.values[v] = from_float<SCALAR>(sum[v]);
    store_pack(output + token * COLS + col, result);
}
