// Weights of 4 bits with a scale for each GROUP of a row: (code - zero) * scale, where the zero is 8, or with HAS_ZEROS the
// group's own.
//
// Codes   A row is 4-byte words of 8 neighbouring codes c0..c7, in memory and in a stage; its depth is padded to a multiple of 32.
//         Nibble j of a word's low half is c[2j], of its high half c[2j + 1]: a shift and a mask are a pair of codes 16 bits apart.
// Step    64 k of 16 rows come by one ldmatrix. A pack is 32 codes of a row, and a lane gets word lane % 4 of four packs: its own
//         row's, that of the row 8 further, and of both the next. A word is 8 neighbouring k of a row, as a fragment is.
// Exact   A code in the last binary digits of 128 (fp16: 1024) is that number and the code; less 128 and the zero it is the weight,
//         an integer. Scales multiply sums of a group in fp32, so that no weight is rounded.
#pragma once
#include "groups.cuh"

static_assert(!TRANSPOSED && !WHOLE_ROWS && BLOCK_K % 64 == 0, "TRANSPOSED, WHOLE_ROWS, BLOCK_K");
static_assert(GROUP == 32 || GROUP == 64 || GROUP == 128, "GROUP");

// a * b + c, twice.
__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c, bf16) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));  // add.bf16x2 begins with sm_90
    return result;
}

__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c, fp16) {
    u32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// word & mask | digits, in one instruction: of two immediate operands the compiler makes two.
__device__ __forceinline__ u32 digits_of(u32 word, u32 mask, u32 digits) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(digits));
    return result;
}

// The codes of a word, less `zero`.
__device__ __forceinline__ Fragment fragment_of_codes(u32 word, u32 zero, bf16 type) {
    u32 minus = 0xc300c300u + zero * 0x00010001u;  // -(128 + zero)
    Fragment f;
#pragma unroll
    for (int j = 0; j < 4; j++) f.words[j] = fma_pair(digits_of(word >> 4 * j, 0x000f000fu, 0x43004300u), 0x3f803f80u, minus, type);
    return f;
}

// fp16 has room for 16 times the code, too, so that two pairs come without a shift of their own.
__device__ __forceinline__ Fragment fragment_of_codes(u32 word, u32 zero, fp16 type) {
    u32 minus = 0xe400e400u + zero * 0x00010001u, minus_of_16th = 0xd400d400u + zero * 0x00100010u;  // -(1024 + zero), -(64 + zero)
    Fragment f;
#pragma unroll
    for (int j = 0; j < 4; j += 2, word >>= 8) {
        f.words[j] = fma_pair(digits_of(word, 0x000f000fu, 0x64006400u), 0x3c003c00u, minus, type);
        f.words[j + 1] = fma_pair(digits_of(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, minus_of_16th, type);
    }
    return f;
}

struct Weights {
    static constexpr u32 kOfPack = 32, kStep = 64;

    typedef GroupValues<sizeof(SCALE_SCALAR)> Scales;
#if HAS_ZEROS
    typedef GroupValues<1> Zeros;
#else
    typedef NoValues Zeros;
#endif

    static __device__ __forceinline__ constexpr u64 bytes(u64 k) { return (k + 31) / 32 * 16; }

    // The 8 rows that a warp loads together then begin in different banks: a row of packs is kSame times an odd number of them.
    static __device__ __forceinline__ constexpr u32 swap_of_row(u32 row) {
        constexpr u32 kPacks = BLOCK_K / 32, kSame = kPacks % 8 == 0 ? 8 : kPacks & -kPacks;
        return row % 8 / (8 / kSame);
    }

    // 32 k of 16 rows for each of ROW_BLOCKS.
    struct Operands {
        Fragment low[ROW_BLOCKS], high[ROW_BLOCKS];
        float low_scales[ROW_BLOCKS], high_scales[ROW_BLOCKS];

        // sums += block b times 8 tokens: sums of their own first, which the scales of the two rows multiply.
        __device__ __forceinline__ void multiply_by(Fragment tokens, int b, float (&sums)[4]) const {
            float of_group[4] = {};
            multiply(of_group, low[b], high[b], tokens, scalar_t());
#pragma unroll
            for (int i = 0; i < 4; i++) sums[i] = fma_rn(of_group[i], i < 2 ? low_scales[b] : high_scales[b], sums[i]);
        }
    };

    // 64 k as they are stored: of each block of rows two words of the low rows and two of the high, by turns.
    struct Step {
        const Weights& weights;
        u32 stage, k, more;
        u32 words[ROW_BLOCKS][4];

        __device__ __forceinline__ Operands operands(int part) const {
            Operands operands;
            u32 of_part = more + part * 32;
#pragma unroll
            for (int b = 0; b < ROW_BLOCKS; b++) {
                u32 low = weights.row_of_group + b * 16, high = low + 8;
                operands.low[b] = fragment_of_codes(words[b][part * 2], zero(low, of_part), scalar_t());
                operands.high[b] = fragment_of_codes(words[b][part * 2 + 1], zero(high, of_part), scalar_t());
                operands.low_scales[b] = scale(low, of_part);
                operands.high_scales[b] = scale(high, of_part);
            }
            return operands;
        }

        __device__ __forceinline__ float scale(u32 row, u32 of_part) const {
            return to_float(load_shared<SCALE_SCALAR>(stage + FIRST_SCALE + row * Scales::kStageRowBytes + Scales::place(k, of_part)));
        }

        __device__ __forceinline__ u32 zero(u32 row, u32 of_part) const {
#if HAS_ZEROS
            return load_shared<unsigned char>(stage + FIRST_ZERO + row * Zeros::kStageRowBytes + Zeros::place(k, of_part));
#else
            return 8;
#endif
        }
    };

    u32 first_row, row_of_group, k_warp;  // the first row of 16 that this lane loads from, and that it has the groups of
    u32 first_pack, swap;                 // in a row

    __device__ __forceinline__ Weights(Place place, u32 lane) : k_warp(place.k_warp) {
        u32 first = place.row_warp * (ROW_BLOCKS * 16);
        first_row = first + lane % 16, row_of_group = first + lane / 4;
        first_pack = place.k_warp * 2 + lane / 16, swap = swap_of_row(lane % 8);
    }

    // Both leave no registers to spill: each group of tokens in flight has sums of its own.
    static constexpr int kLoadsAhead = TOKEN_GROUPS > 4 ? 2 : 3;

    static __device__ __forceinline__ constexpr int unrolled_steps(int groups) { return groups * ROW_BLOCKS > 4 ? 1 : 2; }

    // Step s of a stage, which begins at k.
    __device__ __forceinline__ Step load(u32 stage, u32 k, int s) const {
        Step step = {*this, stage, k, (s * K_WARPS + k_warp) * 64};
#pragma unroll
        for (int b = 0; b < ROW_BLOCKS; b++) {
            load_matrices(step.words[b], stage + (first_row + b * 16) * WEIGHT_ROW_BYTES +
                                             ((first_pack + s * K_WARPS * 2) ^ swap) * 16);
        }
        return step;
    }
};
