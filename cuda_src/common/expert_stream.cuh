// The weight stream that both expert GEMMs share: every block reads an equal part of the hit experts' weight rows
// once, through a ring in shared memory, and multiplies each stage with the expert's tokens.
//
// Work   The plan's chunks times the units of an expert are one line of units (a unit is 2 weight rows, 8 units one
//        16-row tensor-core block), cut into tiles of one chunk and at most TILE_UNITS units. Every block gets the same
//        number of bytes, so blocks end together whatever the routing is.
// Stage  TILE_ROWS weight rows x BLOCK_K, and TOKENS rows x BLOCK_K of activations gathered by row. The 16-byte packs of
//        odd rows are swapped in fours, so that fragments load without bank conflicts. Past the depth there are zeros.
//        WHOLE_ROWS: BLOCK_K is the depth and both operands are neighbouring rows, so a stage is two bulk copies, unswapped.
//        TRANSPOSED: weights are [NUM_EXPERTS, depth, rows] in memory, and a stage has them as BLOCK_K k rows of TILE_ROWS. A
//        16-byte pack is 8 weight rows at one k, and ldmatrix makes of it what a lane would have loaded from 8 rows: the
//        order of the sums is the same, so are their bits where K_WARPS is.
// Rank   With LOW_RANK a row's sums go on in the factor b [NUM_EXPERTS, rows, LOW_RANK] of a low-rank adapter, which lies as the
//        weight does (TRANSPOSED: [NUM_EXPERTS, LOW_RANK, rows]), times what lora_shrink_chunks.cu has made of the token, low
//        [slots, LOW_RANK]: so what the adapter adds is not rounded by itself. Both are far less than a tile of weights, and come
//        straight into registers while the tile before is stored; in the ring they would take the place of a stage.
// Warps  PRODUCER_WARPS fill the ring and run ahead as far as it reaches; WARPS consume it: ROW_WARPS side by side over the
//        rows, ROW_BLOCKS times 16 of them each, and either K_WARPS over the 32-wide k steps of a stage or TOKEN_WARPS over
//        the groups of 8 tokens, in turn. What a warp loads of a stage it multiplies ROW_BLOCKS or TOKEN_GROUPS times: where
//        products take the time, and not the weights, several of both halve the loads.
// Order  An output element is the sum over K_WARPS of sums over ascending k, whatever the tile, the chunk or the column:
//        it depends on its own row and token alone. LOW_RANK's come last. With HAS_BIAS the first of them begins with the bias of its row.
// Unused rows and columns of a tile keep what the ring held: they reach no output that is stored.
#pragma once
#include "async_copy.cuh"
#include "expert_plan.cuh"
#include "mma.cuh"
#include "ring.cuh"
#include "weight_rows.cuh"

#define PRODUCER_WARPS (WHOLE_ROWS ? 1 : 4)
#define CONSUMER_THREADS (WARPS * 32)
#define PRODUCER_THREADS (PRODUCER_WARPS * 32)
#define BLOCK_THREADS (CONSUMER_THREADS + PRODUCER_THREADS)
#define ROW_WARPS (WARPS / K_WARPS / TOKEN_WARPS)
#define TILE_ROWS (ROW_WARPS * ROW_BLOCKS * 16)
#define TILE_UNITS (TILE_ROWS / 2)
#define PACKS_PER_ROW (BLOCK_K / 8)
#define ROWS_PER_PASS (PRODUCER_THREADS / PACKS_PER_ROW)
#define WEIGHT_PASSES (TILE_ROWS / ROWS_PER_PASS)
#define TOKEN_PASSES ((TOKENS + ROWS_PER_PASS - 1) / ROWS_PER_PASS)
#define TOKEN_GROUPS (TOKENS / 8 / TOKEN_WARPS)                   // of a warp
#define STEPS ((BLOCK_K / 32 + K_WARPS - 1) / K_WARPS)
#define ROW_BYTES (BLOCK_K * 2)
#define WEIGHT_BYTES (TILE_ROWS * ROW_BYTES)
#define STAGE_BYTES (WEIGHT_BYTES + TOKENS * ROW_BYTES)
#define RANK_STEPS ((LOW_RANK + K_WARPS * 32 - 1) / (K_WARPS * 32))  // of each of the K_WARPS
#define RANK_AHEAD (ROW_BLOCKS == 1 && (TOKENS <= 48 || !TRANSPOSED))  // where sums leave registers for a step that is loaded ahead
#define PASS_TOKENS (TOKENS < 16 ? TOKENS : 16)
#define K_ROW_BYTES (TILE_ROWS * 2)                               // of TRANSPOSED weights
#define PACKS_PER_K_ROW (TILE_ROWS / 8)                          // of TRANSPOSED weights
#define K_ROWS_PER_PASS (PRODUCER_THREADS / PACKS_PER_K_ROW)     // of TRANSPOSED weights
#define PREFETCH_BYTES 65536                                      // of a block: what memory gives in a few microseconds
#define SUMS_PITCH (TILE_ROWS + 4)                               // no bank conflict between a warp's four token pairs
#define SUMS_BYTES (K_WARPS * PASS_TOKENS * SUMS_PITCH * 4)      // after the ring

