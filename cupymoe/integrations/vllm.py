"""cupymoe as the experts of vLLM 0.23 and newer: the entry point that vLLM calls in each of its processes.

An installed package must not change a served model unasked, so :func:`register` does nothing unless ``CUPYMOE_VLLM`` is
1. Then vLLM makes our method wherever it would make its ``UnquantizedFusedMoEMethod``, and each layer is computed by
cupymoe or, if there is a reason against it, by whatever vLLM would take; the log says which and why. The weights stay
as vLLM loads them (docs/vllm.md). vLLM is imported on the call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch

from cupymoe.activation import MoEActivation
from cupymoe.backends import INVARIANT, ExpertsCall, registry, serving
from cupymoe.functional import batched_experts, fused_experts
from cupymoe.kernels.arch import HOPPER, Arch
from cupymoe.warmup import one_of_each_way

ENVIRONMENT = "CUPYMOE_VLLM"
"""The variable that must be 1."""
LOGGER = "vllm.plugins.cupymoe"
"""Below vLLM's own, so that its handlers show what is said."""


def register() -> None:
    """Let vLLM compute its unquantised experts with cupymoe, if ``CUPYMOE_VLLM`` is 1. A second call changes nothing.

    Raises:
        ValueError: ``CUPYMOE_VLLM`` is neither 0 nor 1.
        RuntimeError: vLLM is older than 0.23 or has changed what this relies on, or another plug-in has replaced the
            same class.
    """
    asked = os.environ.get(ENVIRONMENT, "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{ENVIRONMENT} must be 0 or 1, got {asked!r}")
    if asked == "1":
        _register()


@functools.cache
def _register() -> None:
    try:
        from vllm.logger import init_logger
        from vllm.model_executor.custom_op import op_registry_oot
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

        method = method_class()
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{ENVIRONMENT}=1 needs vLLM 0.23 or newer, with experts that work as 0.33's, got {version('vllm')}: "
            f"{error}"
        ) from error
    name = UnquantizedFusedMoEMethod.__name__
    if name in op_registry_oot:
        raise RuntimeError(
            f"{ENVIRONMENT}=1 can't serve vLLM's {name}, which another plug-in has replaced by "
            f"{op_registry_oot[name].__name__}: let VLLM_PLUGINS name only one of the two"
        )
    UnquantizedFusedMoEMethod.register_oot(method)
    init_logger(LOGGER).info(
        "cupymoe computes vLLM's experts where their weights are not quantised (%s=1)", ENVIRONMENT
    )


# --- what vLLM's settings mean ----------------------------------------------------------------------------------------

_SWIGLUOAI = {"limit": 7.0, "alpha": 1.702, "beta": 1.0}


def member_of(
    activation: str,
    *,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    situ_beta: float | None = None,
    situ_linear_beta: float | None = None,
) -> MoEActivation:
    """The activation that vLLM's of this value computes, given what its model sets of the parameters.

    vLLM clamps SILU, and gives three parameters to SWIGLUOAI_UNINTERLEAVE (``(up + beta)`` for the third) and two to
    SITU; its other activations have fixed ones.

    Args:
        activation: the value of a member of vLLM's ``MoEActivation``: ``"gelu"`` is erf, ``"gelu_tanh"`` is tanh.
        limit, alpha, beta: ``swiglu_limit`` and so on; None: not set.
        situ_beta, situ_linear_beta: ``activation_situ_beta`` and ``activation_situ_linear_beta``.

    Raises:
        ValueError: cupymoe has no such activation, or not with these parameters.
    """
    member = MoEActivation.from_str(activation)
    if member is MoEActivation.RELU2:
        raise ValueError("vLLM has relu2 only without a gate")
    if member is MoEActivation.SILU and limit is not None:
        return member.with_parameters(limit=limit)
    if member is MoEActivation.SWIGLUOAI:
        given = {"limit": limit, "alpha": alpha, "beta": beta}
        others = {name: value for name, value in given.items() if value not in (None, _SWIGLUOAI[name])}
        if others:
            raise ValueError(f"vLLM computes swigluoai with {_SWIGLUOAI} alone, and the model sets {others}")
    if member is MoEActivation.SWIGLUOAI_UNINTERLEAVE:
        if limit is None:
            raise ValueError("swigluoai_uninterleave needs a swiglu_limit")
        functions = {0.0: MoEActivation.SILU, 1.0: member}
        if (beta or 0.0) not in functions:
            raise ValueError(f"swigluoai_uninterleave is served with a beta of 0 or 1, got {beta}")
        return functions[beta or 0.0].with_parameters(limit=limit, alpha=1.0 if alpha is None else alpha)
    if member is MoEActivation.SITU:
        if situ_beta is None:
            raise ValueError("situ needs an activation_situ_beta")
        if situ_linear_beta is None or situ_linear_beta <= 0:  # vLLM's marks for "up as it is"
            return member.with_parameters(beta=situ_beta)
        return member.with_parameters(beta=situ_beta, linear_beta=situ_linear_beta)
    return member


