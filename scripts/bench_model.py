#!/usr/bin/env python
"""A whole Gemma 4 26B-A4B text model with random weights: cupymoe's experts beside transformers' ``grouped_mm``.

Decoding by ``generate()`` and as a captured CUDA graph of one step, at batch 1 and 32; prefill of 2048 and 8192 tokens;
and whether both choose the same tokens. The bfloat16 weights are made on the GPU. Prints tables, writes model.json.

``--experts int4`` measures cupymoe with experts in int4 beside cupymoe with what they stand for, in bfloat16, and the
memory that the model takes with int4 alone; it writes model_int4.json.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import Gemma4ForCausalLM, Gemma4TextConfig, StaticCache

from scripts.benchmarks.command import begin, measured_device
from scripts.benchmarks.gemma4 import build, gemma4_26b_a4b, random_tokens, small_gemma4
from scripts.benchmarks.model_contenders import CONTENDERS_OF, PEER, YARDSTICK, Contenders, QuantisedContenders
from scripts.benchmarks.report import report_folder, timed_kernels, write_report
from scripts.benchmarks.tables.whole_models import greedy_table, model_table
from scripts.benchmarks.timing import capture, free_memory, percentiles, synchronized_ms


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    config: Gemma4TextConfig
    prompt: int = 128
    greedy_steps: int = 64
    batches: tuple[int, ...] = (1, 32)
    generated: int = 12
    """New tokens of a timed ``generate()``; many short ones, as the host's speed wanders."""
    prefills: tuple[int, ...] = (2048, 8192)
    samples: int = 10
    """Of a cell, but ``generate()``'s."""
    generations: int = 20
    replays: int = 8
    """Steps of one sample of the graph."""
    context: int = 4096
    """Tokens that there is a cache for where memory is measured."""

    @property
    def cache_length(self) -> int:
        """Of the static cache; below the sliding window, so that one mask serves every layer."""
        return self.prompt + max(self.greedy_steps, self.replays) + 8


def small_plan() -> Plan:
    """The same on a model that a CPU runs in seconds."""
    return Plan(small_gemma4(), 6, 8, (1, 2), 4, (12,), samples=2, generations=2, replays=2, context=48)


class Decoder:
    """One greedy step over a static cache; token and position stay on the device, so that it can be captured."""

    def __init__(self, model: Gemma4ForCausalLM, prompt: torch.Tensor, cache_length: int) -> None:
        self.model, self.prompt = model, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=cache_length)
        self.token = prompt.new_zeros((prompt.shape[0], 1))
        self.position = prompt.new_zeros((1, 1))
        self._slots = torch.arange(cache_length, device=prompt.device)

    def prefill(self) -> None:
        """The prompt into the cache, the first token chosen."""
        self.cache.reset()
        logits = self.model(self.prompt, past_key_values=self.cache, logits_to_keep=1).logits
        self._first = logits.argmax(-1)
        self.rewind()

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        length = self.prompt.shape[1]
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)
            if layer.is_sliding:
                layer.cumulative_length_int = length
        self.position.fill_(length)
        self.token.copy_(self._first)

    def step(self) -> torch.Tensor:
        """Logits ``[B, V]`` of the token, and the next token in its place."""
        mask = (self._slots <= self.position).view(1, 1, 1, -1)
        logits: torch.Tensor = self.model(
            self.token,
            position_ids=self.position,
            # Made by the model, it would be a constant of the graph.
            attention_mask={"full_attention": mask, "sliding_attention": mask},
            past_key_values=self.cache,
        ).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position += 1
        return logits


