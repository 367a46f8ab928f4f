"""Implementations that are wrong in one thing each, and the audit run on them."""

import sys
from itertools import count

import torch
from click.testing import CliRunner

from cupymoe.tools import audit
from cupymoe.tools.audit.measured import CANDIDATES
from cupymoe.tools.cli import main

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ASKED = "gelu_pytorch_tanh"


def plain_experts(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, act=CANDIDATES["gelu_tanh"]):
    """The layer in plain torch: fp32 inside, one rounding, and a masked pair contributes nothing."""
    output = torch.zeros(hidden_states.shape)
    for expert, (rows, down) in enumerate(zip(gate_up_proj.float(), down_proj.float(), strict=True)):
        token, k = torch.where(top_k_index == expert)
        gate, up = (hidden_states[token].float() @ rows.T).chunk(2, -1)
        output.index_add_(0, token, act(gate, up) @ down.T * top_k_weights[token, k, None])
    return output.to(hidden_states.dtype)


def with_act(act):
    return lambda *case: plain_experts(*case, act=act)


def with_activation(name):
    return with_act(CANDIDATES[name])


def with_layout(name):
    """Experts that read gate_up_proj in this order."""

    def experts(hidden_states, gate_up_proj, *rest):
        gate, up = {
            "up first": lambda rows: rows.chunk(2, 1)[::-1],
            "interleaved": lambda rows: (rows[:, ::2], rows[:, 1::2]),
            "interleaved, up first": lambda rows: (rows[:, 1::2], rows[:, ::2]),
        }[name](gate_up_proj)
        return plain_experts(hidden_states, torch.cat((gate, up), 1), *rest)

    return experts


def with_weights(change):
    return lambda *case: plain_experts(*case[:4], change(case[4]))


def clamped(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights):
    top_k_index = top_k_index.clamp(0, len(gate_up_proj) - 1)
    return plain_experts(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)


def masked(index, num_experts):
    return (index < 0) | (index >= num_experts)


def spoiling(*case):
    """Adds to the tokens of masked pairs, whatever the weight."""
    return plain_experts(*case) + masked(case[3], len(case[1])).any(-1, keepdim=True)


def spoiling_by_weight(*case):
    return plain_experts(*case) + (case[4] * masked(case[3], len(case[1]))).sum(-1, keepdim=True)


def spoiling_all(*case):
    return plain_experts(*case) + masked(case[3], len(case[1])).any()


def raising(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights):
    if top_k_index.min() < 0 or top_k_index.max() >= len(gate_up_proj):
        raise IndexError("no such expert")
    return plain_experts(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)


def noisy(scale):
    return lambda *case: plain_experts(*case) * (1 + scale * torch.randn(()))


def sometimes_off(scale, period):
    """Experts that are off by this much in one call of so many."""
    calls = count(1)

    def experts(*case):
        return plain_experts(*case) * (1 + scale * (next(calls) % period == 0))

    return experts


def mixing(scale):
    """Experts of which a token's output leaks into the others."""

    def experts(*case):
        output = plain_experts(*case)
        return output + scale * output.mean(0) * (len(output) > 1)

    return experts


def dropping(*case):
    """Experts with a capacity: past 40 tokens they drop the rest."""
    output = plain_experts(*case)
    output[40:] = 0
    return output


def ungated(hidden_states, gate_up_proj, *rest):
    return plain_experts(hidden_states, gate_up_proj, *rest, act=lambda gate, up: CANDIDATES["gelu_tanh"](gate, up**0))


def erf(*case):
    return plain_experts(*case, act=CANDIDATES["gelu"])


def fifth_is_silu(*case):
    """Experts of which number 5 alone has another activation."""
    chosen = (case[3] == 5).any(-1, keepdim=True)
    return torch.where(chosen, with_activation("silu")(*case), plain_experts(*case))


def overwriting(*case):
    output = plain_experts(*case)
    for argument in case:
        argument.zero_()
    return output


def not_a_number(*case):
    return plain_experts(*case) * float("nan")


def nothing_but_zeros(*case):
    return torch.zeros_like(case[0])


def printing(*case):
    print("a word from the target")
    return plain_experts(*case)


def of_complex_numbers(*case):
    return plain_experts(*case).to(torch.complex64)


def wrong_shape(hidden_states, *rest):
    return hidden_states[:, 1:]


def refusing(*case):
    raise RuntimeError("no kernel for this card")


def top_2_only(*case):
    assert case[3].shape[1] == 2, "top-2 only"
    return plain_experts(*case)


def batch_of_64_only(*case):
    assert len(case[0]) == 64, "64 tokens only"
    return plain_experts(*case)


def leaving(*case):
    sys.exit(0)


def leaving_when_probed(*case):
    """Fit for a run of 64 tokens, and out of the process at the first probe."""
    return plain_experts(*case) if len(case[0]) == 64 else sys.exit(0)


NOT_A_FUNCTION = 3


def subject_of(experts, dtype=torch.float32, activation="gelu_tanh"):
    return audit.Subject(audit.Target("under test", experts), activation, dtype, torch.device("cpu"))


def findings_of(experts, dtype=torch.float32, activation="gelu_tanh"):
    findings = list(audit.audit(subject_of(experts, dtype, activation)))
    return {finding.name: finding for finding in findings}, audit.verdict(findings)


def contradictions(findings):
    return {name for name, finding in findings.items() if finding.status == "contradicts"}


def invoke(*arguments):
    return CliRunner().invoke(main, ["audit", *arguments])
