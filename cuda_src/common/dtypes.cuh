// Element types without any toolkit header, and 16-byte vector access.
//
// The launcher chooses the element type by -D SCALAR=bf16|fp16|fp32; arithmetic is always fp32.
// CuPy compiles with -ftz=true, so an operation that must keep subnormals is written as PTX here.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
typedef float fp32;

__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float((u32)value.bits << 16); }

__device__ __forceinline__ float to_float(fp16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

__device__ __forceinline__ float to_float(fp32 value) { return value; }

template <typename T> __device__ __forceinline__ T from_float(float value);

template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

template <> __device__ __forceinline__ fp16 from_float<fp16>(float value) {
    fp16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

template <> __device__ __forceinline__ fp32 from_float<fp32>(float value) { return value; }

// Products, sums and fused products that keep subnormal operands and results.
__device__ __forceinline__ float mul_rn(float a, float b) {
    float result;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

__device__ __forceinline__ float fma_rn(float a, float b, float c) {
    float result;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
    return result;
}

// kCount neighbouring elements, moved as one access.
template <typename T, int kCount> struct alignas(sizeof(T) * kCount) Pack {
    T values[kCount];
};

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* address) {
    return *reinterpret_cast<const Pack<T, kCount>*>(address);
}

template <typename T, int kCount>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, kCount>& pack) {
    *reinterpret_cast<Pack<T, kCount>*>(address) = pack;
}
