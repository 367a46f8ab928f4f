"""Our own expert GEMMs: at the speed of reading the weights for few tokens, of the tensor cores for many."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from cupymoe.backends import Direction, ExpertsCall, ExpertsTensors, Kept, fused_backward, row_packs_reason
from cupymoe.backends.fused_adapters import packed_adapters, step
from cupymoe.backends.fused_backward import new_kept, tile_shape
from cupymoe.kernels import expert_stream, sort_by_expert
from cupymoe.kernels.arch import HOPPER, Arch
from cupymoe.kernels.combine import combine, combine_workspace
from cupymoe.kernels.expert_stream import Regime, new_workspace, regime, shape_of
from cupymoe.kernels.expert_tiles import cut, prefers_tiles
from cupymoe.kernels.experts_down import experts_down
from cupymoe.kernels.experts_down_wgmma import experts_down_wgmma
from cupymoe.kernels.experts_up import experts_up
from cupymoe.kernels.experts_up_wgmma import experts_up_wgmma
from cupymoe.kernels.load import Load
from cupymoe.kernels.lora_shrink import MAX_RANK
from cupymoe.kernels.lora_shrink_chunks import lora_shrink_chunks
from cupymoe.kernels.plan_experts import plan_experts


class FusedBackend:
    """Few pairs of each expert: a stream of the hit experts' weights, in three launches up to 128 pairs and two of an
    expert on average, and in four beyond. From 32 pairs of an expert on average, and where the stream can't: tiles for
    the tensor cores, in four launches up to 1024 pairs and in five beyond. Either takes one more for each weight that
    has an adapter. A launch begins while the one before still runs.

    The intermediate is rounded once, after ``act(gate) * up``.
    """

    name = "fused"
    is_slow = False
    uses_gate_up = True

    def unsupported_reason(self, call: ExpertsCall, direction: Direction = "forward") -> str | None:
        """What its kernels were not built or not run for."""
        if call.device.type != "cuda":
            return f"it runs on CUDA devices of compute capability 9.0, not on {call.device.type}"
        if Arch.of(call.device) != HOPPER:
            return "it has been run on compute capability 9.0 only"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"its tensor-core products take bfloat16 and float16, not {call.dtype}"
        if (reason := row_packs_reason(call)) is not None:
            return reason
        if not (call.aligned_hidden_states and call.aligned_weights):
            return "hidden_states and both weights must start on 16 bytes"
        if call.adapter_rank > MAX_RANK:
            return f"its kernels take adapters of ranks up to {MAX_RANK}, not {call.adapter_rank}"
        not_tiled = tiles_reason(call.load, call.hidden_size)
        if direction == "backward":
            return not_tiled
        not_streamed = stream_reason(call.load)
        return f"{not_streamed}, and {not_tiled}" if not_streamed and not_tiled else None

    def way(self, call: ExpertsCall, direction: Direction = "forward") -> str:
        """See :class:`cupymoe.backends.Backend`."""
        if direction == "backward" or takes_tiles(call.load, call.hidden_size):
            blocks, products = cut(call.load, call.intermediate_size)
            return f"tiles of up to {64 * 2 * products} rows, clusters of {blocks} in the gate_up projection"
        return f"weight stream, chunks of up to {_regime(call).tokens} tokens"

    def forward(self, call: ExpertsCall, tensors: ExpertsTensors, out: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`cupymoe.backends.Backend`."""
        compute = tiles if takes_tiles(call.load, call.hidden_size) else stream
        return compute(call, tensors, out)

    def forward_keeping(self, call: ExpertsCall, tensors: ExpertsTensors) -> tuple[torch.Tensor, Kept]:
        """See :class:`cupymoe.backends.Backend`."""
        compute = tiles if takes_tiles(call.load, call.hidden_size) else stream
        kept = new_kept(call, tensors)
        return compute(call, tensors, kept=kept), kept

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


@functools.lru_cache(maxsize=4096)
def takes_tiles(load: Load, hidden_size: int) -> bool:
    """Whether a call that the backend serves goes by tiles; else it is streamed."""
    prefers = prefers_tiles(load) or stream_reason(load) is not None
    return prefers and tiles_reason(load, hidden_size) is None


