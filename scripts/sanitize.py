#!/usr/bin/env python
"""Every kernel at small sizes under NVIDIA's compute-sanitizer: bad accesses, races, uninitialised reads, bad barriers.

Runs this file again under each tool, with torch's memory pooling off, so that an access past a tensor is seen. Beside
that runs a kernel with a fault that the tool has to report: one that watches no kernel is not taken for a clean run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupymoe import (
    LowRank,
    MoEActivation,
    QuantizedWeight,
    batched_experts,
    fused_experts,
    lora_experts,
    moe_activation,
    reference,
    route,
)
from cupymoe.backends import ExpertsTensors
from cupymoe.backends.fused import FusedBackend
from cupymoe.kernels import cuda_sources, raw_read
from cupymoe.kernels.arch import BUILDS
from cupymoe.kernels.combine import combine
from cupymoe.kernels.cupy_import import import_cupy
from cupymoe.kernels.dequantize import dequantize
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.gated_activation import gated_activation
from cupymoe.kernels.gather import gather
from cupymoe.kernels.grouped_linear import grouped_linear
from cupymoe.kernels.grouped_outer import grouped_outer
from cupymoe.kernels.lora_back import lora_back, tiling
from cupymoe.kernels.lora_outer import lora_outer
from cupymoe.kernels.lora_shrink import lora_shrink
from cupymoe.kernels.pack_adapter import Copy, pack_adapter
from cupymoe.kernels.router_logits import router_logits
from cupymoe.kernels.router_logits_many import router_logits_many
from cupymoe.kernels.sort_by_expert import sort_by_expert
from cupymoe.ops import experts_call
from cupymoe.verification.result import relative_error
from cupymoe.weights import FORMATS

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
HIDDEN_SIZE = 64
TOP_K = 4
# (experts, hidden size, tokens): around the bounds of every regime of the fused backend's weight stream, the last of
# them where the hidden size keeps the tiles out; and every cut of the tiles.
CASES = (
    (64, 64, (1, 3, 32, 33, 64)),
    (64, 64, (65, 129, 256)),
    (64, 64, (257, 511)),
    (64, 72, (512, 513, 700)),
    (8, 64, (64, 130, 300, 479)),
    (8, 64, (480, 600, 735)),
    (8, 64, (736, 900)),
)
SIZES = ((48, torch.bfloat16), (96, torch.float16))  # intermediate size, dtype
# Of training steps: both kinds of the stream, whose gradients go by tiles all the same, and every cut of the tiles.
TRAINED = ((64, 64, (3, 511)), (8, 64, (130, 600, 900)))
RANK = 16
PLANTED = "planted_fault"
DONE = "the part is done"
Run = subprocess.CompletedProcess[str]
# For each tool, what 64 threads do wrong to 64 integers that were never written.
FAULTS = {
    "memcheck": "data[threadIdx.x + 1] = 1;",
    "racecheck": "shared[threadIdx.x] = threadIdx.x; data[threadIdx.x] = shared[63 - threadIdx.x];",
    "initcheck": "data[threadIdx.x] += 1;",
    # Not a barrier in half of a warp: threads that have ended count as arrived, and the tool says nothing.
    "synccheck": "if (threadIdx.x < 16) __syncwarp(0xffff0000u);",
}


def planted_source(tool: str) -> str:
    """A kernel that ``tool`` must find fault with."""
    return f'extern "C" __global__ void {PLANTED}(int* data) {{ __shared__ int shared[64]; {FAULTS[tool]} }}'


def run_planted(tool: str) -> None:
    """Its launch; the tool may end the CUDA context for it."""
    data = torch.empty(64, dtype=torch.int32, device="cuda")
    import_cupy().RawKernel(planted_source(tool), PLANTED)((1,), (64,), (data.data_ptr(),))
    torch.cuda.synchronize()


def run_activations() -> None:
    """gated_activation.cu: every dtype, member and vector width."""
    for dtype, activation, size in product(SCALARS, MoEActivation, (24, 7)):
        moe_activation(activation, torch.randn(5, activation.input_size(size)).to(dtype).cuda())


def run_routing() -> None:
    """router_logits.cu, router_logits_many.cu and route.cu."""
    for dtype in SCALARS:
        states, scale, projection = (
            torch.randn(shape).to(dtype).cuda() for shape in ((9, HIDDEN_SIZE), (HIDDEN_SIZE,), (33, HIDDEN_SIZE))
        )
        for compute in (router_logits, router_logits_many):
            route(compute(states, scale, projection, 1e-6), 8, per_expert_scale=scale[:33].contiguous())


def masked_routing(tokens: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices, some of them masked and none the last expert's, and weights."""
    index = torch.rand(tokens, num_experts - 1).topk(TOP_K).indices
    index[torch.rand(index.shape) < 0.1] = num_experts
    return index, torch.rand(tokens, TOP_K)


