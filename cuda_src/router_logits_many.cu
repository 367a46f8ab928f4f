// router_logits_many: router_logits.cu for many tokens, with the same bits: what numerics="invariant" wants.
//
// Reads  hidden_states [T, HIDDEN] SCALAR
//        scale         [HIDDEN] SCALAR
//        projection    [E, HIDDEN] SCALAR
// Writes router_logits [T, E] SCALAR
// Grid   (ceil(E / EXPERTS), ceil(T / (WARPS * TOKENS))); one warp owns TOKENS x EXPERTS logits.
// Needs  HIDDEN % VEC == 0, pointers aligned to VEC elements, TOKENS * EXPERTS == 32: a lane stores one logit.
// Maths  as router_logits.cu: each lane sums its packs' products in ascending order, then the lanes are added; rounded. A tensor
//        core would be faster and add the products of 16 k in an order of its own.
// Why    A pack that is loaded is multiplied TOKENS or EXPERTS times, and what becomes of a token's state is made once for EXPERTS
//        products. Blocks that run together share tokens, the warps of a block experts.
#include "common/async_copy.cuh"

#if !defined(SCALAR) || !defined(HIDDEN) || !defined(VEC) || !defined(EPS) || !defined(ROOT) || !defined(WARPS) || \
    !defined(TOKENS) || !defined(EXPERTS)
#error "define SCALAR, HIDDEN, VEC, EPS, ROOT (HIDDEN^-0.5), WARPS, TOKENS and EXPERTS"
#endif
#include "common/router_input.cuh"
static_assert(TOKENS * EXPERTS == 32, "a lane stores one logit");

extern "C" __global__ void __launch_bounds__(WARPS * 32)
router_logits_many(const SCALAR* hidden_states, const SCALAR* scale, const SCALAR* projection, SCALAR* __restrict__ router_logits,
                   u64 num_tokens, u64 num_experts) {
    u64 first_token = ((u64)blockIdx.y * WARPS + threadIdx.x / 32) * TOKENS;
    u32 lane = threadIdx.x % 32, first_expert = blockIdx.x * EXPERTS;
    wait_for_previous_grid();
    release_next_grid();
    if (first_token >= num_tokens) return;

    // Past the last token and the last expert these again: they are not stored.
    const SCALAR *tokens[TOKENS], *rows[EXPERTS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) tokens[t] = hidden_states + min(first_token + t, num_tokens - 1) * HIDDEN;
#pragma unroll
    for (int e = 0; e < EXPERTS; e++) rows[e] = projection + min((u64)first_expert + e, num_experts - 1) * HIDDEN;

    float squares[TOKENS] = {}, norms[TOKENS];
    for (u32 pack = lane; pack < PACKS; pack += 32) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) add_squares(squares[t], load_pack<SCALAR, VEC>(tokens[t] + pack * VEC));
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) norms[t] = norm_of(squares[t]);

    float logits[TOKENS][EXPERTS] = {};
    for (u32 pack = lane; pack < PACKS; pack += 32) {
        pack_t scales = load_pack<SCALAR, VEC>(scale + pack * VEC);
        float inputs[TOKENS][VEC];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            pack_t states = load_pack<SCALAR, VEC>(tokens[t] + pack * VEC);
#pragma unroll
            for (int v = 0; v < VEC; v++) inputs[t][v] = router_input(states.values[v], norms[t], scales.values[v]);
        }
#pragma unroll
        for (int e = 0; e < EXPERTS; e++) {
            pack_t weights = load_pack<SCALAR, VEC>(rows[e] + pack * VEC);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
#pragma unroll
                for (int v = 0; v < VEC; v++) logits[t][e] = fma_rn(inputs[t][v], to_float(weights.values[v]), logits[t][e]);
            }
        }
    }

    float own = 0.0f;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int e = 0; e < EXPERTS; e++) {
            float logit = warp_sum(logits[t][e]);
            if (lane == t * EXPERTS + e) own = logit;
        }
    }
    u64 token = first_token + lane / EXPERTS, expert = first_expert + lane % EXPERTS;
    if (token < num_tokens && expert < num_experts) router_logits[token * num_experts + expert] = from_float<SCALAR>(own);
}
