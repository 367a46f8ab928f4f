// gather: every token's hidden state copied to its slots, so that the rows of one expert are neighbours.
//
// Reads  hidden_states [T, COLS] SCALAR
//        slot_of_pair  [T, TOP_K] i32     row of expert_hidden_states for each pair; -1: masked, no row
// Writes expert_hidden_states [T * TOP_K, COLS] SCALAR
// Grid   (T, ceil(COLS / VEC / BLOCK_THREADS)). A thread reads VEC elements once and writes them up to TOP_K times, so
//        device memory gives each token once; gathering by slot would read it TOP_K times.
// Needs  COLS % VEC == 0, pointers aligned to VEC elements.
#include "common/dtypes.cuh"

#if !defined(SCALAR) || !defined(COLS) || !defined(VEC) || !defined(TOP_K) || !defined(BLOCK_THREADS)
#error "define SCALAR, COLS, VEC, TOP_K and BLOCK_THREADS"
#endif

typedef SCALAR scalar_t;

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
gather(const scalar_t* __restrict__ hidden_states, const int* __restrict__ slot_of_pair,
       scalar_t* __restrict__ expert_hidden_states) {
    u64 token = blockIdx.x;
    u32 col = (blockIdx.y * BLOCK_THREADS + threadIdx.x) * VEC;
    if (col >= COLS) return;
    Pack<scalar_t, VEC> pack = load_pack<scalar_t, VEC>(hidden_states + token * COLS + col);
#pragma unroll
    for (int k = 0; k < TOP_K; k++) {
        int slot = slot_of_pair[token * TOP_K + k];
        if (slot >= 0) store_pack(expert_hidden_states + (u64)slot * COLS + col, pack);
    }
}
