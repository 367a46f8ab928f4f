// route: router logits -> the top k experts of each token and their weights.
//
// Reads  router_logits    [T, NUM_EXPERTS] SCALAR
//        per_expert_scale [NUM_EXPERTS] SCALE_SCALAR, or null
// Writes top_k_weights    [T, TOP_K] fp32   softmax over all experts, (RENORMALIZE) over their sum, times the expert's scale
//        top_k_index      [T, TOP_K] i64    by falling logit; ties, -0 and +0 among them, to the lower index; NaN first
// Grid   ceil(T / WARPS); one warp owns one token, a lane owns PER_LANE neighbouring experts.
// Maths  fp32 in transformers' order: p = exp(l - max) / sum, w = p / sum of the chosen p (a true division), w * scale.
//        A row with a NaN or +inf logit has NaN weights, as softmax has.
// Source transformers Gemma4TextRouter; ranks by logit, which orders as the probabilities do and cannot tie by rounding.
#include "common/async_copy.cuh"
#include "common/warp.cuh"

#if !defined(SCALAR) || !defined(SCALE_SCALAR) || !defined(NUM_EXPERTS) || !defined(TOP_K) || !defined(RENORMALIZE) || !defined(WARPS)
#error "define SCALAR, SCALE_SCALAR, NUM_EXPERTS, TOP_K, RENORMALIZE and WARPS"
#endif
#define PER_LANE ((NUM_EXPERTS + 31) / 32)

// Unsigned integers in the order of the floats: NaN above all, -0 as +0; 0 is left for "no candidate".
__device__ __forceinline__ u32 order_key(float value) {
    if (value != value) return 0xffffffffu;
    u32 bits = __float_as_uint(value);
    if (bits == 0x80000000u) bits = 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
route(const SCALAR* router_logits, const SCALE_SCALAR* __restrict__ per_expert_scale,
      float* __restrict__ top_k_weights, long long* __restrict__ top_k_index, u64 num_tokens) {
    u64 token = (u64)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    wait_for_previous_grid();
    release_next_grid();
    if (token >= num_tokens) return;

    float logits[PER_LANE];
    u32 keys[PER_LANE];
    u32 best = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int expert = lane * PER_LANE + i;
        bool exists = expert < NUM_EXPERTS;
        logits[i] = exists ? to_float(router_logits[token * NUM_EXPERTS + expert]) : -__int_as_float(0x7f800000);
        keys[i] = exists ? order_key(logits[i]) : 0;
        best = max(best, keys[i]);
    }
    best = warp_max(best);
    // The greatest logit back from its key; a NaN key gives NaN.
    float max_logit = __uint_as_float(best & 0x80000000u ? best & 0x7fffffffu : ~best);

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) sum += expf(logits[i] - max_logit);
    sum = warp_sum(sum);

    // Lane k % 32 keeps the k-th choice.
    float chosen_sum = 0.0f;
    float probabilities[(TOP_K + 31) / 32];
    int experts[(TOP_K + 31) / 32];
#pragma unroll 1
    for (int k = 0; k < TOP_K; k++) {
        u32 local = 0;
        int local_index = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            if (keys[i] > local) local = keys[i], local_index = i;
        }
        u32 top = warp_max(local);
        int owner = __ffs(__ballot_sync(FULL_WARP, local == top)) - 1;
        float probability = 0.0f;
        if (lane == owner) {
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) {
                if (i == local_index) probability = expf(logits[i] - max_logit) / sum, keys[i] = 0;
            }
        }
        probability = __shfl_sync(FULL_WARP, probability, owner);
        int expert = __shfl_sync(FULL_WARP, lane * PER_LANE + local_index, owner);
        chosen_sum += probability;
        if (lane == k % 32) probabilities[k / 32] = probability, experts[k / 32] = expert;
    }
#pragma unroll
    for (int j = 0; j < (TOP_K + 31) / 32; j++) {
        int k = j * 32 + lane;
        if (k >= TOP_K) break;
        float weight = probabilities[j];
        if (RENORMALIZE) weight /= chosen_sum;
        if (per_expert_scale) weight *= to_float(per_expert_scale[experts[j]]);
        top_k_weights[token * TOP_K + k] = weight;
        top_k_index[token * TOP_K + k] = experts[j];
    }
}
