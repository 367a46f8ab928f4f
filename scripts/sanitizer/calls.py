"""Whole calls of the fused backend, and training steps, against the reference: both ways, every regime, every cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch

from cupymoe import (
    LowRank,
    MoEActivation,
    QuantizedWeight,
    batched_experts,
    fused_experts,
    lora_experts,
    reference,
)
from cupymoe.backends import ExpertsTensors
from cupymoe.backends.fused import FusedBackend
from cupymoe.kernels.arch import BUILDS
from cupymoe.kernels.expert_tiles import MANY_SLOTS
from cupymoe.ops import experts_call
from scripts.sanitizer.inputs import (
    HIDDEN_SIZE,
    Weights,
    adapter_factors,
    check,
    expert_weights,
    masked_routing,
    random_weight,
)

# (experts, hidden size, tokens): around the bounds of every regime of the fused backend's weight stream, the last of
# them where the hidden size keeps the tiles out; and every cut of the tiles.
CASES = (
    (64, 64, (1, 3, 32, 33, 64)),
    (64, 64, (65, 129, 256)),
    (64, 64, (257, 383)),
    (64, 72, (512, 513, 700)),
    (8, 64, (64, 130, 300, 479)),
    (8, 64, (480, 600, 735)),
    (8, 64, (736, 900)),
)
SIZES = ((48, torch.bfloat16), (96, torch.float16))  # intermediate size, dtype
# Of training steps: both kinds of the stream, whose gradients go by tiles all the same, and every cut of the tiles.
TRAINED = ((64, 64, (3, 383)), (8, 64, (130, 600, 900)))
GELU_TANH = MoEActivation.GELU_TANH


def run_experts(
    num_experts: int, hidden_size: int, counts: tuple[int, ...], intermediate_size: int, dtype: torch.dtype
) -> None:
    """The fused backend, with masked pairs and an expert without tokens; the results are checked too."""
    weights = expert_weights(num_experts, hidden_size, intermediate_size, dtype)
    cuda_weights = weights.cuda()
    # The tiles of few tokens, where there are tiles: as few as can be, and as many as need no sort before.
    invariant = [(1, "invariant"), (32, "invariant")] if hidden_size % 16 == 0 else []
    for tokens, numerics in [*((tokens, "fast") for tokens in counts), *invariant]:
        states, (index, routing) = torch.randn(tokens, hidden_size).to(dtype), masked_routing(tokens, num_experts)
        output = fused_experts(
            states.cuda(),
            *cuda_weights,
            index.cuda(),
            routing.cuda(),
            activation=GELU_TANH,
            backend="fused",
            numerics=numerics,
        )
        truth = reference.experts(states.double(), *weights.double(), index, routing, GELU_TANH)
        check(output, truth, f"{tokens} tokens")


def step(compute: Callable[..., torch.Tensor], grad: torch.Tensor, *given: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of what is given."""
    leaves = [tensor.requires_grad_() for tensor in given]
    output = compute(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def check_step(compute: Callable[..., torch.Tensor], truth: Callable[..., torch.Tensor], *given: torch.Tensor) -> None:
    """A step on the GPU, by ``compute``, against one in float64; of what is given, hidden states come first.

    All that the kernels read is copied to the GPU, the output's gradient too, for the reason that :func:`check` has.
    """
    given = (torch.randn(given[0].shape).to(given[0].dtype), *given)
    found, expected = step(compute, *(each.cuda() for each in given)), step(truth, *(each.double() for each in given))
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        check(one, other, f"{len(given[0])} tokens, tensor {place} of a step")


def run_training(
    num_experts: int, hidden_size: int, counts: tuple[int, ...], intermediate_size: int, dtype: torch.dtype
) -> None:
    """Training steps of the fused backend: of the experts, and of adapters on frozen ones."""
    weights = expert_weights(num_experts, hidden_size, intermediate_size, dtype)
    cuda_weights, true_weights, factors = weights.cuda(), weights.double(), adapter_factors(weights)

    def check_steps(states: torch.Tensor, index: torch.Tensor, routing: torch.Tensor) -> None:
        cuda_index = index.cuda()

        def trained(states: torch.Tensor, routing: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
            return fused_experts(states, up, down, cuda_index, routing, activation=GELU_TANH, backend="fused")

        def adapted(states: torch.Tensor, routing: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
            adapters = LowRank(factors[0], factors[1]), LowRank(factors[2], factors[3])
            return lora_experts(states, *cuda_weights, cuda_index, routing, *adapters, activation=GELU_TANH)

        def truth(states: torch.Tensor, routing: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
            return reference.experts(states, up, down, index, routing, GELU_TANH)

        def merged(states: torch.Tensor, routing: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
            up_a, up_b, down_a, down_b = factors
            return truth(states, routing, true_weights[0] + up_b @ up_a, true_weights[1] + down_b @ down_a)

        check_step(trained, truth, states, routing, *weights)
        check_step(adapted, merged, states, routing, *factors)

    for tokens in counts:
        check_steps(torch.randn(tokens, hidden_size).to(dtype), *masked_routing(tokens, num_experts))


def run_streamed_adapters() -> None:
    """The weight stream with adapters, of both layouts and in each of its regimes, and lora_shrink_chunks.cu for it."""
    for dtype, transposed in product((torch.bfloat16, torch.float16), (False, True)):
        weights = expert_weights(64, HIDDEN_SIZE, 48, dtype)
        factors = adapter_factors(weights)
        merged = Weights(
            *(
                weight.double() + b.double() @ a.double()
                for weight, a, b in zip(weights, factors[::2], factors[1::2], strict=True)
            )
        )
        up, down, *on_gpu = (
            each.mT.contiguous().cuda().mT if transposed else each.cuda() for each in (*weights, *factors)
        )
        adapters = LowRank(on_gpu[0], on_gpu[1]), LowRank(on_gpu[2], on_gpu[3])
        for tokens in (1, 32, 33, 65, 257):
            states, (index, routing) = torch.randn(tokens, HIDDEN_SIZE).to(dtype), masked_routing(tokens, 64)
            output = lora_experts(
                states.cuda(), up, down, index.cuda(), routing.cuda(), *adapters, activation=MoEActivation.SILU
            )
            truth = reference.experts(states.double(), *merged, index, routing, MoEActivation.SILU)
            check(output, truth, f"{dtype}, {tokens} tokens")


def run_build(name: str) -> None:
    """The weight stream as another architecture has it: each regime, and more pairs than are planned at once."""
    backend = FusedBackend(BUILDS[name])
    for dtype, counts in ((torch.bfloat16, (1, 40, 128, 400, 700)), (torch.float16, (2100,))):
        weights = expert_weights(64, HIDDEN_SIZE, 48, dtype)
        cuda_weights = weights.cuda()
        for tokens in counts:
            states, (index, routing) = torch.randn(tokens, HIDDEN_SIZE).to(dtype), masked_routing(tokens, 64)
            given = ExpertsTensors(states.cuda(), *cuda_weights, index.cuda(), routing.cuda())
            call = experts_call(given.hidden_states, *cuda_weights, given.top_k_index, GELU_TANH)
            output = backend.forward(call, given)
            truth = reference.experts(states.double(), *weights.double(), index, routing, GELU_TANH)
            check(output, truth, f"{name}, {tokens} tokens")


QUANTISED = ("int4_g32", "int4_g64_zero", "int8", "fp8_g128", "nvfp4")
QUANTISED_TOKENS = (1, 7, 30, 60, 100, 200, 300, 600, 1000, 1500)
"""Of 64 experts: one for each regime of the stream beside codes below the tiles, and one for each size of the tiles."""


def run_quantised(name: str) -> None:
    """Both ways of the fused backend on weights of a format."""
    up, down = random_weight(name, 64, 2 * 128, 192), random_weight(name, 64, 192, 128)
    doubles, cuda_weights = Weights(up.dequantize(), down.dequantize()), (up.cuda(), down.cuda())
    for tokens in QUANTISED_TOKENS:
        states, (index, routing) = torch.randn(tokens, 192).bfloat16() / 16, masked_routing(tokens, 64)
        output = fused_experts(
            states.cuda(), *cuda_weights, index.cuda(), routing.cuda(), activation=GELU_TANH, backend="fused"
        )
        truth = reference.experts(states.double(), *doubles, index, routing, GELU_TANH)
        check(output, truth, f"{name}, {tokens} tokens")


def run_batches() -> None:
    """Rows that lie by expert: the weight stream, tiles of one cut, and of two with few rows and with many, also of
    codes; counts of every kind."""
    of_every_kind = torch.tensor([0, 1, 63, 64, 65, 400, -3, 17], dtype=torch.int32)
    rooms = (3, of_every_kind), (100, of_every_kind), (380, of_every_kind), (380, of_every_kind + MANY_SLOTS)
    plain = expert_weights(len(of_every_kind), 192, 128, torch.bfloat16)
    up, down = (random_weight("int4_g32", *weight.shape) for weight in plain)
    kinds: tuple[tuple[Weights, Sequence[torch.Tensor | QuantizedWeight]], ...] = (
        (plain.double(), plain.cuda()),
        (Weights(up.dequantize(), down.dequantize()), (up.cuda(), down.cuda())),
    )
    for (doubles, (cuda_up, cuda_down)), (room, counts) in product(kinds, rooms):
        states, out = (torch.randn(len(counts), room, 192).bfloat16() for _ in range(2))
        output = out.cuda()
        batched_experts(states.cuda(), counts.cuda(), cuda_up, cuda_down, activation=GELU_TANH, out=output)
        for expert, count in enumerate(counts.clamp(0, room).tolist()):
            index, routing = torch.full((count, 1), expert), torch.ones(count, 1)
            rows, of_expert = states[expert, :count].double(), output[expert].cpu()
            truth = reference.experts(rows, *doubles, index, routing, GELU_TANH)
            assert torch.equal(of_expert[count:], out[expert, count:]), "a row that does not count was written"
            if count:
                check(of_expert[:count], truth, f"{count} of {room} rows")


def run_mapped_experts() -> None:
    """Indices of all experts: every block plans for itself, one plans for all, a sort in one launch and in two; and
    every block of the tiles sorts for itself."""
    expert_map = torch.randperm(128).sub(64).to(torch.int32)  # half of them are not here
    weights = expert_weights(64, HIDDEN_SIZE, 48, torch.bfloat16)
    for tokens, numerics in (*((tokens, "fast") for tokens in (1, 100, 700, 3000)), (31, "invariant")):
        states, (index, routing) = torch.randn(tokens, HIDDEN_SIZE).bfloat16(), masked_routing(tokens, 128)
        output = fused_experts(
            states.cuda(),
            *weights.cuda(),
            index.cuda(),
            routing.cuda(),
            activation=GELU_TANH,
            expert_map=expert_map.cuda(),
            numerics=numerics,
        )
        local = torch.where(index < 128, expert_map[index.clamp(max=127)], -1)
        truth = reference.experts(states.double(), *weights.double(), local, routing, GELU_TANH)
        check(output, truth, f"{tokens} tokens")


PARTS: tuple[Callable[[], None], ...] = (
    *(partial(run_quantised, name) for name in QUANTISED),
    run_batches,
    run_mapped_experts,
    run_streamed_adapters,
    *(partial(run_build, name) for name in BUILDS),
    *(partial(run_experts, *case, *size) for case, size in product(CASES, SIZES)),
    *(partial(run_training, *case, *size) for case, size in product(TRAINED, SIZES)),
)
