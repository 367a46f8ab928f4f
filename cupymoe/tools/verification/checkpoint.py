"""``cupymoe verify --checkpoint``: the layers of a checkpoint against float64, and how they route."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cupymoe import checkpoint
from cupymoe.checkpoint import CheckpointError
from cupymoe.config import Gemma4MoEConfig
from cupymoe.modules import Gemma4MoE
from cupymoe.tools.verification import experts, routing
from cupymoe.tools.verification.result import Result, Setting
from cupymoe.weights import QuantizedWeight
from cupymoe.weights.quantized import Weight

_TOKENS = 16


@dataclass(frozen=True)
class LayerSetting(Setting):
    """A setting whose weights are a layer's own."""

    moe: Gemma4MoE

    @functools.cached_property
    def weights(self) -> tuple[Weight, Weight]:
        """gate_up_proj and down_proj of the layer."""
        return self.moe.experts.gate_up_proj, self.moe.experts.down_proj


def run(path: str, dtype: torch.dtype, seed: int, device: torch.device) -> Iterator[Result]:
    """One result for each layer that has experts, or should have them as ``num_hidden_layers`` says.

    What is missing or can't be loaded is a failure, and the other layers are still checked. A layer is on the device
    only while it is checked.
    """
    name = "checkpoint has layers with experts"
    try:
        layers, config = checkpoint.layers(path), checkpoint.read_config(path)
        count = checkpoint.num_hidden_layers(path)
    except (CheckpointError, ImportError) as error:
        yield Result(name, "fail", str(error))
        return
    if not layers:
        yield Result(name, "fail", f"{path}: no key of a router or of experts")
        return
    try:
        checkpoint.check_index(path)
    except (CheckpointError, ImportError) as error:
        yield Result("index and files agree", "fail", str(error))
    for layer in sorted({*layers, *range(count or 0)}):
        name = f"layer {layer} against float64, T = {_TOKENS}"
        if layer not in layers:
            reason = f"{path}: layer {layer} has no router and no experts; num_hidden_layers of config.json is {count}"
            yield Result(name, "fail", reason)
            continue
        try:
            result = _layer(name, path, layer, config, dtype, seed, device)
        except CheckpointError as error:
            result = Result(name, "fail", str(error))
        except Exception as error:  # whatever it is, the other layers are still to be checked
            result = Result(name, "fail", f"{type(error).__name__}: {error}")
        yield result


def _layer(
    name: str, path: str, layer: int, config: Gemma4MoEConfig, dtype: torch.dtype, seed: int, device: torch.device
) -> Result:
    moe = checkpoint.load_layer(path, layer, config, device=device, dtype=dtype)
    if (reason := _unhealthy(moe)) is not None:
        return Result(name, "fail", reason)

    setting = LayerSetting(config, dtype, seed, device, moe)
    states = _normalised_states(setting)
    logits = moe.router.logits(states)
    weights, index = moe.router.route(states)
    differing, weight_error = routing.errors(logits, config.top_k_experts, moe.router.per_expert_scale)
    by_backend, peer = experts.errors(setting, (states, index, weights))

    formats = _formats(setting)
    passed = all(errors.within_bounds(dtype, peer, formats is not None) for errors in by_backend.values())
    passed = passed and differing == 0 and weight_error < routing.BOUND
    measured = by_backend if peer is None else {**by_backend, "transformers": peer}
    parts = [f"{who} {errors.relative:.5f} (largest {errors.largest:.1e})" for who, errors in measured.items()]
    allowed = experts.bound(dtype, formats is not None)
    detail = f"relative error of {allowed:.5f}: {', '.join(parts)}; {_routing_statistics(logits, index)}"
    detail += formats or ""
    if differing or not weight_error < routing.BOUND:
        detail += f"; {differing} experts differ from float64's, weights within {weight_error:.1e}"
    return Result.of(name, passed, detail)


def _unhealthy(moe: Gemma4MoE) -> str | None:
    """The first weight that is not finite, or that is zero for a whole expert, as after a silent load failure."""
    for name, weight in moe.named_modules():
        if isinstance(weight, QuantizedWeight):  # finite, or it could not have been loaded
            zero = [
                expert
                for expert in range(weight.shape[0])
                if not weight.dequantize(torch.float32, slice(expert, expert + 1)).any()
            ]
            if zero:
                return f"{name} of experts {zero[:8]} is zero ({len(zero)} of {weight.shape[0]})"
    for name, parameter in moe.named_parameters():
        rows = parameter.flatten(1) if parameter.dim() > 1 else parameter[None]
        # The infinity norm needs no temporary of the parameter's size, and a NaN comes through.
        largest = torch.linalg.vector_norm(rows, float("inf"), dim=1)
        for complaint, bad in (("not finite", ~torch.isfinite(largest)), ("zero", largest == 0)):
            if bad.any():
                where = f" of experts {bad.nonzero().flatten().tolist()[:8]}" if len(rows) > 1 else ""
                return f"{name}{where} is {complaint} ({int(bad.sum())} of {len(rows)})"
    return None


def _formats(setting: LayerSetting) -> str | None:
    """What is quantised, and how; None: nothing."""
    formats = [
        weight.format.name if isinstance(weight, QuantizedWeight) else "unquantised" for weight in setting.weights
    ]
    if {*formats} == {"unquantised"}:
        return None
    return f"; gate_up_proj {formats[0]}, down_proj {formats[1]}, which float64 and transformers have dequantised"


def _normalised_states(setting: Setting) -> torch.Tensor:
    """``[T, H]``, each row with a mean square of one."""
    states = torch.randn(
        _TOKENS, setting.config.hidden_size, device=setting.device, generator=setting.generator(), dtype=torch.float32
    )
    return (states * states.square().mean(-1, keepdim=True).rsqrt()).to(setting.dtype)


def _routing_statistics(logits: torch.Tensor, index: torch.Tensor) -> str:
    """Experts that are hit, how uneven the load is, and tokens whose choice or order an exact tie leaves open."""
    num_experts, top_k = logits.shape[1], index.shape[1]
    load = torch.bincount(index.flatten(), minlength=num_experts)
    leading = logits.sort(dim=-1, descending=True).values[:, : top_k + 1]
    ties = int((leading[:, :-1] == leading[:, 1:]).any(-1).sum())
    return (
        f"{int((load > 0).sum())} of {num_experts} experts hit, the most used by {int(load.max())} of {len(index)} "
        f"tokens; {ties} tokens with ties"
    )
