"""Our own expert GEMMs: at the speed of reading the weights for few tokens, of the tensor cores for many."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from cupymoe.backends import (
    BatchTensors,
    Direction,
    ExpertsCall,
    ExpertsTensors,
    Kept,
    ampere_reason,
    fused_backward,
    fused_batched,
    row_packs_reason,
)
from cupymoe.backends.fused_adapters import packed_adapters, step
from cupymoe.backends.fused_backward import new_kept, tile_shape
from cupymoe.backends.fused_codes import scales_of, stored_weights
from cupymoe.backends.fused_products import down_product, up_product
from cupymoe.kernels import expert_stream, sort_by_expert, stored_weight, unsorted_pairs
from cupymoe.kernels.arch import HOPPER, Arch, build_of
from cupymoe.kernels.coded_tiles import coded_slots
from cupymoe.kernels.combine import combine, combine_workspace
from cupymoe.kernels.expert_map import map_kind
from cupymoe.kernels.expert_stream import shape_of
from cupymoe.kernels.expert_tiles import cut, prefers_tiles
from cupymoe.kernels.experts_down import experts_down
from cupymoe.kernels.experts_down_wgmma import experts_down_wgmma
from cupymoe.kernels.experts_up import experts_up
from cupymoe.kernels.experts_up_wgmma import experts_up_wgmma
from cupymoe.kernels.load import Load
from cupymoe.kernels.lora_shrink import MAX_RANK
from cupymoe.kernels.lora_shrink_chunks import lora_shrink_chunks
from cupymoe.kernels.plan_chunks import plan_chunks
from cupymoe.kernels.plan_experts import plan_experts, shared_bytes_of_plan
from cupymoe.kernels.stream_regimes import Regime, regime
from cupymoe.kernels.stream_workspace import new_workspace
from cupymoe.kernels.unsorted_pairs import UnsortedPairs
from cupymoe.weights.format import PLAIN, formats_of

# Pairs of an expert on average up to which each of arch.BUILDS was measured faster than ``grouped`` on an H200
# (benchmarks/NOTES.md: 8 are 128 tokens at Gemma 4's sizes, 32 are 512; at 1024 tokens all are slower, and sm_86 was
# not measured between), and Hopper's own stream (None, sweep.json) for the cards that would run it as it is.
_FASTER_THAN_GROUPED_UP_TO = {"sm_80": 32, "sm_86": 8, "sm_120": 32, None: 48}


class FusedBackend:
    """Few pairs of each expert: a stream of the hit experts' weights, in three launches up to 128 pairs and two of an
    expert on average, and in four beyond. From 24 pairs of an expert on average, beside quantised weights from 16, and
    where the stream can't: tiles for the tensor cores, in four launches up to 1024 pairs and in five beyond. Either
    takes one more for each weight that has an adapter, and tiles one more for a quantised gate_up_proj; up to 128 pairs
    of plain weights without adapters, where nothing is kept, they take one less. A launch begins while the one before
    still runs.

    Cards without Hopper's tensor-core instructions stream any number of pairs, beyond 8192 in six launches; a launch
    begins while the one before still runs where the card can do that. Gradients are another backend's there.

    The intermediate is rounded once, after ``act(gate) * up``.

    Args:
        build: one of ``arch.BUILDS``, as which the kernels are then compiled whatever the device is: how tests and
            benchmarks run on a Hopper card what other cards would.
    """

    name = "fused"
    is_slow = False
    uses_gate_up = True

    def __init__(self, build: Arch | None = None) -> None:
        self.build = build

    def arch(self, device: torch.device) -> Arch:
        """Whose kernels the calls on a CUDA device are computed by."""
        return self.build or Arch.of(device)

    def unsupported_reason(self, call: ExpertsCall, direction: Direction = "forward") -> str | None:
        """What its kernels were not built for."""
        if (reason := ampere_reason(call)) is not None:
            return reason
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"its tensor-core products take bfloat16 and float16, not {call.dtype}"
        if call.weight_format != PLAIN and direction == "backward":
            return "its kernels compute no gradients beside quantised weights"
        if call.weight_format != PLAIN and call.adapter_rank:
            return f"its kernels compute adapters beside plain weights only, not beside {call.weight_format}"
        if (reason := _format_reason(call.weight_format)) is not None:
            return reason
        if (reason := row_packs_reason(call)) is not None:
            return reason
        if not (call.aligned_hidden_states and call.aligned_weights):
            return "hidden_states and both weights must start on 16 bytes"
        if call.adapter_rank > MAX_RANK:
            return f"its kernels take adapters of ranks up to {MAX_RANK}, not {call.adapter_rank}"
        arch = self.arch(call.device)
        not_tiled = tiles_reason(call.load, call.hidden_size, arch, call.weight_format)
        if direction == "backward" or (call.is_invariant() and arch.wgmma):
            return not_tiled
        not_streamed = stream_reason(call.load, arch, call.weight_format)
        return f"{not_streamed}, and {not_tiled}" if not_streamed and not_tiled else None

    def faster(self, call: ExpertsCall, direction: Direction = "forward") -> str | None:
        """See :class:`cupymoe.backends.Backend`; where its build on Hopper was not faster than ``grouped`` there."""
        arch = self.arch(call.device)
        # Beside codes grouped dequantises all experts first, hit or not.
        is_measured = call.weight_format == PLAIN
        if arch.wgmma or not is_measured or call.load.pairs_per_expert <= _FASTER_THAN_GROUPED_UP_TO[build_of(arch)]:
            return None
        return "grouped"

    def way(self, call: ExpertsCall, direction: Direction = "forward") -> str:
        """See :class:`cupymoe.backends.Backend`."""
        arch = self.arch(call.device)
        if direction == "backward" or _is_tiled(call, arch):
            if direction == "forward" and formats_of(call.weight_format)[0] is not None:
                return f"tiles of up to {coded_slots(call.load)} rows, decoded in registers in the gate_up projection"
            blocks, products = cut(call.load, call.intermediate_size)
            way = f"tiles of up to {64 * 2 * products} rows, clusters of {blocks} in the gate_up projection"
        else:
            way = f"weight stream, chunks of up to {_regime(call, arch).tokens} tokens"
        return f"{way}, with the same bits for every number of tokens" if call.is_invariant(direction) else way

    def forward(self, call: ExpertsCall, tensors: ExpertsTensors, out: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`cupymoe.backends.Backend`."""
        return self._compute(call, tensors, out)

    def forward_keeping(self, call: ExpertsCall, tensors: ExpertsTensors) -> tuple[torch.Tensor, Kept]:
        """See :class:`cupymoe.backends.Backend`."""
        kept = new_kept(call, tensors)
        return self._compute(call, tensors, kept=kept), kept

    def _compute(
        self,
        call: ExpertsCall,
        tensors: ExpertsTensors,
        out: torch.Tensor | None = None,
        kept: Kept | None = None,
    ) -> torch.Tensor:
        arch = self.build or _arch_of(tensors.hidden_states.get_device())
        if _is_tiled(call, arch):
            return tiles(call, tensors, out, kept)
        return stream(call, tensors, out, kept, arch)

    def forward_batch(
        self, call: ExpertsCall, batch: BatchTensors, output: torch.Tensor, *, keeps_others: bool
    ) -> None:
        """See :class:`cupymoe.backends.Backend`; other rows are never written."""
        rows = output.flatten(0, 1)
        arch = self.build or _arch_of(batch.hidden_states.get_device())
        if _is_tiled(call, arch):
            fused_batched.tiles(call, batch, rows)
        else:
            fused_batched.stream(call, batch, rows, arch)

    def backward(
        self,
        call: ExpertsCall,
        tensors: ExpertsTensors,
        kept: Kept | None,
        grad: torch.Tensor,
        needed: Sequence[bool],
    ) -> tuple[torch.Tensor | None, ...]:
        """See :class:`cupymoe.backends.Backend`; by tiles, however few the tokens are."""
        return fused_backward.backward(call, tensors, kept, grad, needed)


