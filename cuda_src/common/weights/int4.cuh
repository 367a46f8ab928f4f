// Weights of 4 bits that are integers: a code less the zero, which is 8, or with HAS_ZEROS the group's own.
//
// A code in the last binary digits of 128 (fp16: 1024) is that number and the code; less 128 and the zero it is the weight.
#pragma once
#include "pairs.cuh"

struct Codec {
    static constexpr u32 kBits = 4, kOfRowScale = 1;

    // Pair j of a word of 8 codes.
    static __device__ __forceinline__ u32 pair(u32 word, u32 j, u32 minus, bf16 type) {
        return fma_pair(digits_of(word >> 4 * j, 0x000f000fu, 0x43004300u), 0x3f803f80u, minus, type);
    }

    static __device__ __forceinline__ u32 pair(u32 word, u32 j, u32 minus, fp16 type) {
        return fma_pair(digits_of(word >> 4 * j, 0x000f000fu, 0x64006400u), 0x3c003c00u, minus, type);
    }

    // What pair() wants to know of a group, from its zero: -(128 + zero), of fp16 -(1024 + zero).
    static __device__ __forceinline__ u32 of_group(u32 zero, bf16) { return 0xc300c300u + zero * 0x00010001u; }

    static __device__ __forceinline__ u32 of_group(u32 zero, fp16) { return 0xe400e400u + zero * 0x00010001u; }

    // Pair j of a word, times a scale that has the 8 binary digits of a bf16, in fp16, whose 11 digits hold that exactly: a code in the
    // first binary digits below that of 16 is 16 + code, and 24 scales, which are to be taken away, have 10 digits.
    static __device__ __forceinline__ u32 scaled_pair(u32 word, u32 j, u32 scale, u32 minus) {
        u32 turned = __funnelshift_l(word, word, 6 - 4 * j);
        return fma_pair(digits_of(turned, 0x03c003c0u, 0x4c004c00u), scale, minus, fp16());
    }

    // What scaled_pair() takes away: 24 scales.
    static __device__ __forceinline__ u32 of_scale(u32 scale) { return mul_pair(scale, 0xce00ce00u, fp16()); }

    static __device__ __forceinline__ Fragment fragment(u32 word, u32, u32 zero, bf16 type) {
        u32 minus = of_group(zero, type);
        Fragment f;
#pragma unroll
        for (int j = 0; j < 4; j++) f.words[j] = pair(word, j, minus, type);
        return f;
    }

    // fp16 has room for 16 times the code, too, so that two pairs come without a shift of their own.
    static __device__ __forceinline__ Fragment fragment(u32 word, u32, u32 zero, fp16 type) {
        u32 minus = of_group(zero, type), minus_of_16th = 0xd400d400u + zero * 0x00100010u;  // -(64 + zero)
        Fragment f;
#pragma unroll
        for (int j = 0; j < 4; j += 2, word >>= 8) {
            f.words[j] = pair(word, 0, minus, type);
            f.words[j + 1] = fma_pair(digits_of(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, minus_of_16th, type);
        }
        return f;
    }
};
