"""bench.py without a GPU: what it refuses, and that a peer's function gets what the experts are given."""

import json
import weakref
from types import SimpleNamespace

import click
import pytest
import torch
from click.testing import CliRunner

from cupymoe import Gemma4MoEConfig, reference
from cupymoe.backends import registry
from cupymoe.kernels import jit
from cupymoe.tools.reports import kernel_hashes
from scripts import bench
from scripts.benchmarks import (
    batched,
    experts,
    invariance,
    lora,
    peers,
    portable,
    quantised,
    report,
    timing,
    training,
)
from scripts.benchmarks.tables.other_calls import batched_table, portable_table, quantised_table
from scripts.benchmarks.tables.training import training_host_table
from tests.helpers import ROOT
from tests.scripts.replayed import Replayed

CONFIG = Gemma4MoEConfig(32, 24, 6, 2, "gelu_pytorch_tanh")


def peer(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights):
    return reference.experts(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, CONFIG.activation)


def test_a_peer_is_called_with_the_case():
    _, layers = peers.make_layers(CONFIG, "cpu")
    cases = peers.make_cases(CONFIG, layers, 5)
    contender = peers.imported_contender(f"{__name__}:peer", CONFIG)
    for case in cases:
        inputs = case.inputs
        assert torch.equal(
            contender.bind(case)(),
            peer(inputs.hidden_states, *case.weights, inputs.top_k_index, inputs.top_k_weights),
        )


@pytest.mark.parametrize("routing", [None, "one expert has a quarter of the pairs", "four experts"])
def test_routings(routing):
    config = Gemma4MoEConfig(32, 24, 64, 8, "gelu_pytorch_tanh")
    index = peers.make_cases(config, peers.make_layers(config, "cpu")[1], 400, routing)[0].inputs.top_k_index
    share = (index == 0).float().mean().item()
    if routing is None:
        assert all(len(set(row)) == 8 for row in index.tolist())
        assert share < 0.05
    elif routing == "four experts":
        assert set(index.flatten().tolist()) == {0, 1, 2, 3}
    else:
        assert 0.25 <= share < 0.3


@pytest.mark.parametrize("value", ["vllm", "=a.b:c", "vllm=", "cupymoe:mine=a.b:c"])
def test_refuses_a_peer_without_name_or_function(value):
    result = CliRunner().invoke(bench.main, ["--peer", value])
    assert result.exit_code == 2
    assert "must be NAME=package.module:function" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_says_that_it_needs_a_gpu():
    result = CliRunner().invoke(bench.main, [])
    assert result.exit_code == 1
    assert "measures a CUDA GPU, and torch sees none" in result.output


REPORTS = ROOT / "benchmarks" / "nvidia-h200"
SHOWN = {
    "decode": ("skewed", "percentiles", "experts"),
    "prefill": ("skewed", "memory", "percentiles", "experts"),
    "sweep": ("ways",),
    "lora": ("lora",),
    "training": ("training",),
    "portable": ("portable",),
}


@pytest.mark.parametrize("regime", SHOWN)
@pytest.mark.parametrize("failures", [[], ["a contender was wrong"]])
def test_a_regime_shows_its_tables_and_writes_its_report_if_nothing_was_wrong(monkeypatch, tmp_path, regime, failures):
    report = json.loads((REPORTS / f"{regime}.json").read_text(encoding="utf-8"))

    class Bench:
        def __init__(self, config, device, imported, installed, layers):
            self.failures = failures

        def experts(self, *tokens, **settings):
            return {key: report[key] for key in ("rows", "skewed") if key in report}

        def memory(self, tokens):
            return report["memory"]

        def sweep(self, tokens):
            return {"rows": report["rows"]}

    monkeypatch.setattr(bench, "Bench", Bench)
    for name in ("lora", "training", "portable"):
        monkeypatch.setattr(bench, f"measure_{name}", lambda bench, tokens=None: report)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    result = CliRunner().invoke(bench.main, ["--regime", regime, "--output", str(tmp_path)])
    assert result.exit_code == bool(failures), result.output
    places = [result.output.index(getattr(bench, f"{name}_table")(report)) for name in SHOWN[regime]]
    assert places == sorted(places)
    assert [path.name for path in tmp_path.glob("*/*")] == ([] if failures else [f"{regime}.json"])


