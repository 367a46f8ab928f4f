"""Gate order, routing weights, masked ids, determinism and batch invariance."""

import pytest
import torch

from cupymoe import audit
from cupymoe.audit.measured import LAYOUTS, NUM_EXPERTS
from tests.audit.helpers import (
    DTYPES,
    clamped,
    contradictions,
    dropping,
    findings_of,
    mixing,
    noisy,
    not_a_number,
    nothing_but_zeros,
    plain_experts,
    raising,
    subject_of,
    ungated,
    with_layout,
    with_weights,
)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("change", "value"),
    [
        (lambda weights: weights / weights.sum(-1, keepdim=True), "renormalised"),
        (torch.square, "applied twice"),
        (torch.ones_like, "not applied"),
    ],
    ids=["renormalised", "twice", "not applied"],
)
def test_wrong_routing_weights_are_named(change, value, dtype):
    findings, verdict = findings_of(with_weights(change), dtype)
    assert findings["routing weights"].value == value
    assert verdict == "contradicts"


def test_weights_clamped_to_one_are_seen():
    findings, _ = findings_of(with_weights(lambda weights: weights.clamp(max=1)))
    assert findings["routing weights"].status == "contradicts"


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
    findings, _ = findings_of(with_weights(lambda weights: weights.to(cast).float()), dtype)
    name = str(cast).removeprefix("torch.")
    assert findings["routing weights"].value == f"as given, once, rounded to {name}"
    assert findings["routing weights"].status == status


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


@pytest.mark.parametrize(("scale", "status"), [(3e-7, "warn"), (0.3, "contradicts")])
def test_nondeterminism(scale, status):
    findings, _ = findings_of(noisy(scale))
    assert (findings["determinism"].value, findings["determinism"].status) == ("differs", status)


@pytest.mark.parametrize(
    ("scale", "value", "status"),
    [(1e-7, "same to rounding", "warn"), (0.1, "depends on the batch", "contradicts")],
)
def test_batch_dependence(scale, value, status):
    findings, _ = findings_of(mixing(scale))
    assert (findings["batch invariance"].value, findings["batch invariance"].status) == (value, status)


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
