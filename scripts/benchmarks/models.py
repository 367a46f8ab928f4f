"""Other models' experts beside transformers' ``grouped_mm``, as ``bench.py --regime models`` times them.

A cell is a model, a number of ranks that share its experts evenly, and a number of tokens. It is measured on one of the
ranks, whose experts are here; the tokens choose evenly from all, and the pairs of other ranks' experts are masked as
transformers masks them, by an index that is the number of experts here and a weight of zero.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import click
import torch

from cupymoe import Gemma4MoEConfig, fused_experts, reference
from scripts.benchmarks.experts import checked
from scripts.benchmarks.libraries import reason
from scripts.benchmarks.peers import WEIGHT_STD, Inputs, Oracle, count_of_cases, make_inputs
from scripts.benchmarks.timing import FLOOR, capture, free_memory, measure_ceilings, time_in_turn

TOKENS = (1, 4, 16, 32, 48, 128, 512, 1024, 4096, 8192)
SECONDS_PER_CONTENDER = 0.1
"""Of a cell; there are 150 of them."""
ORACLE_TOKENS = 16
"""Tokens of a cell that are compared with float64, or a few more: at least one of each call."""
BIAS_STD = 0.5
"""Large enough that a bias which is left out, or another expert's, shows in the error."""
LARGE_LAYER, SEVERAL_LAYERS = 2 * 10**9, 10**9
"""Bytes. Two large layers leave room for what a call computes with; as many small ones take turns as are this much, and
at least three, so that no weight is still in the L2 when it is read again."""
CEILING_BYTES = 3 * 2**30
COMPILERS = 16
"""Processes that compile at once, at the most: each holds a CUDA context and the weights of one layer."""


class Model(NamedTuple):
    """Experts of a published model."""

    config: Gemma4MoEConfig
    """Sizes and activation, whoever's the model is; all experts, wherever they are."""
    ranks: tuple[int, ...] = (1,)
    """Over how many ranks the experts are spread."""
    is_gpt_oss: bool = False
    """Whether each projection has a bias and lies transposed in memory, as in GPT-OSS."""


def _model(
    num_experts: int, top_k: int, hidden: int, intermediate: int, activation: str = "silu", **others: Any
) -> Model:
    return Model(Gemma4MoEConfig(hidden, intermediate, num_experts, top_k, activation), **others)


MODELS = {
    "gemma4-26b": Model(Gemma4MoEConfig.gemma4_26b_a4b(), ranks=(1, 8)),
    "gemma4-tp2": _model(128, 8, 2816, 352, "gelu_pytorch_tanh"),
    "gemma4-tp4": _model(128, 8, 2816, 176, "gelu_pytorch_tanh"),
    "qwen3-30b": _model(128, 8, 2048, 768),
    "mixtral-8x7b": _model(8, 2, 4096, 14336),
    "qwen3.5-35b": _model(256, 8, 2048, 512, ranks=(1, 8)),
    "qwen3-next-80b": _model(512, 10, 2048, 512),
    "olmoe": _model(64, 8, 2048, 1024),
    "glm-4.5-air": _model(128, 8, 4096, 1408),
    "deepseek-v3": _model(256, 8, 7168, 2048, ranks=(8,)),
    "llama4-scout": _model(16, 1, 5120, 8192),
    "gpt-oss-20b": _model(32, 4, 2880, 2880, "swigluoai", is_gpt_oss=True),
    "phi-3.5-moe": _model(16, 2, 4096, 6400),
}
"""By the names that reports have. Tensor parallelism (tp) splits every expert's intermediate size."""


class Cell(NamedTuple):
    """One row of the report before it is measured."""

    name: str
    ep: int
    """Ranks that share the experts."""
    tokens: int

    @property
    def model(self) -> Model:
        """Whose experts they are."""
        return MODELS[self.name]

    def __str__(self) -> str:
        return f"{self.name}, ep {self.ep}, T={self.tokens}"


class Weights(NamedTuple):
    """Weights of the experts of one layer that are here, as ``fused_experts`` is given them."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        """How many experts are here."""
        return len(self.down_proj)

    @property
    def nbytes(self) -> int:
        """Of all experts here together."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)


class Case(NamedTuple):
    """One call: the layer's number, its weights, its input."""

    layer: int
    weights: Weights
    inputs: Inputs


def cells_of(names: Iterable[str], tokens: Sequence[int]) -> list[Cell]:
    """The rows of a run, one model's after the other's."""
    return [Cell(name, ep, count) for name in names for ep in MODELS[name].ranks for count in tokens]


def report_name(names: Iterable[str], tokens: Iterable[int]) -> str:
    """``models``, or for a run that leaves out cells ``models-part``, which no report of all cells is lost to."""
    return "models" if set(names) == set(MODELS) and set(tokens) >= set(TOKENS) else "models-part"


