"""Which numbers of tokens stand for all others: one of every range that kernels are compiled for."""

from __future__ import annotations

import bisect
from functools import partial
from typing import Any

from cupymoe.backends import INVARIANT
from cupymoe.backends.fused import plans_at_once, stream_reason, takes_tiles
from cupymoe.config import Gemma4MoEConfig
from cupymoe.kernels.arch import HOPPER, Arch
from cupymoe.kernels.coded_tiles import coded_slots
from cupymoe.kernels.expert_tiles import cut, few_pairs
from cupymoe.kernels.load import Load
from cupymoe.kernels.plan_experts import pairs_per_lane
from cupymoe.kernels.sort_by_expert import FEW_PAIRS, block_of
from cupymoe.kernels.stream_regimes import regime
from cupymoe.kernels.unsorted_pairs import MAX_PAIRS
from cupymoe.weights.format import PLAIN

_MAX_TOKENS = 32768


def _way(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    training: bool,
    arch: Arch,
    weight_format: str,
    numerics: str,
    global_num_experts: int | None,
) -> tuple[Any, ...]:
    """What the fused backend's kernels are compiled for, as far as it depends on the number of tokens: without and with
    an adapter, and of gradients."""
    load = Load.of(num_tokens, top_k, num_experts, global_num_experts)
    sort = block_of(load.num_pairs, num_experts)
    is_invariant = numerics == INVARIANT
    few = few_pairs(load) if is_invariant else 0
    of_codes = coded_slots(load) if weight_format != PLAIN else 0
    by_tiles = *cut(load, intermediate_size), sort, few, load.num_pairs <= MAX_PAIRS, of_codes
    ways: list[tuple[Any, ...]]
    if takes_tiles(load, hidden_size, arch, weight_format, is_invariant=is_invariant):
        ways = [by_tiles]
    elif stream_reason(load, arch, weight_format) is not None or (is_invariant and arch.wgmma):
        ways = [(sort,)]  # another backend's, which sorts too
    else:
        planned: Any = pairs_per_lane(load.num_pairs) if plans_at_once(load, arch) else sort
        settings = {"has_codes": weight_format != PLAIN, "is_invariant": is_invariant}
        regime_of = partial(regime, load, intermediate_size, arch, **settings)
        regimes = regime_of(has_adapter=False), regime_of(has_adapter=True)
        ways = [(each, None if each.inline_pairs else planned) for each in regimes]
    if training:
        ways.append(by_tiles)  # however few the tokens are, gradients go by tiles
    return tuple(ways)


def one_of_each_way(
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    training: bool = False,
    arch: Arch = HOPPER,
    weight_format: str = PLAIN,
    numerics: str = "fast",
    global_num_experts: int | None = None,
) -> tuple[int, ...]:
    """The first number of tokens of every range that kernels are compiled for; with ``training`` those of gradients
    too. Where the ``num_experts`` are some of ``global_num_experts``, which tokens choose from, ranges are longer."""
    of_layer = num_experts, top_k, hidden_size, intermediate_size
    sizes = *of_layer, training, arch, weight_format, numerics, global_num_experts
    counts: list[int] = []

    def stretch(num_tokens: int) -> tuple[Any, ...]:
        # Beyond few pairs the sort's blocks are again what they were before: a way may come back once.
        return *_way(num_tokens, *sizes), num_tokens * top_k > FEW_PAIRS

    def is_past(num_tokens: int) -> bool:
        return stretch(counts[-1]) != stretch(num_tokens)

    ahead = range(1, _MAX_TOKENS + 1)
    while ahead:
        counts.append(ahead[0])
        ahead = ahead[bisect.bisect_left(ahead, True, key=is_past) :]
    first_of = {_way(count, *sizes): count for count in reversed(counts)}
    return tuple(sorted(first_of.values()))


_GEMMA_4 = Gemma4MoEConfig.gemma4_26b_a4b()
NUM_TOKENS = one_of_each_way(
    _GEMMA_4.num_experts, _GEMMA_4.top_k_experts, _GEMMA_4.hidden_size, _GEMMA_4.moe_intermediate_size
)
"""At the sizes of Gemma 4 26B-A4B."""
