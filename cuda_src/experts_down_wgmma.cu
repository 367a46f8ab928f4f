// experts_down_wgmma: the down projection of every slot's intermediate row, not yet weighted; companion of experts_up_wgmma.cu.
//
// Reads  down_map         TensorMap of down_proj [NUM_EXPERTS, HIDDEN, INTERMEDIATE] SCALAR (kernels/experts_down_wgmma.py);
//                         TRANSPOSED: of [NUM_EXPERTS, INTERMEDIATE, HIDDEN]
//        intermediate_map TensorMap of intermediate [slots, INTERMEDIATE] SCALAR, which the grid before this one may have written
//        expert_offsets   [NUM_EXPERTS + 1] i32   not with INLINE_PAIRS
//        ticket           u32   0; counts the tiles that are taken after each cluster's first; not with INLINE_PAIRS
//        top_k_index      [T * TOP_K] INDEX        only with INLINE_PAIRS; with HAS_EXPERT_MAP also expert_map of common/pairs.cuh
//        bias             [NUM_EXPERTS, HIDDEN] SCALAR, added to the sums; not read without HAS_BIAS
//        row_of_slot      [slots] i32             of plan_batch.cu; only with SCATTERS
//        low_map          TensorMap of low [slots, LOW_RANK] SCALAR; only with LOW_RANK
//        factor_map       the same as down_map, with LOW_RANK in the place of INTERMEDIATE; only with LOW_RANK
// Writes expert_output    [slots, HIDDEN] SCALAR; with SCATTERS [rows, HIDDEN], the rows of slots and no others
// Grid   any multiple of BLOCKS; one block per multiprocessor. Block BLOCK_THREADS. Smem STAGES * STAGE_BYTES + sizeof(Shared).
// Needs  HIDDEN % 16 == 0 (TRANSPOSED: HIDDEN % 8 == 0), INTERMEDIATE % 8 == 0, 16-byte aligned rows, sm_90a;
//        INLINE_PAIRS as experts_up_wgmma.cu.
// Maths  fp32 sums over ascending k, then over an adapter's; rounded to SCALAR.
// Why    Launched as a programmatic dependent: a block's first weights are under way while experts_up_wgmma still runs elsewhere.
#include "common/dtypes.cuh"

#if !defined(SCALAR) || !defined(TRANSPOSED) || !defined(HAS_BIAS) || !defined(LOW_RANK) || !defined(NUM_EXPERTS) || \
    !defined(HIDDEN) || !defined(INTERMEDIATE) || !defined(BLOCK_THREADS) || !defined(BLOCKS) || !defined(PRODUCTS) ||  \
    !defined(BLOCK_N) || !defined(BLOCK_K) || !defined(STAGES)
#error "define SCALAR, TRANSPOSED, HAS_BIAS, LOW_RANK, NUM_EXPERTS, HIDDEN, INTERMEDIATE, BLOCK_THREADS, BLOCKS, PRODUCTS, \
BLOCK_N, BLOCK_K and STAGES"
#endif
typedef SCALAR scalar_t;
#ifndef SCATTERS
#define SCATTERS 0
#endif
#if SCATTERS
#define ROWS_PARAMETER , const int* row_of_slot
#define ROW_OF_SLOT , row_of_slot
#else
#define ROWS_PARAMETER
#define ROW_OF_SLOT
#endif
#include "common/store_pairs.cuh"
#if INLINE_PAIRS
#define PAIRS_PARAMETERS const INDEX* top_k_index, const EXPERT_MAP* expert_map, u64 num_pairs,
#define SCHEDULE Schedule{{top_k_index, (u32)num_pairs, expert_map}, nullptr}
#else
#define PAIRS_PARAMETERS const int* expert_offsets, u32* ticket,
#define SCHEDULE Schedule{expert_offsets, ticket}
#endif

struct DownGemm {
    static constexpr u32 kDepth = INTERMEDIATE, kRows = HIDDEN;
    static constexpr bool kDenseTokens = true, kTokensAreNew = true;
    static constexpr int kBoxes = TRANSPOSED ? BLOCK_N / 64 : 1;
    const TensorMap& token_map;
    scalar_t* expert_output;
    const scalar_t* bias;
#if SCATTERS
    const int* row_of_slot;
#endif

    __device__ __forceinline__ void prefetch_rows(int, int) const {}

    // The map is {k, 2 rows, every 4th such pair, the 2nd of a pair of pairs, sixteens of rows over all experts}: it orders
    // sixteen rows so that a lane's sums of two products' columns are 4 neighbours. TRANSPOSED: {row, k, 1, 1, expert}.
    static __device__ __forceinline__ BoxStart box_start(int expert, u32 part, int box, int k) {
        if (TRANSPOSED) return {(int)part * BLOCK_N + box * 64, k, 0, expert};
        return {k, 0, 0, expert * (HIDDEN / 16) + (int)part * (BLOCK_N / 16)};
    }

    __device__ __forceinline__ void prefetch_inputs(const Tile& tile, u32, u32 part) const {
        if (HAS_BIAS) prefetch_bias(*this, tile.expert, part);
#if SCATTERS
        asm volatile("prefetch.global.L1 [%0];" ::"l"(row_of_slot + tile.first_slot));
#endif
    }

