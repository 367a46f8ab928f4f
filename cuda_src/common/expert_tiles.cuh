// The main loop of both expert GEMMs for many tokens: [slots of an expert, k] x [weight rows, k]^T, one tile after the other.
//
// A tile is up to TILE_SLOTS slots of one expert x TILE_ROWS weight rows, the work of a cluster of BLOCKS blocks, one on a
// multiprocessor. Each block has its part of the slots and multiplies it with all of the tile's weights; it loads its part of
// them, into the shared memory of every block. What limits the loop is what L2 gives to the multiprocessors, and for two blocks
// that is 30% less a product than for one; one block has shorter ways and a deeper ring, which wins where weights have to
// come from memory.
//
// Four producer warps fill a ring of STAGES stages of BLOCK_K k: token rows, wherever they lie, by 16-byte copies, or by the
// copy engine where they are neighbours; weights by the copy engine. Two consumer warpgroups multiply: with one block each
// has half of the slots, with two blocks half of the weight rows. Slots past the expert's last are left out 64 at a time.
//
// Slots  An expert's slots are shared out to as few tiles as hold them, in units of UNIT_SLOTS as evenly as it goes: tiles that
//        share weights then stay in step, and the second finds them in L2. With three PRODUCTS an expert of 257 to 384 slots is
//        one tile; with two the products are wider.
// Order  Tiles are taken from a counter, but for each cluster's first: by expert; within one, by groups of GROUP_TILES tiles
//        of slots; within a group by weights. So clusters at work together share weights and tokens in L2, and device memory
//        gives each about once.
// Cache  Where tokens are gathered, an expert's mean number of slots decides what L2 holds on to. Below WEIGHTS_ONCE_BELOW
//        weights go first: each is wanted once, and what the next grid reads stays. From there to TOKENS_KEPT_BELOW tokens
//        stay: other experts want them again. Each is 1 to 2% of a call there, and both together less than either.
//
// Part   A block's part of a tile's weights is BLOCK_N rows. They come in the order in which the tensor map brings them, in one
//        box or, where the weight is TRANSPOSED ([k, rows] for each expert), in boxes of 64 columns.
// Bias   Where there is one, it is added to the sums of a tile: each element is loaded once, whatever the number of products.
// Rank   With LOW_RANK the sums go on over so many more k, those of an adapter: low [slots, LOW_RANK] times a factor that lies as
//        the weight does, with LOW_RANK in the place of k. They come through the ring like k's own steps, so that what an adapter
//        adds is not rounded by itself. Past LOW_RANK there are zeros up to a whole step: a loop of its own for fewer k would cost
//        the main loop more than they do, as ptxas then has no registers left to describe products ahead.
//
// Weights that are stored as codes are brought by decoded_weights.cuh in the place of PlainWeights; all else is the same for both.
//
// A Gemm gives kDepth (k), kRows (weight rows of an expert), kDenseTokens (slots are token rows, written by the grid before),
// where a slot's token row is, kBoxes and box_start() of a part, prefetch_inputs(), which brings near what the store of a tile will
// load, and store(), which gets the sums of 16 slots a warp. Where there is a bias, also bias and weight_row(), which says what the
// map brings where. With kScalesSlots scale() multiplies a slot's sums by what was taken out of its token row.
#pragma once
#include "cluster.cuh"
#include "ring.cuh"
#include "tensor_copy.cuh"
#include "warp.cuh"
#include "wgmma.cuh"

