"""Gemma 4's router and experts as torch modules: transformers' parameter names, calls and results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from cupymoe import ops, reference
from cupymoe.backends import INVARIANT
from cupymoe.checks.settings import check_numerics
from cupymoe.config import Gemma4MoEConfig
from cupymoe.customisation import as_written, has_hooks, is_wrapper, path_of, runs_as
from cupymoe.experts import MoEExperts
from cupymoe.functional import route
from cupymoe.parameters import check_plain, check_writable
from cupymoe.weights.quantized import QuantizedWeight

_LINEAR_FORWARD = as_written("torch", nn.Linear, "forward")["forward"]


def _autocasts(device_type: str) -> bool:
    # The meta device has no autocast: torch.is_autocast_enabled raises there. torch.amp.is_autocast_available would
    # tell, but torch.compile of torch 2.11 can't trace it.
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def _check_hidden_states(name: str, hidden_states: torch.Tensor, size: int) -> None:
    if not isinstance(hidden_states, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(hidden_states).__name__}")
    if not hidden_states.dtype.is_floating_point or hidden_states.dtype.itemsize == 1:
        raise TypeError(f"{name} must be a floating-point tensor of at least 16 bits, got {hidden_states.dtype}")
    if hidden_states.shape[-1:] != (size,):
        raise ValueError(f"{name} must have {size} columns, got shape {list(hidden_states.shape)}")


def _check_state(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """All of ``given`` can be copied into what ``expected`` has under the same keys; nothing is written.

    Raises:
        RuntimeError, TypeError, ValueError: as :meth:`Gemma4MoE.load_decoder_layer` says.
    """
    for key, parameter in expected.items():
        check_writable(key, parameter)
    complaints = [f"Missing key {key}" for key in expected if key not in given]
    complaints += [f"Unexpected key {key}" for key in given if key not in expected]
    if not complaints:
        for key, tensor in given.items():
            check_plain(key, tensor)
        complaints = [
            f"size mismatch for {key}: must have shape {[*expected[key].shape]}, got {[*tensor.shape]}"
            for key, tensor in given.items()
            if tensor.shape != expected[key].shape
        ]
    if complaints:
        raise RuntimeError(f"state_dict must have exactly the layer's router and experts: {'; '.join(complaints)}")


class Gemma4Router(nn.Module):
    """Which experts a token goes to; call-compatible with transformers' ``Gemma4TextRouter``.

    The projection input is rounded where transformers rounds it, so that the logits are the same bits; up to 32 tokens
    on CUDA, but for the order of their sums.

    Parameters: ``proj.weight`` [E, H], ``scale`` [H], ``per_expert_scale`` [E].

    Args:
        config: sizes.
        numerics: ``"fast"``; or ``"invariant"``: the bits of a token's logits, weights and choices depend on its hidden
            state and the parameters alone, and not on how many other tokens there are (docs/invariance.md). On CUDA the
            logits are then those of few tokens, for any number of them.

    Raises:
        ValueError: ``numerics`` is neither.
    """

    def __init__(self, config: Gemma4MoEConfig, *, numerics: str = "fast") -> None:
        super().__init__()
        check_numerics(numerics)
        self.config = config
        self.numerics = numerics
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    @classmethod
    def from_transformers(cls, router: Any, *, numerics: str = "fast") -> Gemma4Router:
        """A router that shares a ``Gemma4TextRouter``'s parameters and ``proj``, adapters and all; nothing is copied.

        ``numerics`` is as of this class.

        Raises:
            AttributeError: the router has no config, or one that lacks a size.
            ValueError: the router computes more than its parameters say: it or its ``norm`` has hooks, a forward of its
                own or parametrizations; or its parameters are no plain tensors.
        """
        from cupymoe.integrations.gemma4 import router_config

        return cls._sharing(router, router_config("router", router), numerics)

    @classmethod
    def _sharing(cls, router: Any, config: Gemma4MoEConfig, numerics: str) -> Gemma4Router:
        with torch.device("meta"):
            ours = cls(config, numerics=numerics)
        ours.proj, ours.scale, ours.per_expert_scale = router.proj, router.scale, router.per_expert_scale
        ours.training = router.training
        return ours

    @property
    def _eps(self) -> float:
        return self.config.rms_norm_eps

    def _router_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return reference.router_input(hidden_states, self.scale, self._eps)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Router logits ``[..., E]`` of ``[..., H]``: RMSNorm without a weight, times ``scale * H^-0.5``, projected.

        In the dtype of ``hidden_states`` where the parameters have it too; else in that of ``proj``'s output.

        Raises:
            TypeError: ``hidden_states`` is no floating-point tensor, or of a dtype that ``proj`` can't multiply.
            ValueError: it does not have H columns, or a parameter is on another device.
        """
        scale = self.scale
        size = scale.shape[0]
        _check_hidden_states("hidden_states", hidden_states, size)
        self._check_device("scale", scale, hidden_states)
        if self._is_plain(hidden_states):
            projection = self.proj.weight
            self._check_device("proj.weight", projection, hidden_states)
            flat = hidden_states.reshape(-1, size)
            settings = self._eps, self.numerics
            logits = ops.dispatch(torch.ops.cupymoe.router_logits.default, flat, scale, projection, *settings)
            logits = logits.reshape(*hidden_states.shape[:-1], projection.shape[0])
        elif self.numerics == INVARIANT:
            raise ValueError(
                f"{path_of(self)}: numerics='invariant' needs logits that are one product of hidden states with "
                "proj.weight, in its dtype: no adapter, hook or bias of proj, no autocast, no norm but the router's own"
            )
        else:
            states = self._router_input(hidden_states)
            if self._is_linear(hidden_states) and states.dtype != self.proj.weight.dtype:
                raise TypeError(
                    f"hidden_states must have proj.weight's dtype {self.proj.weight.dtype}, got {hidden_states.dtype} "
                    f"and scale in {scale.dtype}"
                )
            logits = self.proj(states)
        return cast(torch.Tensor, logits)

    def _is_linear(self, hidden_states: torch.Tensor) -> bool:
        """Whether ``proj`` is torch's and nothing else: no adapter or hook, no autocast."""
        proj = self.proj
        return (
            type(proj) is nn.Linear
            and nn.Linear.forward is _LINEAR_FORWARD
            and not (has_hooks(proj) or "forward" in vars(proj))
            and not _autocasts(hidden_states.device.type)
        )

    def _is_plain(self, hidden_states: torch.Tensor) -> bool:
        """Whether the logits are one product with ``proj``'s weight, all in one dtype."""
        return (
            self._is_linear(hidden_states)
            and hidden_states.dtype == self.scale.dtype == self.proj.weight.dtype
            and not (is_wrapper(type(self.scale)) or is_wrapper(type(self.proj.weight)))
            and self.proj.bias is None
        )

    @staticmethod
    def _check_device(name: str, parameter: torch.Tensor, hidden_states: torch.Tensor) -> None:
        # A kernel is handed addresses, and would read a host's.
        if parameter.device != hidden_states.device:
            raise ValueError(f"{name} must be on hidden_states's device {hidden_states.device}, got {parameter.device}")

    def route(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(top_k_weights, top_k_index)``, ``[T, K]`` float32 and int64, of ``hidden_states`` ``[T, H]``.

        Raises:
            TypeError, ValueError: as of :meth:`logits`; or ``hidden_states`` has another number of dimensions.
        """
        return self._route(self._logits_of_tokens(hidden_states))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(router_probabilities, top_k_weights, top_k_index)`` of ``hidden_states`` ``[T, H]``.

        ``router_probabilities`` is the float32 softmax over all experts, ``[T, E]``; the rest is as of
        :func:`cupymoe.route`. Errors are as of :meth:`route`.
        """
        logits = self._logits_of_tokens(hidden_states)
        return torch.softmax(logits, dim=-1, dtype=torch.float32), *self._route(logits)

    def _logits_of_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if isinstance(hidden_states, torch.Tensor) and hidden_states.dim() != 2:
            raise ValueError(
                f"hidden_states must have shape [*, {self.scale.shape[0]}], got {list(hidden_states.shape)}"
            )
        return self.logits(hidden_states)

    def _route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top_k, scale = self.config.top_k_experts, self.per_expert_scale
        return route(logits, top_k, per_expert_scale=scale, numerics=self.numerics)


_ROUTER_METHODS = as_written("cupymoe", Gemma4Router, "forward")


class Gemma4Experts(MoEExperts):
    """Gemma 4's experts; call-compatible with transformers' ``Gemma4TextExperts``.

    Parameters: ``gate_up_proj`` [E, 2I, H], ``down_proj`` [E, H, I], uninitialised as in transformers.

    Args:
        config: sizes and activation.
        backend: who computes; see :func:`cupymoe.fused_experts`.
        keep: what a call keeps for its gradients; see :func:`cupymoe.fused_experts`.
        numerics: ``"fast"``, or ``"invariant"``: the same bits for a token in every call; see
            :func:`cupymoe.fused_experts`.

    Raises:
        ValueError: there is no such backend, ``keep`` is neither ``"gate_up"`` nor ``"input"``, or ``numerics`` neither
            ``"fast"`` nor ``"invariant"``.
    """

    _ungated_name = "gate_up_proj"  # [E, I, H]: Gemma 4's names do not depend on the activation

    def __init__(
        self, config: Gemma4MoEConfig, backend: str = "auto", *, keep: str = "gate_up", numerics: str = "fast"
    ) -> None:
        super().__init__(
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            config.activation,
            top_k=config.top_k_experts,
            backend=backend,
            keep=keep,
            numerics=numerics,
        )
        self.config = config


class Gemma4MoE(nn.Module):
    """Router and experts together.

    Parameters: ``router.*`` and ``experts.*`` as above; these are the keys of a Gemma 4 decoder layer's state_dict, and
    :meth:`load_decoder_layer` takes them out of one. Arguments and errors are as of :class:`Gemma4Experts`; with
    ``numerics="invariant"`` a token's choice of experts has the same bits in every call, too.
    """

    def __init__(
        self, config: Gemma4MoEConfig, backend: str = "auto", *, keep: str = "gate_up", numerics: str = "fast"
    ) -> None:
        super().__init__()
        self.config = config
        self.router = Gemma4Router(config, numerics=numerics)
        self.experts = Gemma4Experts(config, backend, keep=keep, numerics=numerics)

    @classmethod
    def from_transformers(
        cls, decoder_layer: Any, backend: str = "auto", *, keep: str = "gate_up", numerics: str = "fast"
    ) -> Gemma4MoE:
        """A module that shares the parameters of a ``Gemma4TextDecoderLayer`` with experts; nothing is copied.

        The activation is the experts' own ``act_fn``, the sizes are those of the parameters. ``backend``, ``keep`` and
        ``numerics`` are as of this class.

        Raises:
            ValueError: the layer has no mixture of experts, or an activation that no member means; its router or its
                experts compute more than their parameters say (hooks, a forward of their own, parametrizations,
                adapters around them), which would be lost; their parameters are no plain tensors, shards say; or router
                and experts are of different numbers of experts.
            AttributeError: its config lacks a size.
        """
        router, experts = getattr(decoder_layer, "router", None), getattr(decoder_layer, "experts", None)
        if router is None or experts is None:
            raise ValueError(
                "decoder_layer must have .router and .experts (enable_moe_block=True), "
                f"got {type(decoder_layer).__name__}"
            )
        for name in ("gate_up_proj", "down_proj"):
            if not isinstance(getattr(experts, name, None), nn.Parameter | QuantizedWeight):
                raise ValueError(f"decoder_layer.experts must hold the parameter {name}, got {type(experts).__name__}")
        from cupymoe.integrations.gemma4 import experts_activation, router_config

        config = router_config("decoder_layer.router", router)
        activation = experts_activation("decoder_layer.experts", experts)
        if experts.down_proj.shape[0] != config.num_experts:
            raise ValueError(
                f"decoder_layer.experts must hold the {config.num_experts} experts that its router chooses from, got "
                f"{experts.down_proj.shape[0]}"
            )
        if activation is not config.activation:
            config = replace(config, hidden_activation=activation.value)
        with torch.device("meta"):
            module = cls(config, backend, keep=keep, numerics=numerics)
        module.router = Gemma4Router._sharing(router, config, numerics)
        module.experts.gate_up_proj = experts.gate_up_proj
        module.experts.down_proj = experts.down_proj
        # Not train(), which would reach into what is shared.
        module.training = module.experts.training = decoder_layer.training
        return module

    def load_decoder_layer(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy the parameters from a whole decoder layer's state_dict; its other keys are not ours and are left alone.

        They keep their device and dtype. Nothing is written unless everything can be.

        Raises:
            RuntimeError: a ``router.*`` or ``experts.*`` key is missing, left over or of the wrong shape.
            ValueError: a parameter or a tensor of such a key is on the meta device.
            TypeError: ``state_dict`` is no mapping, or one of these is not plain memory (a DTensor, a quantised tensor
                of torchao, a sparse one), or its dtype is none of bfloat16, float16, float32 and float64.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must map keys to tensors, got {type(state_dict).__name__}")
        ours = {key: value for key, value in state_dict.items() if key.startswith(("router.", "experts."))}
        parameters = dict(self.named_parameters(remove_duplicate=False))  # a hook may have state_dict give copies
        _check_state(parameters, ours)
        with torch.no_grad():
            for key, tensor in ours.items():
                parameters[key].copy_(tensor)

    def forward(self, hidden_states: torch.Tensor, router_hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """Mixture output, shape and dtype of ``hidden_states``.

        Args:
            hidden_states: ``[..., H]``, what the experts see: in Gemma 4 the normalised residual. In the dtype of the
                parameters, on their device.
            router_hidden_states: ``[..., H]``, what the router sees: in Gemma 4 the residual itself. None: the same.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        size = self.config.hidden_size
        _check_hidden_states("hidden_states", hidden_states, size)
        if router_hidden_states is None:
            router_hidden_states = hidden_states
        else:
            _check_hidden_states("router_hidden_states", router_hidden_states, size)
            if router_hidden_states.shape != hidden_states.shape:
                raise ValueError(
                    f"router_hidden_states must have hidden_states' shape {list(hidden_states.shape)}, "
                    f"got {list(router_hidden_states.shape)}"
                )
        router, router_hidden_states = self.router, router_hidden_states.reshape(-1, size)
        if runs_as(router, Gemma4Router, _ROUTER_METHODS):
            weights, index = router.route(router_hidden_states)  # without the probabilities, which nobody reads here
        else:
            _, weights, index = router(router_hidden_states)
        output: torch.Tensor = self.experts(hidden_states.reshape(-1, size), index, weights)
        # A view of what a module returns is FSDP2's to warn of.
        return output if output.shape == hidden_states.shape else output.reshape(hidden_states.shape)
