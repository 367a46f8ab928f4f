// The main loop of the expert GEMMs for many tokens: [slots of an expert, k] x [weight rows, k]^T, one tile after the other.
//
// A tile is up to TILE_SLOTS slots of one expert x TILE_ROWS weight rows, the work of a cluster of BLOCKS blocks, one on a
// multiprocessor. Each block has its part of the slots and multiplies it with all of the tile's weights; it loads its part of
// them, into the shared memory of every block. What limits the loop is what L2 gives to the multiprocessors, and for two blocks
// that is 30% less a product than for one; one block has shorter ways and a deeper ring, which wins where weights have to
// come from memory. With three PRODUCTS an expert of 257 to 384 slots is one tile; with two the products are wider.
//
// Two consumer warpgroups multiply: with one block each has half of the slots, with two blocks half of the weight rows. Slots past
// the expert's last are left out 64 at a time. tiles/schedule.cuh says who has which tile, tiles/producer.cuh fills the ring.
//
// Part   A block's part of a tile's weights is BLOCK_N rows. They come in the order in which the tensor map brings them, in one
//        box or, where the weight is TRANSPOSED ([k, rows] for each expert), in boxes of 64 columns.
// Bias   Where there is one, it is added to the sums of a tile: each element is loaded once, whatever the number of products.
// Rank   With LOW_RANK the sums go on over so many more k, those of an adapter: low [slots, LOW_RANK] times a factor that lies as
//        the weight does, with LOW_RANK in the place of k. They come through the ring like k's own steps, so that what an adapter
//        adds is not rounded by itself. Past LOW_RANK there are zeros up to a whole step: a loop of its own for fewer k would cost
//        the main loop more than they do, as ptxas then has no registers left to describe products ahead.
//
// A Gemm gives kDepth (k), kRows (weight rows of an expert), what tiles/producer.cuh wants of it, kBoxes and box_start() of a part,
// prefetch_inputs(), which brings near what the store of a tile will load, and store(), which gets the sums of 16 slots a warp.
// Where there is a bias, also bias and weight_row(), which says what the map brings where.
#pragma once
#define UNIT_SLOTS 128  // a product of 64 slots for each slot group of each block
#define TILE_SLOTS (UNIT_SLOTS * PRODUCTS)
#define TILE_ROWS (BLOCKS * BLOCK_N)
#define SLOT_GROUPS (2 / BLOCKS)  // warpgroups that share the slots; those that share the weight rows are BLOCKS
#define TOKEN_BYTES (TILE_SLOTS / BLOCKS * ROW_BYTES)
#define WEIGHT_BYTES (TILE_ROWS * ROW_BYTES)
#define STAGE_BYTES (TOKEN_BYTES + WEIGHT_BYTES)
#include "tiles/roles.cuh"
#include "wgmma.cuh"

static_assert(PRODUCTS == 2 || PRODUCTS == 3, "PRODUCTS");
static_assert(!TRANSPOSED || BLOCK_N % 64 == 0, "transposed weights come in boxes of 64 rows");
static_assert(LOW_RANK % 16 == 0, "the rank is padded to whole products");

#if LOW_RANK
#define GATHERED_ADAPTER_PARAMETERS const __grid_constant__ TensorMap factor_map, const SCALAR* low,
#define GATHERED_ADAPTER Adapter{&factor_map, nullptr, low}
#define DENSE_ADAPTER_PARAMETERS const __grid_constant__ TensorMap low_map, const __grid_constant__ TensorMap factor_map,
#define DENSE_ADAPTER Adapter{&factor_map, &low_map, nullptr}
#else
#define GATHERED_ADAPTER_PARAMETERS
#define GATHERED_ADAPTER Adapter{}
#define DENSE_ADAPTER_PARAMETERS
#define DENSE_ADAPTER Adapter{}
#endif

// A weight as it lies in memory, and its adapter: what fill_ring() wants of weights.
struct PlainWeights {
    const TensorMap& map;
    Adapter adapter;

    __device__ __forceinline__ void init() const { prefetch_map(map); }

    // This block's part of a stage, for every block of the cluster, and token_bytes that will arrive with it. One thread.
    template <class Gemm>
    __device__ __forceinline__ void load(const Gemm& gemm, const Pipeline& pipeline, const Tile& tile, u32 step, u32 stage,
                                         u32 token_bytes, u64 policy) const {
        bool is_factor = is_of_adapter<Gemm>(step);
        const TensorMap& from = is_factor ? *adapter.factor : map;
        u32 rank = rank_in_cluster();
        arrive_expecting(pipeline.filled(stage), WEIGHT_BYTES + token_bytes);
        u32 to = pipeline.weights(stage) + rank * (BLOCK_N * ROW_BYTES), part = tile.column * BLOCKS + rank;
#pragma unroll
        for (int box = 0; box < Gemm::kBoxes; box++, to += BLOCK_N * ROW_BYTES / Gemm::kBoxes) {
            BoxStart start = gemm.box_start(tile.expert, part, box, (is_factor ? step_of_adapter<Gemm>(step) : step) * BLOCK_K);
            copy_box_to_blocks<BLOCKS>(to, from, start, pipeline.filled(stage), policy);
        }
    }
};

