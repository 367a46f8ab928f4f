// Fills the ring. Where rows are whole, the copy engine does; else four warps copy 16 bytes at a time, and have a loader each for
// weights, for what groups of weights share, and for tokens.
#pragma once
#include "../ring.cuh"
#include "schedule.cuh"

static_assert(HAS_BULK_COPY || !WHOLE_ROWS, "WHOLE_ROWS needs bulk copies, which begin with sm_90");

#if WHOLE_ROWS
// kTokensAreNew: the previous grid writes the tokens, but not weights and plan, so the first weights come before its end.
template <bool kTokensAreNew, class Gemm>
__device__ __forceinline__ void fill_ring(const Gemm& gemm, const Plan& plan, Ring ring) {
    if (threadIdx.x != CONSUMER_THREADS) return;  // one thread orders all copies
    u64 evict_first = evict_first_policy(), evict_last = evict_last_policy();
    auto load_weights = [&](const Cursor<Gemm>& cursor, u32 stage) {
        u32 weight_bytes = cursor.units * 2 * WEIGHT_ROW_BYTES, token_bytes = cursor.chunk.tokens * TOKEN_ROW_BYTES;
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
        copy_bulk(ring.data + turn.stage * STAGE_BYTES + FIRST_TOKEN, gemm.token_row(plan, cursor.chunk.first_slot),
                  cursor.chunk.tokens * TOKEN_ROW_BYTES, ring.filled + turn.stage * 8, evict_last);
        turn.next();
        if (turn.stage == 0) ahead = false;
    }
}
#else
// How the producers copy rows of kPacks packs of 16 bytes: each thread the same pack of every kRows-th row, from its own on. What
// is left of the threads has none: kRows has one binary digit, so that a row and a multiple of kRows have none in common.
template <u32 kPacks> struct Share {
    static __device__ __forceinline__ constexpr u32 largest_power(u32 most) {
        return most < 2 ? most : 2 * largest_power(most / 2);
    }

    static constexpr u32 kRows = largest_power(PRODUCER_THREADS / kPacks);
    static_assert(kRows > 0, "BLOCK_K");
    u32 row, pack;
    bool copies;

    __device__ __forceinline__ Share(u32 thread) : row(thread / kPacks), pack(thread % kPacks) {
        copies = kPacks * kRows == PRODUCER_THREADS || row < kRows;
    }
};

// 16 up to the depth, 0 past it.
template <class Gemm> __device__ __forceinline__ u32 bytes_at(u32 k) {
    return Gemm::kDepth % BLOCK_K == 0 || k < Gemm::kDepth ? 16 : 0;
}