    // The weight row that is row 8 * eight + place of a part.
    static __device__ __forceinline__ u32 weight_row(u32 part, u32 eight, u32 place) {
        if (TRANSPOSED) return part * BLOCK_N + eight * 8 + place;
        return part * BLOCK_N + eight / 2 * 16 + place / 2 * 4 + eight % 2 * 2 + place % 2;
    }

    // Columns [part * BLOCK_N, ...) of rows slot and slot + 8.
    __device__ __forceinline__ void store(const Tile& tile, int slot, u32 part, const float (&sums)[SUMS]) const {
#if SCATTERS
        Tile of_rows = tile;
        of_rows.first_slot = row_of_slot[tile.first_slot];  // neighbours among an expert's slots are neighbours as rows, too
        store_rows(of_rows, slot, part, sums);
#else
        store_rows(tile, slot, part, sums);
#endif
    }

    __device__ __forceinline__ void store_rows(const Tile& tile, int slot, u32 part, const float (&sums)[SUMS]) const {
        if constexpr (TRANSPOSED) {
            store_pairs<HIDDEN, HIDDEN, BLOCK_N / 8, 1>(expert_output, tile, slot, part * BLOCK_N, [&](int eight, int half) {
                const float* columns = sums + 4 * eight + 2 * half;
                Pack<scalar_t, 2> outputs = {from_float<scalar_t>(columns[0]), from_float<scalar_t>(columns[1])};
                return *reinterpret_cast<u32*>(&outputs);
            });
        } else {
            store_fours(tile, slot, part, sums);
        }
    }

    // The same of the map's order, where a lane has 4 neighbours. Two lanes swap, so that each stores 8.
    //
    //   columns     0..3   4..7   8..11  12..15 | 16..19 20..23 24..27 28..31
    //   has         lane 0 lane 1 lane 2 lane 3 | lane 0 lane 1 lane 2 lane 3
    //   stores      lane 0 lane 0 lane 2 lane 2 | lane 1 lane 1 lane 3 lane 3
    __device__ __forceinline__ void store_fours(const Tile& tile, int slot, u32 part, const float (&sums)[SUMS]) const {
        constexpr bool kWholeTiles = kRows % TILE_ROWS == 0;
        u32 quad = threadIdx.x % 4;
        bool odd = quad % 2;
        // The lane's place among the columns of two sixteens, and how many are left from there on.
        int first = part * BLOCK_N + odd * 16 + quad / 2 * 8, left = HIDDEN - first;
        scalar_t* to = expert_output + (u64)(tile.first_slot + slot) * HIDDEN + first;
#pragma unroll
        for (int half = 0; half < 2; half++, to += 8 * HIDDEN) {
            bool wanted = slot + half * 8 < tile.slots;
#pragma unroll
            for (int sixteen = 0; sixteen < BLOCK_N / 16; sixteen += 2) {
                bool inside = wanted && (kWholeTiles || sixteen * 16 < left);
                Pack<u32, 2> own = rounded(sums, sixteen, half);
                if (sixteen + 1 == BLOCK_N / 16) {
                    scalar_t* alone = to + sixteen * 16 - odd * 12;
                    if (wanted && (kWholeTiles || sixteen * 16 - odd * 12 < left)) store_pack(reinterpret_cast<u32*>(alone), own);
                    break;
                }
                Pack<u32, 2> next = rounded(sums, sixteen + 1, half), got;
#pragma unroll
                for (int i = 0; i < 2; i++) got.values[i] = __shfl_xor_sync(FULL_WARP, odd ? own.values[i] : next.values[i], 1);
                Pack<u32, 4> both = odd ? Pack<u32, 4>{got.values[0], got.values[1], next.values[0], next.values[1]}
                                        : Pack<u32, 4>{own.values[0], own.values[1], got.values[0], got.values[1]};
                if (inside) store_pack(reinterpret_cast<u32*>(to + sixteen * 16), both);
            }
        }
    }

    // Four neighbouring columns of a row, as two words.
    static __device__ __forceinline__ Pack<u32, 2> rounded(const float (&sums)[SUMS], int sixteen, int half) {
        Pack<scalar_t, 4> outputs;
#pragma unroll
        for (int i = 0; i < 4; i++) outputs.values[i] = from_float<scalar_t>(sums[8 * sixteen + i / 2 * 4 + half * 2 + i % 2]);
        return *reinterpret_cast<Pack<u32, 2>*>(&outputs);
    }
};

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(BLOCK_THREADS, 1)
experts_down_wgmma(const __grid_constant__ TensorMap down_map, const __grid_constant__ TensorMap intermediate_map,
                   DENSE_ADAPTER_PARAMETERS PAIRS_PARAMETERS scalar_t* expert_output, const scalar_t* bias ROWS_PARAMETER) {
    DownGemm gemm = {intermediate_map, expert_output, bias ROW_OF_SLOT};
    multiply_experts(gemm, PlainWeights{down_map, DENSE_ADAPTER}, SCHEDULE);
}
