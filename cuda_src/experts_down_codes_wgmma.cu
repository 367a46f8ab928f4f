// experts_down_codes_wgmma: as experts_down_wgmma.cu, of a quantised down_proj; companion of experts_up_codes_wgmma.cu.
//
// Reads  down_map         TensorMap of its codes [NUM_EXPERTS, HIDDEN, bytes] (kernels/coded_tiles.py)
//        scales_map       the same of scales of groups; only with GROUP
//        zeros_map        the same of their zero points; only with HAS_ZEROS
//        intermediate_map TensorMap of the intermediate SCALAR, turned rows (common/turned_rows.cuh), which the grid before this
//                         one may have written
//        expert_offsets   [NUM_EXPERTS + 1] i32
//        ticket           u32                      0; counts the tiles that are taken after each block's first
//        row_scales       [NUM_EXPERTS, HIDDEN] fp32, which multiply the sums; not read without HAS_ROW_SCALES
//        bias             [NUM_EXPERTS, HIDDEN] SCALAR, added to the sums; not read without HAS_BIAS
// Writes expert_output    [slots, HIDDEN] SCALAR
// Grid   any; one block per multiprocessor. Block BLOCK_THREADS. Smem STAGES * STAGE_BYTES + sizeof(Shared).
// Needs  HIDDEN % 8 == 0, INTERMEDIATE % 8 == 0, 16-byte aligned rows, sm_90a.
// Maths  fp32 sums over ascending 32 k; weights as coded_tiles.cuh says; rounded to SCALAR.
// Why    Launched as a programmatic dependent: a block's first codes are under way while experts_up_codes_wgmma still runs
//        elsewhere.
#include "common/dtypes.cuh"

#if !defined(SCALAR) || !defined(HAS_BIAS) || !defined(NUM_EXPERTS) || !defined(HIDDEN) || !defined(INTERMEDIATE) || \
    !defined(BLOCK_THREADS) || !defined(WARPGROUPS) || !defined(CONSUMER_REGISTERS) || !defined(TILE_SLOTS) || \
    !defined(CODE_ROW_BYTES) || !defined(BLOCK_K) || !defined(STAGES)
#error "define SCALAR, HAS_BIAS, NUM_EXPERTS, HIDDEN, INTERMEDIATE, BLOCK_THREADS, WARPGROUPS, CONSUMER_REGISTERS, TILE_SLOTS, \
CODE_ROW_BYTES, BLOCK_K and STAGES"
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
#define OPERAND SCALAR
#include "common/coded_tiles.cuh"

struct DownGemm {
    static constexpr u32 kDepth = INTERMEDIATE, kRows = HIDDEN, kColumns = HIDDEN;
    static constexpr bool kDenseTokens = true, kTokensAreNew = true, kScalesSlots = false;
    static constexpr int kBoxes = BOXES;
    static constexpr u32 kWarpRows = 16, kHalfRows = 8;
    const TensorMap& token_map;
    scalar_t* expert_output;
    const scalar_t* bias;
#if SCATTERS
    const int* row_of_slot;
#endif

    __device__ __forceinline__ void prefetch_rows(int, int) const {}

    // The first column that a warp has of a tile.
    static __device__ __forceinline__ u32 first_column(u32 tile_column, u32 warp) { return tile_column * TILE_ROWS + warp * kWarpRows; }

    // The map is {byte, row, 1, 1, expert}.
    static __device__ __forceinline__ BoxStart box_start(int expert, u32 tile_column, int byte) {
        return {byte, (int)(tile_column * TILE_ROWS), 0, expert};
    }

    static __device__ __forceinline__ u32 weight_row(u32 tile_column, u32 warp, int half, u32 row) {
        return first_column(tile_column, warp) + half * kHalfRows + row;
    }

    __device__ __forceinline__ void store(const Tile& tile, int first_slot, u32 warp, const float (&sums)[4]) const {
#if SCATTERS
        Tile rows = tile;
        rows.first_slot = row_of_slot[tile.first_slot];  // neighbours among an expert's slots are neighbours as rows, too
#else
        const Tile& rows = tile;
#endif
        store_sixteen<HIDDEN, HIDDEN>(expert_output, rows, first_slot, first_column(tile.column, warp), pair_of(sums[0], sums[1]),
                                      pair_of(sums[2], sums[3]));
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
experts_down_codes_wgmma(const __grid_constant__ TensorMap down_map, SCALES_PARAMETER ZEROS_PARAMETER
                         const __grid_constant__ TensorMap intermediate_map, const int* expert_offsets, u32* ticket,
                         scalar_t* expert_output, const float* row_scales, const scalar_t* bias ROWS_PARAMETER) {
    DownGemm gemm = {intermediate_map, expert_output, bias ROW_OF_SLOT};
    multiply_experts(gemm, CodedWeights{down_map, SCALES_MAP, ZEROS_MAP, row_scales, {}}, Schedule{expert_offsets, ticket});
}
