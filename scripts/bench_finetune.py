#!/usr/bin/env python
"""Fine-tuning a whole Gemma 4 26B-A4B text model with random weights: cupymoe beside transformers' ``grouped_mm``.

Two recipes of LoRA: on the experts, with every layer checkpointed, where cupymoe computes PEFT's adapters unmerged and
the peer as PEFT does, merged; and on attention, with frozen experts. Both contenders train on the same batches of
tokens that are far from uniform, once for each seed of the adapters. The bfloat16 weights are made on the GPU. Prints a
table, writes finetune.json.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft import LoraConfig, get_peft_model
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from cupymoe.integrations.peft import use_low_rank
from scripts.benchmarks.command import begin, measured_device
from scripts.benchmarks.gemma4 import build, gemma4_26b_a4b, small_gemma4
from scripts.benchmarks.report import report_folder, timed_kernels, write_report
from scripts.benchmarks.tables.whole_models import finetune_table
from scripts.benchmarks.timing import free_memory, percentiles, synchronized_ms

PEER, OURS = "grouped_mm", "cupymoe"
SEEDS = (0, 1)
DATA_SEED = 1234
DISTINCT_TOKENS = 1024


@dataclass(frozen=True)
class Recipe:
    """What is adapted, and how."""

    name: str
    on_experts: bool
    checkpointing: bool


RECIPES = (Recipe("experts, checkpointed", True, True), Recipe("attention, experts frozen", False, False))


@dataclass(frozen=True)
class Plan:
    """What is trained."""

    config: Gemma4TextConfig
    sequences: int = 2
    length: int = 2048
    steps: int = 50
    warm_up: int = 5
    """Of these steps, those that are not timed: kernels compile, and torch's memory grows."""
    chunk: int = 512
    """Tokens whose logits are there at a time; those of 4096 are 4.3 GB in float32."""
    rank: int = 16
    learning_rate: float = 1e-3

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length


def small_plan() -> Plan:
    """The same on a model that a CPU trains in seconds."""
    config = small_gemma4()
    config.initializer_range = config.hidden_size**-0.5  # logits as far apart as those of the large model
    return Plan(config, length=64, steps=16, warm_up=2, chunk=40, rank=4, learning_rate=1e-2)


