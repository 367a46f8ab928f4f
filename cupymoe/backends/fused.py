"""Our own expert GEMMs: at the speed of reading the weights for few tokens, of the tensor cores for many."""

from __future__ import annotations

import torch

from cupymoe.activation import MoEActivation
from cupymoe.backends import ExpertsCall, row_packs_reason
from cupymoe.kernels import expert_stream, sort_by_expert
from cupymoe.kernels.arch import HOPPER, Arch
from cupymoe.kernels.combine import combine, combine_workspace
from cupymoe.kernels.expert_stream import new_workspace, regime, shape_of
from cupymoe.kernels.expert_tiles import cut, prefers_tiles, tile_shape_of
from cupymoe.kernels.experts_down import experts_down
from cupymoe.kernels.experts_down_wgmma import experts_down_wgmma
from cupymoe.kernels.experts_up import experts_up
from cupymoe.kernels.experts_up_wgmma import experts_up_wgmma
from cupymoe.kernels.plan_experts import plan_experts


class FusedBackend:
    """A stream of the hit experts' weights, in three launches up to 128 pairs and four beyond; tiles for the tensor
    cores, in four launches up to 1024 pairs and five beyond, from 32 pairs an expert on, and where the stream can't. A
    launch begins while the one before still runs.

    The intermediate is rounded once, after ``act(gate) * up``.
    """

    name = "fused"
    is_slow = False

    def unsupported_reason(self, call: ExpertsCall) -> str | None:
        """What its kernels were not built or not run for."""
        if call.device.type != "cuda":
            return f"it runs on CUDA devices of compute capability 9.0, not on {call.device.type}"
        if Arch.of(call.device) != HOPPER:
            return "it has been run on compute capability 9.0 only"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"its tensor-core products take bfloat16 and float16, not {call.dtype}"
        if not call.activation.is_gated or call.activation.is_interleaved:
            return f"it pairs rows i and I + i of gate_up_proj, which {call.activation.name} does not want"
        if (reason := row_packs_reason(call)) is not None:
            return reason
        if not (call.aligned_hidden_states and call.aligned_weights):
            return "hidden_states and both weights must start on 16 bytes"
        num_pairs = call.num_tokens * call.top_k
        not_streamed = stream_reason(num_pairs, call.num_experts)
        not_tiled = tiles_reason(num_pairs, call.num_experts, call.hidden_size)
        return f"{not_streamed}, and {not_tiled}" if not_streamed and not_tiled else None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        activation: MoEActivation,
    ) -> torch.Tensor:
        """See :class:`cupymoe.backends.Backend`."""
        num_experts, hidden_size, _ = down_proj.shape
        compute = tiles if takes_tiles(top_k_index.numel(), num_experts, hidden_size) else stream
        return compute(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, activation)


def takes_tiles(num_pairs: int, num_experts: int, hidden_size: int) -> bool:
    """Whether a call that the backend serves goes by tiles; else it is streamed."""
    preferred = prefers_tiles(num_pairs, num_experts) or stream_reason(num_pairs, num_experts) is not None
    return preferred and tiles_reason(num_pairs, num_experts, hidden_size) is None


def stream_reason(num_pairs: int, num_experts: int) -> str | None:
    """Why the weight stream does not serve a call; None if it does."""
    if num_experts > expert_stream.MAX_EXPERTS:
        return f"its plan has counters for {expert_stream.MAX_EXPERTS} experts, not {num_experts}"
    if num_pairs > expert_stream.MAX_PAIRS:
        return f"its plan holds {expert_stream.MAX_PAIRS} (token, k) pairs, not {num_pairs}"
    return None


def tiles_reason(num_pairs: int, num_experts: int, hidden_size: int) -> str | None:
    """Why the tiles don't serve a call; None if they do."""
    if hidden_size % 16:
        return f"its tiles want a hidden size that is a multiple of 16, not {hidden_size}"
    return sort_by_expert.unsupported_reason(num_pairs, num_experts)


def stream(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    activation: MoEActivation,
) -> torch.Tensor:
    """The way for few tokens, of a call that it serves: see :class:`cupymoe.backends.Backend`."""
    num_tokens, top_k = top_k_index.shape
    num_experts, hidden_size, intermediate_size = down_proj.shape
    shape = shape_of(
        regime(num_tokens, top_k, intermediate_size),
        hidden_states.dtype,
        top_k_index.dtype,
        activation,
        num_experts,
        hidden_size,
        intermediate_size,
        top_k,
    )
    workspace = new_workspace(hidden_states, shape, top_k_index.numel())
    output = torch.empty_like(hidden_states)
    if not shape.regime.inline_pairs:
        plan_experts(top_k_index, num_experts, shape.regime.tokens, workspace)
    experts_up(hidden_states, gate_up_proj, top_k_index, shape, workspace)
    experts_down(down_proj, top_k_index, shape, workspace)
    combine_workspace(shape, workspace, top_k_weights, output)
    return output


def tiles(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    activation: MoEActivation,
) -> torch.Tensor:
    """The way for many tokens, of a call that it serves: see :class:`cupymoe.backends.Backend`."""
    num_experts, hidden_size, intermediate_size = down_proj.shape
    blocks, products = cut(top_k_index.numel(), num_experts)
    shape = tile_shape_of(
        blocks, products, hidden_states.dtype, activation, num_experts, hidden_size, intermediate_size
    )
    pairs = sort_by_expert.sort_by_expert(top_k_index, num_experts)
    intermediate = experts_up_wgmma(hidden_states, gate_up_proj, pairs, shape)
    expert_output = experts_down_wgmma(intermediate, down_proj, pairs, shape)
    return combine(expert_output, pairs.slot_of_pair, top_k_weights)