def _member(moe: Any, quant_config: Any = None) -> MoEActivation:
    """The activation of a layer; what its ``quant_config`` sets goes before what its config does, as in vLLM."""

    def setting(name: str) -> Any:
        known = None if quant_config is None else getattr(quant_config, f"gemm1_{name}")
        return getattr(moe, f"swiglu_{name.removeprefix('clamp_')}", None) if known is None else known

    return member_of(
        moe.activation.value,
        limit=setting("clamp_limit"),
        alpha=setting("alpha"),
        beta=setting("beta"),
        # Not in all versions.
        situ_beta=getattr(moe, "activation_situ_beta", None),
        situ_linear_beta=getattr(moe, "activation_situ_linear_beta", None),
    )


def _sizes(moe: Any) -> tuple[int, int, int, int]:
    """Experts here, experts of a token, hidden size, and intermediate size here, where tensor parallelism cuts it."""
    return moe.num_local_experts, moe.experts_per_token, moe.hidden_dim, moe.intermediate_size_per_partition


def _numerics() -> str:
    """What vLLM's own setting asks of the bits of an output."""
    from vllm import envs

    return INVARIANT if envs.VLLM_BATCH_INVARIANT else "fast"


def slow_reason(moe: Any, activation: MoEActivation, numerics: str) -> str | None:
    """Why none of the fast backends serves a layer, of few tokens or of many; None if one does."""
    num_experts, top_k, hidden_size, intermediate_size = _sizes(moe)
    for num_tokens in (1, 8192):
        call = ExpertsCall(
            torch.device(moe.device),
            moe.in_dtype,
            activation,
            num_tokens,
            top_k,
            num_experts,
            hidden_size,
            intermediate_size,
            aligned_hidden_states=True,
            aligned_weights=True,
            has_bias=moe.has_bias,
            numerics=numerics,
        )
        if serving(call).is_slow:
            fast = [backend for backend in registry().values() if not backend.is_slow]
            reasons = {f"{backend.name}: {backend.unsupported_reason(call)}" for backend in fast}
            return f"only a slow backend serves {num_tokens} tokens ({'; '.join(sorted(reasons))})"
    return None


def refusal(moe: Any, experts: type[Any]) -> str | None:
    """Why cupymoe doesn't compute a layer; None if it does.

    Args:
        moe: vLLM's ``FusedMoEConfig``.
        experts: the class that would compute it.
    """
    if moe.moe_backend != "auto":
        return f"moe_backend is {moe.moe_backend!r}, not 'auto'"
    if moe.moe_parallel_config.use_batched_activation_format and moe.has_bias:
        return "the batched activation format is served without biases"
    try:
        activation = _member(moe)
    except ValueError as error:
        return str(error)
    if reason := slow_reason(moe, activation, _numerics()):
        return reason
    is_served, reason = experts.is_supported_config(experts, moe, None, None, experts.activation_format())
    return None if is_served else reason


# --- vLLM's classes ---------------------------------------------------------------------------------------------------


