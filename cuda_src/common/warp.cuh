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

// store(i, sum of load(0) .. load(i - 1)) for i = 0 .. count - 1; the sum of all. One warp.
template <class Load, class Store> __device__ __forceinline__ int warp_exclusive_sums(int count, Load load, Store store) {
    int carry = 0;
    for (int base = 0; base < count; base += 32) {
        int i = base + threadIdx.x % 32, value = i < count ? load(i) : 0, inclusive = warp_inclusive_sum(value);
        if (i < count) store(i, carry + inclusive - value);
        carry += __shfl_sync(FULL_WARP, inclusive, 31);
    }
    return carry;
}

__device__ __forceinline__ u32 warp_max(u32 value) {
    u32 result;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(value));
    return result;
}
