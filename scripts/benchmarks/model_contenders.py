"""Whose experts a whole model runs with, as ``bench_model.py`` times it: one model becomes each of them in turn."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import Gemma4ForCausalLM

from cupymoe import QuantizedWeight, quantize
from cupymoe.integrations.transformers import replace_routers

PEER, OURS, ROUTED = "grouped_mm", "cupymoe", "cupymoe + router"
CONTENDERS = (PEER, OURS, ROUTED)
YARDSTICK = "eager"
"""transformers' loop over the experts: how far its own two implementations are apart."""
BF16, INT4 = "cupymoe, bf16 experts", "cupymoe, int4 experts"


class Contenders:
    """One model, whose experts and routers are those of the contender that runs."""

    names = CONTENDERS
    peer = PEER
    compared = (OURS, ROUTED, YARDSTICK)
    """Whose tokens are compared with the peer's."""

    def __init__(self, model: Gemma4ForCausalLM) -> None:
        self.model = model
        self._theirs = [copy.copy(layer.router) for layer in model.model.layers]  # the parameters are shared
        replace_routers(model)
        self._ours = [layer.router for layer in model.model.layers]

    def become(self, name: str) -> Gemma4ForCausalLM:
        """The model as a contender, until it becomes another."""
        self.model.set_experts_implementation(OURS if name == ROUTED else name)
        for layer, router in zip(self.model.model.layers, self._ours if name == ROUTED else self._theirs, strict=True):
            layer.router = router
        return self.model


class QuantisedContenders:
    """One model, whose experts' weights are in int4 or what these stand for, rounded to bfloat16."""

    names = (BF16, INT4)
    peer = BF16
    compared = (INT4,)

    def __init__(self, model: Gemma4ForCausalLM) -> None:
        self.model = model
        model.set_experts_implementation(OURS)
        self._weights: list[tuple[nn.Module, str, dict[str, nn.Module | nn.Parameter]]] = []
        for layer in model.model.layers:
            experts = layer.experts
            quantised = quantize(experts.gate_up_proj, experts.down_proj, "int4", group_size=32)
            for name, weight in quantised.named_children():
                assert isinstance(weight, QuantizedWeight)
                plain = getattr(experts, name)
                plain.copy_(weight.dequantize(torch.bfloat16))
                self._weights.append((experts, name, {BF16: plain, INT4: weight}))

    def become(self, name: str) -> Gemma4ForCausalLM:
        """The model as a contender, until it becomes another."""
        for experts, weight, by_contender in self._weights:
            delattr(experts, weight)  # torch lets no module take a parameter's place
            setattr(experts, weight, by_contender[name])
        return self.model

    def drop_bf16(self) -> Gemma4ForCausalLM:
        """The model in int4 for good, its head tied to the embedding as a checkpoint has it."""
        self.become(INT4)
        self._weights.clear()
        self.model.lm_head.weight = self.model.model.embed_tokens.weight
        return self.model


CONTENDERS_OF: dict[str, type[Contenders] | type[QuantisedContenders]] = {
    "bf16": Contenders,
    "int4": QuantisedContenders,
}
"""By the experts that are measured."""
