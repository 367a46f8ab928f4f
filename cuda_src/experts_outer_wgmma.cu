// experts_outer_wgmma: for each expert, left^T right over its slots: the gradient of its weight, at the speed of the tensor cores.
//
// Reads  dense_map      TensorMap of the operand with a row for each slot (kernels/experts_outer_wgmma.py)
//        left           [rows, num_lines] SCALAR     LEFT_GATHERED: a row for each token, else one for each slot
//        right          [rows, num_columns] SCALAR   the other way round
//        expert_offsets [num_experts + 1] i32, token_of_slot [slots] i32   of sort_by_expert.cu; nothing is read past the last slot
// Writes output         [num_experts, num_lines, num_columns] SCALAR       zeros for an expert without slots
// Grid   any; one block per multiprocessor. Block BLOCK_THREADS. Smem STAGES * STAGE_BYTES + sizeof(Shared).
// Needs  num_lines % 8 == 0, num_columns % 8 == 0, 16-byte aligned rows, sm_90a.
// Maths  fp32 sums over ascending slots, one rounding at the store. One owner for each element: the same bits every run.
// Why    Slots are what is summed over, so both operands lie across it: a stage of the ring is BLOCK_K rows of both, and the
//        products read them transposed. An expert has few slots and a large gradient, so a tile is as large as registers allow:
//        what L2 gives to a multiprocessor limits the loop, and 256 x 192 take 30% less of it than two tiles of 128 x 192.
//        Each consumer warpgroup has half of a tile's lines and waits for the other only by way of the ring, so one can store
//        while the other multiplies, and the producers fill the ring with the next tile while both store. The copy engine
//        brings what isn't gathered, but for an expert's last slots: a box would go on to the next expert's.
// Order  Tiles are dealt out in turn: by expert, then by lines, then by columns. So blocks at work together share an expert's
//        rows in L2, and neighbours write neighbouring parts of the same lines. The output leaves L2 first: nothing reads it.
#include "common/dtypes.cuh"

#if !defined(SCALAR) || !defined(LEFT_GATHERED) || !defined(BLOCK_THREADS) || !defined(BLOCK_N) || !defined(BLOCK_K) || !defined(STAGES)
#error "define SCALAR, LEFT_GATHERED, BLOCK_THREADS, BLOCK_N, BLOCK_K and STAGES"
#endif
typedef SCALAR scalar_t;
#define TRANSPOSED_A 1
#define TRANSPOSED 1
#include "common/ring.cuh"
#include "common/tensor_copy.cuh"
#include "common/warp.cuh"
#include "common/wgmma.cuh"

#define CONSUMER_THREADS 256
#define PRODUCER_THREADS 128
#define CONSUMER_REGISTERS 224
#define PRODUCER_REGISTERS 56
#define PRODUCTS 2  // of a consumer warpgroup, each of 64 lines
#define BLOCK_M (2 * 64 * PRODUCTS)
#define LEFT_BYTES (BLOCK_M / 64 * GROUP_BYTES)
#define RIGHT_BYTES (BLOCK_N / 64 * GROUP_BYTES)
#define STAGE_BYTES (LEFT_BYTES + RIGHT_BYTES)
#define DENSE_BYTES (LEFT_GATHERED ? RIGHT_BYTES : LEFT_BYTES)
#define ROWS_PER_PASS (PRODUCER_THREADS / 8)
#define PASSES (BLOCK_K / ROWS_PER_PASS)
static_assert(BLOCK_N % 64 == 0, "columns of a stage come 64 at a time");
static_assert(BLOCK_THREADS == CONSUMER_THREADS + PRODUCER_THREADS, "BLOCK_THREADS");

struct Shared {
    u64 filled[STAGES], emptied[STAGES];
};

extern __shared__ __align__(1024) unsigned char block_memory[];  // the ring, then Shared

struct Ring {
    Shared& shared;
    u32 stages;  // shared address

