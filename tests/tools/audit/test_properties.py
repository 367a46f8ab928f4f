"""Gate order, routing weights, masked ids, determinism and batch invariance."""

from dataclasses import replace

import pytest
import torch

from cupymoe.tools import audit
from cupymoe.tools.audit.measured import CANDIDATES, LAYOUTS, NUM_EXPERTS, random_case, relative
from tests.tools.audit.helpers import (
    DTYPES,
    clamped,
    contradictions,
    dropping,
    findings_of,
    mixing,
    noisy,
    not_a_number,
    nothing_but_zeros,
    overwriting,
    plain_experts,
    raising,
    sometimes_off,
    spoiling,
    spoiling_all,
    spoiling_by_weight,
    subject_of,
    ungated,
    with_act,
    with_layout,
    with_weights,
)

GELU_TANH = CANDIDATES["gelu_tanh"]


def renormalised(weights):
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "gate first"])
def test_a_wrong_gate_order_is_named(name, dtype):
    findings, verdict = findings_of(with_layout(name), dtype)
    assert verdict == "contradicts"
    assert contradictions(findings) == {"gate order", "rounding"}
    assert findings["gate order"].value == name
    assert findings["activation"].value == "GELU (tanh)"


def test_ungated_experts_are_named():
    findings, verdict = findings_of(ungated)
    assert (findings["gate order"].value, findings["activation"].value) == ("ungated", "GELU (tanh)")
    assert verdict == "contradicts"


@pytest.mark.parametrize(("bend", "value"), [(0.008, "gate first"), (0.011, "unknown")])
def test_up_that_bends_by_two_percent_is_not_affine(bend, value):
    finding = audit.probes.gate_order(subject_of(with_act(lambda gate, up: GELU_TANH(gate, up + bend * up**2))))
    assert finding.value == value


@pytest.mark.parametrize(("share", "value"), [(0.006, "ungated"), (0.008, "gate first")])
def test_up_that_changes_two_percent_is_a_gate_s(share, value):
    finding = audit.probes.gate_order(subject_of(with_act(lambda gate, up: GELU_TANH(gate, 1 + share * up))))
    assert finding.value == value


def test_an_activation_that_is_affine_in_both_has_no_gate_order():
    finding = audit.probes.gate_order(subject_of(with_act(lambda gate, up: gate * up)))
    assert (finding.value, finding.status, finding.measured["layout"]) == ("unknown", "contradicts", None)
    assert finding.detail == "up enters affinely in ['gate first', 'up first']"


def routing_weights_of(change, dtype=torch.float32):
    return audit.probes.routing_weights(subject_of(with_weights(change), dtype), "gate first")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("change", "value"),
    [
        (renormalised, "renormalised"),
        (torch.square, "applied twice"),
        (torch.ones_like, "not applied"),
        (lambda weights: renormalised(weights) ** 2, "renormalised, applied twice"),
        (lambda weights: torch.softmax(weights, -1), "softmax of them"),
    ],
    ids=["renormalised", "twice", "not applied", "renormalised and twice", "softmax"],
)
def test_wrong_routing_weights_are_named(change, value, dtype):
    finding = routing_weights_of(change, dtype)
    assert (finding.value, finding.status) == (value, "contradicts")


def test_weights_clamped_to_one_are_seen():
    assert routing_weights_of(lambda weights: weights.clamp(max=1)).status == "contradicts"


@pytest.mark.parametrize(
    ("noise", "value", "status"),
    [
        (2e-4, "as given, once", "ok"),
        (3e-3, "as given, once", "unclear"),
        (8e-3, "as given, once", "unclear"),
        (3e-2, "unknown", "contradicts"),
    ],
)
def test_noisy_routing_weights_are_no_guess(noise, value, status):
    """A rounding to bfloat16 moves them by 0.2%."""
    finding = routing_weights_of(lambda weights: weights * (1 + noise * torch.randn_like(weights)))
    assert (finding.value, finding.status) == (value, status)


@pytest.mark.parametrize(
    ("dtype", "cast", "status"),
    [
        (torch.float32, torch.bfloat16, "contradicts"),
        (torch.float32, torch.float16, "contradicts"),
        (torch.float16, torch.bfloat16, "contradicts"),
        (torch.bfloat16, torch.bfloat16, "warn"),
    ],
)
def test_rounded_routing_weights_are_named(dtype, cast, status):
    finding = routing_weights_of(lambda weights: weights.to(cast).float(), dtype)
    name = str(cast).removeprefix("torch.")
    assert finding.value == f"as given, once, rounded to {name}"
    assert finding.status == status