#define UNIT_SLOTS 128  // a product of 64 slots for each slot group of each block
#define TILE_SLOTS (UNIT_SLOTS * PRODUCTS)
#define TILE_ROWS (BLOCKS * BLOCK_N)
#define BLOCK_SLOTS (TILE_SLOTS / BLOCKS)
#define SLOT_GROUPS (2 / BLOCKS)  // warpgroups that share the slots; those that share the weight rows are BLOCKS
#define GROUP_TILES 8
#define WEIGHTS_ONCE_BELOW 80
#define TOKENS_KEPT_BELOW 176
#define CONSUMER_THREADS 256
#define PRODUCER_THREADS 128
#if defined(WEIGHT_CODEC) && PRODUCTS * BLOCK_N <= 352  // producers decode, and consumers leave them so many
#define CONSUMER_REGISTERS 216
#define PRODUCER_REGISTERS 72
#else
#define CONSUMER_REGISTERS 224
#define PRODUCER_REGISTERS 56
#endif
#define TOKEN_BYTES (BLOCK_SLOTS * ROW_BYTES)
#define WEIGHT_BYTES (TILE_ROWS * ROW_BYTES)
#define STAGE_BYTES (TOKEN_BYTES + WEIGHT_BYTES)
#define ROWS_PER_PASS (PRODUCER_THREADS / 8)
#define PASSES (BLOCK_SLOTS / ROWS_PER_PASS)
static_assert(BLOCKS == 1 || BLOCKS == 2, "a cluster is one block or two");
static_assert(PRODUCTS == 2 || PRODUCTS == 3, "PRODUCTS");
static_assert(!TRANSPOSED || BLOCK_N % 64 == 0, "transposed weights come in boxes of 64 rows");
static_assert(BLOCK_THREADS == CONSUMER_THREADS + PRODUCER_THREADS && BLOCK_K * 2 == ROW_BYTES, "BLOCK_THREADS, BLOCK_K");

// What a block has of a tile.
struct alignas(16) Tile {
    int expert;      // -1: no more tiles
    int first_slot;
    int slots;       // none, where the tile has too few for two blocks
    int column;      // times TILE_ROWS: the first weight row
};

// Of an adapter, where there is one. low comes as token rows do: by the copy engine where these are dense, else by address. Where
// 16-byte copies fill the other stages, boxes of the copy engine took 160 us of 4096 tokens' 680.
struct Adapter {
    const TensorMap* factor;
    const TensorMap* low_map;
    const SCALAR* low;
};

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

#ifndef OPERAND
#define OPERAND SCALAR   // what products multiply
#define WEIGHT_FACTOR 1  // of decoded weights
#endif
#ifndef WEIGHT_CODEC  // else decoded_weights.cuh says so
#define CODED_MAPS
#define ROW_SCALES_PARAMETER
#define WEIGHTS(MAP, ADAPTER) PlainWeights{MAP, ADAPTER}
#endif
static_assert(LOW_RANK % 16 == 0, "the rank is padded to whole products");

// The steps of a tile: those over k, and with the adapter's.
template <class Gemm> constexpr u32 kDepthSteps = (Gemm::kDepth + BLOCK_K - 1) / BLOCK_K;
template <class Gemm> constexpr u32 kSteps = kDepthSteps<Gemm> + (LOW_RANK + BLOCK_K - 1) / BLOCK_K;

struct Schedule {
    const int* expert_offsets;  // [NUM_EXPERTS + 1]
    u32* ticket;                // zero before the launch
};

struct Shared {
    u64 filled[STAGES], emptied[STAGES];
    u64 tile_ready[2], tile_read[2];
    Tile tiles[2];
    int first_tile[NUM_EXPERTS + 1];  // tiles of slots that the lower experts have
    int first_slot[NUM_EXPERTS + 1];
};
static_assert(sizeof(Shared) <= STAGES * 16 + 64 + (NUM_EXPERTS + 1) * 8 + 15, "cupymoe/kernels/expert_tiles.py counts so much");

extern __shared__ __align__(1024) unsigned char block_memory[];  // the ring, then Shared

// In a block of the cluster; to itself a lone block arrives as any other, which compute-sanitizer wants.
__device__ __forceinline__ void arrive_in(u32 barrier, u32 rank) {
    if (BLOCKS == 1) arrive(barrier);
    else arrive_in_block(barrier, rank);
}

struct Pipeline {
    Shared& shared;
    u32 ring;  // shared address

