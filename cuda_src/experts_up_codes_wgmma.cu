// experts_up_codes_wgmma: as experts_up_wgmma.cu, of a quantised gate_up_proj.
//
// Reads  gate_up_map    TensorMap of its codes [NUM_EXPERTS, kRows, bytes] (kernels/coded_tiles.py), rows as there
//        scales_map     the same of scales of groups; only with GROUP
//        zeros_map      the same of their zero points; only with HAS_ZEROS
//        tokens         [T, turned_columns(HIDDEN)] turned rows (common/turned_rows.cuh) of the tokens, of operand_rows.cu, the
//                       grid before this one: SCALAR, or with SCALED_TOKENS fp16
//        expert_offsets [NUM_EXPERTS + 1] i32, token_of_slot [slots] i32   of sort_by_expert.cu
//        ticket         u32                      0; counts the tiles that are taken after each block's first
//        row_scales     [NUM_EXPERTS, kRows] fp32, which multiply the sums; not read without HAS_ROW_SCALES
//        bias           [NUM_EXPERTS, kRows] SCALAR, added before the activation; not read without HAS_BIAS
//        token_factors  [T] fp32                  what operand_rows.cu took out of the rows; not read without SCALED_TOKENS
// Writes intermediate   [slots, INTERMEDIATE] SCALAR, or with TURNS_OUTPUT turned rows, for experts_down_codes_wgmma.cu
//        gate_up        [slots, kRows] SCALAR     what the activation is applied to, in the order of the weight's rows, for a
//                       backward; not written without KEEPS_GATE_UP
// Grid   any; one block per multiprocessor. Block BLOCK_THREADS. Smem STAGES * STAGE_BYTES + sizeof(Shared).
// Needs  HIDDEN % 8 == 0, INTERMEDIATE % 8 == 0, 16-byte aligned rows, sm_90a.
// Maths  fp32 sums over ascending 32 k; weights as coded_tiles.cuh says; activation in fp32, of the unrounded sums; one rounding at
//        the store.
// Why    Launched as a programmatic dependent: a block's first codes are under way while operand_rows still runs, and rows of tokens are
//        gathered after its end.
#include "common/activations.cuh"

#if !defined(SCALAR) || !defined(ACTIVATION) || !defined(GATED) || !defined(INTERLEAVED) || !defined(HAS_BIAS) ||              \
    !defined(KEEPS_GATE_UP) || !defined(SCALED_TOKENS) || !defined(TURNS_OUTPUT) || !defined(NUM_EXPERTS) || !defined(HIDDEN) || \
    !defined(INTERMEDIATE) || !defined(BLOCK_THREADS) || !defined(WARPGROUPS) || !defined(CONSUMER_REGISTERS) ||              \
    !defined(TILE_SLOTS) || !defined(CODE_ROW_BYTES) || !defined(BLOCK_K) || !defined(STAGES)
#error "define SCALAR, ACTIVATION, GATED, INTERLEAVED, HAS_BIAS, KEEPS_GATE_UP, SCALED_TOKENS, TURNS_OUTPUT, NUM_EXPERTS, HIDDEN, \
INTERMEDIATE, BLOCK_THREADS, WARPGROUPS, CONSUMER_REGISTERS, TILE_SLOTS, CODE_ROW_BYTES, BLOCK_K and STAGES"
#endif
typedef SCALAR scalar_t;
#if SCALED_TOKENS
#define OPERAND fp16
#else
#define OPERAND SCALAR
#endif
#include "common/coded_tiles.cuh"

struct UpGemm {
    static constexpr u32 kDepth = HIDDEN, kRows = (GATED ? 2 : 1) * INTERMEDIATE, kColumns = INTERMEDIATE;
    static constexpr u32 kTokenPitch = turned_columns(HIDDEN);
    static constexpr bool kDenseTokens = false, kTokensAreNew = true, kScalesSlots = SCALED_TOKENS;
    typedef LineLoader<UpGemm> Loader;
    static constexpr int kBoxes = GATED ? 1 : BOXES;
    // A stage has gate rows and then the up rows of the same columns.
    static constexpr u32 kWarpRows = GATED ? 8 : 16, kHalfRows = GATED ? TILE_ROWS / 2 : 8;
    const OPERAND* tokens;
    const int* token_of_slot;
    scalar_t* intermediate;
    const scalar_t* bias;
    scalar_t* gate_up;
    const float* token_factors;

    __device__ __forceinline__ u32 row(int slot) const { return token_of_slot[slot]; }