@functools.cache
def _arch_of(device: int) -> Arch:
    """As Arch.of, which asks torch each time."""
    return Arch.of(device)


def _is_tiled(call: ExpertsCall, arch: Arch) -> bool:
    return takes_tiles(call.load, call.hidden_size, arch, call.weight_format, is_invariant=call.is_invariant())


@functools.lru_cache(maxsize=4096)
def takes_tiles(
    load: Load, hidden_size: int, arch: Arch = HOPPER, weight_format: str = PLAIN, *, is_invariant: bool = False
) -> bool:
    """Whether a call that the backend serves goes by tiles; else it is streamed.

    Where it ``is_invariant``, that does not depend on the load: however tiles are cut, an output is one sum over
    ascending k, with the same bits.
    """
    has_codes = weight_format != PLAIN
    prefers = is_invariant or prefers_tiles(load, has_codes=has_codes)
    prefers = prefers or stream_reason(load, arch, weight_format) is not None
    return prefers and tiles_reason(load, hidden_size, arch, weight_format) is None


def stream_reason(load: Load, arch: Arch = HOPPER, weight_format: str = PLAIN) -> str | None:
    """Why the weight stream does not serve a call; None if it does."""
    if load.num_experts > expert_stream.MAX_EXPERTS:
        return f"the weight stream serves at most {expert_stream.MAX_EXPERTS} experts, not {load.num_experts}"
    most = expert_stream.MAX_PAIRS if arch.wgmma else expert_stream.MAX_SORTED_PAIRS
    if load.num_pairs > most:
        return f"the weight stream serves at most {most} (token, k) pairs, not {load.num_pairs}"
    return _format_reason(weight_format)