    __device__ __forceinline__ u32 tokens(u32 stage) const { return ring + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 weights(u32 stage) const { return tokens(stage) + TOKEN_BYTES; }
    __device__ __forceinline__ u32 filled(u32 stage) const { return shared_address(shared.filled) + stage * 8; }
    __device__ __forceinline__ u32 emptied(u32 stage) const { return shared_address(shared.emptied) + stage * 8; }
    __device__ __forceinline__ u32 tile_ready(u32 index) const { return shared_address(shared.tile_ready) + index % 2 * 8; }
    __device__ __forceinline__ u32 tile_read(u32 index) const { return shared_address(shared.tile_read) + index % 2 * 8; }

    // The cluster's index-th tile, for a thread whose warp has yet to ask for it.
    __device__ __forceinline__ Tile shown_tile(u32 index) const {
        wait_barrier(tile_ready(index), index / 2 % 2);
        return shared.tiles[index % 2];
    }

    // The same for whole warps, once.
    __device__ __forceinline__ Tile tile(u32 index) const {
        Tile tile = shown_tile(index);
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive_in(tile_read(index), 0);
        return tile;
    }
};

// Fills first_slot and first_tile. One warp.
__device__ __forceinline__ void count_tiles(const int* expert_offsets, Shared& shared) {
    constexpr int kRounds = NUM_EXPERTS / 32 + 1;
    u32 lane = threadIdx.x % 32;
    int offsets[kRounds];  // all on their way before one is needed
#pragma unroll
    for (int i = 0; i < kRounds; i++) offsets[i] = load_from_l2(expert_offsets + min(i * 32 + lane, NUM_EXPERTS));
#pragma unroll
    for (int i = 0; i < kRounds; i++) {
        if (i * 32 + lane <= NUM_EXPERTS) shared.first_slot[i * 32 + lane] = offsets[i];
    }
    __syncwarp();
    int tiles = warp_exclusive_sums(
        NUM_EXPERTS,
        [&](int expert) { return (shared.first_slot[expert + 1] - shared.first_slot[expert] + TILE_SLOTS - 1) / TILE_SLOTS; },
        [&](int expert, int sum) { shared.first_tile[expert] = sum; });
    if (lane == 0) shared.first_tile[NUM_EXPERTS] = tiles;
}

// Shows the cluster its index-th tile and orders the ticket after it, whose way to memory and back nobody waits for. One warp
// of the cluster's first block. The tickets of an expert with 5 tiles of slots and 3 tiles of weight rows, in groups of 4:
//
//                 rows 0   rows 1   rows 2
//       slots 0      0        4        8
//       slots 1      1        5        9
//       slots 2      2        6       10     clusters that run together share weight rows, and a group's slots are in L2 still
//       slots 3      3        7       11     when its next rows come
//       slots 4     12       13       14     the next group
template <class Gemm>
__device__ __forceinline__ void take_tile(const Gemm& gemm, const Schedule& schedule, const Pipeline& pipeline, u32 index, u32& next_ticket) {
    constexpr u32 kColumns = (Gemm::kRows + TILE_ROWS - 1) / TILE_ROWS;
    const Shared& shared = pipeline.shared;
    u32 lane = threadIdx.x % 32, ticket = __shfl_sync(FULL_WARP, next_ticket, 0), expert = 0;
    if (lane == 0) next_ticket = cluster_count() + atomicAdd(schedule.ticket, 1u);
#pragma unroll 8
    for (u32 base = 1; base <= NUM_EXPERTS; base += 32) {
        bool before = base + lane <= NUM_EXPERTS && shared.first_tile[base + lane] * kColumns <= ticket;
        expert += __popc(__ballot_sync(FULL_WARP, before));
    }
    u32 words[4] = {~0u, 0, 0, 0};
    if (expert < NUM_EXPERTS) {
        u32 tiles = shared.first_tile[expert + 1] - shared.first_tile[expert];
        u32 of_expert = ticket - shared.first_tile[expert] * kColumns;
        u32 group = of_expert / (GROUP_TILES * kColumns), of_group = of_expert % (GROUP_TILES * kColumns);
        u32 height = min(tiles - group * GROUP_TILES, (u32)GROUP_TILES);
        u32 index_of_expert = group * GROUP_TILES + of_group % height;
        u32 end = shared.first_slot[expert + 1], units = (end - shared.first_slot[expert] + UNIT_SLOTS - 1) / UNIT_SLOTS;
        u32 each = units / tiles, longer = units % tiles;
        u32 first = shared.first_slot[expert] + (index_of_expert * each + min(index_of_expert, longer)) * UNIT_SLOTS;
        u32 slots = min(end - first, (each + (index_of_expert < longer)) * UNIT_SLOTS);
        gemm.prefetch_rows(first, slots);
        u32 of_first_block = min((slots + 64 * BLOCKS - 1) / (64 * BLOCKS) * 64, slots);
        words[0] = expert;
        words[1] = lane == 0 ? first : first + of_first_block;
        words[2] = lane == 0 ? of_first_block : slots - of_first_block;
        words[3] = of_group / height;
    }
    if (lane < BLOCKS) {
        wait_barrier(pipeline.tile_read(index), index / 2 % 2 ^ 1);
        if (BLOCKS == 1) {
            store_pack(reinterpret_cast<u32*>(&pipeline.shared.tiles[index % 2]), Pack<u32, 4>{words[0], words[1], words[2], words[3]});
            arrive(pipeline.tile_ready(index));
        } else {
            store_in_block(shared_address(&shared.tiles[index % 2]), words, pipeline.tile_ready(index), lane);
        }
    }
    __syncwarp();
}

// The token rows of a tile, each thread one 16-byte pack of every ROWS_PER_PASS-th row. Where registers are few, the 8 lanes of
// a row are kKeepers of which row it is in each pass, every 8th pass each, and tell each other.
template <class Gemm, u32 kKeepers = 1> struct RowLoader {
    static_assert(kKeepers == 1 || kKeepers == 8, "each lane keeps all passes' rows, or an eighth of them");
    u32 rows[PASSES / kKeepers], passes, offset;
    const unsigned char* source;

    // A pass that starts before the last slot is done in full: its rows past that one repeat it.
    __device__ __forceinline__ RowLoader(const Gemm& gemm, const Tile& tile, u32 thread) {
        u32 row = thread / 8, pack = thread % 8;
        passes = (tile.slots + ROWS_PER_PASS - 1) / ROWS_PER_PASS;
        offset = row * ROW_BYTES + (pack ^ row % 8) * 16;
        source = reinterpret_cast<const unsigned char*>(gemm.tokens + pack * 8);
#pragma unroll
        for (int i = 0; i < PASSES / kKeepers; i++) {
            u32 pass = kKeepers == 1 ? i : i * 8 + pack;
            rows[i] = pass < passes ? gemm.row(tile.first_slot + min((int)row + (int)pass * ROWS_PER_PASS, tile.slots - 1)) : 0;
        }
    }

    // The row of a pass; for whole warps.
    __device__ __forceinline__ u32 row(int pass) const {
        return kKeepers == 1 ? rows[pass] : __shfl_sync(FULL_WARP, rows[pass / kKeepers], threadIdx.x % 32 / 8 * 8 + pass % 8);
    }

    __device__ __forceinline__ void load(u32 stage, u32 step, u64 policy) const {
        const unsigned char* step_source = source + step * ROW_BYTES;
        u32 bytes = Gemm::kDepth % BLOCK_K == 0 || step * BLOCK_K + threadIdx.x % 8 * 8 < Gemm::kDepth ? 16 : 0;
        u32 to = stage + offset;
#pragma unroll
        for (int i = 0; i < PASSES; i += 4, to += 4 * ROWS_PER_PASS * ROW_BYTES) {
            const void* sources[4];
#pragma unroll
            for (int j = 0; j < 4; j++) sources[j] = step_source + (u64)row(i + j) * (Gemm::kDepth * sizeof(SCALAR));
            if (i + 4 <= passes) {
                copy_4_packs<ROWS_PER_PASS * ROW_BYTES>(to, sources, bytes, policy);
                continue;
            }
#pragma unroll
            for (int j = 0; j < 3; j++) {
                if (i + j < passes) copy_pack(to + j * ROWS_PER_PASS * ROW_BYTES, sources[j], bytes, policy);
            }
            break;
        }
    }

    // The same of low, rows in slot order; zeros past the rank.
    __device__ __forceinline__ void load_low(u32 stage, const Tile& tile, const SCALAR* low, u32 step, u64 policy) const {
        u32 row = (threadIdx.x - CONSUMER_THREADS) / 8, k = step * BLOCK_K + threadIdx.x % 8 * 8, to = stage + offset;
#pragma unroll 1
        for (u32 i = 0; i < passes; i++, to += ROWS_PER_PASS * ROW_BYTES) {
            u32 slot = tile.first_slot + min((int)(row + i * ROWS_PER_PASS), tile.slots - 1);
            copy_pack(to, low + (u64)slot * LOW_RANK + k, (int)k < LOW_RANK ? 16 : 0, policy);
        }
    }
};

// Where a tile's weights come from. Beside these, which lie in memory as products read them, there are decoded_weights.cuh's.
//
// kRingBytes   of shared memory between the ring and Shared, for its own use
// kFillings    arrivals that fill a stage
// kShowings    arrivals that show a tile
// kStored      whether threads store weights, which products read through another proxy
// kScalesRows  whether sums are multiplied by row_scales [NUM_EXPERTS, kRows] before all else
// init()       prepares the launch. One thread, before the barriers are published
// fill_ring()  is what the producer warps do
struct PlainWeights {
    static constexpr u32 kRingBytes = 0;
    // A lone block's scheduler arrives itself. That it is the leader's warp would do with one arrival; then registers spill.
    static constexpr u32 kShowings = BLOCKS == 1 ? 2 : 1;
    static constexpr bool kScalesRows = false, kStored = false;
    template <class Gemm> static constexpr u32 kFillings = Gemm::kDenseTokens ? 1 : 1 + PRODUCER_THREADS;
    const TensorMap& map;
    Adapter adapter;