    __device__ __forceinline__ u32 left(u32 stage) const { return stages + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 right(u32 stage) const { return left(stage) + LEFT_BYTES; }
    __device__ __forceinline__ u32 filled(u32 stage) const { return shared_address(shared.filled) + stage * 8; }
    __device__ __forceinline__ u32 emptied(u32 stage) const { return shared_address(shared.emptied) + stage * 8; }
};

struct Tile {
    u32 expert, line, column;  // where it starts
    int slot, past;            // of the expert
};

struct Problem {
    const TensorMap& dense_map;
    const scalar_t* left;
    const scalar_t* right;
    const int* expert_offsets;
    const int* token_of_slot;
    scalar_t* output;
    u32 num_lines, num_columns, num_experts;

    __device__ __forceinline__ u32 tiles_of_line() const { return (num_columns + BLOCK_N - 1) / BLOCK_N; }
    __device__ __forceinline__ u32 tiles_of_expert() const { return (num_lines + BLOCK_M - 1) / BLOCK_M * tiles_of_line(); }
    __device__ __forceinline__ u32 num_tiles() const { return num_experts * tiles_of_expert(); }

    __device__ __forceinline__ Tile tile(u32 index) const {
        u32 expert = index / tiles_of_expert(), of_expert = index % tiles_of_expert();
        u32 line = of_expert / tiles_of_line() * BLOCK_M, column = of_expert % tiles_of_line() * BLOCK_N;
        return {expert, line, column, expert_offsets[expert], expert_offsets[expert + 1]};
    }
};

// The slots of a tile, BLOCK_K at a time, of one tile after the other; a thread has every ROWS_PER_PASS-th of them.
struct Steps {
    const Problem& problem;
    u32 index;  // of the tile
    Tile tile;
    int tokens[PASSES];  // of the thread's slots; -1 past the expert's last

    __device__ __forceinline__ Steps(const Problem& problem, u32 first) : problem(problem), index(first) { find(); }

    __device__ __forceinline__ bool done() const { return index >= problem.num_tiles(); }

    __device__ __forceinline__ void next() {
        tile.slot += BLOCK_K;
        if (tile.slot < tile.past) return load_tokens();
        index += gridDim.x;
        find();
    }

    // The next tile from this one on that has slots.
    __device__ __forceinline__ void find() {
        for (; !done(); index += gridDim.x) {
            tile = problem.tile(index);
            if (tile.slot < tile.past) return load_tokens();
        }
    }

    __device__ __forceinline__ int slot(int pass) const {
        return tile.slot + threadIdx.x % PRODUCER_THREADS / 8 + pass * ROWS_PER_PASS;
    }

    __device__ __forceinline__ void load_tokens() {
#pragma unroll
        for (int i = 0; i < PASSES; i++) tokens[i] = slot(i) < tile.past ? problem.token_of_slot[slot(i)] : -1;
    }
};

// kColumns columns from `first` on of BLOCK_K rows of an operand, each thread one 16-byte pack of each 64. A row that is -1 is
// zeros: the others' NaNs would not be, times zero. What lies past the last column stays what it was, in sums that nobody stores.
template <int kColumns>
__device__ __forceinline__ void load_rows(u32 stage, const scalar_t* operand, u32 num_columns, u32 first, const int (&rows)[PASSES],
                                          u64 policy) {
    u32 thread = threadIdx.x % PRODUCER_THREADS, pack = thread % 8, column = first + pack * 8;
    u32 past = min(first + kColumns, num_columns);
    u32 to = stage + thread / 8 * ROW_BYTES + (pack ^ thread / 8 % 8) * 16;
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        const scalar_t* source = operand + (u64)(u32)max(rows[i], 0) * num_columns + column;
        u32 bytes = rows[i] < 0 ? 0 : 16;
#pragma unroll
        for (int group = 0; group < kColumns / 64; group++) {
            u32 place = to + i * ROWS_PER_PASS * ROW_BYTES + group * GROUP_BYTES;
            copy_16(column + group * 64 < past, place, source + group * 64, bytes, policy);
        }
    }
}

// The dense operand's part of a stage. One thread.
__device__ __forceinline__ void load_boxes(const Problem& problem, const Ring& ring, const Tile& tile, u32 stage) {
    u32 to = LEFT_GATHERED ? ring.right(stage) : ring.left(stage), column = LEFT_GATHERED ? tile.column : tile.line;
#pragma unroll
    for (u32 group = 0; group < DENSE_BYTES / GROUP_BYTES; group++) {
        copy_box(to + group * GROUP_BYTES, problem.dense_map, column + group * 64, tile.slot, ring.filled(stage));
    }
}