@pytest.fixture
def built():
    """A Bench on the CPU, without what a GPU is measured for."""
    built = object.__new__(experts.Bench)
    built.config, built.failures = CONFIG, []
    built.layers = peers.make_layers(CONFIG, "cpu")[1]
    return built


def test_every_build_is_timed_beside_hopper_and_its_peers(built, monkeypatch):
    def contender(factor):
        return portable.Contender(
            lambda case: lambda: factor * peer(case.inputs.hidden_states, *case.weights, *case.inputs[1:])
        )

    others = {name: contender(1.0) for name in ("cupymoe", "cupymoe:fused", "cupymoe:grouped", "grouped_mm")}
    factors = {"cupymoe:sm_80": 1.0, "cupymoe:sm_86": 1.02, "cupymoe:sm_120": 1.0}
    monkeypatch.setattr(built, "contenders", lambda cases: others, raising=False)
    monkeypatch.setattr(built, "optional", set(), raising=False)
    monkeypatch.setattr(portable, "builds", lambda _: {name: contender(by) for name, by in factors.items()})
    monkeypatch.setattr(experts, "capture", Replayed)
    times = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    monkeypatch.setattr(portable, "time_in_turn", lambda captured: dict.fromkeys(captured, times))
    rows = portable.measure_rows(built, (3, 5))
    assert [(row["build"], row["tokens"]) for row in rows] == [
        (build, tokens) for tokens in (3, 5) for build in ("sm_80", "sm_86", "sm_120")
    ]
    for row in rows:
        assert list(row["ms"]) == ["cupymoe", "hopper", "grouped", "grouped_mm"]
        assert 0 < row["floor_ms"] < 1
    assert [failure.partition(" has")[0] for failure in built.failures] == ["cupymoe:sm_86"] * 2
    assert "| sm_86" in portable_table({"rows": rows}).replace("|  ", "| ")