    __device__ __forceinline__ void init() const { prefetch_map(map); }

    // Dense tokens are what the previous grid writes; weights and offsets are older, so the first weights come before its end.
    template <class Gemm>
    __device__ __forceinline__ void fill_ring(const Gemm& gemm, const Schedule& schedule, const Pipeline& pipeline) const {
        u32 thread = threadIdx.x - CONSUMER_THREADS, rank = rank_in_cluster();
        u64 weights_policy = evict_unchanged_policy(), tokens_policy = weights_policy;
        if (!Gemm::kDenseTokens) {
            u32 mean_slots = pipeline.shared.first_slot[NUM_EXPERTS] / NUM_EXPERTS;
            if (mean_slots < WEIGHTS_ONCE_BELOW) weights_policy = evict_first_policy();
            else if (mean_slots < TOKENS_KEPT_BELOW) tokens_policy = evict_last_policy();
        }
        bool leader = thread == 0, scheduler = thread < 32 && rank == 0;
        auto of_adapter = [](u32 step) { return LOW_RANK > 0 && step >= kDepthSteps<Gemm>; };
        auto step_of_adapter = [](u32 step) { return step - kDepthSteps<Gemm>; };
        // Or of an adapter the factor.
        auto load_weights = [&](const Tile& tile, u32 step, u32 stage) {
            u32 token_bytes = Gemm::kDenseTokens ? (tile.slots + 63) / 64 * 64 * ROW_BYTES : 0;
            const TensorMap& from = of_adapter(step) ? *adapter.factor : map;
            arrive_expecting(pipeline.filled(stage), WEIGHT_BYTES + token_bytes);
            u32 to = pipeline.weights(stage) + rank * (BLOCK_N * ROW_BYTES), part = tile.column * BLOCKS + rank;
#pragma unroll
            for (int box = 0; box < Gemm::kBoxes; box++, to += BLOCK_N * ROW_BYTES / Gemm::kBoxes) {
                BoxStart start = gemm.box_start(tile.expert, part, box, (of_adapter(step) ? step_of_adapter(step) : step) * BLOCK_K);
                copy_box_to_blocks<BLOCKS>(to, from, start, pipeline.filled(stage), weights_policy);
            }
        };
        u32 ticket = 0;
        if (scheduler) {
            ticket = cluster_index();  // a cluster's first; the others are counted after these
            take_tile(gemm, schedule, pipeline, 0, ticket);
        }
        Turn turn = {0, 1};
        u32 ahead = 0;  // steps of the first tile whose weights are under way
        for (u32 index = 0;; index++) {
            if (leader) arrive_expecting(pipeline.tile_ready(index), BLOCKS == 1 ? 0 : sizeof(Tile));
            __syncwarp();
            Tile tile = pipeline.tile(index);
            if (Gemm::kDenseTokens && index == 0) {
                if (leader && tile.expert >= 0) {
                    for (; ahead < min((u32)STAGES, kDepthSteps<Gemm>); ahead++) load_weights(tile, ahead, ahead);
                }
                wait_for_previous_grid();
                order_writes_before_bulk_copies();
            }
            if (tile.expert < 0) break;
            if (scheduler) take_tile(gemm, schedule, pipeline, index + 1, ticket);
            if constexpr (Gemm::kDenseTokens) {
                for (u32 step = 0; leader && step < kSteps<Gemm>; step++, turn.next()) {
                    // Not for those ahead: a block without slots adds nothing to them, so they may be filled and emptied already,
                    // and the wait would be for the round after.
                    if (step >= ahead) {
                        wait_barrier(pipeline.emptied(turn.stage), turn.parity);
                        load_weights(tile, step, turn.stage);
                    }
                    const TensorMap& tokens = of_adapter(step) ? *adapter.low_map : gemm.token_map;
                    u32 column = (of_adapter(step) ? step_of_adapter(step) : step) * BLOCK_K;
                    for (int slot = 0; slot < tile.slots; slot += 64) {
                        copy_box(pipeline.tokens(turn.stage) + slot * ROW_BYTES, tokens, column, tile.first_slot + slot,
                                 pipeline.filled(turn.stage));
                    }
                }
                __syncwarp();
            } else {
                RowLoader<Gemm> loader(gemm, tile, thread);
#pragma unroll 1  // of four unrolled steps ptxas made copies that tests/kernels/test_machine_code.py calls broken
                for (u32 step = 0; step < kSteps<Gemm>; step++, turn.next()) {
                    wait_barrier(pipeline.emptied(turn.stage), turn.parity);
                    if (leader) load_weights(tile, step, turn.stage);
                    u32 to = pipeline.tokens(turn.stage);
                    if (of_adapter(step)) loader.load_low(to, tile, adapter.low, step_of_adapter(step), tokens_policy);
                    else loader.load(to, step, tokens_policy);
                    arrive_after_copies(pipeline.filled(turn.stage));
                }
            }
            ahead = 0;
        }
        wait_for_copies();
    }
};

typedef float TileSums[PRODUCTS][SUMS];

// Brings what a tile's weight rows have in a tensor [NUM_EXPERTS, kRows], such as biases, near while it is multiplied. Whole warps.
template <class Gemm, typename T>
__device__ __forceinline__ void prefetch_of_rows(const Gemm& gemm, const T* tensor, int expert, u32 part) {
    u32 eight = threadIdx.x % 32, row = gemm.weight_row(part, eight, 0);
    if (eight < BLOCK_N / 8 && row < Gemm::kRows) {
        asm volatile("prefetch.global.L1 [%0];" ::"l"(tensor + (u64)expert * Gemm::kRows + row));
    }
}

// combine(sum, value) of every slot's sums and what their weight rows have there. Eight rows are all there or, past the last row,
// none of them.
template <class Gemm, typename T, class Combine>
__device__ __forceinline__ void combine_with_rows(const Gemm& gemm, const T* tensor, TileSums& sums, int expert, u32 part,
                                                  Combine combine) {
    const T* of_expert = tensor + (u64)expert * Gemm::kRows;
#pragma unroll
    for (int eight = 0; eight < BLOCK_N / 8; eight++) {
        if (Gemm::kRows % TILE_ROWS != 0 && gemm.weight_row(part, eight, 0) >= Gemm::kRows) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float value = to_float(of_expert[gemm.weight_row(part, eight, threadIdx.x % 4 * 2 + i)]);
#pragma unroll
            for (int product = 0; product < PRODUCTS; product++) {
                combine(sums[product][4 * eight + i], value);
                combine(sums[product][4 * eight + i + 2], value);
            }
        }
    }
}