def stream_reason(load: Load) -> str | None:
    """Why the weight stream does not serve a call; None if it does."""
    if load.num_experts > expert_stream.MAX_EXPERTS:
        return f"the weight stream serves at most {expert_stream.MAX_EXPERTS} experts, not {load.num_experts}"
    if load.num_pairs > expert_stream.MAX_PAIRS:
        return f"the weight stream serves at most {expert_stream.MAX_PAIRS} (token, k) pairs, not {load.num_pairs}"
    return None


def tiles_reason(load: Load, hidden_size: int) -> str | None:
    """Why the tiles don't serve a call; None if they do."""
    if hidden_size % 16:
        # Of a transposed down_proj multiples of 8 would do, but no model with such a size is known.
        return f"its tiles want a hidden size that is a multiple of 16, not {hidden_size}"
    return sort_by_expert.unsupported_reason(load.num_pairs, load.num_experts)


def _regime(call: ExpertsCall) -> Regime:
    return regime(call.load, call.intermediate_size, has_adapter=call.adapter_rank > 0)


def stream(
    call: ExpertsCall,
    tensors: ExpertsTensors,
    out: torch.Tensor | None = None,
    kept: Kept | None = None,
) -> torch.Tensor:
    """The way for few tokens, of a call that it serves: see :class:`cupymoe.backends.Backend`.

    Args:
        call: what is computed.
        tensors: what it is computed with.
        out: where the output goes; None: a new tensor.
        kept: written with what the gradients are computed from, if it is given.
    """
    hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights = tensors[:5]
    gate_up_bias, down_bias = tensors.gate_up_bias, tensors.down_bias
    of_gate_up, of_down = packed_adapters(call, tensors) if call.adapter_rank else (None, None)
    shape = shape_of(
        _regime(call),
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
    )
    workspace = new_workspace(hidden_states, shape, top_k_index.numel())
    up_factor = down_factor = gate_up = None
    if kept is not None:
        gate_up, *lows = kept
        workspace = workspace.keeping(*lows)
    output = torch.empty_like(hidden_states) if out is None else out
    if not shape.regime.inline_pairs:
        plan_experts(top_k_index, call.num_experts, shape.regime.tokens, workspace)
    if of_gate_up is not None:
        lora_shrink_chunks(of_gate_up.a, top_k_index, shape, workspace, hidden_states)
        up_factor = of_gate_up.b
    experts_up(hidden_states, gate_up_proj, top_k_index, shape, workspace, gate_up_bias, gate_up, up_factor)
    if of_down is not None:
        lora_shrink_chunks(of_down.a, top_k_index, shape, workspace)
        down_factor = of_down.b
    experts_down(down_proj, top_k_index, shape, workspace, down_bias, down_factor)
    combine_workspace(shape, workspace, top_k_weights, output)
    return output


def tiles(
    call: ExpertsCall,
    tensors: ExpertsTensors,
    out: torch.Tensor | None = None,
    kept: Kept | None = None,
) -> torch.Tensor:
    """The way for many tokens, with the arguments of :func:`stream`."""
    hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights = tensors[:5]
    gate_up_bias, down_bias = tensors.gate_up_bias, tensors.down_bias
    shape = tile_shape(call, tensors, keeps_gate_up=kept is not None)
    pairs = sort_by_expert.sort_by_expert(top_k_index, call.num_experts)
    of_gate_up, of_down = packed_adapters(call, tensors)
    gate_up, up_low, down_low = (None, None, None) if kept is None else kept
    up_step = step(of_gate_up, hidden_states, pairs, up_low, gathered=True)
    intermediate = experts_up_wgmma(hidden_states, gate_up_proj, pairs, shape, gate_up_bias, gate_up, up_step)
    down_step = step(of_down, intermediate, pairs, down_low, gathered=False)
    expert_output = experts_down_wgmma(intermediate, down_proj, pairs, shape, down_bias, down_step)
    return combine(expert_output, pairs.slot_of_pair, top_k_weights, out)
