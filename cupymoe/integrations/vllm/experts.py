"""Two classes of vLLM's ``FusedMoEExpertsModular``, for plain and for quantised weights.

vLLM's kernel around them hands on what the method gives it as weights and reads no more than their shape, so a
:class:`cupymoe.QuantizedWeight` passes through it where a tensor does. vLLM calls ``apply`` by the names of its
arguments, of which each class takes those that it reads.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)

from cupymoe.activation import MoEActivation
from cupymoe.functional import batched_experts, fused_experts
from cupymoe.integrations.vllm.activations import activation_of
from cupymoe.integrations.vllm.served import ENVIRONMENT, numerics
from cupymoe.weights.quantized import Weight


class Experts(modular_kernel.FusedMoEExpertsModular):  # type: ignore[misc]
    """What both have in common."""

    def __init__(self, moe_config: Any, quant_config: Any, **settings: Any) -> None:
        super().__init__(moe_config, quant_config, **settings)
        try:
            self.member = activation_of(moe_config, quant_config)
        except ValueError as error:
            raise ValueError(f"cupymoe can't compute this layer: {error}; set {ENVIRONMENT}=0") from None
        self.numerics = numerics()

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
        return weight_key is None and activation_key is None  # of quantised weights, .stored knows more than a key says

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        # MoonEP keeps gate and up apart; FlashInfer's exchanges hand over what only their own kernels read.
        names = ("use_moonep_kernels", "use_fi_nvl_two_sided_kernels", "use_fi_nvl_one_sided_kernels")
        return not any(getattr(moe_parallel_config, name, False) for name in names)

    def supports_expert_map(self) -> bool:
        """Ids may be those of all experts."""
        return True


class CupymoeExperts(Experts):
    """``[T, H]`` to ``[T, H]``: weighted and summed."""

    @staticmethod
    def activation_format() -> Any:
        """Tokens as they come."""
        return modular_kernel.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> Any:
        """Nothing is left to do."""
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, M: int, N: int, K: int, *others: Any) -> tuple[tuple[int, ...], ...]:
        """No workspace of vLLM's is used."""
        return (0,), (0,), (M, K)

    def apply(
        self,
        *,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: Weight,
        w2: Weight,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        **others: Any,
    ) -> None:
        """Write the experts' sum into ``output``."""
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
        """Tokens in rows by expert."""
        return modular_kernel.FusedMoEActivationFormat.BatchedExperts

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return False

    def finalize_weight_and_reduce_impl(self) -> Any:
        """The exchange weights and sums."""
        return TopKWeightAndReduceDelegate()

    def workspace_shapes(
        self, M: int, N: int, K: int, topk: int, global_num_experts: int, local_num_experts: int, *others: Any
    ) -> tuple[tuple[int, ...], ...]:
        """No workspace of vLLM's is used."""
        return (0,), (0,), (local_num_experts, self.max_num_tokens * self.num_dispatchers, K)

    def apply(
        self,
        *,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: Weight,
        w2: Weight,
        expert_tokens_meta: Any,
        **others: Any,
    ) -> None:
        """Write each expert's outputs into its rows of ``output``."""
        counts = expert_tokens_meta.expert_num_tokens[: w1.shape[0]]  # vLLM's own exchange has those of all experts
        batched_experts(hidden_states, counts, w1, w2, activation=self.member, out=output)


def experts_class(moe: Any) -> type[Experts]:
    """The one of the format in which a layer's tokens are exchanged."""
    return CupymoeBatchedExperts if moe.moe_parallel_config.use_batched_activation_format else CupymoeExperts
