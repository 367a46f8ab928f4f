// experts_up: act(x W_gate^T) * (x W_up^T) for every slot; for up to a thousand tokens, at the speed of reading the weights.
//
// Reads  hidden_states [T, HIDDEN] SCALAR
//        gate_up_proj  [NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN] SCALAR   gate rows, then up rows
//        top_k_index   [T * TOP_K] INDEX           only with INLINE_PAIRS
//        chunks        [..] Chunk, pair_of_slot [T * TOP_K] i32, num_chunks i32   of plan_experts.cu; without INLINE_PAIRS
// Writes intermediate  [slots, INTERMEDIATE] SCALAR   rows in slot order (common/expert_plan.cuh)
//        slot_of_pair  [T * TOP_K] i32             only with INLINE_PAIRS; -1: masked
// Grid   any; BLOCKS_PER_SM blocks per multiprocessor. Block BLOCK_THREADS. Smem STAGES * STAGE_BYTES + SUMS_BYTES.
// Needs  HIDDEN % 8 == 0, INTERMEDIATE % 2 == 0, 16-byte aligned rows, sm_80; T * TOP_K <= INLINE_PAIRS <= BLOCK_THREADS, or INLINE_PAIRS 0.
// Maths  fp32 sums over ascending k; activation in fp32; one rounding at the store.
// Why    A unit is the gate row and the up row of one column: both are sums of the same thread, so the activation costs
//        no exchange. Only experts that have tokens are read, each row once per chunk.
#include "common/activations.cuh"

#if !defined(SCALAR) || !defined(INDEX) || !defined(ACTIVATION) || !defined(NUM_EXPERTS) || !defined(TOP_K) || \
    !defined(HIDDEN) || !defined(INTERMEDIATE) || !defined(INLINE_PAIRS) || !defined(TOKENS) || !defined(WARPS) || \
    !defined(BLOCKS_PER_SM) || !defined(K_WARPS) || !defined(BLOCK_K) || !defined(STAGES) || !defined(WHOLE_ROWS)
#error "define SCALAR, INDEX, ACTIVATION, NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, INLINE_PAIRS, TOKENS, WARPS, BLOCKS_PER_SM, K_WARPS, BLOCK_K, STAGES and WHOLE_ROWS"
#endif
typedef SCALAR scalar_t;
#include "common/expert_stream.cuh"

struct UpGemm {
    static constexpr u32 kUnits = INTERMEDIATE, kDepth = HIDDEN, kSecondRows = 8;
    const scalar_t* hidden_states;
    const scalar_t* gate_up_proj;
    scalar_t* intermediate;

    // Rows 0..7 of a 16-row block are the gates of 8 units, rows 8..15 their ups.
    static __device__ __forceinline__ u32 unit_of_row(u32 row) { return row / 16 * 8 + row % 8; }

    static __device__ __forceinline__ u32 first_row_of_unit(u32 unit) { return unit / 8 * 16 + unit % 8; }

    // Elements from a row to the one `rows` below, where both numbers have no binary digit in common.
    static __device__ __forceinline__ u64 row_distance(u32 rows) { return (u64)(unit_of_row(rows) + rows / 8 % 2 * INTERMEDIATE) * HIDDEN; }

    __device__ __forceinline__ const scalar_t* weight_row(int expert, u32 first_unit, u32 row) const {
        u32 half = row / 8 % 2;
        return gate_up_proj + ((u64)(expert * 2 + half) * INTERMEDIATE + first_unit + unit_of_row(row)) * HIDDEN;
    }

    __device__ __forceinline__ const scalar_t* token_row(const Plan& plan, u32 slot) const {
        return hidden_states + (u64)(plan.pair_of_slot[slot] / TOP_K) * HIDDEN;
    }

    __device__ __forceinline__ void store(u32 slot, u32 unit, Pack<float, 2> gates, Pack<float, 2> ups) const {
        Pack<scalar_t, 2> outputs;
#pragma unroll
        for (int i = 0; i < 2; i++) outputs.values[i] = from_float<scalar_t>(activate<ACTIVATION, false>(gates.values[i], ups.values[i]));
        store_pack(intermediate + (u64)slot * INTERMEDIATE + unit, outputs);
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, BLOCKS_PER_SM)
experts_up(const scalar_t* __restrict__ hidden_states, const scalar_t* __restrict__ gate_up_proj,
           const INDEX* top_k_index, const Chunk* chunks, const int* pair_of_slot, const int* num_chunks,
           int* __restrict__ slot_of_pair, scalar_t* __restrict__ intermediate, u64 num_pairs) {
    UpGemm gemm = {hidden_states, gate_up_proj, intermediate};
#if !INLINE_PAIRS
    prefetch_first_tile(gemm);
#endif
    wait_for_previous_grid();
    release_next_grid();
#if INLINE_PAIRS
    __shared__ SmallPlan small_plan;
    Plan plan = make_small_plan(top_k_index, (u32)num_pairs, small_plan, blockIdx.x == 0 ? slot_of_pair : nullptr);
#else
    Plan plan = {chunks, pair_of_slot, (u32)*num_chunks};
#endif
    stream_experts<false>(gemm, plan);
}
