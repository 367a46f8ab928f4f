// The tiles of all experts, and who computes which: those that multiply plain weights (expert_tiles.cuh) and codes
// (coded_tiles.cuh).
//
// Slots  An expert's slots are shared out to as few tiles as hold them, in units of UNIT_SLOTS as evenly as it goes: tiles that
//        share weights then stay in step, and the second finds them in L2.
// Order  Tiles are taken from a counter, but for each cluster's first: by expert; within one, by groups of GROUP_TILES tiles
//        of slots; within a group by weights. So clusters at work together share weights and tokens in L2, and device memory
//        gives each about once.
//
// Includers define BLOCKS of a cluster, UNIT_SLOTS, TILE_SLOTS, TILE_ROWS of a weight, STAGES, STAGE_BYTES, the first TOKEN_BYTES
// of which are tokens, and LOW_RANK, of an adapter, or 0. A Gemm gives kDepth (k), kRows (weight rows of an expert) and
// prefetch_rows(). With INLINE_PAIRS every block finds out for itself which slots there are (inline_plan.cuh), instead of
// sort_by_expert.cu before it.
#pragma once
#include "../cluster.cuh"
#include "../ring.cuh"
#include "../warp.cuh"
#ifndef INLINE_PAIRS
#define INLINE_PAIRS 0
#endif
#if INLINE_PAIRS
#include "../pairs.cuh"
#endif

#define GROUP_TILES 8
#ifndef CONSUMER_THREADS
#define CONSUMER_THREADS 256
#endif
#define PRODUCER_THREADS 128
static_assert(BLOCKS == 1 || BLOCKS == 2, "a cluster is one block or two");
static_assert(BLOCK_THREADS == CONSUMER_THREADS + PRODUCER_THREADS, "BLOCK_THREADS");

// What a block has of a tile.
struct alignas(16) Tile {
    int expert;      // -1: no more tiles
    int first_slot;
    int slots;       // none, where the tile has too few for two blocks
    int column;      // times TILE_ROWS: the first weight row
};

// The steps of a tile: those over k, and with the adapter's.
template <class Gemm> constexpr u32 kDepthSteps = (Gemm::kDepth + BLOCK_K - 1) / BLOCK_K;
template <class Gemm> constexpr u32 kSteps = kDepthSteps<Gemm> + (LOW_RANK + BLOCK_K - 1) / BLOCK_K;

template <class Gemm> __device__ __forceinline__ bool is_of_adapter(u32 step) { return LOW_RANK > 0 && step >= kDepthSteps<Gemm>; }

template <class Gemm> __device__ __forceinline__ u32 step_of_adapter(u32 step) { return step - kDepthSteps<Gemm>; }

#if INLINE_PAIRS
struct Schedule {
    Routing routing;    // of at most INLINE_PAIRS pairs
    int* slot_of_pair;  // [num_pairs], which the first block writes as sort_by_expert.cu does; nullptr: nobody
};
#else
struct Schedule {
    const int* expert_offsets;  // [NUM_EXPERTS + 1]
    u32* ticket;                // zero before the launch
};
#endif

struct Shared {
    u64 filled[STAGES], emptied[STAGES];
    u64 tile_ready[2], tile_read[2];
    Tile tiles[2];
#if INLINE_PAIRS
    alignas(16) u32 keys[INLINE_PAIRS];  // expert * INLINE_PAIRS + pair; ~0: masked, or no pair
    int pair_of_slot[INLINE_PAIRS];
#endif
    int first_tile[NUM_EXPERTS + 1];  // tiles of slots that the lower experts have
    int first_slot[NUM_EXPERTS + 1];
};
static_assert(sizeof(Shared) <= STAGES * 16 + 64 + (NUM_EXPERTS + 1 + INLINE_PAIRS) * 8 + 15,
              "cupymoe/kernels/expert_tiles.py counts so much");

extern __shared__ __align__(1024) unsigned char block_memory[];  // the ring, then Shared

__device__ __forceinline__ Shared& shared_of_block() { return *reinterpret_cast<Shared*>(block_memory + STAGES * STAGE_BYTES); }

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

#if !INLINE_PAIRS
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
#endif

// Shows the cluster its index-th tile and orders the ticket after it, whose way to memory and back nobody waits for. With
// INLINE_PAIRS tickets are dealt in turn, as there is no kernel before that could set a counter to zero. One warp of the
// cluster's first block. The tickets of an expert with 5 tiles of slots and 3 tiles of weight rows, in groups of 4:
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
#if INLINE_PAIRS
    next_ticket = ticket + cluster_count();
#else
    if (lane == 0) next_ticket = cluster_count() + atomicAdd(schedule.ticket, 1u);
#endif
#pragma unroll 8
    for (u32 base = 1; base <= NUM_EXPERTS; base += 32) {
        bool before = base + lane <= NUM_EXPERTS && shared.first_tile[base + lane] * kColumns <= ticket;
        expert += __popc(__ballot_sync(FULL_WARP, before));
    }
    u32 words[4] = {~0u, 0, 0, 0};
#if INLINE_PAIRS
    if (expert < NUM_EXPERTS) {  // of one tile of slots
        words[0] = expert;
        words[1] = shared.first_slot[expert];
        words[2] = shared.first_slot[expert + 1] - words[1];
        words[3] = ticket - shared.first_tile[expert] * kColumns;
    }
#else
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
#endif
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
