// The main loop of both expert GEMMs on quantised weights, for many tokens: [weight rows, k] x [slots of an expert, k]^T, one tile
// after the other.
//
// A tile is up to TILE_SLOTS slots of one expert x 64 weight rows for each of WARPGROUPS consumer warpgroups, the work of one block.
// A stage of its ring holds tokens, codes, and what groups of codes share. A lane decodes the codes of its own two rows, 16 or 32 k
// at a time, into registers, which are an operand of the products; meanwhile the products of those before run. So a decoded
// weight is never in memory, and no other warp waits for it. Slots past the expert's last are left out 32 at a time.
// tiles/schedule.cuh says who has which tile, tiles/producer.cuh fills the ring.
//
//     codes, scales, zero points --copy engine--> a stage --consumer warps--> operands in registers --products--> sums in registers
//
// Stage  Each row has CODE_ROW_BYTES of codes, 64 or 128: 64 are 128 k of 4 bits or 64 k of 8. And it has the aligned 16 bytes of
//        its scales (and of its zero points) that hold those of these codes. What is out of bounds is zeros.
// Rows   A warp has 16 of the tile's rows, two halves of 8, and lane l has row l / 4 of each half. Where gate and up are two weight
//        rows of one output, they are the two halves, so that one lane has both sums.
// Warps  A scheduler has a warp of each warpgroup: while one decodes or waits, products of the others run. With two warpgroups of
//        128 rows each, experts_up took 673 us of FP8 and 689 of NVFP4 at 4096 tokens, with three 604 and 638. With few slots a
//        lane has few sums, so that there are registers for up to six warpgroups (benchmarks/NOTES.md).
// Chunk  A lane loads 32 k of both rows at a time, since each wait for shared memory and for products is a pause, and what two
//        groups of 32 k share is made ready in one go. Of these 32 it decodes 8 neighbours, one word or two: nothing that a lane
//        does with a word depends on which lane it is, and no other lane loads that word.
// Tokens The down projection's rows are in expert order, so that the copy engine brings them; the gate_up projection's are gathered
//        by 16-byte copies (LineLoader). A copy of its rows in expert order cost 5% of a call.
// Turned Their columns are in the order of turned_rows.cuh, in which a product finds the k of the lanes' codes.
// Scale  The scale of a group multiplies its weights, which are then rounded, by at most 0.502 units of the last place (PairScale).
//        Weights of NVFP4 stay exact, as e2m1.cuh says. The scale of a row multiplies the sums in fp32, so that codes without
//        groups are exact.
// fp16   In bf16 that rounding is 0.0015 of an int4 weight, and a call would err by 0.0038 where plain weights err by 0.0029.
//        Therefore the gate_up projection multiplies fp16 tokens, which operand_rows.cu makes of bf16 ones, and fp16 weights, whose
//        rounding is 0.0002: a call errs by 0.0032. Such weights are held as 64 times themselves, since scales may be small, and
//        are at most 1023, of int4 340: what is beyond is refused (weights/checks.py). So it multiplies e4m3, too, of which
//        one instruction makes two fp16, exactly.
//
// Includers define SCALAR, OPERAND (what products multiply: SCALAR or fp16), WEIGHTS and what codec.cuh wants with it, HAS_BIAS,
// NUM_EXPERTS, BLOCK_THREADS, WARPGROUPS, CONSUMER_REGISTERS, TILE_SLOTS, CODE_ROW_BYTES, BLOCK_K and STAGES. A Gemm gives
//   kDepth, kRows, kColumns   k, weight rows of an expert, outputs of a slot
//   kDenseTokens, token_map   whether slots are token rows, and the map of these; else LineLoader, and what it wants
//   kTokensAreNew             as tiles/producer.cuh says
//   kWarpRows, kHalfRows      how many rows of a stage lie between the first rows of two neighbouring warps, and of a warp's halves
//   kBoxes                    how many boxes bring a stage's rows, one behind the other
//   box_start()               where the first of a tile starts in the maps of the weight
//   first_column()            of a warp
//   weight_row()              which row of the weight a warp's row is
//   bias                      where HAS_BIAS
//   slot_factor()             what multiplies the sums of a slot, where kScalesSlots
//   store()                   takes the outputs of 8 slots, this lane's rows and two of the slots each
#pragma once
#define BLOCKS 1  // two would share codes, which are the smaller part of a stage
#define LOW_RANK 0
#define UNIT_SLOTS 32
#define BOX_SLOTS 32
#define TILE_ROWS (WARPGROUPS * 64)
#define BOXES ((TILE_ROWS + 255) / 256)  // of codes in a stage: one has at most 256 rows
#define CONSUMER_THREADS (WARPGROUPS * 128)
#define CHUNK_K 32
#define SCALE_ROW_BYTES 16
#define TOKEN_BYTES (TILE_SLOTS * BLOCK_K * 2)
#define CODE_BYTES (TILE_ROWS * CODE_ROW_BYTES)
#define SCALE_BYTES ((GROUP > 0) * TILE_ROWS * SCALE_ROW_BYTES)
#define ZERO_BYTES (HAS_ZEROS * TILE_ROWS * SCALE_ROW_BYTES)
#define STAGE_BYTES (TOKEN_BYTES + CODE_BYTES + SCALE_BYTES + ZERO_BYTES)
#include "turned_rows.cuh"
#include "weights/codec.cuh"
#include "weights/scales.cuh"
#include "tiles/roles.cuh"
#include "wgmma_of_registers.cuh"

