// Sums, running sums and maxima over the 32 lanes of a warp.
#pragma once
#include "dtypes.cuh"

#define FULL_WARP 0xffffffffu

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(FULL_WARP, value, offset);
    return value;
}

// The sum over the lanes up to this one.
__device__ __forceinline__ int warp_inclusive_sum(int value) {
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        int below = __shfl_up_sync(FULL_WARP, value, offset);
        if (threadIdx.x % 32 >= offset) value += below;
    }
    return value;
}

__device__ __forceinline__ u32 warp_max(u32 value) {
    u32 result;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(value));
    return result;
}
