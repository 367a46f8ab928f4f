// The (token, k) pairs of a routing. Includers define INDEX and NUM_EXPERTS.
#pragma once
#include "dtypes.cuh"

// The expert of a pair; -1: masked (an index outside [0, NUM_EXPERTS)) or past the end.
__device__ __forceinline__ int expert_of(const INDEX* top_k_index, u32 pair, u32 num_pairs) {
    if (pair >= num_pairs) return -1;
    INDEX expert = top_k_index[pair];
    return expert >= 0 && expert < NUM_EXPERTS ? (int)expert : -1;
}