#define SCALES_WEIGHTS (GROUP >= 32)       // scales of groups multiply weights after the codec; those of groups of 16 in it
#define GROUP_K (GROUP ? GROUP : BLOCK_K)  // never 0, to divide by
// Whether the codec subtracts a zero of 8 and scales in one instruction, scaled_pair().
template <typename T, typename S> constexpr bool kFuses = false;
template <> constexpr bool kFuses<fp16, bf16> = WEIGHTS == INT4 && !HAS_ZEROS;
// Whether the scales of two groups become numbers of the operands' type together.
template <typename T, typename S> constexpr bool kTogether = false;
template <typename T> constexpr bool kTogether<T, T> = true;
template <> constexpr bool kTogether<fp16, bf16> = true;
template <> constexpr bool kTogether<bf16, e8m0> = true;
// Whether an instruction makes two operands of two codes.
template <typename T> constexpr bool kConverts = false;
template <> constexpr bool kConverts<fp16> = WEIGHTS == E4M3;

// How many times itself a weight is that is multiplied.
template <typename T> constexpr float kWeightFactor = 1.0f;
template <> constexpr float kWeightFactor<fp16> = SCALES_WEIGHTS ? 64.0f : 1.0f;

// Two scales, 16 bits apart, as two numbers of the operands' type, times kWeightFactor.
__device__ __forceinline__ u32 operand_scales(u32 scales, bf16, bf16) { return scales; }

__device__ __forceinline__ u32 operand_scales(u32 scales, fp16, fp16 type) { return mul_pair(scales, 0x54005400u, type); }

__device__ __forceinline__ u32 operand_scales(u32 scales, bf16 type, fp16) {
    scales = mul_pair(scales, 0x42804280u, type);  // while they are bf16, of which none is too small
    return rounded_pair(__uint_as_float(scales << 16), __uint_as_float(scales & 0xffff0000u), fp16());
}

__device__ __forceinline__ u32 operand_scales(u32 scales, e8m0, bf16) {
    return __vmaxu2(scales << 7, 0x00400040u);  // the lowest is 2^-127, which is subnormal
}

static_assert(STAGE_BYTES % 1024 == 0, "tokens start on 1024 bytes");
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

    template <u32 kRowBytes, class Gemm>
    __device__ __forceinline__ void load_boxes(const Gemm& gemm, u32 to, const TensorMap& map, const Tile& tile, int byte, u32 filled,
                                               u64 policy) const {
#pragma unroll
        for (int i = 0; i < Gemm::kBoxes; i++) {
            BoxStart start = gemm.box_start(tile.expert, tile.column, byte);
            start.second += i * (TILE_ROWS / Gemm::kBoxes);
            copy_box_to_blocks<1>(to + i * (TILE_ROWS / Gemm::kBoxes * kRowBytes), map, start, filled, policy);
        }
    }

    // Orders the weight's part of a stage, in which token_bytes will arrive beside it. One thread.
    template <class Gemm>
    __device__ __forceinline__ void load(const Gemm& gemm, const Pipeline& pipeline, const Tile& tile, u32 step, u32 stage,
                                         u32 token_bytes, u64 policy) const {
        u32 filled = pipeline.filled(stage), to = pipeline.weights(stage), group = step * BLOCK_K / GROUP_K;
        arrive_expecting(filled, STAGE_BYTES - TOKEN_BYTES + token_bytes);
        load_boxes<CODE_ROW_BYTES>(gemm, to, codes, tile, step * CODE_ROW_BYTES, filled, policy);
        if (GROUP) {
            u32 first = group * sizeof(SCALE_SCALAR) / SCALE_ROW_BYTES * SCALE_ROW_BYTES;
            load_boxes<SCALE_ROW_BYTES>(gemm, to + CODE_BYTES, *scales, tile, first, filled, policy);
        }
        if (HAS_ZEROS) {
            u32 first = group / SCALE_ROW_BYTES * SCALE_ROW_BYTES;
            load_boxes<SCALE_ROW_BYTES>(gemm, to + CODE_BYTES + SCALE_BYTES, *zeros, tile, first, filled, policy);
        }
    }
};

