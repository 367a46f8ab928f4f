// experts_up: act(x W_gate^T) * (x W_up^T) for every slot; for up to a thousand tokens, at the speed of reading the weights.
//
// Reads  hidden_states [T, HIDDEN] SCALAR
//        gate_up_proj  [NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN] SCALAR, or codes of WEIGHTS   gate rows, then up rows; INTERLEAVED: in turn;
//                      not GATED: INTERMEDIATE rows, and the output is act(x W^T);
//                      TRANSPOSED: [NUM_EXPERTS, HIDDEN, rows]
//        scales        [NUM_EXPERTS, rows of gate_up_proj, HIDDEN / GROUP] SCALE_SCALAR, and zeros, the same of bytes with HAS_ZEROS:
//                      their rows padded to 16 bytes; only of codes that have GROUP
//        row_scales    [NUM_EXPERTS, rows of gate_up_proj] fp32   only with HAS_ROW_SCALES
//        bias          [NUM_EXPERTS, rows of gate_up_proj] SCALAR   only with HAS_BIAS
//        factor        [NUM_EXPERTS, rows of gate_up_proj, LOW_RANK] SCALAR, TRANSPOSED: [NUM_EXPERTS, LOW_RANK, rows]; and
//        low           [slots, LOW_RANK] SCALAR, written by the grid before this one: of an adapter, only with LOW_RANK
//        top_k_index   [T * TOP_K] INDEX           only with INLINE_PAIRS; with HAS_EXPERT_MAP also expert_map of common/pairs.cuh
//        chunks        [..] Chunk, pair_of_slot [T * TOP_K] i32, num_chunks i32   of plan_experts.cu; without INLINE_PAIRS
// Writes intermediate  [slots, INTERMEDIATE] SCALAR   rows in slot order (common/expert_plan.cuh)
//        gate_up       [slots, rows of gate_up_proj] SCALAR   what the activation is applied to, in the order of the
//                      weight's rows, for a backward; only with KEEPS_GATE_UP
//        slot_of_pair  [T * TOP_K] i32             only with INLINE_PAIRS; -1: masked
// Grid   any; BLOCKS_PER_SM blocks per multiprocessor. Block BLOCK_THREADS. Smem STAGES * STAGE_BYTES + SUMS_BYTES.
// Needs  HIDDEN % 8 == 0, INTERMEDIATE % 8 == 0, 16-byte aligned rows, sm_80; T * TOP_K <= INLINE_PAIRS <= BLOCK_THREADS, or
//        INLINE_PAIRS 0.
// Maths  fp32 sums over ascending k, from the bias on; activation in fp32; one rounding at the store.
// Why    A unit is the gate row and the up row of one column, or two rows of an ungated weight: both are sums of the same
//        thread, so the activation costs no exchange. Only experts that have tokens are read, each row once per chunk.
#include "common/activations.cuh"

#if !defined(SCALAR) || !defined(INDEX) || !defined(ACTIVATION) || !defined(NUM_EXPERTS) || !defined(TOP_K) || \
    !defined(HIDDEN) || !defined(INTERMEDIATE) || !defined(INLINE_PAIRS) || !defined(TOKENS) || !defined(WARPS) || \
    !defined(BLOCKS_PER_SM) || !defined(SHARES_MULTIPROCESSOR) || !defined(K_WARPS) || !defined(TOKEN_WARPS) || !defined(ROW_BLOCKS) || !defined(BLOCK_K) || \
    !defined(STAGES) || !defined(WHOLE_ROWS) || !defined(WEIGHTS) || !defined(GATED) || !defined(INTERLEAVED) || !defined(TRANSPOSED) || \
    !defined(HAS_BIAS) || !defined(KEEPS_GATE_UP) || !defined(LOW_RANK)
#error "define SCALAR, INDEX, ACTIVATION, GATED, INTERLEAVED, TRANSPOSED, HAS_BIAS, LOW_RANK, KEEPS_GATE_UP, NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, INLINE_PAIRS, TOKENS, WARPS, BLOCKS_PER_SM, K_WARPS, TOKEN_WARPS, ROW_BLOCKS, SHARES_MULTIPROCESSOR, BLOCK_K, STAGES, WHOLE_ROWS and WEIGHTS"
#endif
typedef SCALAR scalar_t;
#include "common/expert_stream.cuh"

#if GATED && !INTERLEAVED
typedef SplitRows<INTERMEDIATE> UpRows;
#else
typedef NeighbouringRows<GATED ? INTERMEDIATE : INTERMEDIATE / 2> UpRows;
#endif

