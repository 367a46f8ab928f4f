// The activation contract on the device: activate<kActivation, kPrecise>(gate, up) = act(gate) * up in fp32.
//
// Every sigmoid-like activation is x * F(x) with F falling to 0 for x -> -inf. Written as 1 + tanh or 1 + erf
// that tail cancels; written as exp(-z) * (something near 1) it keeps its relative precision, so that is the form here.
// kPrecise carries z as an unevaluated sum of two floats and exp(-z) as mantissa * 2^exponent: 4 fp32 ulp over the
// whole range, subnormals included. Without it z is one float and exp is the hardware's: below 1% of a bf16 or fp16
// ulp, at a third of the work. The product with up is exact to its rounding wherever act(gate) is not subnormal.
#pragma once
#include "dtypes.cuh"

enum Activation { SILU, GELU, GELU_TANH, RELU2, SWIGLUOAI, SWIGLUSTEP, SITU };

// Parameters of the function, from its record in cupymoe/activation_math.py; an infinite limit is left to this default.
#ifndef ACTIVATION_LIMIT
#define ACTIVATION_LIMIT __int_as_float(0x7f800000)
#endif
#ifndef ACTIVATION_ALPHA
#define ACTIVATION_ALPHA 1.0
#endif
#ifndef ACTIVATION_BETA
#define ACTIVATION_BETA 1.0
#endif
#ifndef ACTIVATION_LINEAR_BETA
#define ACTIVATION_LINEAR_BETA __int_as_float(0x7f800000)
#endif

// (mantissa + low) * 2^exponent, mantissa in [0.7, 1.5]: holds what is far below the fp32 range.
struct Scaled {
    float mantissa;
    float low;
    int exponent;
};

// An unevaluated sum; low is below half an ulp of high.
struct TwoFloats {
    float high;
    float low;
};

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