static_assert(HAS_BULK_COPY || !WHOLE_ROWS, "WHOLE_ROWS needs bulk copies, which begin with sm_90");
static_assert(BLOCK_K % 32 == 0 && WARPS % K_WARPS == 0, "BLOCK_K, WARPS, K_WARPS");
static_assert(WHOLE_ROWS || BLOCK_K % 64 == 0 && PRODUCER_THREADS % PACKS_PER_ROW == 0 && TILE_ROWS % ROWS_PER_PASS == 0, "BLOCK_K");
static_assert(TOKENS % 8 == 0 && (TOKENS <= 32 || TOKENS % 16 == 0) && STAGES >= 2, "TOKENS, STAGES");
static_assert(TOKEN_WARPS == 1 || TOKEN_WARPS == 2 && K_WARPS == 1 && TOKENS % 16 == 0, "TOKEN_WARPS");
static_assert(ROW_BLOCKS == 1 || ROW_BLOCKS == 2, "ROW_BLOCKS");
static_assert(CONSUMER_THREADS % (TILE_UNITS / 2) == 0, "WARPS");
static_assert(LOW_RANK % 16 == 0, "LOW_RANK");
static_assert(!TRANSPOSED || !WHOLE_ROWS && TILE_ROWS >= 32 && PRODUCER_THREADS % PACKS_PER_K_ROW == 0, "TRANSPOSED");

// The first element of a tile's row.
template <class Gemm> __device__ __forceinline__ const scalar_t* weight_row(const Gemm& gemm, int expert, u32 first_unit, u32 row) {
    return gemm.weights + Gemm::row_of(expert, first_unit, row) * Gemm::kDepth;
}

