"""Gemma 4's experts inside serving stacks: the activation that their model code asks for, and what they compute of it.

A stack's decoder layer is built with nothing in the place of every module but its experts, to learn what it asks of
these. Then the stack computes them as it would in a layer, on this device, with whatever it chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import nn

Experts = Callable[..., torch.Tensor]


class _Asked(BaseException):
    """What a decoder layer asks of its experts. Nobody's ``except Exception`` may swallow it."""


@contextmanager
def _with(module: ModuleType, values: dict[str, Any]) -> Iterator[None]:
    """The module has these attributes meanwhile."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


def _config(activation: str) -> Any:
    """A ``Gemma4TextConfig`` whose first layer has experts."""
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

    config = Gemma4TextConfig(
        hidden_activation=activation,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=64,
        hidden_size_per_layer_input=0,
    )
    config.allow_global_per_layer_attribute_access = True  # of which the stacks' own releases of transformers know less
    return config


class _Nothing(nn.Module):
    """Stands for any module, however it is made and whatever attribute is asked of it."""

    def __init__(self, *_: Any, **settings: Any) -> None:
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        return None


def _ask(*_: Any, activation: str, **others: Any) -> NoReturn:
    raise _Asked(activation)


def _asked(module: ModuleType, makers: dict[str, Callable[..., Any]], *arguments: Any, **settings: Any) -> str:
    """The ``activation`` that a stack's Gemma 4 asks its experts for.

    Args:
        module: its model code, with a ``Gemma4DecoderLayer``.
        makers: what takes the place of the module's names that make experts, where it has them.
        arguments, settings: of the decoder layer.

    Raises:
        RuntimeError: the decoder layer makes no experts so.
    """
    nothing = {
        name: _Nothing
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and name not in ("Gemma4DecoderLayer", "Gemma4MoE")
    }
    found = {name: maker for name, maker in makers.items() if hasattr(module, name)}
    with _with(module, {**nothing, **found}):
        try:
            module.Gemma4DecoderLayer(*arguments, **settings)
        except _Asked as asked:
            return str(asked.args[0])
    raise RuntimeError(
        f"{module.__name__} was expected to make its experts by {' or '.join(makers)}, and calls none of them"
    )


# --- vLLM -------------------------------------------------------------------------------------------------------------


def vllm(activation: str) -> tuple[Experts, str]:
    """vLLM's: the method of its unquantised experts, with the backend that it selects.

    With ``CUPYMOE_VLLM=1`` and cupymoe's plug-in that is cupymoe. From vLLM 0.26 on.

    Returns:
        The experts, and the activation that its model code asks them for.

    Raises:
        Exception: whatever vLLM raises where it can't be imported, or its model code can't be run so.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.models import gemma4
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = VllmConfig()
    with set_current_vllm_config(config):
        makers = {"FusedMoEFactory": _ask, "FusedMoE": _ask}  # its name before 0.28
        asked = _asked(gemma4, makers, _config(activation), prefix="model.layers.0")
    member = MoEActivation.from_str(asked)

    def experts(
        hidden_states: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

        if not is_workspace_manager_initialized():
            init_workspace_manager(hidden_states.device)
        with set_current_vllm_config(config), torch.inference_mode():
            method, layer = _vllm_layer(member, hidden_states, gate_up_proj, down_proj, top_k_index.shape[1])
            output: torch.Tensor = method.apply(layer, hidden_states, top_k_weights, top_k_index.int(), None, None)
            return output

    return experts, asked


def _vllm_layer(
    member: Any, hidden_states: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, top_k: int
) -> tuple[Any, Any]:
    """vLLM's method, and what it reads of its ``RoutedExperts``, ready for calls."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    num_experts, hidden_size, intermediate_size = down_proj.shape
    moe = FusedMoEConfig(
        num_experts=num_experts,
        experts_per_token=top_k,
        hidden_dim=hidden_size,
        intermediate_size=intermediate_size,
        num_local_experts=num_experts,
        num_logical_experts=num_experts,
        activation=member,
        device=hidden_states.device,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=hidden_states.dtype,
    )
    method = UnquantizedFusedMoEMethod(moe)
    layer: Any = nn.Module()
    layer.w13_weight = nn.Parameter(gate_up_proj, requires_grad=False)
    layer.w2_weight = nn.Parameter(down_proj, requires_grad=False)
    layer.moe_config, layer.activation = moe, member
    layer.layer_name, layer.global_num_experts = "model.layers.0.experts", num_experts
    layer.expert_map, layer.apply_router_weight_on_input = None, False
    layer._expert_routing_tables = lambda: None
    method.process_weights_after_loading(layer)
    return method, layer


# --- SGLang -----------------------------------------------------------------------------------------------------------


def sglang(activation: str) -> tuple[Experts, str]:
    """SGLang's: its Triton kernels on CUDA, and off it the loop in torch that its CPU path takes without AMX.

    Written for 0.5.23.

    Returns:
        As :func:`vllm`.

    Raises:
        Exception: whatever SGLang raises where it can't be imported, or its model code can't be run so.
    """
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.models import gemma4_causal
    from sglang.srt.runtime_context import get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="dummy"), role="scheduler")
    get_parallel().override_permanently(tp_group=None)
    makers = {"get_moe_impl_class": lambda *_: _ask}
    asked = _asked(gemma4_causal, makers, layer_id=0, config=_config(activation))

    def experts(
        hidden_states: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        num_experts = down_proj.shape[0]
        config = MoeRunnerConfig(
            num_experts=num_experts, num_local_experts=num_experts, activation=asked, inplace=False
        )
        routing = StandardTopKOutput(topk_weights=top_k_weights, topk_ids=top_k_index.int(), router_logits=None)
        output: torch.Tensor
        if hidden_states.is_cuda:
            from sglang.srt.layers.moe.fused_moe_triton import fused_experts

            output = fused_experts(hidden_states, gate_up_proj, down_proj, routing, config)
        else:
            from sglang.srt.layers.moe.fused_moe_native import moe_forward_native

            layer = SimpleNamespace(num_experts=num_experts, w13_weight=gate_up_proj, w2_weight=down_proj)
            output = moe_forward_native(layer, hidden_states, routing, config)
        return output

    return experts, asked


HOSTS: dict[str, Callable[[str], tuple[Experts, str]]] = {"vllm": vllm, "sglang": sglang}
"""By the name of the target."""
