"""One function per property. Each feeds a target inputs that make the property visible, and says what it saw."""

from __future__ import annotations

import math
from typing import Any

import torch

from cupymoe import reference
from cupymoe.activation import MoEActivation
from cupymoe.tools.audit.measured import (
    CANDIDATES,
    HIDDEN,
    INTERMEDIATE,
    LAYOUTS,
    NUM_EXPERTS,
    TOP_K,
    Case,
    Finding,
    Status,
    Subject,
    candidate_name,
    label,
    random_case,
    relative,
    selection,
)

_FURTHEST = 12.0  # gate and up, in size: beyond the clamps of every candidate
_SIGMAS = 6  # by how much a measurement must exclude a candidate
_COARSE = 0.02  # relative; no rounding of a 16-bit dtype is that far off in norm
_ROUNDINGS = 100  # eps; a float32 result that is further off is not only rounded (a 16-bit one contradicts before)
_REPEATS = 10


def asked(subject: Subject, activation: str) -> Finding:
    """What the code of the model asks for, whatever is computed then: a stack's paths may not agree on a name."""
    try:
        name = candidate_name(activation)
    except ValueError:
        name = activation
    status: Status = "ok" if name == subject.activation else "contradicts"
    detail = f"the model's code asks its experts for {activation!r}"
    return Finding("asked for", label(name), status, detail, label(subject.activation))


def gate_order(subject: Subject) -> Finding:
    """Which rows of gate_up_proj are the gate, whatever the activation; measures the layout, None where none is told.

    Of the two operands only up enters affinely. So under the right layout, and no other, the outputs for
    up = -1, 0.5, 2 lie on a line, for every gate.
    """
    gate = subject.rounded(4 * torch.rand(32, INTERMEDIATE, generator=subject.generator()).double() - 2)
    curvature, slope = {}, {}
    for name in LAYOUTS:
        at = [subject.run(selection(gate, torch.full((32, 1), up, dtype=torch.float64), name)) for up in (-1, 0.5, 2)]
        size = max(float(output.abs().max()) for output in at) or 1.0
        curvature[name] = float((at[0] - 2 * at[1] + at[2]).abs().max()) / size
        slope[name] = float((at[2] - at[0]).abs().max()) / size
    straight = max(4 * subject.eps, _COARSE)
    affine = [name for name in LAYOUTS if curvature[name] <= straight]
    layout = affine[0] if len(affine) == 1 else None
    measured = {"layout": layout, "curvature": curvature, "slope": slope}

    def finding(value: str, status: Status, detail: str) -> Finding:
        return Finding("gate order", value, status, detail, subject.layout, measured)

    if layout is None:
        return finding("unknown", "contradicts", f"up enters affinely in {affine or 'no layout'}")
    if slope[layout] <= straight:
        return finding("ungated", "contradicts", f"the up rows ({layout}) change nothing")
    other = min(value for name, value in curvature.items() if name != layout)
    detail = f"up enters affinely to {curvature[layout]:.1e}; in the next best order to {other:.1e}"
    return finding(layout, "ok" if layout == subject.layout else "contradicts", detail)


