// Weights of 4 bits with a sign, 2 of exponent and 1 of mantissa, bias 1; made as those of e4m3.cuh, from the top nibble of a half.
//
// With GROUP 16 (NVFP4) scales are e4m3, never negative, and multiply the weights: 2 binary digits by 4 are exact. A factor that
// would exceed bf16 (fp16) is left for the scale of the row: 2^8.
#pragma once
#include "pairs.cuh"

struct Codec {
    static constexpr u32 kBits = 4, kOfRowScale = GROUP == 16 ? 256 : 1;

    // Pair j of a word of 8 codes, where pair() takes it.
    static __device__ __forceinline__ u32 aligned(u32 word, u32 j) { return word << (12 - 4 * j); }

    template <typename T> static __device__ __forceinline__ u32 pair(u32 word, u32 factor, T type) {
        return mul_pair(digits(word, type), factor, type);
    }

    // What pair() wants to know of a group, from the byte of its scale.
    template <typename T> static __device__ __forceinline__ u32 of_group(u32 scale, T type) {
        return GROUP == 16 ? factor_of(scale, type) : unscaled(type);
    }

    template <typename T> static __device__ __forceinline__ Fragment fragment(u32 word, u32, u32 scale, T type) {
        u32 factor = of_group(scale, type);
        Fragment f;
#pragma unroll
        for (int j = 0; j < 4; j++) f.words[j] = pair(aligned(word, j), factor, type);
        return f;
    }

    static __device__ __forceinline__ u32 digits(u32 word, bf16) { return digits_of(word >> 6, 0x01c001c0u, word & 0x80008000u); }

    static __device__ __forceinline__ u32 digits(u32 word, fp16) { return digits_of(word >> 3, 0x0e000e00u, word & 0x80008000u); }

    static __device__ __forceinline__ u32 unscaled(bf16) { return 0x7e807e80u; }  // 2^126

    static __device__ __forceinline__ u32 unscaled(fp16) { return 0x74007400u; }  // 2^14

    // The scale whose byte this is, times 2^118: times 2^120 it is a bf16, as e4m3.cuh has it.
    static __device__ __forceinline__ u32 factor_of(u32 scale, bf16 type) {
        return mul_pair(mul_pair((scale & 0x7f) * 0x00100010u, 0x7b807b80u, type), 0x7a807a80u, type);
    }

    // Times 2^6, of which 2^8 make it an fp16.
    static __device__ __forceinline__ u32 factor_of(u32 scale, fp16 type) {
        return mul_pair((scale & 0x7f) * 0x00800080u, 0x74007400u, type);
    }
};
