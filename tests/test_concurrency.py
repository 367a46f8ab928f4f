"""Calls at the same time: threads, streams, captures, processes, forks, devices."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cupymoe import Gemma4Experts, Gemma4MoEConfig, fused_experts, route
from cupymoe.backends import registry
from cupymoe.backends.fused import tiles_reason
from cupymoe.kernels import jit
from cupymoe.kernels.expert_tiles import CUTS, cut, prefers_tiles
from cupymoe.kernels.load import Load
from cupymoe.kernels.stream_regimes import regime
from tests.helpers import Experts, oracle, random_experts, relative_error, run_python

BACKENDS = [name for name in registry() if name != "reference"]
SIZES = {"num_experts": 60, "hidden": 256, "intermediate": 176, "top_k": 6}
STREAMED = (1, 7, 14, 50, 100, 300, 600)  # every regime of the weight stream, where tiles don't serve a call
NUM_TOKENS = (*STREAMED, 1300, 3000, 4000)  # and every cut of the tiles, from 320 tokens on
LONG = 50_000_000  # cycles of sleep, longer than it takes to queue what comes after


def random_case(num_tokens, device="cuda", **sizes):
    return random_experts(num_tokens, **{**SIZES, **sizes}, dtype=torch.bfloat16, device=device)


def module_of(case):
    """The experts of a case, as a module that shares its weights."""
    num_experts, hidden, intermediate = case.down_proj.shape
    with torch.device("meta"):
        module = Gemma4Experts(
            Gemma4MoEConfig(
                hidden_size=hidden,
                moe_intermediate_size=intermediate,
                num_experts=num_experts,
                top_k_experts=case.top_k_index.shape[1],
                hidden_activation="gelu_pytorch_tanh",
            )
        )
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, torch.nn.Parameter(getattr(case, name), requires_grad=False))
    return module


def call(module, case):
    return module(case.hidden_states, case.top_k_index, case.top_k_weights)


def in_threads(work, count=8):
    """Results of ``work(0)``, ``work(1)``, ..., all begun at once, each in a thread with a stream of its own."""
    start = threading.Barrier(count)

    def run(number):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            start.wait(timeout=60)
            result = work(number)
        stream.synchronize()
        return result

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def shared_cases(counts=NUM_TOKENS, **sizes):
    """Calls of these numbers of tokens on the weights of the first."""
    first, *others = (random_case(num_tokens, **sizes) for num_tokens in counts)
    return [first, *(Experts(other[0], *first[1:3], *other[3:]) for other in others)]


def test_the_numbers_of_tokens_reach_every_kernel():
    num_experts, top_k = SIZES["num_experts"], SIZES["top_k"]
    loads = [Load.of(count, top_k, num_experts) for count in NUM_TOKENS]
    assert {cut(load, 56) for load in loads if prefers_tiles(load)} == {*CUTS}
    every_regime = {regime(Load.of(count, 1, 1), 56) for count in range(1, 2000)}
    streamed = [Load.of(count, 3, 11) for count in STREAMED]
    assert {regime(load, 56) for load in streamed} == every_regime
    assert all(tiles_reason(load, 104) is not None for load in streamed)


@pytest.mark.gpu
def test_eight_threads_share_a_module():
    cases = shared_cases()
    module = module_of(cases[0])
    expected = [call(module, case) for case in cases]
    torch.cuda.synchronize()

    def work(number):
        order = [(number + step) % len(cases) for step in range(5 * len(cases))]
        return [(i, call(module, cases[i])) for i in order]

    for results in in_threads(work):
        assert len(results) == 5 * len(cases)
        for i, output in results:
            assert torch.equal(output, expected[i]), f"{NUM_TOKENS[i]} tokens"


@pytest.mark.gpu
def test_eight_threads_make_the_first_calls():
    """Of sizes that no other test has: threads wait for one compilation, and none sees a kernel half made."""
    cases = shared_cases(STREAMED, num_experts=11, hidden=104, intermediate=56, top_k=3)
    logits = torch.randn(40, 11, device="cuda")
    module = module_of(cases[0])
    torch.cuda.synchronize()

    def work(number):
        return [call(module, case) for case in cases], route(logits, 3)

    first, *others = in_threads(work)
    compiled = jit.compiled_variants()
    for case, output in zip(cases, first[0], strict=True):
        assert relative_error(output, oracle(case)) < 0.0042
        assert torch.equal(call(module, case), output)
    for outputs, routed in others:
        assert all(torch.equal(a, b) for a, b in zip((*outputs, *routed), (*first[0], *first[1]), strict=True))
    assert jit.compiled_variants() == compiled


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [7, 64, 600])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_modules_on_two_streams_at_once(backend, num_tokens):
    """Both queues are full before either starts, so that the kernels of one run between and beside the other's."""
    cases = [random_case(num_tokens) for _ in range(2)]
    modules = [module_of(case) for case in cases]
    for module in modules:
        module.backend = backend
    expected = [call(module, case) for module, case in zip(modules, cases, strict=True)]
    streams = [torch.cuda.Stream() for _ in modules]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
    outputs = [[], []]
    for _ in range(30):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[i].append(call(modules[i], cases[i]))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(output, expected[i]) for output in outputs[i])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_capture_while_another_thread_runs(backend):
    captured, running = random_case(64), random_case(300)

    def run(case):
        return fused_experts(*case, activation="gelu_tanh", backend=backend)

    expected, expected_running = run(captured), run(running)
    torch.cuda.synchronize()
    done = threading.Event()

    def keep_running():
        differing = torch.zeros((), dtype=torch.int64, device="cuda")
        calls = 0
        with torch.cuda.stream(torch.cuda.Stream()):
            while not done.is_set() or calls < 10:
                differing += (run(running) != expected_running).sum()
                calls += 1
            torch.cuda.current_stream().synchronize()
        return calls, differing.item()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(keep_running)
        try:
            for _ in range(5):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                    output = run(captured)
                for _ in range(20):
                    output.fill_(torch.nan)
                    graph.replay()
                    assert torch.equal(output, expected)
        finally:
            done.set()
        calls, differing = other.result(timeout=60)
    assert calls >= 10
    assert differing == 0


