// Two numbers of 16 bits in a word, made of the bits of codes.
#pragma once
#include "../mma.cuh"

// a * b + c, twice; subnormal numbers are kept.
__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c, bf16) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));  // add and mul begin with sm_90
    return result;
}

__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c, fp16) {
    u32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// a * b, twice: what is added is -0, so that a product keeps its sign.
template <typename T> __device__ __forceinline__ u32 mul_pair(u32 a, u32 b, T type) { return fma_pair(a, b, 0x80008000u, type); }

// word & mask | digits, in one instruction: of two immediate operands the compiler makes two.
__device__ __forceinline__ u32 digits_of(u32 word, u32 mask, u32 digits) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(digits));
    return result;
}