// sums = the products of a tile over all k, and over an adapter's: kProducts times 64 slots of this warpgroup x its weight rows. A stage
// is free as soon as it is multiplied.
template <int kProducts, class Gemm, class Weights>
__device__ __forceinline__ void multiply_tile(TileSums& sums, const Pipeline& pipeline, Turn& turn, u32 slot_group, u32 row_group) {
    u32 lane = threadIdx.x % 32;
    for (u32 step = 0; step < kSteps<Gemm>; step++, turn.next()) {
        wait_barrier(pipeline.filled(turn.stage), turn.parity);
        if (kProducts > 0) {
            if (!Gemm::kDenseTokens || Weights::kStored) order_copies_before_products();
            u64 a = tile_descriptor(pipeline.tokens(turn.stage) + slot_group * (64 * ROW_BYTES));
            u64 b = tile_descriptor_of_b(pipeline.weights(turn.stage) + row_group * (BLOCK_N * ROW_BYTES));
            begin_products();
#pragma unroll
            for (int k = 0; k < BLOCK_K / 16; k++) {
#pragma unroll
                for (int i = 0; i < kProducts; i++) {
                    u32 of_slots = k * 2 + i * (SLOT_GROUPS * 64 * ROW_BYTES / 16);
                    multiply_tiles(sums[i], a + of_slots, b + k * NEXT_16_K_OF_B, step > 0 || k > 0, OPERAND());
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

template <class Gemm, class Weights>
__device__ __forceinline__ void consume_ring(const Gemm& gemm, const Weights& weights, const Pipeline& pipeline) {
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
        if constexpr (Weights::kScalesRows) {
            if (products > 0) prefetch_of_rows(gemm, weights.row_scales, tile.expert, part);
        }
        if (PRODUCTS == 3 && products == 3) multiply_tile<PRODUCTS, Gemm, Weights>(sums, pipeline, turn, slot_group, row_group);
        else if (products == 2) multiply_tile<2, Gemm, Weights>(sums, pipeline, turn, slot_group, row_group);
        else if (products == 1) multiply_tile<1, Gemm, Weights>(sums, pipeline, turn, slot_group, row_group);
        else multiply_tile<0, Gemm, Weights>(sums, pipeline, turn, slot_group, row_group);
        if constexpr (Gemm::kScalesSlots) {
#pragma unroll
            for (int i = 0; i < PRODUCTS; i++) {
                if (i < products) gemm.scale(sums[i], tile, FIRST_SLOT(i, slot_group));
            }
        }
        if constexpr (Weights::kScalesRows) {
            if (products > 0) {
                combine_with_rows(gemm, weights.row_scales, sums, tile.expert, part, [](float& sum, float scale) { sum *= scale; });
            }
        }
        if constexpr (HAS_BIAS) {
            if (products > 0) {
                combine_with_rows(gemm, gemm.bias, sums, tile.expert, part, [](float& sum, float bias) { sum += bias; });
            }
        }
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++) {
            if (i >= products) continue;
            int slot = FIRST_SLOT(i, slot_group);
            gemm.store(tile, slot, part, sums[i]);
        }
    }
}

template <class Gemm, class Weights>
__device__ __forceinline__ void multiply_experts(const Gemm& gemm, const Weights& weights, const Schedule& schedule) {
    Shared& shared = *reinterpret_cast<Shared*>(block_memory + STAGES * STAGE_BYTES + Weights::kRingBytes);
    Pipeline pipeline = {shared, shared_address(block_memory)};
    if (threadIdx.x == 0) {
        weights.init();
        for (int s = 0; s < STAGES; s++) {
            init_barrier(pipeline.filled(s), Weights::template kFillings<Gemm>);
            init_barrier(pipeline.emptied(s), BLOCKS * CONSUMER_THREADS / 32);
        }
        for (int i = 0; i < 2; i++) {
            init_barrier(pipeline.tile_ready(i), Weights::kShowings);
            init_barrier(pipeline.tile_read(i), BLOCKS * BLOCK_THREADS / 32);
        }
        publish_barriers();
    }
    if (!Gemm::kDenseTokens) {
        wait_for_previous_grid();
        if (LOW_RANK > 0) order_writes_before_bulk_copies();  // which the factor may be
        release_next_grid();
    }
    if (threadIdx.x / 32 == CONSUMER_THREADS / 32) count_tiles(schedule.expert_offsets, shared);
    sync_cluster();
    if (threadIdx.x < CONSUMER_THREADS) {
        grow_registers<CONSUMER_REGISTERS>();
        if (Gemm::kDenseTokens) {
            wait_for_previous_grid();
            release_next_grid();
        }
        consume_ring(gemm, weights, pipeline);
    } else {
        shrink_registers<PRODUCER_REGISTERS>();
        weights.fill_ring(gemm, schedule, pipeline);
    }
    sync_cluster();  // a block's memory must not go while the other may write there
}
