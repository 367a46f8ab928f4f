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

// Two numbers, rounded, in one instruction.
__device__ __forceinline__ u32 rounded_pair(float first, float second, bf16) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

__device__ __forceinline__ u32 rounded_pair(float first, float second, fp16) {
    u32 result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

// One number of a pair, as both of another: no instruction where fma_pair() takes it.
__device__ __forceinline__ u32 twice(u32 pair, u32 which) {
    u32 result;
    if (which) asm("{\n.reg .b16 first, second;\nmov.b32 {first, second}, %1;\nmov.b32 %0, {second, second};\n}" : "=r"(result) : "r"(pair));
    else asm("{\n.reg .b16 first, second;\nmov.b32 {first, second}, %1;\nmov.b32 %0, {first, first};\n}" : "=r"(result) : "r"(pair));
    return result;
}
