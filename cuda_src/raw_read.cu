// raw_read: reads bytes and does nothing else; the benchmark's measure of what the memory gives.
//
// Reads  data   [num_packs] 16-byte packs
// Writes result [grid] u32   only where a thread's xor is one value in 2^32, so that no load is dropped
// Grid   any; blocks walk the data with a stride of the grid.
#include "common/dtypes.cuh"

#ifndef BLOCK_THREADS
#error "define BLOCK_THREADS"
#endif
#define UNROLL 8

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
raw_read(const u32* __restrict__ data, u32* __restrict__ result, u64 num_packs) {
    u32 folded = 0;
    u64 stride = (u64)gridDim.x * BLOCK_THREADS;
    for (u64 base = (u64)blockIdx.x * BLOCK_THREADS + threadIdx.x; base < num_packs; base += stride * UNROLL) {
        Pack<u32, 4> packs[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            u64 index = base + i * stride;
            packs[i] = load_pack<u32, 4>(data + 4 * (index < num_packs ? index : base));
        }
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) folded ^= packs[i].values[j];
        }
    }
    if (folded == 0x5eed1e55u) result[blockIdx.x] = folded;
}