class ModelBench:
    """The model and what is found about it."""

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        contenders: type[Contenders] | type[QuantisedContenders] = Contenders,
    ) -> None:
        self.plan, self.device = plan, device
        self.contenders = contenders(build(plan.config, device))

    def _cell(self, what: str, samples: dict[str, list[float]]) -> dict[str, Any]:
        found = {name: percentiles(times) for name, times in samples.items()}
        click.echo(f"{what}: " + ", ".join(f"{name} {ms['p50']:.2f} ms" for name, ms in found.items()))
        return {"what": what, "ms": found}

    def _in_turn(self, measure: Callable[[str], float], repeats: int) -> dict[str, list[float]]:
        """Samples of each contender, after one that does not count."""
        names = self.contenders.names
        for name in names:
            measure(name)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats):
            for name in names:
                samples[name].append(measure(name))
        return samples

    def _captured(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """A step's CUDA graph as a call that returns its output; on the CPU the step itself."""
        if self.device.type != "cuda":
            return step
        captured = capture([step])

        def replay() -> torch.Tensor:
            captured.graph.replay()
            output: torch.Tensor = captured.outputs[0]
            return output

        return replay

    def decode_graph(self, batch: int) -> dict[str, Any]:
        """A cell of captured steps."""
        plan = self.plan
        prompt = random_tokens(plan.config, batch, plan.prompt, device=self.device)
        decoder = Decoder(self.contenders.model, prompt, plan.cache_length)
        decoder.prefill()
        steps = {}
        for name in self.contenders.names:
            self.contenders.become(name)
            steps[name] = self._captured(decoder.step)

        def measure(name: str) -> float:
            self.contenders.become(name)  # a graph is its contender's already, a step is the model's
            decoder.rewind()
            return synchronized_ms(lambda: [steps[name]() for _ in range(plan.replays)]) / plan.replays

        how = "graph" if self.device.type == "cuda" else "step"
        return self._cell(f"decode, {how}, batch {batch}", self._in_turn(measure, plan.samples))

    def generate(self, batch: int) -> dict[str, Any]:
        """A cell of ``generate()``: milliseconds of each token after the first."""
        new_tokens = self.plan.generated
        prompt = random_tokens(self.plan.config, batch, self.plan.prompt, device=self.device)

        def run(model: Gemma4ForCausalLM, count: int) -> float:
            settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            return synchronized_ms(lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings))

        def measure(name: str) -> float:
            model = self.contenders.become(name)
            first = run(model, 1)
            return (run(model, 1 + new_tokens) - first) / new_tokens

        return self._cell(f"decode, generate(), batch {batch}", self._in_turn(measure, self.plan.generations))

    def prefill(self, tokens: int) -> dict[str, Any]:
        """A cell of one forward over a prompt, to its last logits."""
        prompt = random_tokens(self.plan.config, 1, tokens, device=self.device)

        def measure(name: str) -> float:
            model = self.contenders.become(name)
            return synchronized_ms(lambda: model(prompt, use_cache=True, logits_to_keep=1))

        return self._cell(f"prefill of {tokens}", self._in_turn(measure, 4))

    def greedy(self) -> list[dict[str, Any]]:
        """Each implementation's logits and choices beside the peer's, while it is fed the peer's greedy tokens.

        Each logit may move by the largest difference, so that both choose the same token wherever the margin between
        the peer's best two exceeds twice that; a step where they don't is ``wrong``. Steps whose margin exceeds it once
        are counted too. CUDA graphs where the implementation can be captured.
        """
        plan = self.plan
        prompt = random_tokens(plan.config, 1, plan.prompt, device=self.device)
        decoder = Decoder(self.contenders.model, prompt, plan.cache_length)

        def run(name: str, forced: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            self.contenders.become(name)
            decoder.prefill()
            step = decoder.step if name == YARDSTICK else self._captured(decoder.step)
            decoder.rewind()
            fed, found, chosen = [], [], []
            for i in range(plan.greedy_steps):
                if forced is not None:
                    decoder.token.copy_(forced[i])
                fed.append(decoder.token.clone())
                found.append(step()[0].float())
                chosen.append(decoder.token[0, 0].clone())
            return torch.stack(fed), torch.stack(found), torch.stack(chosen)

        tokens, expected, _ = run(self.contenders.peer, None)
        return [self._agreement(name, expected, *run(name, tokens)[1:]) for name in self.contenders.compared]

    def _agreement(self, name: str, expected: torch.Tensor, got: torch.Tensor, chosen: torch.Tensor) -> dict[str, Any]:
        difference = (got - expected).abs().amax(-1)
        best = expected.topk(2).values
        same = chosen == expected.argmax(-1)
        margin = best[:, 0] - best[:, 1]
        beyond, decided = margin > difference, margin > 2 * difference
        return {
            "name": name,
            "steps": len(expected),
            "same": int(same.sum()),
            "beyond": int(beyond.sum()),
            "beyond_same": int((beyond & same).sum()),
            "decided": int(decided.sum()),
            "wrong": int((decided & ~same).sum()),
            "largest_difference": float(f"{difference.max().item():.4g}"),
            "std_of_logits": float(f"{expected.std().item():.4g}"),
            "finite": bool(got.isfinite().all() and expected.isfinite().all()),
        }

    def memory(self, contenders: QuantisedContenders) -> dict[str, Any]:
        """Of the model in int4, which it stays: GB (10^9 bytes) of its weights, and the most that torch's allocator
        held in a prefill and the step after it (None on the CPU)."""
        plan, model = self.plan, contenders.drop_bf16()
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            free_memory()
            torch.cuda.reset_peak_memory_stats(self.device)
        prompt = random_tokens(plan.config, 1, plan.prefills[0], device=self.device)
        cache = StaticCache(config=model.config, max_cache_len=plan.context)
        token = model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        model(token, past_key_values=cache)
        held = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        peak = torch.cuda.max_memory_allocated(self.device) if on_cuda else None
        found = {
            "what": f"prefill of {plan.prefills[0]}, {plan.context} tokens of KV, batch 1",
            "weights_gb": held / 1e9,
            "peak_gb": None if peak is None else peak / 1e9,
        }
        at_most = "not measured on the CPU" if peak is None else f"{peak / 1e9:.2f} GB"
        click.echo(f"memory, {found['what']}: weights {held / 1e9:.2f} GB, peak {at_most}")
        return found

    def run(self) -> dict[str, Any]:
        """What ``model.json`` holds beside the heading."""
        plan = self.plan
        greedy = self.greedy()
        cells = []
        for batch in plan.batches:
            free_memory()
            cells.append(self.decode_graph(batch))
        for batch in plan.batches:
            cells.append(self.generate(batch))
        for tokens in plan.prefills:
            free_memory()
            cells.append(self.prefill(tokens))
        self.contenders.become(self.contenders.peer)
        parameters = sum(parameter.numel() for parameter in self.contenders.model.parameters())
        contenders = self.contenders
        return {
            "layers": plan.config.num_hidden_layers,
            "parameters": parameters,
            "prompt": plan.prompt,
            "cells": cells,
            "greedy": greedy,
            **({"memory": self.memory(contenders)} if isinstance(contenders, QuantisedContenders) else {}),
        }


def failures(found: dict[str, Any], peer: str = PEER) -> list[str]:
    """What was wrong with the tokens."""
    lines = []
    for row in found["greedy"]:
        if not row["finite"]:
            lines.append(f"{row['name']} gave logits that are not finite")
        if row["wrong"] and row["name"] != YARDSTICK:
            lines.append(f"{row['name']} chose another token than {peer} at {row['wrong']} steps beyond rounding")
    return lines


@click.command()
@click.option("--layers", default=30, show_default=True, help="Fewer fit a smaller GPU: 1.6 GB each, and 1.5 GB.")
@click.option(
    "--experts",
    type=click.Choice([*CONTENDERS_OF]),
    default="bf16",
    show_default=True,
    help="int4: beside what it stands for in bf16, and both are in memory: 70 GB of 30 layers.",
)
@click.option("--small", is_flag=True, help="A tiny model, on the CPU too: runs the same code, writes no report.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="benchmarks",
    show_default=True,
    help="The report goes to <output>/<device>/model.json, or model_int4.json, if all 30 layers ran.",
)
@click.option("--seed", default=0, show_default=True, help="Of weights and prompts.")
@torch.inference_mode()
def main(layers: int, experts: str, small: bool, output: Path, seed: int) -> None:
    """Time a whole model on this machine's GPU.

    Exits with 1 if a logit is not finite or a token differs beyond rounding; the report is written first, and says so.
    """
    warnings.simplefilter("ignore")  # transformers' own
    device = measured_device("bench_model.py", is_small=small)
    start = begin(device, seed)
    plan = small_plan() if small else Plan(gemma4_26b_a4b(layers))
    began = time.perf_counter()
    contenders = CONTENDERS_OF[experts]
    bench = ModelBench(plan, device, contenders)
    click.echo(f"built in {time.perf_counter() - began:.0f} s")
    found = bench.run()
    report = {**start, **timed_kernels(), **found}
    click.echo(f"\n{model_table(report)}\n\n{greedy_table(report)}\n\n{time.perf_counter() - began:.0f} s in all")
    if not small and layers == gemma4_26b_a4b().num_hidden_layers:
        name = "model.json" if experts == "bf16" else f"model_{experts}.json"
        write_report(report_folder(output, start["device"]) / name, report)
    if failed := failures(found, contenders.peer):
        raise click.ClickException("\n".join(failed))


if __name__ == "__main__":
    main()