@functools.cache
def experts_classes() -> tuple[type[Any], type[Any]]:
    """Two classes of vLLM's ``FusedMoEExpertsModular``: of tokens as they come, and of tokens in rows by expert."""
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
        TopKWeightAndReduceDelegate,
        TopKWeightAndReduceNoOP,
    )

    class Experts(modular_kernel.FusedMoEExpertsModular):  # type: ignore[misc]
        """What both have in common."""

        def __init__(self, moe_config: Any, quant_config: Any, **settings: Any) -> None:
            super().__init__(moe_config, quant_config, **settings)
            try:
                self.member = _member(moe_config, quant_config)
            except ValueError as error:
                raise ValueError(f"cupymoe can't compute this layer: {error}; set {ENVIRONMENT}=0") from None
            self.numerics = _numerics()

        @staticmethod
        def _supports_current_device() -> bool:
            return True  # that and the sizes is for slow_reason to say

        @staticmethod
        def _supports_no_act_and_mul() -> bool:
            return True

        @staticmethod
        def _supports_activation(activation: Any) -> bool:
            return activation.value in [member.value for member in MoEActivation]

        @staticmethod
        def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
            return weight_key is None and activation_key is None

        @staticmethod
        def _supports_parallel_config(moe_parallel_config: Any) -> bool:
            # MoonEP keeps gate and up apart; FlashInfer's exchanges hand over what only their own kernels read.
            names = ("use_moonep_kernels", "use_fi_nvl_two_sided_kernels", "use_fi_nvl_one_sided_kernels")
            return not any(getattr(moe_parallel_config, name, False) for name in names)

        def supports_expert_map(self) -> bool:
            return True

    class CupymoeExperts(Experts):
        """``[T, H]`` to ``[T, H]``: weighted and summed."""

        @staticmethod
        def activation_format() -> Any:
            return modular_kernel.FusedMoEActivationFormat.Standard

        @staticmethod
        def _supports_batch_invariance() -> bool:
            return True

        def finalize_weight_and_reduce_impl(self) -> Any:
            return TopKWeightAndReduceNoOP()

        def workspace_shapes(self, M: int, N: int, K: int, *others: Any) -> tuple[tuple[int, ...], ...]:
            return (0,), (0,), (M, K)

        def apply(
            self,
            output: torch.Tensor,
            hidden_states: torch.Tensor,
            w1: torch.Tensor,
            w2: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: torch.Tensor | None,
            a1q_scale: torch.Tensor | None,
            a2_scale: torch.Tensor | None,
            workspace13: torch.Tensor,
            workspace2: torch.Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> None:
            if apply_router_weight_on_input:  # which vLLM has done
                topk_weights = torch.ones_like(topk_weights)
            fused_experts(
                hidden_states,
                w1,
                w2,
                topk_ids,
                topk_weights,
                out=output,
                activation=self.member,
                gate_up_bias=self.w1_bias,
                down_bias=self.w2_bias,
                expert_map=expert_map,
                global_num_experts=None if expert_map is None else global_num_experts,
                numerics=self.numerics,
            )

    class CupymoeBatchedExperts(Experts):
        """``[E, max_tokens, H]`` to the same, not weighted: whoever sent the tokens sums."""

        @staticmethod
        def activation_format() -> Any:
            return modular_kernel.FusedMoEActivationFormat.BatchedExperts

        @staticmethod
        def _supports_batch_invariance() -> bool:
            return False

        def finalize_weight_and_reduce_impl(self) -> Any:
            return TopKWeightAndReduceDelegate()

        def workspace_shapes(
            self, M: int, N: int, K: int, topk: int, global_num_experts: int, local_num_experts: int, *others: Any
        ) -> tuple[tuple[int, ...], ...]:
            return (0,), (0,), (local_num_experts, self.max_num_tokens * self.num_dispatchers, K)

        def apply(
            self,
            output: torch.Tensor,
            hidden_states: torch.Tensor,
            w1: torch.Tensor,
            w2: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: torch.Tensor | None,
            a1q_scale: torch.Tensor | None,
            a2_scale: torch.Tensor | None,
            workspace13: torch.Tensor,
            workspace2: torch.Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> None:
            counts = expert_tokens_meta.expert_num_tokens[: w1.shape[0]]  # vLLM's own exchange has those of all experts
            batched_experts(hidden_states, counts, w1, w2, activation=self.member, out=output)

    return CupymoeExperts, CupymoeBatchedExperts


@functools.cache
def method_class() -> type[Any]:
    """The class that takes the place of vLLM's ``UnquantizedFusedMoEMethod``."""
    from vllm.config import get_current_vllm_config
    from vllm.logger import init_logger
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    logger = init_logger(LOGGER)
    said: set[str] = set()
    standard, batched = experts_classes()

    class CupymoeMoEMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
        """vLLM's method, with cupymoe's experts wherever they serve the layer."""

        def __init__(self, moe: Any) -> None:
            experts = batched if moe.moe_parallel_config.use_batched_activation_format else standard
            reason = refusal(moe, experts)
            if reason is None:
                super(UnquantizedFusedMoEMethod, self).__init__(moe)  # whose own would choose a backend of vLLM's
                # Triton's reads the weights as they are loaded, and so do we.
                self.unquantized_backend, self.experts_cls = UnquantizedMoeBackend.TRITON, experts
                self.supports_pre_processed_weights = True
            else:
                super().__init__(moe)
            self.cupymoe_refusal = reason
            self.cupymoe_captured = _captured(moe, get_current_vllm_config())

        def create_weights(self, layer: Any, *arguments: Any, **settings: Any) -> None:
            super().create_weights(layer, *arguments, **settings)
            message = _described(self.moe, self.cupymoe_refusal)
            if message not in said:
                said.add(message)
                logger.info("%s, and every layer like it: %s", getattr(layer, "layer_name", "a layer"), message)

        def process_weights_after_loading(self, layer: Any) -> None:
            super().process_weights_after_loading(layer)
            if self.cupymoe_refusal is None and layer.w13_weight.is_cuda:
                _warm(self, layer)

    return CupymoeMoEMethod


def _described(moe: Any, reason: str | None) -> str:
    num_experts, _, hidden_size, intermediate_size = _sizes(moe)
    here = f"{num_experts} of {moe.num_experts} experts, {hidden_size} to {intermediate_size}, {moe.activation.value}"
    taken = "cupymoe computes" if reason is None else "cupymoe does not compute"
    return f"{taken} {here}, {moe.in_dtype}" + ("" if reason is None else f": {reason}")


# --- calls ------------------------------------------------------------------------------------------------------------


def _captured(moe: Any, config: Any) -> list[int]:
    """The numbers of tokens of the CUDA graphs that vLLM will capture."""
    captured = config.compilation_config.cudagraph_capture_sizes or ()
    # Where ranks gather each other's tokens, a call has those of all.
    return sorted({count * ranks for count in captured for ranks in (1, moe.dp_size)})


@functools.cache
def _warmed() -> set[Any]:
    """Kinds of layers whose kernels are there."""
    return set()


def _warm(method: Any, layer: Any) -> None:
    """Compile and load what the layer will use, by calls without a token for any expert: no capture may compile.

    As :func:`cupymoe.warmup`, but for vLLM's ids, numbers of tokens, and experts that are spread over ranks.
    """
    moe, experts = method.moe, method.moe_kernel.fused_experts
    w13, w2 = layer.w13_weight, layer.w2_weight
    sizes = w13.shape, w2.shape, moe.num_experts, moe.experts_per_token
    kind = (type(experts), *sizes, w13.dtype, w13.device, experts.member, moe.has_bias)
    if kind in _warmed():
        return
    _warmed().add(kind)
    with torch.inference_mode():
        for hidden_states, ids, counts in _empty_calls(method, experts, w2):
            nothing = hidden_states.new_empty(0)
            experts.apply(
                torch.empty_like(hidden_states),
                hidden_states,
                w13,
                w2,
                torch.zeros(ids.shape, device=w2.device),
                ids,
                moe.activation,
                moe.num_experts,
                layer.expert_map,
                None,
                None,
                nothing,
                nothing,
                counts,
                False,
            )


def _empty_calls(method: Any, experts: Any, w2: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, Any]]:
    """Hidden states, ids and numbers of tokens by expert of calls like those to come, in which no expert has one."""
    num_experts, hidden_size, intermediate_size = w2.shape
    top_k = method.moe.experts_per_token
    new_ids = functools.partial(torch.full, fill_value=-1, dtype=method.topk_indices_dtype or torch.int32)
    if isinstance(experts, experts_classes()[1]):
        rows = experts.max_num_tokens * experts.num_dispatchers
        counts = torch.zeros(num_experts, dtype=torch.int32, device=w2.device)
        hidden_states = w2.new_zeros(num_experts, rows, hidden_size)
        yield hidden_states, new_ids((0, top_k), device=w2.device), SimpleNamespace(expert_num_tokens=counts)
        return
    ways = one_of_each_way(
        num_experts,
        top_k,
        hidden_size,
        intermediate_size,
        arch=_arch(w2.device),
        numerics=experts.numerics,
        global_num_experts=method.moe.num_experts,
    )
    in_steps = [count for count in ways if count <= method.moe.max_num_tokens]
    for count in sorted({*method.cupymoe_captured, *in_steps}):
        yield w2.new_zeros(count, hidden_size), new_ids((count, top_k), device=w2.device), None


def _arch(device: torch.device) -> Arch:
    return Arch.of(device) if device.type == "cuda" else HOPPER
