// combine: each token's expert outputs, weighted and summed over k = 0, 1, ... in fp32: a fixed order, no atomics.
//
// Reads  expert_output [T * TOP_K, COLS] SLOT_SCALAR   rows in expert order, written by the grid before this one
//        slot_of_pair  [T, TOP_K] i32             row of each pair; -1: masked, contributes nothing and is not read
//        top_k_weights [T, TOP_K] fp32
// Writes output        [T, COLS] SCALAR           zeros where every pair of a token is masked
// Grid   (T, ceil(COLS / VEC / BLOCK_THREADS)). One thread owns VEC neighbouring outputs of one token.
// Needs  COLS % VEC == 0, pointers aligned to VEC elements; OLD_CHOICES: the grid before this one wrote neither slot_of_pair
//        nor top_k_weights.
// Why    Old choices are loaded while the rows are still being written.
#include "common/async_copy.cuh"

#if !defined(SCALAR) || !defined(SLOT_SCALAR) || !defined(COLS) || !defined(VEC) || !defined(TOP_K) || \
    !defined(ROWS_IN_FLIGHT) || !defined(OLD_CHOICES) || !defined(BLOCK_THREADS)
#error "define SCALAR, SLOT_SCALAR, COLS, VEC, TOP_K, ROWS_IN_FLIGHT, OLD_CHOICES and BLOCK_THREADS"
#endif
#include "common/weighted_rows.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
combine(const SLOT_SCALAR* expert_output, const int* slot_of_pair, const float* __restrict__ top_k_weights,
        SCALAR* __restrict__ output) {
    u64 token = blockIdx.x;
    u32 col = (blockIdx.y * BLOCK_THREADS + threadIdx.x) * VEC;
    slot_of_pair += token * TOP_K, top_k_weights += token * TOP_K;
    int old_slots[ROWS_IN_FLIGHT];
    float old_weights[ROWS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; OLD_CHOICES && i < ROWS_IN_FLIGHT; i++) {
        old_slots[i] = load_from_l2(slot_of_pair + i), old_weights[i] = load_from_l2(top_k_weights + i);
    }
    wait_for_previous_grid();
    release_next_grid();
    if (col >= COLS) return;
    float sums[VEC] = {};
#pragma unroll
    for (int k = 0; k < TOP_K; k += ROWS_IN_FLIGHT) {
        bool old = OLD_CHOICES && k == 0;
        add_weighted_rows<ROWS_IN_FLIGHT>(
            sums, expert_output + col, COLS, [&](int i) { return old ? old_slots[i] : k + i < TOP_K ? slot_of_pair[k + i] : -1; },
            [&](int i) { return old ? old_weights[i] : top_k_weights[k + i]; });
    }
    store_pack(output + token * COLS + col, rounded_pack<SCALAR>(sums));
}
