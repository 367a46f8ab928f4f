"""Launchers of ``cuda_src/combine.cu``. Oracle: the weighted sum over k in :func:`cupymoe.reference.experts`."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.expert_stream import Shape
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.rows import row_defines, vector_width
from cupymoe.kernels.stream_workspace import Workspace

# Rows that a thread loads before it adds them, and threads of a block. Many rows hide latency at few tokens, and cost
# bandwidth, by occupancy, at many; and where most pairs are masked, the number of blocks is what takes time.
_MANY_TOKENS, _FEW_TOKENS = (2, 128), (8, 64)


def variant(
    dtype: torch.dtype,
    slot_dtype: torch.dtype,
    columns: int,
    width: int,
    top_k: int,
    tuning: tuple[int, int],
    *,
    old_choices: bool,
    weighted: bool = True,
) -> Variant:
    """The compilation for two dtypes, row width, number of choices, and rows in flight with threads of a block.

    With ``old_choices`` a launch of ours lies between the last write to ``slot_of_pair`` and ``top_k_weights`` and this
    one.
    """
    rows, threads = tuning
    defines = row_defines(dtype, columns, width, top_k, threads)
    rows_in_flight = f"ROWS_IN_FLIGHT={min(rows, top_k)}"
    choices = f"OLD_CHOICES={int(old_choices)}", f"WEIGHTED={int(weighted)}"
    return Variant("combine", (*defines, f"SLOT_SCALAR={SCALARS[slot_dtype]}", rows_in_flight, *choices))


def rows_variant(
    dtype: torch.dtype, columns: int, width: int, top_k: int, weighted: bool = True, few: bool = False
) -> Variant:
    """The compilation behind rows of the output's own dtype, for many tokens; or for ``few`` and old choices."""
    tuning = _FEW_TOKENS if few else _MANY_TOKENS
    return variant(dtype, dtype, columns, width, top_k, tuning, old_choices=few, weighted=weighted)


def _blocks(columns: int, width: int, tuning: tuple[int, int]) -> int:
    """Of a row."""
    return -(-columns // (width * tuning[1]))


@functools.cache
def _prepared(
    dtype: torch.dtype, columns: int, aligned: bool, top_k: int, weighted: bool, few: bool, device: int
) -> tuple[Kernel, int, int]:
    """The kernel, the blocks of a row, and the threads of a block."""
    width, tuning = vector_width(dtype, columns, aligned), _FEW_TOKENS if few else _MANY_TOKENS
    run = kernel(rows_variant(dtype, columns, width, top_k, weighted, few), "combine", device, dependent=True)
    return run, _blocks(columns, width, tuning), tuning[1]


def combine(
    expert_output: torch.Tensor,
    slot_of_pair: torch.Tensor,
    top_k_weights: torch.Tensor | None,
    output: torch.Tensor | None = None,
    *,
    few: bool = False,
) -> torch.Tensor:
    """``output[t] = sum over k of top_k_weights[t, k] * expert_output[slot_of_pair[t, k]]``, ``[T, H]``.

    Args:
        expert_output: ``[T * K, H]`` in expert order, contiguous.
        slot_of_pair: ``[T, K]`` int32 of :class:`SortedPairs`, at least one token.
        top_k_weights: ``[T, K]`` float32, contiguous; None: all of them 1.
        output: ``[T, H]``, contiguous, the dtype of ``expert_output``; None: a new tensor.
        few: whether there are few tokens, and a launch of ours lies between the last write to ``slot_of_pair`` and
            ``top_k_weights`` and this one. It changes no bits.
    """
    num_tokens, top_k = slot_of_pair.shape
    columns = expert_output.shape[1]
    if output is None:
        output = expert_output.new_empty((num_tokens, columns))
    device, address = output.device.index, expert_output.data_ptr()
    aligned, weighted = (address | output.data_ptr()) % 16 == 0, top_k_weights is not None
    run, blocks, threads = _prepared(output.dtype, columns, aligned, top_k, weighted, few, device)
    run(
        (num_tokens, blocks),
        threads,
        current_stream(device),
        address,
        slot_of_pair.data_ptr(),
        0 if top_k_weights is None else top_k_weights.data_ptr(),
        output.data_ptr(),
    )
    return output


def _workspace_tuning(shape: Shape) -> tuple[int, int]:
    return _MANY_TOKENS if shape.sorted_pairs else _FEW_TOKENS


def workspace_variant(shape: Shape) -> Variant:
    """The compilation behind the experts of a shape."""
    width, tuning = 16 // shape.slot_dtype.itemsize, _workspace_tuning(shape)
    return variant(shape.dtype, shape.slot_dtype, shape.hidden_size, width, shape.top_k, tuning, old_choices=True)


@functools.cache
def _workspace_prepared(shape: Shape, device: int) -> tuple[Kernel, int, int]:
    """The kernel, the blocks of a row, and the threads of a block."""
    tuning = _workspace_tuning(shape)
    run = kernel(workspace_variant(shape), "combine", device, dependent=True, arch=shape.arch)
    return run, _blocks(shape.hidden_size, 16 // shape.slot_dtype.itemsize, tuning), tuning[1]


def combine_workspace(shape: Shape, workspace: Workspace, top_k_weights: torch.Tensor, output: torch.Tensor) -> None:
    """As :func:`combine`, of the experts' outputs in a workspace; begins before they are all there, and waits.

    Args:
        top_k_weights: ``[T, K]`` float32, contiguous, at least one token.
        output: ``[T, H]``, contiguous, 16-byte aligned.
    """
    device = output.get_device()
    run, blocks, threads = _workspace_prepared(shape, device)
    run(
        (output.shape[0], blocks),
        threads,
        current_stream(device),
        workspace.expert_output,
        workspace.slot_of_pair,
        top_k_weights.data_ptr(),
        output.data_ptr(),
    )