    // Brings the tile's part of token_of_slot near before the tile begins. One warp.
    __device__ __forceinline__ void prefetch_rows(int first_slot, int slots) const { prefetch_of_slots(token_of_slot + first_slot, slots); }

    // The first column that a warp has of a tile.
    static __device__ __forceinline__ u32 first_column(u32 tile_column, u32 warp) {
        return tile_column * (GATED ? TILE_ROWS / 2 : TILE_ROWS) + warp * kWarpRows;
    }

    // The map is {byte, column, gate or up, 1, expert}.
    static __device__ __forceinline__ BoxStart box_start(int expert, u32 tile_column, int byte) {
        return {byte, (int)first_column(tile_column, 0), 0, expert};
    }

    // Which row of the weight one is; past the last column there is none.
    static __device__ __forceinline__ u32 weight_row(u32 tile_column, u32 warp, int half, u32 row) {
        u32 column = first_column(tile_column, warp) + row + (GATED ? 0 : half * kHalfRows);
        if (column >= INTERMEDIATE) return kRows;
        return !GATED ? column : INTERLEAVED ? column * 2 + half : column + half * INTERMEDIATE;
    }

    // What was taken out of a slot's token row.
    __device__ __forceinline__ float slot_factor(int slot) const { return token_factors[token_of_slot[slot]]; }

    __device__ __forceinline__ void store(const Tile& tile, int first_slot, u32 warp, const float (&sums)[4]) const {
        u32 column = first_column(tile.column, warp);
        if (KEEPS_GATE_UP) keep_gate_up(tile, first_slot, column, sums);
        if constexpr (GATED) {
            u32 word = pair_of(activate<ACTIVATION, false>(sums[0], sums[2]), activate<ACTIVATION, false>(sums[1], sums[3]));
            if (TURNS_OUTPUT) store_turned_eight<INTERMEDIATE>(intermediate, tile, first_slot, column, word);
            else store_eight<INTERMEDIATE, INTERMEDIATE>(intermediate, tile, first_slot, column, word);
        } else {
            float outputs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) outputs[i] = activate<ACTIVATION, false>(sums[i], 1.0f);
            u32 low = pair_of(outputs[0], outputs[1]), high = pair_of(outputs[2], outputs[3]);
            if (TURNS_OUTPUT) store_turned_sixteen<INTERMEDIATE>(intermediate, tile, first_slot, column, low, high);
            else store_sixteen<INTERMEDIATE, INTERMEDIATE>(intermediate, tile, first_slot, column, low, high);
        }
    }

    // The sums themselves, rounded.
    __device__ __forceinline__ void keep_gate_up(const Tile& tile, int first_slot, u32 column, const float (&sums)[4]) const {
        u32 low = pair_of(sums[0], sums[1]), high = pair_of(sums[2], sums[3]);
        if constexpr (!GATED) {
            store_sixteen<kRows, kRows>(gate_up, tile, first_slot, column, low, high);
        } else if constexpr (!INTERLEAVED) {
            store_eight<kRows, INTERMEDIATE>(gate_up, tile, first_slot, column, low);
            store_eight<kRows, INTERMEDIATE>(gate_up + INTERMEDIATE, tile, first_slot, column, high);
        } else {
            // Two gates and their ups, which are neighbours in a row.
            u32 lane = threadIdx.x % 32, gates = transposed(low), ups = transposed(high);
            int slot = first_slot + lane / 4;
            column += lane % 4 * 2;
            if (slot < tile.slots && column < INTERMEDIATE) {
                u32* to = reinterpret_cast<u32*>(gate_up + (u64)(tile.first_slot + slot) * kRows + column * 2);
                store_pack(to, Pack<u32, 2>{__byte_perm(gates, ups, 0x5410), __byte_perm(gates, ups, 0x7632)});
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
experts_up_codes_wgmma(const __grid_constant__ TensorMap gate_up_map, SCALES_PARAMETER ZEROS_PARAMETER
                       const OPERAND* tokens, const int* expert_offsets, const int* token_of_slot, u32* ticket, scalar_t* intermediate,
                       const float* row_scales, const scalar_t* bias, scalar_t* gate_up, const float* token_factors) {
    UpGemm gemm = {tokens, token_of_slot, intermediate, bias, gate_up, token_factors};
    multiply_experts(gemm, CodedWeights{gate_up_map, SCALES_MAP, ZEROS_MAP, row_scales, {}}, Schedule{expert_offsets, ticket});
}
