// Scales of 8 bits, and what multiplies two numbers of 16 bits by a scale.
#pragma once
#include "pairs.cuh"

// Four bits of exponent, three of mantissa; never negative here, nor NaN.
struct e4m3 { unsigned char bits; };
// 2^(bits - 127); the lowest is a subnormal float.
struct e8m0 { unsigned char bits; };

// -ftz=true would flush what is subnormal on the way.
__device__ __forceinline__ float to_float(e4m3 value) { return mul_rn(__uint_as_float((u32)(value.bits & 0x7f) << 20), 0x1p120f); }

__device__ __forceinline__ float to_float(e8m0 value) { return __uint_as_float(value.bits ? (u32)value.bits << 23 : 1u << 22); }

// Whether every S is a T, but for what a T is too narrow or too small for.
template <typename T, typename S> constexpr bool kHolds = true;
template <> constexpr bool kHolds<bf16, fp16> = false;
template <typename T> constexpr bool kHolds<T, fp32> = false;

// A scale that multiplies pairs of T. One that T can't hold is a sum of two, high and low: with the product by low rounded and
// added to that by high, the result is within 0.502 units of its last place, where one rounding is within 0.5.
template <typename T, typename S> struct PairScale {
    u32 high, low;

    // Of a scale times a power of two.
    static __device__ __forceinline__ PairScale of(S scale, float power) {
        float whole = to_float(scale) * power;
        u32 first = rounded_pair(whole, whole, T());
        float rest = whole - to_float(T{(unsigned short)first});
        return {first, kHolds<T, S> ? 0 : rounded_pair(rest, rest, T())};
    }

    __device__ __forceinline__ u32 times(u32 pair) const {
        return fma_pair(pair, high, kHolds<T, S> ? 0x80008000u : mul_pair(pair, low, T()), T());
    }
};
