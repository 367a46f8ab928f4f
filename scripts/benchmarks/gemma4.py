"""Gemma 4's text model with random weights, whole and small, as ``bench_model.py`` and ``bench_finetune.py`` run it."""

from __future__ import annotations

from dataclasses import asdict

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from cupymoe import Gemma4MoEConfig

LAYER_STRENGTH = 0.02


def gemma4_26b_a4b(layers: int = 30) -> Gemma4TextConfig:
    """The text model of ``google/gemma-4-26B-A4B``: five layers with a sliding window, one without, and so on."""
    return Gemma4TextConfig(
        **asdict(Gemma4MoEConfig.gemma4_26b_a4b()),
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        intermediate_size=2112,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        attention_k_eq_v=True,
        sliding_window=1024,
        final_logit_softcapping=30.0,
        tie_word_embeddings=False,  # with random weights a tied head's best token is the one that went in
    )


def small_gemma4() -> Gemma4TextConfig:
    """A model of the same kind that a CPU runs in seconds."""
    return Gemma4TextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        sliding_window=32,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=32,
    )


def build(config: Gemma4TextConfig, device: torch.device) -> Gemma4ForCausalLM:
    """The model in bfloat16, every weight made at random on the device."""
    config._attn_implementation = "sdpa"
    with device:
        model = Gemma4ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # a random model would end at random
    model.requires_grad_(False)
    for layer in model.model.layers:
        # Thirty random layers at full strength are chaos: rounding alone would change the logits by more than their
        # deviation, and nothing could be said of the tokens.
        layer.post_attention_layernorm.weight.fill_(LAYER_STRENGTH)
        layer.post_feedforward_layernorm.weight.fill_(LAYER_STRENGTH)
        # Router logits get a deviation of one; of ones, their rounding would choose the experts.
        layer.router.scale.fill_(1 / config.initializer_range)
    return model


def random_tokens(config: Gemma4TextConfig, *shape: int, device: torch.device) -> torch.Tensor:
    """Token ids, none of them special."""
    return torch.randint(16, config.vocab_size, shape, device=device)
