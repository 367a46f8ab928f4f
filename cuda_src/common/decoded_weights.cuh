// Weights that are stored as codes, for the tiles of expert_tiles.cuh: the producer warps decode them into the stages of its ring,
// in bf16 or fp16 and in the order that products read, so that no such weight is ever in global memory.
//
//     codes, scales, zero points --copy engine--> ring of CODE_STAGES --producer warps--> weights of a stage --products-->
//
// A code stage has of each of BLOCK_N rows 64 bytes of codes, which are CODE_STEPS stages of the other ring, and the 16 bytes of
// scales (and of zero points) among which are those of these codes. The copy engine brings it CODE_STAGES ahead, across the end of
// a tile; rows come in the order of plain weights, and what is out of bounds is zeros.
//
// Scale  A group's multiplies its weights, which are rounded then: within 0.502 units of the last place, as PairScale says. The
//        scale of a row multiplies the sums of a tile in fp32, so that codes without groups are exact weights.
// fp16   In bf16 that rounding is 0.0015 of an int4 weight, and a call errs by 0.0038 where plain weights err by 0.0029. So the
//        gate_up projection takes fp16 tokens that rows_to_fp16.cu makes of bf16 ones, and its weights are fp16 too, times
//        WEIGHT_FACTOR: within 0.0002 of themselves from 2^-20 on, up to 1023. Then a call errs by 0.0032.
// Lanes  A warp decodes every fourth sixteen of rows. Of a row two lanes have 32 k each: eight neighbouring lanes read the same
//        pack of eight rows and write the same pack, which the swizzles of both rings spread over all banks.
//            lane 0..7     8..15       16..23    24..31
//            row  0..7     0..7        8..15     8..15
//            k    0..31    32..63      0..31     32..63
// Alone  A cluster would share nothing but codes, which are the smaller part of a stage: a lone block of 256 slots x 176 rows has
//        as little to load for a product as two blocks that share bf16. So BLOCKS is 1.
//
// Includers define WEIGHT_CODEC (of code_pairs.cuh), WEIGHT_GROUP (k that share a scale; 0: none), SCALE_SCALAR (of group scales;
// any where there are none), HAS_ZEROS, HAS_ROW_SCALES and CODE_STAGES, and what expert_tiles.cuh wants.
#pragma once
#include "expert_tiles.cuh"
#include "weights/code_pairs.cuh"

#if !defined(WEIGHT_GROUP) || !defined(SCALE_SCALAR) || !defined(HAS_ZEROS) || !defined(HAS_ROW_SCALES) || !defined(CODE_STAGES)
#error "define WEIGHT_GROUP, SCALE_SCALAR, HAS_ZEROS, HAS_ROW_SCALES and CODE_STAGES"
#endif
static_assert(BLOCKS == 1, "codes come to a lone block");
static_assert(!TRANSPOSED, "codes are rows of k");
static_assert(LOW_RANK == 0, "an adapter's factor is not decoded; its tiles take plain weights");
static_assert(CODE_STAGES >= 2, "a code stage is filled while another is decoded");

#if WEIGHT_GROUP
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
#define CODED_MAPS SCALES_PARAMETER ZEROS_PARAMETER
#define ROW_SCALES_PARAMETER , const float* row_scales
#define WEIGHTS(MAP, ADAPTER) CodedWeights{MAP, SCALES_MAP, ZEROS_MAP, row_scales}

typedef WEIGHT_CODEC<OPERAND> Codec;

#define CODE_ROW_BYTES 64
#define SCALE_ROW_BYTES 16
#define CODE_K (CODE_ROW_BYTES * 8 / Codec::kBits)
#define CODE_STEPS (CODE_K / BLOCK_K)
#define GROUP_K (WEIGHT_GROUP ? WEIGHT_GROUP : CODE_K)  // one that is there to divide by
#define CODE_BYTES (BLOCK_N * CODE_ROW_BYTES)
#define SCALE_BYTES ((WEIGHT_GROUP > 0) * BLOCK_N * SCALE_ROW_BYTES)
#define ZERO_BYTES (HAS_ZEROS * BLOCK_N * SCALE_ROW_BYTES)
#define CODE_RING_BYTES (CODE_STAGES * (CODE_BYTES + SCALE_BYTES + ZERO_BYTES))
#define DECODING_WARPS (PRODUCER_THREADS / 32)
#define SPARE_BYTES ((64 - BLOCK_N % 64) % 64 * (CODE_BYTES + SCALE_BYTES + ZERO_BYTES) / BLOCK_N)  // behind the ring, see Decoder
static_assert(WEIGHT_GROUP % 16 == 0, "eight codes share a scale");
static_assert(WEIGHT_GROUP >= CODE_K || CODE_K / GROUP_K * sizeof(SCALE_SCALAR) <= SCALE_ROW_BYTES, "a stage's scales are a pack");
static_assert(WEIGHT_GROUP > 0 || !HAS_ZEROS, "zero points are of groups");

