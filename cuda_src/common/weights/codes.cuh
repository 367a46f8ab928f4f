// Quantised weights: packed codes, of which a codec makes operands, exactly, and what multiplies them.
//
// Codes   A row is 4-byte words of neighbouring codes, in memory and in a stage; its depth is padded to a multiple of 32. Of 8
//         codes c0..c7 of 4 bits nibble j of a word's low half is c[2j], of its high half c[2j + 1]; 4 codes of 8 bits are the
//         bytes c0, c2, c1, c3: a shift and a mask are a pair of codes 16 bits apart.
// Step    64 k of 16 rows come by one ldmatrix where codes have 4 bits. A pack is 32 codes of a row, and a lane gets word
//         lane % 4 of four packs: its own row's, that of the row 8 further, and of both the next. A word is 8 neighbouring k of a
//         row, as a fragment is. Of 8 bits a step is 32 k, and a lane loads its 8 codes of each of its rows.
// Groups  Scales of groups multiply sums of 32 k in fp32, so that no weight is rounded. Of groups of 16 they multiply the weights,
//         which the codec does, exactly, as it takes zero points away.
// Rows    With HAS_ROW_SCALES a finished sum is multiplied by the scale of its row (consumer.cuh).
#pragma once
#include "../stream/stage.cuh"
#if GROUP
#include "groups.cuh"
#endif

static_assert(!TRANSPOSED && !WHOLE_ROWS && BLOCK_K % 64 == 0, "TRANSPOSED, WHOLE_ROWS, BLOCK_K");
static_assert(GROUP == 0 || GROUP == 16 && WEIGHTS == E2M1 || GROUP == 32 || GROUP == 64 || GROUP == 128, "GROUP");

#define SCALES_SUMS (GROUP >= 32)  // and not the weights

struct Weights {
    static constexpr u32 kOfPack = 128 / Codec::kBits, kStep = 256 / Codec::kBits, kOfRowScale = Codec::kOfRowScale;

#if GROUP
    typedef GroupValues<sizeof(SCALE_SCALAR)> Scales;
#else
    typedef NoValues Scales;
#endif
#if HAS_ZEROS
    typedef GroupValues<1> Zeros;
#else
    typedef NoValues Zeros;
#endif

    static __device__ __forceinline__ constexpr u64 bytes(u64 k) { return (k + 31) / 32 * (4 * Codec::kBits); }

    // So swapped, rows that are loaded together (kTogether: of 8 one unit, which is a pack, or of 4 one of two packs) begin in different
    // banks. A row is kUnits long, which is kSame times an odd number, or a multiple of kTogether.
    static constexpr u32 kTogether = Codec::kBits == 4 ? 8 : 4, kUnit = 8 / kTogether, kUnits = BLOCK_K / kOfPack / kUnit;
    static constexpr u32 kSame = kUnits % kTogether == 0 ? kTogether : kUnits & -kUnits;

    static __device__ __forceinline__ constexpr u32 swap_of_row(u32 row) {
        return row % kTogether / (kTogether / kSame) * kUnit;
    }

    // A product waits for the one whose sums it goes on with. Where scales multiply sums, those of each 32 k begin anew; else two
    // chains, of every other 32 k of a stage, are half as long. With more sums than that a warp has others to go on with.
    static constexpr bool kTwoChains = !SCALES_SUMS && PARTS_OF_STEP == 2 && TOKEN_GROUPS * ROW_BLOCKS <= 4;

    // 32 k of 16 rows for each of ROW_BLOCKS.
    struct Operands {
        Fragment low[ROW_BLOCKS], high[ROW_BLOCKS];
        float low_scales[ROW_BLOCKS], high_scales[ROW_BLOCKS];

        // sums += block b times 8 tokens; of a group sums of their own first, which the scales of the two rows multiply.
        __device__ __forceinline__ void multiply_by(Fragment tokens, int b, float (&sums)[4]) const {
            if constexpr (!SCALES_SUMS) {
                multiply(sums, low[b], high[b], tokens, scalar_t());
            } else {
                float of_group[4] = {};
                multiply(of_group, low[b], high[b], tokens, scalar_t());
#pragma unroll
                for (int i = 0; i < 4; i++) sums[i] = fma_rn(of_group[i], i < 2 ? low_scales[b] : high_scales[b], sums[i]);
            }
        }
    };

    // What the groups of a row's step share.
    struct OfGroups {
        static constexpr u32 kGroups = GROUP && GROUP < kStep ? kStep / GROUP : 1;  // of a step
        [[maybe_unused]] Pack<SCALE_SCALAR, kGroups> scales;
        [[maybe_unused]] Pack<unsigned char, kGroups> zeros;
        [[maybe_unused]] u32 factors;  // of groups of 16: of this lane's codes in both parts of a step, 16 bits each