#if TRANSPOSED
// One producer thread's share of a tile's weights: 8 neighbouring rows at some k.
template <class Gemm> struct WeightLoader {
    typedef Share<PACKS_PER_K_ROW> Mine;
    static constexpr u64 kPitch = Weights::bytes(2 * Gemm::kUnits);  // of a k row
    u32 first_k, first_row, offset;  // of the first copy, and where it goes in a stage
    int units_left;                  // of the tile, from the first row's on; none past the end
    const unsigned char* from;

    __device__ __forceinline__ WeightLoader(const Gemm& gemm, u32 thread) : units_left(0), from(gemm.weights) {
        Mine mine(thread);
        static_assert(Mine::kRows * PACKS_PER_K_ROW == PRODUCER_THREADS, "TRANSPOSED");
        first_k = mine.row, first_row = mine.pack * 8;
        offset = first_k * K_ROW_BYTES + (mine.pack ^ swap_of_k(first_k)) * 16;
    }

    // Past the last tile there is nothing to copy.
    __device__ __forceinline__ void close() { units_left = 0; }

    __device__ __forceinline__ void open(const Gemm& gemm, const Cursor<Gemm>& cursor) {
        units_left = (int)cursor.units - (int)Gemm::unit_of_row(first_row);
        from = gemm.weights + ((u64)cursor.chunk.expert * Gemm::kDepth + first_k) * kPitch +
               Weights::bytes(Gemm::row_of(0, cursor.first_unit, first_row));
    }

    __device__ __forceinline__ void load(u32 stage, u32 k, u64 policy) const {
        const unsigned char* at = from + (u64)k * kPitch;
#pragma unroll
        for (int i = 0; i < BLOCK_K; i += Mine::kRows) {
            copy_16(units_left > 0, stage + (offset ^ swap_of_k(i) * 16) + i * K_ROW_BYTES, at + (u64)i * kPitch,
                    bytes_at<Gemm>(k + (first_k + i)), policy);
        }
    }
};
#else
// One producer thread's share of a tile's weights: one pack of some rows.
template <class Gemm> struct WeightLoader {
    typedef Share<WEIGHT_ROW_BYTES / 16> Mine;
    Mine mine;
    u32 place, offset;  // of its pack in its first row, and that in a stage
    int units_left;     // of the tile, from the first row's on; none past the end
    const unsigned char* from;

    __device__ __forceinline__ WeightLoader(const Gemm& gemm, u32 thread) : mine(thread), units_left(0), from(gemm.weights) {
        place = mine.pack ^ Weights::swap_of_row(mine.row);
        offset = mine.row * WEIGHT_ROW_BYTES + place * 16;
    }

    // Past the last tile there is nothing to copy.
    __device__ __forceinline__ void close() { units_left = 0; }

    __device__ __forceinline__ void open(const Gemm& gemm, const Cursor<Gemm>& cursor) {
        units_left = mine.copies ? (int)cursor.units - (int)Gemm::unit_of_row(mine.row) : 0;
        from = weight_row(gemm, cursor.chunk.expert, cursor.first_unit, mine.row) + mine.pack * 16;
    }

    __device__ __forceinline__ void load(u32 stage, u32 k, u64 policy) const {
#pragma unroll
        for (int i = 0; i < TILE_ROWS; i += Mine::kRows) {
            copy_16((int)Gemm::unit_of_row(i) < units_left,
                    stage + offset + i * WEIGHT_ROW_BYTES + ((place ^ Weights::swap_of_row(i)) - place) * 16,
                    from + Weights::bytes(k) + Gemm::row_of(0, 0, i) * Weights::bytes(Gemm::kDepth),
                    bytes_at<Gemm>(k + mine.pack * Weights::kOfPack), policy);
        }
    }
};
#endif

// One producer thread's share of what a tile's groups of weights share: one pack of some rows. kFirst: where they are in a stage.
template <class Gemm, class Values, u32 kFirst> struct GroupLoader {
    typedef Share<Values::kPacks> Mine;
    static constexpr u32 kRowBytes = Values::row_bytes(Gemm::kDepth);
    Mine mine;
    int units_left;  // as of WeightLoader
    const unsigned char* from;

    __device__ __forceinline__ GroupLoader(const unsigned char* values, u32 thread) : mine(thread), units_left(0), from(values) {}

    __device__ __forceinline__ void close() { units_left = 0; }

    __device__ __forceinline__ void open(const unsigned char* values, const Cursor<Gemm>& cursor) {
        units_left = mine.copies ? (int)cursor.units - (int)Gemm::unit_of_row(mine.row) : 0;
        from = values + Gemm::row_of(cursor.chunk.expert, cursor.first_unit, mine.row) * kRowBytes + mine.pack * 16;
    }

    __device__ __forceinline__ void load(u32 stage, u32 k, u64 policy) const {
        u32 first = Values::first_byte(k), bytes = first + mine.pack * 16 < kRowBytes ? 16 : 0;
#pragma unroll
        for (int i = 0; i < TILE_ROWS; i += Mine::kRows) {
            copy_16((int)Gemm::unit_of_row(i) < units_left,
                    stage + kFirst + (mine.row + i) * Values::kStageRowBytes + mine.pack * 16,
                    from + first + Gemm::row_of(0, 0, i) * kRowBytes, bytes, policy);
        }
    }
};

template <class Gemm, u32 kFirst> struct GroupLoader<Gemm, NoValues, kFirst> {
    __device__ __forceinline__ GroupLoader(const unsigned char*, u32) {}

    __device__ __forceinline__ void close() {}

    __device__ __forceinline__ void open(const unsigned char*, const Cursor<Gemm>&) {}

    __device__ __forceinline__ void load(u32, u32, u64) const {}
};