def batches(plan: Plan, device: torch.device) -> torch.Tensor:
    """Token ids ``[steps, sequences, length]``, the same for everyone: few of them, by Zipf's law, so that there is
    something to learn."""
    distinct = min(DISTINCT_TOKENS, plan.config.vocab_size // 2)
    shares = 1 / torch.arange(1, distinct + 1, dtype=torch.float64)
    shape = (plan.steps, plan.sequences, plan.length)
    drawn = shares.multinomial(
        plan.steps * plan.tokens, replacement=True, generator=torch.Generator().manual_seed(DATA_SEED)
    )
    ids: torch.Tensor = drawn + plan.config.vocab_size // 4
    return ids.view(shape).to(device)


def loss_of(model: Gemma4ForCausalLM, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Mean cross entropy of each token but the first of a sequence, its logits made in chunks, forward and backward."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()
    cap = model.config.final_logit_softcapping

    def of_chunk(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(hidden).float()
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return cross_entropy(logits, labels, reduction="sum")

    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    total: torch.Tensor = sum(checkpoint(of_chunk, *part, use_reentrant=False) for part in parts)
    return total / len(labels)


@dataclass(frozen=True)
class Run:
    """Of one contender from one seed."""

    losses: list[float]
    ms: list[float]
    """Of each step but those of the warm-up."""
    peak_gb: float
    """The most that was allocated at a time, the model among it."""


class FinetuneBench:
    """The model, which adapters come to and leave again."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.model = build(plan.config, device).train()
        for layer in self.model.model.layers:
            # Together the layers can turn the residual around, and so learn; at full strength they would be chaos.
            layer.post_attention_layernorm.weight.fill_(1 / plan.config.num_hidden_layers)
            layer.post_feedforward_layernorm.weight.fill_(1 / plan.config.num_hidden_layers)
        self.batches = batches(plan, device)

    def _adapted(self, recipe: Recipe, contender: str, seed: int) -> Any:
        """The model with fresh adapters, as PEFT makes them: in float32."""
        self.model.set_experts_implementation(contender)
        targets: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        if recipe.on_experts:
            targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
        torch.manual_seed(seed)
        with self.device:
            model = get_peft_model(self.model, LoraConfig(r=self.plan.rank, lora_alpha=self.plan.rank, **targets))
        if recipe.on_experts and contender == OURS:
            use_low_rank(model)
        return model

    def train(self, recipe: Recipe, contender: str, seed: int) -> Run:
        """All steps; the model is as before afterwards."""
        plan, on_cuda = self.plan, self.device.type == "cuda"
        free_memory()
        adapted = self._adapted(recipe, contender, seed)
        if recipe.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, fused=True)
        losses: list[torch.Tensor] = []

        def step(ids: torch.Tensor) -> None:
            loss = loss_of(self.model, ids, plan.chunk)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())

        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            ms = [synchronized_ms(partial(step, ids)) for ids in self.batches]
        finally:
            self.model.gradient_checkpointing_disable()
            adapted.unload()
            self.model.requires_grad_(False)
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_cuda else 0.0
        values = [float(f"{value:.6g}") for value in torch.stack(losses).tolist()]
        return Run(values, ms[plan.warm_up :], round(peak, 2))

    def measure(self, recipe: Recipe) -> dict[str, Any]:
        """A row of ``finetune.json``; the contenders take turns."""
        runs: dict[str, list[Run]] = {PEER: [], OURS: []}
        for seed in SEEDS:
            for name, done in runs.items():
                done.append(self.train(recipe, name, seed))
                run = done[-1]
                speed = self.plan.tokens / percentiles(run.ms)["p50"] * 1e3
                click.echo(
                    f"{recipe.name}, {name}, seed {seed}: {speed:.0f} tokens/s, "
                    f"loss {run.losses[0]:.4f} -> {run.losses[-1]:.4f}, peak {run.peak_gb} GB"
                )
        ms = {name: percentiles([each for run in done for each in run.ms]) for name, done in runs.items()}
        losses = {name: [run.losses for run in done] for name, done in runs.items()}
        return {
            "recipe": recipe.name,
            "ms": ms,
            "tokens_per_s": {name: round(self.plan.tokens / times["p50"] * 1e3) for name, times in ms.items()},
            "peak_gb": {name: max(run.peak_gb for run in done) for name, done in runs.items()},
            "loss": losses,
            **comparison(losses),
        }

    def run(self) -> dict[str, Any]:
        """What ``finetune.json`` holds beside the heading."""
        plan = self.plan
        return {
            "layers": plan.config.num_hidden_layers,
            "tokens": plan.tokens,
            "optimizer_steps": plan.steps,
            "rank": plan.rank,
            "recipes": [self.measure(recipe) for recipe in RECIPES],
        }


def comparison(losses: dict[str, list[list[float]]]) -> dict[str, float]:
    """How far the losses of both contenders are apart where they begin alike, the mean over steps and seeds; and
    beside it the noise, how far the peer's own are from one seed to the other."""
    peer, ours = (torch.tensor(losses[name], dtype=torch.float64) for name in (PEER, OURS))
    found = {"difference": (ours - peer).abs().mean(), "noise": (peer[0] - peer[1]).abs().mean()}
    return {name: float(f"{value.item():.4g}") for name, value in found.items()}


def failures(found: dict[str, Any]) -> list[str]:
    """What was wrong with the losses."""
    return [
        f"{row['recipe']}: losses of {OURS} and {PEER} differ by {row['difference']}, and {PEER}'s own of two seeds "
        f"by {row['noise']}"
        for row in found["recipes"]
        if not row["difference"] <= row["noise"]
    ]


@click.command()
@click.option("--layers", default=30, show_default=True, help="Fewer fit a smaller GPU, and take less time.")
@click.option("--small", is_flag=True, help="A tiny model, on the CPU too: runs the same code, writes no report.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="benchmarks",
    show_default=True,
    help="The report goes to <output>/<device>/finetune.json.",
)
@click.option("--seed", default=0, show_default=True, help="Of the model's weights.")
def main(layers: int, small: bool, output: Path, seed: int) -> None:
    """Fine-tune a whole model on this machine's GPU.

    Exits with 1 if the losses of both differ by more than the noise of two seeds; the report is written first.
    """
    warnings.simplefilter("ignore")  # transformers' and PEFT's own
    device = measured_device("bench_finetune.py", is_small=small)
    start = begin(device, seed)
    began = time.perf_counter()
    bench = FinetuneBench(small_plan() if small else Plan(gemma4_26b_a4b(layers)), device)
    click.echo(f"built in {time.perf_counter() - began:.0f} s")
    found = bench.run()
    report = {**start, **timed_kernels(), **found}
    click.echo(f"\n{finetune_table(report)}\n\n{time.perf_counter() - began:.0f} s in all")
    if not small:
        write_report(report_folder(output, start["device"]) / "finetune.json", report)
    if failed := failures(found):
        raise click.ClickException("\n".join(failed))


if __name__ == "__main__":
    main()
