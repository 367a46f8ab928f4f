"""Launcher of ``cuda_src/lora_shrink_chunks.cu``. Oracle: ``rows[its slots] @ factor[e].T`` of each expert."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.expert_stream import Shape
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.stream_workspace import Workspace, most_chunks

_COLUMNS = 16
# By ``gathered``: of gate_up_proj; and of down_proj, where a block shares the registers of a multiprocessor with both
# projections.
_WARPS = {True: 16, False: 8}


def _piece(shape: Shape) -> int:
    """The most slots of a block."""
    return min(shape.regime.tokens, 16)


def variant(shape: Shape, *, gathered: bool) -> Variant:
    """The compilation for the first factor of gate_up_proj's adapter, where ``gathered``, or of down_proj's."""
    return Variant(
        "lora_shrink_chunks",
        (
            *shape.defines(),
            f"DEPTH={shape.hidden_size if gathered else shape.intermediate_size}",
            f"RANK={shape.gate_up_rank if gathered else shape.down_rank}",
            f"GATHERED={int(gathered)}",
            f"TRANSPOSED={int(shape.gate_up_transposed if gathered else shape.down_transposed)}",
            f"PIECE={_piece(shape)}",
            f"WARPS={_WARPS[gathered]}",
        ),
    )


@functools.lru_cache(maxsize=4096)
def _prepared(shape: Shape, gathered: bool, num_pairs: int, device: int) -> tuple[Kernel, tuple[int, int], int]:
    """The kernel, its grid and the threads of a block."""
    run = kernel(variant(shape, gathered=gathered), "lora_shrink_chunks", device, dependent=True, arch=shape.arch)
    pieces = -(-shape.regime.tokens // _piece(shape))
    rank = shape.gate_up_rank if gathered else shape.down_rank
    return run, (pieces * most_chunks(shape, num_pairs), rank // _COLUMNS), _WARPS[gathered] * 32


def lora_shrink_chunks(
    factor: torch.Tensor,
    top_k_index: torch.Tensor,
    shape: Shape,
    workspace: Workspace,
    hidden_states: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Write each slot's row times its expert's factor into the workspace, for :func:`experts_up` or
    :func:`experts_down`, which must be the next launch.

    Args:
        factor: ``[E, R, H]`` of gate_up_proj's adapter, or ``[E, R, I]`` of down_proj's, 16-byte aligned, laid out as
            the weight; R is ``shape.gate_up_rank`` or ``shape.down_rank``.
        top_k_index: ``[T, K]``, contiguous, at least one pair.
        shape: of the call.
        workspace: of the call; after :func:`plan_experts` unless ``shape.regime.inline_pairs``.
        hidden_states: ``[T, H]``, contiguous, 16-byte aligned: the rows are those of tokens. None: they are the
            intermediate in the workspace, which :func:`experts_up` wrote in the launch just before this one.
        expert_map: as of ``sort_by_expert``, where ``shape.expert_map``, else None.
    """
    gathered, device, num_pairs = hidden_states is not None, factor.get_device(), top_k_index.numel()
    run, blocks, threads = _prepared(shape, gathered, num_pairs, device)
    run(
        blocks,
        threads,
        current_stream(device),
        workspace.intermediate if hidden_states is None else hidden_states.data_ptr(),
        factor.data_ptr(),
        top_k_index.data_ptr(),
        workspace.chunks,
        workspace.pair_of_slot,
        workspace.num_chunks,
        workspace.gate_up_low if gathered else workspace.down_low,
        num_pairs,
        0 if expert_map is None else expert_map.data_ptr(),
    )