__device__ __forceinline__ float exp2_approx(float x) {
    float result;
    asm("ex2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// exp(-(z.high + z.low)), z >= 0: reduction by log 2 (Cody-Waite), then the Taylor series, |r| <= 0.35, to below 1e-8.
__device__ __forceinline__ Scaled exp_of_minus(TwoFloats z) {
    float n = rintf(z.high * -1.44269504f);
    float r = fma_rn(n, -1.4286068e-6f, fma_rn(n, -0.69314575f, -z.high)) - z.low;
    float p = 1.0f / 5040;
    p = fma_rn(p, r, 1.0f / 720);
    p = fma_rn(p, r, 1.0f / 120);
    p = fma_rn(p, r, 1.0f / 24);
    p = fma_rn(p, r, 1.0f / 6);
    p = fma_rn(p, r, 0.5f);
    float rest = fma_rn(p, r * r, r), mantissa = 1.0f + rest;
    return {mantissa, rest - (mantissa - 1.0f), (int)n};
}

// value * 2^exponent, rounded once also where the result is subnormal: the first of the two steps is exact.
__device__ __forceinline__ float scale(float value, int exponent) {
    int half = exponent / 2;
    return mul_rn(mul_rn(value, power_of_two(half)), power_of_two(exponent - half));
}

__device__ __forceinline__ float value_of(Scaled scaled) {
    return scaled.exponent < -126 ? 0.0f : scaled.mantissa * power_of_two(scaled.exponent);
}

// x / (1 + exp(-z)) for x >= 0 and x * exp(-z) / (1 + exp(-z)) for x < 0, where z >= 0 is the logistic's |argument|.
// Past the cutoff, where z > 110, the result is below half the least subnormal; x * 0 keeps -inf -> NaN, as torch.
__device__ __forceinline__ float times_logistic(float x, TwoFloats z, float cutoff) {
    if (x < -cutoff) return mul_rn(x, 0.0f);
    Scaled e = exp_of_minus(z);
    float value = value_of(e), denominator = 1.0f + value;
    if (!(x < 0.0f)) return mul_rn(x, 1.0f / denominator);
    // The quotient's residual also carries the rounding of the denominator.
    float quotient = e.mantissa / denominator;
    float residual = fma_rn(-quotient, denominator, e.mantissa) - quotient * (value - (denominator - 1.0f));
    return scale(fma_rn(x, quotient, x * (residual * reciprocal_approx(denominator))), e.exponent);
}

__device__ __forceinline__ float times_logistic_approx(float x, float z_log2e) {
    float e = exp2_approx(-z_log2e);
    return mul_rn(x < 0.0f ? mul_rn(x, e) : x, reciprocal_approx(1.0f + e));
}

// 2 sqrt(2/pi) (a + 0.044715 a^3), a >= 0.
__device__ __forceinline__ TwoFloats gelu_tanh_argument(float a) {
    const float c1 = 1.5957692f, c1_low = -4.534068e-8f;
    const float c3 = 0.071354814f, c3_low = 2.3988325e-9f;
    // mul_rn, because the compiler would contract a product and the sum it goes into, and the errors would not be these.
    float square = mul_rn(a, a), square_low = fma_rn(a, a, -square);
    float cubic = mul_rn(c3, square), cubic_low = fma_rn(c3, square, -cubic) + fma_rn(c3, square_low, c3_low * square);
    float sum = c1 + cubic, of_cubic = sum - c1;
    float sum_low = (c1 - (sum - of_cubic)) + (cubic - of_cubic) + (c1_low + cubic_low);
    float z = mul_rn(a, sum);
    return {z, fma_rn(a, sum, -z) + a * sum_low};
}

// exp(a^2 / 2) * (1 - Phi(a)), 0 <= a <= 20.5: polynomial of degree 9 in (a - 3.5) / (a + 3.5), times 1 / (1 + 0.8 a),
// fitted for least maximum relative error (1.3e-8) against 0.5 erfcx(a / sqrt 2) in float64.
__device__ __forceinline__ float scaled_normal_tail(float a) {
    float q = (a - 3.5f) / (a + 3.5f);
    float p = 1.1832961e-4f;
    p = fma_rn(p, q, 1.0873878e-4f);
    p = fma_rn(p, q, -1.0380882e-3f);
    p = fma_rn(p, q, -4.6354617e-5f);
    p = fma_rn(p, q, 7.9854978e-3f);
    p = fma_rn(p, q, -2.0396126e-2f);
    p = fma_rn(p, q, 1.8110994e-2f);
    p = fma_rn(p, q, 2.5800865e-2f);
    p = fma_rn(p, q, -1.1559802e-1f);
    p = fma_rn(p, q, 4.0411159e-1f);
    float denominator = fma_rn(a, 0.8f, 1.0f), quotient = p / denominator;
    // The residual carries the rounding of the denominator and of the quotient: half an ulp is left of one and a half.
    float residual = fma_rn(-quotient, denominator, p) - quotient * fma_rn(a, 0.8f, 1.0f - denominator);
    return fma_rn(residual, reciprocal_approx(denominator), quotient);
}

// x * sigmoid(alpha x)
template <bool kPrecise> __device__ __forceinline__ float silu(float x) {
    const float alpha = (float)ACTIVATION_ALPHA, alpha_low = (float)(ACTIVATION_ALPHA - (double)alpha);
    if (!kPrecise) return times_logistic_approx(x, fabsf(x) * (alpha * 1.44269504f));
    // A small alpha multiplies what exp(-z) leaves of x, so that a subnormal is left of it until z is larger.
    const float cutoff = (alpha < 0.3f ? 150.0f : 110.0f) / alpha;
    float a = fminf(fabsf(x), cutoff), z = mul_rn(a, alpha);
    return times_logistic(x, {z, fma_rn(a, alpha, -z) + a * alpha_low}, cutoff);
}

// 1 - sigmoid(z), z >= 0.
template <bool kPrecise> __device__ __forceinline__ float logistic_rest(float z) {
    if (!kPrecise) {
        float e = exp2_approx(z * -1.44269504f);
        return e * reciprocal_approx(1.0f + e);
    }
    float e = value_of(exp_of_minus({z, 0.0f}));
    return e / (1.0f + e);
}

// bound * tanh(x / bound): x itself where the bound is infinite.
template <bool kPrecise> __device__ __forceinline__ float squash(float x, float bound) {
    if (bound == __int_as_float(0x7f800000)) return x;
    float t = fabsf(x) / bound;
    if (!(t >= 0.6f)) {  // NaN too
        // (tanh(t) / t - 1) / t^2, fitted for least maximum error of tanh(t) / t (1.2e-9) against float64.
        float square = t * t, p = 2.2267045e-3f;
        p = fma_rn(p, square, -8.2623493e-3f);
        p = fma_rn(p, square, 2.1732505e-2f);
        p = fma_rn(p, square, -5.3952113e-2f);
        p = fma_rn(p, square, 1.3333245e-1f);
        p = fma_rn(p, square, -3.3333331e-1f);
        return fma_rn(x, p * square, x);
    }
    return copysignf(fma_rn(-2.0f * bound, logistic_rest<kPrecise>(2.0f * t), bound), x);
}

// beta tanh(x / beta) sigmoid(x)
template <bool kPrecise> __device__ __forceinline__ float situ(float x) {
    float squashed = squash<kPrecise>(x, (float)ACTIVATION_BETA), a = fabsf(x);
    if (!kPrecise) return times_logistic_approx(squashed, a * 1.44269504f);
    if (!(x < 0.0f)) return fma_rn(-squashed, logistic_rest<kPrecise>(a), squashed);
    // A large beta leaves a subnormal of what is beyond silu's cutoff.
    const float cutoff = 150.0f;
    return x < -cutoff ? mul_rn(squashed, 0.0f) : times_logistic(squashed, {a, 0.0f}, cutoff);
}

template <bool kPrecise> __device__ __forceinline__ float gelu_tanh(float x) {
    if (!kPrecise) {
        float a = fabsf(x);
        return times_logistic_approx(x, a * fma_rn(a * a, 0.10294324f, 2.3022082f));
    }
    const float cutoff = 11.0f;
    return times_logistic(x, gelu_tanh_argument(fminf(fabsf(x), cutoff)), cutoff);
}

// x * Phi(x)
template <bool kPrecise> __device__ __forceinline__ float gelu(float x) {
    const float cutoff = 15.0f;
    if (fabsf(x) > cutoff) return x > 0.0f ? x : mul_rn(x, 0.0f);
    float a = fabsf(x), square = mul_rn(a, a);
    float tail = scaled_normal_tail(a);
    if (!kPrecise) {
        float e = exp2_approx(square * -0.72134752f);
        return mul_rn(x, x < 0.0f ? mul_rn(tail, e) : fma_rn(-tail, e, 1.0f));
    }
    Scaled e = exp_of_minus({0.5f * square, 0.5f * fma_rn(a, a, -square)});
    if (x < 0.0f) {
        // The excess is what the product was rounded up by. A negated product would be flushed where it is subnormal.
        float product = mul_rn(x, tail), excess = fma_rn(-tail, x, product);
        return scale(fma_rn(product, e.mantissa, fma_rn(excess, -1.0f, mul_rn(product, e.low))), e.exponent);
    }
    float below = value_of(e), probability = fma_rn(-tail, below, 1.0f);
    return fma_rn(x, probability, x * fma_rn(-tail, below, 1.0f - probability));
}

template <int kActivation, bool kPrecise> __device__ __forceinline__ float activate(float gate, float up) {
    if (kActivation == GELU) return mul_rn(gelu<kPrecise>(gate), up);
    if (kActivation == GELU_TANH) return mul_rn(gelu_tanh<kPrecise>(gate), up);
    if (kActivation == RELU2) {
        float positive = gate < 0.0f ? 0.0f : gate;
        // The square of a large gate leaves the fp32 range before up brings it back.
        return positive > 1e18f ? mul_rn(positive, mul_rn(positive, up)) : mul_rn(mul_rn(positive, positive), up);
    }
    if (kActivation == SITU) return mul_rn(situ<kPrecise>(gate), squash<kPrecise>(up, (float)ACTIVATION_LINEAR_BETA));
    const float limit = (float)ACTIVATION_LIMIT;
    // These clamps compare so that NaN passes through, as torch.clamp.
    up = up > limit ? limit : up < -limit ? -limit : up;
    if (kActivation == SWIGLUSTEP) {
        float gated = silu<kPrecise>(gate);
        return mul_rn(gated > limit ? limit : gated, up);
    }
    float gated = silu<kPrecise>(gate > limit ? limit : gate);
    return kActivation == SWIGLUOAI ? fma_rn(gated, up, gated) : mul_rn(gated, up);
}