        // Of a row of the stage, which begins at k, from `more` on.
        __device__ __forceinline__ void load(u32 stage, u32 row, u32 k, u32 more) {
#if GROUP
            scales = load_shared<Pack<SCALE_SCALAR, kGroups>>(stage + FIRST_SCALE + row * Scales::kStageRowBytes + Scales::place(k, more));
#endif
#if HAS_ZEROS
            zeros = load_shared<Pack<unsigned char, kGroups>>(stage + FIRST_ZERO + row * Zeros::kStageRowBytes + Zeros::place(k, more));
#endif
#if GROUP == 16
            factors = Codec::lane_factors(*reinterpret_cast<u32*>(&scales), scalar_t());
#endif
        }

        static __device__ __forceinline__ constexpr u32 group_of(int part) { return kGroups == 1 ? 0 : part * 32 / GROUP; }

        __device__ __forceinline__ float scale(int part) const { return to_float(scales.values[group_of(part)]); }

        // What the codec wants to know of the group of this lane's 8 codes.
        __device__ __forceinline__ u32 of_part(int part) const {
#if HAS_ZEROS
            return zeros.values[group_of(part)];
#elif GROUP == 16
            return twice(factors, part);
#else
            return 8;  // the zero of codes that have none of their own
#endif
        }
    };

    // Codes as they are stored, of each block of rows two words of the low rows and two of the high, and what their groups share.
    struct Step {
        u32 low_words[ROW_BLOCKS][2], high_words[ROW_BLOCKS][2];
        OfGroups low_groups[ROW_BLOCKS], high_groups[ROW_BLOCKS];

        __device__ __forceinline__ Operands operands(int part) const {
            Operands operands;
#pragma unroll
            for (int b = 0; b < ROW_BLOCKS; b++) {
                operands.low[b] = Codec::fragment(low_words[b][part], low_words[b][1], low_groups[b].of_part(part), scalar_t());
                operands.high[b] = Codec::fragment(high_words[b][part], high_words[b][1], high_groups[b].of_part(part), scalar_t());
#if SCALES_SUMS
                operands.low_scales[b] = low_groups[b].scale(part), operands.high_scales[b] = high_groups[b].scale(part);
#endif
            }
            return operands;
        }
    };

    u32 first_row;         // of the rows of a stage, the first that this lane loads codes from
    u32 row_of_group;      // and the first whose groups it has
    u32 k_warp;
    u32 first_pack, swap;  // in a row, in packs

    __device__ __forceinline__ Weights(Place place, u32 lane) : k_warp(place.k_warp) {
        u32 first = place.row_warp * (ROW_BLOCKS * 16);
        row_of_group = first + lane / 4;
        first_row = first + (Codec::kBits == 4 ? lane % 16 : lane / 4);
        first_pack = place.k_warp * 2 + (Codec::kBits == 4 ? lane / 16 : lane % 4 / 2);
        swap = swap_of_row(Codec::kBits == 4 ? lane % 8 : lane / 4);
    }

    // With more groups in flight registers would spill, as each has sums of its own.
    static constexpr int kLoadsAhead = TOKEN_GROUPS > 4 ? (HAS_ZEROS && GROUP > 32 ? 1 : LOW_RANK ? 3 : 2) : 3;

    // With few sums several steps stand in a row, so that loads run further ahead, and with the fewest all steps of a stage. But all
    // steps take registers that are missing with an adapter, or with scales of 4 bytes for each 32 weights.
    static __device__ __forceinline__ constexpr int unrolled_steps(int groups) {
        constexpr bool kSpares = !LOW_RANK && (GROUP != 32 || sizeof(SCALE_SCALAR) < 4);
        return groups * ROW_BLOCKS > 4 ? 1 : groups * ROW_BLOCKS <= 2 && kSpares ? STEPS : 128 / kStep;
    }

    // Step s of a stage, which begins at k.
    __device__ __forceinline__ Step load(u32 stage, u32 k, int s) const {
        Step step;
        constexpr u32 kPacks = K_WARPS * 2;  // from a step to the warp's next
        u32 pack = swapped<kPacks, kSame * kUnit>(swap, first_pack, s);
        u32 from = stage + first_row * WEIGHT_ROW_BYTES + pack * 16;
#pragma unroll
        for (int b = 0; b < ROW_BLOCKS; b++, from += 16 * WEIGHT_ROW_BYTES) {
            if constexpr (Codec::kBits == 4) {
                u32 words[4];
                load_matrices(words, from);
                step.low_words[b][0] = words[0], step.high_words[b][0] = words[1];
                step.low_words[b][1] = words[2], step.high_words[b][1] = words[3];
            } else {
                u32 of_pack = threadIdx.x % 2 * 8;
                Pack<u32, 2> low = load_shared<Pack<u32, 2>>(from + of_pack);
                Pack<u32, 2> high = load_shared<Pack<u32, 2>>(from + of_pack + 8 * WEIGHT_ROW_BYTES);
#pragma unroll
                for (int i = 0; i < 2; i++) step.low_words[b][i] = low.values[i], step.high_words[b][i] = high.values[i];
            }
            u32 row = row_of_group + b * 16, more = (s * K_WARPS + k_warp) * kStep;
            step.low_groups[b].load(stage, row, k, more), step.high_groups[b].load(stage, row + 8, k, more);
        }
        return step;
    }
};