def activation(subject: Subject, layout: str, gated: bool = True) -> Finding:
    """Which candidate the measured ``act(gate) * up`` is, for every value on a grid from -12 to 12.

    A candidate is excluded when the output's position on the line from the best one to it is known, by least squares
    over the whole grid, to be nearer to the best with :data:`_SIGMAS` to spare. So noise that hides a difference on
    each single input doesn't hide it on thousands, and where it does, no guess is made.
    """
    gate, spacing = _grid(subject)
    rows = len(gate) // INTERMEDIATE
    gate, spacing = (values[: rows * INTERMEDIATE].view(rows, INTERMEDIATE) for values in (gate, spacing))
    up = subject.rounded(_ups(rows))
    output = subject.run(selection(gate, up, layout))[:, :INTERMEDIATE]
    if not gated:
        up = torch.ones_like(up)
    truths = {name: function(gate, up) for name, function in CANDIDATES.items()}
    step = subject.eps * torch.maximum(output.abs(), 2.0**-7 * up.abs())
    normal = spacing * torch.exp(-(gate**2) / 2) / up**2
    errors = {name: _curve_error(output, truth, gate, normal) for name, truth in truths.items()}
    if not output.isfinite().all():
        return _activation_finding(subject, "unknown", "the output is not finite", errors, {})
    best = min(truths, key=lambda name: float(((output - truths[name]) / step).square().sum()))
    second = min((name for name in errors if name != best), key=errors.__getitem__)
    detail = f"off by {errors[best]:.1e}; next is {label(second)}, off by {errors[second]:.1e}"
    if not errors[best] <= max(4 * subject.eps, 1e-3):
        return _activation_finding(subject, "unknown", f"nearest is {label(best)}, {detail}", errors, {})
    # A kernel may round act(gate) before it multiplies, so what is the same act in the dtype can't be told apart.
    acts = {name: subject.rounded(truth[(up == 1).flatten()]) for name, truth in truths.items()}
    sigmas = {
        name: 0.0 if torch.equal(acts[name], acts[best]) else _sigmas(output, truths[best], truths[name], step)
        for name in truths
        if name != best
    }
    rivals = [name for name, margin in sigmas.items() if margin < _SIGMAS]
    if rivals:
        if subject.dtype != torch.float32:
            detail += f"; {subject.dtype} hides it, float32 may not".replace("torch.", "")
        value = "cannot tell: " + " or ".join(label(name) for name in sorted([best, *rivals], key=label))
        status: Status = "unclear" if subject.activation in [best, *rivals] else "contradicts"
        return _activation_finding(subject, value, detail, errors, sigmas, status)
    detail += f" ({_times(errors[second], errors[best])}{min(sigmas[second], 1e6):.3g} sigma)"
    value, agrees = label(best), best == subject.activation
    if errors[best] > _ROUNDINGS * subject.eps:
        value = f"near {value}"
        detail += "; more than rounding: TF32 products, an approximation, or another function"
        return _activation_finding(subject, value, detail, errors, sigmas, "unclear" if agrees else "contradicts", best)
    return _activation_finding(subject, value, detail, errors, sigmas, "ok" if agrees else "contradicts", best)


def _activation_finding(
    subject: Subject,
    value: str,
    detail: str,
    errors: dict[str, float],
    sigmas: dict[str, float],
    status: Status = "contradicts",
    found: str | None = None,
) -> Finding:
    measured: dict[str, Any] = {"found": found, "errors": errors, "sigmas": sigmas}
    return Finding("activation", value, status, detail, label(subject.activation), measured)


