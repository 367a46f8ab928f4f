// The derivative side of the activation contract, for a backward kernel's epilogue:
// activation_gradients<kActivation>(gate, up) gives act(gate) * up and its derivatives by gate and by up, in fp32.
//
// Functions, clamps, and which side of a clamp has a slope are those of cupymoe/activation_math.py. The results are
// rounded to 16 bits afterwards, so there is one form, the fast one of activations.cuh: value and slope share each
// exponential. An error of act(gate) or of its slope is below 1% of a bf16 ulp and 8% of an fp16 ulp, of the number
// itself or of 1, whichever is greater.
#pragma once
#include "activations.cuh"

struct Gradients {
    float value;
    float gate;
    float up;
};

// 2^x, which is zero where it would be subnormal: what it is a part of is added to a number near 1.
__device__ __forceinline__ float exp2_or_zero(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// A function of one variable, at one place.
struct Sloped {
    float value;
    float slope;
};

// x * sigmoid(z) and its slope, from the slopes of x and z; z comes times log2(e).
// 1 - sigmoid loses its relative precision for z -> inf, where what it is part of is added to a sigmoid of almost 1.
__device__ __forceinline__ Sloped times_logistic_sloped(Sloped x, float z_log2e, float z_slope) {
    float sigmoid = reciprocal_approx(1.0f + exp2_or_zero(-z_log2e));
    float value = x.value * sigmoid;
    return {value, value * (1.0f - sigmoid) * z_slope + x.slope * sigmoid};
}

// x * sigmoid(alpha x)
__device__ __forceinline__ Sloped silu_sloped(float x) {
    const float alpha = (float)ACTIVATION_ALPHA;
    return times_logistic_sloped({x, 1.0f}, x * (alpha * 1.44269504f), alpha);
}

__device__ __forceinline__ Sloped gelu_tanh_sloped(float x) {
    // From |x| = 20 on the sigmoid is 0 or 1 already; bounded there, a square can't become infinite, and 0 * inf NaN.
    float square = fminf(x * x, 400.0f);
    return times_logistic_sloped({x, 1.0f}, x * (square * 0.10294324f + 2.3022082f), square * 0.21406444f + 1.5957692f);
}

// x * Phi(x)
__device__ __forceinline__ Sloped gelu_sloped(float x) {
    // exp(a^2 / 2) * (1 - Phi(a)) as t times a polynomial of degree 4 in t = 1 / (1 + 0.375 a), fitted on [0, 14] for
    // least maximum relative error (3.1e-5) against 0.5 erfcx(a / sqrt 2) in float64.
    float t = reciprocal_approx(fabsf(x) * 0.375f + 1.0f);
    float p = -0.09064273f;
    p = p * t + 0.20028147f;
    p = p * t + 0.08356422f;
    p = p * t + 0.15773393f;
    p = p * t + 0.14906103f;
    float e = exp2_approx(x * x * -0.72134752f), tail = p * t * e;
    float probability = x < 0.0f ? tail : 1.0f - tail;
    return {x * probability, x * (0.39894228f * e) + probability};
}

// bound * tanh(x / bound): x itself where the bound is infinite.
__device__ __forceinline__ Sloped squash_sloped(float x, float bound) {
    if (bound == __int_as_float(0x7f800000)) return {x, 1.0f};
    float squashed = squash<false>(x, bound), tanh = squashed * (1.0f / bound);
    return {squashed, 1.0f - tanh * tanh};
}

// What the gate contributes. Comparisons are such that NaN passes through.
template <int kActivation> __device__ __forceinline__ Sloped gate_sloped(float gate) {
    const float limit = (float)ACTIVATION_LIMIT;
    if (kActivation == GELU) return gelu_sloped(gate);
    if (kActivation == GELU_TANH) return gelu_tanh_sloped(gate);
    if (kActivation == RELU2) {
        float positive = gate < 0.0f ? 0.0f : gate;
        return {positive * positive, 2.0f * positive};
    }
    if (kActivation == SITU) {
        return times_logistic_sloped(squash_sloped(gate, (float)ACTIVATION_BETA), gate * 1.44269504f, 1.0f);
    }
    if (kActivation == SWIGLUSTEP) {
        Sloped gated = silu_sloped(gate);
        return {gated.value > limit ? limit : gated.value, gated.slope * (gated.value <= limit ? 1.0f : 0.0f)};
    }
    Sloped gated = silu_sloped(gate > limit ? limit : gate);
    return {gated.value, gate > limit ? 0.0f : gated.slope};
}

// What up contributes. A NaN that is clamped stays in the value but has no slope, as torch.clamp's.
template <int kActivation> __device__ __forceinline__ Sloped up_sloped(float up) {
    if (kActivation == GELU || kActivation == GELU_TANH || kActivation == RELU2) return {up, 1.0f};
    if (kActivation == SITU) return squash_sloped(up, (float)ACTIVATION_LINEAR_BETA);
    const float limit = (float)ACTIVATION_LIMIT, shift = kActivation == SWIGLUOAI ? 1.0f : 0.0f;
    if (limit == __int_as_float(0x7f800000)) return {up + shift, 1.0f};
    float clamped = up > limit ? limit : up < -limit ? -limit : up;
    return {clamped + shift, fabsf(up) <= limit ? 1.0f : 0.0f};
}

template <int kActivation> __device__ __forceinline__ Gradients activation_gradients(float gate, float up) {
    Sloped of_gate = gate_sloped<kActivation>(gate), of_up = up_sloped<kActivation>(up);
    return {of_gate.value * of_up.value, of_gate.slope * of_up.value, of_gate.value * of_up.slope};
}