def empty_weights(model: Model, ep: int, device: torch.device | str) -> Weights:
    """Uninitialised bfloat16 weights of one rank's experts of a layer."""
    config = model.config
    experts, hidden, intermediate = config.num_experts // ep, config.hidden_size, config.moe_intermediate_size
    rows = config.activation.input_size(intermediate)
    new = partial(torch.empty, dtype=torch.bfloat16, device=device)
    if model.is_gpt_oss:
        projections = new(experts, hidden, rows).transpose(1, 2), new(experts, intermediate, hidden).transpose(1, 2)
        return Weights(*projections, new(experts, rows), new(experts, hidden))
    return Weights(new(experts, rows, hidden), new(experts, hidden, intermediate))


def make_layers(model: Model, ep: int, device: torch.device | str) -> list[Weights]:
    """Random weights of as many layers as take turns."""
    layers = [empty_weights(model, ep, device)]
    layer_bytes = layers[0].nbytes
    count = 2 if layer_bytes > LARGE_LAYER else max(3, math.ceil(SEVERAL_LAYERS / layer_bytes))
    layers += [empty_weights(model, ep, device) for _ in range(count - 1)]
    for layer in layers:
        for tensor in layer:
            if tensor is not None:
                tensor.normal_(std=WEIGHT_STD if tensor.ndim == 3 else BIAS_STD)
    return layers


def masked(inputs: Inputs, num_experts: int) -> Inputs:
    """The same inputs on the rank that has the first experts."""
    states, index, weights = inputs
    is_here = index < num_experts
    return Inputs(states, index.where(is_here, num_experts), weights.where(is_here, 0))


def cases_of(cell: Cell, layers: list[Weights]) -> list[Case]:
    """The calls of a graph, which the layers take in turn."""
    cases = []
    for i in range(count_of_cases(cell.tokens)):
        layer, weights = i % len(layers), layers[i % len(layers)]
        inputs = make_inputs(cell.model.config, cell.tokens, weights.down_proj.device)
        cases.append(Case(layer, weights, masked(inputs, weights.num_experts)))
    return cases


def kept(cases: Sequence[Case]) -> tuple[float, float]:
    """Experts here with at least one token, and pairs with an expert here; on average over the cases."""
    indices = [case.inputs.top_k_index[case.inputs.top_k_index < case.weights.num_experts] for case in cases]
    hit = sum(index.unique().numel() for index in indices)
    return hit / len(cases), sum(index.numel() for index in indices) / len(cases)


def floor_ms(model: Model, hit_experts: float, pairs: float) -> float:
    """Milliseconds of reading the hit experts' weights and biases once, or of both products of the kept pairs."""
    config = model.config
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    rows = config.activation.input_size(intermediate)
    weights = (rows + intermediate) * hidden
    biases = rows + hidden if model.is_gpt_oss else 0
    bytes_of_expert = (weights + biases) * torch.bfloat16.itemsize
    read_ms = hit_experts * bytes_of_expert / FLOOR.read_tbs / 1e9
    return max(read_ms, 2 * pairs * weights / FLOOR.bf16_tflops / 1e9)


def oracle_of(config: Gemma4MoEConfig, case: Case, count: int) -> Oracle:
    """Some tokens of a case in float64; one expert's weights at a time are brought to it."""
    states, index, weights = case.inputs
    rows = torch.randperm(len(states), device=states.device)[:count]
    here = case.weights.num_experts
    experts = index[rows].unique()
    experts = experts[experts < here]
    position = torch.full((here + 1,), -1, device=states.device)
    position[experts] = torch.arange(len(experts), device=states.device)
    up, down, *biases = case.weights
    truth = reference.experts(
        states[rows].double(),
        up[experts],
        down[experts],
        position[index[rows]],
        weights[rows],
        config.activation,
        *(None if bias is None else bias[experts] for bias in biases),
    )
    return Oracle(rows, truth)


def cupymoe_call(cell: Cell, case: Case) -> Callable[[], torch.Tensor]:
    """The public function, as a model that is spread over ranks calls it."""
    states, index, weights = case.inputs
    gate_up_proj, down_proj, gate_up_bias, down_bias = case.weights
    return partial(
        fused_experts,
        states,
        gate_up_proj,
        down_proj,
        index,
        weights,
        activation=cell.model.config.activation,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        global_num_experts=None if cell.ep == 1 else cell.model.config.num_experts,
    )


def transformers_module(model: Model, ep: int, weights: Weights) -> Any:
    """transformers' own experts over these weights: GPT-OSS's, or for all that have neither bias nor transposed weights
    Mixtral's."""
    from transformers import GptOssConfig, MixtralConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = model.config
    sizes = {
        "num_local_experts": weights.num_experts,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe_intermediate_size,
    }
    with torch.device("meta"):
        if model.is_gpt_oss:
            module = GptOssExperts(GptOssConfig(**sizes))
        else:
            module = MixtralExperts(MixtralConfig(**sizes, hidden_act=config.hidden_activation))
    parameters: dict[str, torch.Tensor | None] = {"gate_up_proj": weights.gate_up_proj, "down_proj": weights.down_proj}
    if model.is_gpt_oss:
        parameters = {
            "gate_up_proj": weights.gate_up_proj.transpose(1, 2),
            "down_proj": weights.down_proj.transpose(1, 2),
            "gate_up_proj_bias": weights.gate_up_bias,
            "down_proj_bias": weights.down_bias,
        }
    for name, parameter in parameters.items():
        assert parameter is not None
        assert getattr(module, name).shape == parameter.shape
        setattr(module, name, torch.nn.Parameter(parameter, requires_grad=False))
    module._is_expert_parallel = ep > 1  # a transformers that does not read it looks for masked pairs in every call
    return module


