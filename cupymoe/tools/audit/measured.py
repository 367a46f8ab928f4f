"""What every probe needs: the target in its setting, inputs that single out one property, the possible answers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from cupymoe import reference
from cupymoe.activation import MoEActivation
from cupymoe.tools.audit.targets import Target
from cupymoe.tools.verification.result import relative_error

NUM_EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 256, 128, 2  # multiples of what known kernels ask for

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (gate, up) -> act(gate) * up
Status = Literal["ok", "warn", "unclear", "contradicts"]


def _member(member: MoEActivation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    columns = torch.stack((gate, up.expand_as(gate)))
    rows = torch.stack(tuple(columns), -1).flatten(-2) if member.is_interleaved else torch.cat(tuple(columns), -1)
    return reference.activate(rows, member)


# The functions that an implementation may turn out to compute, by the name that a config would give them.
CANDIDATES: dict[str, Function] = {
    **{
        member.value: functools.partial(_member, member)
        for member in MoEActivation
        if member.name == member.function  # not a second order of gate and up, nor an ungated form
    },
    "quick_gelu": lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
    "relu": lambda gate, up: torch.relu(gate) * up,
    # DeepSeek-style: SILU's argument is clamped, where SWIGLUSTEP clamps its result.
    "clamped_swiglu_7": functools.partial(_member, MoEActivation.SILU.with_parameters(limit=7.0)),
    "clamped_swiglu_10": functools.partial(_member, MoEActivation.SILU.with_parameters(limit=10.0)),
}

# How a report writes them, where that is not the name in capitals.
_LABELS = {
    "gelu": "GELU (erf)",
    "gelu_tanh": "GELU (tanh)",
    "relu2": "ReLU2",
    "quick_gelu": "quick GELU",
    "relu": "ReLU",
    "clamped_swiglu_7": "clamped SwiGLU (limit 7)",
    "clamped_swiglu_10": "clamped SwiGLU (limit 10)",
}

# How the rows of gate_up_proj hold gate and up.
LAYOUTS: dict[str, Function] = {
    "gate first": lambda gate, up: torch.cat((gate, up), -2),
    "up first": lambda gate, up: torch.cat((up, gate), -2),
    "interleaved": lambda gate, up: torch.stack((gate, up), -2).flatten(-3, -2),
    "interleaved, up first": lambda gate, up: torch.stack((up, gate), -2).flatten(-3, -2),
}


def candidate_name(activation: str) -> str:
    """The candidate that a config's spelling means.

    Raises:
        ValueError: it means none, or an activation without a gate.
    """
    if activation in CANDIDATES:
        return activation
    member = MoEActivation.from_str(activation)
    if not member.is_gated:
        raise ValueError(f"audit probes gated experts, and {activation!r} has no gate")
    if member.value not in CANDIDATES:
        raise ValueError(f"audit has no candidate {member.value!r}; it has {sorted(CANDIDATES)}")
    return member.value


def label(name: str) -> str:
    """How a report writes a candidate."""
    return _LABELS.get(name, name.upper())


class Case(NamedTuple):
    """Arguments of a target."""

    hidden_states: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor


@dataclass(frozen=True)
class Finding:
    """What one probe found.

    ``status``: ``ok``; ``warn`` (worth knowing, no contradiction); ``unclear`` (the measurement can't tell);
    ``contradicts`` (the config asks for something else).
    """

    name: str
    value: str
    status: Status
    detail: str
    expected: str | None = None
    measured: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has neither infinity nor NaN: they become None."""
        return {**vars(self), "measured": _finite(self.measured)}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Subject:
    """A target under probing, and what its config asks for."""

    target: Target
    activation: str  # a key of CANDIDATES
    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    @property
    def layout(self) -> str:
        """The order of rows that goes with the activation."""
        return "interleaved" if self.activation == "swigluoai" else "gate first"

    @property
    def eps(self) -> float:
        """Relative distance of neighbouring values of the dtype."""
        return torch.finfo(self.dtype).eps

    def generator(self) -> torch.Generator:
        """Random numbers on the CPU, the same on every call and for every device."""
        return torch.Generator().manual_seed(self.seed)

    def run(self, case: Case) -> torch.Tensor:
        """The target's output for float64 arguments, which are rounded to the dtype (weights of routing: float32)."""
        to = functools.partial(torch.Tensor.to, device=self.device)
        output = self.target(
            to(case.hidden_states, dtype=self.dtype),
            to(case.gate_up_proj, dtype=self.dtype),
            to(case.down_proj, dtype=self.dtype),
            to(case.top_k_index, dtype=torch.int64),
            to(case.top_k_weights, dtype=torch.float32),
        )
        return output.cpu()

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """The values of the dtype nearest to these, in float64."""
        return values.to(self.dtype).double()


def selection(gate: torch.Tensor, up: torch.Tensor, layout: str) -> Case:
    """A case whose expert computes ``act(gate) * up`` of the numbers given, element by element, and nothing else.

    Rows of gate_up_proj pick single columns of the hidden states and down_proj is the identity, so no product or sum
    rounds, and with one expert of weight 1 to a token the output is the activation's.

    Args:
        gate: ``[T, I]``, at most ``INTERMEDIATE`` columns.
        up: ``[T, 1]``.
        layout: a key of :data:`LAYOUTS`.
    """
    tokens = gate.shape[0]
    hidden = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    hidden[:, :INTERMEDIATE], hidden[:, -1:] = gate, up
    gate_rows = torch.eye(INTERMEDIATE, HIDDEN, dtype=torch.float64)
    up_rows = torch.zeros_like(gate_rows)
    up_rows[:, -1] = 1
    return Case(
        hidden,
        LAYOUTS[layout](gate_rows, up_rows).expand(NUM_EXPERTS, -1, -1),
        torch.eye(HIDDEN, INTERMEDIATE, dtype=torch.float64).expand(NUM_EXPERTS, -1, -1),
        (torch.arange(tokens) % NUM_EXPERTS)[:, None],
        torch.ones(tokens, 1, dtype=torch.float64),
    )


def random_case(subject: Subject, tokens: int = 64) -> tuple[Case, tuple[torch.Tensor, torch.Tensor]]:
    """Unit-variance states through random experts, in the config's layout; also the gate and up rows by themselves."""
    generator = subject.generator()

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, dtype=torch.float64, generator=generator) * shape[-1] ** -0.5
        return subject.rounded(values)

    gate, up = (normal(NUM_EXPERTS, INTERMEDIATE, HIDDEN) for _ in range(2))
    hidden = subject.rounded(normal(tokens, HIDDEN) * HIDDEN**0.5)
    down = normal(NUM_EXPERTS, HIDDEN, INTERMEDIATE)
    weights, index = reference.route(torch.randn(tokens, NUM_EXPERTS, generator=generator), TOP_K)
    case = Case(hidden, LAYOUTS[subject.layout](gate, up), down, index, weights.double())
    return case, (gate, up)


def relative(output: torch.Tensor, truth: torch.Tensor) -> float:
    """``|output - truth| / |truth|`` in the 2-norm; infinite where the output is not finite; 0 of equal zeros."""
    if torch.equal(output, truth):
        return 0.0
    error = relative_error(output, truth)
    return error if error == error else float("inf")