// This lane's row of each half, and the operands that it makes of their codes. Codec is a parameter so that what one codec lacks is
// not looked up in it.
template <class Gemm, class Codec = Codec> struct LaneRows {
    static constexpr u32 kGroups = GROUP && GROUP < 64 ? 64 / GROUP : 1;  // that begin in 64 k
    static constexpr u32 kWords = Codec::kBits / 4, kPairs = 4 / kWords;  // of 8 codes, and of a word
    u32 first;  // the row of the first half in a stage
    u32 codes;  // where its first codes that are this lane's lie in a stage: the copy engine exchanges the four packs of a row

    // This lane's 8 codes of a chunk of both rows, as they lie in a stage, and what the groups of the 64 k around share.
    struct Stored {
        Pack<u32, kWords> eight[2];
        Pack<SCALE_SCALAR, kGroups> scales[2];
        Pack<unsigned char, kGroups> zeros[2];
    };

    __device__ __forceinline__ LaneRows(u32 warp, u32 lane) {
        first = warp * Gemm::kWarpRows + lane / 4;
        u32 swap = CODE_ROW_BYTES == 64 ? first / 2 % 4 : first % 8, byte = lane % 4 * (kWords * 4);
        codes = first * CODE_ROW_BYTES + (byte ^ swap * 16);
    }

    __device__ __forceinline__ void load(Stored& stored, u32 weights, u32 step, int chunk) const {
        u32 group = (step * BLOCK_K + chunk * CHUNK_K) / GROUP_K;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 of_row = weights + half * Gemm::kHalfRows * CODE_ROW_BYTES;
            stored.eight[half] = load_shared<Pack<u32, kWords>>(of_row + (codes ^ chunk * (CHUNK_K * Codec::kBits / 8)));
            if (GROUP == 0 || chunk % 2 != 0) continue;
            of_row = weights + CODE_BYTES + (first + half * Gemm::kHalfRows) * SCALE_ROW_BYTES;
            stored.scales[half] = load_shared<Pack<SCALE_SCALAR, kGroups>>(of_row + group * sizeof(SCALE_SCALAR) % SCALE_ROW_BYTES);
            if (HAS_ZEROS) {
                stored.zeros[half] = load_shared<Pack<unsigned char, kGroups>>(of_row + SCALE_BYTES + group % SCALE_ROW_BYTES);
            }
        }
    }

    // What the codec wants to know of the group of this lane's codes in chunk `chunk` of two.
    __device__ __forceinline__ u32 of_group(const Stored& stored, int half, int chunk) const {
        if constexpr (GROUP == 16) {
            return twice(Codec::lane_factors(*reinterpret_cast<const u32*>(&stored.scales[half]), OPERAND()), chunk);
        } else {
            return Codec::of_group(HAS_ZEROS ? stored.zeros[half].values[chunk * 32 / GROUP_K] : 8, OPERAND());
        }
    }

    // Those of the one or two groups that begin in 64 k, for pairs of operands.
    static __device__ __forceinline__ u32 both_scales(const Pack<SCALE_SCALAR, kGroups>& scales) {
        u32 both;
        if constexpr (sizeof(scales) == 4) both = *reinterpret_cast<const u32*>(&scales);
        else both = scales.values[0].bits | (u32)scales.values[kGroups - 1].bits << 16;
        return operand_scales(both, SCALE_SCALAR(), OPERAND());
    }

    // The operand of the k16-th 16 k of a stage, which are in the chunk: of each row two pairs of this lane's codes.
    __device__ __forceinline__ Fragment fragment(const Stored& stored, int k16) const {
        Fragment fragment;
        int chunk = k16 / 2 % 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 of_group = this->of_group(stored, half, chunk);
            [[maybe_unused]] PairScale<OPERAND, SCALE_SCALAR> scale;
            if constexpr (SCALES_WEIGHTS) {
                int group = chunk * 32 / GROUP_K;
                const Pack<SCALE_SCALAR, kGroups>& scales = stored.scales[half];
                if constexpr (kTogether<OPERAND, SCALE_SCALAR>) {
                    u32 both = both_scales(scales);
                    scale.high = twice(both, group);
                    if constexpr (kFuses<OPERAND, SCALE_SCALAR>) of_group = twice(Codec::of_scale(both), group);
                } else {
                    scale = scale.of(scales.values[group], kWeightFactor<OPERAND>);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 pair = k16 % 2 * 2 + i, of_word = pair % kPairs, from = stored.eight[half].values[pair / kPairs];
                u32& word = fragment.words[half + i * 2];
                if constexpr (kFuses<OPERAND, SCALE_SCALAR>) {
                    word = Codec::scaled_pair(from, of_word, scale.high, of_group);
                } else {
                    if constexpr (kConverts<OPERAND>) word = Codec::converted_pair(from, of_word);
                    else word = Codec::pair(from, of_word, of_group, OPERAND());
                    if constexpr (SCALES_WEIGHTS) word = scale.times(word);
                }
            }
        }
        return fragment;
    }
};

