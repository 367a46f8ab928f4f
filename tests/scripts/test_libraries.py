"""The adapters call their packages as the named releases want it, and nothing that goes wrong in one fails a run.

The packages here are stubs over the reference, with the releases' signatures: an unknown or a missing argument fails.
"""

import sys
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from cupymoe import Gemma4MoEConfig, reference
from cupymoe.activation import MoEActivation as Ours
from scripts.benchmarks import experts, libraries
from scripts.benchmarks.peers import Contender, Oracle, make_cases, make_layers, relative_error
from scripts.benchmarks.tables.experts import experts_table, percentiles_table

CONFIG = Gemma4MoEConfig(32, 24, 6, 2, "gelu_pytorch_tanh")
ABSENT = {name: f"{name} is not measured: No module named '{name}'" for name in ("vllm", "sglang", "sonicmoe")}


@pytest.fixture(autouse=True)
def no_package(monkeypatch):
    """None of the three is there, whatever the machine has."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ABSENT]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent, *sys.meta_path])


class _Absent:
    @staticmethod
    def find_spec(name, _path=None, _target=None):
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def put(monkeypatch):
    """Puts a module with these names into sys.modules, and its packages."""

    def put(path, **names):
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            part = ".".join(parts[:i])
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, ModuleType(part))
        for name, value in names.items():
            setattr(sys.modules[path], name, value)

    return put


class VllmActivation(Enum):
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


def put_vllm(put, scale=1.0):
    """vLLM 0.33.0."""

    def fused_experts(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation=None,
        apply_router_weight_on_input=False,
        global_num_experts=-1,
        expert_map=None,
        quant_config=None,
    ):
        assert activation is VllmActivation.GELU_TANH
        assert topk_ids.dtype == torch.int32
        return scale * reference.experts(hidden_states, w1, w2, topk_ids.long(), topk_weights, Ours.GELU_TANH)

    put("vllm.model_executor.layers.fused_moe", fused_experts=fused_experts, MoEActivation=VllmActivation)


class StandardTopKOutput(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


@dataclass
class MoeRunnerConfig:
    num_experts: int | None = None
    num_local_experts: int | None = None
    hidden_size: int | None = None
    intermediate_size_per_partition: int | None = None
    layer_id: int | None = None
    top_k: int | None = None
    num_fused_shared_experts: int | None = None
    params_dtype: torch.dtype | None = None
    routing_method_type: Any = None
    runner_backend: Any = None
    activation: str = "silu"
    is_gated: bool = True
    apply_router_weight_on_input: bool = False
    inplace: bool = True
    no_combine: bool = False
    no_combine_keep_router_weight: bool = False
    routed_scaling_factor: float | None = None
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None
    swiglu_limit: float | None = None
    gate_up_interleaved: bool = True
    layer: Any = None
    use_tp_all_gather_activation: bool = False
    silu_mul_keep_fp32: bool = False


def put_sglang(put):
    """SGLang 0.5.23, which raises until a configuration is published and the group stated."""
    stated: dict[str, Any] = {}

    class ServerArgs:
        def __init__(self, *, model_path):
            self.model_path = model_path

    class ParallelContext:
        def override_permanently(self, **values):
            assert set(values) <= {"tp_group"}
            stated.update(values)

    def publish(server_args, *, role, hf_config=None, ranks=None):
        assert role == "scheduler"
        assert isinstance(server_args, ServerArgs)
        stated["server_args"] = server_args

    def fused_experts(
        hidden_states,
        w1,
        w2,
        topk_output,
        moe_runner_config,
        b1=None,
        b2=None,
        use_fp8_w8a8=False,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=False,
        w1_scale=None,
        w2_scale=None,
        w1_zp=None,
        w2_zp=None,
        a1_scale=None,
        a2_scale=None,
        block_shape=None,
        a1_q=None,
        fuse_swiglu_interleaved=False,
    ):
        assert set(stated) == {"server_args", "tp_group"}
        weights, index, _ = topk_output
        assert index.dtype == torch.int32
        config = moe_runner_config
        assert config.num_experts == config.num_local_experts == len(w2)  # or its kernels look for absent experts
        assert (config.activation, config.is_gated, config.inplace) == ("gelu_tanh", True, False)
        return reference.experts(hidden_states, w1, w2, index.long(), weights, Ours.GELU_TANH)

    put("sglang.srt.layers.moe.fused_moe_triton", fused_experts=fused_experts)
    put("sglang.srt.layers.moe.moe_runner", MoeRunnerConfig=MoeRunnerConfig)
    put("sglang.srt.layers.moe.topk", StandardTopKOutput=StandardTopKOutput)
    put("sglang.srt.runtime_context", publish=publish, get_parallel=ParallelContext)
    put("sglang.srt.server_args", ServerArgs=ServerArgs)


class SonicActivation(Enum):
    SWIGLU = "swiglu"
    GEGLU = "geglu"


def put_sonicmoe(put):
    """sonic-moe 0.1.2.post1."""

    def moe_general_routing_inputs(
        x,
        router_scores,
        token_indices,
        expert_indices,
        w1,
        b1,
        w2,
        b2,
        E,
        stream_id,
        activation_type,
        is_inference_mode_enabled=False,
        concat_layout=False,
    ):
        assert activation_type is SonicActivation.GEGLU
        assert is_inference_mode_enabled
        assert concat_layout
        assert b1 is None
        assert b2 is None
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        assert (token_indices.diff() >= 0).all()
        w1, w2 = w1.permute(2, 0, 1), w2.permute(2, 0, 1)  # it wants the expert last, with the largest stride
        assert w1.is_contiguous()
        assert w2.is_contiguous()
        assert len(w1) == len(w2) == E
        pairs = reference.experts(
            x[token_indices.long()], w1, w2, expert_indices.long()[:, None], router_scores[:, None], Ours.GELU_TANH
        )
        output = torch.zeros_like(x, dtype=torch.float32).index_add_(0, token_indices.long(), pairs.float())
        return output.to(x.dtype), torch.bincount(expert_indices, minlength=E)

    put("sonicmoe", moe_general_routing_inputs=moe_general_routing_inputs)
    put("sonicmoe.enums", ActivationType=SonicActivation)


STUBS = {"vllm": put_vllm, "sglang": put_sglang, "sonicmoe": put_sonicmoe}


def measured():
    _, layers = make_layers(CONFIG, "cpu")
    return layers, *libraries.installed_contenders(CONFIG, layers)


def test_says_so_where_no_package_is_installed():
    _, found, notes = measured()
    assert not found
    assert notes == list(ABSENT.values())


@pytest.mark.parametrize("name", STUBS)
def test_calls_its_package_as_the_release_wants_it(put, name):
    STUBS[name](put)
    layers, found, notes = measured()
    assert notes == [note for absent, note in ABSENT.items() if absent != name]
    (case, *_) = make_cases(CONFIG, layers, 37)
    before = [argument.clone() for argument in (*case.inputs, *case.weights)]
    call = found[name].bind(case)
    for _ in range(2):
        assert relative_error([Oracle.of(CONFIG, case)], [call()]) < 0.01
    assert all(map(torch.equal, before, (*case.inputs, *case.weights)))


def test_a_wrong_result_is_not_measured(put):
    put_vllm(put, scale=1.02)
    _, found, notes = measured()
    assert not found
    assert notes[0].startswith("vllm is not measured: a relative error of 0.02")


def _raise(error):
    def raising(*_arguments, **_keywords):
        raise error

    return raising


@pytest.mark.parametrize(
    ("fused_experts", "note"),
    [
        (_raise(RuntimeError("no kernel image\nfor this device")), "RuntimeError: no kernel image"),
        (_raise(AssertionError()), "AssertionError: "),
        (lambda hidden_states: hidden_states, "TypeError: "),
        (lambda **_: None, "TypeError: "),
        (lambda hidden_states, **_: hidden_states * float("nan"), "a relative error of nan at T=1, above 0.01"),
    ],
    ids=["raises", "raises nothing readable", "other signature", "returns nothing", "nan"],
)
def test_what_goes_wrong_in_a_call_is_a_note(put, fused_experts, note):
    put("vllm.model_executor.layers.fused_moe", fused_experts=fused_experts, MoEActivation=VllmActivation)
    _, found, notes = measured()
    assert not found
    assert notes[0].startswith(f"vllm is not measured: {note}")
    assert notes[1:] == [ABSENT["sglang"], ABSENT["sonicmoe"]]


def test_another_release_without_the_name_is_a_note(put):
    put("vllm.model_executor.layers.fused_moe", fused_experts=None)
    _, found, notes = measured()
    assert not found
    assert notes[0].startswith("vllm is not measured: ImportError: cannot import name 'MoEActivation'")


class FakeGraph:
    """Calls made once each replay, into the outputs of the first."""

    def __init__(self, calls):
        self.calls, self.outputs, self.graph = calls, [call() for call in calls], self

    def replay(self):
        for call, output in zip(self.calls, self.outputs, strict=True):
            output.copy_(call())


@pytest.fixture
def bench_of(monkeypatch):
    """A Bench on the CPU, whose graphs are plain calls."""
    monkeypatch.setattr(experts, "capture", FakeGraph)
    monkeypatch.setattr(experts, "ERROR_LIMIT", 0.01)

    def make(imported=None):
        return experts.Bench(CONFIG, torch.device("cpu"), imported or {}, installed=True)

    return make


def captured(bench, tokens):
    cases = make_cases(CONFIG, bench.layers, tokens)
    peers = {name: each for name, each in bench.contenders(cases).items() if name in ("cupymoe", "vllm")}
    return bench.captured(peers, cases, [Oracle.of(CONFIG, case) for case in cases])


@pytest.mark.parametrize("wrong", ["raises", "is off"])
def test_a_package_that_goes_wrong_at_more_tokens_leaves_and_the_run_goes_on(put, bench_of, capsys, wrong):
    put_vllm(put)
    module = sys.modules["vllm.model_executor.layers.fused_moe"]
    right = module.fused_experts

    def up_to_four(hidden_states, **keywords):
        if len(hidden_states) <= 4:
            return right(hidden_states, **keywords)
        if wrong == "raises":
            raise MemoryError("too large")
        return 2 * right(hidden_states, **keywords)

    module.fused_experts = up_to_four
    bench = bench_of()
    for tokens, names in ((4, {"cupymoe", "vllm"}), (5, {"cupymoe"}), (3, {"cupymoe"})):
        graphs, errors = captured(bench, tokens)
        assert set(graphs) == set(errors) == names
    assert not bench.failures
    said = "failed at T=5: MemoryError: too large" if wrong == "raises" else "has a relative error of 1.00"
    assert f"vllm is not measured from here on: vllm {said}" in capsys.readouterr().out


def test_a_peer_asked_for_by_that_name_takes_its_place_and_may_fail_the_run(put, bench_of):
    put_vllm(put)
    bench = bench_of({"vllm": Contender(lambda case: lambda: torch.zeros_like(case.inputs.hidden_states))})
    captured(bench, 3)
    assert any("vllm has a relative error of 1.00" in failure for failure in bench.failures)


def test_the_tables_and_the_plot_take_peers_that_leave():
    from scripts.readme_plot import figure

    def row(tokens, *names):
        ms = {name: {"p20": 0.1, "p50": 0.2, "p80": 0.3} for name in ("cupymoe", *names)}
        return {"tokens": tokens, "floor_ms": 0.1, "ms": ms, "error": dict.fromkeys(ms, 0.003)}

    report = {"device": "GPU", "date": "2026-11-25", "rows": [row(1, *STUBS), row(4, "sglang")]}
    header, _, first, second = experts_table(report).splitlines()
    assert all(f"{name} us" in header for name in STUBS)
    assert first.count("(1.00x)") == 3
    assert second.count("(1.00x)") == 1
    assert percentiles_table(report).count("sglang") == 2
    assert [line.get_label() for line in figure(report).axes[0].lines][:4] == ["cupymoe", *STUBS]