// A tile and the k of the next stage; walks this block's tiles. Whole rounds of tiles are dealt to the blocks in turn, so
// that each block meets all experts and not one with more tokens than most; the rest of the line is cut evenly. With
// TRANSPOSED tiles are dealt even where an expert is no whole number of them, because neighbouring blocks then read
// neighbouring bytes of each k; a tile that crosses into the next expert is done as two.
template <class Gemm> struct Cursor {
    u32 position, end;  // of the piece
    u32 next_tile, dealt_end, last_position, last_end;
    u32 k, first_unit, units;
    Chunk chunk;

    // Where a tile may begin, in units: a store is of 2, a pack of transposed weights of some more.
    static constexpr u32 kGrain = TRANSPOSED ? Gemm::kUnitsOfPack : 2;
    static_assert(Gemm::kUnits % kGrain == 0, "HIDDEN, INTERMEDIATE");

    // A multiple of `grain`, which is larger where a block has many units.
    static __device__ __forceinline__ u32 cut(u32 total, u32 grain, u32 block) {
        return block == gridDim.x ? total : (u32)((u64)total * block / gridDim.x) / grain * grain;
    }

    __device__ __forceinline__ Cursor(const Plan& plan) : position(0), end(0), k(0), units(0) {
        u32 total = plan.num_chunks * Gemm::kUnits, round = gridDim.x * TILE_UNITS;
        dealt_end = TRANSPOSED || Gemm::kUnits % TILE_UNITS == 0 ? total / round * round : 0;
        next_tile = blockIdx.x * TILE_UNITS;
        u32 grain = total / gridDim.x >= 64 * kGrain ? 2 * kGrain : kGrain;
        last_position = dealt_end + cut(total - dealt_end, grain, blockIdx.x);
        last_end = dealt_end + cut(total - dealt_end, grain, blockIdx.x + 1);
        open(plan);
    }

    __device__ __forceinline__ bool done() const { return position >= end; }

    // The next tile, if there is one.
    __device__ __forceinline__ void open(const Plan& plan) {
        if (position >= end) {
            bool dealt = next_tile < dealt_end;
            position = dealt ? next_tile : last_position;
            end = dealt ? next_tile + TILE_UNITS : last_end;
            if (dealt) next_tile += gridDim.x * TILE_UNITS;
            else last_position = last_end;
            if (position >= end) return;
        }
        u32 index = position / Gemm::kUnits;
        first_unit = position - index * Gemm::kUnits;
        chunk = plan.chunks[index];
        u32 left = min(end - position, Gemm::kUnits - first_unit);
        u32 tiles = (left + TILE_UNITS - 1) / TILE_UNITS;  // of nearly equal size: a short one would starve the ring
        units = min(left, ((left + tiles - 1) / tiles + 7) / 8 * 8);
    }

    // True when the tile changed.
    __device__ __forceinline__ bool advance(const Plan& plan) {
        k += BLOCK_K;
        if (k < Gemm::kDepth) return false;
        k = 0;
        position += units;
        open(plan);
        return true;
    }
};

// Fetches the start of each row of the tile that this block gets first if every expert has one chunk, while the plan is
// still being made; a wrong guess is another block's tile.
template <class Gemm> __device__ __forceinline__ void prefetch_first_tile(const Gemm& gemm) {
    u32 position = blockIdx.x * TILE_UNITS, expert = position / Gemm::kUnits, first_unit = position % Gemm::kUnits;
    u32 row = threadIdx.x;
    if (expert >= NUM_EXPERTS || row >= TILE_ROWS || first_unit + Gemm::unit_of_row(row) >= Gemm::kUnits) return;
    prefetch_bulk(weight_row(gemm, expert, first_unit, row), min(PREFETCH_BYTES / TILE_ROWS, Gemm::kDepth * 2));
}

typedef float Sums[ROW_BLOCKS][TOKEN_GROUPS][4];

// Which part of a tile a consumer's warp has.
struct Place {
    u32 row_warp, k_warp, token_warp;

    __device__ __forceinline__ Place() {
        u32 warp = threadIdx.x / 32;
        row_warp = warp % ROW_WARPS;
        k_warp = TOKEN_WARPS > 1 ? 0 : warp / ROW_WARPS;
        token_warp = TOKEN_WARPS > 1 ? warp / ROW_WARPS : 0;
    }
};

// Pack p of a k row of transposed weights lies at p ^ swap_of_k(k), so that the 8 k rows that ldmatrix reads together, 0, 1,
// 8, 9, 16, 17, 24, 25 and as many more of each, are in different banks. With 4 packs a row, k % 2 is in the address already.
// Where a and b have no binary digit in common, swap_of_k(a + b) is swap_of_k(a) ^ swap_of_k(b).
__device__ __forceinline__ constexpr u32 swap_of_k(u32 k) { return PACKS_PER_K_ROW >= 8 ? k / 8 % 4 * 2 + k % 2 : k / 8 % 4; }

// Where in a stage this lane's k row of load_transposed_fragments is, in the first k step of its warp and the first of its
// blocks of 16 rows; the second is two packs on, whose distance is a binary digit that swap_of_k may flip: 32 bytes, exclusive or.
__device__ __forceinline__ u32 k_row_of_fragment(u32 row_warp, u32 k_warp, u32 lane) {
    u32 k = k_of_matrix_row(lane), pack = row_warp * ROW_BLOCKS * 2 + lane / 8 % 2;
    return (k_warp * 32 + k) * K_ROW_BYTES + (pack ^ swap_of_k(k)) * 16;
}

