// Weights of 4 bits that are integers: a code less the zero, which is 8, or with HAS_ZEROS the group's own.
//
// A code in the last binary digits of 128 (fp16: 1024) is that number and the code; less 128 and the zero it is the weight.
#pragma once
#include "pairs.cuh"

struct Codec {
    static constexpr u32 kBits = 4, kOfRowScale = 1;

    static __device__ __forceinline__ Fragment fragment(u32 word, u32, u32 zero, bf16 type) {
        u32 minus = 0xc300c300u + zero * 0x00010001u;  // -(128 + zero)
        Fragment f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            f.words[j] = fma_pair(digits_of(word >> 4 * j, 0x000f000fu, 0x43004300u), 0x3f803f80u, minus, type);
        }
        return f;
    }

    // fp16 has room for 16 times the code, too, so that two pairs come without a shift of their own.
    static __device__ __forceinline__ Fragment fragment(u32 word, u32, u32 zero, fp16 type) {
        u32 minus = 0xe400e400u + zero * 0x00010001u;          // -(1024 + zero)
        u32 minus_of_16th = 0xd400d400u + zero * 0x00100010u;  // -(64 + zero)
        Fragment f;
#pragma unroll
        for (int j = 0; j < 4; j += 2, word >>= 8) {
            f.words[j] = fma_pair(digits_of(word, 0x000f000fu, 0x64006400u), 0x3c003c00u, minus, type);
            f.words[j + 1] = fma_pair(digits_of(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, minus_of_16th, type);
        }
        return f;
    }
};