PROCESS = """
import json, os, torch
from cupymoe import fused_experts, route
from cupymoe.kernels import cupy_import
from tests.helpers import oracle, random_experts, relative_error
torch.manual_seed(0)
errors = []
for num_tokens in (3, 100):
    case = random_experts(num_tokens, 8, 128, 64, 2, dtype=torch.bfloat16, device="cuda")
    weights, index = route(torch.randn(num_tokens, 8, device="cuda"), 2)
    case = case._replace(top_k_index=index, top_k_weights=weights)
    errors.append(relative_error(fused_experts(*case, activation="gelu_tanh"), oracle(case)))
print(json.dumps([errors, sorted(os.listdir(cupy_import.cache_folder()))]))
"""


@pytest.mark.gpu
def test_processes_share_a_cold_cache_folder(tmp_path):
    """Both may write the same entries at once; the next finds them all, and no half of one."""

    def process(_):
        return json.loads(run_python(PROCESS, CUPY_CACHE_DIR=str(tmp_path)))

    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(process, range(2)))
    entries = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert entries
    assert all(name.endswith(".cubin") for name in entries)
    for errors, _ in (*at_once, process(2)):
        assert max(errors) < 0.0042
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == entries


FORK = """
import os, torch
import cupymoe
from tests.helpers import oracle, random_experts, relative_error

def call(device):
    torch.manual_seed(0)
    case = random_experts(30, 8, 128, 64, 2, dtype=torch.bfloat16, device=device)
    output = cupymoe.fused_experts(*case, activation="gelu_tanh")
    return relative_error(output, oracle(case)) < 0.0042

if {parent_first}:
    assert call("{device}")
child = os.fork()
if child == 0:
    try:
        right = call("{child_device}")
    finally:
        os._exit(0 if right else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert call("{device}")
print("both right")
"""


def test_fork_after_import(device):
    """As a server that loads its modules once and forks its workers."""
    code = FORK.format(parent_first=False, device=device, child_device=device)
    assert run_python(code, OMP_NUM_THREADS="1") == "both right\n"


@pytest.mark.gpu
def test_fork_of_a_process_that_uses_the_gpu():
    """As a data loader's workers: the child may not touch CUDA, and its CPU calls work."""
    code = FORK.format(parent_first=True, device="cuda", child_device="cpu")
    assert run_python(code, OMP_NUM_THREADS="1") == "both right\n"


@pytest.mark.gpu
@pytest.mark.parametrize("current", [0, 1])
def test_two_devices_with_either_as_the_current_one(current):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    cases = [shared_cases()]
    cases.append([Experts(*(tensor.to("cuda:1") for tensor in case)) for case in cases[0]])
    modules = [module_of(each[0]) for each in cases]
    expected = [call(modules[0], case).cpu() for case in cases[0]]
    with torch.cuda.device(current):
        for module, its_cases, device in zip(modules, cases, (0, 1), strict=True):
            for case, its_expected in zip(its_cases, expected, strict=True):
                output = call(module, case)
                assert output.device.index == device
                assert torch.equal(output.cpu(), its_expected)
        assert torch.cuda.current_device() == current

    def work(number):
        with torch.cuda.device(current):
            return [call(modules[number % 2], case) for case in cases[number % 2]]

    for device in (0, 1):
        torch.cuda.synchronize(device)
    results = in_threads(work, 4)
    for device in (0, 1):
        torch.cuda.synchronize(device)
    for outputs in results:
        assert all(torch.equal(output.cpu(), each) for output, each in zip(outputs, expected, strict=True))
