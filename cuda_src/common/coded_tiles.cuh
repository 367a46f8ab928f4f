// The main loop of both expert GEMMs on quantised weights, for many tokens: [weight rows, k] x [slots of an expert, k]^T, one tile
// after the other.
//
// A tile is up to 160 slots of one expert x 192 weight rows, the work of one block. A stage of its ring holds tokens, codes, and
// what groups of codes share. Three consumer warpgroups have 64 of the rows each. A lane decodes the codes of its own two rows, 16
// k at a time, into registers, which are an operand of the products; meanwhile the products of the 16 k before run. So a decoded
// weight is never in memory, and no other warp waits for it. Slots past the expert's last are left out 32 at a time.
// tiles/schedule.cuh says who has which tile, tiles/producer.cuh fills the ring.
//
//     codes, scales, zero points --copy engine--> a stage --consumer warps--> operands in registers --products--> sums in registers
//
// Stage  Each row has 64 bytes of codes, which are 128 k of 4 bits or 64 k of 8, and the aligned 16 bytes of its scales (and of its
//        zero points) that hold those of these codes. What is out of bounds is zeros.
// Rows   A warp has 16 of the tile's rows, two halves of 8, and lane l has row l / 4 of each half. Where gate and up are two weight
//        rows of one output, they are the two halves, so that one lane has both sums.
// Three  A scheduler has a warp of each warpgroup: while one decodes or waits, products of the two others run. With two warpgroups
//        of 128 rows each, experts_up took 673 us of FP8 and 689 of NVFP4 at 4096 tokens, with three 604 and 638
//        (benchmarks/NOTES.md).
// Dense  Token rows come in expert order, by the copy engine: operand_rows.cu copies them so for the gate_up projection. Gathered
//        by 16-byte copies, as for plain tiles, they took the time of int4: 40 KB a stage at some 10 bytes a clock.
// Scale  The scale of a group multiplies its weights, which are then rounded, by at most 0.502 units of the last place (PairScale).
//        Weights of NVFP4 stay exact, as e2m1.cuh says. The scale of a row multiplies the sums in fp32, so that codes without
//        groups are exact.
// fp16   In bf16 that rounding is 0.0015 of an int4 weight, and a call would err by 0.0038 where plain weights err by 0.0029.
//        Therefore the gate_up projection multiplies fp16 tokens, which operand_rows.cu makes of bf16 ones, and fp16 weights, whose
//        rounding is 0.0002: a call errs by 0.0032. Such weights are held as 64 times themselves, since scales may be small, and
//        are at most 1023, of int4 340: what is beyond is refused (weights/quantized.py).
//
// Includers define SCALAR, OPERAND (what products multiply: SCALAR or fp16), WEIGHTS and what codec.cuh wants with it, HAS_BIAS,
// NUM_EXPERTS, BLOCK_THREADS, BLOCK_K and STAGES. A Gemm gives
//   kDepth, kRows, kColumns   k, weight rows of an expert, outputs of a slot
//   kDenseTokens, token_map   true, and the map of the slots' token rows
//   kWarpRows, kHalfRows      how many rows of a stage lie between the first rows of two neighbouring warps, and of a warp's halves
//   box_start()               where a tile's box starts in the maps of the weight
//   first_column()            of a warp
//   weight_row()              which row of the weight a warp's row is
//   bias                      where HAS_BIAS
//   slot_factor()             what multiplies the sums of a slot, where kScalesSlots
//   store()                   takes the outputs of 8 slots, this lane's rows and two of the slots each
#pragma once
#define BLOCKS 1  // two would share codes, which are the smaller part of a stage
#define LOW_RANK 0
#define UNIT_SLOTS 32
#define TILE_SLOTS 160
#define BOX_SLOTS 32
#define TILE_ROWS 192
#define CONSUMER_THREADS 384
#define CONSUMER_REGISTERS 152
#define CODE_ROW_BYTES 64
#define SCALE_ROW_BYTES 16
#define TOKEN_BYTES (TILE_SLOTS * BLOCK_K * 2)
#define CODE_BYTES (TILE_ROWS * CODE_ROW_BYTES)
#define SCALE_BYTES ((GROUP > 0) * TILE_ROWS * SCALE_ROW_BYTES)
#define ZERO_BYTES (HAS_ZEROS * TILE_ROWS * SCALE_ROW_BYTES)
#define STAGE_BYTES (TOKEN_BYTES + CODE_BYTES + SCALE_BYTES + ZERO_BYTES)
#include "weights/codec.cuh"
#include "weights/scales.cuh"
#include "tiles/roles.cuh"
#include "wgmma_of_registers.cuh"