def tiles_reason(load: Load, hidden_size: int, arch: Arch = HOPPER, weight_format: str = PLAIN) -> str | None:
    """Why the tiles don't serve a call; None if they do."""
    if not arch.wgmma:
        return f"its tiles need the wgmma of compute capability 9.0, not {'.'.join(map(str, arch.capability))}"
    if hidden_size % 16:
        # Of a transposed down_proj multiples of 8 would do, but no model with such a size is known.
        return f"its tiles need a hidden size that is a multiple of 16, not {hidden_size}"
    return _format_reason(weight_format) or sort_by_expert.unsupported_reason(load.num_pairs, load.num_experts)


def _format_reason(weight_format: str) -> str | None:
    """Why neither way reads the weights, as they are stored."""
    reasons = map(stored_weight.unsupported_reason, weight_format.split(","))
    return next((reason for reason in reasons if reason is not None), None)


def _regime(call: ExpertsCall, arch: Arch) -> Regime:
    return regime(
        call.load,
        call.intermediate_size,
        arch,
        has_adapter=call.adapter_rank > 0,
        has_codes=call.weight_format != PLAIN,
        is_invariant=call.is_invariant(),
    )


def stream(
    call: ExpertsCall,
    tensors: ExpertsTensors,
    out: torch.Tensor | None = None,
    kept: Kept | None = None,
    arch: Arch | None = None,
) -> torch.Tensor:
    """The way for few tokens, of a call that it serves: see :class:`cupymoe.backends.Backend`.

    Args:
        call: what is computed.
        tensors: what it is computed with.
        out: where the output goes; None: a new tensor.
        kept: written with what the gradients are computed from, if it is given.
        arch: whose kernels it is computed by; None: the device's.
    """
    arch = arch or _arch_of(tensors.hidden_states.get_device())
    hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights = tensors[:5]
    gate_up_bias, down_bias = tensors.gate_up_bias, tensors.down_bias
    of_gate_up, of_down = packed_adapters(call, tensors)
    expert_map = tensors.expert_map
    chosen = _regime(call, arch)
    is_sorted = not chosen.inline_pairs and not plans_at_once(call.load, arch)
    stored = stored_weights(call, tensors)
    shape = shape_of(
        chosen,
        call.dtype,
        top_k_index.dtype,
        call.activation,
        call.num_experts,
        call.hidden_size,
        call.intermediate_size,
        call.top_k,
        call.gate_up_transposed,
        call.down_transposed,
        gate_up_bias is not None,
        down_bias is not None,
        kept is not None,
        0 if of_gate_up is None else of_gate_up.a.shape[1],
        0 if of_down is None else of_down.a.shape[1],
        arch,
        is_sorted,
        *stored,
        expert_map=map_kind(expert_map) if chosen.inline_pairs else None,
    )
    workspace = new_workspace(hidden_states, shape, top_k_index.numel())
    up_factor = down_factor = gate_up = None
    if kept is not None:
        gate_up, *lows = kept
        workspace = workspace.keeping(*lows)
    output = torch.empty_like(hidden_states) if out is None else out
    if is_sorted:
        pairs = sort_by_expert.sort_by_expert(top_k_index, call.num_experts, expert_map=expert_map)
        plan_chunks(pairs.expert_offsets, chosen.tokens, workspace, arch)
        workspace = workspace.of_sorted(pairs.token_of_slot, pairs.slot_of_pair)
    elif not chosen.inline_pairs:
        plan_experts(top_k_index, call.num_experts, chosen.tokens, workspace, arch, expert_map)
    if of_gate_up is not None:
        lora_shrink_chunks(of_gate_up.a, top_k_index, shape, workspace, hidden_states, expert_map)
        up_factor = of_gate_up.b
    of_codes = tensors.gate_up_scales, tensors.gate_up_zeros, tensors.gate_up_row_scales
    arguments = (top_k_index, shape, workspace)
    experts_up(
        hidden_states, gate_up_proj, *arguments, gate_up_bias, gate_up, up_factor, *of_codes, expert_map=expert_map
    )
    if of_down is not None:
        lora_shrink_chunks(of_down.a, top_k_index, shape, workspace, None, expert_map)
        down_factor = of_down.b
    of_codes = tensors.down_scales, tensors.down_zeros, tensors.down_row_scales
    experts_down(down_proj, *arguments, down_bias, down_factor, *of_codes, expert_map=expert_map)
    combine_workspace(shape, workspace, top_k_weights, output)
    return output


