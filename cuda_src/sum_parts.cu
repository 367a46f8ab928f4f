// sum_parts: what the parts of a pair's slot add up to: the gradient of its routing weight.
//
// Reads  parts        [slots, PARTS] fp32     rows in expert order, of experts_down_back_wgmma.cu
//        slot_of_pair [P] i32                 -1: masked, its sum is zero
// Writes sums         [P] fp32
// Grid   ceil(P / BLOCK_THREADS). One thread owns one pair.
// Maths  fp32 sums over parts 0, 1, ...
#include "common/async_copy.cuh"

#if !defined(PARTS) || !defined(BLOCK_THREADS)
#error "define PARTS and BLOCK_THREADS"
#endif

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
sum_parts(const float* parts, const int* slot_of_pair, float* __restrict__ sums, u64 num_pairs) {
    wait_for_previous_grid();
    release_next_grid();
    u32 pair = blockIdx.x * BLOCK_THREADS + threadIdx.x;
    if (pair >= num_pairs) return;
    int slot = load_from_l2(slot_of_pair + pair);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; slot >= 0 && i < PARTS; i++) sum += load_from_l2(parts + (u64)slot * PARTS + i);
    sums[pair] = sum;
}