def expert_weights(
    num_experts: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """gate_up_proj and down_proj."""
    shapes = ((num_experts, 2 * intermediate_size, hidden_size), (num_experts, hidden_size, intermediate_size))
    return [0.1 * torch.randn(shape).to(dtype) for shape in shapes]


def run_experts(
    num_experts: int, hidden_size: int, counts: tuple[int, ...], intermediate_size: int, dtype: torch.dtype
) -> None:
    """The fused backend, with masked pairs and an expert without tokens; the results are checked too."""
    weights = expert_weights(num_experts, hidden_size, intermediate_size, dtype)
    cuda_weights = [weight.cuda() for weight in weights]
    # The tiles of few tokens, where there are tiles.
    invariant = [(1, "invariant")] if hidden_size % 16 == 0 else []
    for tokens, numerics in [*((tokens, "fast") for tokens in counts), *invariant]:
        states = torch.randn(tokens, hidden_size).to(dtype)
        routed = masked_routing(tokens, num_experts)
        arguments = [tensor.cuda() for tensor in (states, *routed)]
        settings = {"activation": MoEActivation.GELU_TANH, "backend": "fused", "numerics": numerics}
        output = fused_experts(arguments[0], *cuda_weights, *arguments[1:], **settings)
        truth = reference.experts(
            states.double(), *(weight.double() for weight in weights), *routed, MoEActivation.GELU_TANH
        )
        error = relative_error(output.cpu(), truth)
        assert error < 0.01, f"{tokens} tokens: relative error {error:.4f}"


def step(compute: Callable[..., torch.Tensor], grad: torch.Tensor, *given: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of what is given."""
    leaves = [tensor.requires_grad_() for tensor in given]
    output = compute(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def check_step(compute: Callable[..., torch.Tensor], truth: Callable[..., torch.Tensor], *given: torch.Tensor) -> None:
    """A step on the GPU, by ``compute``, against one in float64; of what is given, hidden states come first.

    All that the kernels read is copied to the GPU, the output's gradient too: see :func:`run_sorted_rows`.
    """
    given = (torch.randn(given[0].shape).to(given[0].dtype), *given)
    found, expected = step(compute, *(each.cuda() for each in given)), step(truth, *(each.double() for each in given))
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = relative_error(one.cpu(), other)
        assert error < 0.01, f"{len(given[0])} tokens, tensor {place} of a step: relative error {error:.4f}"


def run_training(
    num_experts: int, hidden_size: int, counts: tuple[int, ...], intermediate_size: int, dtype: torch.dtype
) -> None:
    """Training steps of the fused backend: of the experts, and of adapters on frozen ones."""
    weights = expert_weights(num_experts, hidden_size, intermediate_size, dtype)
    cuda_weights, true_weights = [weight.cuda() for weight in weights], [weight.double() for weight in weights]
    shapes = [shape for weight in weights for shape in ((RANK, weight.shape[2]), (weight.shape[1], RANK))]
    factors = [0.1 * torch.randn(num_experts, *shape).to(dtype) for shape in shapes]
    gelu_tanh = MoEActivation.GELU_TANH

    def check(states: torch.Tensor, index: torch.Tensor, routing: torch.Tensor) -> None:
        cuda_index = index.cuda()

        def trained(states, routing, *weights):
            return fused_experts(states, *weights, cuda_index, routing, activation=gelu_tanh, backend="fused")

        def adapted(states, routing, *factors):
            adapters = LowRank(*factors[:2]), LowRank(*factors[2:])
            return lora_experts(states, *cuda_weights, cuda_index, routing, *adapters, activation=gelu_tanh)

        def truth(states, routing, *weights):
            return reference.experts(states, *weights, index, routing, gelu_tanh)

        def merged(states, routing, up_a, up_b, down_a, down_b):
            return truth(states, routing, true_weights[0] + up_b @ up_a, true_weights[1] + down_b @ down_a)

        check_step(trained, truth, states, routing, *weights)
        check_step(adapted, merged, states, routing, *factors)

    for tokens in counts:
        check(torch.randn(tokens, hidden_size).to(dtype), *masked_routing(tokens, num_experts))


def run_streamed_adapters() -> None:
    """The weight stream with adapters, of both layouts and in each of its regimes, and lora_shrink_chunks.cu for it."""
    for dtype, transposed in product((torch.bfloat16, torch.float16), (False, True)):
        weights = expert_weights(64, HIDDEN_SIZE, 48, dtype)
        shapes = [shape for weight in weights for shape in ((RANK, weight.shape[2]), (weight.shape[1], RANK))]
        factors = [0.1 * torch.randn(64, *shape).to(dtype) for shape in shapes]
        merged = [
            weight.double() + b.double() @ a.double()
            for weight, a, b in zip(weights, factors[::2], factors[1::2], strict=True)
        ]
        on_gpu = [each.mT.contiguous().cuda().mT if transposed else each.cuda() for each in (*weights, *factors)]
        adapters = LowRank(*on_gpu[2:4]), LowRank(*on_gpu[4:])
        for tokens in (1, 32, 33, 65, 257):
            states, routed = torch.randn(tokens, HIDDEN_SIZE).to(dtype), masked_routing(tokens, 64)
            output = lora_experts(
                states.cuda(), *on_gpu[:2], *(each.cuda() for each in routed), *adapters, activation=MoEActivation.SILU
            )
            truth = reference.experts(states.double(), *merged, *routed, MoEActivation.SILU)
            error = relative_error(output.cpu(), truth)
            assert error < 0.01, f"{dtype}, {tokens} tokens: relative error {error:.4f}"


def run_build(name: str) -> None:
    """The weight stream as another architecture has it: each regime, and more pairs than are planned at once."""
    backend = FusedBackend(BUILDS[name])
    for dtype, counts in ((torch.bfloat16, (1, 40, 128, 400, 700)), (torch.float16, (2100,))):
        weights = expert_weights(64, HIDDEN_SIZE, 48, dtype)
        cuda_weights = [weight.cuda() for weight in weights]
        for tokens in counts:
            states, routed = torch.randn(tokens, HIDDEN_SIZE).to(dtype), masked_routing(tokens, 64)
            given = [tensor.cuda() for tensor in (states, *routed)]
            call = experts_call(given[0], *cuda_weights, given[1], MoEActivation.GELU_TANH)
            output = backend.forward(call, ExpertsTensors(given[0], *cuda_weights, *given[1:]))
            doubles = (weight.double() for weight in weights)
            truth = reference.experts(states.double(), *doubles, *routed, MoEActivation.GELU_TANH)
            error = relative_error(output.cpu(), truth)
            assert error < 0.01, f"{name}, {tokens} tokens: relative error {error:.4f}"


def run_sorted_rows() -> None:
    """sort_by_expert.cu, gather.cu, gated_activation.cu up to a row, and combine.cu, as the grouped backend calls them.

    Without torch's grouped GEMM between them: under racecheck it ends in an illegal access of its own.
    """
    for num_experts, tokens, size, dtype in product((33, 300), (3, 300, 700, 2500), (64, 14), SCALARS):
        index, weights = masked_routing(tokens, num_experts)
        states = torch.randn(tokens, size).to(dtype)
        pairs = sort_by_expert(index.cuda(), num_experts)
        rows = gather(states.cuda(), pairs.slot_of_pair)
        activated, num_rows = rows[:, size // 2 :].contiguous(), pairs.expert_offsets[num_experts:]
        gated_activation(rows, activated, MoEActivation.SILU, num_rows)
        output = combine(rows, pairs.slot_of_pair, weights.cuda())
        kept = torch.where(index < num_experts, weights, 0.0).double().sum(-1, keepdim=True)
        # On the CPU: what torch's kernels write is not watched, so that to initcheck it is never written.
        error = relative_error(output.cpu(), states.double() * kept)
        assert error < 0.01, f"{tokens} tokens, {num_experts} experts: relative error {error:.4f}"


def run_grouped_products() -> None:
    """grouped_linear.cu, also on a transposed weight, and grouped_outer.cu: few slots of an expert, many, and none."""
    counts = torch.tensor([0, 1, 70, 0, 17])
    expert = torch.arange(len(counts)).repeat_interleave(counts)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32).cuda()
    for dtype, (size, other_size) in product(SCALARS, ((13, 7), (40, 72))):
        rows, others = (torch.randn(len(expert), columns).to(dtype) for columns in (size, other_size))
        weight = torch.randn(len(counts), size, other_size).to(dtype)
        on_gpu = [tensor.cuda() for tensor in (rows, others, weight)]
        outputs = (
            grouped_linear(on_gpu[0], on_gpu[2].transpose(1, 2), offsets, torch.float32),
            grouped_linear(on_gpu[1], on_gpu[2], offsets),
            grouped_outer(on_gpu[0], on_gpu[1], offsets, torch.float32),
        )
        weights = weight.double()[expert]
        columns, row = rows.double()[:, :, None], others.double()[:, None]
        truths = (
            (columns * weights).sum(1),
            (weights * row).sum(2),
            weights.new_zeros(weight.shape).index_add_(0, expert, columns * row),
        )
        for output, truth in zip(outputs, truths, strict=True):
            error = relative_error(output.cpu(), truth)
            assert error < 0.01, f"{dtype}, {size} by {other_size}: relative error {error:.4f}"


def run_low_rank_products() -> None:
    """lora_shrink.cu with factors of both layouts and lora_outer.cu, on gathered rows and on rows in expert order."""
    counts = torch.tensor([0, 1, 70, 0, 17])
    expert, token = torch.arange(len(counts)).repeat_interleave(counts), torch.randperm(int(counts.sum()))
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32).cuda()
    for dtype, rank, gathered in product((torch.bfloat16, torch.float16), (16, 48), (False, True)):
        rows, factor = torch.randn(len(expert), 200).to(dtype), torch.randn(len(counts), rank, 200).to(dtype)
        weights, places = torch.randn(len(expert)), token.to(torch.int32).cuda() if gathered else None
        of_slots = rows[token] if gathered else rows
        low_truth = (of_slots.double()[:, None] * factor.double()[expert]).sum(-1)
        for given in (factor.cuda(), factor.mT.contiguous().cuda().mT):
            low = lora_shrink(rows.cuda(), given, offsets, places)
            error = relative_error(low.cpu(), low_truth)
            assert error < 0.01, f"{dtype}, rank {rank}: relative error {error:.4f}"
        output = torch.empty(len(counts), 200, rank - 4, device="cuda").transpose(1, 2)
        lora_outer(low, rows.cuda(), offsets, output, places, weights.cuda())
        outer = (low_truth * weights[:, None])[:, : rank - 4, None] * of_slots.double()[:, None]
        error = relative_error(output.cpu(), outer.new_zeros(output.shape).index_add_(0, expert, outer))
        assert error < 0.01, f"{dtype}, rank {rank}: relative error {error:.4f}"


def run_low_rank_back() -> None:
    """lora_back.cu by one block an expert and by clusters, with factors of both layouts, on rows of both orders."""
    counts = torch.tensor([0, 1, 70, 0, 17])
    expert, token = torch.arange(len(counts)).repeat_interleave(counts), torch.randperm(int(counts.sum()))
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32).cuda()
    for dtype, columns, gathered in product((torch.bfloat16, torch.float16), (200, 1416, 2880), (False, True)):
        rows, factor = torch.randn(len(expert), columns).to(dtype), torch.randn(len(counts), 16, columns).to(dtype)
        low, weights = torch.randn(len(expert), 16).to(dtype), torch.randn(len(expert))
        places, its_tiling = token.to(torch.int32).cuda() if gathered else None, tiling(columns, 16)
        assert its_tiling is not None
        of_slots = (rows[token] if gathered else rows).double()
        truth = torch.einsum("sc,src->sr", of_slots, factor.double()[expert])
        outer = (low.double() * weights[:, None])[:, :12, None] * of_slots[:, None]
        for given in (factor.cuda(), factor.mT.contiguous().cuda().mT):
            output = torch.empty(len(counts), columns, 12, device="cuda").transpose(1, 2)
            grad_low = lora_back(
                rows.cuda(), given, low.cuda(), offsets, output, its_tiling, places, weights.cuda(), scale=1.0
            )
            error = relative_error(grad_low.cpu(), truth)
            assert error < 0.01, f"{dtype}, {columns} columns: relative error {error:.4f}"
            error = relative_error(output.cpu(), outer.new_zeros(output.shape).index_add_(0, expert, outer))
            assert error < 0.01, f"{dtype}, {columns} columns: relative error {error:.4f}"


def run_packed_factors() -> None:
    """pack_adapter.cu in each of its tilings, on sizes that fill no tile."""
    for rows, columns in ((20, 150), (200, 10)):
        memory = torch.randn(rows, columns, 33)
        for source in (memory.permute(2, 0, 1).contiguous(), memory.permute(2, 0, 1)):
            for dtype in (torch.bfloat16, torch.float32):
                output = torch.full((33, rows + 3, columns + 6), torch.nan, device="cuda", dtype=dtype)
                pack_adapter([Copy(source.cuda(), output, 1.5)])
                back = torch.empty(rows, columns, 33, device="cuda").permute(2, 0, 1)
                pack_adapter([Copy(output[:, :rows, :columns], back)])
                expected = (1.5 * source).to(dtype)
                assert torch.equal(output[:, :rows, :columns].cpu(), expected), f"{dtype}, {rows} by {columns}"
                assert torch.equal(back.cpu(), expected.float()), f"{dtype}, {rows} by {columns}, back"
                assert not output[:, rows:].any(), "padding"
                assert not output[..., columns:].any(), "padding"


def run_raw_read() -> None:
    """raw_read.cu."""
    raw_read.raw_read(torch.zeros(4096, dtype=torch.uint8).cuda())


def random_weight(name: str, num_experts: int, rows: int, k: int) -> QuantizedWeight:
    """A weight of a format with codes that are no NaN."""
    format, of_rows = FORMATS[name], (num_experts, rows)
    codes = torch.randint(0, min(2**format.bits, 120), (*of_rows, k), dtype=torch.uint8)
    of_groups = (*of_rows, format.groups(k))
    scales = (torch.rand(of_groups) + 0.5).to(format.scale_dtypes[0]) if format.group else None
    zeros = torch.randint(0, 16, of_groups, dtype=torch.uint8) if format.has_zeros else None
    row_scales = torch.rand(of_rows) / 64 if format.has_row_scales else None
    return QuantizedWeight.of(format, codes, scales, zeros, row_scales)


def run_dequantized() -> None:
    """dequantize.cu: with scales of groups or of rows and zero points, and rows that end inside a word."""
    kinds = (("int4_g32_zero", 96), ("nvfp4", 48), ("mxfp4", 64), ("int8", 41), ("fp8_g128", 200))
    for (name, k), dtype in product(kinds, SCALARS):
        weight = random_weight(name, 3, 17, k)
        expected = weight.dequantize(dtype)
        output = dequantize(weight.format, k, weight.cuda().tensors(), dtype)
        assert torch.equal(output.cpu(), expected), f"{name}, {k}, {dtype}"


QUANTISED = ("int4_g32", "int4_g64_zero", "int8", "fp8_g128", "nvfp4")
QUANTISED_TOKENS = (1, 30, 60, 100, 200, 300)
"""Of 64 experts: one for each regime that the stream has beside codes below the tiles, and one by tiles."""


def run_quantised(name: str) -> None:
    """Both ways of the fused backend on weights of a format."""
    weights = random_weight(name, 64, 2 * 128, 192), random_weight(name, 64, 192, 128)
    doubles = [weight.dequantize() for weight in weights]
    cuda_weights = [weight.cuda() for weight in weights]
    for tokens in QUANTISED_TOKENS:
        states, routed = torch.randn(tokens, 192).bfloat16() / 16, masked_routing(tokens, 64)
        given = [tensor.cuda() for tensor in (states, *routed)]
        output = fused_experts(given[0], *cuda_weights, *given[1:], activation=MoEActivation.GELU_TANH, backend="fused")
        truth = reference.experts(states.double(), *doubles, *routed, MoEActivation.GELU_TANH)
        error = relative_error(output.cpu(), truth)
        assert error < 0.01, f"{name}, {tokens} tokens: relative error {error:.4f}"


def run_batches() -> None:
    """Rows that lie by expert: the weight stream and both cuts of the tiles, also of codes; counts of every kind."""
    counts = torch.tensor([0, 1, 63, 64, 65, 400, -3, 17], dtype=torch.int32)
    plain = expert_weights(len(counts), 192, 128, torch.bfloat16)
    codes = [random_weight("int4_g32", *weight.shape) for weight in plain]
    for weights, room in product((plain, codes), (3, 100, 380)):
        doubles = [w.double() if isinstance(w, torch.Tensor) else w.dequantize().cpu() for w in weights]
        states, out = (torch.randn(len(counts), room, 192).bfloat16() for _ in range(2))
        output, on_gpu = out.cuda(), [weight.cuda() for weight in weights]
        batched_experts(states.cuda(), counts.cuda(), *on_gpu, activation=MoEActivation.GELU_TANH, out=output)
        for expert, count in enumerate(counts.clamp(0, room).tolist()):
            index, routing = torch.full((count, 1), expert), torch.ones(count, 1)
            rows, of_expert = states[expert, :count].double(), output[expert].cpu()
            truth = reference.experts(rows, *doubles, index, routing, MoEActivation.GELU_TANH)
            assert torch.equal(of_expert[count:], out[expert, count:]), "a row that does not count was written"
            assert not count or relative_error(of_expert[:count], truth) < 0.01, f"{count} of {room} rows are wrong"


def run_mapped_experts() -> None:
    """Indices of all experts: every block plans for itself, one plans for all, a sort in one launch and in two."""
    expert_map = torch.randperm(128).sub(64).to(torch.int32)  # half of them are not here
    weights = expert_weights(64, HIDDEN_SIZE, 48, torch.bfloat16)
    for tokens in (1, 100, 700, 3000):
        states, (index, routing) = torch.randn(tokens, HIDDEN_SIZE).bfloat16(), masked_routing(tokens, 128)
        given = [tensor.cuda() for tensor in (states, *weights, index, routing)]
        output = fused_experts(*given, activation=MoEActivation.GELU_TANH, expert_map=expert_map.cuda())
        local = torch.where(index < 128, expert_map[index.clamp(max=127)], -1)
        doubles = (weight.double() for weight in weights)
        truth = reference.experts(states.double(), *doubles, local, routing, MoEActivation.GELU_TANH)
        error = relative_error(output.cpu(), truth)
        assert error < 0.01, f"{tokens} tokens: relative error {error:.4f}"


# What each tool watches, in parts that processes of their own run side by side.
SUITE = (
    run_activations,
    run_routing,
    run_raw_read,
    run_sorted_rows,
    run_grouped_products,
    run_low_rank_products,
    run_low_rank_back,
    run_packed_factors,
    run_dequantized,
    *(partial(run_quantised, name) for name in QUANTISED),
    run_batches,
    run_mapped_experts,
    run_streamed_adapters,
    *(partial(run_build, name) for name in BUILDS),
    *(partial(run_experts, *case, *size) for case, size in product(CASES, SIZES)),
    *(partial(run_training, *case, *size) for case, size in product(TRAINED, SIZES)),
)


def run_part(part: int) -> None:
    """One of ``SUITE``."""
    torch.set_num_threads(1)  # of the oracle; many parts run at once
    torch.manual_seed(part)
    SUITE[part]()
    torch.cuda.synchronize()


def entry_points() -> list[str]:
    """Every kernel of every source; ``extern "C"``, so that this is the whole of its name."""
    declared = re.compile(r'^extern "C" __global__ void (?:__\w+__\([^)]*\)\s*)*(\w+)\(', re.MULTILINE)
    texts = [(cuda_sources.directory() / f"{name}.cu").read_text(encoding="utf-8") for name in cuda_sources.names()]
    return [entry for text in texts for entry in declared.findall(text)]


def run_file(*arguments: str, under: tuple[str, ...] = ()) -> Run:
    """This file in a process of its own, its output kept."""
    command = [*under, sys.executable, __file__, *arguments]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False
    )


def watch(sanitizer: str, tool: str) -> tuple[str, ...]:
    """The command that puts a process under a tool; kernels of torch and of libraries are left out."""
    # Whole names, joined by "or". A substring (kns) takes no regular expression.
    watched = ",".join(f"kne={entry}" for entry in (*entry_points(), PLANTED))
    return sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", "--kernel-name", watched


def reports_planted(output: str) -> bool:
    """Whether one of the tool's own lines names the planted kernel."""
    return re.search(rf"^=========.*\b{PLANTED}\b", output, re.MULTILINE) is not None


def unclean(runs: Iterable[Run]) -> list[str]:
    """What the parts printed that did not end well."""
    return [
        f"{' '.join(run.args)} gave {run.returncode}\n{run.stdout}"
        for run in runs
        if run.returncode or DONE not in run.stdout
    ]


def verdict(tool: str, planted: Run, wrong: list[str]) -> bool:
    """Whether a tool is not blind and finds nothing; printed too."""
    if not reports_planted(planted.stdout):
        click.echo(f"{tool:10} BLIND: it did not report a fault that was planted for it\n{planted.stdout}")
        return False
    click.echo("\n".join([f"{tool:10} FAILED", *wrong]) if wrong else f"{tool:10} 0 findings")
    return not wrong


@click.command()
@click.option("--tool", "tools", type=click.Choice(TOOLS), multiple=True, default=TOOLS, show_default=True)
@click.option("--part", type=click.IntRange(0, len(SUITE) - 1), help="Run a part of the suite, under no tool.")
@click.option("--planted", type=click.Choice(TOOLS), help="Run the kernel that this tool must report, under no tool.")
@click.option("--jobs", type=click.IntRange(min=1), default=12, show_default=True, help="Processes at once.")
def main(tools: tuple[str, ...], part: int | None, planted: str | None, jobs: int) -> None:
    """Run every kernel and every regime under compute-sanitizer. Exits with 1 if a tool finds anything, or is blind."""
    if planted:
        run_planted(planted)
        return
    if part is not None:
        run_part(part)
        click.echo(DONE)
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        raise click.ClickException("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    click.echo(f"{torch.cuda.get_device_name()}, cuda_src {cuda_sources.sha256()}")
    with ThreadPoolExecutor(jobs) as pool:

        def start(*arguments: str, tool: str | None = None) -> Future[Run]:
            return pool.submit(run_file, *arguments, under=() if tool is None else watch(sanitizer, tool))

        def start_suite(tool: str | None = None) -> list[Future[Run]]:
            return [start("--part", str(part), tool=tool) for part in range(len(SUITE))]

        # Once without a tool: it fills the kernel cache, from which all tools then load.
        if wrong := unclean(run.result() for run in start_suite()):
            raise click.ClickException("\n".join(["the kernels fail without a tool", *wrong]))
        faults = {tool: start("--planted", tool, tool=tool) for tool in tools}
        suites = {tool: start_suite(tool) for tool in tools}
        failed = [
            tool
            for tool in tools
            if not verdict(tool, faults[tool].result(), unclean(run.result() for run in suites[tool]))
        ]
    if failed:
        raise click.ClickException(f"not clean: {', '.join(failed)}")


if __name__ == "__main__":
    main()