#define SCALES_WEIGHTS (GROUP >= 32)       // scales of groups multiply weights after the codec; those of groups of 16 in it
#define GROUP_K (GROUP ? GROUP : BLOCK_K)  // never 0, to divide by
// Whether the codec subtracts a zero of 8 and scales in one instruction, scaled_pair().
template <typename T, typename S> constexpr bool kFuses = false;
template <> constexpr bool kFuses<fp16, bf16> = WEIGHTS == INT4 && !HAS_ZEROS;

// How many times itself a weight is that is multiplied.
template <typename T> constexpr float kWeightFactor = 1.0f;
template <> constexpr float kWeightFactor<fp16> = SCALES_WEIGHTS ? 64.0f : 1.0f;
static_assert(TILE_SLOTS == MOST_SLOTS && STAGE_BYTES % 1024 == 0, "tokens start on 1024 bytes");
static_assert(BLOCK_K * Codec::kBits == CODE_ROW_BYTES * 8, "BLOCK_K");
static_assert(GROUP % 16 == 0, "the 16 k of a product share their scales");
static_assert(GROUP > 0 || !HAS_ZEROS, "zero points are of groups");

#if GROUP
#define SCALES_PARAMETER const __grid_constant__ TensorMap scales_map,
#define SCALES_MAP &scales_map
#else
#define SCALES_PARAMETER
#define SCALES_MAP nullptr
#endif
#if HAS_ZEROS
#define ZEROS_PARAMETER const __grid_constant__ TensorMap zeros_map,
#define ZEROS_MAP &zeros_map
#else
#define ZEROS_PARAMETER
#define ZEROS_MAP nullptr
#endif

// A quantised weight in memory: what fill_ring() wants of weights.
struct CodedWeights {
    const TensorMap& codes;
    const TensorMap *scales, *zeros;
    const float* row_scales;  // [NUM_EXPERTS, kRows], with HAS_ROW_SCALES
    Adapter adapter;          // never there: the producer asks for one of any weight

    __device__ __forceinline__ void init() const { prefetch_map(codes); }

    // Orders the weight's part of a stage, in which token_bytes will arrive beside it. One thread.
    template <class Gemm>
    __device__ __forceinline__ void load(const Gemm& gemm, const Pipeline& pipeline, const Tile& tile, u32 step, u32 stage,
                                         u32 token_bytes, u64 policy) const {
        u32 filled = pipeline.filled(stage), to = pipeline.weights(stage), group = step * BLOCK_K / GROUP_K;
        arrive_expecting(filled, STAGE_BYTES - TOKEN_BYTES + token_bytes);
        copy_box_to_blocks<1>(to, codes, gemm.box_start(tile.expert, tile.column, step * CODE_ROW_BYTES), filled, policy);
        if (GROUP) {
            u32 first = group * sizeof(SCALE_SCALAR) / SCALE_ROW_BYTES * SCALE_ROW_BYTES;
            copy_box_to_blocks<1>(to + CODE_BYTES, *scales, gemm.box_start(tile.expert, tile.column, first), filled, policy);
        }
        if (HAS_ZEROS) {
            u32 first = group / SCALE_ROW_BYTES * SCALE_ROW_BYTES;
            copy_box_to_blocks<1>(to + CODE_BYTES + SCALE_BYTES, *zeros, gemm.box_start(tile.expert, tile.column, first), filled, policy);
        }
    }
};

