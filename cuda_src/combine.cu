// combine: each token's expert outputs, weighted and summed over k = 0, 1, ... in fp32: a fixed order, no atomics.
//
// Reads  expert_output [T * TOP_K, COLS] SCALAR   rows in expert order
//        slot_of_pair  [T, TOP_K] i32             row of each pair; -1: masked, contributes nothing and is not read
//        top_k_weights [T, TOP_K] fp32
// Writes output        [T, COLS] SCALAR           zeros where every pair of a token is masked
// Grid   (T, ceil(COLS / VEC / BLOCK_THREADS)). One thread owns VEC neighbouring outputs of one token.
// Needs  COLS % VEC == 0, pointers aligned to VEC elements.
#include "common/dtypes.cuh"

#if !defined(SCALAR) || !defined(COLS) || !defined(VEC) || !defined(TOP_K) || !defined(BLOCK_THREADS)
#error "define SCALAR, COLS, VEC, TOP_K and BLOCK_THREADS"
#endif

typedef SCALAR scalar_t;
typedef Pack<scalar_t, VEC> pack_t;

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
combine(const scalar_t* __restrict__ expert_output, const int* __restrict__ slot_of_pair,
        const float* __restrict__ top_k_weights, scalar_t* __restrict__ output) {
    u64 token = blockIdx.x;
    u32 col = (blockIdx.y * BLOCK_THREADS + threadIdx.x) * VEC;
    if (col >= COLS) return;
    float sum[VEC] = {};
    // Two rows at a time: more in registers costs occupancy, and with it bandwidth (8 rows: 72% of it, 4: 98%).
    const int kGroup = TOP_K < 2 ? TOP_K : 2;
#pragma unroll
    for (int k0 = 0; k0 < TOP_K; k0 += kGroup) {
        pack_t rows[kGroup];
        int slots[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; i++) {
            slots[i] = k0 + i < TOP_K ? slot_of_pair[token * TOP_K + k0 + i] : -1;
            if (slots[i] >= 0) rows[i] = load_pack<scalar_t, VEC>(expert_output + (u64)slots[i] * COLS + col);
        }
#pragma unroll
        for (int i = 0; i < kGroup; i++) {
            if (slots[i] < 0) continue;
            float weight = top_k_weights[token * TOP_K + k0 + i];
#pragma unroll
            for (int v = 0; v < VEC; v++) sum[v] = fma_rn(weight, to_float(rows[i].values[v]), sum[v]);
        }
    }
    pack_t result;
#pragma unroll
    for (int v = 0; v < VEC; v++) result.values[v] = from_float<scalar_t>(sum[v]);
    store_pack(output + token * COLS + col, result);
}
