// sort_by_expert: a stable counting sort of the (token, k) pairs by expert, without atomics on the result.
//
// Reads  top_k_index    [P] INDEX         P = T * TOP_K pairs; an index outside [0, NUM_EXPERTS) is masked
//        top_k_weights  [P] fp32          only with HAS_WEIGHTS
//        expert_map     [GLOBAL_EXPERTS] EXPERT_MAP   of common/pairs.cuh; only with HAS_EXPERT_MAP
// Writes expert_offsets [NUM_EXPERTS + 1] i32   first slot of each expert; the last is the number of pairs kept
//        token_of_slot  [P] i32           token of each slot; slots past the last offset stay as they are
//        slot_of_pair   [P] i32           slot of each pair; -1: masked
//        tickets        [TICKETS] u32     zeros: counters for later kernels that hand out work
//        weight_of_slot [P] fp32          weight of each slot's pair; only with HAS_WEIGHTS
// Uses   block_counts   [blocks, NUM_EXPERTS] i32   only with more than one block
// Grid   ceil(P / PAIRS_PER_BLOCK). One block owns PAIRS_PER_BLOCK neighbouring pairs, each of its warps a neighbouring part.
//        One block is one launch of sort_by_expert; more need count_by_expert before it, over the same grid. While that still
//        runs, sort_by_expert may count its own pairs (programmatic dependent launch).
// Smem   WARPS * NUM_EXPERTS counters.
// Why    A slot is (pairs of lower experts) + (the expert's pairs in earlier blocks, warps and lanes): sums of counts, so
//        the same bits every run. A token may name an expert twice; both pairs get a slot.
#if !defined(INDEX) || !defined(NUM_EXPERTS) || !defined(TOP_K) || !defined(WARPS) || !defined(PAIRS_PER_BLOCK) || \
    !defined(TICKETS) || !defined(HAS_WEIGHTS)
#error "define INDEX, NUM_EXPERTS, TOP_K, WARPS, PAIRS_PER_BLOCK, TICKETS and HAS_WEIGHTS"
#endif
#include "common/async_copy.cuh"
#include "common/pairs.cuh"
#include "common/warp.cuh"
#define BLOCK_THREADS (WARPS * 32)
#define PAIRS_PER_WARP (PAIRS_PER_BLOCK / WARPS)

// counts[warp][expert] of this block's pairs.
__device__ __forceinline__ void count_pairs(const Routing& routing, int (*counts)[NUM_EXPERTS]) {
    for (int i = threadIdx.x; i < WARPS * NUM_EXPERTS; i += BLOCK_THREADS) (&counts[0][0])[i] = 0;
    __syncthreads();
    u32 warp = threadIdx.x / 32;
    u32 first = blockIdx.x * PAIRS_PER_BLOCK + warp * PAIRS_PER_WARP;
    for (u32 pair = first + threadIdx.x % 32; pair < first + PAIRS_PER_WARP; pair += 32) {
        int expert = routing.expert_of(pair);
        if (expert >= 0) atomicAdd(&counts[warp][expert], 1);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
count_by_expert(const INDEX* top_k_index, int* __restrict__ block_counts, u64 num_pairs, const EXPERT_MAP* expert_map) {
    __shared__ int counts[WARPS][NUM_EXPERTS];
    wait_for_previous_grid();
    release_next_grid();
    count_pairs({top_k_index, (u32)num_pairs, expert_map}, counts);
    for (int expert = threadIdx.x; expert < NUM_EXPERTS; expert += BLOCK_THREADS) {
        int total = 0;
        for (int warp = 0; warp < WARPS; warp++) total += counts[warp][expert];
        block_counts[blockIdx.x * NUM_EXPERTS + expert] = total;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
sort_by_expert(const INDEX* __restrict__ top_k_index, const int* block_counts, int* expert_offsets, int* token_of_slot,
               int* slot_of_pair, u32* tickets, u64 num_pairs, const float* __restrict__ top_k_weights, float* weight_of_slot,
               const EXPERT_MAP* expert_map) {
    __shared__ int counts[WARPS][NUM_EXPERTS];  // then the next slot of each warp and expert
    __shared__ int offsets[NUM_EXPERTS];        // pairs of each expert, then of all lower ones
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Routing routing = {top_k_index, (u32)num_pairs, expert_map};
    if (gridDim.x == 1) wait_for_previous_grid();  // which may write top_k_index; else count_by_expert has waited
    count_pairs(routing, counts);
    wait_for_previous_grid();
    release_next_grid();
    if (blockIdx.x == 0 && threadIdx.x < TICKETS) tickets[threadIdx.x] = 0;

    // Each warp's pairs come after those of earlier blocks and warps.
    for (int expert = threadIdx.x; expert < NUM_EXPERTS; expert += BLOCK_THREADS) {
        int before = 0, total = 0;
        for (u32 block = 0; gridDim.x > 1 && block < gridDim.x; block++) {
            if (block == blockIdx.x) before = total;
            total += block_counts[block * NUM_EXPERTS + expert];
        }
        for (int w = 0; w < WARPS; w++) {
            int count = counts[w][expert];
            counts[w][expert] = before;
            before += count;
        }
        offsets[expert] = gridDim.x > 1 ? total : before;
    }
    __syncthreads();

    if (warp == 0) {
        int kept = warp_exclusive_sums(
            NUM_EXPERTS, [&](int expert) { return offsets[expert]; }, [&](int expert, int sum) { offsets[expert] = sum; });
        if (lane == 0 && blockIdx.x == 0) expert_offsets[NUM_EXPERTS] = kept;
    }
    __syncthreads();
    for (int expert = threadIdx.x; blockIdx.x == 0 && expert < NUM_EXPERTS; expert += BLOCK_THREADS) {
        expert_offsets[expert] = offsets[expert];
    }

    u32 first = blockIdx.x * PAIRS_PER_BLOCK + warp * PAIRS_PER_WARP;
    for (u32 base = first; base < first + PAIRS_PER_WARP && base < num_pairs; base += 32) {
        u32 pair = base + lane;
        int expert = routing.expert_of(pair);
        u32 same = __match_any_sync(FULL_WARP, expert);
        u32 earlier = same & ((1u << lane) - 1);
        int slot = expert >= 0 ? offsets[expert] + counts[warp][expert] + __popc(earlier) : -1;
        __syncwarp();
        if (expert >= 0 && earlier == 0) counts[warp][expert] += __popc(same);
        __syncwarp();
        if (pair < num_pairs) slot_of_pair[pair] = slot;
        if (slot >= 0) token_of_slot[slot] = pair / TOP_K;
        if (HAS_WEIGHTS && slot >= 0) weight_of_slot[slot] = top_k_weights[pair];
    }
}
