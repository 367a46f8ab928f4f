// What Gemma 4's router projects, and its logits' sums, one step at a time: whatever kernel takes these steps in the same
// order makes the same bits. A row of HIDDEN elements is PACKS packs of VEC, which the lanes of a warp take in turn: lane l has
// packs l, l + 32, ...
//
// Maths  fp32, rounded to SCALAR where transformers rounds: after the norm, and after each of the two products.
// Needs  SCALAR, HIDDEN, VEC, EPS and ROOT (HIDDEN^-0.5).
#pragma once
#include "warp.cuh"

#define PACKS (HIDDEN / VEC)

typedef Pack<SCALAR, VEC> pack_t;

__device__ __forceinline__ float rounded(float value) { return to_float(from_float<SCALAR>(value)); }

__device__ __forceinline__ void add_squares(float& squares, const pack_t& states) {
#pragma unroll
    for (int v = 0; v < VEC; v++) squares = fma_rn(to_float(states.values[v]), to_float(states.values[v]), squares);
}

// One over the root mean square of a row, from each lane's part of the sum of squares. Whole warps.
__device__ __forceinline__ float norm_of(float squares) { return rsqrtf(warp_sum(squares) / HIDDEN + EPS); }

__device__ __forceinline__ float router_input(SCALAR state, float norm, SCALAR scale) {
    float normed = rounded(mul_rn(to_float(state), norm));
    return rounded(mul_rn(rounded(mul_rn(normed, to_float(scale))), ROOT));
}