// This lane's row of each half, and the operands that it makes of their codes. Codec is a parameter so that what one codec lacks is
// not looked up in it.
template <class Gemm, class Codec = Codec> struct LaneRows {
    static constexpr u32 kGroups = GROUP && GROUP < 64 ? 64 / GROUP : 1;  // that begin in 64 k
    u32 first;  // the row of the first half in a stage
    u32 codes;  // where its first 16 bytes of codes lie in a stage: the copy engine exchanges the four packs of a row
    u32 pair;   // which two of eight neighbouring codes are this lane's

    u32 of_group[2];  // of each half, what the codec wants to know of the current group
    PairScale<OPERAND, SCALE_SCALAR> scales[2];

    // As they lie in a stage: 16 k of both rows, and what the groups of the 64 k around share.
    struct Stored {
        u32 eights[2][2];  // of each half the words that hold this lane's pairs of the first and of the second eight codes
        Pack<SCALE_SCALAR, kGroups> scales[2];
        Pack<unsigned char, kGroups> zeros[2];
    };

    __device__ __forceinline__ LaneRows(u32 warp, u32 lane) {
        first = warp * Gemm::kWarpRows + lane / 4;
        codes = first * CODE_ROW_BYTES + first / 2 % 4 * 16;
        pair = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) of_group[half] = Codec::of_group(0, OPERAND());  // where there are no groups
    }

    // Loads the k16-th 16 k of a stage. Of the two words of eight codes of 8 bits a lane needs one.
    __device__ __forceinline__ void load(Stored& stored, u32 weights, u32 step, int k16) const {
        u32 group = (step * BLOCK_K + k16 * 16) / GROUP_K;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 (&eights)[2] = stored.eights[half];
            u32 of_row = weights + half * Gemm::kHalfRows * CODE_ROW_BYTES;
            if constexpr (Codec::kBits == 4) {
                Pack<u32, 2> both = load_shared<Pack<u32, 2>>(of_row + (codes ^ k16 / 2 * 16) + k16 % 2 * 8);
                eights[0] = both.values[0], eights[1] = both.values[1];
            } else {
                u32 from = of_row + (codes ^ k16 * 16) + pair / 2 * 4;
                eights[0] = load_shared<u32>(from), eights[1] = load_shared<u32>(from + 8);
            }
        }
        if constexpr (GROUP == 0) return;
        if (k16 % 4 != 0) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 of_row = weights + CODE_BYTES + (first + half * Gemm::kHalfRows) * SCALE_ROW_BYTES;
            stored.scales[half] = load_shared<Pack<SCALE_SCALAR, kGroups>>(of_row + group * sizeof(SCALE_SCALAR) % SCALE_ROW_BYTES);
            if (HAS_ZEROS) {
                stored.zeros[half] = load_shared<Pack<unsigned char, kGroups>>(of_row + SCALE_BYTES + group % SCALE_ROW_BYTES);
            }
        }
    }

    // Where groups begin at the k16-th 16 k: makes ready what each of them shares.
    __device__ __forceinline__ void begin_groups(const Stored& stored, int k16) {
        if (k16 * 16 % GROUP_K != 0) return;
#pragma unroll
        for (int half = 0; half < (GROUP ? 2 : 0); half++) {
            int group = k16 % 4 * 16 / GROUP_K;
            SCALE_SCALAR scale = stored.scales[half].values[group];
            u32 value = 8;
            if constexpr (HAS_ZEROS) value = stored.zeros[half].values[group];
            if (GROUP == 16) value = byte_of(scale);
            of_group[half] = Codec::of_group(value, OPERAND());
            if constexpr (SCALES_WEIGHTS) scales[half] = scales[0].of(scale, kWeightFactor<OPERAND>);
            if constexpr (kFuses<OPERAND, SCALE_SCALAR>) of_group[half] = Codec::of_scale(scales[half].high);
        }
    }

    // The operand of 16 k.
    __device__ __forceinline__ Fragment fragment(const Stored& stored) const {
        Fragment fragment;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 eight = stored.eights[i % 2][i / 2], of_eight = Codec::kBits == 4 ? pair : pair % 2;
            if constexpr (kFuses<OPERAND, SCALE_SCALAR>) {
                fragment.words[i] = Codec::scaled_pair(eight, of_eight, scales[i % 2].high, of_group[i % 2]);
            } else {
                u32 values = Codec::pair(Codec::aligned(eight, of_eight), of_group[i % 2], OPERAND());
                fragment.words[i] = SCALES_WEIGHTS ? scales[i % 2].times(values) : values;
            }
        }
        return fragment;
    }
};