// The ring of code stages: codes, then the scales of each stage and its zero points, then barriers for filled and for emptied.
struct CodeRing {
    unsigned char* memory;

    __device__ __forceinline__ unsigned char* codes(u32 stage) const { return memory + stage * CODE_BYTES; }
    __device__ __forceinline__ unsigned char* scales(u32 stage) const {
        return memory + CODE_STAGES * CODE_BYTES + stage * (SCALE_BYTES + ZERO_BYTES);
    }
    __device__ __forceinline__ unsigned char* zeros(u32 stage) const { return scales(stage) + SCALE_BYTES; }
    __device__ __forceinline__ u32 filled(u32 stage) const { return shared_address(memory + CODE_RING_BYTES) + stage * 8; }
    __device__ __forceinline__ u32 emptied(u32 stage) const { return filled(CODE_STAGES + stage); }
};

// The code stages of a tile.
template <class Gemm> constexpr u32 kCodeStages = (Gemm::kDepth + CODE_K - 1) / CODE_K;

// As Turn, of the ring of code stages.
struct CodeTurn {
    u32 stage, parity;

    __device__ __forceinline__ void next() {
        if (++stage == CODE_STAGES) stage = 0, parity ^= 1;
    }
};

// What this lane decodes of a stage, 32 k of a row of every fourth sixteen, a round each: loaded, and later decoded. As one warp a
// scheduler has nothing else to do while it waits for shared memory, loads of kAtOnce rounds wait together, and kEarly those of the
// first while the stage's tokens are ordered; where there are registers for it.
template <class Gemm> struct Decoder {
    static constexpr u32 kRounds = (BLOCK_N / 16 + DECODING_WARPS - 1) / DECODING_WARPS, kRoundRows = DECODING_WARPS * 16;
    static constexpr u32 kPacks = Codec::kBits / 4, kEightsOfPack = 4 / kPacks;  // of 16 bytes of codes, in 32 k
    static constexpr u32 kScales = WEIGHT_GROUP == 16 ? 2 : 1, kScalesOfRow = SCALE_ROW_BYTES / sizeof(SCALE_SCALAR);
    static constexpr bool kEarly = Gemm::kDenseTokens || PRODUCER_REGISTERS > 56 && !HAS_ZEROS;
    static constexpr u32 kAtOnce = Gemm::kDenseTokens || kEarly && kPacks == 1 ? kRounds : 1;
    u32 row, half;  // of the first round
    Pack<u32, 4> codes[kAtOnce][kPacks];
    Pack<SCALE_SCALAR, kScales> scales[kAtOnce];
    u32 zeros[kAtOnce];

    __device__ __forceinline__ Decoder() {
        u32 lane = threadIdx.x % 32;
        row = (threadIdx.x - CONSUMER_THREADS) / 32 * 16 + lane / 16 * 8 + lane % 8;
        half = lane / 8 % 2;
    }

    // Where the last round has no rows for a warp it loads what lies behind, up to SPARE_BYTES: a branch would take registers.
    __device__ __forceinline__ void load(const CodeRing& ring, u32 code_stage, u32 step, u32 first_round) {
        u32 k = step * BLOCK_K + half * 32, first_pack = (step % CODE_STEPS * 2 + half) * kPacks;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            u32 of_round = row + (first_round + i) * kRoundRows;
            const unsigned char* codes_of_row = ring.codes(code_stage) + of_round * CODE_ROW_BYTES;
            const unsigned char* scales_of_row = ring.scales(code_stage) + of_round * SCALE_ROW_BYTES;
#pragma unroll
            for (int pack = 0; pack < kPacks; pack++) {
                u32 place = (first_pack + pack) ^ row % 8 / 2;  // by the engine's swizzle of 64 bytes
                codes[i][pack] = load_pack<u32, 4>(reinterpret_cast<const u32*>(codes_of_row + place * 16));
            }
            u32 of_row = k / GROUP_K % kScalesOfRow * sizeof(SCALE_SCALAR);
            if (WEIGHT_GROUP) scales[i] = *reinterpret_cast<const Pack<SCALE_SCALAR, kScales>*>(scales_of_row + of_row);
            zeros[i] = HAS_ZEROS ? scales_of_row[SCALE_BYTES + k / GROUP_K % SCALE_ROW_BYTES] : 8;
        }
    }

    // What is loaded, to a stage's weights, counted from block_memory.
    __device__ __forceinline__ void decode(u32 weights, u32 first_round) const {
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            u32 of_round = row + (first_round + i) * kRoundRows;
            if (BLOCK_N % kRoundRows && of_round >= BLOCK_N) continue;
            u32 to = weights + of_round * ROW_BYTES + (half * 4 ^ row % 8) * 16;  // of the first eight: others differ in 2 bits
            PairScale<OPERAND, SCALE_SCALAR> scale;
#pragma unroll
            for (int eight = 0; eight < 4; eight++) {
                if (WEIGHT_GROUP && eight % (4 / kScales) == 0) {
                    SCALE_SCALAR stored = scales[i].values[eight * kScales / 4];
                    if constexpr (WEIGHT_FACTOR == 1) scale.set(stored);
                    else scale.set(to_float(stored) * WEIGHT_FACTOR);
                }
                const u32* words = codes[i][eight / kEightsOfPack].values + eight % kEightsOfPack * kPacks;
                Pack<u32, 4> pairs = Codec::eight(words, Int4<OPERAND>::minus(zeros[i]));
#pragma unroll
                for (int j = 0; j < 4; j++) pairs.values[j] = WEIGHT_GROUP ? scale.times(pairs.values[j]) : pairs.values[j];
                store_pack(reinterpret_cast<u32*>(block_memory + (to ^ eight * 16)), pairs);
            }
        }
    }
};

