// Weights of 4 bits with a sign, 2 of exponent and 1 of mantissa, bias 1; made as those of e4m3.cuh.
//
// A bf16 has its sign at bit 15, the lowest two of its exponent at 8 and 7, and the highest of its mantissa at 6. In a half of a
// word the bits of its four codes lie where one mask finds those of three pairs, and two the fourth's (0 to 3 are the pairs, s the
// sign, e the exponent's bits, m the mantissa's; 2s is of the other half's code):
//
//        bit   15  14  13  12  11  10   9   8   7   6   5   4   3   2   1   0
//              0s  3e  3s  2e  2e  2m  1s  0e  0e  0m  3e  3m  2s  1e  1e  1m
//
// With GROUP 16 (NVFP4) scales are e4m3, never negative, and multiply the weights: 2 binary digits by 4 are exact. A factor that
// would exceed bf16 (fp16) is left for the scale of the row: 2^8.
#pragma once
#include "pairs.cuh"

struct Codec {
    static constexpr u32 kBits = 4, kOfRowScale = GROUP == 16 ? 256 : 1;

    // Pair j of a word of 8 codes.
    template <typename T> static __device__ __forceinline__ u32 pair(u32 word, u32 j, u32 factor, T type) {
        return mul_pair(in_place(digits(word, j), type), factor, type);
    }

    // What pair() wants to know where scales do not multiply the weights.
    template <typename T> static __device__ __forceinline__ u32 of_group(u32, T type) { return unscaled(type); }

    // Of the scales of four groups of 16, a byte each, those of this lane's codes in the first and in the second 32 k, 16 bits apart:
    // of two groups the first is of the lower half of the lanes of a row.
    template <typename T> static __device__ __forceinline__ u32 lane_factors(u32 scales, T type) {
        return factors_of(__byte_perm(scales, 0, 0x4240 + threadIdx.x % 4 / 2 * 0x0101), type);
    }

    template <typename T> static __device__ __forceinline__ Fragment fragment(u32 word, u32, u32 factor, T type) {
        if (GROUP != 16) factor = unscaled(type);
        Fragment f;
#pragma unroll
        for (int j = 0; j < 4; j++) f.words[j] = pair(word, j, factor, type);
        return f;
    }

    // The pair as two bf16, times 2^-126.
    static __device__ __forceinline__ u32 digits(u32 word, u32 j) {
        constexpr u32 kMask = 0x81c081c0u;
        if (j == 0) return word & kMask;
        if (j == 1) return word << 6 & kMask;
        if (j == 2) return __funnelshift_r(word, word, 4) & kMask;
        return word << 2 & 0x80c080c0u | word >> 6 & 0x01000100u;
    }

    static __device__ __forceinline__ u32 in_place(u32 digits, bf16) { return digits; }

    static __device__ __forceinline__ u32 in_place(u32 digits, fp16) { return digits_of(digits << 3, 0x0e000e00u, digits & 0x80008000u); }

    static __device__ __forceinline__ u32 unscaled(bf16) { return 0x7e807e80u; }  // 2^126

    static __device__ __forceinline__ u32 unscaled(fp16) { return 0x74007400u; }  // 2^14

    // Two scales, from their bytes 16 bits apart, times 2^118: times 2^120 they are bf16, as e4m3.cuh has them.
    static __device__ __forceinline__ u32 factors_of(u32 scales, bf16 type) {
        return mul_pair(mul_pair((scales & 0x007f007fu) << 4, 0x7b807b80u, type), 0x7a807a80u, type);
    }

    // Times 2^6, of which 2^8 make them fp16.
    static __device__ __forceinline__ u32 factors_of(u32 scales, fp16 type) {
        return mul_pair((scales & 0x007f007fu) << 7, 0x74007400u, type);
    }
};