def plans_at_once(load: Load, arch: Arch) -> bool:
    """Whether one block plans a streamed call; else its pairs are sorted before."""
    fits = shared_bytes_of_plan(load.num_experts, load.num_pairs) <= arch.shared_bytes_of_block
    return load.num_pairs <= expert_stream.MAX_PAIRS and fits


def tiles(
    call: ExpertsCall,
    tensors: ExpertsTensors,
    out: torch.Tensor | None = None,
    kept: Kept | None = None,
) -> torch.Tensor:
    """The way for many tokens, with the arguments of :func:`stream`."""
    if kept is None and sorts_in_tiles(call):
        return _unsorted_tiles(call, tensors, out)
    hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights = tensors[:5]
    gate_up_bias, down_bias = tensors.gate_up_bias, tensors.down_bias
    pairs = sort_by_expert.sort_by_expert(top_k_index, call.num_experts, expert_map=tensors.expert_map)
    of_gate_up, of_down = packed_adapters(call, tensors, pairs)
    shape = tile_shape(call, tensors, keeps_gate_up=kept is not None)
    gate_up, up_low, down_low = (None, None, None) if kept is None else kept
    up_step = step(of_gate_up, hidden_states, pairs, up_low, gathered=True)
    of_gate_up_codes, of_down_codes = scales_of(call, tensors)
    intermediate = up_product(
        hidden_states, gate_up_proj, of_gate_up_codes, pairs, shape, gate_up_bias, gate_up, up_step
    )
    down_step = step(of_down, intermediate, pairs, down_low, gathered=False)
    expert_output = down_product(intermediate, down_proj, of_down_codes, pairs, shape, down_bias, down_step)
    return combine(expert_output, pairs.slot_of_pair, top_k_weights, out, few=shape.few_pairs > 0)


def sorts_in_tiles(call: ExpertsCall) -> bool:
    """Whether the tiles put the pairs in order themselves, where nothing is kept; else they are sorted before."""
    is_plain = call.weight_format == PLAIN and not call.adapter_rank
    return is_plain and call.load.num_pairs <= unsorted_pairs.MAX_PAIRS


def _unsorted_tiles(call: ExpertsCall, tensors: ExpertsTensors, out: torch.Tensor | None) -> torch.Tensor:
    """As :func:`tiles`, without a sort before; the bits are those behind one."""
    pairs = UnsortedPairs.of(tensors.top_k_index, tensors.expert_map)
    shape = tile_shape(call, tensors, unsorted=pairs.kind)
    intermediate = experts_up_wgmma(tensors.hidden_states, tensors.gate_up_proj, pairs, shape, tensors.gate_up_bias)
    expert_output = experts_down_wgmma(intermediate, tensors.down_proj, pairs, shape, tensors.down_bias)
    return combine(expert_output, pairs.slot_of_pair, tensors.top_k_weights, out, few=True)