// sums += this warp's rows and k steps of a stage x the first kGroups groups of 8 tokens; unrolled, so loads run ahead.
template <int kGroups>
__device__ __forceinline__ void multiply_stage(Sums& sums, u32 weights, u32 tokens, const u32 (&packs)[STEPS], u32 k_warp) {
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        if ((s + 1) * K_WARPS > BLOCK_K / 32 && s * K_WARPS + k_warp >= BLOCK_K / 32) break;
        Fragment low[ROW_BLOCKS], high[ROW_BLOCKS];
#pragma unroll
        for (int b = 0; b < ROW_BLOCKS; b++) {
#if TRANSPOSED
            load_transposed_fragments(low[b], high[b], (weights ^ b * 32) + s * K_WARPS * 32 * K_ROW_BYTES, K_ROW_BYTES);
#else
            low[b] = load_fragment(weights + packs[s] + b * 16 * ROW_BYTES);
            high[b] = load_fragment(weights + packs[s] + (b * 16 + 8) * ROW_BYTES);
#endif
        }
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
            Fragment of_tokens = load_fragment(tokens + packs[s] + g * TOKEN_WARPS * 8 * ROW_BYTES);
#pragma unroll
            for (int b = 0; b < ROW_BLOCKS; b++) multiply(sums[b][g], low[b], high[b], of_tokens, scalar_t());
        }
    }
}

// The smallest compiled number of groups that holds `groups`.
template <int kGroups>
__device__ __forceinline__ void multiply_groups(u32 groups, Sums& sums, u32 weights, u32 tokens, const u32 (&packs)[STEPS], u32 k_warp) {
    constexpr int kNext = kGroups < 4 ? kGroups + 1 : kGroups + 2, kMore = kNext < TOKEN_GROUPS ? kNext : TOKEN_GROUPS;
    if constexpr (kGroups < TOKEN_GROUPS) {
        if (groups > kGroups) return multiply_groups<kMore>(groups, sums, weights, tokens, packs, k_warp);
    }
    multiply_stage<kGroups>(sums, weights, tokens, packs, k_warp);
}

typedef Pack<scalar_t, 2 * ROW_BLOCKS> Biases;

// The biases of this lane's rows of a tile. Zeros past the tile, and in all but the first of the K_WARPS.
template <class Gemm> __device__ __forceinline__ Biases biases_of(const Gemm& gemm, const Cursor<Gemm>& tile) {
    Biases biases = {};
    u32 warp = threadIdx.x / 32, row = warp % ROW_WARPS * (ROW_BLOCKS * 16) + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2 * ROW_BLOCKS; i++, row += 8) {
        if (!HAS_BIAS || K_WARPS > 1 && warp >= ROW_WARPS || Gemm::unit_of_row(row) >= tile.units) continue;
        biases.values[i] = load_from_l2(gemm.bias + Gemm::row_of(tile.chunk.expert, tile.first_unit, row));
    }
    return biases;
}

__device__ __forceinline__ void begin_sums(Sums& sums, Biases biases) {
#pragma unroll
    for (int b = 0; b < ROW_BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < TOKEN_GROUPS * 4; i++) {
            sums[b][i / 4][i % 4] = HAS_BIAS ? to_float(biases.values[b * 2 + i / 2 % 2]) : 0.0f;
        }
    }
}

// What a lane needs for 32 of an adapter's k: of its weight rows and of its token in each group.
struct RankStep {
    Fragment low[ROW_BLOCKS], high[ROW_BLOCKS], tokens[TOKEN_GROUPS];
};

__device__ __forceinline__ Fragment fragment_from_l2(const scalar_t* address) {
    const u64* words = reinterpret_cast<const u64*>(address);
    u64 first = load_from_l2(words), second = load_from_l2(words + 1);
    return {(u32)first, (u32)(first >> 32), (u32)second, (u32)(second >> 32)};
}

