// The (token, k) pairs of a routing. Includers define INDEX and NUM_EXPERTS.
#pragma once
#include "async_copy.cuh"

// The expert of a pair; -1: masked (an index outside [0, NUM_EXPERTS)) or past the end. May be asked before the wait, when
// top_k_index is two grids back.
__device__ __forceinline__ int expert_of(const INDEX* top_k_index, u32 pair, u32 num_pairs) {
    if (pair >= num_pairs) return -1;
    INDEX expert = load_from_l2(top_k_index + pair);
    return expert >= 0 && expert < NUM_EXPERTS ? (int)expert : -1;
}