// sums = a tile's products over all k: this warpgroup's rows x kSlots slots. While products run, the next 16 k are loaded, from the
// next stage too, and decoded. A stage is given back behind the first products of the next one: the wait there leaves these alone
// under way, so that all that read the stage are done.
template <u32 kSlots, class Gemm>
__device__ __forceinline__ void multiply_tile(float (&sums)[SUMS], LaneRows<Gemm>& rows, const Pipeline& pipeline, Turn& turn) {
    typename LaneRows<Gemm>::Stored stored;
    auto await_stage = [&](u32 step) {
        wait_barrier(pipeline.filled(turn.stage), turn.parity);
        rows.load(stored, pipeline.weights(turn.stage), step, 0);
    };
    u32 lane = threadIdx.x % 32, previous = 0;
    await_stage(0);
    for (u32 step = 0; step < kSteps<Gemm>; step++) {
        u32 stage = turn.stage;
        u64 tokens = tile_descriptor(pipeline.tokens(stage));
        // The last 16 k of the stage that are inside of the depth.
        int last = Gemm::kDepth % BLOCK_K && step + 1 == kSteps<Gemm> ? (Gemm::kDepth % BLOCK_K + 15) / 16 - 1 : BLOCK_K / 16 - 1;
#pragma unroll
        for (int k16 = 0; k16 < BLOCK_K / 16; k16++) {
            u64 of_k16 = tokens + k16 / 4 * (TILE_SLOTS * ROW_BYTES / 16) + k16 % 4 * 2;
            rows.begin_groups(stored, k16);
            Fragment operands = rows.fragment(stored);
            begin_products();
            multiply_fragment<kSlots>(sums, operands, of_k16, step > 0 || k16 > 0, OPERAND());
            commit_products();
            if (k16 < last) {
                rows.load(stored, pipeline.weights(stage), step, k16 + 1);
            } else {
                turn.next();
                if (step + 1 < kSteps<Gemm>) await_stage(step + 1);
            }
            wait_for_all_but_last_products();
            if (k16 == 0 && step > 0 && lane == 0) arrive(pipeline.emptied(previous));
            if (k16 == last) break;
        }
        previous = stage;
    }
    wait_for_products();
    if (lane == 0) arrive(pipeline.emptied(previous));
}

// Gives back the stages of a tile in which this warpgroup has no rows.
template <class Gemm> __device__ __forceinline__ void skip_tile(const Pipeline& pipeline, Turn& turn) {
    for (u32 step = 0; step < kSteps<Gemm>; step++, turn.next()) {
        wait_barrier(pipeline.filled(turn.stage), turn.parity);
        if (threadIdx.x % 32 == 0) arrive(pipeline.emptied(turn.stage));
    }
}

// The values of this lane's rows in a tensor [NUM_EXPERTS, kRows].
template <class Gemm, typename T>
__device__ __forceinline__ void load_of_rows(float (&values)[2], const T* tensor, const Tile& tile, u32 warp) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 row = Gemm::weight_row(tile.column, warp, half, threadIdx.x % 32 / 4);
        values[half] = row < Gemm::kRows ? to_float(tensor[(u64)tile.expert * Gemm::kRows + row]) : 0.0f;
    }
}