// Zeros past the rank, the tile and its tokens.
template <class Gemm> __device__ __forceinline__ RankStep load_rank_step(const Gemm& gemm, const Cursor<Gemm>& tile, u32 index) {
    RankStep step = {};
    Place place;
    u32 lane = threadIdx.x % 32, k = (index * K_WARPS + place.k_warp) * 32 + lane % 4 * 8;
    if (k >= LOW_RANK || tile.done()) return step;
    u32 row = place.row_warp * (ROW_BLOCKS * 16) + lane / 4;
#pragma unroll
    for (int half = 0; half < 2 * ROW_BLOCKS; half++, row += 8) {
        if (Gemm::unit_of_row(row) >= tile.units) continue;
        Fragment& fragment = half % 2 ? step.high[half / 2] : step.low[half / 2];
#if TRANSPOSED
        const scalar_t* from = gemm.factor + ((u64)tile.chunk.expert * LOW_RANK + k) * (2 * Gemm::kUnits) +
                               Gemm::row_of(0, tile.first_unit, row);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 bits = load_from_l2(reinterpret_cast<const unsigned short*>(from + (u64)i * (2 * Gemm::kUnits)));
            fragment.words[i / 2] |= bits << i % 2 * 16;
        }
#else
        fragment = fragment_from_l2(gemm.factor + Gemm::row_of(tile.chunk.expert, tile.first_unit, row) * LOW_RANK + k);
#endif
    }
#pragma unroll
    for (int g = 0; g < TOKEN_GROUPS; g++) {
        u32 token = (g * TOKEN_WARPS + place.token_warp) * 8 + lane / 4;
        if (token < tile.chunk.tokens) step.tokens[g] = fragment_from_l2(gemm.low + (u64)(tile.chunk.first_slot + token) * LOW_RANK + k);
    }
    return step;
}

// sums += what the adapter adds; with RANK_AHEAD the first step has been loaded.
template <class Gemm>
__device__ __forceinline__ void add_adapter(const Gemm& gemm, const Cursor<Gemm>& tile, Sums& sums, RankStep step) {
    Place place;
#pragma unroll 1
    for (int index = 0; index < RANK_STEPS; index++) {
        if ((index * K_WARPS + place.k_warp) * 32 >= LOW_RANK) break;
        if (index > 0 || !RANK_AHEAD) step = load_rank_step(gemm, tile, index);
#pragma unroll
        for (int g = 0; g < TOKEN_GROUPS; g++) {
            if ((g * TOKEN_WARPS + (int)place.token_warp) * 8 >= tile.chunk.tokens) continue;
#pragma unroll
            for (int b = 0; b < ROW_BLOCKS; b++) multiply(sums[b][g], step.low[b], step.high[b], step.tokens[g], scalar_t());
        }
    }
}

// Stores a tile's outputs. The sums go through shared memory, PASS_TOKENS tokens at a time: the K_WARPS parts of a sum meet
// there, and a warp then writes neighbouring outputs of one token. Nothing here waits for global memory, as the ring stands
// still meanwhile: with a look-up for each token experts_down took 10% longer at 512 tokens.
template <class Gemm>
__device__ __forceinline__ void store_tile(const Gemm& gemm, const Cursor<Gemm>& tile, const Sums& sums, float* shared) {
    Place place;
    u32 lane = threadIdx.x % 32;
    float* mine = shared + (place.k_warp * PASS_TOKENS + place.token_warp * 8 + lane % 4 * 2) * SUMS_PITCH +
                  place.row_warp * (ROW_BLOCKS * 16) + lane / 4;
#pragma unroll
    for (int first = 0; first < TOKENS; first += PASS_TOKENS) {
        if (first >= tile.chunk.tokens) break;
        sync_threads(1, CONSUMER_THREADS);  // the last pass has been read
#pragma unroll
        for (int group = 0; group < PASS_TOKENS / 8 / TOKEN_WARPS; group++) {
            if (first / 8 / TOKEN_WARPS + group >= TOKEN_GROUPS) break;
#pragma unroll
            for (int b = 0; b < ROW_BLOCKS; b++) {
                const float* s = sums[b][first / 8 / TOKEN_WARPS + group];
                float* to = mine + group * 8 * SUMS_PITCH + b * 16;
                to[0] = s[0], to[SUMS_PITCH] = s[1], to[8] = s[2], to[SUMS_PITCH + 8] = s[3];
            }
        }
        sync_threads(1, CONSUMER_THREADS);
        u32 tokens = min(tile.chunk.tokens - first, PASS_TOKENS);
        u32 unit = threadIdx.x % (TILE_UNITS / 2) * 2;
        if (unit >= tile.units) continue;
        for (u32 token = threadIdx.x / (TILE_UNITS / 2); token < tokens; token += CONSUMER_THREADS / (TILE_UNITS / 2)) {
            const float* from = shared + token * SUMS_PITCH + Gemm::first_row_of_unit(unit);
            Pack<float, 2> one = load_pack<float, 2>(from), other = load_pack<float, 2>(from + Gemm::kSecondRows);
#pragma unroll
            for (int w = 1; w < K_WARPS; w++) {
                from += PASS_TOKENS * SUMS_PITCH;
                Pack<float, 2> more = load_pack<float, 2>(from), more_other = load_pack<float, 2>(from + Gemm::kSecondRows);
                one.values[0] += more.values[0], one.values[1] += more.values[1];
                other.values[0] += more_other.values[0], other.values[1] += more_other.values[1];
            }
            gemm.store(tile.chunk.first_slot + first + token, tile.first_unit + unit, one, other);
        }
    }
}

