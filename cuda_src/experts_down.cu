// experts_down: the down projection of every slot's intermediate row, not yet weighted; companion of experts_up.cu.
//
// Reads  intermediate [slots, INTERMEDIATE] SCALAR    written by the grid before this one
//        down_proj    [NUM_EXPERTS, HIDDEN, INTERMEDIATE] SCALAR, or codes of WEIGHTS; TRANSPOSED: [NUM_EXPERTS, INTERMEDIATE, HIDDEN]
//        scales       [NUM_EXPERTS, HIDDEN, INTERMEDIATE / GROUP] SCALE_SCALAR, zeros and row_scales, as experts_up.cu
//        bias         [NUM_EXPERTS, HIDDEN] SCALAR   only with HAS_BIAS
//        factor       [NUM_EXPERTS, HIDDEN, LOW_RANK] SCALAR, TRANSPOSED: [NUM_EXPERTS, LOW_RANK, HIDDEN]; and
//        low          [slots, LOW_RANK] SCALAR: of an adapter, only with LOW_RANK, and then it is low that the grid before wrote
//        top_k_index  [T * TOP_K] INDEX           only with INLINE_PAIRS; with HAS_EXPERT_MAP also expert_map of common/pairs.cuh
//        chunks       [..] Chunk, pair_of_slot [T * TOP_K] i32, num_chunks i32   of plan_experts.cu; without INLINE_PAIRS
// Writes expert_output [slots, HIDDEN] SLOT_SCALAR   rows in slot order
// Grid   any; BLOCKS_PER_SM blocks per multiprocessor. Block BLOCK_THREADS. Smem STAGES * STAGE_BYTES + SUMS_BYTES.
// Needs  HIDDEN % 8 == 0, INTERMEDIATE % 8 == 0, 16-byte aligned rows, sm_80; WHOLE_ROWS: INTERMEDIATE % 32 == 0, sm_90,
//        not TRANSPOSED; INLINE_PAIRS as experts_up.cu.
// Maths  fp32 sums over ascending k, from the bias on, rounded to SLOT_SCALAR.
// Why    Launched as a programmatic dependent: its first stages of weights are under way while experts_up still runs,
//        which hides the handover. For that both kernels' rings have to fit into a multiprocessor together.
#include "common/dtypes.cuh"

#if !defined(SCALAR) || !defined(SLOT_SCALAR) || !defined(INDEX) || !defined(NUM_EXPERTS) || !defined(TOP_K) || \
    !defined(HIDDEN) || !defined(INTERMEDIATE) || !defined(INLINE_PAIRS) || !defined(TOKENS) || !defined(WARPS) || \
    !defined(BLOCKS_PER_SM) || !defined(SHARES_MULTIPROCESSOR) || !defined(K_WARPS) || !defined(TOKEN_WARPS) || !defined(ROW_BLOCKS) || !defined(BLOCK_K) || \
    !defined(STAGES) || !defined(WHOLE_ROWS) || !defined(WEIGHTS) || !defined(TRANSPOSED) || !defined(HAS_BIAS) || !defined(LOW_RANK)
#error "define SCALAR, SLOT_SCALAR, INDEX, TRANSPOSED, HAS_BIAS, LOW_RANK, NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, INLINE_PAIRS, TOKENS, WARPS, BLOCKS_PER_SM, K_WARPS, TOKEN_WARPS, ROW_BLOCKS, SHARES_MULTIPROCESSOR, BLOCK_K, STAGES, WHOLE_ROWS and WEIGHTS"
#endif
typedef SCALAR scalar_t;
#include "common/expert_stream.cuh"

// So many blocks. With an adapter and rings that fit together, a multiprocessor's registers are for experts_up,
// lora_shrink_chunks and this; a block with four producer warps would spill them.
// So has it with quantised weights for experts_up's block and one of this.
#define REGISTERS_FOR (LOW_RANK && WHOLE_ROWS ? 3 : SHARES_MULTIPROCESSOR && WEIGHTS != PLAIN && !LOW_RANK ? 2 : BLOCKS_PER_SM)

struct DownGemm : NeighbouringRows<HIDDEN / 2> {
    static constexpr u32 kDepth = INTERMEDIATE;
    const scalar_t* intermediate;
    const unsigned char* weights;
    const scalar_t* bias;
    SLOT_SCALAR* expert_output;
    const scalar_t* factor;
    const scalar_t* low;
    const unsigned char* scales;
    const unsigned char* zeros;
    const float* row_scales;

    __device__ __forceinline__ const scalar_t* token_row(const Plan&, u32 slot) const { return intermediate + (u64)slot * INTERMEDIATE; }

    __device__ __forceinline__ void store(u32 slot, u32 unit, Pack<float, 2> first, Pack<float, 2> second) const {
        Pack<SLOT_SCALAR, 4> outputs;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            outputs.values[i] = from_float<SLOT_SCALAR>(first.values[i]);
            outputs.values[2 + i] = from_float<SLOT_SCALAR>(second.values[i]);
        }
        store_pack(expert_output + (u64)slot * HIDDEN + unit * 2, outputs);
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, REGISTERS_FOR)
experts_down(const scalar_t* intermediate, const unsigned char* __restrict__ down_proj, const INDEX* __restrict__ top_k_index,
             const Chunk* chunks, const int* pair_of_slot, const int* num_chunks, SLOT_SCALAR* __restrict__ expert_output,
             u64 num_pairs, const scalar_t* __restrict__ bias, const scalar_t* __restrict__ factor, const scalar_t* low,
             const unsigned char* __restrict__ scales, const unsigned char* __restrict__ zeros,
             const float* __restrict__ row_scales, const EXPERT_MAP* expert_map) {
#if INLINE_PAIRS
    __shared__ SmallPlan small_plan;
    Plan plan = make_small_plan({top_k_index, (u32)num_pairs, expert_map}, small_plan, nullptr);
#else
    empty_l1();  // not load_from_l2 for each chunk: the ring would run dry meanwhile, 1% at 64 tokens
    Plan plan = {chunks, pair_of_slot, (u32)*num_chunks};
#endif
    stream_experts<true>(DownGemm{{}, intermediate, down_proj, bias, expert_output, factor, low, scales, zeros, row_scales}, plan);
}
