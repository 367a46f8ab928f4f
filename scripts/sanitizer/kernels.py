"""The kernels that have launchers of their own, one at a time, against torch."""

from __future__ import annotations

from itertools import product

import torch

from cupymoe import MoEActivation, moe_activation, route
from cupymoe.kernels.combine import combine
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
from cupymoe.kernels.raw_read import raw_read
from cupymoe.kernels.router_logits import router_logits
from cupymoe.kernels.router_logits_many import router_logits_many
from cupymoe.kernels.sort_by_expert import sort_by_expert
from scripts.sanitizer.inputs import HIDDEN_SIZE, check, masked_routing, random_weight


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
        check(output, states.double() * kept, f"{tokens} tokens, {num_experts} experts")


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
            check(output, truth, f"{dtype}, {size} by {other_size}")


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
            check(low, low_truth, f"{dtype}, rank {rank}")
        output = torch.empty(len(counts), 200, rank - 4, device="cuda").transpose(1, 2)
        lora_outer(low, rows.cuda(), offsets, output, places, weights.cuda())
        outer = (low_truth * weights[:, None])[:, : rank - 4, None] * of_slots.double()[:, None]
        check(output, outer.new_zeros(output.shape).index_add_(0, expert, outer), f"{dtype}, rank {rank}")


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
            check(grad_low, truth, f"{dtype}, {columns} columns")
            check(output, outer.new_zeros(output.shape).index_add_(0, expert, outer), f"{dtype}, {columns} columns")


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
    raw_read(torch.zeros(4096, dtype=torch.uint8).cuda())


def run_dequantized() -> None:
    """dequantize.cu: with scales of groups or of rows and zero points, and rows that end inside a word."""
    kinds = (("int4_g32_zero", 96), ("nvfp4", 48), ("mxfp4", 64), ("int8", 41), ("fp8_g128", 200))
    for (name, k), dtype in product(kinds, SCALARS):
        weight = random_weight(name, 3, 17, k)
        expected = weight.dequantize(dtype)
        output = dequantize(weight.format, k, weight.cuda().tensors(), dtype)
        assert torch.equal(output.cpu(), expected), f"{name}, {k}, {dtype}"


PARTS = (
    run_activations,
    run_routing,
    run_raw_read,
    run_sorted_rows,
    run_grouped_products,
    run_low_rank_products,
    run_low_rank_back,
    run_packed_factors,
    run_dequantized,
)