extern __shared__ __align__(128) unsigned char block_memory[];  // the ring, then the sums of store_tile

struct Ring {
    u32 data, filled, emptied;  // shared addresses: STAGES stages, and two barriers of each
};

#if WHOLE_ROWS
// kTokensAreNew: the previous grid writes the tokens, but not weights and plan, so the first weights come before its end.
template <bool kTokensAreNew, class Gemm>
__device__ __forceinline__ void fill_ring(const Gemm& gemm, const Plan& plan, Ring ring) {
    if (threadIdx.x != CONSUMER_THREADS) return;  // one thread orders all copies
    u64 evict_first = evict_first_policy(), evict_last = evict_last_policy();
    auto load_weights = [&](const Cursor<Gemm>& cursor, u32 stage) {
        u32 weight_bytes = cursor.units * 2 * ROW_BYTES, token_bytes = cursor.chunk.tokens * ROW_BYTES;
        arrive_expecting(ring.filled + stage * 8, weight_bytes + token_bytes);
        copy_bulk(ring.data + stage * STAGE_BYTES, weight_row(gemm, cursor.chunk.expert, cursor.first_unit, 0), weight_bytes,
                  ring.filled + stage * 8, evict_first);
    };
    Cursor<Gemm> cursor(plan);
    if (kTokensAreNew) {
        Cursor<Gemm> ahead = cursor;
        for (int s = 0; s < STAGES && !ahead.done(); s++, ahead.advance(plan)) load_weights(ahead, s);
        wait_for_previous_grid();
        order_writes_before_bulk_copies();
    }
    bool ahead = kTokensAreNew;  // in the first round
    for (Turn turn = {0, 1}; !cursor.done(); cursor.advance(plan)) {
        wait_barrier(ring.emptied + turn.stage * 8, turn.parity);
        if (!ahead) load_weights(cursor, turn.stage);
        copy_bulk(ring.data + turn.stage * STAGE_BYTES + WEIGHT_BYTES, gemm.token_row(plan, cursor.chunk.first_slot),
                  cursor.chunk.tokens * ROW_BYTES, ring.filled + turn.stage * 8, evict_last);
        turn.next();
        if (turn.stage == 0) ahead = false;
    }
}
#else
// One producer thread's share of the copies: one 16-byte pack of every ROWS_PER_PASS-th row, and where weights are transposed,
// one of every K_ROWS_PER_PASS-th k row.
template <class Gemm> struct Loader {
    const Gemm& gemm;
    const Plan& plan;
    Cursor<Gemm> cursor;
    u32 row, column, offset;       // first row, its pack's first element, and where it goes in a stage
    int units_left, tokens_left;   // of the tile, from the first row's on; none past the end
    const scalar_t* weights;
    const scalar_t* tokens[TOKEN_PASSES];
    u64 evict_first, evict_last;
#if TRANSPOSED
    u32 first_k, first_of_pack, k_row_offset;  // of the weights: first k row, its pack's first row, and where it goes
#endif

    __device__ __forceinline__ Loader(const Gemm& gemm, const Plan& plan, u32 thread) : gemm(gemm), plan(plan), cursor(plan) {
        evict_first = evict_first_policy(), evict_last = evict_last_policy();
        row = thread / PACKS_PER_ROW;
        u32 pack = thread % PACKS_PER_ROW;
        column = pack * 8;
        offset = row * ROW_BYTES + (pack ^ (row % 2 * 4)) * 16;
#if TRANSPOSED
        first_k = thread / PACKS_PER_K_ROW;
        pack = thread % PACKS_PER_K_ROW;
        first_of_pack = pack * 8;
        k_row_offset = first_k * K_ROW_BYTES + (pack ^ swap_of_k(first_k)) * 16;
#endif
        weights = gemm.weights;
#pragma unroll
        for (int i = 0; i < TOKEN_PASSES; i++) tokens[i] = weights;
        open();
    }

    __device__ __forceinline__ void open() {
        units_left = tokens_left = 0;
        if (cursor.done()) return;
#if TRANSPOSED
        units_left = (int)cursor.units - (int)Gemm::unit_of_row(first_of_pack);
        tokens_left = cursor.chunk.tokens - (int)row;
        weights = gemm.weights + ((u64)cursor.chunk.expert * Gemm::kDepth + first_k) * (2 * Gemm::kUnits) +
                  Gemm::row_of(0, cursor.first_unit, first_of_pack);
#else
        units_left = (int)cursor.units - (int)Gemm::unit_of_row(row);
        tokens_left = cursor.chunk.tokens - (int)row;
        weights = weight_row(gemm, cursor.chunk.expert, cursor.first_unit, row) + column;
#endif
#pragma unroll
        for (int i = 0; i < TOKEN_PASSES; i++) {
            int token = i * ROWS_PER_PASS;
            if (token < tokens_left) tokens[i] = gemm.token_row(plan, cursor.chunk.first_slot + row + token) + column;
        }
    }

    // 16 up to the depth, 0 past it.
    __device__ __forceinline__ u32 bytes(u32 k) const { return Gemm::kDepth % BLOCK_K == 0 || cursor.k + k < Gemm::kDepth ? 16 : 0; }

    __device__ __forceinline__ void load_weights(u32 stage) const {
#if TRANSPOSED
        const scalar_t* from = weights + (u64)cursor.k * (2 * Gemm::kUnits);
#pragma unroll
        for (int k = 0; k < BLOCK_K; k += K_ROWS_PER_PASS) {
            copy_16(units_left > 0, stage + (k_row_offset ^ swap_of_k(k) * 16) + k * K_ROW_BYTES, from + (u64)k * (2 * Gemm::kUnits),
                    bytes(first_k + k), evict_first);
        }
#else
#pragma unroll
        for (int i = 0; i < WEIGHT_PASSES; i++) {
            copy_16((int)Gemm::unit_of_row(i * ROWS_PER_PASS) < units_left, stage + offset + i * ROWS_PER_PASS * ROW_BYTES,
                    weights + cursor.k + Gemm::row_of(0, 0, i * ROWS_PER_PASS) * Gemm::kDepth, bytes(column), evict_first);
        }
#endif
    }

    __device__ __forceinline__ void load_tokens(u32 stage) const {
#pragma unroll
        for (int i = 0; i < TOKEN_PASSES; i++) {
            copy_16(i * ROWS_PER_PASS < tokens_left, stage + WEIGHT_BYTES + offset + i * ROWS_PER_PASS * ROW_BYTES,
                    tokens[i] + cursor.k, bytes(column), evict_last);
        }
    }

    __device__ __forceinline__ void advance() {
        if (!cursor.done() && cursor.advance(plan)) open();
    }
};

