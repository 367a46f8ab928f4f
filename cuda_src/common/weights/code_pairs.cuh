// Codes of quantised weights as bf16 or fp16, two at a time and exactly: masks and shifts put the bits of two codes where they are
// those of two numbers, and a sum or a product makes these the codes' values.
//
// Eight neighbouring codes of a row are one word of 4-bit codes, in which (word >> 4 j) & 0x000f000f is the pair (c[2 j],
// c[2 j + 1]), or two words of 8-bit codes, in each of which (word >> 8 j) & 0x00ff00ff is such a pair (cupymoe/weights/pack.py).
//
// A codec gives kBits, of a code, and eight(words, minus_zero): the values of eight codes from c[0] on, two a word. Only Int4 reads
// minus_zero: what minus() gives for the group's zero point, or for 8 where there are none.
#pragma once
#include "../dtypes.cuh"

// Where a number has what: the first power of two whose lowest bit is worth 1, and the place and bias of the exponent.
template <typename T> struct Bits;
template <> struct Bits<bf16> { static constexpr u32 kWhole = 0x4300, kExponentAt = 7, kBias = 127; };
template <> struct Bits<fp16> { static constexpr u32 kWhole = 0x6400, kExponentAt = 10, kBias = 15; };

constexpr __device__ u32 both_halves(u32 half) { return half * 0x10001u; }

// (a & mask) | b as one instruction, which the compiler makes two of where mask and b are constants.
__device__ __forceinline__ u32 masked_or(u32 a, u32 mask, u32 b) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(mask), "r"(b));
    return result;
}

// a b + c of both halves, rounded once. All of these keep subnormals.
__device__ __forceinline__ u32 fma_pairs(u32 a, u32 b, u32 c, bf16) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

__device__ __forceinline__ u32 fma_pairs(u32 a, u32 b, u32 c, fp16) {
    u32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// Minus zero leaves every product that it is added to as it is; products and sums of bf16 by themselves begin with sm_90.
template <typename T> __device__ __forceinline__ u32 mul_pairs(u32 a, u32 b, T type) {
    return fma_pairs(a, b, both_halves(0x8000), type);
}

__device__ __forceinline__ u32 add_pairs(u32 a, u32 b, bf16 type) {
#if __CUDA_ARCH__ >= 900
    u32 result;
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
#else
    return fma_pairs(a, both_halves(0x3f80), b, type);
#endif
}

__device__ __forceinline__ u32 add_pairs(u32 a, u32 b, fp16) {
    u32 result;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

// Both halves times 2^kPower, which is exact here.
template <u32 kPower, typename T> __device__ __forceinline__ u32 scale_pairs(u32 a, T type) {
    return mul_pairs(a, both_halves((Bits<T>::kBias + kPower) << Bits<T>::kExponentAt), type);
}

// Four bits: code minus zero point.
template <typename T> struct Int4 {
    static constexpr u32 kBits = 4;

    // -(kWhole + zero), as kWhole + code is what the code's bits become.
    static __device__ __forceinline__ u32 minus(u32 zero) { return both_halves(0x8000 | Bits<T>::kWhole | zero); }

    static __device__ __forceinline__ Pack<u32, 4> eight(const u32* words, u32 minus_zero) {
        Pack<u32, 4> pairs;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            pairs.values[j] = add_pairs(masked_or(words[0] >> 4 * j, 0x000f000f, both_halves(Bits<T>::kWhole)), minus_zero, T());
        }
        return pairs;
    }
};

// Eight bits, two's complement.
template <typename T> struct Int8 {
    static constexpr u32 kBits = 8;

    static __device__ __forceinline__ Pack<u32, 4> eight(const u32* words, u32) {
        Pack<u32, 4> pairs;
#pragma unroll
        for (int j = 0; j < 4; j++) pairs.values[j] = pair(words[j / 2] >> j % 2 * 8, T());
        return pairs;
    }

    // 128 + the lower 7 bits, minus 128, or 256 where the highest bit is set.
    static __device__ __forceinline__ u32 pair(u32 codes, bf16 type) {
        u32 lower = (codes & 0x007f007f) | both_halves(0x4300), minus = (codes & 0x00800080) | both_halves(0xc300);
        return add_pairs(lower, minus, type);
    }

    // The highest bit inverted is the code + 128: 1024 + that, minus 1152.
    static __device__ __forceinline__ u32 pair(u32 codes, fp16 type) {
        return add_pairs((codes & 0x00ff00ff) ^ both_halves(0x6480), both_halves(0x8000 | 0x6480), type);
    }
};

// Four bits of exponent, three of mantissa; its two NaN are 480 here.
template <typename T> struct E4m3 {
    static constexpr u32 kBits = 8;

    static __device__ __forceinline__ Pack<u32, 4> eight(const u32* words, u32) {
        Pack<u32, 4> pairs;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 codes = words[j / 2] >> j % 2 * 8;
            u32 bits = (codes & 0x00800080) << 8 | (codes & 0x007f007f) << (Bits<T>::kExponentAt - 3);
            pairs.values[j] = scale_pairs<Bits<T>::kBias - 7>(bits, T());
        }
        return pairs;
    }
};

// Two bits of exponent, one of mantissa.
template <typename T> struct E2m1 {
    static constexpr u32 kBits = 4;

    static __device__ __forceinline__ Pack<u32, 4> eight(const u32* words, u32) {
        Pack<u32, 4> pairs;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 codes = words[0] >> 4 * j;
            u32 bits = (codes & 0x00080008) << 12 | (codes & 0x00070007) << (Bits<T>::kExponentAt - 1);
            pairs.values[j] = scale_pairs<Bits<T>::kBias - 1>(bits, T());
        }
        return pairs;
    }
};

// Scales of 8 bits, without a sign. -ftz=true would flush what is subnormal on the way.
struct e4m3 { unsigned char bits; };
struct e8m0 { unsigned char bits; };

__device__ __forceinline__ float to_float(e4m3 value) { return mul_rn(__uint_as_float((u32)(value.bits & 0x7f) << 20), 0x1p120f); }

// 2^(bits - 127); the lowest is a subnormal float.
__device__ __forceinline__ float to_float(e8m0 value) { return __uint_as_float(value.bits ? (u32)value.bits << 23 : 0x00400000u); }

// Whether every S is a T, but for what a T is too narrow or too small for.
template <typename T, typename S> constexpr bool kHolds = true;
template <> constexpr bool kHolds<bf16, fp16> = false;
template <typename T> constexpr bool kHolds<T, fp32> = false;

// A scale that multiplies pairs of T. One that T can't hold is a sum of two, high and low: with the product by low rounded and
// added to that by high, the result is within 0.502 units of its last place, where one rounding is within 0.5.
template <typename T, typename S> struct PairScale {
    u32 high, low;

    __device__ __forceinline__ void set(T scale) { high = both_halves(scale.bits); }

    template <typename Other> __device__ __forceinline__ void set(Other scale) {
        float whole = to_float(scale);
        T first = from_float<T>(whole);
        high = both_halves(first.bits);
        if (!kHolds<T, S>) low = both_halves(from_float<T>(whole - to_float(first)).bits);
    }

    __device__ __forceinline__ u32 times(u32 pair) const {
        return fma_pairs(pair, high, kHolds<T, S> ? both_halves(0x8000) : mul_pairs(pair, low, T()), T());
    }
};
