// router_logits: Gemma 4's router up to its logits; RMSNorm without a weight, times scale and HIDDEN^-0.5, projected.
//
// Reads  hidden_states [T, HIDDEN] SCALAR
//        scale         [HIDDEN] SCALAR
//        projection    [E, HIDDEN] SCALAR
// Writes router_logits [T, E] SCALAR
// Grid   (E, ceil(T / WARPS)); one warp owns one logit.
// Needs  HIDDEN % VEC == 0, pointers aligned to VEC elements, HIDDEN <= 4096: a lane keeps its part of both rows in registers.
// Maths  common/router_input.cuh; each lane sums its packs' products in ascending order, then the lanes are added; rounded.
// Source transformers Gemma4TextRouter
// Why    For few tokens: every warp reads its token anew, which is cheaper than a launch for each step.
#include "common/async_copy.cuh"

#if !defined(SCALAR) || !defined(HIDDEN) || !defined(VEC) || !defined(EPS) || !defined(ROOT) || !defined(WARPS)
#error "define SCALAR, HIDDEN, VEC, EPS, ROOT (HIDDEN^-0.5) and WARPS"
#endif
#include "common/router_input.cuh"
#define PACKS_PER_LANE ((PACKS + 31) / 32)

extern "C" __global__ void __launch_bounds__(WARPS * 32)
router_logits(const SCALAR* hidden_states, const SCALAR* scale, const SCALAR* projection, SCALAR* __restrict__ router_logits,
              u64 num_tokens) {
    u64 token = (u64)blockIdx.y * WARPS + threadIdx.x / 32;
    u32 lane = threadIdx.x % 32;
    pack_t weights[PACKS_PER_LANE], states[PACKS_PER_LANE];
    const SCALAR* row = projection + (u64)blockIdx.x * HIDDEN;
    if (threadIdx.x == 0) prefetch_bulk(row, HIDDEN * sizeof(SCALAR));
    wait_for_previous_grid();
    release_next_grid();
    if (token >= num_tokens) return;

    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PACKS_PER_LANE; i++) {
        u32 pack = i * 32 + lane;
        if (pack >= PACKS) break;
        states[i] = load_pack<SCALAR, VEC>(hidden_states + token * HIDDEN + pack * VEC);
        weights[i] = load_pack<SCALAR, VEC>(row + pack * VEC);
    }
#pragma unroll
    for (int i = 0; i < PACKS_PER_LANE; i++) {
        if (i * 32 + lane >= PACKS) break;
        add_squares(squares, states[i]);
    }
    float norm = norm_of(squares);

    float logit = 0.0f;
#pragma unroll
    for (int i = 0; i < PACKS_PER_LANE; i++) {
        u32 pack = i * 32 + lane;
        if (pack >= PACKS) break;
        pack_t scales = load_pack<SCALAR, VEC>(scale + pack * VEC);
#pragma unroll
        for (int v = 0; v < VEC; v++) {
            logit = fma_rn(router_input(states[i].values[v], norm, scales.values[v]), to_float(weights[i].values[v]), logit);
        }
    }
    logit = warp_sum(logit);
    if (lane == 0) router_logits[token * gridDim.x + blockIdx.x] = from_float<SCALAR>(logit);
}
