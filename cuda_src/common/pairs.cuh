// The (token, k) pairs of a routing. Includers define INDEX and NUM_EXPERTS; with HAS_EXPERT_MAP also GLOBAL_EXPERTS and EXPERT_MAP,
// the element type of the map.
#pragma once
#include "async_copy.cuh"

#ifndef HAS_EXPERT_MAP
#define HAS_EXPERT_MAP 0
#define EXPERT_MAP int
#define GLOBAL_EXPERTS NUM_EXPERTS
#endif

// May be asked before the wait, when top_k_index and expert_map are two grids back.
struct Routing {
    const INDEX* top_k_index;      // [num_pairs], of [0, GLOBAL_EXPERTS); others are masked
    u32 num_pairs;
    const EXPERT_MAP* expert_map;  // [GLOBAL_EXPERTS]: which of the NUM_EXPERTS here; others are not here. Only with HAS_EXPERT_MAP

    // The expert of all that a pair chose; -1: masked or past the end.
    __device__ __forceinline__ int chosen(u32 pair) const {
        if (pair >= num_pairs) return -1;
        INDEX expert = load_from_l2(top_k_index + pair);
        return expert >= 0 && expert < GLOBAL_EXPERTS ? (int)expert : -1;
    }

    // What that expert is here; -1: it is not.
    __device__ __forceinline__ int local(int chosen) const {
        if (!HAS_EXPERT_MAP || chosen < 0) return chosen;
        EXPERT_MAP expert = load_from_l2(expert_map + chosen);
        return expert >= 0 && expert < NUM_EXPERTS ? (int)expert : -1;
    }

    __device__ __forceinline__ int expert_of(u32 pair) const { return local(chosen(pair)); }
};
