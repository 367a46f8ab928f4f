"""Gemma 4's router and experts as torch modules: transformers' parameter names, calls and results."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from cupymoe import ops, reference
from cupymoe.backends import check_name
from cupymoe.config import Gemma4MoEConfig
from cupymoe.functional import fused_experts, route


def _autocasts(device_type: str) -> bool:
    # The meta device has no autocast: torch.is_autocast_enabled raises there. torch.amp.is_autocast_available would
    # tell, but torch.compile of torch 2.11 can't trace it.
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def hooks_of(module: nn.Module) -> list[str]:
    """Which kinds of hooks a module has."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return [kind for kind in kinds if getattr(module, kind)]


class Gemma4Router(nn.Module):
    """Which experts a token goes to; call-compatible with transformers' ``Gemma4TextRouter``.

    The projection input is rounded where transformers rounds it, so that the logits are the same bits; up to 32 tokens
    on CUDA, but for the order of their sums.

    Parameters: ``proj.weight`` [E, H], ``scale`` [H], ``per_expert_scale`` [E].
    """

    def __init__(self, config: Gemma4MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    @classmethod
    def from_transformers(cls, router: Any) -> Gemma4Router:
        """A router that shares a ``Gemma4TextRouter``'s parameters and ``proj``, adapters and all; nothing is copied.

        Raises:
            ValueError: the router has hooks, which nothing would call any more.
        """
        # transformers' own are those of an earlier call that asked for hidden states, and of its own classes alone.
        own = "transformers.utils.output_capturing"
        hooks = [
            kind
            for kind in hooks_of(router)
            if any(getattr(hook, "__module__", None) != own for hook in getattr(router, kind).values())
        ]
        if hooks:
            raise ValueError(
                f"router must have no hooks, which would be lost, got {', '.join(hooks)} of {type(router).__name__}: "
                "register them on what takes its place"
            )
        with torch.device("meta"):
            ours = cls(Gemma4MoEConfig.from_transformers(router.config))
        ours.proj, ours.scale, ours.per_expert_scale = router.proj, router.scale, router.per_expert_scale
        ours.training = router.training
        return ours

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Router logits ``[..., E]`` of ``[..., H]``: RMSNorm without a weight, times ``scale * H^-0.5``, projected.

        Raises:
            ValueError: a parameter is on another device.
        """
        eps, size = self.config.rms_norm_eps, self.config.hidden_size
        scale = self.scale
        self._check_device("scale", scale, hidden_states)
        if self._is_plain(hidden_states):
            projection = self.proj.weight
            self._check_device("proj.weight", projection, hidden_states)
            flat = hidden_states.reshape(-1, size)
            logits = ops.dispatch(torch.ops.cupymoe.router_logits.default, flat, scale, projection, eps)
            logits = logits.reshape(*hidden_states.shape[:-1], self.config.num_experts)
        else:
            logits = self.proj(reference.router_input(hidden_states, scale, eps))
        return cast(torch.Tensor, logits)

    def _is_plain(self, hidden_states: torch.Tensor) -> bool:
        """Whether ``proj`` is a product with its weight and nothing else: no adapter, bias or hook, no autocast."""
        proj = self.proj
        return (
            type(proj) is nn.Linear
            and not (hooks_of(proj) or "forward" in vars(proj))
            and hidden_states.dtype == self.scale.dtype == proj.weight.dtype
            and hidden_states.shape[-1] == self.config.hidden_size
            and not _autocasts(hidden_states.device.type)
            and proj.bias is None
        )

    @staticmethod
    def _check_device(name: str, parameter: torch.Tensor, hidden_states: torch.Tensor) -> None:
        # A kernel is handed addresses, and would read a host's.
        if parameter.device != hidden_states.device:
            raise ValueError(f"{name} must be on hidden_states's device {hidden_states.device}, got {parameter.device}")

    def route(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(top_k_weights, top_k_index)``, ``[T, K]`` float32 and int64, of ``hidden_states`` ``[T, H]``."""
        return self._route(self.logits(hidden_states))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(router_probabilities, top_k_weights, top_k_index)`` of ``hidden_states`` ``[T, H]``.

        ``router_probabilities`` is the float32 softmax over all experts, ``[T, E]``; the rest is as of
        :func:`cupymoe.route`.
        """
        logits = self.logits(hidden_states)
        return torch.softmax(logits, dim=-1, dtype=torch.float32), *self._route(logits)

    def _route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return route(logits, self.config.top_k_experts, per_expert_scale=self.per_expert_scale)


class Gemma4Experts(nn.Module):
    """The experts; call-compatible with transformers' ``Gemma4TextExperts``.

    Parameters: ``gate_up_proj`` [E, 2I, H], ``down_proj`` [E, H, I], uninitialised as in transformers.

    Args:
        config: sizes and activation.
        backend: who computes; see :func:`cupymoe.fused_experts`.

    Raises:
        ValueError: there is no such backend.
    """

    def __init__(self, config: Gemma4MoEConfig, backend: str = "auto") -> None:
        super().__init__()
        check_name(backend)
        self.config = config
        self.backend = backend
        self.activation = config.activation
        self.gate_up_proj = nn.Parameter(
            torch.empty(
                config.num_experts,
                self.activation.input_size(config.moe_intermediate_size),
                config.hidden_size,
            )
        )
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.moe_intermediate_size))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``[T, H]`` from ``hidden_states`` [T, H], ``top_k_index`` and ``top_k_weights`` [T, K]."""
        return fused_experts(
            hidden_states,
            self.gate_up_proj,
            self.down_proj,
            top_k_index,
            top_k_weights,
            activation=self.activation,
            backend=self.backend,
        )


class Gemma4MoE(nn.Module):
    """Router and experts together.

    Parameters: ``router.*`` and ``experts.*`` as above; these are the keys of a Gemma 4 decoder layer's state_dict, and
    :meth:`load_decoder_layer` takes them out of one.
    """

    def __init__(self, config: Gemma4MoEConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.router = Gemma4Router(config)
        self.experts = Gemma4Experts(config, backend)

    @classmethod
    def from_transformers(cls, decoder_layer: Any, backend: str = "auto") -> Gemma4MoE:
        """A module that shares the parameters of a ``Gemma4TextDecoderLayer`` with experts; nothing is copied.

        Raises:
            ValueError: the layer has no mixture of experts, or an activation that no member means; or its router has
                hooks.
        """
        router, experts = getattr(decoder_layer, "router", None), getattr(decoder_layer, "experts", None)
        if router is None or experts is None:
            raise ValueError(
                "decoder_layer must have .router and .experts (enable_moe_block=True), "
                f"got {type(decoder_layer).__name__}"
            )
        with torch.device("meta"):
            module = cls(Gemma4MoEConfig.from_transformers(router.config), backend)
        module.router = Gemma4Router.from_transformers(router)
        module.experts.gate_up_proj = experts.gate_up_proj
        module.experts.down_proj = experts.down_proj
        # Not train(), which would reach into what is shared.
        module.training = module.experts.training = decoder_layer.training
        return module

    def load_decoder_layer(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Copy the parameters from a whole decoder layer's state_dict; its other keys are not ours and are left alone.

        Raises:
            RuntimeError: a ``router.*`` or ``experts.*`` key is missing, left over or of the wrong shape.
        """
        ours = {key: value for key, value in state_dict.items() if key.startswith(("router.", "experts."))}
        self.load_state_dict(ours, strict=True)

    def forward(self, hidden_states: torch.Tensor, router_hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """Mixture output, the shape of ``hidden_states``.

        Args:
            hidden_states: ``[..., H]``, what the experts see: in Gemma 4 the normalised residual.
            router_hidden_states: ``[..., H]``, what the router sees: in Gemma 4 the residual itself. None: the same.
        """
        if router_hidden_states is None:
            router_hidden_states = hidden_states
        if router_hidden_states.shape != hidden_states.shape:
            raise ValueError(
                f"router_hidden_states must have hidden_states' shape {list(hidden_states.shape)}, "
                f"got {list(router_hidden_states.shape)}"
            )
        size = self.config.hidden_size
        if hidden_states.shape[-1] != size:
            raise ValueError(f"hidden_states must have {size} columns, got shape {list(hidden_states.shape)}")
        weights, index = self.router.route(router_hidden_states.reshape(-1, size))
        output: torch.Tensor = self.experts(hidden_states.reshape(-1, size), index, weights)
        return output.reshape(hidden_states.shape)