// The tokens of a step are on their way while the step before is copied.
__device__ __forceinline__ void fill_ring(const Problem& problem, const Ring& ring) {
    u64 policy = evict_unchanged_policy();
    bool leader = threadIdx.x == CONSUMER_THREADS;
    Turn turn = {0, 1};
    for (Steps steps(problem, blockIdx.x); !steps.done(); turn.next()) {
        Tile tile = steps.tile;
        int tokens[PASSES], slots[PASSES];
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            tokens[i] = steps.tokens[i];
            slots[i] = steps.slot(i) < tile.past ? steps.slot(i) : -1;
        }
        steps.next();
        wait_barrier(ring.emptied(turn.stage), turn.parity);
        bool is_whole = tile.slot + BLOCK_K <= tile.past;
        if (leader) {
            arrive_expecting(ring.filled(turn.stage), is_whole ? DENSE_BYTES : 0);
            if (is_whole) load_boxes(problem, ring, tile, turn.stage);
        }
        if (LEFT_GATHERED || !is_whole) {
            auto& rows = LEFT_GATHERED ? tokens : slots;
            load_rows<BLOCK_M>(ring.left(turn.stage), problem.left, problem.num_lines, tile.line, rows, policy);
        }
        if (!LEFT_GATHERED || !is_whole) {
            auto& rows = LEFT_GATHERED ? slots : tokens;
            load_rows<BLOCK_N>(ring.right(turn.stage), problem.right, problem.num_columns, tile.column, rows, policy);
        }
        arrive_after_copies(ring.filled(turn.stage));
    }
    wait_for_copies();
}

typedef float TileSums[PRODUCTS][SUMS];

// sums = (add ? sums : 0) + kLines slots of a stage's left operand x its right one.
template <int kProducts, int kLines>
__device__ __forceinline__ void multiply_lines(TileSums& sums, u64 left, u64 right, bool add) {
    begin_products();
#pragma unroll
    for (int k = 0; k < kLines / 16; k++, left += NEXT_16_LINES, right += NEXT_16_LINES) {
#pragma unroll
        for (int i = 0; i < kProducts; i++) multiply_tiles(sums[i], left + i * (2 * GROUP_BYTES / 16), right, k > 0 || add, SCALAR());
    }
    commit_products();
    wait_for_products();
}

// sums = kProducts times 64 lines of this warpgroup x the tile's columns, over the expert's slots; zeros where it has none. The
// last slots are multiplied 16 at a time: whole stages would be 9% more products for 256 slots or so.
template <int kProducts>
__device__ __forceinline__ void multiply_tile(TileSums& sums, const Ring& ring, Turn& turn, u32 warpgroup, int slots) {
    for (int first = 0; first < slots; first += BLOCK_K, turn.next()) {
        wait_barrier(ring.filled(turn.stage), turn.parity);
        if (kProducts > 0) {
            order_copies_before_products();
            u64 left = transposed_descriptor(ring.left(turn.stage) + warpgroup * GROUP_BYTES);
            u64 right = transposed_descriptor(ring.right(turn.stage));
            int lines = slots - first;
            if (lines > BLOCK_K - 16) {
                multiply_lines<kProducts, BLOCK_K>(sums, left, right, first > 0);
            } else {
#pragma unroll 1
                for (int k = 0; k < lines; k += 16, left += NEXT_16_LINES, right += NEXT_16_LINES) {
                    multiply_lines<kProducts, 16>(sums, left, right, first + k > 0);
                }
            }
        }
        if (threadIdx.x % 32 == 0) arrive(ring.emptied(turn.stage));
    }
    if (slots > 0) return;
#pragma unroll
    for (int i = 0; i < kProducts; i++) {
#pragma unroll
        for (int j = 0; j < SUMS; j++) sums[i][j] = 0.0f;
    }
}

