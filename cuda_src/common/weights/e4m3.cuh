// Weights of 8 bits with a sign, 4 of exponent and 3 of mantissa, bias 7. There are no infinities; NaN has been refused.
//
// Moved to where bf16 (fp16) has exponent and mantissa they are the weight but for the difference of the biases, subnormal weights
// too. A pair is moved from the upper bytes of the halves.
#pragma once
#include "pairs.cuh"

struct Codec {
    static constexpr u32 kBits = 8, kOfRowScale = 1;

    // Pair j of a word of 4 codes.
    static __device__ __forceinline__ u32 pair(u32 word, u32 j, u32, bf16 type) {
        word <<= 8 - 8 * j;
        return mul_pair(digits_of(word >> 4, 0x07f007f0u, word & 0x80008000u), 0x7b807b80u, type);  // 2^120
    }

    static __device__ __forceinline__ u32 pair(u32 word, u32 j, u32, fp16 type) {
        word <<= 8 - 8 * j;
        return mul_pair(digits_of(word >> 1, 0x3f803f80u, word & 0x80008000u), 0x5c005c00u, type);  // 2^8
    }

    // Pair j of a word as fp16, by an instruction of sm_89.
    static __device__ __forceinline__ u32 converted_pair(u32 word, u32 j) {
        u32 result;
        asm("{\n.reg .b16 pair, rest;\nmov.b32 {pair, rest}, %1;\ncvt.rn.f16x2.e4m3x2 %0, pair;\n}"
            : "=r"(result) : "r"(__byte_perm(word, 0, 0x4420 + 0x11 * j)));
        return result;
    }

    template <typename T> static __device__ __forceinline__ u32 of_group(u32, T) { return 0; }

    template <typename T> static __device__ __forceinline__ Fragment fragment(u32 first, u32 second, u32, T type) {
        return {pair(first, 0, 0, type), pair(first, 1, 0, type), pair(second, 0, 0, type), pair(second, 1, 0, type)};
    }
};