def _grid(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct values of the dtype, shuffled, each with the width of the interval that it stands for."""
    even = torch.linspace(-_FURTHEST, _FURTHEST, 14401, dtype=torch.float64)
    values = torch.unique(subject.rounded(torch.cat((even, even / 10))))
    spacing = torch.diff(values, prepend=values[:1], append=values[-1:])
    spacing = (spacing[1:] + spacing[:-1]) / 2
    order = torch.randperm(len(values), generator=subject.generator())
    return values[order], spacing[order]


def _ups(rows: int) -> torch.Tensor:
    """``[rows, 1]``: 1, with which no product rounds; in every fourth row 1 to 12 of either sign, for the clamps."""
    ups = torch.ones(rows, 1, dtype=torch.float64)
    larger = ups[3::4]
    larger[:, 0] = torch.linspace(1, _FURTHEST, len(larger)) * (-1.0) ** torch.arange(len(larger))
    return ups


def _curve_error(output: torch.Tensor, truth: torch.Tensor, gate: torch.Tensor, normal: torch.Tensor) -> float:
    """Relative error over standard normal gates, or over gates beyond 5 where that is worse (clamps show there)."""
    far = gate.abs() > 5
    near = relative(output * normal.sqrt(), truth * normal.sqrt())
    return max(near, relative(output[far], truth[far]))


def _sigmas(output: torch.Tensor, best: torch.Tensor, other: torch.Tensor, step: torch.Tensor) -> float:
    """How surely the output is the best candidate and not another, in standard errors; 0 if it is neither's."""
    direction, residual = (other - best) / step, (output - best) / step
    length = direction.square().sum()
    position = (direction * residual).sum() / length  # 0: at the best, 1: at the other
    scatter = (direction * (residual - position * direction)).square().sum().sqrt() / length
    if position.abs() > 0.25:
        return 0.0
    return float((0.5 - position) / scatter.clamp(min=1e-12))


def _times(larger: float, smaller: float) -> str:
    return f"{larger / smaller:.3g}x, " if smaller > 0 else ""


def routing_weights(subject: Subject, layout: str) -> Finding:
    """Which function of the routing weights multiplies the experts' outputs, and with how many bits.

    Each expert writes its own columns, so the weight of each (token, k) pair is measured by itself: the output over
    the one that the same expert gives alone, with weight 1.
    """
    tokens, width = 256, HIDDEN // NUM_EXPERTS
    generator = subject.generator()
    weights = 0.1 + 0.9 * torch.rand(tokens, TOP_K, generator=generator).double()
    index = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    case = _separate_experts(subject, layout, index, weights)
    alone = case._replace(top_k_index=torch.arange(NUM_EXPERTS)[:, None], top_k_weights=torch.ones(NUM_EXPERTS, 1))
    alone = alone._replace(hidden_states=case.hidden_states[:NUM_EXPERTS])
    blocks = subject.run(alone).view(NUM_EXPERTS, NUM_EXPERTS, width)
    unit = blocks[torch.arange(NUM_EXPERTS), torch.arange(NUM_EXPERTS)]  # [E, width], act(16) * up

    def applied(scale: float) -> torch.Tensor:
        output = subject.run(case._replace(top_k_weights=scale * weights)).view(tokens, NUM_EXPERTS, width)
        chosen = output.gather(1, index[..., None].expand(-1, -1, width))
        return (chosen * unit[index]).sum(-1) / unit[index].square().sum(-1)

    once, doubled = applied(1), applied(2)
    ratio = float((once * doubled).sum() / once.square().sum())
    forms = {
        "as given, once": weights,
        "renormalised": weights / weights.sum(-1, keepdim=True),
        "applied twice": weights**2,
        "not applied": torch.ones_like(weights),
        "renormalised, applied twice": (weights / weights.sum(-1, keepdim=True)) ** 2,
        "softmax of them": torch.softmax(weights, -1),
    }
    errors = {name: relative(once / form, torch.ones_like(form)) for name, form in forms.items()}
    form = min(errors, key=errors.__getitem__)
    measured = {"errors": errors, "output_of_doubled_weights": ratio}
    twice = f"doubled weights give {ratio:.4g} times the output"

    def finding(value: str, status: Status, detail: str) -> Finding:
        return Finding("routing weights", value, status, detail, "as given, once", measured)

    if not errors[form] <= _COARSE:
        return finding("unknown", "contradicts", f"nearest is {form!r}, off by {errors[form]:.1e}; {twice}")
    if form != "as given, once":
        return finding(form, "contradicts", f"off by {errors[form]:.1e}; {twice}")
    if abs(ratio - 2) > _COARSE:
        return finding(form, "contradicts", f"but {twice}")
    casts = {
        dtype: relative(once / weights.to(dtype).double(), torch.ones_like(weights))
        for dtype in (torch.bfloat16, torch.float16)
    }
    measured["errors_of_casts"] = {str(dtype).removeprefix("torch."): error for dtype, error in casts.items()}
    cast = min(casts, key=casts.__getitem__)
    detail = f"off by {errors[form]:.1e}; {twice}"
    if casts[cast] < errors[form] / 2:
        name = str(cast).removeprefix("torch.")
        coarser = torch.finfo(cast).eps > subject.eps
        return finding(
            f"{form}, rounded to {name}",
            "contradicts" if coarser else "warn",
            f"off by {casts[cast]:.1e} from the rounded weights, {errors[form]:.1e} from those given; {twice}",
        )
    if errors[form] > casts[torch.bfloat16] / 2:
        return finding(form, "unclear", f"{detail}; too noisy to tell a rounding to bfloat16")
    return finding(form, "ok", detail)


def _separate_experts(subject: Subject, layout: str, index: torch.Tensor, weights: torch.Tensor) -> Case:
    """Expert e writes ``act(16) * up`` into its own HIDDEN / NUM_EXPERTS columns, the same for each token."""
    width = HIDDEN // NUM_EXPERTS
    case = selection(torch.zeros(len(index), INTERMEDIATE), torch.full((len(index), 1), 16.0), layout)
    up = subject.rounded(1 + torch.rand(INTERMEDIATE, generator=subject.generator()).double())
    case.hidden_states[:, :INTERMEDIATE] = up
    gate_rows = torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.float64)
    gate_rows[:, -1] = 1
    up_rows = torch.eye(INTERMEDIATE, HIDDEN, dtype=torch.float64)
    down = torch.zeros(NUM_EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.float64)
    for expert in range(NUM_EXPERTS):
        down[expert, expert * width : (expert + 1) * width, :width] = torch.eye(width)
    rows = LAYOUTS[layout](gate_rows, up_rows).expand(NUM_EXPERTS, -1, -1)
    return Case(case.hidden_states, rows, down, index, weights)