// What multiply_experts() wants of weights, see PlainWeights.
struct CodedWeights {
    static constexpr u32 kRingBytes = CODE_RING_BYTES + CODE_STAGES * 16 + SPARE_BYTES, kShowings = 1;
    static constexpr bool kScalesRows = HAS_ROW_SCALES, kStored = true;
    template <class Gemm> static constexpr u32 kFillings = DECODING_WARPS + (Gemm::kDenseTokens ? 1 : PRODUCER_THREADS);
    const TensorMap& codes;
    const TensorMap *scales, *zeros;
    const float* row_scales;  // [NUM_EXPERTS, rows of an expert]

    static __device__ __forceinline__ CodeRing ring() { return {block_memory + STAGES * STAGE_BYTES}; }

    __device__ __forceinline__ void init() const {
        prefetch_map(codes);
        for (int s = 0; s < CODE_STAGES; s++) {
            init_barrier(ring().filled(s), 1);
            init_barrier(ring().emptied(s), DECODING_WARPS);
        }
    }

    // Orders code stages until the ring is full, those of the index-th tile and then of the next, which is shown already. From the
    // tile's first_of_tile-th on, whose turn it is, `ahead` are ordered. One thread.
    //
    // The last takes the place of the stage before this turn's: every warp is done with that, or will be without this one's help.
    template <class Gemm>
    __device__ __forceinline__ void order_codes(const Gemm& gemm, const Pipeline& pipeline, u32 index, u32 first_of_tile,
                                                const CodeTurn& turn, u32& ahead) const {
        CodeRing ring = CodedWeights::ring();
        u64 policy = evict_unchanged_policy();
        for (; ahead < CODE_STAGES; ahead++) {
            u32 of_index = index, of_tile = first_of_tile + ahead, stage = turn.stage + ahead, emptied_parity = turn.parity ^ 1;
            if (of_tile >= kCodeStages<Gemm>) of_tile -= kCodeStages<Gemm>, of_index++;
            if (of_tile >= kCodeStages<Gemm>) return;  // of the tile after the next, which nobody has taken yet
            if (stage >= CODE_STAGES) stage -= CODE_STAGES, emptied_parity ^= 1;
            Tile from = pipeline.shown_tile(of_index);
            if (from.expert < 0) return;
            u32 filled = ring.filled(stage), group = of_tile * CODE_K / GROUP_K;
            wait_barrier(ring.emptied(stage), emptied_parity);
            arrive_expecting(filled, CODE_BYTES + SCALE_BYTES + ZERO_BYTES);
            auto copy = [&](unsigned char* to, const TensorMap& map, u32 byte) {
                BoxStart start = gemm.box_start(from.expert, from.column, 0, byte);
                copy_box_to_blocks<1>(shared_address(to), map, start, filled, policy);
            };
            copy(ring.codes(stage), codes, of_tile * CODE_ROW_BYTES);
            if (WEIGHT_GROUP) copy(ring.scales(stage), *scales, group * sizeof(SCALE_SCALAR) / SCALE_ROW_BYTES * SCALE_ROW_BYTES);
            if (HAS_ZEROS) copy(ring.zeros(stage), *zeros, group / SCALE_ROW_BYTES * SCALE_ROW_BYTES);
        }
    }

