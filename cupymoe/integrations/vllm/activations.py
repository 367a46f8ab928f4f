"""Which of our activations a layer of vLLM means."""

from __future__ import annotations

from typing import Any

from cupymoe.activation import MoEActivation

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


def activation_of(moe: Any, quant_config: Any = None) -> MoEActivation:
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