// sums = a tile's products over all k: this warpgroup's rows x kSlots slots. While products run, the next chunk is decoded and that
// after it loaded, from the next stage too. A stage is given back behind the first products of the next one: the wait there leaves
// these alone under way, so that all that read the stage are done.
template <u32 kSlots, class Gemm>
__device__ __forceinline__ void multiply_tile(float (&sums)[SUMS], LaneRows<Gemm>& rows, const Pipeline& pipeline, Turn& turn) {
    typename LaneRows<Gemm>::Stored stored;
    auto await_stage = [&](u32 step) {
        wait_barrier(pipeline.filled(turn.stage), turn.parity);
        if (!Gemm::kDenseTokens) order_copies_before_products();
        rows.load(stored, pipeline.weights(turn.stage), step, 0);
    };
    constexpr int kAtOnce = WARPGROUPS == 3 && kSlots <= 96 && !HAS_ZEROS ? 2 : 1;  // 16 k: as operands have registers
    u32 lane = threadIdx.x % 32, previous = 0;
    await_stage(0);
    for (u32 step = 0; step < kSteps<Gemm>; step++) {
        u32 stage = turn.stage;
        u64 tokens = tile_descriptor(pipeline.tokens(stage));
        // The last chunk of the stage that begins inside of the depth.
        int last = Gemm::kDepth % BLOCK_K && step + 1 == kSteps<Gemm> ? (Gemm::kDepth % BLOCK_K - 1) / CHUNK_K : BLOCK_K / CHUNK_K - 1;
#pragma unroll
        for (int chunk = 0; chunk < BLOCK_K / CHUNK_K; chunk++) {
#pragma unroll
            for (int first = 0; first < CHUNK_K / 16; first += kAtOnce) {
                Fragment operands[kAtOnce];
#pragma unroll
                for (int i = 0; i < kAtOnce; i++) operands[i] = rows.fragment(stored, chunk * (CHUNK_K / 16) + first + i);
                begin_products();
#pragma unroll
                for (int i = 0; i < kAtOnce; i++) {
                    int k16 = chunk * (CHUNK_K / 16) + first + i;
                    u64 of_k16 = tokens + k16 / 4 * (TILE_SLOTS * ROW_BYTES / 16) + k16 % 4 * 2;
                    multiply_fragment<kSlots>(sums, operands[i], of_k16, step > 0 || k16 > 0, OPERAND());
                }
                commit_products();
                if (first + kAtOnce == CHUNK_K / 16) {
                    if (chunk < last) {
                        rows.load(stored, pipeline.weights(stage), step, chunk + 1);
                    } else {
                        turn.next();
                        if (step + 1 < kSteps<Gemm>) await_stage(step + 1);
                    }
                }
                wait_for_all_but_last_products();
                if (chunk == 0 && first == 0 && step > 0 && lane == 0) arrive(pipeline.emptied(previous));
            }
            if (chunk == last) break;
        }
        previous = stage;
    }
    wait_for_products();
    if (lane == 0) arrive(pipeline.emptied(previous));
}