    // Dense tokens are what the previous grid writes; weights and offsets are older, so the first codes come before its end.
    template <class Gemm>
    __device__ __forceinline__ void fill_ring(const Gemm& gemm, const Schedule& schedule, const Pipeline& pipeline) const {
        u32 thread = threadIdx.x - CONSUMER_THREADS, lane = thread % 32;
        bool leader = thread == 0, scheduler = thread < 32;
        CodeRing ring = CodedWeights::ring();
        u32 ticket = 0;
        if (scheduler) {
            ticket = cluster_index();  // a block's first; the others are counted after these
            take_tile(gemm, schedule, pipeline, 0, ticket);
        }
        Turn turn = {0, 1};
        CodeTurn code_turn = {0, 0};
        u32 ahead = 0;  // of the leader
        Decoder<Gemm> decoder;
        for (u32 index = 0;; index++) {
            Tile tile = pipeline.tile(index);
            if (scheduler && tile.expert >= 0) take_tile(gemm, schedule, pipeline, index + 1, ticket);
            if (index == 0) {
                if (leader) order_codes(gemm, pipeline, index, 0, code_turn, ahead);
                if (Gemm::kDenseTokens) {
                    wait_for_previous_grid();
                    order_writes_before_bulk_copies();
                }
            }
            if (tile.expert < 0) break;
            auto load = [&](u32 step) {
                if (step % CODE_STEPS == 0) wait_barrier(ring.filled(code_turn.stage), code_turn.parity);
                decoder.load(ring, code_turn.stage, step, 0);
            };
            auto decode = [&](u32 step) {
                u32 weights = turn.stage * STAGE_BYTES + TOKEN_BYTES;
                if (!decoder.kEarly) load(step);
                decoder.decode(weights, 0);
#pragma unroll 1
                for (u32 round = decoder.kAtOnce; round < decoder.kRounds; round += decoder.kAtOnce) {
                    decoder.load(ring, code_turn.stage, step, round);
                    decoder.decode(weights, round);
                }
                __syncwarp();
                if (lane == 0) arrive(pipeline.filled(turn.stage));
                if (leader && step % CODE_STEPS == 0) order_codes(gemm, pipeline, index, step / CODE_STEPS, code_turn, ahead);
                if ((step + 1) % CODE_STEPS == 0 || step + 1 == kSteps<Gemm>) {
                    if (lane == 0) arrive(ring.emptied(code_turn.stage));
                    code_turn.next();
                    ahead--;
                }
            };
            if constexpr (Gemm::kDenseTokens) {
#pragma unroll 1
                for (u32 step = 0; step < kSteps<Gemm>; step++, turn.next()) {
                    if (decoder.kEarly) load(step);
                    wait_barrier(pipeline.emptied(turn.stage), turn.parity);
                    if (leader) {
                        arrive_expecting(pipeline.filled(turn.stage), (tile.slots + 63) / 64 * 64 * ROW_BYTES);
                        for (int slot = 0; slot < tile.slots; slot += 64) {
                            copy_box(pipeline.tokens(turn.stage) + slot * ROW_BYTES, gemm.token_map, step * BLOCK_K,
                                     tile.first_slot + slot, pipeline.filled(turn.stage));
                        }
                    }
                    __syncwarp();
                    decode(step);
                }
            } else {
                RowLoader<Gemm, 8> rows(gemm, tile, thread);
#pragma unroll 1
                for (u32 step = 0; step < kSteps<Gemm>; step++, turn.next()) {
                    if (decoder.kEarly) load(step);
                    wait_barrier(pipeline.emptied(turn.stage), turn.parity);
                    rows.load(pipeline.tokens(turn.stage), step, evict_unchanged_policy());  // a new one, for registers
                    arrive_after_copies(pipeline.filled(turn.stage));
                    decode(step);
                }
            }
        }
        wait_for_copies();
    }
};