// words[i] of lane q of four lanes becomes words[q] of lane i.
__device__ __forceinline__ void transpose_among_four(u32 (&words)[4]) {
#pragma unroll
    for (int distance = 2; distance > 0; distance /= 2) {
        bool upper = threadIdx.x & distance;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & distance) continue;
            u32 got = __shfl_xor_sync(FULL_WARP, upper ? words[i] : words[i + distance], distance);
            if (upper) words[i] = got;
            else words[i + distance] = got;
        }
    }
}

__device__ __forceinline__ void store_16(scalar_t* to, const u32 (&words)[4], u64 policy) {
    asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;"
                 ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "l"(policy) : "memory");
}

// Lines `line` and line + 8 of the sums of one product. A lane has two neighbouring columns of every eight; of four eights it
// gets all columns of one, so that four lanes store 64 neighbouring bytes.
__device__ __forceinline__ void store(const Problem& problem, const Tile& tile, u32 line, const float (&sums)[SUMS], u64 policy) {
    u32 column = tile.column + threadIdx.x % 4 * 8;
    scalar_t* to = problem.output + ((u64)tile.expert * problem.num_lines + line) * problem.num_columns + column;
#pragma unroll
    for (int half = 0; half < 2; half++, line += 8, to += 8 * (u64)problem.num_columns) {
#pragma unroll
        for (int eight = 0; eight < BLOCK_N / 8; eight += 4) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = sums + 4 * (eight + i) + 2 * half;
                Pack<scalar_t, 2> rounded = {from_float<scalar_t>(pair[0]), from_float<scalar_t>(pair[1])};
                words[i] = *reinterpret_cast<u32*>(&rounded);
            }
            transpose_among_four(words);
            bool inside = line < problem.num_lines && column + eight * 8 < problem.num_columns;
            if (inside) store_16(to + eight * 8, words, policy);
        }
    }
}

__device__ __forceinline__ void consume_ring(const Problem& problem, const Ring& ring) {
    // A shuffle, so that the compiler knows it is one value for the warp, as the products want.
    u32 warpgroup = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0);
    u64 policy = evict_first_policy();
    TileSums sums;
    Turn turn = {0, 0};
    for (u32 index = blockIdx.x; index < problem.num_tiles(); index += gridDim.x) {
        Tile tile = problem.tile(index);
        // The warpgroups take 64 lines in turn, so that both have work where few lines are left.
        u32 first = tile.line + warpgroup * 64;
        int products = first >= problem.num_lines ? 0 : min((problem.num_lines - first + 127) / 128, (u32)PRODUCTS);
        int slots = tile.past - tile.slot;
        if (products == 2) multiply_tile<2>(sums, ring, turn, warpgroup, slots);
        else if (products == 1) multiply_tile<1>(sums, ring, turn, warpgroup, slots);
        else multiply_tile<0>(sums, ring, turn, warpgroup, slots);
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++) {
            u32 line = first + i * 128 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
            if (i < products) store(problem, tile, line, sums[i], policy);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
experts_outer_wgmma(const __grid_constant__ TensorMap dense_map, const scalar_t* left, const scalar_t* right,
                    const int* expert_offsets, const int* token_of_slot, scalar_t* output, u64 num_lines, u64 num_columns, u64 num_experts) {
    Problem problem = {dense_map, left, right, expert_offsets, token_of_slot, output,
                       (u32)num_lines, (u32)num_columns, (u32)num_experts};
    Ring ring = {*reinterpret_cast<Shared*>(block_memory + STAGES * STAGE_BYTES), shared_address(block_memory)};
    if (threadIdx.x == 0) {
        prefetch_map(dense_map);
        for (int s = 0; s < STAGES; s++) {
            init_barrier(ring.filled(s), PRODUCER_THREADS + 1);  // the leader's second is for the boxes
            init_barrier(ring.emptied(s), CONSUMER_THREADS / 32);
        }
        publish_barriers();
    }
    wait_for_previous_grid();
    release_next_grid();
    __syncthreads();
    if (threadIdx.x < CONSUMER_THREADS) {
        grow_registers<CONSUMER_REGISTERS>();
        consume_ring(problem, ring);
    } else {
        shrink_registers<PRODUCER_REGISTERS>();
        order_writes_before_bulk_copies();
        fill_ring(problem, ring);
    }
}