def test_builds_are_timed_on_hopper_only(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    with pytest.raises(click.ClickException, match="on a Hopper card, and this one is sm_86"):
        portable.measure_portable(built)


def test_quantised_experts_are_timed_beside_bf16_ones_and_their_own_truth(built, monkeypatch):
    from cupymoe import quantize

    class Backend:
        """The reference in the place of the fused backend, which needs a GPU."""

        def __init__(self, build=None):
            self.build = build

        def way(self, call):
            return "tiles of nothing" if call.num_tokens > 4 else "weight stream"

        def forward(self, call, tensors):
            return registry()["reference"].forward(call, tensors)

    monkeypatch.setattr(built, "config", Gemma4MoEConfig(64, 64, 6, 2, "gelu_pytorch_tanh"))
    monkeypatch.setattr(built, "layers", peers.make_layers(built.config, "cpu")[1])
    monkeypatch.setattr(quantised, "FusedBackend", Backend)
    monkeypatch.setattr(quantised, "capture", Replayed)
    times = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    monkeypatch.setattr(quantised, "time_in_turn", lambda captured: dict.fromkeys(captured, times))
    layers = quantised.Quantised(built, "int4_g32", lambda layer: quantize(*layer, "int4", group_size=(64, 32)))
    rows = [row for tokens in (3, 200) for row in layers.rows(tokens)]
    assert [(row["build"], row["tokens"], row["way"]) for row in rows] == [
        ("sm_90a", 3, "stream"),
        ("sm_86", 3, "stream"),
        ("sm_90a", 200, "tiles"),
    ]
    for row in rows:
        assert 0 < row["error"]["cupymoe"] < 0.003
        assert 0 < row["error"]["cupymoe:bf16"] < 0.003
        assert 0 < row["floor_ms"] < 0.01
    # 4 bits of 192 x 64 codes and 2 bytes of each 64 or 32 of them, of six experts.
    (up, down) = layers.weights[0]
    assert quantised.bytes_of_expert(up) + quantised.bytes_of_expert(down) == 128 * 34 + 64 * 36
    assert not built.failures
    table = quantised_table({"rows": rows})
    assert "int4_g32 (x floor)" in table
    assert "| sm_90a |    200 |" in table


def test_batches_are_timed_beside_packed_rows_and_torch(built, monkeypatch):
    """Errors are of rows that count, wherever they lie; here of projections alone that are 1% off."""

    def packed(batch):
        output = batched.ours(built.config, batch)()
        return lambda: 1.01 * output[batch.counted]

    monkeypatch.setattr(batched, "all_gemms", lambda config, batches: list(map(packed, batches)))
    monkeypatch.setattr(batched, "capture", Replayed)
    times = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    monkeypatch.setattr(batched, "time_in_turn", lambda captured: dict.fromkeys(captured, times))
    rows = [batched.measure_row(built, tokens, room) for tokens, room in ((1, 2), (5, 16))]
    for row in rows:
        assert list(row["ms"]) == ["cupymoe", "gemms", "bmm"]
        assert 0 < row["error"]["cupymoe"] < 0.004
        assert 0 < row["error"]["bmm"] < 0.01
    assert [failure.partition(" has")[0] for failure in built.failures] == ["gemms"] * 2
    assert "| 16 | 2000 (1.000 x gemms) |" in " ".join(batched_table({"rows": rows}).split())


def test_batches_are_timed_on_hopper_only(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    with pytest.raises(click.ClickException, match="on Hopper's cards, not on one of sm_86"):
        batched.measure_batched(built)


def test_formats_are_for_the_quantised_regime():
    result = CliRunner().invoke(bench.main, ["--formats", "fp8", "--regime", "decode"])
    assert result.exit_code == 2
    assert "--formats is for --regime quantised, not for decode" in result.output
    result = CliRunner().invoke(bench.main, ["--formats", "fp7", "--regime", "quantised"])
    assert "must be of int4_g32, int4_g128, fp8, nvfp4, int8, got 'fp7'" in " ".join(result.output.split())


def test_errors_of_lora_are_judged_as_our_own(built, monkeypatch):
    """By a limit below a peer's; here of a call that is 0.8% off."""
    from cupymoe.integrations import peft as integration

    monkeypatch.setattr(lora, "TOKENS", (3,))
    monkeypatch.setattr(lora, "capture", Replayed)
    monkeypatch.setattr(lora, "time_in_turn", lambda captured: {})
    monkeypatch.setattr(lora, "refresh_us", lambda experts: {"p50": 0.0})
    kept = integration.lora_experts
    found = lora.measure_lora(built)
    assert built.failures == []
    assert [(row["tokens"], row["adapters"]) for row in found["rows"]] == [(3, "fp32"), (3, "bf16")]
    monkeypatch.setattr(integration, "lora_experts", lambda *a, **k: kept(*a, **k) * 1.008)
    lora.measure_lora(built)
    wrong = [failure.partition(" has")[0] for failure in built.failures]
    assert wrong == ["cupymoe with fp32 adapters", "cupymoe with bf16 adapters"]
    assert built.failures[0].endswith(f"at T=3, above {lora.ERROR_LIMIT}")


def test_errors_of_gradients_are_judged(built, monkeypatch):
    """By float64, of some tokens and experts; here of gradients that are 2% off."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(training, "TOKENS", (70,))
    monkeypatch.setattr(training, "measure_step", lambda step, grad: {"ms": {}})
    found = training.measure_rows(built)
    assert built.failures == []
    assert [row["mode"] for row in found] == ["full", "frozen", "lora"]
    names = {"hidden_states", "top_k_weights"}
    factors = {"gate_up_a", "gate_up_b", "down_a", "down_b"}
    for row, more in zip(found, ({"gate_up_proj", "down_proj"}, set(), factors), strict=True):
        for errors in row["error"].values():
            assert errors.keys() == names | more
            assert all(0 < error < 0.008 for error in errors.values())
    for name in ("fused_experts", "lora_experts"):
        kept = getattr(training, name)
        monkeypatch.setattr(training, name, lambda *a, kept=kept, **k: kept(*a, **k) * 1.02)
    training.measure_rows(built)
    assert len(built.failures) == 4 + 2 + 6
    assert built.failures[0].startswith("cupymoe's gradient of hidden_states has a relative error of 0.02")
    assert built.failures[0].endswith(f"at T=70, full, above {training.ERROR_LIMIT}")


# Milliseconds, computed by hand from each product's FLOPs and bytes.
FLOORS = {
    1024: (1.62, 1.11, 1.12),
    4096: (2.00, 1.44, 1.47),
    8192: (3.26, 2.27, 2.33),
    16384: (6.53, 4.53, 4.66),
    32768: (13.1, 9.06, 9.31),
}


@pytest.mark.parametrize("tokens", FLOORS)
def test_the_floor_of_a_training_step(tokens):
    config = Gemma4MoEConfig.gemma4_26b_a4b()
    found = [float(f"{training.floor_ms(config, tokens, mode):.3g}") for mode in training.MODES]
    assert found == list(FLOORS[tokens])


class Clock:
    """Stands for the GPU's: each event is a moment later, and one after a synchronisation another ten, as the first of
    a block is."""

    def __init__(self, monkeypatch):
        clock = self
        self.now, self.synchronisations, self.is_idle = 0, 0, False

        class Event:
            def __init__(self, **_):
                pass

            def record(self):
                clock.now += 1
                self.at = clock.now
                clock.now += 10 * clock.is_idle
                clock.is_idle = False

            def elapsed_time(self, other):
                return float(other.at - self.at)

        def synchronize():
            self.synchronisations += 1
            self.is_idle = True

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


@pytest.fixture
def training_step(built):
    pytest.importorskip("transformers")
    case = peers.make_cases(CONFIG, built.layers, 70)[0]
    return training.Step.of(case, CONFIG, None, "full"), torch.randn_like(case.inputs.hidden_states)


def test_training_steps_follow_each_other_in_blocks(training_step, monkeypatch):
    """Nothing waits for the GPU within one; its first step is told by itself; the contenders take turns."""
    clock = Clock(monkeypatch)
    step, grad = training_step
    calls, alive = [], []

    def spied(name, way):
        def forward():
            assert all(output() is None for output in alive)  # what a step gave is freed before the next one
            output = way.forward()
            alive[:] = [weakref.ref(output)]
            calls.append((name, clock.synchronisations))
            return output

        return way._replace(forward=forward)

    step = training.Step(*(spied(name, way) for name, way in step._asdict().items()))
    monkeypatch.setattr(training, "BLOCKS", 2)
    found = training.time_blocks(step, grad, training.recorded_event, torch.cuda.Event.elapsed_time)
    assert [name for name, _ in calls] == ([*["cupymoe"] * 6, *["grouped_mm"] * 6] * 3)
    assert all(len({at for _, at in calls[start : start + 6]}) == 1 for start in range(0, len(calls), 6))
    assert len({at for _, at in calls}) == 6
    assert found.keys() == {"cupymoe", "grouped_mm"}
    for parts in found.values():
        assert {part: (ms["p20"], ms["p80"]) for part, ms in parts.items()} == {
            "forward": (1.0, 1.0),
            "backward": (1.0, 1.0),
            "step": (2.0, 2.0),
            "alone": (12.0, 12.0),
        }


def test_a_training_step_s_memory(training_step, monkeypatch):
    """Against counters of a GPU that this machine may not have: the output is not kept."""
    allocated = iter([7_000_000, 8_000_000 + 70 * 32 * 2] * 2)
    for name, value in {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(allocated),
        "max_memory_allocated": lambda: 9_345_678,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    step, grad = training_step
    monkeypatch.setattr(training, "time_blocks", lambda *_: {"cupymoe": {}, "grouped_mm": {}})
    assert training.measure_step(step, grad) == {
        "ms": {"cupymoe": {}, "grouped_mm": {}},
        "kept_mb": {"cupymoe": 1.0, "grouped_mm": 1.0},
        "peak_mb": {"cupymoe": 2.3, "grouped_mm": 2.3},
    }


def test_the_host_s_time_of_a_training_step(built, monkeypatch):
    pytest.importorskip("transformers")
    Clock(monkeypatch)
    monkeypatch.setattr(training, "HOST_TOKENS", 70)
    monkeypatch.setattr(training, "BLOCKS", 1)
    rows = training.measure_host(built)
    assert [(row["mode"], row["tokens"]) for row in rows] == [("frozen", 70), ("lora", 70)]
    for row in rows:
        assert row["us"].keys() == {"cupymoe", "grouped_mm"}
        for us in row["us"].values():
            assert us.keys() == {"forward", "backward", "step", "alone"}
            assert 0 < us["forward"]["p20"] < us["step"]["p50"] < 1e7
    assert training_host_table({"training": rows}).count("grouped_mm") == 2


@pytest.mark.parametrize(
    ("name", "limit", "fails"), [("cupymoe", None, True), ("peer", None, False), ("x", 0.006, True)]
)
def test_an_error_limit_is_ours_a_peer_s_or_given(built, name, limit, fails):
    cases = peers.make_cases(CONFIG, built.layers, 3)
    oracles = [peers.Oracle.of(CONFIG, case) for case in cases]
    contender = peers.imported_contender(f"{__name__}:nearly", CONFIG)
    error = built.error(name, 3, Replayed([contender.bind(case) for case in cases]), oracles, limit)
    assert error == pytest.approx(0.008, rel=0.1)
    assert bool(built.failures) == fails


def nearly(*arguments):
    return peer(*arguments) * 1.008


def test_a_report_carries_the_kernels_that_were_loaded_here_and_elsewhere(monkeypatch):
    monkeypatch.setattr(jit, "_loaded_sources", {"route", "combine"})
    assert report.timed_kernels(["gather"]) == {"kernels": kernel_hashes(["combine", "gather", "route"])}


def test_the_first_calls_process_says_what_it_loaded(monkeypatch):
    def run(command, **_):
        compile(command[-1], "first call", "exec")
        return SimpleNamespace(stdout="0.1 0.9512 9.1\nroute combine\n")

    monkeypatch.setattr(timing.subprocess, "run", run)
    seconds, sources = timing.first_call_seconds()
    expected = {"import_cupy": 0.1, "one_token": 0.951, "every_regime": 9.1}
    assert seconds == {"compiling": expected, "from_disk": expected}
    assert sources == {"route", "combine"}


def test_a_row_of_decode_says_whether_invariant_calls_gave_the_same_bits(built, monkeypatch):
    ours = peers.Contender(
        lambda case: lambda: peer(case.inputs.hidden_states, *case.weights, *case.inputs[1:]).bfloat16()
    )
    monkeypatch.setattr(built, "contenders", lambda cases: {"cupymoe": ours}, raising=False)
    monkeypatch.setattr(built, "optional", set(), raising=False)
    monkeypatch.setattr(built, "buffer", None, raising=False)
    monkeypatch.setattr(experts, "capture", Replayed)
    monkeypatch.setattr(experts, "capture_read", lambda *_: None)
    monkeypatch.setattr(invariance, "OTHER_TOKENS", 20)
    times = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    monkeypatch.setattr(experts, "time_in_turn", lambda captured: {name: dict(times) for name in captured})
    ceilings = SimpleNamespace(bf16_tflops=1.0)
    row = built.experts_row(5, ceilings, invariant=True)
    assert (list(row["ms"]), row["bits_equal"], built.failures) == (["cupymoe", "cupymoe:invariant"], True, [])
    assert row["error"]["cupymoe:invariant"] < 0.003
    assert list(built.experts_row(5, ceilings)["ms"]) == ["cupymoe"]

    calls = iter(range(10**6))
    call = invariance._call
    monkeypatch.setattr(invariance, "_call", lambda *arguments: call(*arguments) * (1 + next(calls) % 2 / 128))
    assert not built.experts_row(5, ceilings, invariant=True)["bits_equal"]
    assert built.failures[-1] == "cupymoe:invariant gave a token other bits at T=5 than in a larger call"
