"""The experts of any model as a torch module; names and layouts of the parameters are transformers'."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from cupymoe.activation import MoEActivation
from cupymoe.backends import check_name
from cupymoe.checks.settings import check_keep, check_numerics
from cupymoe.config import check_size
from cupymoe.customisation import path_of
from cupymoe.functional import fused_experts
from cupymoe.parameters import DTYPES
from cupymoe.weights.quantize import quantize
from cupymoe.weights.quantized import QuantizedWeight, Weight, put_weight

# Gemma 4's name for it, that of most models, and Aria's.
_TOP_K = ("top_k_experts", "num_experts_per_tok", "moe_topk")


def experts_per_token(part: Any) -> int:
    """How many experts a token goes to, of a router or experts, ours or transformers'.

    Raises:
        ValueError: a :class:`MoEExperts` was not told.
    """
    if isinstance(part, MoEExperts):
        if part.top_k is None:
            raise ValueError(
                f"{path_of(part)} must have a top_k, the number of experts that a token goes to: give MoEExperts top_k="
            )
        return part.top_k
    for name in _TOP_K:
        count = getattr(part.config, name, None)
        if count is not None:
            return int(count)
    raise ValueError(
        f"{path_of(part)} must say how many experts a token goes to: its config has none of {', '.join(_TOP_K)}"
    )


def as_out_in(weight: Weight, is_transposed: bool = True) -> Weight:
    """``[E, out, in]`` of a weight that is kept as ``[E, in, out]`` where it is plain and ``is_transposed``."""
    return weight if isinstance(weight, QuantizedWeight) or not is_transposed else weight.transpose(1, 2)


class MoEExperts(nn.Module):
    """The experts of any model; call-compatible with transformers' classes of experts.

    The parameters have transformers' names, so that the state_dict of ``MixtralExperts``, ``Qwen3MoeExperts``,
    ``GptOssExperts``, ``NemotronHExperts`` and their like loads with ``strict=True``. They are uninitialised, as there:

    - ``gate_up_proj`` ``[E, 2I, H]``, or ``up_proj`` ``[E, I, H]`` where the activation is ungated;
    - ``down_proj`` ``[E, H, I]``;
    - with ``bias``, ``gate_up_proj_bias`` ``[E, 2I]`` (or ``up_proj_bias`` ``[E, I]``) and ``down_proj_bias``
      ``[E, H]``.

    A :class:`cupymoe.QuantizedWeight` may take the place of either weight, by assignment or by :meth:`quantize_`: of
    shape ``[E, out, in]``, ``transposed`` or not. A ``state_dict`` of such experts, with keys like
    ``gate_up_proj.codes``, loads into any.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: a member of the contract, or a spelling that :meth:`cupymoe.MoEActivation.from_str` knows. It says
            whether the experts are gated, and whether the rows of gate and up alternate.
        bias: whether both projections have one.
        transposed: whether both weights are kept as ``[E, in, out]``: ``[E, H, 2I]`` and ``[E, I, H]``, as in GPT-OSS.
        top_k: how many experts a token goes to. Calls have as many as their indices say; :func:`cupymoe.warmup` and
            :func:`cupymoe.explain` need to know it.
        backend: who computes; see :func:`cupymoe.fused_experts`.
        keep: what a call keeps for its gradients; see :func:`cupymoe.fused_experts`.
        numerics: ``"fast"``, or ``"invariant"``: the same bits for a token in every call; see
            :func:`cupymoe.fused_experts`.
        dtype: bfloat16, float16, float32 or float64; None: torch's default.
        device: of the parameters; None: torch's default.

    Raises:
        TypeError: ``activation`` is neither a member nor a string, or ``bias`` or ``transposed`` is no bool.
        ValueError: a size is not a positive integer, ``top_k`` is more than ``num_experts``, ``dtype`` is none of the
            four, ``keep`` neither ``"gate_up"`` nor ``"input"``, ``numerics`` neither ``"fast"`` nor ``"invariant"``,
            or there is no such activation or backend.
    """

    gate_up_proj: nn.Parameter | QuantizedWeight
    up_proj: nn.Parameter | QuantizedWeight
    down_proj: nn.Parameter | QuantizedWeight
    gate_up_proj_bias: nn.Parameter
    up_proj_bias: nn.Parameter
    down_proj_bias: nn.Parameter

    _ungated_name = "up_proj"
    """Of the first weight, where the activation is ungated."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: MoEActivation | str,
        *,
        bias: bool = False,
        transposed: bool = False,
        top_k: int | None = None,
        backend: str = "auto",
        keep: str = "gate_up",
        numerics: str = "fast",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            check_size(name, size)
        if top_k is not None:
            check_size("top_k", top_k)
            if top_k > num_experts:
                raise ValueError(f"top_k must be at most num_experts={num_experts}, got {top_k}")
        for name, flag in (("bias", bias), ("transposed", transposed)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {[*DTYPES]} or None, got {dtype}")
        check_name(backend)
        check_keep(keep)
        check_numerics(numerics)
        self.activation = activation if isinstance(activation, MoEActivation) else MoEActivation.from_str(activation)
        self.top_k = top_k
        self.backend = backend
        self.keep = keep
        self.numerics = numerics
        self.has_bias = bias
        self.is_transposed = transposed
        """Transformers' name: PEFT asks for it."""
        self._first_name = "gate_up_proj" if self.activation.is_gated else self._ungated_name
        width = self.activation.input_size(intermediate_size)
        for name, out_size, in_size in (
            (self._first_name, width, hidden_size),
            ("down_proj", hidden_size, intermediate_size),
        ):
            shape = (in_size, out_size) if transposed else (out_size, in_size)
            self._add(name, (num_experts, *shape), dtype, device)
            if bias:
                self._add(f"{name}_bias", (num_experts, out_size), dtype, device)

    def _add(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))

    def projections(
        self,
    ) -> tuple[Weight, Weight, torch.Tensor | None, torch.Tensor | None]:
        """``gate_up_proj``, ``down_proj``, ``gate_up_bias`` and ``down_bias`` of :func:`cupymoe.fused_experts`.

        They are the parameters, or views of them: weights ``[E, out, in]``, and biases that are None without ``bias``.
        """
        gate_up_proj: Weight = getattr(self, self._first_name)
        down_proj: Weight = self.down_proj
        if self.is_transposed:
            gate_up_proj, down_proj = as_out_in(gate_up_proj), as_out_in(down_proj)
        if not self.has_bias:
            return gate_up_proj, down_proj, None, None
        return gate_up_proj, down_proj, getattr(self, f"{self._first_name}_bias"), self.down_proj_bias

    def __setattr__(self, name: str, value: Any) -> None:
        """A quantised weight may be assigned in the place of a parameter, where torch lets no module be."""
        if isinstance(value, QuantizedWeight):
            put_weight(self, name, value)
        else:
            super().__setattr__(name, value)

    def quantize_(
        self, format: str, *, group_size: int | tuple[int, int] | None = None, scale_rule: str = "absmax"
    ) -> None:
        """Quantise both weights in place; arguments and errors are as of :func:`cupymoe.quantize`.

        The parameters are gone then, and an optimizer that holds them should be made anew. Biases stay.

        Raises:
            ValueError: a weight is quantised already.
        """
        gate_up_proj, down_proj, *_ = self.projections()
        for name, weight in ((self._first_name, gate_up_proj), ("down_proj", down_proj)):
            if isinstance(weight, QuantizedWeight):
                raise ValueError(f"{path_of(self)} must have plain weights, got {name} in {weight.format.name}")
        quantized = quantize(
            cast(torch.Tensor, gate_up_proj),
            cast(torch.Tensor, down_proj),
            format,
            group_size=group_size,
            scale_rule=scale_rule,
        )
        for name, quantized_weight in zip((self._first_name, "down_proj"), quantized, strict=True):
            setattr(self, name, quantized_weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Weights that are quantised in the state_dict are so here, too, before they are loaded."""
        for name in (self._first_name, "down_proj"):
            weight = getattr(self, name)
            if not isinstance(weight, QuantizedWeight):
                like = QuantizedWeight.like_state(state_dict, f"{prefix}{name}.", weight.device)
                if like is not None and like.shape == tuple(as_out_in(weight, self.is_transposed).shape):
                    setattr(self, name, like)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``[T, H]`` from ``hidden_states`` [T, H], ``top_k_index`` and ``top_k_weights`` [T, K].

        Dtypes, result and errors are as of :func:`cupymoe.fused_experts`.
        """
        gate_up_proj, down_proj, gate_up_bias, down_bias = self.projections()
        return fused_experts(
            hidden_states,
            gate_up_proj,
            down_proj,
            top_k_index,
            top_k_weights,
            activation=self.activation,
            backend=self.backend,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            numerics=self.numerics,
            keep=self.keep,
        )
