// Weights of 8 bits that are integers, two's complement.
//
// bf16 has 8 binary digits, of which 128 + the lower seven bits takes all; what is taken away is 128, or 256 of a negative weight.
// In fp16 a code whose sign bit is flipped is the weight and 128, in the last binary digits of 1024.
#pragma once
#include "pairs.cuh"

struct Codec {
    static constexpr u32 kBits = 8, kOfRowScale = 1;

    // Pair j of a word of 4 codes.
    static __device__ __forceinline__ u32 pair(u32 word, u32 j, u32, bf16 type) {
        word >>= 8 * j;
        return fma_pair(digits_of(word, 0x007f007fu, 0x43004300u), 0x3f803f80u, digits_of(word, 0x00800080u, 0xc300c300u), type);
    }

    static __device__ __forceinline__ u32 pair(u32 word, u32 j, u32, fp16 type) {
        return fma_pair((word >> 8 * j & 0x00ff00ffu) ^ 0x64806480u, 0x3c003c00u, 0xe480e480u, type);
    }

    template <typename T> static __device__ __forceinline__ u32 of_group(u32, T) { return 0; }

    template <typename T> static __device__ __forceinline__ Fragment fragment(u32 first, u32 second, u32, T type) {
        return {pair(first, 0, 0, type), pair(first, 1, 0, type), pair(second, 0, 0, type), pair(second, 1, 0, type)};
    }
};
