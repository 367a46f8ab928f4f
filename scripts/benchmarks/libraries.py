"""The expert kernels of vLLM, SGLang and SonicMoE as contenders of ``bench.py``, where the packages are installed.

An adapter imports one package and binds its function to a case: bfloat16, tanh GELU, the routing given. What a router
or a loader would hand over (int32 indices, views of the weights) is made when bound, outside of what is timed. Each is
written for the release that it names, whose Python has run here with its kernels replaced; the kernels have not.
Whatever goes wrong in one becomes a note, but for a broken CUDA context, which ends the run: ``--no-installed`` leaves
all of them out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from cupymoe import Gemma4MoEConfig
from scripts.benchmarks.peers import PEER_ERROR_LIMIT, Case, Contender, Layer, Oracle, make_inputs, relative_error

Bind = Callable[[Case], Callable[[], torch.Tensor]]


def vllm() -> Bind:
    """``fused_experts``, the Triton kernels, as of vLLM 0.33.0 (2026-11-01); not run here.

    That release has no tiles tuned for this shape in bfloat16. It takes its default ones, unless the variable
    ``VLLM_TUNED_CONFIG_FOLDER`` names a folder with better.
    """
    from vllm.model_executor.layers.fused_moe import MoEActivation, fused_experts

    def bind(case: Case) -> Callable[[], torch.Tensor]:
        hidden_states, index, weights = case.inputs
        return partial(
            fused_experts,
            hidden_states=hidden_states,
            w1=case.weights.gate_up_proj,
            w2=case.weights.down_proj,
            topk_weights=weights,
            topk_ids=index.int(),
            activation=MoEActivation.GELU_TANH,
        )

    return bind


def sglang() -> Bind:
    """``fused_experts``, the Triton kernels, as of SGLang 0.5.23 (2026-10-30); not run here.

    In that release ``gelu`` is the erf form on CUDA, and ``gelu_tanh`` is what Gemma 4's config asks for. The call
    reads a server's configuration, for which no model is loaded, and its group of GPUs, which one GPU does not use.
    """
    from sglang.srt.layers.moe.fused_moe_triton import fused_experts
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.runtime_context import get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="dummy"), role="scheduler")
    get_parallel().override_permanently(tp_group=None)

    def bind(case: Case) -> Callable[[], torch.Tensor]:
        hidden_states, index, weights = case.inputs
        num_experts = case.weights.down_proj.shape[0]
        return partial(
            fused_experts,
            hidden_states=hidden_states,
            w1=case.weights.gate_up_proj,
            w2=case.weights.down_proj,
            topk_output=StandardTopKOutput(topk_weights=weights, topk_ids=index.int(), router_logits=None),
            moe_runner_config=MoeRunnerConfig(
                num_experts=num_experts, num_local_experts=num_experts, activation="gelu_tanh", inplace=False
            ),
        )

    return bind


def sonicmoe() -> Bind:
    """``moe_general_routing_inputs`` in inference mode, as of sonic-moe 0.1.2.post1 (2026-04-20); not run here.

    Its GEGLU is QuACK's ``geglu``, the tanh form (read in quack-kernels 0.6.5). With ``concat_layout`` all gates come
    before all ups. That release does not read ``stream_id``.
    """
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    def bind(case: Case) -> Callable[[], torch.Tensor]:
        hidden_states, index, weights = case.inputs
        num_tokens, top_k = index.shape
        arguments = {
            "x": hidden_states,
            "router_scores": weights.flatten(),
            "token_indices": torch.arange(num_tokens, dtype=torch.int32, device=index.device).repeat_interleave(top_k),
            "expert_indices": index.flatten().int(),
            "w1": case.weights.gate_up_proj.permute(1, 2, 0),
            "b1": None,
            "w2": case.weights.down_proj.permute(1, 2, 0),
            "b2": None,
            "E": case.weights.down_proj.shape[0],
            "stream_id": 0,
            "activation_type": ActivationType.GEGLU,
            "is_inference_mode_enabled": True,
            "concat_layout": True,
        }
        return lambda: moe_general_routing_inputs(**arguments)[0]

    return bind


ADAPTERS: dict[str, Callable[[], Bind]] = {"vllm": vllm, "sglang": sglang, "sonicmoe": sonicmoe}


def reason(error: Exception) -> str:
    """The first line of what it says, if not endless; its type too, unless the package is simply not there."""
    line = next(iter(str(error).strip().splitlines()), "")[:200]
    return line if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {line}"


def installed_contenders(config: Gemma4MoEConfig, layers: list[Layer]) -> tuple[dict[str, Contender], list[str]]:
    """The packages that compute one token as we do, tried once each; and why the others are not measured."""
    case = Case(0, layers[0], make_inputs(config, 1, layers[0].down_proj.device))
    oracle = Oracle.of(config, case)
    found, notes = {}, []
    for name, adapter in ADAPTERS.items():
        try:
            bind = adapter()
            error = relative_error([oracle], [bind(case)()])
        except Exception as raised:  # foreign code, perhaps of another release
            notes.append(f"{name} is not measured: {reason(raised)}")
            continue
        if error <= PEER_ERROR_LIMIT:
            found[name] = Contender(bind)
        else:
            notes.append(f"{name} is not measured: a relative error of {error:.5f} at T=1, above {PEER_ERROR_LIMIT}")
    return found, notes