template <class Gemm>
__device__ __forceinline__ void consume_ring(const Gemm& gemm, const CodedWeights& weights, const Pipeline& pipeline) {
    // By a shuffle the compiler knows that it is one value for the warp, as the products want it.
    u32 warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    LaneRows<Gemm> rows(warp, lane);
    float sums[SUMS];
    Turn turn = {0, 0};
    for (u32 index = 0;; index++) {
        Tile tile = pipeline.tile(index);
        if (tile.expert < 0) return;
        bool has_rows = Gemm::first_column(tile.column, warp / 4 * 4) < Gemm::kColumns;  // the warpgroup's
        if (!has_rows) skip_tile<Gemm>(pipeline, turn);
        else if (tile.slots > 128) multiply_tile<160>(sums, rows, pipeline, turn);
        else if (tile.slots > 96) multiply_tile<128>(sums, rows, pipeline, turn);
        else if (tile.slots > 64) multiply_tile<96>(sums, rows, pipeline, turn);
        else if (tile.slots > 32) multiply_tile<64>(sums, rows, pipeline, turn);
        else multiply_tile<32>(sums, rows, pipeline, turn);
        if (!has_rows) continue;
        float row_scales[2], biases[2], slot_factors[TILE_SLOTS / 32];
        if (HAS_ROW_SCALES) load_of_rows<Gemm>(row_scales, weights.row_scales, tile, warp);
        if (HAS_BIAS) load_of_rows<Gemm>(biases, gemm.bias, tile, warp);
        if constexpr (Gemm::kScalesSlots) {
#pragma unroll
            for (int i = 0; i < TILE_SLOTS / 32; i++) {
                int slot = i * 32 + lane;
                slot_factors[i] = slot < tile.slots ? gemm.slot_factor(tile.first_slot + slot) : 0.0f;
            }
        }
#pragma unroll
        for (int eight = 0; eight < TILE_SLOTS / 8; eight++) {
            if (eight * 8 >= tile.slots) break;
            float outputs[4];  // two slots of the first half's row, and the same two of the second's
#pragma unroll
            for (int i = 0; i < 4; i++) {
                outputs[i] = sums[eight * 4 + i];
                if constexpr (Gemm::kScalesSlots) {
                    outputs[i] *= __shfl_sync(FULL_WARP, slot_factors[eight / 4], eight % 4 * 8 + lane % 4 * 2 + i % 2);
                }
                if (kWeightFactor<OPERAND> != 1.0f) outputs[i] *= 1 / kWeightFactor<OPERAND>;
                if (HAS_ROW_SCALES) outputs[i] *= row_scales[i / 2] * Codec::kOfRowScale;
                if (HAS_BIAS) outputs[i] += biases[i / 2];
            }
            gemm.store(tile, eight * 8, warp, outputs);
        }
    }
}

// An 8 x 8 matrix across a warp, two neighbours of a line in each lane: lines were weight rows, and become slots.
__device__ __forceinline__ u32 transposed(u32 word) {
    u32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
    return result;
}

__device__ __forceinline__ u32 pair_of(float first, float second) {
    Pack<SCALAR, 2> pair = {from_float<SCALAR>(first), from_float<SCALAR>(second)};
    return *reinterpret_cast<u32*>(&pair);
}

// Stores 16 columns of 8 slots of a tile into an output [slots, kPitch], none of them past the first kColumns: low has two slots of
// column lane / 4, high those of the column 8 further. Lanes swap in pairs, so that each stores 4 neighbours.
template <u32 kPitch, u32 kColumns>
__device__ __forceinline__ void store_sixteen(SCALAR* output, const Tile& tile, int first_slot, u32 column, u32 low, u32 high) {
    u32 lane = threadIdx.x % 32, quad = lane % 4;
    int slot = first_slot + lane / 4;
    bool odd = quad % 2;
    low = transposed(low), high = transposed(high);
    u32 got = __shfl_xor_sync(FULL_WARP, odd ? low : high, 1);
    column += odd ? 8 + (quad - 1) * 2 : quad * 2;
    if (slot < tile.slots && column < kColumns) {
        u32* to = reinterpret_cast<u32*>(output + (u64)(tile.first_slot + slot) * kPitch + column);
        store_pack(to, odd ? Pack<u32, 2>{got, high} : Pack<u32, 2>{low, got});
    }
}

// The same for 8 columns: word has two slots of column lane / 4.
template <u32 kPitch, u32 kColumns>
__device__ __forceinline__ void store_eight(SCALAR* output, const Tile& tile, int first_slot, u32 column, u32 word) {
    u32 lane = threadIdx.x % 32;
    int slot = first_slot + lane / 4;
    word = transposed(word), column += lane % 4 * 2;
    if (slot < tile.slots && column < kColumns) *reinterpret_cast<u32*>(output + (u64)(tile.first_slot + slot) * kPitch + column) = word;
}