// The fewest slots of a product that a tile's fit in.
template <u32 kSlots, class Gemm>
__device__ __forceinline__ void multiply_slots(float (&sums)[SUMS], LaneRows<Gemm>& rows, const Pipeline& pipeline, Turn& turn, int slots) {
    if constexpr (kSlots > 32) {
        if (slots <= (int)kSlots - 32) return multiply_slots<kSlots - 32>(sums, rows, pipeline, turn, slots);
    }
    multiply_tile<kSlots>(sums, rows, pipeline, turn);
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
        else multiply_slots<TILE_SLOTS>(sums, rows, pipeline, turn, tile.slots);
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

// Where a column of this lane's slot of eight lies in an output [slots, kPitch]; nowhere, if the slot is past the tile's last.
template <u32 kPitch> __device__ __forceinline__ SCALAR* place_of(SCALAR* output, const Tile& tile, int first_slot, u32 column) {
    int of_eight = threadIdx.x % 32 / 4;
    SCALAR* first = output + (u64)(tile.first_slot + of_eight) * kPitch + column;
    return first_slot < tile.slots - of_eight ? first + first_slot * kPitch : nullptr;
}

// Stores 16 columns of 8 slots of a tile into an output [slots, kPitch], none of them past the first kColumns: low has two slots of
// column lane / 4, high those of the column 8 further. Lanes swap in pairs, so that each stores 4 neighbours.
template <u32 kPitch, u32 kColumns>
__device__ __forceinline__ void store_sixteen(SCALAR* output, const Tile& tile, int first_slot, u32 column, u32 low, u32 high) {
    u32 quad = threadIdx.x % 4;
    bool odd = quad % 2;
    low = transposed(low), high = transposed(high);
    u32 got = __shfl_xor_sync(FULL_WARP, odd ? low : high, 1);
    column += odd ? 8 + (quad - 1) * 2 : quad * 2;
    SCALAR* to = place_of<kPitch>(output, tile, first_slot, column);
    if (to && column < kColumns) store_pack(reinterpret_cast<u32*>(to), odd ? Pack<u32, 2>{got, high} : Pack<u32, 2>{low, got});
}

// The same for 8 columns: word has two slots of column lane / 4.
template <u32 kPitch, u32 kColumns>
__device__ __forceinline__ void store_eight(SCALAR* output, const Tile& tile, int first_slot, u32 column, u32 word) {
    word = transposed(word), column += threadIdx.x % 4 * 2;
    SCALAR* to = place_of<kPitch>(output, tile, first_slot, column);
    if (to && column < kColumns) *reinterpret_cast<u32*>(to) = word;
}

// As store_sixteen(), into turned rows of kColumns columns. Of a lane both words are neighbours there.
template <u32 kColumns>
__device__ __forceinline__ void store_turned_sixteen(SCALAR* output, const Tile& tile, int first_slot, u32 column, u32 low,
                                                     u32 high) {
    constexpr u32 kPitch = turned_columns(kColumns);
    low = transposed(low), high = transposed(high), column += threadIdx.x % 4 * 2;
    SCALAR* to = place_of<kPitch>(output, tile, first_slot, turned(column));
    Pack<u32, 2> both = {column < kColumns ? low : 0, column + 8 < kColumns ? high : 0};
    if (to && column < kPitch) store_pack(reinterpret_cast<u32*>(to), both);
}

// As store_eight(), into turned rows.
template <u32 kColumns>
__device__ __forceinline__ void store_turned_eight(SCALAR* output, const Tile& tile, int first_slot, u32 column, u32 word) {
    constexpr u32 kPitch = turned_columns(kColumns);
    word = transposed(word), column += threadIdx.x % 4 * 2;
    SCALAR* to = place_of<kPitch>(output, tile, first_slot, turned(column));
    if (to && column < kPitch) *reinterpret_cast<u32*>(to) = column < kColumns ? word : 0;
}