@pytest.mark.parametrize(
    ("experts", "of_num_experts", "of_minus_one"),
    [
        (plain_experts, "contributes zero", "contributes zero"),
        (clamped, "computes expert 7", "computes expert 0"),
        (raising, "raises", "raises"),
    ],
)
def test_masked_ids(experts, of_num_experts, of_minus_one):
    findings, verdict = findings_of(experts)
    assert findings[f"masked id {NUM_EXPERTS} (num_experts)"].value == of_num_experts
    assert findings["masked id -1"].value == of_minus_one
    assert verdict == "agrees"


@pytest.mark.parametrize("sentinel", [NUM_EXPERTS, -1])
@pytest.mark.parametrize(
    ("experts", "detail"),
    [
        (spoiling_by_weight, "with weight 0 it contributes zero"),
        (spoiling, "with weight 0 the output is wrong too"),
        (spoiling_all, "with weight 0 the output is wrong too; tokens without a masked pair change too"),
    ],
)
def test_what_a_masked_id_spoils_is_told(experts, detail, sentinel):
    finding = audit.probes.masked_ids(subject_of(experts), sentinel)
    assert (finding.value, finding.status) == ("something else", "warn")
    assert finding.detail.partition("; ")[2] == detail


EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("experts", "status"),
    [
        (noisy(1.5e-7), "warn"),
        (noisy(0.3), "contradicts"),
        (sometimes_off(6 * EPS, 2), "warn"),
        (sometimes_off(10 * EPS, 2), "contradicts"),
    ],
    ids=["noise of roundings", "noise", "off by 6 eps", "off by 10 eps"],
)
def test_nondeterminism(experts, status):
    finding = audit.probes.determinism(subject_of(experts))
    assert (finding.value, finding.status) == ("differs", status)


def test_the_last_of_ten_calls_is_compared():
    finding = audit.probes.determinism(subject_of(sometimes_off(0.1, 10)))
    assert (finding.value, finding.status) == ("differs", "contradicts")
    assert finding.detail.startswith("1 of 9 repeats differ")


def test_what_a_target_does_to_its_arguments_is_not_seen():
    finding = audit.probes.determinism(subject_of(overwriting))
    assert (finding.value, finding.status) == ("same bits", "ok")


def test_a_seed_chooses_the_inputs():
    states = [random_case(replace(subject_of(plain_experts), seed=seed))[0].hidden_states for seed in (0, 0, 1)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("output", "truth", "error"),
    [
        ([0, 0], [0, 0], 0),
        ([3, 4.5], [3, 4], 0.1),
        ([NAN, 4], [3, 4], INFINITY),
        ([INFINITY, 4], [3, 4], INFINITY),
        ([1, 0], [0, 0], INFINITY),
    ],
)
def test_a_relative_error_is_a_number(output, truth, error):
    assert relative(torch.tensor(output).double(), torch.tensor(truth).double()) == pytest.approx(error)


@pytest.mark.parametrize(
    ("scale", "value", "status"),
    [(1e-7, "same to rounding", "warn"), (0.1, "depends on the batch", "contradicts")],
)
def test_batch_dependence(scale, value, status):
    finding = audit.probes.batch_invariance(subject_of(mixing(scale)))
    assert (finding.value, finding.status) == (value, status)


@pytest.mark.parametrize("experts", [not_a_number, nothing_but_zeros])
def test_the_same_wrong_output_is_wrong_and_the_same(experts):
    findings, verdict = findings_of(experts)
    assert verdict == "contradicts"
    for name in ("determinism", "batch invariance"):
        assert (findings[name].value, findings[name].status) == ("same bits", "ok")
    assert "tokens without a masked pair change" not in findings["masked id -1"].detail
    assert findings["masked id -1"].status == ("ok" if experts is nothing_but_zeros else "unclear")


def test_tokens_computed_one_by_one_are_the_same_bits():
    def experts(states, gate_up_proj, down_proj, index, weights):
        rows = zip(states.split(1), index.split(1), weights.split(1), strict=True)
        return torch.cat([plain_experts(one, gate_up_proj, down_proj, *routing) for one, *routing in rows])

    finding = audit.probes.batch_invariance(subject_of(experts))
    assert (finding.value, finding.status) == ("same bits", "ok")


def test_dropped_tokens_are_seen():
    findings, verdict = findings_of(dropping)
    assert verdict == "contradicts"
    assert {"rounding", "batch invariance"} <= contradictions(findings)