def masked_ids(subject: Subject, sentinel: int) -> Finding:
    """What a pair with an index outside [0, E) contributes, while its weight is not zero.

    The config says nothing about it, so nothing here contradicts it; expert parallelism depends on it.
    """
    name = f"masked id {sentinel}" + (" (num_experts)" if sentinel == NUM_EXPERTS else "")
    case, _ = random_case(subject, 16)
    index = case.top_k_index.clone()
    index[::2, 1] = sentinel
    masked = index == sentinel

    def run(index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return subject.run(case._replace(top_k_index=index, top_k_weights=weights))

    weightless = torch.where(masked, 0.0, case.top_k_weights)
    nothing = run(case.top_k_index, weightless)
    if not nothing.isfinite().all():
        return Finding(name, "not measured", "unclear", "without a masked id the output is not finite either")
    computed = {expert: run(torch.where(masked, expert, index), case.top_k_weights) for expert in (0, NUM_EXPERTS - 1)}
    try:
        output, output_weightless = run(index, case.top_k_weights), run(index, weightless)
    except Exception as error:
        return Finding(name, "raises", "warn", f"{type(error).__name__}: {_first_line(error)}")
    tolerance = max(8 * subject.eps, 1e-5)
    if relative(output, nothing) <= tolerance:
        return Finding(name, "contributes zero", "ok", f"off by {relative(output, nothing):.1e}")
    harmless = relative(output_weightless, nothing) <= tolerance
    zero = "with weight 0 it contributes zero" if harmless else "with weight 0 the output is wrong too"
    for expert, truth in computed.items():
        if relative(output, truth) <= tolerance:
            return Finding(name, f"computes expert {expert}", "warn", zero)
    rest = relative(output[1::2], nothing[1::2])
    others = "; tokens without a masked pair change too" if not rest <= tolerance else ""
    return Finding(name, "something else", "warn", f"off by {relative(output, nothing):.1e}; {zero}{others}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def rounding(subject: Subject, found: str | None, layout: str | None) -> Finding:
    """Error on random inputs against float64: of the config's function, and of the one found where that is another."""
    case, (gate, up) = random_case(subject)
    output, truth = subject.run(case), _truth(case, gate, up, subject.activation)
    error = relative(output, truth)
    plain = relative(_plain(case, gate, up, subject.activation, subject.dtype), truth)
    measured: dict[str, Any] = {"error": error, "error_of_plain_torch": plain}
    detail = f"from {label(subject.activation)} in float64; plain torch: {plain:.1e}"
    if found is not None and layout is not None and (found, layout) != (subject.activation, subject.layout):
        output = subject.run(case._replace(gate_up_proj=LAYOUTS[layout](gate, up)))
        measured["error_from_found"] = relative(output, _truth(case, gate, up, found))
        detail += f"; from the function found, {label(found)}, {layout}: {measured['error_from_found']:.1e}"
    status: Status = "ok" if error <= 4 * plain else "warn" if error <= _COARSE else "contradicts"
    return Finding("rounding", f"{error:.1e}", status, detail, measured=measured)


def _truth(case: Case, gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    """cupymoe.reference in float64, where it has the candidate."""
    if name not in {member.value for member in MoEActivation}:
        return _plain(case, gate, up, name, torch.float64)
    member = MoEActivation(name)
    rows = LAYOUTS["interleaved" if member.is_interleaved else "gate first"](gate, up)
    return reference.experts(*case._replace(gate_up_proj=rows), activation=member)


def _plain(case: Case, gate: torch.Tensor, up: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A candidate in plain torch that rounds to the dtype after every step, but keeps routing weights in float32."""
    states, gate, up, down = (tensor.to(dtype) for tensor in (case.hidden_states, gate, up, case.down_proj))
    weights = case.top_k_weights.to(reference.work_dtype(dtype))
    output = torch.zeros_like(states)
    for expert in range(NUM_EXPERTS):
        token, k = torch.where(case.top_k_index == expert)
        gates, ups = (states[token] @ rows[expert].T for rows in (gate, up))
        intermediate = CANDIDATES[name](gates.double(), ups.double()).to(dtype)
        weighted = intermediate @ down[expert].T * weights[token, k, None]
        output.index_add_(0, token, weighted.to(dtype))
    return output.double()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit, but that NaN is as good as any other NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def determinism(subject: Subject) -> Finding:
    """Whether the same call gives the same bits."""
    case, _ = random_case(subject)
    first, *others = (subject.run(case) for _ in range(_REPEATS))
    differing = sum(not _same(first, other) for other in others)
    worst = max(relative(other, first) for other in others)
    if not differing:
        return Finding("determinism", "same bits", "ok", f"{_REPEATS} calls")
    detail = f"{differing} of {_REPEATS - 1} repeats differ, by up to {worst:.1e}"
    return Finding("determinism", "differs", _difference_status(subject, worst), detail, measured={"worst": worst})


def batch_invariance(subject: Subject) -> Finding:
    """Whether a token's output is the same alone and among others."""
    case, _ = random_case(subject)
    batch = subject.run(case)
    tokens = range(0, len(batch), 8)
    alone = [
        subject.run(Case(case[0][t : t + 1], case[1], case[2], case[3][t : t + 1], case[4][t : t + 1])) for t in tokens
    ]
    differing = sum(not _same(one[0], batch[t]) for one, t in zip(alone, tokens, strict=True))
    worst = max(relative(one[0], batch[t]) for one, t in zip(alone, tokens, strict=True))
    detail = f"{differing} of {len(alone)} tokens differ between alone and in a batch of {len(batch)}"
    if not differing:
        return Finding("batch invariance", "same bits", "ok", detail)
    detail += f", by up to {worst:.1e}"
    value = "same to rounding" if _difference_status(subject, worst) == "warn" else "depends on the batch"
    return Finding("batch invariance", value, _difference_status(subject, worst), detail, measured={"worst": worst})


def _difference_status(subject: Subject, worst: float) -> Status:
    """Two roundings of one result, or two results."""
    return "warn" if worst <= 8 * subject.eps and math.isfinite(worst) else "contradicts"
