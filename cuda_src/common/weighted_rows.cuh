// The weighted sum of a token's expert outputs, over k = 0, 1, ... in fp32: a fixed order, no atomics.
#pragma once
#include "dtypes.cuh"

// sums += weight_of(i) * row slot_of(i), i = 0 .. kCount - 1: kWidth columns from `columns` on, which lie in row 0. A slot of -1
// is masked: it contributes nothing and is not read. All rows are loaded before one is added: more of them hide latency where
// blocks are few, and cost occupancy, so bandwidth, where they are many.
template <int kCount, typename T, int kWidth, class SlotOf, class WeightOf>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[kWidth], const T* columns, u32 row_size, SlotOf slot_of, WeightOf weight_of) {
    Pack<T, kWidth> rows[kCount];
    int slots[kCount];
#pragma unroll
    for (int i = 0; i < kCount; i++) {
        slots[i] = slot_of(i);
        if (slots[i] >= 0) rows[i] = load_pack<T, kWidth>(columns + (u64)slots[i] * row_size);
    }
#pragma unroll
    for (int i = 0; i < kCount; i++) {
        if (slots[i] < 0) continue;
        float weight = weight_of(i);
#pragma unroll
        for (int v = 0; v < kWidth; v++) sums[v] = fma_rn(weight, to_float(rows[i].values[v]), sums[v]);
    }
}

template <typename T, int kWidth> __device__ __forceinline__ Pack<T, kWidth> rounded_pack(const float (&sums)[kWidth]) {
    Pack<T, kWidth> result;
#pragma unroll
    for (int v = 0; v < kWidth; v++) result.values[v] = from_float<T>(sums[v]);
    return result;
}
