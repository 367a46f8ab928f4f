// combine: each token's rows in expert order, weighted and summed over k = 0, 1, ... in fp32: a fixed order, no atomics.
//
// Reads  expert_output [T * TOP_K, COLS] SLOT_SCALAR   rows in expert order, written by the grid before this one
//        slot_of_pair  [T, TOP_K] i32             row of each pair; -1: masked, contributes nothing and is not read
//        top_k_weights [T, TOP_K] fp32           only with WEIGHTED; else every weight is 1
// Writes output        [T, COLS] SCALAR           zeros where every pair of a token is masked
// Grid   (T, ceil(COLS / VEC / BLOCK_THREADS)). One thread owns VEC neighbouring outputs of one token.
// Needs  COLS % VEC == 0, pointers aligned to VEC elements; OLD_CHOICES: the grid before this one wrote neither slot_of_pair
//        nor top_k_weights.
// Why    Old choices are loaded while the rows are still being written.
#include "common/async_copy.cuh"

#if !defined(SCALAR) || !defined(SLOT_SCALAR) || !defined(COLS) || !defined(VEC) || !defined(TOP_K) || \
    !defined(ROWS_IN_FLIGHT) || !defined(OLD_CHOICES) || !defined(WEIGHTED) || !defined(BLOCK_THREADS)
#error "define SCALAR, SLOT_SCALAR, COLS, VEC, TOP_K, ROWS_IN_FLIGHT, OLD_CHOICES, WEIGHTED and BLOCK_THREADS"
#endif
#define CHOICES (TOP_K < 8 ? TOP_K : 8)  // loaded together
static_assert(ROWS_IN_FLIGHT <= CHOICES, "ROWS_IN_FLIGHT");

// The slots and weights of up to CHOICES of a token's experts, from the first-th on.
struct Choices {
    int slots[CHOICES];
    float weights[CHOICES];

    __device__ __forceinline__ void load(const int* slot_of_pair, const float* top_k_weights, int first) {
#pragma unroll
        for (int i = 0; i < CHOICES; i++) {
            slots[i] = -1;
            if (first + i >= TOP_K) continue;
            slots[i] = load_from_l2(slot_of_pair + first + i);
            weights[i] = WEIGHTED ? load_from_l2(top_k_weights + first + i) : 1.0f;
        }
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
combine(const SLOT_SCALAR* expert_output, const int* slot_of_pair, const float* __restrict__ top_k_weights,
        SCALAR* __restrict__ output) {
    u64 token = blockIdx.x;
    u32 col = (blockIdx.y * BLOCK_THREADS + threadIdx.x) * VEC;
    slot_of_pair += token * TOP_K, top_k_weights += token * TOP_K;
    Choices choices;
    if (OLD_CHOICES) choices.load(slot_of_pair, top_k_weights, 0);
    wait_for_previous_grid();
    release_next_grid();
    if (col >= COLS) return;

    // All rows of a group are loaded before one is added: more of them hide latency where blocks are few, and cost occupancy,
    // so bandwidth, where they are many.
    float sums[VEC] = {};
#pragma unroll
    for (int first = 0; first < TOP_K; first += CHOICES) {
        if (!OLD_CHOICES || first > 0) choices.load(slot_of_pair, top_k_weights, first);
#pragma unroll
        for (int group = 0; group < CHOICES; group += ROWS_IN_FLIGHT) {
            Pack<SLOT_SCALAR, VEC> rows[ROWS_IN_FLIGHT];
#pragma unroll
            for (int i = 0; i < ROWS_IN_FLIGHT; i++) {
                if (group + i < CHOICES && choices.slots[group + i] >= 0) {
                    rows[i] = load_pack<SLOT_SCALAR, VEC>(expert_output + (u64)choices.slots[group + i] * COLS + col);
                }
            }
#pragma unroll
            for (int i = 0; i < ROWS_IN_FLIGHT; i++) {
                if (group + i >= CHOICES || choices.slots[group + i] < 0) continue;
#pragma unroll
                for (int v = 0; v < VEC; v++) sums[v] = fma_rn(choices.weights[group + i], to_float(rows[i].values[v]), sums[v]);
            }
        }
    }
    Pack<SCALAR, VEC> rounded;
#pragma unroll
    for (int v = 0; v < VEC; v++) rounded.values[v] = from_float<SCALAR>(sums[v]);
    store_pack(output + token * COLS + col, rounded);
}
