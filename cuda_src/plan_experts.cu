// plan_experts: the plan of common/expert_plan.cuh for more pairs than a block of the GEMMs plans for itself.
//
// Reads  top_k_index  [P] INDEX        P = T * TOP_K pairs; an index outside [0, NUM_EXPERTS) is masked
//        expert_map   [GLOBAL_EXPERTS] EXPERT_MAP   of common/pairs.cuh; only with HAS_EXPERT_MAP
// Writes chunks       [..] Chunk       by expert, then slot; at most min(P, NUM_EXPERTS + P / TOKENS) of them
//        pair_of_slot [P] i32          slots past the number of kept pairs stay as they are
//        slot_of_pair [P] i32          -1: masked
//        num_chunks   i32
// Grid   1 block of WARPS * 32 >= NUM_EXPERTS threads; a warp owns PAIRS_PER_LANE * 32 neighbouring pairs.
// Needs  P <= WARPS * PAIRS_PER_LANE * 32.
// Smem   WARPS * NUM_EXPERTS counters of 4 bytes, dynamic; and 2 bytes a pair.
// Why    A slot is (pairs of lower experts) + (the expert's pairs in earlier warps and lanes): sums of counts, so the
//        same bits every run.
#include "common/async_copy.cuh"

#if !defined(INDEX) || !defined(NUM_EXPERTS) || !defined(TOKENS) || !defined(WARPS) || !defined(PAIRS_PER_LANE)
#error "define INDEX, NUM_EXPERTS, TOKENS, WARPS and PAIRS_PER_LANE"
#endif
#define INLINE_PAIRS 0
#include "common/expert_plan.cuh"
#include "common/warp.cuh"
#define BLOCK_THREADS (WARPS * 32)
#define FEWER_REGISTERS (__CUDA_ARCH__ >= 1000 || HAS_EXPERT_MAP)  // ptxas spills there what it unrolls by its own choice
static_assert(NUM_EXPERTS <= BLOCK_THREADS && BLOCK_THREADS * PAIRS_PER_LANE <= 65536, "a thread owns an expert; pairs fit 16 bits");

// The sum of value over the threads before this one.
__device__ __forceinline__ u32 block_exclusive_sum(u32 value, u32* warp_sums, u32& total) {
    u32 warp = threadIdx.x / 32, inclusive = warp_inclusive_sum(value);
    if (threadIdx.x % 32 == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    u32 before = 0;
    total = 0;
#if FEWER_REGISTERS
#pragma unroll 1
#endif
    for (u32 w = 0; w < WARPS; w++) {
        if (w < warp) before += warp_sums[w];
        total += warp_sums[w];
    }
    return before + inclusive - value;
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
plan_experts(const INDEX* top_k_index, Chunk* __restrict__ chunks, int* __restrict__ pair_of_slot,
             int* __restrict__ slot_of_pair, int* __restrict__ num_chunks, u64 num_pairs, const EXPERT_MAP* expert_map) {
    extern __shared__ u32 counters[];
    // Counts, and later the next slot of each warp and expert.
    u32(*counts)[NUM_EXPERTS] = reinterpret_cast<u32(*)[NUM_EXPERTS]>(counters);
    __shared__ u32 warp_sums[2][WARPS];
    __shared__ unsigned short pairs[BLOCK_THREADS * PAIRS_PER_LANE];  // by slot; scattered here, then written in a row
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 i = threadIdx.x; i < WARPS * NUM_EXPERTS; i += BLOCK_THREADS) counters[i] = 0;
    __syncthreads();
    wait_for_previous_grid();
    release_next_grid();

    // A warp's pairs, 32 at a time; all loads are in flight together, and then all of the map.
    Routing routing = {top_k_index, (u32)num_pairs, expert_map};
    u32 first = warp * PAIRS_PER_LANE * 32 + lane;
    int experts[PAIRS_PER_LANE];
#pragma unroll
    for (int i = 0; i < PAIRS_PER_LANE; i++) experts[i] = routing.chosen(first + i * 32);
#pragma unroll
    for (int i = 0; i < PAIRS_PER_LANE; i++) experts[i] = routing.local(experts[i]);
#pragma unroll
    for (int i = 0; i < PAIRS_PER_LANE; i++) {
        if (experts[i] >= 0) atomicAdd(&counts[warp][experts[i]], 1u);
    }
    __syncthreads();

    u32 expert = threadIdx.x, count = 0;
    if (expert < NUM_EXPERTS) {
        for (u32 w = 0; w < WARPS; w++) count += counts[w][expert];
    }
    u32 kept, total_chunks;
    u32 first_slot = block_exclusive_sum(count, warp_sums[0], kept);
    u32 index = block_exclusive_sum((count + TOKENS - 1) / TOKENS, warp_sums[1], total_chunks);
    if (expert < NUM_EXPERTS) {
#if FEWER_REGISTERS
#pragma unroll 1
#endif
        for (u32 done = 0; done < count; done += TOKENS) {
            chunks[index++] = {(int)expert, (int)(first_slot + done), (int)min(count - done, (u32)TOKENS), 0};
        }
        for (u32 w = 0; w < WARPS; w++) {
            u32 of_warp = counts[w][expert];
            counts[w][expert] = first_slot;
            first_slot += of_warp;
        }
    }
    if (threadIdx.x == 0) *num_chunks = total_chunks;
    __syncthreads();

#pragma unroll
    for (int i = 0; i < PAIRS_PER_LANE; i++) {
        int expert = experts[i];
        u32 same = __match_any_sync(FULL_WARP, expert);
        u32 earlier = same & ((1u << lane) - 1);
        u32 slot = expert >= 0 ? counts[warp][expert] + __popc(earlier) : 0;
        __syncwarp();
        if (expert >= 0 && earlier == 0) counts[warp][expert] += __popc(same);
        __syncwarp();
        u32 pair = first + i * 32;
        if (expert >= 0) pairs[slot] = (unsigned short)pair;
        if (pair < num_pairs) slot_of_pair[pair] = expert < 0 ? -1 : (int)slot;
    }
    __syncthreads();
    for (u32 slot = threadIdx.x; slot < kept; slot += BLOCK_THREADS) pair_of_slot[slot] = pairs[slot];
}