struct UpGemm : UpRows {
    static constexpr u32 kDepth = HIDDEN;
    const scalar_t* hidden_states;
    const unsigned char* weights;
    const scalar_t* bias;
    scalar_t* intermediate;
    scalar_t* gate_up;
    const scalar_t* factor;
    const scalar_t* low;
    const unsigned char* scales;
    const unsigned char* zeros;
    const float* row_scales;

    __device__ __forceinline__ const scalar_t* token_row(const Plan& plan, u32 slot) const {
        return hidden_states + (u64)(plan.pair_of_slot[slot] / TOP_K) * HIDDEN;
    }

    // Two gates and two ups; INTERLEAVED: a gate and an up, twice; not GATED: four neighbouring rows.
    __device__ __forceinline__ void store(u32 slot, u32 unit, Pack<float, 2> one, Pack<float, 2> other) const {
        constexpr int kOutputs = GATED ? 2 : 4;
        Pack<scalar_t, kOutputs> outputs;
#pragma unroll
        for (int i = 0; i < 2; i++) {
#if !GATED
            outputs.values[i] = from_float<scalar_t>(activate<ACTIVATION, false>(one.values[i], 1.0f));
            outputs.values[2 + i] = from_float<scalar_t>(activate<ACTIVATION, false>(other.values[i], 1.0f));
#elif INTERLEAVED
            Pack<float, 2> gate_up = i == 0 ? one : other;
            outputs.values[i] = from_float<scalar_t>(activate<ACTIVATION, false>(gate_up.values[0], gate_up.values[1]));
#else
            outputs.values[i] = from_float<scalar_t>(activate<ACTIVATION, false>(one.values[i], other.values[i]));
#endif
        }
        store_pack(intermediate + (u64)slot * INTERMEDIATE + unit * (kOutputs / 2), outputs);
        if (KEEPS_GATE_UP) keep_gate_up(slot, unit, one, other);
    }

    // The sums themselves, rounded. Without INTERLEAVED halves, four neighbouring rows of the weight.
    __device__ __forceinline__ void keep_gate_up(u32 slot, u32 unit, Pack<float, 2> one, Pack<float, 2> other) const {
        scalar_t* row = gate_up + (u64)slot * ((GATED ? 2 : 1) * INTERMEDIATE);
#if GATED && !INTERLEAVED
        store_pack(row + unit, rounded(one));
        store_pack(row + INTERMEDIATE + unit, rounded(other));
#else
        store_pack(row + 2 * unit, rounded(one));
        store_pack(row + 2 * unit + 2, rounded(other));
#endif
    }

    static __device__ __forceinline__ Pack<scalar_t, 2> rounded(Pack<float, 2> sums) {
        return {from_float<scalar_t>(sums.values[0]), from_float<scalar_t>(sums.values[1])};
    }
};

// So many blocks: experts_down begins with one of its own beside it.
#define REGISTERS_FOR (SHARES_MULTIPROCESSOR && WEIGHTS != PLAIN && !LOW_RANK ? 2 : BLOCKS_PER_SM)

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, REGISTERS_FOR)
experts_up(const scalar_t* __restrict__ hidden_states, const unsigned char* __restrict__ gate_up_proj,
           const INDEX* top_k_index, const Chunk* chunks, const int* pair_of_slot, const int* num_chunks,
           int* __restrict__ slot_of_pair, scalar_t* __restrict__ intermediate, u64 num_pairs,
           const scalar_t* __restrict__ bias, scalar_t* __restrict__ gate_up, const scalar_t* __restrict__ factor,
           const scalar_t* low, const unsigned char* __restrict__ scales, const unsigned char* __restrict__ zeros,
           const float* __restrict__ row_scales, const EXPERT_MAP* expert_map) {
    UpGemm gemm = {{}, hidden_states, gate_up_proj, bias, intermediate, gate_up, factor, low, scales, zeros, row_scales};
#if !INLINE_PAIRS && !TRANSPOSED
    prefetch_first_tile(gemm);
#endif
#if !LOW_RANK
    wait_for_previous_grid();
    release_next_grid();
#elif !INLINE_PAIRS
    empty_l1();  // the grid before this one writes nothing but low, for which the consumers wait
#endif
#if INLINE_PAIRS
    __shared__ SmallPlan small_plan;
    Plan plan = make_small_plan({top_k_index, (u32)num_pairs, expert_map}, small_plan, blockIdx.x == 0 ? slot_of_pair : nullptr);
#else
    Plan plan = {chunks, pair_of_slot, (u32)*num_chunks};
#endif
    stream_experts<false>(gemm, plan);
}