typedef float TileSums[PRODUCTS][SUMS];

// Brings the bias of a tile's weight rows near while it is multiplied. Whole warps.
template <class Gemm> __device__ __forceinline__ void prefetch_bias(const Gemm& gemm, int expert, u32 part) {
    u32 eight = threadIdx.x % 32, row = gemm.weight_row(part, eight, 0);
    if (eight < BLOCK_N / 8 && row < Gemm::kRows) {
        asm volatile("prefetch.global.L1 [%0];" ::"l"(gemm.bias + (u64)expert * Gemm::kRows + row));
    }
}

// Adds to every slot's sums what the bias of their weight rows is. Eight rows are all there or, past the last row, none of them.
template <class Gemm>
__device__ __forceinline__ void add_bias(const Gemm& gemm, TileSums& sums, int expert, u32 part) {
    const SCALAR* of_expert = gemm.bias + (u64)expert * Gemm::kRows;
#pragma unroll
    for (int eight = 0; eight < BLOCK_N / 8; eight++) {
        if (Gemm::kRows % TILE_ROWS != 0 && gemm.weight_row(part, eight, 0) >= Gemm::kRows) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float bias = to_float(of_expert[gemm.weight_row(part, eight, threadIdx.x % 4 * 2 + i)]);
#pragma unroll
            for (int product = 0; product < PRODUCTS; product++) {
                sums[product][4 * eight + i] += bias;
                sums[product][4 * eight + i + 2] += bias;
            }
        }
    }
}

// sums = the products of a tile over all k, and over an adapter's: kProducts times 64 slots of this warpgroup x its weight rows. A stage
// is free as soon as it is multiplied.
template <int kProducts, class Gemm>
__device__ __forceinline__ void multiply_tile(TileSums& sums, const Pipeline& pipeline, Turn& turn, u32 slot_group, u32 row_group) {
    u32 lane = threadIdx.x % 32;
    for (u32 step = 0; step < kSteps<Gemm>; step++, turn.next()) {
        wait_barrier(pipeline.filled(turn.stage), turn.parity);
        if (kProducts > 0) {
            if (!Gemm::kDenseTokens) order_copies_before_products();
            u64 a = tile_descriptor(pipeline.tokens(turn.stage) + slot_group * (64 * ROW_BYTES));
            u64 b = tile_descriptor_of_b(pipeline.weights(turn.stage) + row_group * (BLOCK_N * ROW_BYTES));
            begin_products();
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; k++) {
#pragma unroll
                for (int i = 0; i < kProducts; i++) {
                    u32 of_slots = k * 2 + i * (SLOT_GROUPS * 64 * ROW_BYTES / 16);
                    multiply_tiles(sums[i], a + of_slots, b + k * NEXT_16_K_OF_B, step > 0 || k > 0, SCALAR());
                }
            }
            commit_products();
            wait_for_products();
        }
        if (lane < BLOCKS) arrive_in(pipeline.emptied(turn.stage), lane);
    }
}

// Of a product's 64 slots the first of the two, 8 apart, that this lane has sums of. A function of it would be other machine code.
#define FIRST_SLOT(PRODUCT, SLOT_GROUP) \
    ((PRODUCT) * SLOT_GROUPS + (SLOT_GROUP)) * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4

template <class Gemm>
__device__ __forceinline__ void consume_ring(const Gemm& gemm, const PlainWeights&, const Pipeline& pipeline) {
    // A shuffle, so that the compiler knows it is one value for the warp, as the products want.
    u32 warpgroup = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0);
    u32 slot_group = warpgroup % SLOT_GROUPS, row_group = warpgroup / SLOT_GROUPS;
    TileSums sums;
    Turn turn = {0, 0};
    for (u32 index = 0;; index++) {
        Tile tile = pipeline.tile(index);
        if (tile.expert < 0) return;
        int products = ((tile.slots + 63) / 64 + SLOT_GROUPS - 1 - (int)slot_group) / SLOT_GROUPS;
        if ((tile.column * BLOCKS + row_group) * BLOCK_N >= Gemm::kRows) products = 0;
        u32 part = tile.column * BLOCKS + row_group;
        if (products > 0) gemm.prefetch_inputs(tile, slot_group, part);
        if (PRODUCTS == 3 && products == 3) multiply_tile<PRODUCTS, Gemm>(sums, pipeline, turn, slot_group, row_group);
        else if (products == 2) multiply_tile<2, Gemm>(sums, pipeline, turn, slot_group, row_group);
        else if (products == 1) multiply_tile<1, Gemm>(sums, pipeline, turn, slot_group, row_group);
        else multiply_tile<0, Gemm>(sums, pipeline, turn, slot_group, row_group);
        if constexpr (HAS_BIAS) {
            if (products > 0) add_bias(gemm, sums, tile.expert, part);
        }
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++) {
            if (i >= products) continue;
            int slot = FIRST_SLOT(i, slot_group);
            gemm.store(tile, slot, part, sums[i]);
        }
    }
}