// One producer thread's share of a chunk's activations, whose rows lie anywhere: one pack of some tokens.
template <class Gemm> struct TokenLoader {
    typedef Share<TOKEN_ROW_BYTES / 16> Mine;
    static constexpr int kRows = Mine::kRows, kPasses = (TOKENS + kRows - 1) / kRows;
    Mine mine;
    u32 place, offset;  // of its pack in its first row, and that in a stage
    int tokens_left;    // of the chunk, from the first row's on; none past the end
    const scalar_t* from[kPasses];

    __device__ __forceinline__ TokenLoader(const Gemm& gemm, u32 thread) : mine(thread), tokens_left(0) {
        place = mine.pack ^ swap_of_token(mine.row);
        offset = FIRST_TOKEN + mine.row * TOKEN_ROW_BYTES + place * 16;
#pragma unroll
        for (int i = 0; i < kPasses; i++) from[i] = reinterpret_cast<const scalar_t*>(gemm.weights);  // read by no copy
    }

    __device__ __forceinline__ void close() { tokens_left = 0; }

    __device__ __forceinline__ void open(const Gemm& gemm, const Plan& plan, const Cursor<Gemm>& cursor) {
        tokens_left = mine.copies ? cursor.chunk.tokens - (int)mine.row : 0;
#pragma unroll
        for (int i = 0; i < kPasses; i++) {
            int token = i * kRows;
            if (token < tokens_left) from[i] = gemm.token_row(plan, cursor.chunk.first_slot + mine.row + token) + mine.pack * 8;
        }
    }

    __device__ __forceinline__ void load(u32 stage, u32 k, u64 policy) const {
#pragma unroll
        for (int i = 0; i < kPasses; i++) {
            int token = i * kRows;
            copy_16(token < tokens_left,
                    stage + offset + token * TOKEN_ROW_BYTES + ((place ^ swap_of_token(token)) - place) * 16, from[i] + k,
                    bytes_at<Gemm>(k + mine.pack * 8), policy);
        }
    }
};

// One producer thread's share of all copies, stage by stage.
template <class Gemm> struct Loader {
    const Gemm& gemm;
    const Plan& plan;
    Cursor<Gemm> cursor;
    WeightLoader<Gemm> weights;
    TokenLoader<Gemm> tokens;
    GroupLoader<Gemm, Weights::Scales, FIRST_SCALE> scales;
    GroupLoader<Gemm, Weights::Zeros, FIRST_ZERO> zeros;
    u64 evict_first, evict_last;

    __device__ __forceinline__ Loader(const Gemm& gemm, const Plan& plan, u32 thread)
        : gemm(gemm), plan(plan), cursor(plan), weights(gemm, thread), tokens(gemm, thread), scales(gemm.scales, thread),
          zeros(gemm.zeros, thread) {
        evict_first = constant_evict_first_policy(), evict_last = constant_evict_last_policy();
        open();
    }

    __device__ __forceinline__ void open() {
        weights.close(), scales.close(), zeros.close(), tokens.close();
        if (cursor.done()) return;
        weights.open(gemm, cursor);
        tokens.open(gemm, plan, cursor);
        scales.open(gemm.scales, cursor);
        zeros.open(gemm.zeros, cursor);
    }

    __device__ __forceinline__ void load_weights(u32 stage) const {
        weights.load(stage, cursor.k, evict_first);
        scales.load(stage, cursor.k, evict_first);
        zeros.load(stage, cursor.k, evict_first);
    }

    __device__ __forceinline__ void load_tokens(u32 stage) const { tokens.load(stage, cursor.k, evict_last); }

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
        for (u32 s = first_stage(); s < STAGES; s++, ahead.advance()) ahead.load_weights(ring.data + s * STAGE_BYTES);
        wait_for_previous_grid();
    }
    bool ahead = kTokensAreNew;  // in the first round
    for (Turn turn = {first_stage(), 1}; !loader.cursor.done(); loader.advance()) {
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