// kTokensAreNew: the previous grid writes the tokens, but not weights and plan, so the first weights come before its end.
template <bool kTokensAreNew, class Gemm>
__device__ __forceinline__ void fill_ring(const Gemm& gemm, const Plan& plan, Ring ring) {
    Loader<Gemm> loader(gemm, plan, threadIdx.x - CONSUMER_THREADS);
    if (kTokensAreNew) {
        Loader<Gemm> ahead = loader;
        for (int s = 0; s < STAGES; s++, ahead.advance()) ahead.load_weights(ring.data + s * STAGE_BYTES);
        wait_for_previous_grid();
    }
    bool ahead = kTokensAreNew;  // in the first round
    for (Turn turn = {0, 1}; !loader.cursor.done(); loader.advance()) {
        u32 stage = ring.data + turn.stage * STAGE_BYTES;
        wait_barrier(ring.emptied + turn.stage * 8, turn.parity);
        if (!ahead) loader.load_weights(stage);
        loader.load_tokens(stage);
        arrive_after_copies(ring.filled + turn.stage * 8);
        turn.next();
        if (turn.stage == 0) ahead = false;
    }
    wait_for_copies();
}
#endif

template <class Gemm>
__device__ __forceinline__ void consume_ring(const Gemm& gemm, const Plan& plan, Ring ring, float* shared_sums) {
    Place place;
    u32 lane = threadIdx.x % 32;
    u32 swap = WHOLE_ROWS ? 0 : lane / 4 % 2 * 64;
    u32 packs[STEPS];  // where this lane's pack of each of its k steps lies in a row
#pragma unroll
    for (int s = 0; s < STEPS; s++) packs[s] = ((s * K_WARPS + place.k_warp) * 64 + lane % 4 * 16) ^ swap;
    u32 fragment_row = lane / 4 * ROW_BYTES;
    Sums sums = {};
    Cursor<Gemm> cursor(plan);
    if (HAS_BIAS) begin_sums(sums, biases_of(gemm, cursor));
    [[maybe_unused]] RankStep rank_step;
    if constexpr (LOW_RANK > 0 && RANK_AHEAD) rank_step = load_rank_step(gemm, cursor, 0);
    for (Turn turn = {0, 0}; !cursor.done(); turn.next()) {
        u32 stage = ring.data + turn.stage * STAGE_BYTES, rows = stage + fragment_row;
        wait_barrier(ring.filled + turn.stage * 8, turn.parity);
        if (place.row_warp * (ROW_BLOCKS * 8) < cursor.units) {
            u32 weights = TRANSPOSED ? stage + k_row_of_fragment(place.row_warp, place.k_warp, lane)
                                     : rows + place.row_warp * (ROW_BLOCKS * 16) * ROW_BYTES;
            u32 tokens = rows + WEIGHT_BYTES + place.token_warp * 8 * ROW_BYTES;
            // Every TOKEN_WARPS-th group of 8 tokens, from the token_warp-th on.
            u32 groups = ((cursor.chunk.tokens + 7) / 8 + TOKEN_WARPS - 1 - place.token_warp) / TOKEN_WARPS;
            multiply_groups<1>(groups, sums, weights, tokens, packs, place.k_warp);
        }
        __syncwarp();
        if (lane == 0) arrive(ring.emptied + turn.stage * 8);

        Cursor<Gemm> tile = cursor;
        if (!cursor.advance(plan)) continue;
        if constexpr (LOW_RANK > 0) add_adapter(gemm, tile, sums, rank_step);
        // Of the next tile, on their way while this one is stored.
        Biases biases = biases_of(gemm, cursor);
        if constexpr (LOW_RANK > 0 && RANK_AHEAD) rank_step = load_rank_step(gemm, cursor, 0);
        store_tile(gemm, tile, sums, shared_sums);
        begin_sums(sums, biases);
    }
}

// Ends with every output of this block stored. With LOW_RANK the previous grid writes low, for which the consumers wait; without
// kTokensAreNew all else that is read must be two grids back.
template <bool kTokensAreNew, class Gemm>
__device__ __forceinline__ void stream_experts(const Gemm& gemm, const Plan& plan) {
    __shared__ __align__(8) u64 barriers[2][STAGES];
    Ring ring = {shared_address(block_memory), shared_address(barriers[0]), shared_address(barriers[1])};
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            init_barrier(ring.filled + s * 8, WHOLE_ROWS ? 1 : PRODUCER_THREADS);
            init_barrier(ring.emptied + s * 8, WARPS);
        }
        publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x < CONSUMER_THREADS) {
        if (kTokensAreNew || LOW_RANK) wait_for_previous_grid(), release_next_grid();
        consume_ring(gemm, plan, ring, reinterpret_cast<float*>(block_memory + STAGES * STAGE_BYTES));
    } else {
        fill_ring<kTokensAreNew>(gemm, plan, ring);
    }
}