def compile_cell(cell: Cell) -> str | None:
    """Compile what a cell calls into CuPy's cache on disk, by a call whose pairs are all masked; or say what failed."""
    config, device = cell.model.config, "cuda"
    try:
        with torch.inference_mode():
            weights = empty_weights(cell.model, cell.ep, device)
            shape = (cell.tokens, config.top_k_experts)
            inputs = Inputs(
                torch.zeros(cell.tokens, config.hidden_size, dtype=torch.bfloat16, device=device),
                torch.full(shape, weights.num_experts, device=device),
                torch.zeros(shape, device=device),
            )
            cupymoe_call(cell, Case(0, weights, inputs))()
            torch.cuda.synchronize()
    except Exception as error:
        return reason(error)
    return None


def compile_ahead(cells: Sequence[Cell]) -> None:
    """Compile the kernels of all cells in processes side by side; one process compiles one kernel after the other.

    A cell that fails here is compiled, or fails again, where it is measured.
    """
    start = time.perf_counter()
    processes = min(COMPILERS, os.cpu_count() or 1, len(cells))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        # Cells of one model share kernels, which one process should meet.
        found = list(pool.map(compile_cell, cells, chunksize=math.ceil(len(cells) / processes)))
    for cell, failure in zip(cells, found, strict=True):
        if failure is not None:
            click.echo(f"{cell} was not compiled ahead: {failure}")
    click.echo(f"compiled for {len(cells)} cells in {time.perf_counter() - start:.0f} s")


def measure_cell(cell: Cell, layers: list[Weights], modules: list[Any]) -> tuple[dict[str, Any], list[str]]:
    """A row, and what was wrong with the outputs."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    cases = cases_of(cell, layers)
    oracles = [oracle_of(cell.model.config, case, math.ceil(ORACLE_TOKENS / len(cases))) for case in cases]
    grouped_mm = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    captured = {
        "cupymoe": capture([cupymoe_call(cell, case) for case in cases]),
        "grouped_mm": capture([partial(grouped_mm, modules[case.layer], *case.inputs) for case in cases]),
    }
    error, wrong = {}, []
    for name, graph in captured.items():
        error[name], lines = checked(name, cell.tokens, graph, oracles)
        wrong += [f"{cell}: {line}" for line in lines]
    hit_experts, pairs = kept(cases)
    row = {
        "model": cell.name,
        "ep": cell.ep,
        "tokens": cell.tokens,
        "hit_experts": round(hit_experts, 2),
        "floor_ms": float(f"{floor_ms(cell.model, hit_experts, pairs):.5g}"),
        "error": error,
        "ms": time_in_turn(captured, SECONDS_PER_CONTENDER),
    }
    return row, wrong


def measure_models(
    names: Sequence[str], tokens: Sequence[int], device: torch.device
) -> tuple[dict[str, Any], list[str]]:
    """What the report holds beside the heading, and what was wrong.

    A cell that fails is told of and left out, and the others are still measured.
    """
    os.environ["CUPYMOE_ON_SLOW"] = "error"  # a slow backend would take minutes, and its time is not asked for
    cells = cells_of(names, tokens)
    compile_ahead(cells)
    buffer = torch.empty(CEILING_BYTES // 2, dtype=torch.bfloat16, device=device).normal_()
    ceilings = measure_ceilings(buffer, parts=3)
    del buffer
    free_memory()
    click.echo(f"ceilings: raw read {ceilings.read_tbs} TB/s, bf16 product {ceilings.bf16_tflops} TFLOP/s")
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for (name, ep), group in groupby(cells, key=lambda cell: (cell.name, cell.ep)):
        layers = make_layers(MODELS[name], ep, device)
        modules = [transformers_module(MODELS[name], ep, layer) for layer in layers]
        for cell in group:
            try:
                row, wrong = measure_cell(cell, layers, modules)
            except Exception as error:
                wrong = [f"{cell} failed: {reason(error)}"]
            else:
                rows.append(row)
                echo_cell(cell, row)
            for line in wrong:
                click.echo(line)
            failures += wrong
            free_memory()
        del layers, modules
        free_memory()
    return {"ceilings": ceilings._asdict(), "floor": FLOOR._asdict(), "rows": rows}, failures


def echo_cell(cell: Cell, row: dict[str, Any]) -> None:
    """A cell as soon as it is measured."""
    ours, peer = (row["ms"][name]["p50"] for name in ("cupymoe", "grouped_mm"))
    click.echo(
        f"{cell}: floor {row['floor_ms']:.4f} ms, cupymoe {ours:.4f} ms, {ours / row['floor_ms']:.2f} of the floor, "
        f"{peer / ours:.2f} times as fast as grouped_mm"
    )
