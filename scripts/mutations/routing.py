"""Faults of the router, and of the sort by expert."""

from __future__ import annotations

from scripts.mutations.mutation import BITS, cuda, launcher

ROUTE = ("tests/kernels/test_route.py",)
LOGITS = ("tests/kernels/test_router_logits.py",)
MANY_LOGITS = ("tests/kernels/test_router_logits_many.py",)
SORT = ("tests/kernels/test_sort_by_expert.py",)
MAPS = ("tests/test_expert_map.py::test_parts_sum_to_the_whole_in_every_backend",)


FAULTS = (
    cuda(
        "ties to the higher lane",
        "route.cu",
        "__ffs(__ballot_sync(FULL_WARP, local == top)) - 1",
        "31 - __clz(__ballot_sync(FULL_WARP, local == top))",
        ROUTE,
    ),
    cuda("ties to the higher index", "route.cu", "if (keys[i] > local)", "if (keys[i] >= local)", ROUTE),
    cuda("-0 below +0", "route.cu", "if (bits == 0x80000000u) bits = 0;", "", ROUTE),
    cuda("an expert chosen twice", "route.cu", "/ sum, keys[i] = 0;", "/ sum;", ROUTE),
    cuda(
        "renormalised where it was not asked for",
        "route.cu",
        "if (RENORMALIZE) weight",
        "if (!RENORMALIZE) weight",
        ROUTE,
    ),
    cuda("the scale of the place", "route.cu", "per_expert_scale[experts[j]]", "per_expert_scale[k]", ROUTE),
    cuda(
        "half of a sum", "common/warp.cuh", "int offset = 16; offset;", "int offset = 8; offset;", ROUTE, source="route"
    ),
    cuda(
        "wrong scale",
        "common/router_input.cuh",
        "to_float(scale))), ROOT)",
        "to_float(scale))), 2 * ROOT)",
        LOGITS,
        source="router_logits",
    ),
    cuda(
        "the sign of epsilon",
        "common/router_input.cuh",
        "/ HIDDEN + EPS",
        "/ HIDDEN - EPS",
        LOGITS,
        source="router_logits",
    ),
    cuda(
        "another lane's logit",
        "router_logits_many.cu",
        "if (lane == t * EXPERTS + e) own",
        "if (lane == e * TOKENS + t) own",
        MANY_LOGITS,
    ),
    cuda(
        "a lane counts itself",
        "sort_by_expert.cu",
        "u32 earlier = same & ((1u << lane) - 1);",
        "u32 earlier = same & ((2u << lane) - 1);",
        SORT,
    ),
    cuda(
        "a barrier dropped: offsets read while they are summed",
        "sort_by_expert.cu",
        "    __syncthreads();\n    for (int expert = threadIdx.x; blockIdx.x == 0",
        "\n    for (int expert = threadIdx.x; blockIdx.x == 0",
        SORT,
    ),
    cuda(
        "expert E taken for valid",
        "common/pairs.cuh",
        "expert < GLOBAL_EXPERTS ?",
        "expert <= GLOBAL_EXPERTS ?",
        SORT,
        source="sort_by_expert",
    ),
    cuda(
        "an expert that the map puts past those here taken for valid",
        "common/pairs.cuh",
        "expert < NUM_EXPERTS ?",
        "expert <= NUM_EXPERTS ?",
        MAPS,
        source="sort_by_expert",
        defines=("HAS_EXPERT_MAP=1",),
    ),
    cuda(
        "int64 ids cut to 32 bits",
        "common/pairs.cuh",
        "INDEX expert = load_from_l2(top_k_index + pair);",
        "int expert = (int)load_from_l2(top_k_index + pair);",
        SORT,
        source="sort_by_expert",
        defines=("INDEX=long long",),
    ),
    cuda(
        "routing weights in the order of the pairs",
        "sort_by_expert.cu",
        "weight_of_slot[slot] = top_k_weights[pair];",
        "weight_of_slot[pair] = top_k_weights[pair];",
        SORT,
        defines=("HAS_WEIGHTS=1",),
    ),
    cuda(
        "tickets not set to zero",
        "sort_by_expert.cu",
        "tickets[threadIdx.x] = 0;",
        "tickets[threadIdx.x] += 0;",
        BITS,
    ),
    launcher(
        "the last tokens without a block",
        "kernels/route.py",
        "(-(-num_tokens // WARPS), 1)",
        "(max(1, num_tokens // WARPS), 1)",
        ROUTE,
    ),
    launcher("the counts of two blocks missing", "kernels/sort_by_expert.py", "if blocks > 1:", "if blocks > 2:", SORT),
)
