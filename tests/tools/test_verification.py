"""cupymoe verify: what it runs, and what it says."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from cupymoe import Gemma4Router, MoEActivation, moe_activation, reference
from cupymoe.backends.reference import ReferenceBackend
from cupymoe.kernels.arch import ARCHITECTURES
from cupymoe.kernels.jit import CompileError
from cupymoe.token_counts import NUM_TOKENS
from cupymoe.tools import audit, verification
from cupymoe.tools.cli import main
from cupymoe.tools.verification import activations, batched, compilation, experts, routing, transformers_peer
from cupymoe.tools.verification.experts import Errors
from cupymoe.tools.verification.result import SHAPES, Setting
from tests.helpers import ROOT, transformers_gemma4

MANY = 1500  # more than float64 computes


def small(device, dtype=torch.bfloat16):
    return Setting(SHAPES["small"], dtype, 0, torch.device(device))


def outcomes(results, pattern):
    return {result.name: result.status for result in results if re.search(pattern, result.name)}


@pytest.mark.parametrize("sizes", [(12001, 2**20), (12001,), (2**20,)], ids=["always", "on a grid", "on normal gates"])
def test_erf_in_place_of_tanh_is_seen(monkeypatch, sizes):
    def erf(activation, gates):
        return moe_activation(MoEActivation.GELU_NO_MUL if gates.numel() in sizes else activation, gates)

    monkeypatch.setattr(activations, "moe_activation", erf)
    assert activations._erf_is_not_tanh("reference", torch.float64, torch.device("cpu")).status == "fail"


def test_a_definition_that_is_off_by_little_is_seen(monkeypatch):
    right = activations._definition

    def wrong(activation, gate, up):
        return right(activation, gate, up) + 2e-12 * (activation is MoEActivation.GELU_TANH)

    monkeypatch.setattr(activations, "_definition", wrong)
    assert activations._definitions().status == "fail"


def test_a_function_without_a_second_wording_is_not_taken_for_another():
    new = SimpleNamespace(function="NEW", name="NEW")
    with pytest.raises(NotImplementedError, match="no second wording of NEW"):
        activations._definition(new, torch.ones(1), torch.ones(1))


@pytest.mark.parametrize(
    ("dtype", "steps", "status"),
    [(torch.bfloat16, 0, "pass"), (torch.bfloat16, 1, "fail"), (torch.float32, 1, "pass"), (torch.float32, 5, "fail")],
)
def test_an_activation_may_be_half_a_place_off_in_16_bits_and_four_places_in_float32(monkeypatch, dtype, steps, status):
    def wrong(activation, input):
        output = moe_activation(activation, input)
        for _ in range(steps):
            output = torch.nextafter(output, torch.zeros_like(output))
        return output

    monkeypatch.setattr(activations, "moe_activation", wrong)
    assert activations._member(MoEActivation.RELU2, small("cpu", dtype)).status == status


@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 65280), (torch.float16, 63488)])
def test_every_finite_gate_of_16_bits_is_tried(dtype, count):
    gates = activations._gates(small("cpu", dtype))
    assert gates.isfinite().all()
    assert gates.numel() == gates.view(torch.int16).unique().numel() == count


def other_experts(weights, index):
    return weights, torch.cat((index[:, :-1], index[:, :1]), -1)


def other_weights(weights, index):
    return weights * (1 + 1e-5), index


@pytest.mark.parametrize("wrong", [other_experts, other_weights])
def test_a_routing_that_is_not_float64_s_is_seen(monkeypatch, wrong):
    right = routing.route
    monkeypatch.setattr(routing, "route", lambda *args, **kwargs: wrong(*right(*args, **kwargs)))
    assert outcomes(routing.checks(small("cpu")), "float64") == {"routing against float64": "fail"}


@pytest.mark.parametrize("wrong", [other_experts, other_weights])
def test_a_routing_that_is_not_transformers_is_seen(monkeypatch, wrong):
    transformers_gemma4()
    right = Gemma4Router._route
    monkeypatch.setattr(Gemma4Router, "_route", lambda self, logits: wrong(*right(self, logits)))
    assert routing._against_transformers(small("cpu")).status == "fail"


def no_transformers(monkeypatch):
    monkeypatch.setattr(transformers_peer, "find_spec", lambda name: None)


def no_gemma4(monkeypatch):
    transformers_gemma4()
    monkeypatch.setitem(sys.modules, "transformers.models.gemma4", None)


@pytest.mark.parametrize(
    ("remove", "reason"),
    [
        (no_transformers, "transformers is not installed"),
        (no_gemma4, "this transformers has no Gemma 4: "),
    ],
)
def test_without_transformers_there_is_float64_still(monkeypatch, remove, reason):
    remove(monkeypatch)
    compared = routing._against_transformers(small("cpu"))
    assert compared.status == "skipped"
    assert compared.detail.startswith(reason)
    result = list(experts._against_float64(small("cpu"), 16))[-1]
    assert result.status == "pass"
    assert "transformers" not in result.detail


@pytest.mark.parametrize(
    ("errors", "dtype", "peer", "within"),
    [
        (Errors(0.004, 2.5, 0.5), torch.bfloat16, Errors(0.004, 1.0, 9.0), True),
        (Errors(0.004, 2.6, 0.5), torch.bfloat16, Errors(0.004, 1.0, 9.0), False),
        (Errors(0.004, 2.6, 0.5), torch.bfloat16, None, True),
        (Errors(0.005, 1.0, 0.5), torch.bfloat16, None, False),
        (Errors(0.0005, 1.0, 0.5), torch.float16, None, True),
        (Errors(0.0006, 1.0, 0.5), torch.float16, None, False),
        (Errors(9e-6, 1.0, 0.5), torch.float32, None, True),
        (Errors(2e-5, 1.0, 0.5), torch.float32, None, False),
        (Errors(float("nan"), 1.0, 0.5), torch.bfloat16, None, False),
        (Errors(0.004, float("nan"), 0.5), torch.bfloat16, None, False),
    ],
)
def test_errors_within_bounds(errors, dtype, peer, within):
    assert errors.within_bounds(dtype, peer) is within


def test_sums_in_another_order_may_differ_by_eight_float32_epsilons_of_the_largest_element():
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert Errors.of(truth, truth) == Errors(0.0, 0.0, 2.0**-18)


@pytest.fixture
def _many(monkeypatch):
    """Many tokens on the CPU, as on a GPU."""
    monkeypatch.setattr(experts, "token_counts", lambda setting: (64, MANY))


def test_a_gpu_is_checked_in_every_regime_of_the_kernels():
    assert experts.token_counts(small("cpu")) == (1, 7, 64)
    counts = experts.token_counts(small("cuda"))
    assert {1, 7, 64, *NUM_TOKENS} == set(counts)
    assert sorted(counts) == list(counts)


@pytest.mark.usefixtures("_many")
def test_many_tokens_are_checked_as_few_are(monkeypatch):
    computed = []

    def recorded(states, *rest):
        computed.append((states.dtype, len(states)))
        return reference.experts(states, *rest)

    monkeypatch.setattr(experts, "reference", SimpleNamespace(experts=recorded))
    results = list(experts.checks(small("cpu")))
    assert computed == [(torch.float64, 64), (torch.float64, 1024)]
    assert outcomes(results, r"\(reference\)") == {
        f"{name}, T = {num_tokens} (reference)": "pass"
        for name in ("experts against float64", "same bits every run")
        for num_tokens in (64, MANY)
    }
    assert outcomes(results, "replay") == {
        f"CUDA-graph replay gives the eager bits, T = {num_tokens}": "skipped" for num_tokens in (64, MANY)
    }


def test_few_tokens_are_compared_over_several_calls(monkeypatch):
    """The error of one token scatters by a tenth; the calls stay as small as the check says."""
    right, calls, compared = ReferenceBackend.forward, [], []

    def recorded(self, call, *rest):
        calls.append(call.num_tokens)
        return right(self, call, *rest)

    def oracle(states, *rest):
        compared.append(len(states))
        return reference.experts(states, *rest)

    monkeypatch.setattr(ReferenceBackend, "forward", recorded)
    monkeypatch.setattr(experts, "reference", SimpleNamespace(experts=oracle))
    for num_tokens, count in ((1, 16), (7, 3), (16, 1), (64, 1)):
        assert [result.status for result in experts._against_float64(small("cpu"), num_tokens)][-1] == "pass"
        assert calls == [num_tokens] * count
        assert compared == [num_tokens * count]
        calls.clear(), compared.clear()


@pytest.mark.usefixtures("_many")
@pytest.mark.parametrize("tokens", [slice(0, 100), slice(MANY - 100, MANY)], ids=["first", "last"])
def test_a_fault_of_some_of_many_tokens_is_seen(monkeypatch, tokens):
    """Though float64 computes a part of them only."""
    right = ReferenceBackend.forward

    def wrong(self, *arguments):
        output = right(self, *arguments)
        if len(output) == MANY:
            output[tokens] = 0
        return output

    monkeypatch.setattr(ReferenceBackend, "forward", wrong)
    assert outcomes(experts.checks(small("cpu")), r"float64.*\(reference\)") == {
        "experts against float64, T = 64 (reference)": "pass",
        f"experts against float64, T = {MANY} (reference)": "fail",
    }


@pytest.mark.usefixtures("_many")
def test_a_result_that_changes_with_many_tokens_alone_is_seen(monkeypatch):
    right = ReferenceBackend.forward

    def wrong(self, *arguments):
        output = right(self, *arguments)
        return output * (1 + torch.rand(())) if len(output) == MANY else output

    monkeypatch.setattr(ReferenceBackend, "forward", wrong)
    assert outcomes(experts.checks(small("cpu")), "same bits") == {
        "same bits every run, T = 64 (reference)": "pass",
        f"same bits every run, T = {MANY} (reference)": "fail",
    }


BATCH = "a batch with room for 8 rows of each expert against float64"


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        (lambda out, counts: None, "pass"),
        (lambda out, counts: out[int(counts.argmax()), 0].mul_(3), "fail"),
        (lambda out, counts: out[int(counts.argmin()), -1].add_(1), "fail"),
    ],
    ids=["right", "a row wrong", "a row written that does not count"],
)
def test_a_batch_is_compared_and_other_rows_are_looked_at(monkeypatch, wrong, status):
    right = batched.batched_experts

    def faulty(states, counts, *weights, out, **settings):
        right(states, counts, *weights, out=out, **settings)
        wrong(out, counts)

    monkeypatch.setattr(batched, "batched_experts", faulty)
    assert outcomes(batched.checks(small("cpu")), "batch") == {BATCH: status}


@pytest.mark.parametrize("changes", [False, True])
def test_a_token_whose_bits_depend_on_the_others_is_seen(monkeypatch, changes):
    right = ReferenceBackend.forward

    def forward(self, call, *arguments):
        output = right(self, call, *arguments)
        return output * 1.01 if changes and call.is_invariant() and call.num_tokens == 7 else output

    monkeypatch.setattr(ReferenceBackend, "forward", forward)
    name = "a token has the bits of any other call where numerics are invariant"
    assert outcomes(experts.checks(small("cpu")), "invariant") == {name: "fail" if changes else "pass"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_pass_in_every_regime(dtype):
    with torch.inference_mode():
        results = [*experts.checks(small("cuda", dtype)), *batched.checks(small("cuda", dtype))]
    assert [result for result in results if result.status == "fail"] == []
    assert len(outcomes(results, r"float64.*\(reference\)")) == len({1, 7, 64, *NUM_TOKENS})
    assert len(outcomes(results, "replay")) == 2


def test_the_readme_s_counts_are_verify_s(monkeypatch):
    """On a machine without a GPU; nothing is compiled here, which takes a minute."""
    transformers_gemma4()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compilation, "compile_offline", lambda *job: SimpleNamespace(spill_bytes=0, registers=1))
    result = CliRunner().invoke(main, ["verify", "--shape", "small"])
    assert result.exit_code == 0, result.output
    assert f" `{result.output.splitlines()[-1]}`." in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "module", "name"), [(["verify"], verification, "run"), (["audit", "cupymoe"], audit, "audit")]
)
def test_a_seed_is_that_of_the_random_inputs(monkeypatch, command, module, name):
    seeds = []

    def run(setting, *rest):
        seeds.append(setting.generator().initial_seed())
        return []

    monkeypatch.setattr(module, name, run)
    result = CliRunner().invoke(main, [*command, "--seed", str(2**63 - 1)])
    assert result.exit_code == 0, result.output
    assert seeds == [2**63 - 1]


@pytest.mark.parametrize("seed", [str(10**22), str(2**63), "-1"])
def test_seeds_out_of_range(seed):
    for command in (["verify"], ["audit", "cupymoe"]):
        result = CliRunner().invoke(main, [*command, "--seed", seed])
        assert result.exit_code == 2
        assert f"Invalid value for '--seed': {seed} is not in the range" in result.output


@pytest.mark.parametrize(
    "silent", [["sm_90a"], [arch.name for arch in ARCHITECTURES]], ids=["of one architecture", "of all"]
)
def test_a_compiler_that_says_nothing_of_registers_is_no_pass(monkeypatch, silent):
    """NVRTC's log is empty where it took a cubin from a cache."""

    def compile_offline(variant, arch):
        return SimpleNamespace(spill_bytes=0, registers=0 if arch in silent else 9)

    monkeypatch.setattr(compilation, "compile_offline", compile_offline)
    results = list(compilation.checks(SimpleNamespace(on_gpu=False)))
    assert {result.status for result in results} == {"fail"}
    assert "nothing of registers" in results[0].detail


def test_a_kernel_that_spills_for_one_architecture_is_no_pass(monkeypatch):
    def compile_offline(variant, arch):
        return SimpleNamespace(spill_bytes=4 * (arch == "sm_90a"), registers=9)

    monkeypatch.setattr(compilation, "compile_offline", compile_offline)
    assert {result.status for result in compilation.checks(SimpleNamespace(on_gpu=False))} == {"fail"}


@pytest.mark.parametrize(
    ("error", "status"), [(CompileError("no such type"), "fail"), (ImportError("no NVRTC"), "skipped")]
)
def test_what_is_not_compiled_is_no_pass(monkeypatch, error, status):
    def compile_offline(variant, arch):
        raise error

    monkeypatch.setattr(compilation, "compile_offline", compile_offline)
    results = list(compilation.checks(SimpleNamespace(on_gpu=False)))
    assert {(result.status, result.detail) for result in results} == {(status, str(error))}
